"""Codes of every layout that an op may get, with a case's sizes and N·K stored activations; the same on every backend.

fixed    K latents a token, spread over the dictionary
ragged   from none to about 2K latents a token, as the encoders with a threshold make them
heavy    ragged, and one token in a hundred has a hundred times as many latents as the others
hot      fixed, and one latent is on for every token
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case
from bench.gpu.plan import LAYOUTS
from fastsae import SparseCodes

HEAVY, EVERY = 100, 100
"""A heavy token is HEAVY times as long as the others; every EVERY-th token is heavy, beginning with the first."""


def spread(counts: Tensor, latents: int, generator: torch.Generator) -> Tensor:
    """int32 (Σ counts,): for each token so many different latents, ascending: one drawn from each equal stretch."""
    tokens = torch.repeat_interleave(counts)
    nth = torch.arange(len(tokens), device=counts.device) - (counts.cumsum(0) - counts)[tokens]
    first, last = nth * latents // counts[tokens], (nth + 1) * latents // counts[tokens]
    drawn = torch.rand(len(tokens), generator=generator, device=counts.device)
    return (first + (drawn * (last - first)).long().clamp(max=last - first - 1)).int()


def make(layout: str, case: Case, device: str) -> SparseCodes:
    """The code of that layout. Acts are in [0.5, 1.5), so that no order of a sum loses much."""
    generator = torch.Generator(device).manual_seed(LAYOUTS.index(layout))
    acts = 0.5 + torch.rand(case.N * case.K, generator=generator, device=device)
    if layout in ("fixed", "hot"):
        few = torch.full((case.N,), case.K, device=device)
        if layout == "fixed":
            return SparseCodes(acts.view(case.N, -1), spread(few, case.M, generator).view(case.N, -1), case.M)
        rest = 1 + spread(few - 1, case.M - 1, generator).view(case.N, case.K - 1)
        return SparseCodes(acts.view(case.N, -1), torch.cat([torch.zeros_like(rest[:, :1]), rest], 1), case.M)
    if layout == "ragged":
        weights = torch.rand(case.N, generator=generator, device=device)
    else:
        weights = torch.ones(case.N, device=device).index_fill(0, torch.arange(0, case.N, EVERY, device=device), HEAVY)
    ends = (weights.double().cumsum(0) / weights.double().sum() * case.N * case.K).round().long()
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseCodes(acts, spread(counts, case.M, generator), case.M, offsets)
