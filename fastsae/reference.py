"""The mathematics of every op and of a whole TopK training step: dense, any floating dtype, torch only.

This file is the single source of truth: nothing here is fast and everything here is short. Every function is pure.
Gradients are in closed form, so the tests can hold them against torch's autograd, and the sparse engine against them.

Shapes: x (N, D), W_enc (M, D), W_dec (M, D_out), b_enc (M,), b_dec (D_out,), A (N, M). Both dictionaries keep one
latent per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Params = dict[str, Tensor]  # W_enc (absent when tied), W_dec, b_enc, b_dec
Moments = dict[str, tuple[Tensor, Tensor]]  # Adam's m and v of each parameter


def wide(t: Tensor) -> Tensor:
    """t in the dtype to compute in: float64 stays, everything narrower becomes float32."""
    return t if t.dtype == torch.float64 else t.float()


# -- encoder: which latents are active, and how strongly --------------------------------------------------------------


def pre_acts(x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None = None) -> Tensor:
    """(x W_encᵀ + b_enc) · scale: (N, M). scale (M,) gates latents, by decoder norm for instance."""
    pre = x @ W_enc.mT + b_enc
    return pre if scale is None else pre * scale


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along the last dimension: values and int64 indices, largest first.

    Ties go to the lower index and NaN ranks highest. torch.topk promises no order among ties, hence the stable sort.
    """
    ordered = torch.sort(values, dim=-1, descending=True, stable=True)
    return ordered.values[..., :k], ordered.indices[..., :k]


def keep_top_k(pre: Tensor, k: int) -> Tensor:
    """A (N, M): relu(pre) with all but the k largest of each token set to 0 (TopK, arXiv:2406.04093 eq. 2)."""
    values, latents = top_k(torch.relu(pre), k)
    return torch.zeros_like(pre).scatter(-1, latents, values)


def batch_top_k(pre: Tensor, k: int) -> Tensor:
    """A (N, M): relu(pre) with all but the N·k largest of the batch set to 0 (BatchTopK, arXiv:2412.06410 eq. 4).

    Ties go to the lower token, then to the lower latent.
    """
    values, places = top_k(torch.relu(pre).flatten(), pre.shape[0] * k)
    return torch.zeros_like(pre).flatten().scatter(-1, places, values).view_as(pre)


def is_above(pre: Tensor, threshold: Tensor) -> Tensor:
    """pre > threshold, bool (N, M), for a threshold of shape (), (M,) or (N, 1). NaN counts as above."""
    return ~(pre <= threshold)


# -- the three products that close forward and backward ---------------------------------------------------------------


def decode(A: Tensor, W: Tensor) -> Tensor:
    """A W: (N, D)."""
    return A @ W


def active_dot(x: Tensor, W: Tensor) -> Tensor:
    """⟨xₙ, Wᵢ⟩ for every pair: (N, M). The op keeps the active pairs only."""
    return x @ W.mT


def active_outer(A: Tensor, x: Tensor) -> Tensor:
    """Aᵀ x: (M, D)."""
    return A.mT @ x


# -- loss -------------------------------------------------------------------------------------------------------------


def loss_unit(target: Tensor, kind: str) -> Tensor:
    """What a summed squared error is divided by: "mse" the N tokens, "fvu" the target's summed variance Σ‖x - x̄‖²."""
    if kind == "mse":
        return target.new_tensor(max(target.shape[0], 1))
    if kind == "fvu":
        return (target - target.mean(0)).square().sum()
    raise ValueError(f"loss is {kind!r}, expected 'mse' or 'fvu'")


def squared_error(recon: Tensor, target: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """L = Σ(recon - target)² / unit, and dL/d recon = 2 (recon - target) / unit."""
    error = recon - target
    return error.square().sum() / unit, 2 * error / unit


# -- gradients in closed form -----------------------------------------------------------------------------------------


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


# -- update -----------------------------------------------------------------------------------------------------------


def project(grad: Tensor, W: Tensor) -> Tensor:
    """gradᵢ - ⟨gradᵢ, Wᵢ⟩ Wᵢ / ‖Wᵢ‖²: the part of a row's gradient orthogonal to the row.

    A row of 0 keeps its gradient.
    """
    squares = W.square().sum(-1, keepdim=True)
    along = (grad * W).sum(-1, keepdim=True) / torch.where(squares > 0, squares, 1)
    return grad - along * W


def normalise(W: Tensor) -> Tensor:
    """Wᵢ / ‖Wᵢ‖. A row of 0 stays 0."""
    norms = W.norm(dim=-1, keepdim=True)
    return W / torch.where(norms > 0, norms, 1)


def adam(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, lr: Tensor, step: Tensor, betas: tuple[float, float], eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of torch.optim.Adam: the new p, m and v. step counts from 1 (Adam, arXiv:1412.6980 algorithm 1).

    m = β₁ m + (1-β₁) g;  v = β₂ v + (1-β₂) g²;  p = p - lr/(1-β₁ᵗ) · m / (√v / √(1-β₂ᵗ) + eps)
    """
    beta1, beta2 = betas
    t = step.double()
    m = m.lerp(g, 1 - beta1)
    v = beta2 * v + (1 - beta2) * g * g
    denominator = v.sqrt() / (1 - beta2**t).sqrt() + eps
    return p - lr / (1 - beta1**t) * (m / denominator), m, v


def _mix(h: Tensor) -> Tensor:
    """A permutation of 32-bit integers held in int64 that scatters neighbours (lowbias32 by C. Wellons)."""
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & 0xFFFFFFFF
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def round_to_bf16(t: Tensor, seed: int, step: Tensor, stream: int) -> Tensor:
    """t (float32) as bfloat16, rounded up or down at random so that the mean is t.

    The 16 random bits of an element are a hash of (seed, step, stream, flat index) and of nothing else: with
    key = mix(mix(mix(seed) + step) + stream), all mod 2³², they are the low half of mix(key ^ index). Adding them to
    float32's bits before dropping the low half carries with probability equal to the dropped fraction.
    """
    key = _mix(torch.full((), seed & 0xFFFFFFFF, dtype=torch.int64, device=t.device))
    key = _mix((_mix((key + step) & 0xFFFFFFFF) + stream) & 0xFFFFFFFF)
    index = torch.arange(t.numel(), device=t.device).view(t.shape) & 0xFFFFFFFF
    noise = _mix(key ^ index) & 0xFFFF
    bits = t.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    bits = torch.where(t.isfinite(), bits + noise, bits) & 0xFFFF0000
    signed = torch.where(bits >= 2**31, bits - 2**32, bits).int()
    return signed.view(torch.float32).bfloat16()


def update(
    params: Params,
    grads: Params,
    moments: Moments,
    lr: Tensor,
    step: Tensor,
    betas: tuple[float, float],
    eps: float,
    unit_norm: bool,
    seed: int | None = None,
) -> tuple[Params, Moments]:
    """Project the decoder's gradient, take one Adam step, renormalise the decoder (both only if unit_norm).

    Moments in bfloat16 are computed with in float32 and stored by `round_to_bf16` under `seed`; stream 2i is the i-th
    parameter's m, stream 2i + 1 its v.
    """
    new_params: Params = {}
    new_moments: Moments = {}
    for i, (name, p) in enumerate(params.items()):
        constrained = unit_norm and name == "W_dec"
        g = project(grads[name], p) if constrained else grads[name]
        m, v = (wide(moment) for moment in moments[name])
        p, m, v = adam(p, g, m, v, lr, step, betas, eps)
        new_params[name] = normalise(p) if constrained else p
        if moments[name][0].dtype == torch.bfloat16 and seed is not None:
            m, v = round_to_bf16(m, seed, step, 2 * i), round_to_bf16(v, seed, step, 2 * i + 1)
        new_moments[name] = (m.to(moments[name][0].dtype), v.to(moments[name][1].dtype))
    return new_params, new_moments


# -- the whole step ---------------------------------------------------------------------------------------------------


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
    unit = loss_unit(target, loss)
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
    """One whole training step of a TopK SAE: forward, loss, gradients, projection, Adam, renormalisation.

    params: W_enc (leave it out to tie it to W_dec), W_dec, b_enc, b_dec; moments as many (m, v), zeros at the start;
    step: 0-d, counts from 1; target: what to reconstruct if not x (a transcoder). Returns new params, moments, losses.
    """
    terms, losses = terms_of(params, x, k, target=target, pre_bias=pre_bias, loss=loss, aux=aux)
    grads = gradients(params, terms, pre_bias)
    params, moments = update(params, grads, moments, lr, step, betas, eps, unit_norm, seed)
    return params, moments, losses
