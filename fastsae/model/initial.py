"""Starting points: random directions, and the centre of a sample."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(rows: int, width: int, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Random directions (rows, width), uniform on the sphere; drawn on the CPU, so that every device gets the same."""
    wider = torch.promote_types(dtype, torch.float32)
    drawn = torch.randn(rows, width, dtype=wider, device="cpu", generator=generator)
    return drawn.div_(torch.linalg.vector_norm(drawn, dim=1, keepdim=True)).to(dtype)


def geometric_median(points: Tensor, iterations: int = 100, tolerance: float = 1e-8) -> Tensor:
    """The point (D,) with the least sum of distances to `points` (n, D).

    Weiszfeld's iteration from the mean; it stops when a move is shorter than `tolerance` times the mean distance, which
    it reads back from the device. Source: Weiszfeld 1937; as b_dec's start in Bricken et al. 2023.
    """
    centre = points.mean(0)
    for _ in range(iterations):
        distance = torch.linalg.vector_norm(points - centre, dim=1)
        typical = float(distance.mean())
        # A point under the centre would get an infinite weight.
        weight = 1 / distance.clamp_min(max(1e-12 * typical, torch.finfo(points.dtype).tiny))
        moved = weight @ points / weight.sum()
        shift = float(torch.linalg.vector_norm(moved - centre))
        centre = moved
        if not shift > tolerance * typical:
            break
    return centre
