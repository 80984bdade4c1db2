"""The dense version of a rule's training step, as a good PyTorch user writes it: (N, M) throughout, torch.topk.

The mathematics is that of fastsae.reference, whose stable sort is replaced by torch.topk, which is faster and promises
no order among ties.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae import SparseAutoencoder, reference
from fastsae.model import rules as activations
from fastsae.reference import wide

Recons = list[tuple[Tensor, float]]
"""Each reconstruction that counts, with its weight."""


def keep_top_k(pre: Tensor, k: int) -> Tensor:
    """relu(pre) with all but the k largest of each token set to 0."""
    acts, indices = torch.relu(pre).topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, acts)


def keep_batch_top_k(pre: Tensor, k: int) -> Tensor:
    """relu(pre) with all but the N·k largest of the batch set to 0."""
    flat = torch.relu(pre).flatten()
    acts, places = flat.topk(pre.shape[0] * k, sorted=False)
    return torch.zeros_like(flat).scatter(0, places, acts).view_as(pre)


def keep_group_max(pre: Tensor, k: int) -> Tensor:
    """relu(pre) at the largest entry of each of k groups."""
    grouped = torch.relu(pre).unflatten(-1, (k, -1))
    acts, indices = grouped.max(dim=-1, keepdim=True)
    return torch.zeros_like(grouped).scatter(-1, indices, acts).flatten(-2)


class Forward(NamedTuple):
    """loss and mse 0-d, in the graph; acts: the active latents' acts in any shape, the others 0 or left out."""

    loss: Tensor
    mse: Tensor
    acts: Tensor


class DenseFamily:
    """One step of a SparseAutoencoder's settings and weights, densely; `sae` itself stays as it is.

    autocast: products in bfloat16, weights kept in fp32. Prefixes of a Matryoshka are products of slices of A and
    W_dec; unit norm is kept by projection and renormalization. Raises ValueError for settings that it does not know.
    """

    def __init__(self, sae: SparseAutoencoder, lr: float, *, autocast: bool = False):
        plain = {"tied": False, "skip": False, "layers": 1, "aux_k": None, "ghost": None, "loss": "mse"}
        odd = [f"{name}={getattr(sae, name)!r}" for name, value in plain.items() if getattr(sae, name) != value]
        if odd or sae.d_out != sae.d_in:
            what = ", ".join(odd) or f"d_out={sae.d_out}"
            raise ValueError(f"the dense version has no {what}; it knows an SAE with the mse of its own input only")
        self.rule, self.sae, self.autocast, self.lr = sae.activation, sae, autocast, lr
        self.params = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
        self.rule_state = {name: self.params.get(name, t.detach().clone()) for name, t in sae.rule_state.items()}
        self.optimizer = torch.optim.Adam(self.params.values(), lr=lr, fused=True)

    # -- the forward pass ---------------------------------------------------------------------------------------------

    def nested(self, A: Tensor, rule: activations.Matryoshka) -> Recons:
        """The reconstructions of growing prefixes of the dictionary, each from the one before."""
        W, recon, out = self.params["W_dec"], self.params["b_dec"], []
        ends = rule.ends(self.sae.d_sae, self.rule_state, A.device).tolist()
        for (start, end), weight in zip(pairwise((0, *ends)), rule.each_weight, strict=True):
            recon = recon + A[:, start:end] @ W[start:end]
            out.append((recon, weight))
        return out

    def hierarchical(self, pre: Tensor, rule: activations.HierarchicalTopK) -> tuple[Tensor, Recons]:
        """The reconstructions of the k strongest for growing k, from one top-k, which is sorted."""
        acts, indices = torch.relu(pre).topk(rule.ks[-1], dim=-1)
        recon, out = self.params["b_dec"], []
        for (a, b), weight in zip(pairwise((0, *rule.ks)), rule.each_weight, strict=True):
            A = torch.zeros_like(pre).scatter(-1, indices[:, a:b], acts[:, a:b])
            recon = recon + A @ self.params["W_dec"]
            out.append((recon, weight))
        return acts, out

    def recons(self, pre: Tensor) -> tuple[Tensor, Recons]:
        """Acts, dense except for HierarchicalTopK, and the reconstructions."""
        rule = self.rule
        if isinstance(rule, activations.HierarchicalTopK):
            return self.hierarchical(pre, rule)
        inner = rule.inner if isinstance(rule, activations.Matryoshka) else rule
        if isinstance(inner, activations.TopK):
            A = keep_top_k(pre, inner.k)
        elif isinstance(inner, activations.BatchTopK):
            A = keep_batch_top_k(pre, inner.k)
        elif isinstance(inner, activations.GroupMax):
            A = keep_group_max(pre, inner.k)
        else:
            A = inner.activate(pre, inner.per_latent(self.rule_state))
        if isinstance(rule, activations.Matryoshka):
            return A, self.nested(A, rule)
        return A, [(A @ self.params["W_dec"] + self.params["b_dec"], 1.0)]

    def forward(self, x: Tensor, penalty_scale: float = 1.0) -> Forward:
        """x (N, D), normalized."""
        p, rule, n = self.params, self.rule, x.shape[0]

        def squared_error(recon: Tensor) -> Tensor:
            return (wide(recon) - x).square().sum(-1).mean()

        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            pre = F.linear(x - p["b_dec"] if self.sae.pre_bias else x, p["W_enc"], p["b_enc"])
            acts, recons = self.recons(pre)
            errors = [(squared_error(recon), weight) for recon, weight in recons]
            loss = torch.stack([weight * error for error, weight in errors]).sum()
            norms = reference.decoder_norms(p["W_dec"]) if rule.needs_norms else p["b_enc"].new_ones(())
            sparsity = rule.sparsity(pre, acts, rule.per_latent(self.rule_state), norms)
            if sparsity is not None:
                mean = sparsity.sum(dtype=x.dtype) / n  # in bfloat16 it would be rounded to three digits
                loss = loss + penalty_scale * rule.coef * rule.penalty(mean)
            gate = rule.gate(pre)
            if gate is not None:
                loss = loss + squared_error(gate @ p["W_dec"].detach() + p["b_dec"].detach())
        return Forward(loss, errors[-1][0], acts)

    # -- one step -----------------------------------------------------------------------------------------------------

    def step(
        self, x: Tensor, *, lr_scale: float = 1.0, penalty_scale: float = 1.0, count: bool = False
    ) -> dict[str, Tensor]:
        """One update on x (N, D), in the caller's units. 0-d tensors: loss, mse, fvu, and where `count` is set, l0."""
        with torch.no_grad():
            x = self.sae.norm.normalize(x, self.sae.norm.statistics(x))
        found = self.forward(x, penalty_scale)
        self.optimizer.zero_grad(set_to_none=True)
        found.loss.backward()
        self.update(lr_scale)
        with torch.no_grad():
            mse, variance = found.mse.detach(), (x - x.mean(0)).square().sum() / x.shape[0]
            metrics = {"loss": found.loss.detach(), "mse": mse, "fvu": mse / variance}
            if count:
                metrics["l0"] = (found.acts != 0).sum() / x.shape[0]
        return metrics

    @torch.no_grad()
    def update(self, lr_scale: float) -> None:
        """Project the decoder's gradient, Adam, renormalize."""
        W, unit = self.params["W_dec"], self.sae.decoder_norm == "unit"
        if unit:
            assert W.grad is not None
            W.grad.sub_((W.grad * W).sum(-1, keepdim=True) * W)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * lr_scale
        self.optimizer.step()
        if unit:
            W.div_(W.norm(dim=-1, keepdim=True))
        if "batches" in self.rule_state:
            self.rule_state["batches"] += 1  # which prefixes are drawn next
