"""The fused update's `skip` on the GPU backends: True changes no bit, False gives the bits of an update without it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsae import UpdateTerm, ops
from tests import truth
from tests.cases import BY_NAME, Case
from tests.update_case import Problem, make_problem

BACKENDS = [name for name in truth.GPU if name in truth.BACKENDS]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not BACKENDS, reason="no GPU backend is available here"),
]
# Rows of 32 columns stay in registers and rows of 41 do not: CUDA needs whole packs of 16 bytes for it, and Triton
# stores gradients beyond its limit, lowered below. The hot latent is cut into pieces.
COLUMNS = 32
EVEN, WIDE = (Case(f"D={D}", 9, D, 30, 3, BY_NAME["random"].make) for D in (COLUMNS, 41))
OPTIONS = ({}, {"unit_norm": False}, {"tied": True}, {"tied": True, "pre_bias": False, "aux": True, "ragged": True})
UPDATES = [(case, options) for case in (EVEN, WIDE) for options in OPTIONS] + [(BY_NAME["hot-latent"], {})]
SEEDS = {torch.float32: None, torch.bfloat16: 5}

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_moment = pytest.mark.parametrize("moment", SEEDS, ids=str)
every_update = pytest.mark.parametrize(
    ("case", "options"), UPDATES, ids=[f"{c}-" + "-".join(f"{k}={v}" for k, v in o.items()) for c, o in UPDATES]
)


@pytest.fixture(autouse=True)
def few_columns_in_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    if "triton" in BACKENDS:
        from fastsae.kernels import stages

        monkeypatch.setattr(stages, "ROW_LIMIT", COLUMNS)


def problem_of(case: Case, options: dict, moment: torch.dtype) -> Problem:
    made = make_problem(case, torch.float32, **options)
    made.moments = [m.to(moment) for m in made.moments]
    return made


def assert_same_bits(got: Problem, wanted: Problem) -> None:
    for name, p in wanted.params.items():
        assert torch.equal(got.params[name], p), f"{name} differs"
    for i, m in enumerate(wanted.moments):
        assert torch.equal(got.moments[i], m), f"moment {i} differs"


@every_backend
@every_update
@every_moment
def test_a_skipped_update_changes_no_bit(case: Case, options: dict, moment: torch.dtype, backend: str) -> None:
    """Its gradients are NaN: updates are skipped because a gradient is not finite."""

    def not_finite(grad: Tensor) -> Tensor:
        return torch.full_like(grad, float("nan"))

    skipped, untouched = problem_of(case, options, moment), problem_of(case, options, moment)
    skipped.terms = [UpdateTerm(t.codes, t.x, not_finite(t.grad), t.has_bias) for t in skipped.terms]
    stats = skipped.run(backend, skip=torch.tensor(True), seed=SEEDS[moment])
    assert_same_bits(skipped, untouched)
    unknown = stats[1:] if options.get("tied") else stats  # tied: the first is 0 by definition
    assert bool(unknown.isnan().all()), f"the norms of a skipped update are {stats.tolist()}, expected NaN: unknown"


@pytest.mark.long
@every_backend
@every_update
@every_moment
def test_an_update_that_is_not_skipped_has_the_bits_of_one_without(
    case: Case, options: dict, moment: torch.dtype, backend: str
) -> None:
    told, plain = problem_of(case, options, moment), problem_of(case, options, moment)
    stats = told.run(backend, skip=torch.tensor(False), seed=SEEDS[moment])
    assert torch.equal(stats, plain.run(backend, seed=SEEDS[moment]))
    assert_same_bits(told, plain)


@every_backend
def test_a_skipped_update_leaves_the_kept_screen(backend: str) -> None:
    problem = make_problem(EVEN, torch.float32)
    screen = ops.prepare_screen(problem.params["W_enc"], problem.params["b_enc"], backend=backend)
    assert screen is not None
    before = [t.clone() for t in screen.tensors]
    problem.run(backend, skip=torch.tensor(True), screen=screen)
    assert all(map(torch.equal, screen.tensors, before))
    problem.run(backend, skip=torch.tensor(False), screen=screen)
    assert not torch.equal(screen.tensors[0], before[0]), "the update did not maintain the screen"
