"""How far from float64 a result may be, written once; the hard cases; and the tally of what was checked.

    |got - truth| <= C · u32 · magnitude + u_out · |truth|

magnitude: the same product with every sign made positive (|A||W| for a decode); u32: float32's unit roundoff, which is
what every backend computes in; u_out: that of the dtype that is returned. C = 16 covers a fixed-order sum of some
thousand products. Inputs are rounded to the tested dtype first. Comparisons are made on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.gpu.faults import Poisoned, caught, ensure_alive, text
from fastsae import BackendError, SparseCodes, reference

C = 16.0
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def allowed(truth: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    # float16 has numbers below its normal range, and an error of half their spacing there.
    tiny = torch.finfo(dtype).smallest_normal * roundoff(dtype)
    return C * roundoff(torch.float32) * magnitude + roundoff(dtype) * truth.abs() + tiny


def within(got: Tensor, truth: Tensor, magnitude: Tensor, what: str) -> float:
    """The largest error in units of what is allowed. Raises AssertionError over 1, naming the worst place."""
    got, truth, magnitude = got.detach().cpu(), truth.cpu(), magnitude.cpu().double()
    if got.shape != truth.shape:
        raise AssertionError(f"{what} has shape {tuple(got.shape)}, expected {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    bar = allowed(truth, magnitude, got.dtype)
    ratio = ((got.double() - truth).abs() / bar).nan_to_num(nan=float("inf"))
    worst = int(ratio.argmax())
    if float(ratio.max()) > 1:
        place = [int(i) for i in torch.unravel_index(torch.tensor(worst), ratio.shape)]
        raise AssertionError(
            f"{what} is off by {float(ratio.max()):.3g} times what is allowed, in {int((ratio > 1).sum())} of "
            f"{ratio.numel()} places; the worst at {place}: got {float(got.flatten()[worst])!r}, expected "
            f"{float(truth.flatten()[worst])!r} within {float(bar.flatten()[worst]):.3g}"
        )
    return float(ratio.max())


def errors(truth: Tensor, size: Tensor, error: Tensor, squares: Tensor) -> float:
    """An error of decode and its sum of squares by token against float64 (size: the error's magnitude)."""
    worst = within(error, truth, size, "the error")
    # (e + δ)² = e² + 2eδ + δ² with |δ| <= C u32 size, and the sum rounds too.
    slack = 2 * truth.abs() * size + truth.square() + C * roundoff(torch.float32) * size.square()
    return max(worst, within(squares, truth.square().sum(-1), slack.sum(-1), "the sum of squares"))


@dataclass(frozen=True)
class Hard:
    """A case that is likely to go wrong. integers: small ones, so that every order of summation gives the same scores
    in every dtype, many of them equal; the indices are compared too then.
    """

    name: str
    N: int
    D: int
    M: int
    K: int
    integers: bool = False

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D), W (M, D), b (M,) on the CPU, rounded to dtype."""
        g = torch.Generator().manual_seed(0)
        if self.integers:
            x, W = (torch.randint(-1, 2, (n, self.D), generator=g).float() for n in (self.N, self.M))
            return x.to(dtype), W.to(dtype), torch.zeros(self.M, dtype=dtype)
        x, W = torch.randn(self.N, self.D, generator=g), torch.randn(self.M, self.D, generator=g) / self.D**0.5
        b = 0.1 * torch.randn(self.M, generator=g)
        if self.name == "all negative":
            b -= 100
        if self.name == "hot latent":
            b[self.M // 3] = 100
        if self.name == "massive":
            x[:, self.D // 2] += 100
        if self.name == "sorted":
            W, b = 0.2 * W, torch.linspace(-2, 2, self.M)
        if self.name == "equal tokens":
            x = x[:1].repeat(self.N, 1)
        return x.to(dtype), W.to(dtype), b.to(dtype)

    def fixed(self, dtype: torch.dtype) -> SparseCodes:
        """The K best of each token in float64, rounded to dtype."""
        pre, _ = scores(*self.inputs(dtype))
        return SparseCodes.from_dense(reference.keep_top_k(pre, self.K), self.K).to(dtype)

    def ragged(self, dtype: torch.dtype) -> SparseCodes:
        """The pre-acts above half the largest, sign kept, then spare slots that hold nonsense."""
        pre, _ = scores(*self.inputs(dtype))
        top = pre.amax() if pre.numel() else pre.new_zeros(())
        codes = SparseCodes.from_dense(torch.where((pre > 0.5 * top) | (pre == top), pre, 0))
        acts = torch.cat([codes.acts, codes.acts.new_full((7,), float("nan"))]).to(dtype)
        return replace(codes, acts=acts, indices=torch.cat([codes.indices, codes.indices.new_full((7,), 2**30)]))


def scores(x: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Pre-acts (N, M) in float64 and their magnitude |x||W|ᵀ + |b|."""
    x, W, b = x.double(), W.double(), b.double()
    return reference.pre_acts(x, W, b), reference.pre_acts(x.abs(), W.abs(), b.abs())


HARD = (
    Hard("random", 64, 96, 1024, 32),
    Hard("odd", 37, 65, 259, 5),
    Hard("ties", 24, 8, 4096, 16, integers=True),
    Hard("no tokens", 0, 16, 64, 4),
    Hard("one token", 1, 7, 33, 3),
    Hard("all negative", 33, 24, 200, 4),
    Hard("hot latent", 300, 32, 512, 8),
    Hard("k is 1", 19, 33, 300, 1),
    Hard("k is 512", 17, 64, 2048, 512),
    Hard("massive", 32, 48, 1024, 16),
    Hard("sorted", 40, 48, 2048, 16),
    Hard("equal tokens", 65, 32, 512, 8),
    Hard("k is all", 5, 16, 24, 24),
    Hard("wide", 130, 769, 3001, 33),
)


def hard_cases(toy: bool) -> tuple[Hard, ...]:
    """HARD, or the same cut down to what an interpreter finishes: odd sizes stay odd."""
    if not toy:
        return HARD
    return tuple(
        replace(case, N=min(case.N, 15), D=min(case.D, 23), M=min(case.M, 95), K=min(case.K, 4)) for case in HARD[:8]
    )


@dataclass
class Tally:
    """Runs checks one by one and remembers how each went, so that one that fails does not hide the others.

    seconds: after which no further check is begun; those left are named. Checks are ordered, most telling first.
    """

    device: str
    seconds: float
    worst: float = 0.0
    passed: int = 0
    failures: list[str] = field(default_factory=list)
    unserved: dict[str, str] = field(default_factory=dict)
    not_reached: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def check(self, label: str, call: Callable[[], float | None]) -> None:
        """call: raises where something is wrong, and returns its largest error in units of the bound, where it has one.

        Raises Poisoned where the CUDA context did not survive it.
        """
        if time.monotonic() - self.started > self.seconds:
            self.not_reached.append(label)
            return
        try:
            self.worst = max(self.worst, call() or 0.0)
            ensure_alive(self.device)
        except BackendError as error:
            self.unserved.setdefault(text(error), label)
        except Poisoned as error:
            self.failures.append(f"{label}: {error}")
            raise Poisoned(str(error), self.result()) from error
        except caught() as error:
            self.failures.append(f"{label}: {text(error)}")
            try:
                ensure_alive(self.device)
            except Poisoned as lost:
                raise Poisoned(str(lost), self.result()) from error
        else:
            self.passed += 1

    def result(self) -> dict[str, Any]:
        status = "failed" if self.failures else "ok" if self.passed else "unserved"
        found: dict[str, Any] = {"status": status, "passed": self.passed, "failed": len(self.failures)}
        found["worst_of_bound"] = round(self.worst, 4)
        if self.failures:
            found["error"] = self.failures[0]
            found["failures"] = self.failures[:20]
        if self.unserved:
            found["unserved"] = [f"{label} and alike: {reason}" for reason, label in self.unserved.items()]
            found.setdefault("error", found["unserved"][0]) if status == "unserved" else None
        if self.not_reached:
            found["not_reached"] = len(self.not_reached)
        return found
