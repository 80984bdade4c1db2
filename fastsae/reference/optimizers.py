"""One step of each optimizer on one parameter, as torch does it for a single group of parameters.

p, g, m, v have one shape; lr, 0-d float64, and step, 0-d int64 that counts from 1, may live on the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOMENTS_OF = {"adam": "mv", "adamw": "mv", "lion": "m", "signsgd": ""}
"""The optimizers by name, and the moments that each keeps for a parameter, in order."""


@dataclass(frozen=True)
class Optimizer:
    """An optimizer and its settings. signsgd reads neither betas nor eps, lion no eps; adam has no weight_decay."""

    kind: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @property
    def moments(self) -> str:
        """The moments that it keeps for a parameter, one letter each."""
        return MOMENTS_OF[self.kind]

    def stepped(
        self, p: Tensor, g: Tensor, moments: tuple[Tensor, ...], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The new p and its new moments. Decoupled decay comes first: p = p (1 - lr · weight_decay)."""
        if self.kind != "adam":
            p = p * (1 - lr * self.weight_decay)
        if self.kind in ("adam", "adamw"):
            m, v = moments
            p, m, v = adam(p, g, m, v, lr, step, self.betas, self.eps)
            return p, (m, v)
        if self.kind == "lion":
            p, m = lion(p, g, moments[0], lr, self.betas)
            return p, (m,)
        return p - lr * g.sign(), ()


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


def lion(p: Tensor, g: Tensor, m: Tensor, lr: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """One step of Lion: the new p and m (arXiv:2302.06675 algorithm 2). The sign of 0 is 0, and so is that of NaN.

    p = p - lr · sign(β₁ m + (1-β₁) g);  m = β₂ m + (1-β₂) g
    """
    beta1, beta2 = betas
    step = torch.sign(beta1 * m + (1 - beta1) * g)
    return p - lr * step, beta2 * m + (1 - beta2) * g
