"""The dense version of a rule's training step, as a good PyTorch user writes it: (N, M) throughout, torch.topk, autograd.

The mathematics is that of fastsae.reference, whose stable sort is replaced by torch.topk, which is faster and promises
no order among ties.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsae import SparseAutoencoder, activations, reference


def keep_top_k(pre: Tensor, k: int) -> Tensor:
    """relu(pre) with all but the k largest of each token set to 0."""
    acts, indices = torch.relu(pre).topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, acts)


def keep_batch_top_k(pre: Tensor, k: int) -> Tensor:
    """relu(pre) with all but the N·k largest of the batch set to 0."""
    flat = torch.relu(pre).flatten()
    acts, places = flat.topk(pre.shape[0] * k)
    return torch.zeros_like(flat).scatter(0, places, acts).view_as(pre)


def keep_group_max(pre: Tensor, k: int) -> Tensor:
    """relu(pre) at the largest entry of each of k groups."""
    return keep_top_k(pre.unflatten(-1, (k, -1)), 1).flatten(-2)


class DenseFamily:
    """One step of a SparseAutoencoder's settings and weights, densely; `sae` itself stays as it is.

    Prefixes of a Matryoshka are products of slices of A and W_dec; unit norm is kept by projection and renormalisation.
    """

    def __init__(self, sae: SparseAutoencoder, lr: float, autocast: bool = False):
        self.rule, self.sae, self.autocast = sae.activation, sae, autocast
        self.params = nn.ParameterDict({name: p.detach().clone() for name, p in sae.named_parameters()})
        self.optimizer = torch.optim.Adam(self.params.values(), lr=lr, fused=True)

    def acts(self, pre: Tensor, own: dict[str, Tensor]) -> Tensor:
        rule = self.rule.inner if isinstance(self.rule, activations.Matryoshka) else self.rule
        if isinstance(rule, activations.TopK):
            return keep_top_k(pre, rule.k)
        if isinstance(rule, activations.BatchTopK):
            return keep_batch_top_k(pre, rule.k)
        if isinstance(rule, activations.GroupMax):
            return keep_group_max(pre, rule.k)
        if isinstance(rule, activations.HierarchicalTopK):
            return keep_top_k(pre, rule.ks[-1])
        return rule.activate(pre, rule.per_latent(own))

    def recons(self, A: Tensor) -> list[tuple[Tensor, float]]:
        """Each reconstruction that counts, with its weight."""
        W, b, rule = self.params["W_dec"], self.params["b_dec"], self.rule
        if isinstance(rule, activations.Matryoshka) and rule.groups:
            out, recon, start = [], b, 0
            for size in rule.groups:
                recon = recon + A[:, start : start + size] @ W[start : start + size]
                start += size
                out.append((recon, 1 / rule.count))
            return out
        if isinstance(rule, activations.HierarchicalTopK):
            return [(keep_top_k(A, k) @ W + b, 1 / len(rule.ks)) for k in rule.ks]
        return [(A @ W + b, 1.0)]

    def step(self, x: Tensor) -> dict[str, Tensor]:
        """One update; returns loss, mse, fvu, l0 as 0-d tensors."""
        p, rule = self.params, self.rule
        own = dict(p.items())
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            inputs = x - p["b_dec"] if self.sae.pre_bias else x
            pre = F.linear(inputs, p["W_enc"], p["b_enc"])
            A = self.acts(pre, own)
            recons = self.recons(A)
            errors = [((recon.float() - x).square().sum(-1).mean(), weight) for recon, weight in recons]
            loss = torch.stack([weight * error for error, weight in errors]).sum()
            norms = reference.decoder_norms(p["W_dec"]) if rule.needs_norms else p["b_enc"].new_ones(())
            sparsity = rule.sparsity(pre, A, rule.per_latent(own), norms)
            if sparsity is not None:
                loss = loss + rule.coef * rule.penalty(sparsity.sum() / x.shape[0])
            gate = rule.gate(pre)
            if gate is not None:
                frozen = gate @ p["W_dec"].detach() + p["b_dec"].detach()
                loss = loss + (frozen.float() - x).square().sum(-1).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            W = p["W_dec"]
            if self.sae.decoder_norm == "unit":
                W.grad.sub_((W.grad * W).sum(-1, keepdim=True) * W)
            self.optimizer.step()
            if self.sae.decoder_norm == "unit":
                W.div_(W.norm(dim=-1, keepdim=True))
            mse = errors[-1][0].detach()
            variance = (x - x.mean(0)).square().sum() / x.shape[0]
            l0 = (A != 0).sum() / x.shape[0]
        return {"loss": loss.detach(), "mse": mse, "fvu": mse / variance, "l0": l0}
