"""Blank tokens: rows of x with NaN or infinity, whose scores are NaN, in a selection over the whole batch.

A blank token gets k slots of NaN, at the first k latents, and the others what they would get without it: the (N - B)·k
largest of theirs, where B tokens are blank. Formula: `fastsae.reference.batch_top_k`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsae.backends import buffers


def blank_tokens(x: Tensor) -> Tensor:
    """Bool (N,), of x (N, D)."""
    if not x.shape[1]:
        return buffers.zeros((x.shape[0],), torch.bool, x.device)
    # The largest magnitude propagates NaN and cannot overflow.
    return ~torch.isfinite(torch.linalg.vector_norm(x, ord=math.inf, dim=1))


def with_blank(acts: Tensor, indices: Tensor, offsets: Tensor, blank: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """A ragged code in which every blank token (bool (N,)), which has no slot yet, has its k. No host sync.

    acts (N·k,), indices (N·k,), offsets (N+1,) int64, N at least 1; returned anew.
    """
    capacity, n = acts.shape[0], blank.shape[0]
    fresh = offsets.clone()
    fresh[1:] += (blank.long() * k).cumsum(0)
    slots = buffers.arange(capacity, torch.int64, acts.device)
    token = (torch.searchsorted(fresh, slots, right=True) - 1).clamp(max=n - 1)
    place = slots - fresh[token]
    old, mine = (offsets[token] + place).clamp(max=capacity - 1), blank[token]
    used = slots < fresh[-1]
    filled = torch.where(mine, math.nan, torch.where(used, acts[old], 0))
    return filled, torch.where(mine, place.int(), indices[old]) * used, fresh
