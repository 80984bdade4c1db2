"""Lists of tokens that are made on the device, and whose length only the device knows."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.backends import buffers


def listed_tokens(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens where wanted (N,) bool, ascending, as int32 (N+1,) of which the first `listed` (0-d int32) count."""
    n = wanted.shape[0]
    place = torch.where(wanted, wanted.cumsum(0) - 1, n)
    tokens = buffers.zeros((n + 1,), torch.int32, wanted.device)
    tokens.scatter_(0, place, buffers.arange(n, torch.int32, wanted.device))
    return tokens, wanted.sum(dtype=torch.int32)
