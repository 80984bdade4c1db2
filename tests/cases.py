"""The named cases that every op is tested on: sizes and inputs chosen to expose faults.

A case gives (x, W, b, k) in any dtype: inputs are made in float32 from the case's own seed and rounded to that dtype.
A test computes its truth in float64 from the rounded inputs. `exact` cases hold small integers, so that every order of
summation gives the same scores in every dtype, and the indices can be compared too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor]  # x (N, D), W (M, D), b (M,)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Case:
    """N tokens, D wide, M latents, K of them active; make fills x, W and b."""

    name: str
    N: int
    D: int
    M: int
    K: int
    make: Callable[[Case, torch.Generator], Inputs]
    exact: bool = False
    finite: bool = True

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """x (N, D), W (M, D), b (M,), rounded to dtype; x keeps the strides that the case gave it."""
        x, W, b = self.make(self, torch.Generator().manual_seed(0))
        return x.to(dtype), W.to(dtype), b.to(dtype)

    def __str__(self) -> str:
        return self.name


def _random(case: Case, g: torch.Generator) -> Inputs:
    x, W = torch.randn(case.N, case.D, generator=g), torch.randn(case.M, case.D, generator=g) / case.D**0.5
    return x, W, 0.1 * torch.randn(case.M, generator=g)


def _negative(case: Case, g: torch.Generator) -> Inputs:
    x, W, b = _random(case, g)
    return x, W, b - 100


def _repeated(case: Case, g: torch.Generator) -> Inputs:
    x, W, b = _random(case, g)
    return x[:1].repeat(case.N, 1), W, b


def _hot(case: Case, g: torch.Generator) -> Inputs:
    x, W, b = _random(case, g)
    b[case.M // 3] = 100
    return x, W, b


def _ties(case: Case, g: torch.Generator) -> Inputs:
    """Ternary numbers: the scores of M latents take 2D + 1 values."""
    x, W = (torch.randint(-1, 2, (n, case.D), generator=g).float() for n in (case.N, case.M))
    return x, W, torch.zeros(case.M)


def _equal(case: Case, g: torch.Generator) -> Inputs:
    """Every latent scores the same: only the tie rule decides."""
    x, W, _ = _ties(case, g)
    return x.abs() + 1, torch.ones_like(W), torch.zeros(case.M)


def _duplicates(case: Case, g: torch.Generator) -> Inputs:
    """Each latent occurs four times, far apart."""
    x, W, b = _ties(case, g)
    return x, W[: -(-case.M // 4)].repeat(4, 1)[: case.M], b


def _sorted(case: Case, g: torch.Generator) -> Inputs:
    """The best latents of every token come last: the first ones do not predict the rest."""
    x, W, _ = _random(case, g)
    return x, 0.2 * W, torch.linspace(-2, 2, case.M)


def _sorted_down(case: Case, g: torch.Generator) -> Inputs:
    x, W, b = _sorted(case, g)
    return x, W, b.flip(0)


def _block(case: Case, g: torch.Generator) -> Inputs:
    """All the mass in one run of 2K latents."""
    x, W, _ = _random(case, g)
    b = torch.full((case.M,), -10.0)
    b[case.M // 2 : case.M // 2 + 2 * case.K] = 10
    return x, W, b


def _stride(case: Case, g: torch.Generator) -> Inputs:
    """Mass on every 16th latent: a strided sample sees all of it or nothing."""
    x, W, _ = _random(case, g)
    b = torch.full((case.M,), -10.0)
    b[::16] = 10
    return x, W, b


def _norms(case: Case, g: torch.Generator) -> Inputs:
    """Tokens of norm 0, 1e-4, 1 and 1e4 side by side."""
    x, W, b = _random(case, g)
    size = torch.tensor([0.0, 1e-4, 1.0, 1e4]).repeat(-(-case.N // 4))[: case.N, None]
    return size * x / x.norm(dim=1, keepdim=True), W, b


def _massive(case: Case, g: torch.Generator) -> Inputs:
    """Two coordinates of x a hundred times the rest, as in language models."""
    x, W, b = _random(case, g)
    x[:, 1] += 100
    x[:, case.D // 2] -= 100
    return x, W, b


def _strided_input(case: Case, g: torch.Generator) -> Inputs:
    """No tensor is contiguous."""
    x, W, b = _random(case, g)
    wide = torch.empty(case.D, 2 * case.N).mT
    wide[::2] = x
    return wide[::2], W.mT.contiguous().mT, b.repeat_interleave(2)[::2]


def _nan(case: Case, g: torch.Generator) -> Inputs:
    """One token with a NaN in it, among ordinary ones."""
    x, W, b = _random(case, g)
    x[1, 2] = float("nan")
    return x, W, b


CASES = (
    Case("random", 64, 96, 1024, 32, _random),
    Case("no-tokens", 0, 16, 64, 4, _random),
    Case("one-token", 1, 7, 33, 3, _random),
    Case("odd", 37, 65, 259, 5, _random),
    Case("one-wide", 9, 1, 40, 3, _random),
    Case("k-1", 19, 33, 300, 1, _random),
    Case("k-all", 5, 16, 24, 24, _random),
    Case("one-latent", 6, 5, 1, 1, _random),
    Case("all-negative", 33, 24, 200, 4, _negative),
    Case("repeated-tokens", 65, 32, 512, 8, _repeated),
    Case("hot-latent", 300, 32, 512, 8, _hot),
    Case("ties", 24, 8, 4096, 16, _ties, exact=True),
    Case("all-equal", 10, 8, 3000, 16, _equal, exact=True),
    Case("duplicates", 24, 40, 1030, 16, _duplicates, exact=True),
    Case("sorted-up", 40, 48, 2048, 16, _sorted),
    Case("sorted-down", 40, 48, 2048, 16, _sorted_down),
    Case("one-block", 40, 48, 2048, 16, _block),
    Case("every-16th", 40, 48, 2048, 16, _stride),
    Case("norms", 32, 48, 1024, 16, _norms),
    Case("massive", 32, 48, 1024, 16, _massive),
    Case("strided", 21, 40, 200, 6, _strided_input),
    Case("nan", 7, 24, 130, 4, _nan, finite=False),
)
BY_NAME = {case.name: case for case in CASES}
FINITE = tuple(case for case in CASES if case.finite)
