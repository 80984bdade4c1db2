"""A result file that grows entry by entry, so that a run that was stopped goes on; and how busy the machine was."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from bench import machine
from fastsae.atomic import write_json

FORMAT = 1


class Store:
    """<folder>/<name>.json: {"format", "machine", "entries": {key: entry}}, rewritten in one step after each entry.

    An entry holds the settings it was made with; `get` gives it back for equal settings only.
    Raises ValueError for a file of another format.
    """

    def __init__(self, folder: Path, name: str, *, fresh: bool = False):
        self.path = folder / f"{name}.json"
        self.entries: dict[str, dict[str, Any]] = {}
        if self.path.exists() and not fresh:
            self.entries = read(self.path)["entries"]

    def get(self, key: str, settings: dict[str, Any]) -> dict[str, Any] | None:
        entry = self.entries.get(key)
        # Compared as JSON has them: tuples are lists there.
        return entry if entry is not None and entry["settings"] == json.loads(json.dumps(settings)) else None

    def put(self, key: str, settings: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
        """Stores an entry with its settings, the commit and the date, and returns it."""
        here = machine.describe()
        entry = {"settings": settings, **entry, "commit": here["commit"], "date": here["date"]}
        self.entries[key] = json.loads(json.dumps(entry, allow_nan=False))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"format": FORMAT, "machine": here, "entries": self.entries})
        return self.entries[key]


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError where it is of another format."""
    content = json.loads(path.read_text())
    if content.get("format") != FORMAT:
        raise ValueError(f"{path} has format {content.get('format')!r}, expected {FORMAT}; measure it again: --fresh")
    return content


class Others:
    """What other programs take of this machine's cores, from /proc/stat; None on a system without it."""

    def __init__(self) -> None:
        self._begun = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: on the clock, all cores busy, this process busy."""
        stat = Path("/proc/stat")
        if not stat.exists():
            return time.perf_counter(), 0.0, 0.0
        ticks = [int(t) for t in stat.read_text().split()[1:9]]  # user, nice, system, idle, iowait, irq, ...
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        own = os.times()
        return time.perf_counter(), busy, own.user + own.system

    def share(self) -> float | None:
        """Share of all cores' time since construction that other programs took: 0 on an idle machine."""
        now = self._now()
        if now[1] == 0:
            return None
        clock, busy, own = (b - a for a, b in zip(self._begun, now, strict=True))
        return round(max(0.0, (busy - own) / (clock * (os.cpu_count() or 1))), 4)


def wait_for_quiet(limit: float, quiet: float = 0.05, look: float = 3.0) -> None:
    """Waits, at most `limit` seconds, until others have taken no more than `quiet` of the cores for `look` seconds."""
    end = time.perf_counter() + limit
    while time.perf_counter() < end:
        others = Others()
        time.sleep(min(look, limit))
        share = others.share()
        if share is None or share <= quiet:
            return
