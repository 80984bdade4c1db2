"""The gradients of an encoder from raw ops: for autograd's formulas, and for a ledger that keeps no terms."""

from __future__ import annotations

import torch
from torch import Tensor

_raw = torch.ops.fastsae


def latent_sums(
    values: Tensor, indices: Tensor, offsets: Tensor | None, d_sae: int, order: list[Tensor] | None, backend: str | None
) -> Tensor:
    """Σₙ of each latent's slots: (M,), as Aᵀ 1, because active_outer is deterministic everywhere."""
    n = values.shape[0] if offsets is None else offsets.shape[0] - 1
    return _raw.active_outer(values, indices, offsets, values.new_ones(n, 1), d_sae, order, backend).squeeze(1)


def weighted_rows(weights: Tensor, rows: Tensor, backend: str | None = None) -> Tensor:
    """Σᵢ weightsᵢ rowsᵢ: (D,) of weights (M,) and rows (M, D), in an order that threads do not change."""
    latent = torch.zeros(rows.shape[0], 1, dtype=torch.int32, device=rows.device)
    weights = weights.to(rows.dtype)[:, None].contiguous()
    return _raw.active_outer(weights, latent, None, rows, 1, None, backend)[0]


def encoder_gradients(
    needs: tuple[bool, bool, bool],
    grad: Tensor,
    x: Tensor,
    W: Tensor,
    acts: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    backend: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dx, dW, db from the gradient of the pre-acts at the slots of a flat code; needs: which of them, else None."""
    needs_x, needs_W, needs_b = needs
    dx = _raw.decode(grad, indices, offsets, W, backend) if needs_x else None
    dW = db = None
    if needs_W or needs_b:
        order = _raw.by_latent(acts, indices, offsets, W.shape[0], backend)
        if needs_W:
            dW = _raw.active_outer(grad, indices, offsets, x, W.shape[0], order, backend)
        if needs_b:
            db = latent_sums(grad, indices, offsets, W.shape[0], order, backend)
    return dx, dW, db
