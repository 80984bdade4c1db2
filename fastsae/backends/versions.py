"""Versions of torch and Triton: the oldest that work, and the newest that the test suite was run with.

Newer ones are not refused: pip would replace the installed torch, or pick an older release of a package that caps it.
They are used, with one warning.
"""

from __future__ import annotations

import re
from functools import cache

from fastsae.backends.errors import BackendWarning
from fastsae.warn import warn

OLDEST = {"torch": (2, 11), "triton": (3, 6)}
"""pyproject.toml has the same."""
NEWEST = {"torch": (2, 15), "triton": (3, 9)}
"""Of the test suite's runs."""


def minor(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0+cpu"; (0, 0) where there is no such number."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def shown(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def too_old(name: str, version: str) -> str | None:
    """Why this version of torch or triton cannot be used, with a remedy, or None."""
    least = OLDEST[name]
    if minor(version) >= least:
        return None
    return f"{name} {version} is installed, expected {shown(least)} or newer: pip install '{name}>={shown(least)}'"


def untried(name: str, version: str) -> str | None:
    """What is to be known of a version of torch or triton that is newer than those tested, or None."""
    most = NEWEST[name]
    if minor(version) <= most:
        return None
    return (
        f"{name} {version} is newer than {shown(most)}, the newest that fastsae was tested with; if something fails, "
        f"try pip install '{name}<{most[0]}.{most[1] + 1}'"
    )


@cache
def warn_of(name: str, version: str) -> None:
    """Warns of a torch or Triton that is older or newer than those that were tested; a second call says nothing."""
    said = too_old(name, version) or untried(name, version)
    if said is not None:
        warn(said, BackendWarning)
