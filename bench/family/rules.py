"""The rules that are compared, for a mean of K active latents per token at M latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch

import fastsae
from bench.cases import Case, Inputs
from fastsae.model.rules import Activation

NAMES = ("TopK", "BatchTopK", "JumpReLU", "Gated", "ReLU", "Matryoshka", "HierarchicalTopK", "GroupMax")


@dataclass(frozen=True)
class Timed:
    """A rule to be timed: how the SAE gets its density on Gaussian scores, and the target for its speed.

    l0: active latents per token. bar: the rule selects by threshold, so b_enc sets the quantile.
    target: dense fp32 time over fastsae's; None: no target is set.
    """

    make: Callable[[Case], Activation]
    l0: Callable[[Case], int]
    bar: bool = False
    target: float | None = None

    def bias(self, case: Case) -> float:
        """b_enc of every latent, for pre-acts that are N(bias, 1): M · P(pre > 0) = l0."""
        return -quantile(self.l0(case), case.M) if self.bar else 0.0


def quantile(l0: float, M: int) -> float:
    """What a standard normal exceeds with probability l0 / M."""
    return NormalDist().inv_cdf(1 - l0 / M)


def groups(M: int) -> tuple[int, ...]:
    """Five groups, each twice as large as the one before, and the rest: M/32, M/16, M/8, M/4, 17 M/32."""
    sizes = [M // 32, M // 16, M // 8, M // 4]
    return (*sizes, M - sum(sizes))


def plain(case: Case) -> int:
    return case.K


TIMED: dict[str, Timed] = {
    "TopK": Timed(lambda c: fastsae.TopK(c.K), plain),
    "BatchTopK": Timed(lambda c: fastsae.BatchTopK(c.K), plain, target=25),
    # Threshold and bandwidth of Rajamanoharan et al. 2024, for inputs of unit variance.
    "JumpReLU": Timed(lambda c: fastsae.JumpReLU(1e-3, threshold=1e-3, bandwidth=1e-3), plain, bar=True, target=15),
    "Gated": Timed(lambda c: fastsae.Gated(1.0), plain, bar=True, target=15),
    "ReLU": Timed(lambda c: fastsae.ReLU(5.0), lambda c: 2 * c.K, bar=True, target=12),
    "Matryoshka": Timed(lambda c: fastsae.Matryoshka(fastsae.TopK(c.K), groups=groups(c.M)), plain),
    "HierarchicalTopK": Timed(lambda c: fastsae.HierarchicalTopK((c.K // 4, c.K // 2, c.K)), plain),
    "GroupMax": Timed(lambda c: fastsae.GroupMax(c.K), plain),
}
MATRYOSHKA_TARGET = 1.6
"""Its step over TopK's, at most."""


def sae_of(inputs: Inputs, rule: Activation, bias: float = 0.0) -> fastsae.SparseAutoencoder:
    """An SAE with the case's weights."""
    M, D = inputs.W_enc.shape
    sae = fastsae.SparseAutoencoder(D, M, rule, seed=0)
    with torch.no_grad():
        assert sae.W_enc is not None
        sae.W_enc.copy_(inputs.W_enc)
        sae.W_dec.copy_(inputs.W_dec)
        sae.b_enc.fill_(bias)
    return sae
