"""The cases: sizes, how inputs are distributed, and which weights; named once, frozen, the same for every contestant.

random   x and the dictionaries are Gaussian: the flattest scores, so the hardest for a certificate.
zipf     x is built from decoder rows drawn by Zipf(1): a few latents are active in most tokens, most in none.
hot      random, and one latent whose bias puts it on for every token.
real     residual-stream activations of a language model (bench/real.py), mean removed by b_dec as training does.
Weights are random, or those of a TopK SAE trained on the same activations: correlated rows, heavy tails, dead latents.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Distribution = Literal["random", "zipf", "hot", "real"]
N_BATCHES = 4
"""Input batches that timed steps rotate through, so that no step gets the tokens of the step before."""


@dataclass(frozen=True)
class Case:
    """One workload: N tokens, D wide, M latents, K of them active."""

    name: str
    N: int = 4096
    D: int = 768
    M: int = 24576
    K: int = 32
    distribution: Distribution = "random"
    weights: Literal["random", "trained"] = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weights == "trained" and self.distribution != "real":
            raise ValueError(f"case {self.name}: trained weights go with real inputs, not {self.distribution} ones")
        if not 1 <= self.K <= self.M or min(self.N, self.D) < 1:
            raise ValueError(f"case {self.name}: N={self.N} D={self.D} M={self.M} K={self.K}, expected 1 <= K <= M")


@dataclass(frozen=True)
class Inputs:
    """What a case gives to every contestant, fp32: batches of x (N, D); W_enc, W_dec (M, D); b_enc (M); b_dec (D)."""

    batches: tuple[Tensor, ...]
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    provenance: str

    @property
    def x(self) -> Tensor:
        return self.batches[0]


PRIMARY = Case("random")
CASES = (
    PRIMARY,
    Case("zipf", distribution="zipf"),
    Case("hot", distribution="hot"),
    Case("real", D=576, distribution="real"),
    Case("trained", D=576, distribution="real", weights="trained"),
)
"""What `python -m bench` runs, most important first."""

SWEEP = (
    replace(PRIMARY, name="sweep-base"),
    *(replace(PRIMARY, name=f"sweep-N-{N}", N=N) for N in (1024, 2048, 8192)),
    *(replace(PRIMARY, name=f"sweep-M-{M}", M=M) for M in (6144, 12288, 49152)),
    *(replace(PRIMARY, name=f"sweep-D-{D}", D=D) for D in (384, 1536)),
    *(replace(PRIMARY, name=f"sweep-K-{K}", K=K) for K in (8, 64, 128, 256)),
)
"""One size changed at a time: how fastsae's step grows. The base belongs to all four lines."""

BY_NAME = {case.name: case for case in (*CASES, *SWEEP)}
_SHAPE = "shape-"


def of_shape(text: str) -> Case:
    """The case "shape-N-D-M-K" of "N,D,M,K": random inputs and weights. Raises ValueError for other text."""
    try:
        N, D, M, K = map(int, text.replace("_", "").split(","))
    except ValueError:
        raise ValueError(
            f"the shape is {text!r}, expected four whole numbers N,D,M,K such as 2048,768,12288,32"
        ) from None
    return Case(f"{_SHAPE}{N}-{D}-{M}-{K}", N, D, M, K)


def named(name: str) -> Case:
    """The case of that name, also one of `of_shape`. Raises KeyError for another name."""
    if name.startswith(_SHAPE):
        return of_shape(name.removeprefix(_SHAPE).replace("-", ","))
    return BY_NAME[name]


def quick(case: Case) -> Case:
    """The same case at a size that takes milliseconds: for tests and for trying a script. A given shape stays."""
    if case.name.startswith(_SHAPE):
        return case
    return replace(case, N=256, D=min(case.D, 64) if case.distribution != "real" else case.D, M=1024, K=8)


def unit_rows(W: Tensor) -> Tensor:
    return W / W.norm(dim=1, keepdim=True)


def zipf_rows(W_dec: Tensor, n: int, k: int, generator: torch.Generator) -> Tensor:
    """(n, D): each token a sum of k different decoder rows drawn by Zipf(1), weighted in [1, 2), plus some noise."""
    M, D = W_dec.shape
    device = W_dec.device
    weights = 1.0 / torch.arange(1, M + 1, dtype=torch.float32, device=device)
    rank_to_latent = torch.randperm(M, generator=generator, device=device)  # hot latents lie anywhere, not first
    rows = []
    for start in range(0, n, 512):
        m = min(512, n - start)
        drawn = rank_to_latent[torch.multinomial(weights.expand(m, M), min(k, M), generator=generator)]
        coefficients = 1 + torch.rand(drawn.shape, generator=generator, device=device)
        rows.append(torch.einsum("nk,nkd->nd", coefficients, W_dec[drawn]))
    return torch.cat(rows) + 0.05 * torch.randn(n, D, generator=generator, device=device)


def build(
    case: Case,
    real: Callable[[Case, int], Tensor],
    trained: Callable[[Case], dict[str, Tensor]],
    device: torch.device | str = "cpu",
) -> Inputs:
    """The case's tensors, from its seed, made on the device; another kind of device draws different numbers.

    real(case, n) gives n rows of activations; trained(case) gives the trained SAE's W_enc, b_enc, W_dec, b_dec.
    """
    generator = torch.Generator(device).manual_seed(case.seed)
    N, D, M, K = case.N, case.D, case.M, case.K

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    W_enc, b_enc, b_dec = randn(M, D) / D**0.5, torch.zeros(M, device=device), torch.zeros(D, device=device)
    W_dec = unit_rows(W_enc)
    provenance = f"seed {case.seed}"
    if case.distribution == "real":
        x = real(case, N * N_BATCHES).to(device)
        b_dec, provenance = x.mean(0), "activations of a language model"
    elif case.distribution == "zipf":
        W_enc = W_dec.clone()
        x = zipf_rows(W_dec, N * N_BATCHES, K, generator)
    else:
        x = randn(N * N_BATCHES, D)
    if case.distribution == "hot":
        b_enc[M // 3] = 100.0
    if case.weights == "trained":
        parameters = trained(case)
        W_enc, b_enc, W_dec, b_dec = (parameters[name].to(device) for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        provenance += ", trained weights"
    return Inputs(tuple(x.split(N)), W_enc, b_enc, W_dec, b_dec, provenance)
