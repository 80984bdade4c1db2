"""active_outer: out[i] = Σ_e acts[e] · x[token of e] over the entries e of latent i: Aᵀ x, a dictionary's gradient.

The code is put in latent order, unless the caller passes that order; latents with many entries are cut into pieces.
Every sum has one order, so there are no atomics and the bits never change.
"""

from __future__ import annotations

from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.gpu.by_latent import by_latent
from fastsae.backends.gpu.pieces import cut
from fastsae.backends.gpu.stages import LatentStages


def active_outer(
    stages: LatentStages,
    acts: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    x: Tensor,
    d_sae: int,
    order: list[Tensor] | None,
) -> Tensor:
    """(M, D) in x's dtype. order: what by_latent gives for this code, or None to regroup it here."""
    starts, tokens, slots = by_latent(stages, acts, indices, offsets, d_sae) if order is None else order
    n, D = x.shape
    out = buffers.empty((d_sae, D), x.dtype, x.device)
    if out.numel():
        stages.outer(starts, tokens, slots, acts, x, cut(stages.piece_starts, starts, acts.numel(), n), out)
    return out
