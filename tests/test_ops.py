"""Every op on every backend, case and dtype, against the float64 truth of fastsae.reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsae import SparseCodes, ops, reference
from tests import truth
from tests.cases import BY_NAME, CASES, DTYPES, FINITE, Case
from tests.conftest import QUICK

pytestmark = pytest.mark.usefixtures("one_thread")
every_backend = pytest.mark.parametrize(("backend", "dtype"), truth.backend_dtypes(*DTYPES))
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_finite_case = pytest.mark.parametrize("case", FINITE, ids=str)
both_layouts = pytest.mark.parametrize("make", [truth.fixed_codes, truth.ragged_codes], ids=["fixed", "ragged"])
layouts_in_few_cases = pytest.mark.parametrize(
    "make",
    [truth.fixed_codes, pytest.param(truth.ragged_codes, marks=pytest.mark.few_cases)],
    ids=["fixed", "ragged"],
)
# What gathers rows does not look at scores, so cases that differ in these alone are one for it.
few_scores = pytest.mark.few_cases(
    *("random", "no-tokens", "one-token", "odd", "one-wide", "k-1", "k-all", "one-latent", "repeated-tokens"),
    *("hot-latent", "duplicates", "strided", "nan"),
)
# More of them than a GPU's shortest list holds, and few enough for the interpreter of Triton's kernels.
FEW_TIES = Case("few-ties", 6, 8, 900, 16, BY_NAME["ties"].make, exact=True)


# -- encoders ---------------------------------------------------------------------------------------------------------


@every_backend
@every_case
@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_encode_topk(case: Case, precision: str, backend: str, dtype: torch.dtype) -> None:
    x, W, b = case.inputs(dtype)
    codes = ops.encode_topk(x, W, b, case.K, backend=backend, precision=precision)
    assert codes.acts.dtype == dtype
    assert codes.acts.shape == (case.N, case.K)
    pre, magnitude = truth.scores(x, W, b)
    truth.assert_top_k(codes, pre, magnitude, case.K, case.exact)
    assert codes.redone is not None
    assert codes.redone.shape == ()
    assert 0 <= int(codes.redone) <= case.N


@pytest.mark.few_cases("odd", "ties")
@every_backend
@pytest.mark.parametrize("name", ["random", "odd", "ties", "norms", "hot-latent"])
def test_encode_topk_with_a_prepared_screen_finds_the_same(name: str, backend: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    x, W, b = case.inputs(dtype)
    screen = ops.prepare_screen(W, b, backend=backend)
    with_screen = ops.encode_topk(x, W, b, case.K, screen=screen, backend=backend)
    without = ops.encode_topk(x, W, b, case.K, backend=backend)
    assert torch.equal(with_screen.acts, without.acts)
    assert torch.equal(with_screen.indices, without.indices)


@pytest.mark.few_cases
@every_backend
@every_finite_case
def test_encode_topk_on_rows(case: Case, backend: str, dtype: torch.dtype) -> None:
    x, W, b = case.inputs(dtype)
    present = torch.arange(0, case.M, 3, dtype=torch.int32)
    rows = torch.cat([present, torch.full((case.K,), -1, dtype=torch.int32)])  # fewer rows than the capacity
    codes = ops.encode_topk(x, W, b, case.K, rows=rows, backend=backend)
    pre, magnitude = truth.scores(x, W, b)
    masked = torch.full_like(pre, -1.0)
    masked[:, present.long()] = pre[:, present.long()]
    truth.assert_top_k(codes, masked, magnitude, case.K, case.exact)


@every_backend
def test_encode_topk_on_no_rows_is_empty(backend: str, dtype: torch.dtype) -> None:
    x, W, b = BY_NAME["odd"].inputs(dtype)
    codes = ops.encode_topk(x, W, b, 5, rows=torch.full((9,), -1, dtype=torch.int32), backend=backend).check()
    assert int(codes.nnz) == 0


@pytest.mark.few_cases
@every_backend
@pytest.mark.parametrize("name", ["random", "odd", "hot-latent"])
def test_encode_topk_with_many_rows(name: str, backend: str, dtype: torch.dtype) -> None:
    """AuxK takes up to D / 2 of the dead latents, so K is large there."""
    case = BY_NAME[name]
    x, W, b = case.inputs(dtype)
    dead = torch.arange(case.M, dtype=torch.int32)[case.M // 4 :]
    codes = ops.encode_topk(x, W, b, case.D // 2, rows=dead, backend=backend)
    pre, magnitude = truth.scores(x, W, b)
    pre[:, : case.M // 4] = -1
    truth.assert_top_k(codes, pre, magnitude, case.D // 2, case.exact)


@pytest.mark.few_cases
@every_backend
@every_finite_case
def test_encode_topk_gated_by_scale(case: Case, backend: str, dtype: torch.dtype) -> None:
    x, W, b = case.inputs(dtype)
    scale = torch.linspace(-1, 2, case.M).to(dtype)
    scale[0] = 0
    codes = ops.encode_topk(x, W, b, case.K, scale=scale, backend=backend)
    pre, magnitude = truth.scores(x, W, b)
    truth.assert_top_k(codes, pre * scale.double(), magnitude * scale.double().abs(), case.K, exact=False)


@every_backend
def test_encode_topk_of_a_shard(backend: str, dtype: torch.dtype) -> None:
    case = BY_NAME["odd"]
    x, W, b = case.inputs(dtype)
    codes = ops.encode_topk(x, W, b, case.K, index_offset=1000, backend=backend)
    assert codes.d_sae == 1000 + case.M
    pre, magnitude = truth.scores(x, W, b)
    truth.assert_top_k(codes, pre, magnitude, case.K, case.exact, offset=1000)


def _thresholds(case: Case, pre: Tensor) -> dict[str, Tensor]:
    """One threshold for all, per latent, and per token. Each lets a different share of the latents through."""
    filled = torch.where(pre.isnan(), 0, pre)
    if case.N == 0:
        return {"one": torch.tensor(0.0), "latent": torch.zeros(case.M), "token": torch.zeros(0, 1)}
    return {
        "one": filled.quantile(0.9).float(),
        "latent": filled.quantile(0.8, dim=0).float() + 0.01,
        "token": filled.quantile(0.95, dim=1, keepdim=True).float(),
    }


def _assert_above(codes: SparseCodes, pre: Tensor, magnitude: Tensor, threshold: Tensor) -> None:
    """codes hold every pre-act above the threshold by more than the bound, and none below it by more than the bound."""
    codes.check()
    slack = truth.bound(pre, magnitude, torch.float64 if codes.acts.dtype == torch.float64 else torch.float32)
    stored = torch.zeros_like(pre, dtype=torch.bool)
    slots = codes.occupied()
    tokens, latents = codes.token_ids()[slots], codes.indices[slots].long()
    stored[tokens, latents] = True
    assert bool((stored | ~(pre > threshold + slack)).all()), "a latent above the threshold is missing"
    assert bool((~stored | ~(pre <= threshold - slack)).all()), "a latent below the threshold is stored"
    assert bool((stored | ~pre.isnan()).all()), "NaN should count as above"
    truth.assert_within(codes.acts[slots], pre[tokens, latents], magnitude[tokens, latents], "the pre-acts")


@every_backend
@every_case
@pytest.mark.parametrize("kind", ["one", "latent", "token"])
def test_encode_above(case: Case, backend: str, dtype: torch.dtype, kind: str) -> None:
    x, W, b = case.inputs(dtype)
    pre, magnitude = truth.scores(x, W, b)
    threshold = _thresholds(case, pre)[kind]
    codes, overflow = ops.encode_above(x, W, b, threshold, case.N * case.M, backend=backend)
    assert codes.acts.dtype == dtype
    assert not bool(overflow)
    _assert_above(codes, pre, magnitude, threshold.double())


@every_backend
def test_encode_above_keeps_the_sign(backend: str, dtype: torch.dtype) -> None:
    case = BY_NAME["all-negative"]
    x, W, b = case.inputs(dtype)
    codes, _ = ops.encode_above(x, W, b, -1000.0, case.N * case.M, backend=backend)
    pre, magnitude = truth.scores(x, W, b)
    truth.assert_within(codes.to_dense(), pre, magnitude, "every pre-act")


@every_backend
@pytest.mark.parametrize("case", [BY_NAME["ties"], FEW_TIES], ids=str)
def test_encode_above_overflows_in_token_order(case: Case, backend: str, dtype: torch.dtype) -> None:
    x, W, b = case.inputs(dtype)
    pre, _ = truth.scores(x, W, b)
    _, latents = (pre > 0.5).nonzero(as_tuple=True)
    for capacity in (0, 1, 77) if case is FEW_TIES else (77,):
        codes, overflow = ops.encode_above(x, W, b, 0.5, capacity, backend=backend)
        assert bool(overflow)
        assert codes.offsets is not None
        assert int(codes.offsets[-1]) == capacity
        codes.check()
        assert torch.equal(codes.indices.long(), latents[:capacity])


@pytest.mark.few_cases(*QUICK, "random", "ties", "hot-latent", "norms", "k-all")  # else as encode_above
@every_backend
@every_finite_case
def test_encode_batch_topk(case: Case, backend: str, dtype: torch.dtype) -> None:
    x, W, b = case.inputs(dtype)
    codes = ops.encode_batch_topk(x, W, b, case.K, backend=backend).check()
    assert codes.acts.shape == (case.N * case.K,)
    pre, magnitude = truth.scores(x, W, b)
    best = reference.batch_top_k(pre, case.K)
    expected, places = best.flatten().sort(descending=True, stable=True)
    expected, places = expected[: case.N * case.K], places[: case.N * case.K]
    slots = codes.occupied()
    assert bool((codes.acts[slots] > 0).all()), "zeros should not be stored"
    found = torch.zeros_like(codes.acts)
    found[: int(slots.sum())] = codes.acts[slots].sort(descending=True).values
    truth.assert_within(found, expected, magnitude.flatten()[places], "the sorted acts")
    tokens, latents = codes.token_ids()[slots], codes.indices[slots].long()
    truth.assert_within(codes.acts[slots], pre[tokens, latents], magnitude[tokens, latents], "the acts at the indices")
    if case.exact:
        assert torch.equal(codes.to_dense().double(), best)


@every_backend
@pytest.mark.parametrize("name", ["nan", "odd"])
def test_encode_batch_topk_with_tokens_that_are_no_numbers(name: str, backend: str, dtype: torch.dtype) -> None:
    """A token with NaN or infinity has k slots of NaN; the others have what they have without it, to the last bit."""
    _assert_tokens_that_are_no_numbers(BY_NAME[name], backend, dtype)


@pytest.mark.parametrize(("backend", "dtype"), [p for p in truth.backend_dtypes(*DTYPES) if p.values[0] in truth.GPU])
@pytest.mark.parametrize("name", ["nan", pytest.param("odd", marks=pytest.mark.long_interpreted)])
def test_encode_batch_topk_that_looks_at_every_score(
    name: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's first bar is too high."""
    from fastsae.backends.gpu import encode_batch_topk

    bar = encode_batch_topk.sampled_bar
    monkeypatch.setattr(encode_batch_topk, "sampled_bar", lambda *args: bar(*args) + 100)
    _assert_tokens_that_are_no_numbers(BY_NAME[name], backend, dtype)


def _assert_tokens_that_are_no_numbers(case: Case, backend: str, dtype: torch.dtype) -> None:
    x, W, b = case.inputs(dtype)
    x = torch.where(x.isnan(), 0, x)
    for bad in ([1], [0, 3, len(x) - 1], list(range(len(x)))):
        blank = torch.zeros(len(x), dtype=torch.bool)
        blank[bad] = True
        y = x.clone()
        y[bad, 2] = torch.tensor([float("nan"), float("inf"), -float("inf")] * len(x))[: len(bad)].to(dtype)
        codes = ops.encode_batch_topk(y, W, b, case.K, backend=backend).check()
        assert codes.l0[blank].tolist() == [case.K] * len(bad)
        dense, first = codes.to_dense(), torch.arange(case.M) < case.K
        assert bool((dense[blank].isnan() == first).all())
        if len(bad) < len(x):
            alone = ops.encode_batch_topk(x[~blank].contiguous(), W, b, case.K, backend=backend)
            truth.assert_within(
                dense[~blank], alone.to_dense().double(), truth.scores(x[~blank], W, b)[1], "the others' acts"
            )
            assert torch.equal(dense[~blank] != 0, alone.to_dense() != 0)


@every_backend
@pytest.mark.parametrize("name", ["nan", pytest.param("odd", marks=pytest.mark.long_interpreted)])
def test_a_token_that_is_no_number_has_acts_that_are_none(name: str, backend: str, dtype: torch.dtype) -> None:
    x, W, b = BY_NAME[name].inputs(dtype)
    x = torch.where(x.isnan(), 0, x)
    y, bad = x.clone(), [1, len(x) // 2, len(x) - 1]
    y[bad, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=dtype)
    others = [i for i in range(len(x)) if i not in bad]
    encoders = (
        lambda x: ops.encode_topk(x, W, b, 3, backend=backend),
        lambda x: ops.encode_topk(x, W.neg(), b, 3, scale=b.abs() + 1, backend=backend),
        lambda x: ops.encode_above(x, W, b, 0.5, x.shape[0] * W.shape[0], backend=backend)[0],
        lambda x: ops.encode_above(x, W.abs().neg(), b, b.neg(), x.shape[0] * W.shape[0], backend=backend)[0],
    )
    for encode in encoders:
        codes, before = encode(y), encode(x)
        assert bool(codes.to_dense()[bad].isnan().any(1).all())
        assert torch.equal(codes.to_dense()[others], before.to_dense()[others])
        assert bool(ops.decode(codes, W, backend=backend)[bad].isnan().all())


# -- decode, active_dot, active_outer, by_latent ----------------------------------------------------------------------


@few_scores
@every_backend
@every_finite_case
@both_layouts
def test_decode(case: Case, make, backend: str, dtype: torch.dtype) -> None:
    codes, _, W = make(case, dtype)
    A, W64 = codes.to(torch.float64).to_dense(), W.double()
    got = ops.decode(codes, W, backend=backend)
    assert got.dtype == dtype
    truth.assert_within(got, reference.decode(A, W64), reference.decode(A.abs(), W64.abs()), "the reconstruction")


@few_scores
@every_backend
@every_finite_case
@both_layouts
@pytest.mark.parametrize("biased", [False, True])
def test_decode_error(case: Case, make, backend: str, dtype: torch.dtype, biased: bool) -> None:
    codes, x, W = make(case, dtype)
    bias = torch.linspace(-1, 1, case.D).to(dtype) if biased else None
    error, squares = ops.decode_error(codes, W, x, bias, backend=backend)
    assert error.dtype == dtype
    assert squares.dtype == torch.float64
    A, W64, x64 = codes.to(torch.float64).to_dense(), W.double(), x.double()
    b64 = torch.zeros(case.D, dtype=torch.float64) if bias is None else bias.double()
    expected = reference.decode(A, W64) + b64 - x64
    magnitude = reference.decode(A.abs(), W64.abs()) + b64.abs() + x64.abs()
    if backend == "cpu" and dtype == torch.bfloat16:  # the CPU rounds the reconstruction before it subtracts
        magnitude = magnitude * 2**17 / truth.C
    truth.assert_within(error, expected, magnitude, "the error")
    slack = truth.bound(expected, magnitude, error.dtype)
    allowed = (slack * (2 * expected.abs() + slack)).sum(-1) + 1e-6 * expected.square().sum(-1)
    assert bool(((squares - expected.square().sum(-1)).abs() <= allowed).all()), "the sums of squares"


@few_scores
@every_backend
@every_finite_case
@both_layouts
def test_active_dot(case: Case, make, backend: str, dtype: torch.dtype) -> None:
    codes, x, W = make(case, dtype)
    got = ops.active_dot(x, codes, W, backend=backend)
    assert got.shape == codes.acts.shape
    assert got.dtype == dtype
    slots = codes.occupied()
    assert bool((got[~slots] == 0).all()), "an empty slot has a dot product"
    tokens, latents = codes.token_ids().view(slots.shape)[slots], codes.indices[slots].long()
    x64, W64 = x.double(), W.double()
    dense, magnitude = reference.active_dot(x64, W64), reference.active_dot(x64.abs(), W64.abs())
    truth.assert_within(got[slots], dense[tokens, latents], magnitude[tokens, latents], "the dot products")


@few_scores
@every_backend
@every_finite_case
@layouts_in_few_cases
@pytest.mark.parametrize("regrouped", [False, True])
def test_active_outer(case: Case, make, backend: str, dtype: torch.dtype, regrouped: bool) -> None:
    codes, x, _ = make(case, dtype)
    A, x64 = codes.to(torch.float64).to_dense(), x.double()
    order = ops.by_latent(codes, backend=backend) if regrouped else None
    got = ops.active_outer(codes, x, by_latent=order, backend=backend)
    assert got.dtype == dtype
    truth.assert_within(
        got, reference.active_outer(A, x64), reference.active_outer(A.abs(), x64.abs()), "the dictionary gradient"
    )


@every_backend
@every_finite_case
@both_layouts
def test_by_latent(case: Case, make, backend: str, dtype: torch.dtype) -> None:
    codes, _, _ = make(case, dtype)
    order = ops.by_latent(codes, backend=backend)
    assert order.offsets.dtype == order.slots.dtype == torch.int64
    assert order.tokens.dtype == torch.int32
    occupied = codes.occupied().flatten().nonzero().squeeze(1)
    latents, tokens = codes.indices.flatten()[occupied], codes.token_ids()[occupied]
    expected = latents.argsort(stable=True)  # slots ascend by token already
    n = occupied.numel()
    assert torch.equal(order.offsets.diff(), torch.bincount(latents, minlength=case.M))
    assert int(order.offsets[0]) == 0
    assert torch.equal(order.slots[:n], occupied[expected])
    assert torch.equal(order.tokens[:n].long(), tokens[expected])


@pytest.mark.parametrize("backend", truth.GPU)
@pytest.mark.parametrize("name", ["odd", "strided", "nan"])
def test_float16_on_gpu_backends(name: str, backend: str) -> None:
    """Only GPU backends have fp16 kernels. Cases whose results leave fp16's range are left out."""
    case = BY_NAME[name]
    x, W, b = case.inputs(torch.float16)
    codes = ops.encode_topk(x, W, b, case.K, backend=backend)
    pre, magnitude = truth.scores(x, W, b)
    truth.assert_top_k(codes, pre, magnitude, case.K, case.exact)
    if not case.finite:
        return
    A, W64, x64 = codes.to(torch.float64).to_dense(), W.double(), x.double()
    truth.assert_within(ops.decode(codes, W, backend=backend), A @ W64, A.abs() @ W64.abs(), "the reconstruction")
    truth.assert_within(ops.active_outer(codes, x, backend=backend), A.mT @ x64, A.abs().mT @ x64.abs(), "the gradient")
    dots, products, sizes = ops.active_dot(x, codes, W, backend=backend), x64 @ W64.mT, x64.abs() @ W64.abs().mT
    slots, chosen = codes.occupied(), codes.indices.long()
    truth.assert_within(dots[slots], products.gather(1, chosen)[slots], sizes.gather(1, chosen)[slots], "the dots")


@every_backend
def test_slots_of_zero_may_lie_anywhere(backend: str, dtype: torch.dtype) -> None:
    """A gradient has zeros between its entries: decode and active_outer must not stop at the first one."""
    codes, x, W = truth.fixed_codes(BY_NAME["random"], dtype)
    acts = codes.acts.clone()
    acts[:, ::2] = 0
    holes = SparseCodes(acts, codes.indices, codes.d_sae)
    A, W64, x64 = holes.to(torch.float64).to_dense(), W.double(), x.double()
    truth.assert_within(
        ops.decode(holes, W, backend=backend), reference.decode(A, W64), reference.decode(A.abs(), W64.abs())
    )
    truth.assert_within(
        ops.active_outer(holes, x, backend=backend), A.mT @ x64, A.abs().mT @ x64.abs(), "the dictionary gradient"
    )
    assert bool((ops.active_dot(x, holes, W, backend=backend)[:, ::2] == 0).all())
    assert int(ops.by_latent(holes, backend=backend).offsets[-1]) == int(holes.nnz)


@every_backend
def test_a_latent_stored_twice_counts_twice(backend: str, dtype: torch.dtype) -> None:
    """The code is not valid, but no entry may be dropped silently."""
    acts = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 0.0]], dtype=dtype)
    codes = SparseCodes(acts, torch.tensor([[1, 1, 3], [0, 0, 3]], dtype=torch.int32), 4)
    W = torch.arange(8.0).view(4, 2).to(dtype)
    assert ops.decode(codes, W, backend=backend).tolist() == [[30.0, 37.0], [0.0, 24.0]]
    assert ops.active_outer(codes, acts.new_ones(2, 1), backend=backend).tolist() == [[24.0], [3.0], [0.0], [4.0]]


@every_backend
def test_nan_reaches_every_result_of_its_token(backend: str, dtype: torch.dtype) -> None:
    case = BY_NAME["nan"]
    x, W, b = case.inputs(dtype)
    codes = ops.encode_topk(x, W, b, case.K, backend=backend).check()
    assert codes.indices[1].tolist() == list(range(case.K)), "NaN ties go to the lower index"
    recon = ops.decode(codes, W, backend=backend)
    assert bool(recon[1].isnan().all())
    assert bool(recon[[0, 2, 3, 4, 5, 6]].isfinite().all())
    assert bool(ops.active_outer(codes, W[: case.N], backend=backend)[: case.K].isnan().all())


@pytest.mark.parametrize("backend", truth.THREADED)  # the reference uses torch's matmul, which promises nothing
@pytest.mark.parametrize("dtype", truth.NARROW, ids=str)
def test_results_do_not_depend_on_the_number_of_threads(backend: str, dtype: torch.dtype) -> None:
    case = BY_NAME["hot-latent"]
    x, W, b = case.inputs(dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            codes = ops.encode_topk(x, W, b, case.K, backend=backend)
            above, _ = ops.encode_above(x, W, b, 0.5, case.N * case.M, backend=backend)
            batch = ops.encode_batch_topk(x, W, b, case.K, backend=backend)
            outer = ops.active_outer(codes, x, backend=backend)
            results.append([codes.acts, codes.indices, above.to_dense(), batch.to_dense(), outer])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
