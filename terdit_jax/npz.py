"""Reading npz files that may be damaged or forged."""

from collections.abc import Iterator
import contextlib

from terdit_jax.errors import UserError, in_a_line


@contextlib.contextmanager
def reading(refusal: str) -> Iterator[None]:
    """Makes a UserError, the refusal and in brackets the reason, of whatever reading an npz raises within.

    zipfile, its decompressors and numpy's parser of headers raise a dozen kinds of exceptions between them, the
    tokenizer's and a failed allocation's among them: no list of them would be complete.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{refusal} ({in_a_line(error)})") from error
