"""Which versions of packages a report or a table was made with."""

import contextlib
import importlib.metadata


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed, by name; a checkout that runs in place is not."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
