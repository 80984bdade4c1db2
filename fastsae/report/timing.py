"""The time of one fused update, op by op."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastsae.model.sae import SparseAutoencoder
from fastsae.training.step import FusedTrainStep

WARM_UP, REPEATS = 2, 5


@dataclasses.dataclass(frozen=True)
class StepTiming:
    """One update: its parts in milliseconds, the largest first; "other" is everything outside the engine's ops."""

    parts: dict[str, float]
    n_tokens: int
    threads: int

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.n_tokens / sum(self.parts.values())


class _OpClock(TorchDispatchMode):
    """Sums the seconds of each of the engine's ops while active. On a CPU, calls are synchronous."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        begun = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if getattr(func, "namespace", "") == "fastsae":
            name = func.__name__.split(".")[0].strip("_").replace("_", " ")
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
        return result


def time_step(
    sae: SparseAutoencoder, x: Tensor, backend: str | None = None, target: Tensor | None = None
) -> StepTiming:  # fmt: skip
    """Times updates on x (n, d_in), towards target (n, d_out) or x itself, on the CPU at learning rate 0; the
    dead-latent counters advance.

    The total is the median of 5 updates, divided in proportion to the op times of 5 more. Raises ValueError if the
    fused step does not support this module.
    """
    step = FusedTrainStep(sae, lr=0.0, backend=backend)
    x = x.to(sae.W_dec.device, sae.W_dec.dtype)
    target = None if target is None else target.to(sae.W_dec.device, sae.W_dec.dtype)
    for _ in range(WARM_UP):
        step(x, target)
    whole = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        step(x, target)
        whole.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    with _OpClock() as clock:
        for _ in range(REPEATS):
            step(x, target)
    watched = time.perf_counter() - begun
    parts = {**clock.seconds, "other": max(0.0, watched - sum(clock.seconds.values()))}
    scale = 1e3 * statistics.median(whole) / sum(parts.values())
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return StepTiming({name: seconds * scale for name, seconds in ordered}, len(x), torch.get_num_threads())
