"""lr_t = lr · Schedule(t): a linear warm-up and a decay over the last fraction of the training; K's annealing.

A schedule is a pure function of the step, so there is nothing to save. It takes the 0-d step tensor of a fused step and
returns a 0-d tensor without a host sync; it takes an int and returns a float, as `torch.optim.lr_scheduler.LambdaLR`
expects.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

DECAYS = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """min(1, (t+1)/warmup) · (1 - (1 - floor)·shape(p)),  p = (t - start)/(total - start) clipped to [0, 1].

    t counts the updates done before this one. The decay begins at `start` = total - decay_fraction·total;
    shape(p) is 0 (constant), p (linear) or (1 - cos πp)/2 (cosine). From t = total on the multiplier is `floor`, so the
    last of `total` updates still has a rate above it.

    total: updates in all; warmup: updates of the warm-up, 0 for none; decay_fraction in [0, 1]; floor in [0, 1].
    Raises ValueError at construction for any other value.
    """

    total: int
    warmup: int = 0
    decay: Literal["constant", "linear", "cosine"] = "constant"
    decay_fraction: float = 0.2
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.total < 1:
            raise ValueError(f"total is {self.total} updates, expected at least 1")
        if not 0 <= self.warmup <= self.total:
            raise ValueError(f"warmup is {self.warmup} updates, expected 0 <= warmup <= total = {self.total}")
        if self.decay not in DECAYS:
            raise ValueError(f"decay is {self.decay!r}, expected one of {', '.join(DECAYS)}")
        for name in ("decay_fraction", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number in [0, 1]")

    @property
    def start(self) -> int:
        """The step at which the decay begins."""
        return self.total - round(self.decay_fraction * self.total)

    @overload
    def __call__(self, step: int) -> float: ...
    @overload
    def __call__(self, step: Tensor) -> Tensor: ...
    def __call__(self, step: int | Tensor) -> float | Tensor:
        if isinstance(step, Tensor):
            return self._multiplier(step)
        return float(self._multiplier(torch.tensor(step, dtype=torch.int64, device="cpu")))

    def _multiplier(self, step: Tensor) -> Tensor:
        """The formula, in float64 on the step's device."""
        t = step.double()
        rise = ((t + 1) / max(self.warmup, 1)).clamp(max=1.0)
        if self.decay == "constant" or self.start == self.total:
            return rise
        p = ((t - self.start) / (self.total - self.start)).clamp(0.0, 1.0)
        shape = p if self.decay == "linear" else (1 - torch.cos(math.pi * p)) / 2
        return rise * (1 - (1 - self.floor) * shape)


@dataclass(frozen=True)
class AnnealK:
    """round(start + (end - start) · t / steps) for t < steps, then end: K's annealing, t updates done before this one.

    Raises ValueError at construction for numbers below 1.
    """

    start: int
    end: int
    steps: int

    def __post_init__(self) -> None:
        for name in ("start", "end", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    def __call__(self, step: int) -> int:
        return round(self.start + (self.end - self.start) * min(step / self.steps, 1.0))


def inverse_sqrt_lr(lr: float, d_sae: int, at: int = 2**14) -> float:
    """lr · √(at / d_sae): a rate chosen for `at` latents, scaled to d_sae (Gao et al. 2024, section 2.4)."""
    return lr * math.sqrt(at / d_sae)
