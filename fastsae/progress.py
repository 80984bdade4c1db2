"""Progress bars on stderr; if stderr is not a terminal (a log), a line now and then."""

from __future__ import annotations

import sys

from tqdm import tqdm

LOG_SECONDS = 30.0
"""Minimum time between two lines if stderr is not a terminal."""


class _Lines:
    """Writes each state of a bar as a line of its own, instead of drawing it over the previous one."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def bar(total: int, unit: str, enabled: bool, *, what: str | None = None, done: int = 0) -> tqdm:
    """A bar of `total` units, some of which are done; what: a label in front of it. Not enabled: it shows nothing."""
    drawn = sys.stderr.isatty()
    seconds = 0.2 if drawn else LOG_SECONDS
    return tqdm(
        desc=what, total=total, initial=done, unit=unit, disable=not enabled, dynamic_ncols=drawn or None,
        mininterval=seconds, maxinterval=max(seconds, 10.0), file=None if drawn else _Lines(),
    )  # fmt: skip
