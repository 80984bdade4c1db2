"""The gradients of an encoder from raw ops: for autograd's formulas, and for a ledger that keeps no terms.

And the check that a step makes of gradients and learning rate before it changes anything: whether it stays finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsae.codes import UpdateTerm
from fastsae.reference import MOMENTS_OF

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


NARROW = 3e38
"""The largest second moment that bf16 and 8 bits hold, minus what their rounding may add."""


def largest_square(dtype: torch.dtype, narrow: bool) -> float:
    """How large the squared norm of all gradients of weights of a dtype may be; narrow: whether moments are bf16 or 8
    bits, which hold no more than float32 does."""
    most = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).max
    return min(most, NARROW) if narrow else most


def gradients_are_bounded(terms: Iterable[UpdateTerm], dense: Iterable[Tensor], like: Tensor, largest: float) -> Tensor:
    """Whether the norms of all gradients are certainly finite: 0-d bool on like's device; False for NaN and infinity.

    With ‖·‖ the norm of a whole matrix and decoder rows of norm 1, ‖dW_dec_i‖ ≤ ‖acts‖ ‖grad‖, ‖dW_enc_i‖ ≤
    max(‖grad‖, ‖dacts‖) ‖x‖ and ‖db_dec‖ ≤ √N ‖grad‖. They are compared with the square root of `largest_square`, since
    norms and second moments square them; decoder rows may be longer by 10³.
    """
    worst = []
    norms: dict[int, Tensor] = {}  # terms share their inputs

    def norm(t: Tensor) -> Tensor:
        if id(t) not in norms:
            norms[id(t)] = whole_norm(t)
        return norms[id(t)]

    terms = list(terms)
    for term in terms:
        grad = norm(term.grad)
        worst.append(term.grad.shape[0] ** 0.5 * grad)
        if term.codes.acts.numel():
            slope = grad if term.dacts is None else torch.maximum(grad, norm(term.dacts))
            worst.append(torch.maximum(norm(term.codes.acts) * grad, slope * norm(term.x)))
    worst += map(whole_norm, dense)
    if not worst:
        return torch.ones((), dtype=torch.bool, device=like.device)
    return (torch.stack(worst) <= largest**0.5 * 1e-3).all()


def can_be_squared(grad: Tensor) -> Tensor:
    """Whether the squares of a gradient, and with them Adam's second moments, are finite: 0-d bool on its device."""
    return whole_norm(grad).isfinite()


def whole_norm(t: Tensor) -> Tensor:
    """The norm of all numbers, 0-d float64: torch's fastest pass over them. Infinite where a square overflows."""
    return torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)).double()


def moves_little(kind: str, group: Mapping[str, Any], like: Tensor, *, lr: Tensor, step: Tensor) -> Tensor:
    """Whether a step at this rate, 0-d float64, leaves weights of like's dtype finite: 0-d bool on the rate's device.

    False for NaN and infinity. kind, group: the optimizer and its settings; step: 0-d, counts this one.
    """
    # lr / (1 - β₁ᵗ) is Adam's own; its moves are below 10³ in units of it.
    size = lr / (1 - group["betas"][0] ** step.double()) if "v" in MOMENTS_OF[kind] else lr
    return (size * max(1.0, group["weight_decay"])).abs() <= torch.finfo(like.dtype).max * 1e-3


def rows_of(p: Tensor, transposed: bool) -> Tensor:
    """p (M, D), or the transpose of p (D, M), one latent per contiguous row; p itself where it is not transposed.

    If its memory has another order, as after `p.data = ...` by other code, the parameter gets new memory, in place.
    """
    rows = p.t() if transposed else p
    if not rows.is_contiguous():
        p.data = p.data.t().contiguous().t() if transposed else p.data.contiguous()
        rows = p.t() if transposed else p
    return rows
