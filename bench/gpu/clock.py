"""Time on a device: CUDA events where there are some, else the wall clock; and the peak of allocated memory."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from bench.timing import Sample

FLUSH_BYTES = 2**28
"""Written before each timed call of an op, so that no input is still in the L2 cache (50 MB on an H100)."""
WARMUP = 3
MOST_RUNS = 200


class _Moment:
    """A point in the stream's time."""

    def __init__(self, device: str) -> None:
        self.event = torch.cuda.Event(enable_timing=True) if device == "cuda" else None
        self.seconds = 0.0

    def now(self) -> _Moment:
        if self.event is not None:
            self.event.record()
        else:
            self.seconds = time.perf_counter()
        return self

    def until(self, end: _Moment) -> float:
        """Seconds; on CUDA both must have happened."""
        if self.event is not None and end.event is not None:
            return self.event.elapsed_time(end.event) / 1e3
        return end.seconds - self.seconds


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(call: Callable[[], object], device: str, seconds: float, *, least: int = 3, flush: bool = False) -> Sample:
    """The time of one call: median, p20 and p80 of as many runs as fit into `seconds`, but at least `least`.

    On CUDA the runs are queued and each lies between two events, so a call that is bound by its launches shows it. For
    flush=False the calls must rotate their inputs, or work on more than the cache holds.
    """
    rest = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if flush and device == "cuda" else None
    begun = time.perf_counter()
    for _ in range(WARMUP):
        call()
        synchronize(device)
        if time.perf_counter() - begun > 2 * seconds:
            break
    start = time.perf_counter()
    call()
    synchronize(device)
    once = max(time.perf_counter() - start, 1e-6)
    spans = []
    for _ in range(max(least, min(MOST_RUNS, int(seconds / once)))):
        if rest is not None:
            rest.zero_()
        first, last = _Moment(device), _Moment(device)
        first.now()
        call()
        last.now()
        spans.append((first, last))
    synchronize(device)
    return Sample.of([first.until(last) for first, last in spans])


class PartWatch:
    """The mark of a step that is split into parts: collects the time of each part over many steps."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._spans: dict[str, list[tuple[_Moment, _Moment]]] = defaultdict(list)
        self._last = _Moment(device)

    def start(self) -> None:
        self._last = _Moment(self.device).now()

    def mark(self, part: str) -> None:
        here = _Moment(self.device).now()
        self._spans[part].append((self._last, here))
        self._last = here

    def samples(self) -> dict[str, Sample]:
        synchronize(self.device)
        return {part: Sample.of([a.until(b) for a, b in spans]) for part, spans in self._spans.items()}


def extra_peak_bytes(step: Callable[[Tensor], object], x: Tensor) -> int | None:
    """Bytes that a step allocates above what is there before it, at its highest; None where torch does not count."""
    if not x.is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(x)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
