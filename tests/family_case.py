"""The rules that the tests of the family cover, a small SAE of each, and inputs for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import fastsae
from fastsae.model.rules import Activation

N, D, M = 37, 12, 40

RULES: dict[str, Activation] = {
    "topk": fastsae.TopK(5),
    "topk-weighted": fastsae.TopK(5, weighted=True),
    "batch_topk": fastsae.BatchTopK(5),
    "relu": fastsae.ReLU(0.3),
    "relu-plain": fastsae.ReLU(0.3, weighted=False),
    "jumprelu": fastsae.JumpReLU(0.1, threshold=0.3, bandwidth=0.2),
    "jumprelu-tanh": fastsae.JumpReLU(0.1, threshold=0.3, bandwidth=0.2, penalty_kind="tanh"),
    # Its lower bar is below 0, so that half of the latents are in the band.
    "jumprelu-target": fastsae.JumpReLU(0.1, threshold=0.05, bandwidth=0.2, penalty_kind="target", target_l0=4.0),
    "gated": fastsae.Gated(0.2),
    "gated-weighted": fastsae.Gated(0.2, weighted=True),
    "matryoshka": fastsae.Matryoshka(fastsae.TopK(5), groups=(5, 15, 20)),
    "matryoshka-by-norm": fastsae.Matryoshka(fastsae.TopK(5, weighted=True), groups=(5, 15, 20)),
    "matryoshka-weights": fastsae.Matryoshka(fastsae.BatchTopK(5), groups=(8, 32), weights=(2.0, 0.5)),
    "matryoshka-sampled": fastsae.Matryoshka(fastsae.BatchTopK(5), sampled=4, shortest=3),
    "hierarchical_topk": fastsae.HierarchicalTopK((2, 5, 9)),
    "group_max": fastsae.GroupMax(8),
    "abs_topk": fastsae.AbsTopK(5),
}
SHAPED = [name for name, rule in RULES.items() if rule.shaped]


def family_sae(rule: Activation, *, dead: bool = True, **settings: Any) -> fastsae.SparseAutoencoder:
    """An SAE whose parameters are all in general position; every third latent is dead."""
    settings = {"pre_bias": True, "decoder_norm": "free", "dtype": torch.float64, "dead_after": 100, **settings}
    sae = fastsae.SparseAutoencoder(D, M, rule, seed=1, **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype))
        sae.normalize_decoder_()
    sae.calibrate_(tokens(50).to(sae.W_dec.dtype))
    if dead:
        sae.tokens_since_fired[::3] = 100
    return sae


def tokens(n: int = N, seed: int = 0, width: int = D) -> Tensor:
    return torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
