"""How strong an active latent is, elementwise: JumpReLU and Gated with their straight-through gradients, and penalties.

Every function takes pre-acts of any shape, and per-latent numbers that broadcast to it: the dense (N, M) with (M,), or
the slots of a code with what belongs to each slot's latent. So dense and sparse SAEs share these formulas. A bandwidth
is a number, or likewise one for each latent, which gets no gradient. A pre-act of NaN is above every threshold, so that
a token with NaN has acts of NaN.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastsae.reference.ops import is_above


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: Tensor | float, through: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.through = bandwidth, through
        return torch.where(is_above(pre, threshold), pre, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        pre, threshold = ctx.saved_tensors
        band = in_band(pre, threshold, ctx.bandwidth)
        dthreshold = torch.where(band, -threshold / ctx.bandwidth * grads[0], 0)
        dpre = torch.where(is_above(pre, threshold), grads[0], 0)
        return dpre - dthreshold if ctx.through else dpre, dthreshold.sum_to_size(threshold.shape), None, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: Tensor | float, through: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.through = bandwidth, through
        return is_above(pre, threshold).to(pre.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        pre, threshold = ctx.saved_tensors
        dpre = torch.where(in_band(pre, threshold, ctx.bandwidth), 1 / ctx.bandwidth * grads[0], 0)
        return dpre if ctx.through else None, (-dpre).sum_to_size(threshold.shape), None, None


def in_band(pre: Tensor, threshold: Tensor, bandwidth: Tensor | float) -> Tensor:
    """|pre - threshold| < bandwidth / 2, bool: where the rectangular kernel of JumpReLU's gradients is 1."""
    return (pre - threshold).abs() < bandwidth / 2


def jump_relu(pre: Tensor, threshold: Tensor, bandwidth: Tensor | float, through: bool = False) -> Tensor:
    """pre where pre > threshold, else 0. d/dpre = [pre > threshold];  d/dthreshold = -threshold/bandwidth · [in band].

    through: d/dpre has threshold/bandwidth · [in band] added, so that the jump trains the encoder too.
    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), eq. 3 and 11; through: as of `heaviside`.
    """
    return _Jump.apply(pre, threshold, bandwidth, through)


def heaviside(pre: Tensor, threshold: Tensor, bandwidth: Tensor | float, through: bool = False) -> Tensor:
    """[pre > threshold] as a number; summed, it is L0. d/dthreshold = -1/bandwidth · [in band];  d/dpre = 0.

    through: d/dpre = 1/bandwidth · [in band] instead, so that an L0 penalty trains the encoder too.
    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), eq. 12; through: Conerly et al. 2025 (Transformer Circuits,
    January update).
    """
    return _Step.apply(pre, threshold, bandwidth, through)


def gated(gate: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor) -> Tensor:
    """relu(exp(r_mag)·(gate - b_gate) + b_mag) where gate > 0, else 0; gate = x W_encᵀ + b_gate.

    The selection has no gradient: the gate is trained by its own losses. Source: Rajamanoharan et al. 2024
    (arXiv 2404.16014), eq. 5 to 8.
    """
    magnitude = torch.relu(torch.exp(r_mag) * (gate - b_gate) + b_mag)
    return torch.where(is_above(gate, gate.new_zeros(())), magnitude, 0)
