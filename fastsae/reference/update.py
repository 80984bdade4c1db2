"""One optimizer step on every parameter, with the decoder's rows held at norm 1, and the rounding of narrow moments."""

from __future__ import annotations

import torch
from torch import Tensor

from .gradients import Params
from .ops import wide

Moments = dict[str, tuple[Tensor, Tensor]]  # Adam's m and v of each parameter


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


def mixed(numbers: Tensor, seed: int) -> Tensor:
    """32 random-looking bits for each of the whole numbers, int64: a function of (seed, number) and nothing else."""
    key = _mix(torch.full((), seed & 0xFFFFFFFF, dtype=torch.int64, device=numbers.device))
    return _mix(key ^ (numbers & 0xFFFFFFFF))


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
