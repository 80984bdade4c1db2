"""AdamW, Lion and sign descent in update_latents_: against torch and textbook code, for one step and for 200."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fastsae import UpdateTerm, ops, reference
from fastsae.model.sae import SparseAutoencoder
from tests import truth
from tests.cases import BY_NAME, Case
from tests.dense_sae import DenseSAE, sae_for_test, tokens
from tests.update_case import BETAS, EPS, Problem, check, gradient_truth, make_problem, most_backends

pytestmark = pytest.mark.usefixtures("one_thread")
CASE = Case("optimizer", 23, 30, 70, 4, BY_NAME["random"].make)
every_kind = pytest.mark.parametrize("kind", ["adamw", "lion", "signsgd"])


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv:2302.06675. With betas (0, 0) it is sign descent."""

    def __init__(self, params: list[Tensor], lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                beta1, beta2 = group["betas"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_((m * beta1 + p.grad * (1 - beta1)).sign(), alpha=-group["lr"])
                m.mul_(beta2).add_(p.grad, alpha=1 - beta2)


def textbook(kind: str, params: list[Tensor], lr: float, decay: float) -> torch.optim.Optimizer:
    if kind in ("adam", "adamw"):
        made = torch.optim.AdamW if kind == "adamw" else torch.optim.Adam
        return made(params, lr=lr, betas=BETAS, eps=EPS, weight_decay=decay)
    return Lion(params, lr, BETAS if kind == "lion" else (0.0, 0.0), decay)


def set_optimizer(problem: Problem, kind: str, decay: float = 0.2) -> Problem:
    problem.settings |= {"optimizer": kind, "weight_decay": decay}
    kept = len(reference.MOMENTS_OF[kind])
    problem.moments = [m for i, m in enumerate(problem.moments) if i % 2 < kept]
    return problem


@most_backends
@every_kind
@pytest.mark.parametrize(
    "options", [{}, {"tied": True, "unit_norm": False}, {"d_out": 45}], ids=["unit", "tied", "d_out"]
)
def test_one_step(options: dict, kind: str, backend: str, dtype: torch.dtype) -> None:
    check(set_optimizer(make_problem(CASE, dtype, **options), kind), backend)


@pytest.mark.parametrize("backend", [name for name in truth.BACKENDS if name not in truth.GPU])
@every_kind
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit"])
def test_float64_steps_are_those_of_the_textbook(unit_norm: bool, kind: str, backend: str) -> None:
    problem = set_optimizer(make_problem(CASE, torch.float64, unit_norm=unit_norm), kind)
    problem.moments = [torch.zeros_like(m) for m in problem.moments]
    leaves = {name: torch.nn.Parameter(p.clone()) for name, p in problem.params.items()}
    optimizer = textbook(kind, list(leaves.values()), problem.lr, 0.2)
    for step in (1, 2, 3):
        problem.step = step
        grads, _ = gradient_truth(problem)
        for name, leaf in leaves.items():
            leaf.grad = grads[name]
        optimizer.step()
        if unit_norm:
            leaves["W_dec"].data = reference.normalize(leaves["W_dec"].data)
        problem.run(backend)
        for name, leaf in leaves.items():
            torch.testing.assert_close(problem.params[name], leaf.detach(), rtol=1e-10, atol=1e-13, msg=name)


@pytest.mark.parametrize("backend", truth.BACKENDS)
def test_lion_in_bf16_is_rounded_under_a_seed(backend: str) -> None:
    exact = set_optimizer(make_problem(CASE, torch.float32), "lion")
    exact.moments = [m.bfloat16().float() for m in exact.moments]
    narrow = set_optimizer(make_problem(CASE, torch.float32), "lion")
    narrow.moments = [m.bfloat16() for m in narrow.moments]
    exact.run(backend)
    narrow.run(backend, seed=5)
    for i, (m, got) in enumerate(zip(exact.moments, narrow.moments, strict=True)):
        assert torch.equal(reference.round_to_bf16(m, 5, torch.tensor(exact.step), 2 * i), got)
    assert all(map(torch.equal, exact.params.values(), narrow.params.values()))


# -- training ---------------------------------------------------------------------------------------------------------


@dataclass
class Fused:
    """A TopK SAE trained by the ops, with any optimizer and storage of moments."""

    sae: SparseAutoencoder
    kind: str
    lr: float
    decay: float = 0.0
    storage: str = "fp32"
    backend: str = "cpu"
    count: int = 0
    moments: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        for p in self.sae.parameters():
            for _ in reference.MOMENTS_OF[self.kind]:
                eight = self.storage == "8 bit" and p.ndim == 2
                dtype = torch.float8_e4m3fn if eight else torch.bfloat16 if self.storage == "bf16" else torch.float32
                self.moments.append(torch.zeros(p.shape, dtype=dtype))
                if eight:
                    self.scales.append(torch.zeros(reference.scales_shape(p)))

    @torch.no_grad()
    def step(self, x: Tensor) -> float:
        sae = self.sae
        self.count += 1
        centred = x - sae.b_dec
        codes = ops.encode_topk(centred, sae.W_enc, sae.b_enc, sae.activation.k, backend=self.backend)
        error, squares = ops.decode_error(codes, sae.W_dec, centred, backend=self.backend)
        ops.update_latents_(
            sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec, self.moments,
            [UpdateTerm(codes, centred, error * (2 / x.shape[0]))],
            lr=torch.tensor(self.lr, dtype=torch.float64), step=torch.tensor(self.count), optimizer=self.kind,
            weight_decay=self.decay, betas=BETAS, eps=EPS, scales=self.scales, seed=9, backend=self.backend,
        )  # fmt: skip
        return float(squares.sum() / x.shape[0])


def large() -> SparseAutoencoder:
    return sae_for_test(d_in=32, d_sae=192, k=8, dtype=torch.float32)


@pytest.mark.long
@pytest.mark.parametrize("backend", [name for name in truth.BACKENDS if name not in truth.GPU])
@pytest.mark.parametrize(("kind", "lr"), [("adamw", 1e-3), ("lion", 1e-3), ("signsgd", 3e-4)])
def test_200_fp32_steps_drift_no_more_than_the_order_of_summation(kind: str, lr: float, backend: str) -> None:
    """As in test_fused_step.py: at most twice the difference between dense runs with other orders of summation."""
    order = [torch.randperm(32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    runs = [DenseSAE(large(), permute=permute) for permute in (None, *order)]
    for dense in runs:
        dense.adam = textbook(kind, list(dense.params.values()), lr, 0.1)
    sae = large()
    fused = Fused(sae, kind, lr, 0.1, backend=backend)
    curves: list[list[float]] = [[] for _ in range(4)]
    for seed in range(200):
        x = tokens(64, 32, seed, torch.float32)
        curves[3].append(fused.step(x))
        for i, dense in enumerate(runs):
            curves[i].append(float(dense.step(x)["loss"].detach()))

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return max(float((a[name] - b[name]).detach().norm() / a[name].detach().norm()) for name in a)

    assert curves[0][-1] < 0.7 * curves[0][0], "the runs should learn something"
    drift = max(distance(runs[0].params, other.params) for other in runs[1:])
    ours = distance(runs[0].params, dict(sae.named_parameters()))
    rounding = 2**-21  # from renormalizing rows: sign steps differ in nothing else
    assert ours <= 2 * drift + rounding, f"weights: fused differs by {ours:.2e}, dense runs by {drift:.2e}"


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param(kind, backend, marks=[] if (kind == "adam") == (backend == "cpu") else pytest.mark.long)
        for kind in ("adam", "adamw")
        for backend in truth.BACKENDS
        if backend not in truth.GPU
    ],
)
def test_moments_in_8_bits_follow_the_loss_curve(kind: str, backend: str) -> None:
    held_out = tokens(1024, 32, 999, torch.float32)
    curves: dict[str, list[float]] = {"fp32": [], "8 bit": []}
    for storage, curve in curves.items():
        fused = Fused(large(), kind, 1e-3, 0.1 if kind == "adamw" else 0.0, storage, backend)
        for seed in range(300):
            fused.step(tokens(64, 32, seed, torch.float32))
            if seed % 75 == 74:
                with torch.no_grad():
                    curve.append(float(fused.sae(held_out).loss))
    assert fused.moments[0].dtype == torch.float8_e4m3fn
    worst = max(abs(a - b) / a for a, b in zip(curves["fp32"], curves["8 bit"], strict=True))
    assert worst < 0.005, f"8-bit moments moved the loss on held-out rows by {worst:.2%}"
