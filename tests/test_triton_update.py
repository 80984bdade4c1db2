"""What only the Triton update has: a limit on the width of rows, joined terms, latents in pieces."""

from __future__ import annotations

import pytest
import torch

from fastsae import UpdateTerm, ops, reference
from fastsae.backends.gpu import pieces
from fastsae.backends.gpu.by_latent import by_latent
from fastsae.ops import checks
from tests import truth, update_case
from tests.cases import BY_NAME, Case

pytest.importorskip("triton", reason="triton is not installed")

from fastsae.kernels import stages

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif("triton" not in truth.BACKENDS, reason="the Triton backend is not available here"),
]
REALLY_WIDE = Case("really-wide", 5, 4099, 12, 3, BY_NAME["random"].make)
SMALL = Case("small", 9, 41, 30, 3, BY_NAME["random"].make)

both_dtypes = pytest.mark.parametrize("dtype", truth.NARROW, ids=str)


@pytest.mark.long
@both_dtypes
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit_norm": False},
        {"pre_bias": False},
        {"tied": True, "unit_norm": False},
        {"d_out": 41},
        {"aux": True, "ragged": True, "tied": True},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_rows_beyond_a_limit(options: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "ROW_LIMIT", 16)
    update_case.check(update_case.make_problem(BY_NAME["odd"], dtype, **options), "triton")


@pytest.mark.parametrize("options", [{}, {"tied": True}], ids=["free", "tied"])
def test_rows_beyond_the_real_limit(options: dict) -> None:
    assert REALLY_WIDE.D > stages.ROW_LIMIT
    update_case.check(update_case.make_problem(REALLY_WIDE, torch.float32, **options), "triton")


@pytest.mark.long
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"aux": True}], ids=["free", "tied", "aux"])
def test_a_latent_in_pieces(options: dict) -> None:
    case = BY_NAME["hot-latent"]
    problem = update_case.make_problem(case, torch.float32, **options)
    slots = sum(term.codes.acts.numel() for term in problem.terms)
    order = ops.by_latent(problem.terms[0].codes, backend="triton")
    cut = pieces.cut(stages.piece_starts, order.offsets, slots, case.N * len(problem.terms))
    assert int(order.offsets.diff().max()) > cut.length, "no latent is long enough to be cut"
    update_case.check(problem, "triton")


def test_pieces_cover_every_long_latent_and_fit_their_capacity() -> None:
    g = torch.Generator().manual_seed(0)
    for tokens, latents in ((1000, 50), (300, 7), (2000, 30), (5000, 2), (100, 1)):
        counts = torch.randint(0, tokens, (latents,), generator=g)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        cut = pieces.cut(stages.piece_starts, starts, int(starts[-1]), tokens * latents)
        wanted = torch.where(counts > cut.length, (counts + cut.length - 1) // cut.length, 0)
        if cut.first is None:
            assert not wanted.any()
            continue
        assert int(cut.first[0]) == 0
        assert torch.equal(cut.first.diff(), wanted.int())
        assert int(cut.first[-1]) <= cut.capacity


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)], ids=str)
def test_three_terms(dtype: torch.dtype) -> None:
    """The second and the third are joined; each has its own tokens, layout and share in the bias."""
    problem = update_case.make_problem(BY_NAME["odd"], dtype, aux=True)
    ragged = update_case.make_problem(BY_NAME["odd"], dtype, ragged=True).terms[0]
    problem.terms.append(UpdateTerm(ragged.codes, ragged.x, ragged.grad.flip(0).contiguous()))
    update_case.check(problem, "triton")


def test_terms_of_a_narrower_dtype_than_the_weights() -> None:
    problem = update_case.make_problem(SMALL, torch.float32, aux=True)
    t = problem.terms[0]
    narrow = UpdateTerm(t.codes.to(torch.bfloat16), t.x.bfloat16(), t.grad.bfloat16(), t.has_bias)
    other = update_case.make_problem(SMALL, torch.float32, aux=True)
    other.terms[0] = UpdateTerm(narrow.codes.to(torch.float32), narrow.x.float(), narrow.grad.float(), t.has_bias)
    other.run("triton")
    parts = [narrow, problem.terms[1]]
    torch.ops.fastsae.update_latents_(
        *problem.params.values(), problem.moments, [], [],
        [p.codes.acts for p in parts], [p.codes.indices for p in parts],
        [torch.empty(0, dtype=torch.int64) if p.codes.offsets is None else p.codes.offsets for p in parts],
        [torch.empty(0)] * 2, [p.x for p in parts], [p.grad for p in parts], [p.has_bias for p in parts],
        None, None, [], torch.tensor(problem.lr, dtype=torch.float64), torch.tensor(problem.step), None, None,
        "adam", *update_case.BETAS, update_case.EPS, 0.0, None, True, True, False, None, 0, "triton",
    )  # fmt: skip
    for name, p in problem.params.items():
        assert torch.equal(p, other.params[name]), name


@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize(("seed", "step"), [(5, 3), (2**32 - 3, 2**33 + 7), (2**40 + 9, 1)])
def test_random_bits_are_the_reference_ones(seed: int, step: int, tied: bool) -> None:
    def problem() -> update_case.Problem:
        made = update_case.make_problem(SMALL, torch.float32, tied=tied)
        made.moments, made.step = [m.bfloat16() for m in made.moments], step
        return made

    exact, rounded = problem(), problem()
    exact.moments = [m.float() for m in exact.moments]
    exact.run("triton")
    rounded.run("triton", seed=seed)
    for stream, (m, got) in enumerate(zip(exact.moments, rounded.moments, strict=True)):
        assert torch.equal(reference.round_to_bf16(m, seed, torch.tensor(step), stream), got), f"stream {stream}"
    for name, p in exact.params.items():
        assert torch.equal(p, rounded.params[name]), name


def test_a_late_step_a_row_of_zeros_and_no_first_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def problem() -> update_case.Problem:
        made = update_case.make_problem(SMALL, torch.float32)
        made.params["W_dec"][[3, 20]] = 0
        made.moments[2][3] = made.moments[3][3] = 0
        made.step = 100_000
        return made

    monkeypatch.setattr(update_case, "BETAS", (0.0, 0.9))
    ours, theirs = problem(), problem()
    ours.run("triton")
    theirs.run("reference")
    for name, p in theirs.params.items():
        torch.testing.assert_close(ours.params[name], p, rtol=2e-5, atol=2e-6)
    for ours_m, theirs_m in zip(ours.moments, theirs.moments, strict=True):
        torch.testing.assert_close(ours_m, theirs_m, rtol=2e-4, atol=2e-6)


def test_slots_outside_the_dictionary_are_left_out_and_the_end_is_marked() -> None:
    """On a GPU the host does not check the values of indices before a kernel runs."""
    top = 2**31 - 1
    indices = torch.tensor([[0, 5, 9], [-1, 2, top], [1, 2, 3], [-top - 1, 4, 4]], dtype=torch.int32)
    with pytest.raises(IndexError):
        checks.code_inside(indices, None, 5)
    offsets, tokens, slots = by_latent(stages, torch.ones(4, 3), indices, None, 5)
    assert offsets.tolist() == [0, 1, 2, 4, 5, 7]
    assert slots.tolist() == [0, 6, 4, 7, 8, 10, 11] + [-1] * 5
    assert tokens.tolist() == [0, 2, 1, 2, 2, 3, 3] + [-1] * 5


def test_spare_slots_are_left_out_whatever_they_hold() -> None:
    acts, indices = torch.ones(6), torch.tensor([1, 2, 1, 0, 1, 2], dtype=torch.int32)
    offsets, tokens, slots = by_latent(stages, acts, indices, torch.tensor([0, 2, 2, 3]), 3)
    assert offsets.tolist() == [0, 0, 2, 3]
    assert tokens.tolist() == [0, 2, 0, -1, -1, -1]
    assert slots.tolist() == [0, 2, 1, -1, -1, -1]
