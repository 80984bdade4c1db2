"""update_latents_: the fused backward and Adam step, on every backend, against float64.

What a backend writes is checked stage by stage, so that a bound can be stated for each: the moments against the truth
of gradients, projection and Adam's averages; the weights against the float64 step from the moments it wrote itself
(Adam divides by √v, which turns rounding noise in a tiny gradient into a step of any size).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fastsae import SparseCodes, UpdateTerm, ops, reference
from fastsae.reference import Params
from tests import truth
from tests.cases import BY_NAME, Case

pytestmark = pytest.mark.usefixtures("one_thread")
NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")
CASE_NAMES = ("random", "odd", "no-tokens", "one-token", "hot-latent", "repeated-tokens", "all-negative", "k-all")
BETAS, EPS = (0.9, 0.999), 1e-8

every_backend = pytest.mark.parametrize(("backend", "dtype"), truth.backend_dtypes(*truth.NARROW, torch.float64))


@dataclass
class Problem:
    """An SAE in the middle of training, and the terms of one step."""

    params: Params
    moments: list[Tensor]
    terms: list[UpdateTerm]
    settings: dict = field(default_factory=dict)
    step: int = 3
    lr: float = 1e-2

    def run(self, backend: str, **extra) -> Tensor:
        return ops.update_latents_(
            *(self.params.get(name) for name in NAMES),
            self.moments,
            self.terms,
            lr=torch.tensor(self.lr, dtype=torch.float64),
            step=torch.tensor(self.step),
            betas=BETAS,
            eps=EPS,
            backend=backend,
            **self.settings,
            **extra,
        )

    def wide(self) -> tuple[Params, list[reference.Term]]:
        terms = [
            reference.Term(t.codes.to(torch.float64).to_dense(), t.x.double(), t.grad.double(), t.has_bias)
            for t in self.terms
        ]
        return {name: p.double().clone() for name, p in self.params.items()}, terms


def make_problem(
    case: Case,
    dtype: torch.dtype,
    *,
    tied: bool = False,
    unit_norm: bool = True,
    pre_bias: bool = True,
    d_out: int | None = None,
    aux: bool = False,
    ragged: bool = False,
) -> Problem:
    g = torch.Generator().manual_seed(1)
    codes, x, W = (truth.ragged_codes if ragged else truth.fixed_codes)(case, dtype)
    D_out = d_out or case.D
    x = x.contiguous()

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    W_dec = reference.normalise(randn(case.M, D_out).double()).to(dtype)
    params = {"W_enc": W.contiguous(), "W_dec": W_dec, "b_enc": randn(case.M), "b_dec": randn(D_out)}
    if tied:
        del params["W_enc"]
    moment_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    moments = []
    for p in params.values():
        moments += [0.1 * randn(*p.shape).to(moment_dtype), 0.1 * randn(*p.shape).to(moment_dtype).square()]
    terms = [UpdateTerm(codes.flatten(), x, randn(case.N, D_out))]
    if aux:
        few = SparseCodes.from_dense(
            torch.where(codes.to_dense() != 0, 0, torch.rand(case.N, case.M, generator=g) > 0.9)
        )
        terms.append(UpdateTerm(few.to(dtype), x, randn(case.N, D_out), has_bias=False))
    settings = {"unit_norm": unit_norm, "pre_bias": pre_bias and D_out == case.D}
    return Problem(params, moments, terms, settings)


def gradient_truth(problem: Problem) -> tuple[Params, Params]:
    """Gradients in float64, and their magnitudes: the same sums with every sign made positive."""
    params, terms = problem.wide()
    grads = reference.gradients(params, terms, problem.settings["pre_bias"])
    positive = {name: p.abs() for name, p in params.items()}
    parts = [reference.Term(t.A.abs(), t.x.abs(), t.grad.abs(), t.has_bias) for t in terms]
    magnitudes = reference.gradients(positive, parts, pre_bias=False)
    if problem.settings["pre_bias"]:
        magnitudes["b_dec"] += magnitudes["b_enc"] @ positive.get("W_enc", positive["W_dec"])
    if problem.settings["unit_norm"]:
        W, size = params["W_dec"], magnitudes["W_dec"]
        grads["W_dec"] = reference.project(grads["W_dec"], W)
        squares = W.square().sum(-1, keepdim=True)
        magnitudes["W_dec"] = size + (size * W.abs()).sum(-1, keepdim=True) * W.abs() / squares
    return grads, magnitudes


def check(problem: Problem, backend: str) -> None:
    """Runs one step and holds everything it wrote against float64."""
    before, terms = problem.wide()
    old = [m.double().clone() for m in problem.moments]
    grads, magnitudes = gradient_truth(problem)
    stats = problem.run(backend)

    raw = reference.gradients(before, terms, problem.settings["pre_bias"])
    assert stats.dtype == torch.float64
    torch.testing.assert_close(stats, reference.squared_norms(raw), rtol=1e-4, atol=1e-10)
    for i, name in enumerate(before):
        m, v = problem.moments[2 * i], problem.moments[2 * i + 1]
        g, size = grads[name], magnitudes[name]
        m_old, v_old, (beta1, beta2) = old[2 * i], old[2 * i + 1], BETAS
        m_true, v_true = beta1 * m_old + (1 - beta1) * g, beta2 * v_old + (1 - beta2) * g**2
        truth.assert_within(m, m_true, beta1 * m_old.abs() + (1 - beta1) * size, f"m of {name}")
        truth.assert_within(v, v_true, beta2 * v_old + 2 * (1 - beta2) * size**2, f"v of {name}")
        move = m.double() / (1 - beta1**problem.step)
        move /= v.double().sqrt() / (1 - beta2**problem.step) ** 0.5 + EPS
        p = before[name] - problem.lr * move
        size = before[name].abs() + (p - before[name]).abs()
        if name == "W_dec" and problem.settings["unit_norm"]:
            p = reference.normalise(p)
            size = size + p.abs()
        truth.assert_within(problem.params[name], p, size, name)


@every_backend
@pytest.mark.parametrize("name", CASE_NAMES)
def test_update(name: str, backend: str, dtype: torch.dtype) -> None:
    check(make_problem(BY_NAME[name], dtype), backend)


@every_backend
@pytest.mark.parametrize(
    "options",
    [
        {"unit_norm": False},
        {"pre_bias": False},
        {"tied": True},
        {"tied": True, "unit_norm": False},
        {"d_out": 41},
        {"aux": True},
        {"ragged": True},
        {"aux": True, "ragged": True, "tied": True},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()),
)
def test_update_with_other_settings(options: dict, backend: str, dtype: torch.dtype) -> None:
    check(make_problem(BY_NAME["odd"], dtype, **options), backend)


@every_backend
def test_no_terms_at_all_still_takes_an_adam_step(backend: str, dtype: torch.dtype) -> None:
    problem = make_problem(BY_NAME["odd"], dtype)
    problem.terms = []
    check(problem, backend)


@pytest.mark.parametrize("backend", truth.BACKENDS)
def test_bf16_moments_are_rounded_at_random_under_a_seed(backend: str) -> None:
    case = BY_NAME["odd" if backend in truth.GPU else "random"]
    exact = make_problem(case, torch.float32)
    exact.moments = [m.bfloat16().float() for m in exact.moments]
    exact.run(backend)

    def rounded(seed: int, step: int = 3) -> Problem:
        problem = make_problem(case, torch.float32)
        problem.moments = [m.bfloat16() for m in problem.moments]
        problem.step = step
        problem.run(backend, seed=seed)
        return problem

    first, again, other, later = rounded(5), rounded(5), rounded(6), rounded(5, step=4)
    for i, m in enumerate(exact.moments):
        assert torch.equal(first.moments[i], again.moments[i])
        gap = (first.moments[i].double() - m.double()).abs()
        assert bool((gap <= 2**-7 * m.abs().double() + 1e-30).all()), "further than one unit in the last place"
        if m.numel() > 1000:
            assert not torch.equal(first.moments[i], other.moments[i])
            assert not torch.equal(first.moments[i], later.moments[i])
            mean = ((first.moments[i].double() - m.double()) / (2**-7 * m.abs().double() + 1e-30)).mean()
            assert abs(float(mean)) < 2 / m.numel() ** 0.5, "rounding is biased"
    # The weights are computed before the moments are rounded, so they see none of the noise of this step.
    for name, p in exact.params.items():
        torch.testing.assert_close(first.params[name], p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", truth.ENGINES)
def test_the_screen_is_refreshed_on_the_way(backend: str) -> None:
    case = BY_NAME["random"]
    problem = make_problem(case, torch.float32)
    x, _, _ = case.inputs(torch.float32)
    screen = ops.prepare_screen(problem.params["W_enc"], problem.params["b_enc"], backend=backend)
    if screen is None:
        pytest.skip(f"{backend} screens with nothing here")
    problem.run(backend, screen=screen)
    fresh = ops.prepare_screen(problem.params["W_enc"], problem.params["b_enc"], backend=backend)
    assert fresh is not None
    for kept, made in zip(screen.tensors, fresh.tensors, strict=True):
        assert torch.equal(kept, made)
    pre, magnitude = truth.scores(x, problem.params["W_enc"], problem.params["b_enc"])
    codes = ops.encode_topk(x, problem.params["W_enc"], problem.params["b_enc"], 32, screen=screen, backend=backend)
    truth.assert_top_k(codes, pre, magnitude, 32, exact=False)


@pytest.mark.parametrize("backend", truth.THREADED)
@pytest.mark.parametrize("name", ["random", "hot-latent"])
def test_update_does_not_depend_on_the_number_of_threads(name: str, backend: str) -> None:
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            problem = make_problem(BY_NAME[name], torch.float32, aux=True)
            runs.append([problem.run(backend), *problem.params.values(), *problem.moments])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
