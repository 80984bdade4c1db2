"""Where the time of one fused update goes, op by op."""

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
    """One update: its parts in milliseconds, the largest first; "other" is whatever is not an op of the engine."""

    parts: dict[str, float]
    n_tokens: int
    threads: int

    @property
    def tokens_per_s(self) -> float:
        return 1e3 * self.n_tokens / sum(self.parts.values())


class _OpClock(TorchDispatchMode):
    """Adds up the seconds of every op of the engine that is called while it is entered; on a CPU, ops do not queue."""

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


def time_step(sae: SparseAutoencoder, x: Tensor, backend: str | None = None) -> StepTiming:
    """Times updates on x (n, d_in) on the CPU at learning rate 0; the dead-latent counters move on.

    The whole is the median of 5 updates, shared out as 5 more, watched op by op, were. Raises ValueError where the
    fused step does not serve this module.
    """
    step = FusedTrainStep(sae, lr=0.0, backend=backend)
    x = x.to(sae.W_dec.device, sae.W_dec.dtype)
    for _ in range(WARM_UP):
        step(x)
    whole = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        step(x)
        whole.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    with _OpClock() as clock:
        for _ in range(REPEATS):
            step(x)
    watched = time.perf_counter() - begun
    parts = {**clock.seconds, "other": max(0.0, watched - sum(clock.seconds.values()))}
    scale = 1e3 * statistics.median(whole) / sum(parts.values())
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return StepTiming({name: seconds * scale for name, seconds in ordered}, len(x), torch.get_num_threads())
