"""The screened encoders of the Triton backend at critical sizes: chunks, slabs, short lists, wrong thresholds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastsae import SparseCodes, ops, reference
from fastsae.backends.gpu import accumulation, bounds, encode_above, encode_batch_topk, narrow, plan
from tests import truth
from tests.cases import BY_NAME

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif("triton" not in truth.BACKENDS, reason="no Triton here"),
]
if "triton" in truth.BACKENDS:
    from fastsae.kernels import exhaustive, stages


def _best_of_every_score(x: Tensor, W: Tensor, b: Tensor, k: int) -> SparseCodes:
    """The top k of the engine's own exact scores of all latents: active_dot gives the bits of rescoring."""
    (N, _), M = x.shape, W.shape[0]
    every = SparseCodes(torch.ones(N, M), torch.arange(M, dtype=torch.int32).repeat(N, 1), M)
    scores = ops.active_dot(x, every, W, backend="triton") + b
    return SparseCodes.from_dense(reference.keep_top_k(scores, k), k)


def _assert_same(codes: SparseCodes, expected: SparseCodes) -> None:
    assert torch.equal(codes.to_dense(), expected.to_dense())
    assert torch.equal(codes.indices, expected.indices)


def _normal(N: int, D: int, M: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=g), torch.randn(M, D, generator=g) / D**0.5, 0.1 * torch.randn(M, generator=g)


def _silent_to(x: Tensor, W: Tensor) -> Tensor:
    """W without its components along the tokens x: scores near 0 at norms that hardly change."""
    q = torch.linalg.qr(x.double().mT).Q
    return (W.double() - W.double() @ q @ q.mT).float()


# -- several tiles, chunks, slabs; more redone tokens than slots ------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True])
def test_decode_and_its_error_over_several_tiles_of_columns(ragged: bool) -> None:
    g = torch.Generator().manual_seed(0)
    N, D, M, K = 19, 150, 40, 6  # D: three tiles of 64
    acts = torch.rand(N, K, generator=g) + 0.1
    indices = torch.rand(N, M, generator=g).argsort(1)[:, :K].sort(1).values.int()
    codes = SparseCodes(acts, indices, M)
    if ragged:
        codes = SparseCodes(acts.flatten(), indices.flatten(), M, torch.arange(N + 1) * K)
    W, x, bias = (torch.randn(*s, generator=g) for s in ((M, D), (N, D), (D,)))
    A, W64 = codes.to(torch.float64).to_dense(), W.double()
    recon, magnitude = reference.decode(A, W64), reference.decode(A.abs(), W64.abs())
    truth.assert_within(ops.decode(codes, W, backend="triton"), recon, magnitude)
    error, squares = ops.decode_error(codes, W, x, bias, backend="triton")
    expected = recon + bias.double() - x.double()
    truth.assert_within(error, expected, magnitude + bias.double().abs() + x.double().abs())
    torch.testing.assert_close(squares, expected.square().sum(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("precision", ["exact", "fp32"])
def test_encode_topk_in_chunks_and_slabs(rows: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BY_NAME["duplicates"]
    x, W, b = case.inputs(torch.float32)
    present = torch.arange(0, case.M, 2, dtype=torch.int32) if rows else torch.arange(case.M, dtype=torch.int32)
    given = torch.cat([present, torch.full((5,), -1, dtype=torch.int32)]) if rows else None
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
    monkeypatch.setattr(plan, "LIST_BYTES", 8 * 180 * 7)
    p = plan.plan(case.N, case.M if given is None else len(given), case.K)
    assert p.chunks > 3
    assert 1 < p.tokens < case.N / 2
    codes = ops.encode_topk(x, W, b, case.K, rows=given, backend="triton", precision=precision)
    pre, magnitude = truth.scores(x, W, b)
    masked = torch.full_like(pre, -1.0)
    masked[:, present.long()] = pre[:, present.long()]
    truth.assert_top_k(codes, masked, magnitude, case.K, exact=True)


@pytest.mark.parametrize("rows", [False, True])
def test_more_redone_tokens_than_slots(rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Most latents tie, so only tokens of zeros are certified; slabs add up what was redone."""
    x = torch.arange(1.0, 24).repeat(8, 1).mT.contiguous()
    x[::3] = 0
    W, b = torch.ones(300, 8), torch.zeros(300)
    W[1:9] = W[200:] = 0.5
    given = torch.arange(299, -1, -2, dtype=torch.int32).flip(0).contiguous() if rows else None
    monkeypatch.setattr(exhaustive, "SLOTS", 2)
    monkeypatch.setattr(exhaustive, "STAYING_PROGRAMS", 3)
    monkeypatch.setattr(plan, "LIST_BYTES", 8 * 64 * 12)
    assert plan.plan(23, 150 if rows else 300, 4).tokens < 23
    codes = ops.encode_topk(x, W, b, 4, rows=given, backend="triton").check()
    assert int(codes.redone) == 15
    first = torch.tensor([9, 11, 13, 15] if rows else [0, 9, 10, 11], dtype=torch.int32)
    assert torch.equal(codes.acts, x.sum(1, keepdim=True).expand(23, 4))
    assert torch.equal(codes.indices[codes.acts[:, 0] > 0], first.expand(15, 4))


@pytest.mark.parametrize("kind", ["one", "latent"])
def test_encode_above_in_chunks_and_past_its_lists(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens with more survivors than slots are scored in full, NaN among them."""
    x, W, b = _normal(6, 24, 300)
    b[::2] += 100 * (torch.arange(300)[::2] > 10)
    x[3, 2] = float("nan")
    x[4] = 0
    W[:, 0] = 0
    x[::2, 0] = 1
    threshold = torch.tensor(0.5) if kind == "one" else torch.linspace(0.5, 1, 300)
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
    monkeypatch.setattr(encode_above, "LIST_BYTES", 1)
    codes, overflow = ops.encode_above(x, W, b, threshold, 6 * 300, backend="triton")
    codes.check()
    assert not bool(overflow)
    assert int(codes.redone) == 6
    pre, magnitude = truth.scores(x, W, b)
    above = torch.where(pre.isnan() | (pre > threshold), pre, 0)
    truth.assert_within(codes.to_dense(), above, magnitude, "every pre-act above")


def test_encode_batch_topk_counts_every_latent_where_ties_fail_its_bar() -> None:
    """Too few scores clear the bar: two histograms count all latents, down to the last ones and the lowest bits."""
    x, W, b = torch.ones(6, 8), torch.full((100, 8), 0.125), torch.zeros(100)
    W[96:] *= 2
    W[:96:3] *= 1 - 2**-20
    codes = ops.encode_batch_topk(x, W, b, 8, backend="triton").check()
    assert int(codes.redone) == 6
    assert torch.equal(codes.to_dense(), reference.batch_top_k(x @ W.mT, 8))


@pytest.mark.long
@pytest.mark.parametrize("spread", [0.0, 1.0])
def test_encode_batch_topk_with_too_little_room(spread: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar lets too many through, because all hot latents lie between the sampled ones."""
    x, W, b = _normal(6, 8, 2100)
    monkeypatch.setattr(encode_batch_topk, "LEAST_ROOM", 1)
    b[1::2] += 10 + spread * torch.linspace(0, 1, 1050)
    W *= 0.01
    codes = ops.encode_batch_topk(x, W, b, 4, backend="triton").check()
    assert int(codes.redone) == 6
    every = _best_of_every_score(x, W, b, 2100).to_dense()
    assert torch.equal(codes.to_dense(), reference.batch_top_k(every, 4))


# -- the certificate --------------------------------------------------------------------------------------------------


def test_a_misleading_sample_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """All hot latents are in the sample, so the guessed bar is too high for every token."""
    x, W, b = _normal(6, 24, 1030)
    k = 24
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
    p = plan.plan(6, 1030, k)
    assert p.sampled_chunks == 1 < p.chunks
    assert p.rank < k
    b[torch.arange(0, 1030, p.chunks)[: k - 1]] += 30
    codes = ops.encode_topk(x, W, b, k, backend="triton")
    assert int(codes.redone) == 6
    _assert_same(codes, _best_of_every_score(x, W, b, k))


@pytest.mark.parametrize("short", ["survivors", "candidates"])
def test_a_list_that_is_too_short_is_detected(short: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is low, everything else clears its bar, and the best come last."""
    x, W, _ = _normal(5, 24, 1030)
    W *= 1e-4
    k = 16
    monkeypatch.setattr(plan, "CHUNK_BYTES", 1)
    p = plan.plan(5, 1030, k)
    position = torch.arange(1030)
    chunk, column = position % p.chunks, position // p.chunks
    order = chunk * p.width + column  # of the list
    if short == "survivors":
        b = torch.where(chunk == 0, 0.01, 1 + 1e-2 * order)
    else:
        b = torch.where((chunk == 1) | (chunk == 2), 10 + 1e-5 * order, 0.01 * (chunk == 0))
        assert p.candidates < 200 < p.survivors
    codes = ops.encode_topk(x, W, b, k, backend="triton")
    assert int(codes.redone) == 5
    _assert_same(codes, _best_of_every_score(x, W, b, k))


def test_scores_that_fp16_cannot_tell_apart() -> None:
    """The latents are nearly orthogonal to every token, so the rounding error exceeds the scores."""
    x, W, _ = _normal(6, 64, 1024)
    W = _silent_to(x, W) + 1e-5 * W
    b = torch.zeros(1024)
    _assert_same(ops.encode_topk(x, W, b, 16, backend="triton"), _best_of_every_score(x, W, b, 16))


def test_latents_of_large_norm_with_wrong_screened_scores() -> None:
    """A few latents have ten thousand times the norm and are orthogonal to the tokens. The error of their screened
    scores exceeds the gaps between the other scores, and only their error bound keeps them as candidates."""
    x, W, b = _normal(8, 64, 600)
    loud = torch.arange(5, 600, 25)
    W[loud] = 1e4 * _silent_to(x, W[loud])
    b[loud] = torch.linspace(0.5, 3.5, len(loud))
    codes = ops.encode_topk(x, W, b, 16, backend="triton")
    assert int(codes.redone) < 8, "the test shows nothing if all tokens are redone"
    _assert_same(codes, _best_of_every_score(x, W, b, 16))


def test_a_nan_latent_wins_for_every_token() -> None:
    x, W, b = _normal(8, 24, 200)
    W[133, 4] = float("nan")
    codes = ops.encode_topk(x, W, b, 4, backend="triton").check()
    assert bool((codes.indices == 133).any(1).all())
    assert torch.equal(codes.acts.isnan(), codes.indices == 133)
    W[133, 4] = 0
    b[133] = -1e9
    rest = _best_of_every_score(x, W, b, 3)
    assert torch.equal(codes.acts[~codes.acts.isnan()].view(8, 3), rest.acts)


# -- the bound --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [1, 24, 65, 200])
def test_a_narrow_copy_measures_what_it_loses(D: int) -> None:
    _x, t, _ = _normal(1, D, 37)
    t[1:4] *= torch.tensor([1e-30, 1e20, 0.0])[:, None]
    copy = narrow.narrowed(stages, t)
    assert bool((copy.low[:, D:] == 0).all())
    kept = copy.low[:, :D].double() * copy.scale.double()[:, None]
    for measured, exact in ((copy.norm, kept.norm(dim=1)), (copy.residual, (t.double() - kept).norm(dim=1))):
        assert bool((measured >= exact).all())
        assert bool((measured <= exact * (1 + 2**-14) + 1e-42).all())
    assert bool((copy.residual <= 2**-11 * copy.norm + 1e-42).all())


def test_the_bound_holds_where_it_is_tight() -> None:
    """Cauchy-Schwarz is tight where a latent is parallel to the rounding error of a token, or the other way round."""
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(20, 48, generator=g), torch.randn(30, 48, generator=g)
    lost = [t.double() - c.low[:, :48].double() * c.scale.double()[:, None]
            for t, c in ((x, narrow.narrowed(stages, x)), (W, narrow.narrowed(stages, W)))]  # fmt: skip
    x, W = torch.cat([x, 1e3 * lost[1].float()]), torch.cat([W, 1e3 * lost[0].float()])
    narrow_x, narrow_W = narrow.narrowed(stages, x), narrow.narrowed(stages, W)
    b = torch.zeros(50)
    _, _, A, B, _ = bounds.tables(narrow_W, b, None, None, None, 1, 50, strided=False)[0].double()
    _, p, q, _ = bounds.token_bounds(narrow_x, 48).double()
    screened = (narrow_x.low.double() @ narrow_W.low.double().mT)[:, :50]
    screened = screened * narrow_x.scale.double()[:, None] * narrow_W.scale.double()
    error = (screened - x.double() @ W.double().mT).abs()
    bound = p[:, None] * A + q[:, None] * B
    assert bool((error <= bound).all())
    for tight in (
        (error / bound)[:20, 30:],
        (error / bound)[20:, :30],
    ):  # rounding errors of the tokens, then of the latents
        assert float(tight.max()) > 0.6, "the inputs do not come near the bound"
    sums = narrow_x.norm.double() * bounds.bound_of_sums(48, accumulation.UNMEASURED)
    assert bool((p >= narrow_x.residual.double() + sums).all())


@pytest.mark.parametrize(
    "sizes", [(2000, 16640, 32), (6000, 49152, 64), (3000, 65536, 32), (8192, 24576, 32), (5, 7, 3)]
)
def test_a_list_holds_what_is_expected_to_reach_the_guess(sizes: tuple[int, int, int]) -> None:
    """The sample has a power of two of slots, and covers fewer positions where that does not divide the chunks."""
    tokens, positions, k = sizes
    p = plan.plan(tokens, positions, k)
    columns = p.sampled_chunks * p.width
    looked_at = len(range(0, columns, plan.sample_step(columns, p.samples)))
    assert p.survivors >= min(positions, p.rank * positions / min(looked_at, positions) * (1 + 4 / p.rank**0.5))
    assert p.chunks * p.width >= positions
    assert p.candidates >= k
