"""Does a latent's attribution say what its ablation does?

attribution of latent i at a token = activation × (unit direction · ∂(logit_a - logit_b)/∂x)
ablation = what logit_a - logit_b loses if the latent is set to 0 at that token, the reconstruction's error kept

a is the true next token, b the likeliest other one. Everything in float32: in bfloat16 the rounding of two logits is
larger than most latents' effects. Source: Templeton et al. 2024, "Features as computational intermediates".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsae.data.hooks import Hook, run
from fastsae.data.splice import edited
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.evaluate import active_entries

TOP = 10
"""How many of the strongest latents are compared."""
BATCH = 64
"""Ablations in one forward pass."""


@dataclass(frozen=True)
class Latents:
    """Latents active at tokens of one prompt, each (n,): where, which, and three measures of their size."""

    token: Tensor
    latent: Tensor
    activation: Tensor
    attribution: Tensor
    ablation: Tensor


def of_prompt(model: nn.Module, hook: Hook, sae: SparseAutoencoder, ids: Tensor, last: int) -> Latents:
    """Of the latents active at the last `last` tokens of the prompt ids[:-1] (t,); ids[-1] is the true next token."""
    prompt, truth = ids[None, :-1], int(ids[-1])
    x = torch.empty(0)

    def shift(read: Tensor, y: Tensor) -> Tensor:
        nonlocal x
        x = read.detach()
        return y + delta

    delta = torch.zeros(prompt.shape[1], sae.d_in, requires_grad=True)
    with edited(model, hook, shift):
        odds = _last_logits(model, prompt)[0]
    other = int(odds.detach().index_fill(0, torch.tensor([truth]), -torch.inf).argmax())
    (gradient,) = torch.autograd.grad(odds[truth] - odds[other], delta)
    base = float((odds[truth] - odds[other]).detach())
    with torch.no_grad():
        token, latent, act = active_entries(sae.encode(x.to(sae.W_dec.dtype)))
        kept = token >= prompt.shape[1] - last
        token, latent, act = token[kept], latent[kept], act[kept]
        # In the units of x: what the latent adds to the reconstruction.
        stats = sae.norm.statistics(x)
        parts = act[:, None] * sae.W_dec[latent] * (1.0 if stats is None else stats.unit)
        attribution = (parts * gradient[token]).sum(1)
        found = []
        for rows in torch.arange(len(token)).split(BATCH):
            found.append(base - _ablated(model, hook, prompt, parts[rows], token[rows], truth, other))
    ablation = torch.cat(found) if found else act.new_zeros(0)
    return Latents(token, latent, parts.norm(dim=1), attribution, ablation)


def _ablated(
    model: nn.Module, hook: Hook, prompt: Tensor, parts: Tensor, tokens: Tensor, truth: int, other: int
) -> Tensor:
    """logit_a - logit_b (n,) with the i-th part (n, D) taken away at the i-th token (n,)."""
    n, width = len(parts), prompt.shape[1]

    def take_away(read: Tensor, y: Tensor) -> Tensor:
        out = y.clone()
        out[torch.arange(n) * width + tokens] -= parts
        return out

    with edited(model, hook, take_away):
        odds = _last_logits(model, prompt.expand(n, -1))
    return odds[:, truth] - odds[:, other]


def _last_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the last token: (n, vocabulary)."""
    output = run(model, ids)
    return getattr(output, "logits", output)[:, -1]


def compare(found: Latents) -> dict[str, float] | None:
    """Of one prompt: how attribution and activation agree with ablation. None where fewer than TOP latents are active.

    correlation (Pearson); top: how many of the ten with the largest ablation are among the ten largest by the other.
    """
    if len(found.latent) <= TOP:
        return None
    strongest = set(found.ablation.topk(TOP).indices.tolist())
    numbers = {}
    for name, other in (("attribution", found.attribution), ("activation", found.activation)):
        numbers[f"{name}_correlation"] = float(torch.corrcoef(torch.stack([other, found.ablation]).double())[0, 1])
        numbers[f"{name}_top"] = float(len(strongest & set(other.topk(TOP).indices.tolist())))
    return numbers
