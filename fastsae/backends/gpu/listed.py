"""Lists of tokens that are made on the device, and whose length only the device knows."""

from __future__ import annotations

import torch
from torch import Tensor


def listed_tokens(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens where wanted (N,) bool, ascending, as int32 (N+1,) of which the first `listed` (0-d int32) count."""
    n = wanted.shape[0]
    place = torch.where(wanted, wanted.cumsum(0) - 1, n)
    tokens = torch.zeros(n + 1, dtype=torch.int32, device=wanted.device)
    tokens.scatter_(0, place, torch.arange(n, dtype=torch.int32, device=wanted.device))
    return tokens, wanted.sum(dtype=torch.int32)
