"""Versions of the packages that a report or a table was made with."""

import contextlib
import importlib.metadata


def versions(*packages: str) -> dict[str, str]:
    """Versions by name of those that are installed; a checkout that runs in place is not."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
