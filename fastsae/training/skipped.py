"""The warning about a skipped step, with the rows of its batch at fault; and torch's Adam, where it can step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae.ops import checks
from fastsae.warn import warn

SKIPPED = (
    "a gradient, the loss or the learning rate is not finite (NaN, infinite or too large to square), so this step "
    "changed nothing"
)
COUNTED = "Further ones are counted in `skipped` without a warning"
NAMED = 5
"""At most this many rows are named."""


class FirstSkip:
    """Warns about the first skipped step only. `said`: whether that was done, here or elsewhere."""

    def __init__(self) -> None:
        self.said = False

    def __call__(self, what: Callable[[], str]) -> None:
        """what: which rows or SAEs, in words; it follows SKIPPED in the message."""
        if not self.said:
            self.said = True
            warn(f"{SKIPPED}{what()}. {COUNTED}", RuntimeWarning)


def worst_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """How many rows of x (n, D) hold NaN or infinity, 0-d int64, and the worst min(n, NAMED) rows, int64.

    First come those that are not finite, ascending, then the others by their largest magnitude. No host sync.
    """
    # The largest magnitude propagates NaN and, unlike a sum, cannot overflow; it needs no mask as large as x.
    size = torch.linalg.vector_norm(x, ord=math.inf, dim=-1).double()
    bad, n = ~torch.isfinite(size), x.shape[0]
    above = torch.finfo(torch.float64).max * (
        0.5 + 0.5 * torch.arange(n, 0, -1, dtype=torch.float64, device=x.device) / n
    )
    return bad.sum(), torch.where(bad, above, size).topk(min(n, NAMED)).indices


def say_rows(x: Tensor, target: Tensor | None = None) -> str:
    """Which rows of x (*batch, D), and of its target, are not finite, or else the largest. Waits for the device."""
    both = [t.detach().reshape(-1, t.shape[-1]) for t in (x, target) if t is not None]
    both = [t.float() if t.dtype.itemsize == 1 else t for t in both]  # 8 bits have no norm, and no wider dtype
    dtype = torch.promote_types(both[0].dtype, both[-1].dtype)  # a narrower one would make infinity of large numbers
    bad, rows = worst_rows(torch.cat([t.to(dtype) for t in both], 1))
    return said(int(bad), both[0].shape[0], rows.tolist(), "x")


def said(bad: int, of: int, worst: list[int], what: str) -> str:
    """`worst_rows` in words."""
    if not bad:
        return f"the rows of {what} are finite, and the largest is row {worst[0]}"
    named = ", ".join(map(str, worst[:bad]))
    return f"{bad} of {of} rows of {what} hold NaN or infinity: {named}{', ...' if bad > len(worst) else ''}"


def torch_adam(
    kind: str, params: Any, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, **more: Any
) -> torch.optim.Adam:
    """torch's Adam or AdamW. Raises ValueError for another kind, bad settings and float16 weights."""
    kinds: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if kind not in kinds:
        raise ValueError(f"optimizer is {kind!r}, expected one of {', '.join(kinds)}; FusedTrainStep has others")
    checks.optimizer(kind, betas, eps, weight_decay, lr)
    made = kinds[kind](params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **more)
    if any(p.dtype == torch.float16 for group in made.param_groups for p in group["params"]):
        raise ValueError(
            "the weights are float16, and torch's Adam would keep its second moments in float16, where they underflow "
            "(it would step by m / eps); use FusedTrainStep, whose moments are float32, or bfloat16 weights"
        )
    return made
