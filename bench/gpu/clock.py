"""Time on a device: CUDA events where there are some, else the wall clock; and the peak of allocated memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.timing import Sample

FLUSH_BYTES = 2**28
"""Written before each timed call of an op, so that no input is still in the L2 cache (50 MB on an H100)."""
WARMUP = 3
MOST_RUNS = 200


def _now(device: str) -> Any:
    """A point in the stream's time."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(first: Any, last: Any) -> float:
    return float(last - first if isinstance(first, float) else first.elapsed_time(last) / 1e3)


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
        first = _now(device)
        call()
        spans.append((first, _now(device)))
    synchronize(device)
    return Sample.of([_seconds(*span) for span in spans])


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
