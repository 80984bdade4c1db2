"""Gradients of a reconstruction in closed form, so that the tests can hold them against torch's autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .ops import active_dot, active_outer

Params = dict[str, Tensor]  # W_enc (absent when tied), W_dec, b_enc, b_dec


@dataclass(frozen=True)
class Term:
    """One reconstruction in the loss: A (N, M), x (N, D) the encoder's input, grad (N, D_out) = dL/d recon."""

    A: Tensor
    x: Tensor
    grad: Tensor
    has_bias: bool = True  # recon = A W_dec + b_dec; without: A W_dec


def gradients(params: Params, terms: Sequence[Term], pre_bias: bool) -> Params:
    """dL/d parameter, summed over the terms.

    dA = grad W_decᵀ where A is not 0 (an inactive latent has no gradient), and then
    dW_dec = Aᵀ grad, dW_enc = dAᵀ x, db_enc = Σₙ dA, db_dec = Σₙ grad;
    with pre_bias the encoder sees x - b_dec, so db_dec loses Σₙ dA W_enc = Σᵢ db_encᵢ W_encᵢ.
    Tied dictionaries (no W_enc): both gradients belong to W_dec.
    """
    tied = "W_enc" not in params
    W_dec = params["W_dec"]
    W_enc = W_dec if tied else params["W_enc"]
    dW_enc, dW_dec = torch.zeros_like(W_enc), torch.zeros_like(W_dec)
    db_enc, db_dec = torch.zeros_like(params["b_enc"]), torch.zeros_like(params["b_dec"])
    for term in terms:
        dA = torch.where(term.A != 0, active_dot(term.grad, W_dec), 0)
        dW_dec = dW_dec + active_outer(term.A, term.grad)
        dW_enc = dW_enc + active_outer(dA, term.x)
        db_enc = db_enc + dA.sum(0)
        if term.has_bias:
            db_dec = db_dec + term.grad.sum(0)
    if pre_bias:
        db_dec = db_dec - db_enc @ W_enc
    if tied:
        return {"W_dec": dW_dec + dW_enc, "b_enc": db_enc, "b_dec": db_dec}
    return {"W_enc": dW_enc, "W_dec": dW_dec, "b_enc": db_enc, "b_dec": db_dec}


def squared_norms(grads: Params) -> Tensor:
    """[Σ dW_enc², Σ dW_dec², Σ db_enc², Σ db_dec²] in float64; tied: 0, then the norm of the summed row gradients."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    zero = grads["W_dec"].new_zeros((), dtype=torch.float64)
    return torch.stack([grads[name].double().square().sum() if name in grads else zero for name in names])
