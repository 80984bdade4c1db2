"""The dense truth for modules and training steps: plain torch, autograd, torch.optim.Adam.

Written from the formulas and independent of the ops and their autograd: only the selection uses `fastsae.reference`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastsae import reference
from fastsae.model.rules import TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.training.step import FusedTrainStep


@dataclass
class DenseSAE:
    """A dense copy of `sae`, trained by autograd and torch.optim.Adam. permute: the order of summation over D."""

    sae: SparseAutoencoder
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    permute: Tensor | None = None
    params: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.params = {name: p.detach().clone().requires_grad_() for name, p in self.sae.named_parameters()}
        self.since = self.sae.tokens_since_fired.clone()
        self.adam = torch.optim.Adam(self.params.values(), lr=self.lr, betas=self.betas, eps=self.eps)

    def losses(self, x: Tensor, target: Tensor | None = None, count: bool = True) -> dict[str, Tensor]:
        sae, p = self.sae, self.params
        shift, scale = x.new_zeros(()), x.new_ones(())
        if sae.norm.mode == "constant":
            scale = sae.norm.scale
        elif sae.norm.mode == "layer_norm":
            shift = x.mean(-1, keepdim=True)
            scale = ((x - shift).square().mean(-1, keepdim=True) + 1e-5).sqrt()
        elif sae.norm.mode == "standardize":
            shift, scale = x.mean(-1, keepdim=True), x.std(-1, keepdim=True) + 1e-5
        back = scale - 1e-5 if sae.norm.mode == "standardize" else scale
        normal = (x - shift) / scale
        goal = normal if target is None else (target - shift) / scale
        seen = normal - p["b_dec"] if sae.pre_bias else normal
        W_enc = p.get("W_enc", p["W_dec"])
        if self.permute is not None:
            seen, W_enc = seen[:, self.permute], W_enc[:, self.permute]
        pre = seen @ W_enc.T + p["b_enc"]
        A = reference.keep_top_k(pre, sae.activation.k)
        recon = A @ p["W_dec"] + p["b_dec"]
        over = x.shape[0] if sae.loss == "mse" else (goal - goal.mean(0)).square().sum()
        loss = (recon - goal).square().sum() / over
        out = {sae.loss: loss, "loss": loss, "recon": recon * back + shift, "A": A}
        if count:
            self.since = torch.where((A != 0).any(0), 0, self.since + x.shape[0])
        if sae.aux_k is not None:
            dead = self.since >= sae.dead_after
            A_aux = reference.keep_top_k(torch.where(dead, pre, 0), sae.aux_k)
            missed = (A_aux @ p["W_dec"] - (goal - recon).detach()).square().sum()
            out["aux"] = min(int(dead.sum()) / sae.aux_k, 1.0) * missed / over
            out["loss"] = loss + sae.aux_coef * out["aux"]
        return out

    def step(self, x: Tensor, target: Tensor | None = None) -> dict[str, Tensor]:
        out = self.losses(x, target)
        self.adam.zero_grad()
        out["loss"].backward()
        W, G = self.params["W_dec"], self.params["W_dec"].grad
        assert G is not None
        out["grad_norm"] = torch.stack([p.grad.square().sum() for p in self.params.values()]).sum().sqrt()
        if self.sae.decoder_norm == "unit":
            with torch.no_grad():
                G -= (G * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W
        self.adam.step()
        if self.sae.decoder_norm == "unit":
            with torch.no_grad():
                W /= W.norm(dim=1, keepdim=True)
        return out

    def moments(self) -> dict[str, Tensor]:
        """The moments under the names that `moments_of` uses."""
        keys = ("exp_avg", "exp_avg_sq")
        return {f"{name}.{key}": self.adam.state[p][key] for name, p in self.params.items() for key in keys}


def moments_of(step: FusedTrainStep) -> dict[str, Tensor]:
    """A step's moments and their scales by "<parameter>.<key>"."""
    state = step.state_dict()["optimizer"]["state"]
    return {f"{name}.{key}": t for name, s in state.items() for key, t in s.items() if key != "step"}


def sae_for_test(seed: int = 0, d_in: int = 10, d_sae: int = 30, k: int = 4, **settings) -> SparseAutoencoder:
    """A small SAE in float64 with biases that are not 0, calibrated to a scale that is not 1."""
    settings.setdefault("dtype", torch.float64)
    sae = SparseAutoencoder(d_in, d_sae, TopK(k), seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(d_sae, generator=generator))
        sae.b_dec.copy_(0.3 * torch.randn(sae.d_out, generator=generator))
        if sae.W_enc is not None:  # unequal to W_dec, so that an error cannot hide behind equal rows
            sae.W_enc.add_(0.1 * torch.randn(d_sae, d_in, generator=generator))
        if sae.decoder_norm == "free":
            sae.W_dec.mul_(1 + 0.2 * torch.rand(d_sae, 1, generator=generator))
    return sae.calibrate_(tokens(200, d_in, seed=9, dtype=sae.W_dec.dtype))


def tokens(n: int, d: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    """Rows (n, d) with structure: sparse mixtures of 3d directions, off centre."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3 * d, d, generator=torch.Generator().manual_seed(77), dtype=torch.float64)
    mixture = torch.rand(n, 3 * d, generator=generator, dtype=torch.float64)
    mixture = torch.where(mixture > 0.9, mixture, 0)
    return (0.5 + mixture @ directions + 0.05 * torch.randn(n, d, generator=generator, dtype=torch.float64)).to(dtype)
