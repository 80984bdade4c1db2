"""A whole training step of a TopK SAE: forward, loss, gradients, projection, Adam, renormalization."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.reference.gradients import Params, Term, gradients
from fastsae.reference.ops import decode, keep_top_k, loss_denominator, pre_acts, squared_error
from fastsae.reference.optimizers import Optimizer
from fastsae.reference.update import Moments, shape_gradients, update


@dataclass(frozen=True)
class AuxK:
    """The auxiliary loss on dead latents (arXiv:2406.04093 eq. 9): the k most active dead latents fit the residual."""

    dead: Tensor  # bool (M,)
    k: int
    coef: float = 1 / 32


def terms_of(
    params: Params, x: Tensor, k: int, *, target: Tensor | None, pre_bias: bool, loss: str, aux: AuxK | None
) -> tuple[list[Term], dict[str, Tensor]]:
    """Forward and loss: the terms whose gradients train the SAE, and the losses by name.

    recon = A W_dec + b_dec with A the top k of relu((x - b_dec if pre_bias else x) W_encᵀ + b_enc);
    L = Σ(recon - x)²/unit + coef · Σ(A_aux W_dec - (x - recon))²/unit, the residual taken as a constant.
    """
    target = x if target is None else target
    inputs = x - params["b_dec"] if pre_bias else x
    pre = pre_acts(inputs, params.get("W_enc", params["W_dec"]), params["b_enc"])
    A = keep_top_k(pre, k)
    recon = decode(A, params["W_dec"]) + params["b_dec"]
    unit = loss_denominator(target, loss)
    main, grad = squared_error(recon, target, unit)
    terms, losses = [Term(A, inputs, grad)], {loss: main, "loss": main}
    if aux is not None:
        A_aux = keep_top_k(torch.where(aux.dead, pre, 0), aux.k)
        auxiliary, grad_aux = squared_error(decode(A_aux, params["W_dec"]), target - recon, unit)
        terms.append(Term(A_aux, inputs, aux.coef * grad_aux, has_bias=False))
        losses |= {"aux": auxiliary, "loss": main + aux.coef * auxiliary}
    return terms, losses


def train_step(
    params: Params,
    moments: Moments,
    x: Tensor,
    k: int,
    *,
    lr: Tensor,
    step: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    target: Tensor | None = None,
    pre_bias: bool = True,
    unit_norm: bool = True,
    loss: str = "mse",
    aux: AuxK | None = None,
    seed: int | None = None,
) -> tuple[Params, Moments, dict[str, Tensor]]:
    """One whole training step of a TopK SAE: forward, loss, gradients, projection, Adam, renormalization.

    params: W_enc (leave it out to tie it to W_dec), W_dec, b_enc, b_dec; moments as many (m, v), zeros at the start;
    step: 0-d, counts from 1; target: what to reconstruct if not x (a transcoder). Returns new params, moments, losses.
    """
    terms, losses = terms_of(params, x, k, target=target, pre_bias=pre_bias, loss=loss, aux=aux)
    grads = shape_gradients(params, gradients(params, terms, pre_bias), unit_norm)
    params, moments = update(params, grads, moments, lr, step, Optimizer("adam", betas, eps), unit_norm, seed)
    return params, moments, losses
