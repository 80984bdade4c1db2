"""Moments in 8 bits: the rounding itself, and that every backend stores the codes of the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastsae import SparseCodes, reference
from fastsae.reference import BLOCK, EightBit, round_to_fp8, scales_shape
from tests import truth
from tests.cases import BY_NAME, Case
from tests.update_case import Problem, make_problem

pytestmark = pytest.mark.usefixtures("one_thread")
STEP = torch.tensor(3)
MAKE = BY_NAME["random"].make
EIGHT = torch.float8_e4m3fn


def filled(value: float, rows: int = 200) -> Tensor:
    """Rows filled with one number. Each also holds one 448, so that its scale is 1."""
    t = torch.full((rows, BLOCK), value)
    t[:, 5] = 448.0
    return t


def rounded(value: float, seed: int = 1, keep_positive: bool = False) -> Tensor:
    made = round_to_fp8(filled(value), seed, STEP, 0, keep_positive)
    assert torch.equal(made.scales, torch.ones(200, 1))
    assert bool((made.codes[:, 5].float() == 448).all())
    return torch.cat([made.widened()[:, :5], made.widened()[:, 6:]], 1)


@pytest.mark.parametrize("value", [1.1, -1.1, 300.0, 447.9, 0.016, 0.0155, 0.007, -0.007, 2**-10, 2**-13])
def test_rounding_goes_to_a_neighbour_and_is_right_on_average(value: float) -> None:
    got = rounded(value)
    size, grid = abs(value), torch.arange(127, dtype=torch.uint8).view(EIGHT).float()
    above = int((grid <= size).sum())
    low, high = float(grid[above - 1]), float(grid[above])
    assert set(got.unique().tolist()) == {math.copysign(low, value), math.copysign(high, value)}
    spread = ((size - low) * (high - size)) ** 0.5 / got.numel() ** 0.5
    assert abs(float(got.double().mean()) - value) < 4 * spread


def test_what_can_be_stored_is_stored() -> None:
    exact = torch.arange(127, dtype=torch.uint8).view(EIGHT).float()
    row = torch.cat([exact, -exact[1:2]])[None]
    made = round_to_fp8(row, 1, STEP, 0, keep_positive=False)
    assert torch.equal(made.widened(), row)
    assert torch.equal(made.codes.view(torch.uint8)[0, :127], torch.arange(127, dtype=torch.uint8))


def test_a_second_moment_never_becomes_zero() -> None:
    smallest = 2.0**-9
    assert float(rounded(1e-9, keep_positive=True).min()) == smallest
    assert float(rounded(1e-9).max()) == 0
    assert float(rounded(0.0, keep_positive=True).max()) == 0


def test_a_block_of_zeros_and_one_that_is_not_finite() -> None:
    t = torch.zeros(3, 2 * BLOCK)
    t[1, BLOCK], t[2, 3], t[2, BLOCK + 3] = -1.0, float("nan"), float("inf")
    made = round_to_fp8(t, 1, STEP, 0, keep_positive=True)
    assert not bool(made.codes.view(torch.uint8)[0].any())
    assert made.scales[0].tolist() == [0, 0]
    assert made.scales[1].tolist() == [0, pytest.approx(1 / 448)]
    assert bool(made.widened()[:2].isfinite().all())
    assert not bool(made.widened()[2].isfinite().any())


def test_rounding_depends_on_seed_step_stream_and_place() -> None:
    t = filled(1 + 2**-4)

    def draw(seed: int, step: int, stream: int) -> Tensor:
        return round_to_fp8(t, seed, torch.tensor(step), stream, False).codes.view(torch.uint8)

    base = draw(1, 1, 0)
    assert torch.equal(base, draw(1, 1, 0))
    assert base.unique().numel() == 3
    for other in (draw(2, 1, 0), draw(1, 2, 0), draw(1, 1, 1), draw(-1, 1, 0)):
        assert 0.4 < float((base != other).float().mean()) < 0.6


def test_an_average_decays_where_rounding_to_nearest_would_stall() -> None:
    """A hundred steps of v = 0.999 v at a scale that another number fixes: rounding to nearest would change no code."""
    v = round_to_fp8(filled(40.0), 1, torch.tensor(0), 1, True)
    nearest = (0.999 * v.widened()).to(EIGHT)
    assert torch.equal(nearest.view(torch.uint8), v.codes.view(torch.uint8))
    for step in range(1, 101):
        t = 0.999 * v.widened()
        t[:, 5] = 448.0
        v = round_to_fp8(t, 1, torch.tensor(step), 1, True)
    rest = torch.cat([v.widened()[:, :5], v.widened()[:, 6:]], 1)
    assert float(rest.mean()) == pytest.approx(40 * 0.999**100, rel=0.005)


# -- in an update -----------------------------------------------------------------------------------------------------


def in_eight_bits(problem: Problem) -> Problem:
    """The dictionaries' moments in 8 bits, rounded with the random streams of an update."""
    scales, moments = [], []
    for i, m in enumerate(problem.moments):
        if m.ndim == 2:
            stored = round_to_fp8(m.float(), 0, torch.tensor(0), i, i % 2 == 1)
            moments.append(stored.codes)
            scales.append(stored.scales)
        else:
            moments.append(m)
    problem.moments = moments
    problem.settings["scales"] = scales
    return problem


def widen(problem: Problem) -> Problem:
    """The same numbers in float32."""
    scales = iter(problem.settings.pop("scales"))
    problem.moments = [EightBit(m, next(scales)).widened() if m.dtype == EIGHT else m for m in problem.moments]
    return problem


# On a GPU both storages must take the same kernel: rows of whole 16 bytes in 8 bits, or in neither.
ON_A_GPU = (("adamw", torch.float32, 208), ("adam", torch.float32, 65))


@pytest.mark.parametrize(
    ("width", "dtype", "kind", "backend"),
    [
        (width, dtype, kind, backend)
        for width in (65, 128, 208)
        for dtype in truth.NARROW
        for kind in ("adam", "adamw")
        for backend in truth.BACKENDS
        if backend not in truth.GPU or (kind, dtype, width) in ON_A_GPU
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"tied": True}, {"d_out": 304}], ids=["free", "tied", "d_out"])
def test_codes_and_scales_are_the_reference_ones(
    width: int, options: dict, dtype: torch.dtype, kind: str, backend: str
) -> None:
    """From equal moments, the backend and the reference round equal float32 results to equal codes."""

    def made() -> Problem:
        problem = in_eight_bits(make_problem(Case("eight", 9, width, 40, 3, MAKE), dtype, **options))
        problem.settings |= {"optimizer": kind, "weight_decay": 0.1 if kind == "adamw" else 0.0}
        return problem

    wide, narrow = widen(made()), made()
    wide.run(backend, seed=2**33 + 5)
    narrow.run(backend, seed=2**33 + 5)
    for name, p in wide.params.items():
        assert torch.equal(p, narrow.params[name]), name
    scales = iter(narrow.settings["scales"])
    for stream, (m, got) in enumerate(zip(wide.moments, narrow.moments, strict=True)):
        if m.ndim == 1:
            assert torch.equal(m, got)
            continue
        stored = round_to_fp8(m, 2**33 + 5, torch.tensor(wide.step), stream, stream % 2 == 1)
        assert torch.equal(stored.codes.view(torch.uint8), got.view(torch.uint8)), f"stream {stream}"
        assert torch.equal(stored.scales, next(scales)), f"stream {stream}"


@pytest.mark.parametrize("width", [200, 208])  # in CUDA two kernels
@pytest.mark.parametrize("backend", truth.BACKENDS)
def test_odd_blocks_are_stored_as_the_reference_stores_them(backend: str, width: int) -> None:
    """Zeros, denormals, infinities and NaN in moments and gradients, no term."""
    problem, again = (
        make_problem(Case("eight", 0, width, 6, 3, MAKE), torch.float32, unit_norm=False) for _ in range(2)
    )
    rows = torch.zeros(6, width)
    rows[1, 3], rows[2, 7], rows[3, 130], rows[4, :] = 1e-30, float("nan"), float("inf"), 1e-22
    rows[5] = torch.logspace(-12, 12, width)
    for p in (problem, again):
        p.moments = [torch.zeros_like(m) for m in p.moments]
        in_eight_bits(p)
        p.terms = []
        p.settings |= {"added": [rows.clone(), rows.clone(), torch.zeros(6)], "pre_bias": False}
    problem.run(backend, seed=1)
    again.run("reference", seed=1)
    for i, (a, b) in enumerate(zip(problem.moments, again.moments, strict=True)):
        if a.dtype == EIGHT:
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"moment {i}"
    for a, b in zip(problem.settings["scales"], again.settings["scales"], strict=True):
        assert torch.equal(a.nan_to_num(nan=-1.0), b.nan_to_num(nan=-1.0))
        assert a.shape == scales_shape(rows)
    for name, p in again.params.items():
        torch.testing.assert_close(problem.params[name], p, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert reference.BLOCK == 128


def test_the_elementwise_step_reads_nothing_back_from_the_device() -> None:
    """On the meta device every read of a value raises. A GPU takes this path for gradients that it stores."""
    shapes = {"W_enc": (6, 200), "W_dec": (6, 130), "b_enc": (6,), "b_dec": (130,)}
    params = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    lr, step = torch.empty((), dtype=torch.float64, device="meta"), torch.empty((), dtype=torch.int64, device="meta")
    moments: reference.Moments = {
        name: tuple(EightBit(p.to(EIGHT), torch.empty(scales_shape(p), device="meta")) if p.ndim == 2 else p
                    for _ in range(2))
        for name, p in params.items()
    }  # fmt: skip
    parts = reference.Parts(torch.empty(6, 2, device="meta"), params["b_enc"], params["W_enc"], params["W_dec"])
    grads = reference.shape_gradients(params, reference.with_parts(params, params, parts), True, 1.0)
    grads = {name: g * lr for name, g in grads.items()}
    assert reference.squared_norms(grads).device.type == "meta"
    for optimizer in (reference.Optimizer("adamw", weight_decay=0.1), reference.Optimizer("lion")):
        kept = {name: pair[: len(optimizer.moments)] for name, pair in moments.items()}
        new, stored = reference.update(params, grads, kept, lr, step, optimizer, True, seed=1)
        assert new["W_enc"].device.type == "meta"
        for name, fresh in stored.items():
            for place, moment in zip(kept[name], fresh, strict=True):
                reference.store(place, moment)


@pytest.mark.parametrize("backend", truth.BACKENDS)
@pytest.mark.parametrize("kind", ["8bit", "bf16"])
@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize(("width", "parts"), [(128, False), (150, True)], ids=["terms", "parts"])
def test_rows_of_a_larger_sae_are_rounded_as_in_the_whole(
    width: int, parts: bool, tied: bool, kind: str, backend: str
) -> None:
    """With the number of the first latent given: so a share of a dictionary gets the moments of one process.

    CUDA keeps rows of 128 columns in registers and takes others through scratch.
    """

    def stepped(first: int, last: int, given: int) -> list[Tensor]:
        """The moments of some rows after a step, of all latents or of a part."""
        p = make_problem(Case("rows", 5, width, 23, 4, MAKE), torch.float32, tied=tied, pre_bias=False)
        g, some = torch.Generator().manual_seed(3), slice(first, last)
        p.terms = [replace(t, codes=SparseCodes.from_dense(t.codes.to_dense()[:, some].contiguous())) for t in p.terms]
        if backend == "reference":  # its sums are matrix products, whose bits depend on the number of rows
            p.terms.clear()
        if parts or not p.terms:
            dense = [torch.randn(t.shape, generator=g) for n, t in p.params.items() if n.startswith("W")]
            p.settings["added"] = [t[some].contiguous() for t in (*dense, torch.randn(23, generator=g))]
        in_eight_bits(p) if kind == "8bit" else p.settings.update(scales=[])
        rows = [m.bfloat16() if kind == "bf16" else m for m in p.moments]
        p.moments = [m[some].clone() for m in rows[:-2]] + [m.clone() for m in rows[-2:]]
        p.settings["scales"] = [s[some].clone() for s in p.settings["scales"]]
        for name in ("W_enc", "W_dec", "b_enc")[tied:]:
            p.params[name] = p.params[name][some].clone()
        p.run(backend, seed=9, first_latent=given)
        return [*p.moments, *p.settings["scales"]]

    def of_rows(t: Tensor, some: slice) -> Tensor:
        return (t[some] if t.shape[0] == 23 else t).contiguous().view(torch.uint8)  # b_dec's belong to no latent

    whole = stepped(0, 23, 0)
    for first, last in ((0, 8), (8, 9), (9, 23)):
        part = stepped(first, last, first)
        for t, p in zip(whole, part, strict=True):
            assert torch.equal(of_rows(t, slice(first, last)), p.view(torch.uint8))
    elsewhere = stepped(9, 23, 0)
    wrong = [
        not torch.equal(of_rows(t, slice(9, 23)), p.view(torch.uint8)) for t, p in zip(whole, elsewhere, strict=True)
    ]
    rounded_here = [t.dtype in (EIGHT, torch.bfloat16) and t.shape[0] == 23 for t in whole]
    assert wrong == rounded_here
