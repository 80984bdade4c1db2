"""by_latent: the occupied slots of a code, latent by latent (CSC); tokens ascend within a latent, slots within a token.

    key of a slot = its latent, M where it is empty;  order = a stable sort of the keys;
    offsets[i] = how many keys are below i;  tokens, slots = those of order[0], order[1], ...

A stable sort has one result, so this is deterministic, duplicates and all.

Occupied: fixed K, act != 0 (NaN is); ragged, slot < offsets[N]. A slot whose latent is outside 0 .. M-1 counts as
empty, so that nothing is ever read or written outside the dictionary. Past the end tokens and slots are -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.gpu.stages import LatentStages


def by_latent(
    stages: LatentStages, acts: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int
) -> tuple[Tensor, Tensor, Tensor]:
    """offsets (M+1,) int64, tokens (slots,) int32, slots (slots,) int64."""
    size = (buffers.count_int32("the slots of the codes", acts.numel()),)
    keys, rows = (buffers.empty(size, torch.int32, acts.device) for _ in range(2))
    stages.list_slots(acts, indices, offsets, d_sae, keys, rows, None)
    starts, tokens, slots, _ = stages.sort_slots(keys, rows, None, d_sae)
    return starts, tokens, slots
