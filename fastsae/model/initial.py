"""Starting points: random directions, and the centre of a sample."""

from __future__ import annotations

import torch
from torch import Tensor

DRAWN = 1 << 20
"""Numbers that are drawn at once, or a few rows."""


def unit_rows(
    rows: int, width: int, dtype: torch.dtype, generator: torch.Generator | None, first: int = 0, own: int | None = None
) -> Tensor:
    """Random directions (rows, width), uniform on the sphere; drawn on the CPU, so that every device gets the same.

    own: only the rows [first, first + own), with the numbers that they have among all; memory is for these alone.
    """
    wider, last = torch.promote_types(dtype, torch.float32), rows if own is None else first + own
    found = torch.empty(last - first, width, dtype=dtype, device="cpu")
    # torch draws 16 numbers at a time, and the last 16 again where they are no multiple: blocks of 16 rows, the last of
    # which also takes what is left over, use its generator as all rows at once do.
    each = max(1, DRAWN // (16 * width)) * 16
    starts = [each * i for i in range(max(1, rows // each))]
    for start, end in zip(starts, [*starts[1:], rows], strict=True):
        drawn = torch.randn(end - start, width, dtype=wider, device="cpu", generator=generator)
        drawn.div_(torch.linalg.vector_norm(drawn, dim=1, keepdim=True))
        low, high = max(start, first), min(end, last)
        if low < high:
            found[low - first : high - first] = drawn[low - start : high - start]
    return found


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
