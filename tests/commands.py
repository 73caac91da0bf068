"""Commands as modules: they define flags of the same names, of which a process can hold one each."""

from collections.abc import Iterator
import contextlib

from absl import flags


@contextlib.contextmanager
def no_flags() -> Iterator[None]:
    """Commands imported inside leave their functions behind and their flags not: those cannot be read afterwards."""
    before = _take_ours()
    try:
        yield
    finally:
        _take_ours()
        for flag in before:
            flags.FLAGS[flag.name] = flag


def _take_ours() -> list[flags.Flag]:
    """Removes the flags that our modules have defined, and returns them."""
    found = [
        flag
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith(("terdit_jax.", "benchmarks."))
        for flag in defined
        if flag.name in flags.FLAGS and flags.FLAGS[flag.name] is flag
    ]
    for flag in found:
        delattr(flags.FLAGS, flag.name)
    return found
