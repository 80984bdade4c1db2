"""update_latents_: the fused backward and Adam step, on every backend, against float64."""

from __future__ import annotations

import pytest
import torch

from fastsae import ops
from tests import truth
from tests.cases import BY_NAME
from tests.update_case import Problem, check, every_backend, make_problem

pytestmark = pytest.mark.usefixtures("one_thread")
CASE_NAMES = ("random", "odd", "no-tokens", "one-token", "hot-latent", "repeated-tokens", "all-negative", "k-all")


@every_backend
@pytest.mark.parametrize("name", CASE_NAMES)
def test_update(name: str, backend: str, dtype: torch.dtype) -> None:
    check(make_problem(BY_NAME[name], dtype), backend)


@every_backend
@pytest.mark.parametrize(
    "options",
    [
        # The interpreter runs these with test_update_parts.py's narrower problem, with all parts together.
        *(
            pytest.param(options, marks=pytest.mark.long_interpreted)
            for options in (
                {"unit_norm": False},
                {"pre_bias": False},
                {"tied": True},
                {"tied": True, "unit_norm": False},
                {"aux": True},
                {"ragged": True},
            )
        ),
        {"d_out": 41},
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


@pytest.mark.long_interpreted  # test_triton_update.py compares the random bits with the reference's
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
def test_an_update_refreshes_the_screen(backend: str) -> None:
    case = BY_NAME["odd" if backend in truth.GPU else "random"]
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
    codes = ops.encode_topk(x, problem.params["W_enc"], problem.params["b_enc"], case.K, screen=screen, backend=backend)
    truth.assert_top_k(codes, pre, magnitude, case.K, exact=False)


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
