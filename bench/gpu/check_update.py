"""update_latents_ against float64, stage by stage: the moments against the gradients' truth, the weights against Adam's
formula from the moments it wrote itself (Adam divides by √v, which turns noise in a tiny gradient into a step).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.gpu.truth import Hard, within
from fastsae import SparseCodes, UpdateTerm, ops, reference
from fastsae.reference import Params

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
BETAS, EPS, LR, STEP = (0.9, 0.999), 1e-8, 1e-2, 3
SETTINGS: dict[str, dict[str, Any]] = {
    "untied, unit norm": {},
    "tied": {"tied": True},
    "free norm": {"unit_norm": False},
    "tied, free norm": {"tied": True, "unit_norm": False},
    "no pre-bias": {"pre_bias": False},
    "d_out is not d_in": {"pre_bias": False, "d_out": 29},
    "aux term": {"aux": True},
    "ragged": {"ragged": True},
    "bf16 moments": {"bf16_moments": True},
    "aux, ragged, tied": {"aux": True, "ragged": True, "tied": True},
}


@dataclass
class Problem:
    """An SAE in the middle of training and the terms of one step, on one device."""

    params: Params
    moments: list[Tensor]
    terms: list[UpdateTerm]
    unit_norm: bool = True
    pre_bias: bool = True
    seed: int | None = None

    def to(self, device: str) -> Problem:
        terms = [UpdateTerm(t.codes.to(device), t.x.to(device), t.grad.to(device), t.has_bias) for t in self.terms]
        # .clone(): on the CPU .to() returns the same tensor, and the update writes into it.
        params = {name: p.to(device).clone() for name, p in self.params.items()}
        moments = [m.to(device).clone() for m in self.moments]
        return Problem(params, moments, terms, self.unit_norm, self.pre_bias, self.seed)

    def run(self, backend: str | None, **more: Any) -> Tensor:
        device = self.params["W_dec"].device
        return ops.update_latents_(
            self.params.get("W_enc"), self.params["W_dec"], self.params["b_enc"], self.params["b_dec"],
            self.moments, self.terms,
            lr=torch.tensor(LR, dtype=torch.float64, device=device), step=torch.tensor(STEP, device=device),
            betas=BETAS, eps=EPS, unit_norm=self.unit_norm, pre_bias=self.pre_bias, seed=self.seed, backend=backend,
            **more,
        )  # fmt: skip

    def wide(self) -> tuple[Params, list[reference.Term]]:
        terms = [
            reference.Term(t.codes.to(torch.float64).to_dense(), t.x.double(), t.grad.double(), t.has_bias)
            for t in self.terms
        ]
        return {name: p.double().clone() for name, p in self.params.items()}, terms


def make(
    case: Hard,
    dtype: torch.dtype,
    *,
    tied: bool = False,
    unit_norm: bool = True,
    pre_bias: bool = True,
    d_out: int | None = None,
    aux: bool = False,
    ragged: bool = False,
    bf16_moments: bool = False,
) -> Problem:
    """The case's problem on the CPU."""
    g = torch.Generator().manual_seed(1)
    x, W, _ = case.inputs(dtype)
    codes = case.ragged(dtype) if ragged else case.fixed(dtype)
    width = d_out or case.D

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    W_dec = reference.normalize(randn(case.M, width).double()).to(dtype)
    params = {"W_enc": W, "W_dec": W_dec, "b_enc": randn(case.M), "b_dec": randn(width)}
    if tied:
        del params["W_enc"]
    moments = [m for p in params.values() for m in (0.1 * randn(*p.shape).float(), 0.1 * randn(*p.shape).float() ** 2)]
    terms = [UpdateTerm(codes.flatten(), x, randn(case.N, width))]
    if aux:
        rare = torch.rand(case.N, case.M, generator=g) > 0.9
        strength = torch.rand(case.N, case.M, generator=g)
        few = SparseCodes.from_dense(torch.where(rare & (codes.to_dense() == 0), strength, 0))
        terms.append(UpdateTerm(few.to(dtype), x, randn(case.N, width), has_bias=False))
    if bf16_moments:
        moments = [m.bfloat16() for m in moments]
    return Problem(params, moments, terms, unit_norm, pre_bias, 5 if bf16_moments else None)


def gradient_truth(
    params: Params, terms: list[reference.Term], unit_norm: bool, pre_bias: bool
) -> tuple[Params, Params]:
    """Gradients after projection, and their magnitudes: the same sums with every sign made positive."""
    grads = reference.gradients(params, terms, pre_bias)
    positive = {name: p.abs() for name, p in params.items()}
    sizes = reference.gradients(
        positive, [reference.Term(t.A.abs(), t.x.abs(), t.grad.abs(), t.has_bias) for t in terms], pre_bias=False
    )
    if pre_bias:
        sizes["b_dec"] += sizes["b_enc"] @ positive.get("W_enc", positive["W_dec"])
    if unit_norm:
        W, size = params["W_dec"], sizes["W_dec"]
        grads["W_dec"] = reference.project(grads["W_dec"], W)
        squares = W.square().sum(-1, keepdim=True)
        sizes["W_dec"] = size + (size * W.abs()).sum(-1, keepdim=True) * W.abs() / squares
    return grads, sizes


def hold(
    problem: Problem, old: list[Tensor], before: Params, terms: list[reference.Term], names: tuple[str, ...]
) -> float:
    """What an update wrote (problem, on the CPU) against float64, from what was there before it. The largest error in
    units of the bound.
    """
    grads, sizes = gradient_truth(before, terms, problem.unit_norm, problem.pre_bias)
    worst, (beta1, beta2) = 0.0, BETAS
    for i, name in enumerate(before):
        if name not in names:
            continue
        m, v = problem.moments[2 * i], problem.moments[2 * i + 1]
        m_old, v_old, g, size = old[2 * i].double(), old[2 * i + 1].double(), grads[name], sizes[name]
        m_true, v_true = beta1 * m_old + (1 - beta1) * g, beta2 * v_old + (1 - beta2) * g**2
        m_size, v_size = beta1 * m_old.abs() + (1 - beta1) * size, beta2 * v_old + 2 * (1 - beta2) * size**2
        if m.dtype == torch.bfloat16:  # rounded at random, up or down: a whole unit in the last place
            m_size, v_size = m_size * 2**14, v_size * 2**14
        worst = max(worst, within(m, m_true, m_size, f"m of {name}"), within(v, v_true, v_size, f"v of {name}"))
        m_used, v_used = (m_true, v_true) if m.dtype == torch.bfloat16 else (m.double(), v.double())
        move = LR * m_used / (1 - beta1**STEP) / (v_used.sqrt() / (1 - beta2**STEP) ** 0.5 + EPS)
        p, size = before[name] - move, before[name].abs() + move.abs()
        if m.dtype == torch.bfloat16:  # the move was made from the moments before rounding
            size = size + move.abs() * 2**10
        if name == "W_dec" and problem.unit_norm:
            p = reference.normalize(p)
            size = size + p.abs()
        worst = max(worst, within(problem.params[name], p, size, name))
    return worst


def check(problem: Problem, device: str, backend: str | None, **more: Any) -> float:
    """Runs the problem on the device and compares everything it wrote with float64."""
    before, terms = problem.wide()
    there = problem.to(device)
    stats = there.run(backend, **more).cpu()
    back = there.to("cpu")
    raw = reference.squared_norms(reference.gradients(before, terms, problem.pre_bias))
    if not torch.allclose(stats, raw, rtol=1e-4, atol=1e-10):
        raise AssertionError(f"the squared norms are {stats.tolist()}, expected {raw.tolist()}")
    return hold(back, problem.moments, before, terms, NAMES)


def refreshes_its_screen(case: Hard, dtype: torch.dtype, device: str, backend: str) -> float:
    """After an update the maintained screen is what a fresh one would be, bit for bit."""
    problem = make(case, dtype).to(device)
    screen = ops.prepare_screen(problem.params["W_enc"], problem.params["b_enc"], backend=backend)
    if screen is None:
        return 0.0
    problem.run(backend, screen=screen)
    fresh = ops.prepare_screen(problem.params["W_enc"], problem.params["b_enc"], backend=backend)
    assert fresh is not None
    for i, (kept, made) in enumerate(zip(screen.tensors, fresh.tensors, strict=True)):
        if not torch.equal(kept, made):
            raise AssertionError(f"tensor {i} of the screen is not that of a fresh one after an update")
    return 0.0


def outputs(case: Hard, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """Everything that one update writes, to compare two runs by."""
    problem = make(case, dtype, aux=True).to(device)
    stats = problem.run(backend)
    return [stats, *problem.params.values(), *problem.moments]
