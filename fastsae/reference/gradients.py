"""Gradients of a reconstruction in closed form, so that the tests can compare them with torch's autograd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.reference.ops import active_dot, active_outer

Params = dict[str, Tensor]  # W_enc (absent when tied), W_dec, b_enc, b_dec


@dataclass(frozen=True)
class Term:
    """One reconstruction in the loss: A (N, M), x (N, D) the encoder's input, grad (N, D_out) = dL/d recon.

    dA (N, M): the gradient of the pre-acts, or None where it is grad W_decᵀ at the latents whose act is not 0.
    """

    A: Tensor
    x: Tensor
    grad: Tensor
    has_bias: bool = True  # recon = A W_dec + b_dec; without: A W_dec
    dA: Tensor | None = None


@dataclass(frozen=True)
class Parts:
    """What is added to the gradients besides the terms.

    decoder_pull (M, L): dW_decᵢ gains decoder_pull[i, l] · W_decᵢ in the l-th of L equal segments of the row, the
    gradient of a penalty Σ c[i, l] ‖W_dec[i, segment l]‖ being c / ‖W_dec[i, segment l]‖ times that segment.
    db_enc (M,): a gradient of b_enc alone, from a rule that also uses b_enc outside the pre-acts.
    W_enc, W_dec, pre (M,): gradients of both dictionaries and Σₙ of that of the pre-acts, from a dense path; tied:
    W_enc is None and W_dec is the sum of both.
    """

    decoder_pull: Tensor | None = None
    db_enc: Tensor | None = None
    W_enc: Tensor | None = None
    W_dec: Tensor | None = None
    pre: Tensor | None = None


NO_PARTS = Parts()


def gradients(params: Params, terms: Sequence[Term], pre_bias: bool, parts: Parts = NO_PARTS) -> Params:
    """dL/d parameter, summed over the terms and parts.

    dA = grad W_decᵀ where A is not 0 (an inactive latent has no gradient), unless the term has its own dA; then
    dW_dec = Aᵀ grad, dW_enc = dAᵀ x, db_enc = Σₙ dA, db_dec = Σₙ grad;
    with pre_bias the encoder sees x - b_dec, so db_dec loses Σₙ dA W_enc = Σᵢ db_encᵢ W_encᵢ.
    Tied dictionaries (no W_enc): both gradients belong to W_dec.
    """
    W_dec = params["W_dec"]
    sums = {name: torch.zeros_like(p) for name, p in params.items()}
    sums.setdefault("W_enc", torch.zeros_like(W_dec))
    for term in terms:
        dA = torch.where(term.A != 0, active_dot(term.grad, W_dec), 0) if term.dA is None else term.dA
        sums["W_dec"] = sums["W_dec"] + active_outer(term.A, term.grad)
        sums["W_enc"] = sums["W_enc"] + active_outer(dA, term.x)
        sums["b_enc"] = sums["b_enc"] + dA.sum(0)
        if term.has_bias:
            sums["b_dec"] = sums["b_dec"] + term.grad.sum(0)
    if parts.pre is not None:
        sums["b_enc"] = sums["b_enc"] + parts.pre
    if pre_bias:
        sums["b_dec"] = sums["b_dec"] - sums["b_enc"] @ params.get("W_enc", W_dec)
    return with_parts(params, sums, parts)


def with_parts(params: Params, sums: Params, parts: Parts) -> Params:
    """The gradients from sums over the terms: dW_enc, dW_dec, db_dec, and db_enc with parts.pre in it already."""
    W_enc, W_dec = params.get("W_enc"), params["W_dec"]
    dW_enc, dW_dec, db_enc = sums["W_enc"], sums["W_dec"], sums["b_enc"]
    if parts.W_enc is not None:
        dW_enc = dW_enc + parts.W_enc
    if parts.W_dec is not None:
        dW_dec = dW_dec + parts.W_dec
    if parts.decoder_pull is not None:
        segments = W_dec.unflatten(1, (parts.decoder_pull.shape[1], -1))
        dW_dec = dW_dec + (parts.decoder_pull[..., None] * segments).flatten(1)
    if parts.db_enc is not None:
        db_enc = db_enc + parts.db_enc
    biases = {"b_enc": db_enc, "b_dec": sums["b_dec"]}
    return {"W_dec": dW_dec + dW_enc} | biases if W_enc is None else {"W_enc": dW_enc, "W_dec": dW_dec} | biases


def squared_norms(grads: Params) -> Tensor:
    """[Σ dW_enc², Σ dW_dec², Σ db_enc², Σ db_dec²] in float64; tied: 0, then the norm of the summed row gradients."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    zero = grads["W_dec"].new_zeros((), dtype=torch.float64)
    return torch.stack([grads[name].double().square().sum() if name in grads else zero for name in names])
