"""Commands as modules: they define flags of the same names, of which a process can hold one each."""

from collections.abc import Iterator
import contextlib

from absl import flags


@contextlib.contextmanager
def no_flags() -> Iterator[None]:
    """Commands imported inside keep their functions and lose their flags, which cannot be read afterwards."""
    before = _take_ours()
    try:
        yield
    finally:
        _take_ours()
        for module, flag in before:
            flags.FLAGS[flag.name] = flag
            flags.FLAGS.register_flag_by_module(module, flag)


def _take_ours() -> list[tuple[str, flags.Flag]]:
    """Removes the flags that our modules have defined, and returns them with the modules."""
    found = [
        (module, flag)
        for module, defined in flags.FLAGS.flags_by_module_dict().items()
        if module.startswith(("terdit_jax.", "benchmarks."))
        for flag in defined
        if flag.name in flags.FLAGS and flags.FLAGS[flag.name] is flag
    ]
    for _, flag in found:
        delattr(flags.FLAGS, flag.name)
    return found
