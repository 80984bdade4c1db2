"""Wall time with its spread, contestants taking turns; and the clock that splits a step into its parts.

Turns matter: a machine slows down and speeds up over minutes, so programs are compared only if they ran side by side.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Mark = Callable[[str], None]
"""Called by a step at the end of each of its parts, with the part's name."""


def unmarked(part: str) -> None:
    """The mark of a step that is not split into parts."""


@dataclass(frozen=True)
class Sample:
    """Seconds: the median of n runs, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    n: int

    @classmethod
    def of(cls, seconds: list[float]) -> Sample:
        if not seconds:
            raise ValueError("no run was timed: expected at least one")
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        cuts = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), cuts[1], cuts[7], len(seconds))

    def in_ms(self) -> dict[str, float]:
        """As result files hold it: ms, p20, p80 in milliseconds, and the number of runs."""
        return {"ms": self.median * 1e3, "p20": self.p20 * 1e3, "p80": self.p80 * 1e3, "runs": self.n}


class Stopwatch:
    """Collects the seconds between marks, part by part, over many steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._last = time.perf_counter()

    def start(self) -> None:
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part].append(now - self._last)
        self._last = now

    def samples(self) -> dict[str, Sample]:
        return {part: Sample.of(seconds) for part, seconds in self.seconds.items()}


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    min_seconds: float,
    warmup: int = 1,
    on_round: Callable[[int], object] = lambda r: None,
) -> dict[str, Sample]:
    """Each call's time. In every round each call gets a turn of min_seconds, at least one run; every run counts once.

    warmup: untimed runs of each call before the first round. rounds >= 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds: got {rounds}, expected 1 or more")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warmup):
            call()
    for r in range(rounds):
        for name, call in calls.items():
            turn = time.perf_counter()
            while True:
                start = time.perf_counter()
                call()
                end = time.perf_counter()
                seconds[name].append(end - start)
                if end - turn >= min_seconds:
                    break
        on_round(r)
    return {name: Sample.of(runs) for name, runs in seconds.items()}
