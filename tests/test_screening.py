"""Screening on the CPU: every narrow format must return the bits of the fp32 scores, however hard the input.

All formats of an instruction set share one exact score, so i8, bf16, AMX (its software twin) and fp32 screening have to
agree in every bit. test_ops compares fp32 screening with float64.
"""

import pytest
import torch

import fastsae
from fastsae import ops

pytestmark = pytest.mark.skipif(
    not fastsae.backends()["cpu"]["available"], reason="the C++ extension is not built: the cpu backend is missing"
)

if fastsae.backends()["cpu"]["available"]:
    from fastsae import _cpu
    from fastsae.backends.cpu import screen as cpu_screen

    FORMATS = [f for f in _cpu.Format.__members__.values() if _cpu.format_supported(f)]
else:
    FORMATS = []


def encode(x, W, b, k, fmt, precision="exact", like=None):
    """like: the inputs that the copy is balanced for."""
    screen = cpu_screen.fill(W, None, fmt, cpu_screen.balanced(W, like))[1]
    acts, indices, redone = cpu_screen.encode_topk(x, W, b, k, None, None, 0, screen, precision)
    return acts, indices, int(redone)


def dictionary(M, D, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(M, D, generator=g) / D**0.5, torch.randn(M, generator=g) * 0.1, g


def gaussian(N=200, D=96, M=4096):
    W, b, g = dictionary(M, D)
    return torch.randn(N, D, generator=g), W, b, 32


def sorted_latents():
    """The first latents are the strong ones: a prefix would be a misleading sample."""
    x, W, b, k = gaussian()
    return x, W * torch.linspace(6, 0.01, W.shape[0])[:, None], b, k


def mass_in_one_block():
    x, W, b, k = gaussian()
    b = b.clone()
    b[1000:1020] += 50  # twenty of the 32 winners of every token are neighbours
    return x, W, b, k


def exact_ties():
    """Thousands of latents have the same score: the lower index wins, and no candidate list can hold them all."""
    x, W, b, k = gaussian(N=20)
    W = W.clone()
    W[500:3500] = W[7]
    b[500:3500] = b[7]
    return torch.cat([x, W[7:8] * 10]), W, b, k


def duplicates():
    x, W, b, k = gaussian()
    return x, W[torch.arange(W.shape[0]) // 2 * 2], b[torch.arange(W.shape[0]) // 2 * 2], k


def hot_latent():
    x, W, b, k = gaussian()
    b = b.clone()
    b[17] = 1e3
    return x, W, b, k


def extreme_norms():
    x, W, b, k = gaussian()
    x = x.clone()
    x[::3] = 0
    x[1::3] *= 1e4 / x[1::3].norm(dim=1, keepdim=True)
    return x, W, b, k


def massive_dimensions():
    """Two coordinates a hundred times the rest, as in the residual stream of a language model."""
    x, W, b, k = gaussian()
    x = x.clone()
    x[:, [5, 50]] *= 100
    return x, W, b, k


def ignored_direction(M=4096):
    """A direction 300 times the rest that no latent reads: 8 bits of x hold little else, in any balanced basis."""
    x, W, b, k = gaussian(M=M)
    direction = torch.nn.functional.normalize(torch.randn(96, generator=torch.Generator().manual_seed(9)), dim=0)
    return x + 300 * direction, W - (W @ direction)[:, None] * direction, b, k


def unequal_dimensions():
    """Factors as large and as small as they come: columns of x and W grow apart, and some are 0 in either."""
    x, W, b, k = gaussian(N=40)
    spread = torch.logspace(-15, 15, 96)
    x, W = x * spread, W / spread
    x[:, 3], W[:, 90] = 0, 0
    return x, W, b, k


def all_negative():
    x, W, b, k = gaussian(N=30)
    return x, W, b - 1e4, k


def nearly_all_negative():
    x, W, b, k = gaussian(N=30)
    b = b - 1e4
    b[[3, 900, 4000]] = 1e3
    return x, W, b, k


def few_latents():
    W, b, g = dictionary(40, 33)
    return torch.randn(70, 33, generator=g), W, b, 40


def tiny_tokens():
    """The squares underflow in fp32: a norm computed as 0 would certify any result."""
    x, W, b, k = gaussian(N=40)
    return x * 1e-24, W, b * 0, k


def tiny_latents():
    x, W, b, k = gaussian(N=40)
    return x, W * 1e-30, b * 0, k


HARD = [
    gaussian, sorted_latents, mass_in_one_block, exact_ties, duplicates, hot_latent, extreme_norms, massive_dimensions,
    ignored_direction, unequal_dimensions, all_negative, nearly_all_negative, few_latents, tiny_tokens, tiny_latents,
]  # fmt: skip


@pytest.mark.parametrize("case", HARD, ids=lambda f: f.__name__)
def test_every_format_returns_the_bits_of_the_full_fp32_scores(case):
    x, W, b, k = case()
    wanted_acts, wanted_indices, _ = encode(x, W, b, k, _cpu.Format.f32)
    reference = ops.encode_topk(x.double(), W.double(), b.double(), k, backend="reference")
    # Of the largest act; where terms cancel, of the largest sum of their magnitudes.
    allowed = max(2e-6 * float(reference.acts.abs().max()), 2.0**-22 * float((x.abs() @ W.abs().T).max()))
    assert float((wanted_acts.sort(-1).values - reference.acts.sort(-1).values).abs().max()) <= allowed
    for fmt in FORMATS:
        for like in (None, x):
            acts, indices, _ = encode(x, W, b, k, fmt, like=like)
            assert torch.equal(acts, wanted_acts), fmt
            assert torch.equal(indices, wanted_indices), fmt


@pytest.mark.parametrize("D", [1, 15, 16, 48, 64, 128, 256, 400, 768])
def test_every_width_has_its_basis(D):
    """Blocks of the rotation from 16 to 256 numbers, and widths without one; weights in bf16."""
    x, W, b, k = gaussian(N=30, D=D, M=1500)
    x, W = x * torch.linspace(0.1, 30, D), W.bfloat16()
    x = x.bfloat16()
    wanted = encode(x, W, b, k, _cpu.Format.f32)
    for fmt in FORMATS:
        for like in (None, x):
            acts, indices, redone = encode(x, W, b, k, fmt, like=like)
            assert torch.equal(acts, wanted[0]), fmt
            assert torch.equal(indices, wanted[1]), fmt
            assert redone <= 1, fmt


@pytest.mark.skipif(not FORMATS or _cpu.Format.i8 not in FORMATS, reason="there is no 8-bit product here")
def test_large_dimensions_cost_8_bits_little():
    """Rows as training leaves them: few dimensions hold most of x, and W reads them as much as the others."""
    x, W, b, k = massive_dimensions()
    redone, rivals = {}, {}
    for name, like in {"signs alone": None, "balanced": x}.items():
        screen = cpu_screen.fill(W, None, _cpu.Format.i8, cpu_screen.balanced(W, like))[0]
        args = cpu_screen._encode_args(x, W, b, k, None, None, 0, screen, rescore=True, redo=False)
        redone[name], rivals[name] = _cpu.encode_topk(args, *cpu_screen._fixed(len(x), k)[1])
    assert redone["balanced"] <= 1
    assert rivals["balanced"] < rivals["signs alone"] / 2


@pytest.mark.parametrize("case", HARD, ids=lambda f: f.__name__)
def test_ties_go_to_the_lower_index(case):
    """No latent left out may beat a chosen one, or tie with it at a lower index, by the engine's own scores."""
    x, W, b, k = case()
    acts, indices, _ = encode(x, W, b, k, _cpu.fastest_format(W.shape[1]))
    M = W.shape[0]
    all_acts, all_indices, _ = encode(x, W, b, M, _cpu.Format.f32)
    scores = torch.zeros(x.shape[0], M).scatter_add(1, all_indices.long(), all_acts)
    order = scores.sort(dim=1, descending=True, stable=True)
    wanted = torch.zeros_like(scores).scatter(1, order.indices[:, :k], order.values[:, :k])
    got = torch.zeros_like(scores).scatter_add(1, indices.long(), acts)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("case", [gaussian, sorted_latents, exact_ties, extreme_norms], ids=lambda f: f.__name__)
def test_bits_do_not_depend_on_threads_or_panels(case):
    x, W, b, k = case()
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(encode(x, W, b, k, _cpu.fastest_format(W.shape[1]))[:2])
    finally:
        torch.set_num_threads(before)
    for n, row in enumerate(x):  # a token alone is a panel of its own
        if n % 50 == 0:
            acts, indices, _ = encode(row[None].contiguous(), W, b, k, _cpu.fastest_format(W.shape[1]))
            assert torch.equal(acts[0], results[0][0][n])
            assert torch.equal(indices[0], results[0][1][n])
    for acts, indices in results[1:]:
        assert torch.equal(acts, results[0][0])
        assert torch.equal(indices, results[0][1])


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_few_tokens_are_redone_where_the_sample_is_representative(fmt):
    x, W, b, k = gaussian(N=2000, D=64, M=8192)
    assert encode(x, W, b, k, fmt)[2] <= 20


def test_a_misleading_sample_is_detected():
    """All hot latents are in the sample: the guessed threshold is too high for every token, and all are redone."""
    x, W, b, k = gaussian(N=48)
    fmt = _cpu.fastest_format(W.shape[1])
    blocks = _cpu.blocks_of(W.shape[0])
    step = min(8, blocks * 16 // 1024)  # sample_step of csrc/cpu/candidates.cpp
    in_sample = [tile * 2 + half + lane * blocks for tile in range(step // 2, blocks // 2, step)
                 for half in (0, 1) for lane in range(16)]  # fmt: skip
    b = b.clone()
    b[in_sample[:30]] += 1e3
    acts, indices, redone = encode(x, W, b, k, fmt)
    assert redone == 48
    wanted = encode(x, W, b, k, _cpu.Format.f32)
    assert torch.equal(acts, wanted[0])
    assert torch.equal(indices, wanted[1])


def test_a_nan_latent_wins_for_every_token_and_a_nan_token_has_nan_acts():
    x, W, b, k = gaussian(N=40)
    W, x = W.clone(), x.clone()
    W[33, 4] = float("nan")
    x[5] = float("nan")
    for fmt in FORMATS:
        acts, indices, _ = encode(x, W, b, k, fmt)
        others = torch.arange(40) != 5
        assert (indices[others] == 33).any(dim=1).all()
        assert (acts[others].isnan().sum(dim=1) == 1).all()
        assert acts[5].isnan().all()
        assert torch.equal(indices[5], torch.arange(k, dtype=torch.int32))


def test_a_nan_bias_wins_for_every_token_by_its_estimate_too():
    x, W, b, k = gaussian(N=200)
    b = b.clone()
    b[33] = float("nan")
    for fmt in FORMATS:
        for precision in ("exact", "screened"):
            acts, indices, _ = encode(x, W, b, k, fmt, precision)
            assert (indices[acts.isnan()] == 33).all(), (fmt, precision)
            assert (acts.isnan().sum(dim=1) == 1).all(), (fmt, precision)


@pytest.mark.parametrize(("of_x", "of_w"), [(1e8, 0.0), (1e-18, 1e5), (1e15, 1e-15), (0.0, 1.0)])
def test_factors_are_numbers_at_any_scale(of_x, of_w):
    x, W, *_ = gaussian(N=20)
    factors = cpu_screen.balanced(W * of_w, x * of_x)
    assert torch.isfinite(factors).all()
    assert (factors != 0).all()


def test_a_token_that_is_no_number_is_scored_in_full():
    x, W, b, k = gaussian(N=10)
    x = x.clone()
    x[2, 3] = float("nan")  # as every encoder hands on infinity
    wanted = ops.encode_topk(x, W, b, k, backend="reference")
    for fmt in FORMATS:
        acts, indices, redone = encode(x, W, b, k, fmt)
        assert redone >= 1
        assert torch.equal(acts[2].isnan(), wanted.acts[2].isnan())
        assert torch.equal(indices[2], wanted.indices[2])
        assert acts[2].isnan().all()


def test_a_copy_with_nan_lets_no_padding_pass():
    """Its positions are no latents: rows past the end of W were read."""
    x, W, b, _ = gaussian(N=3, D=16, M=17)
    for fmt in FORMATS:
        screen = cpu_screen.fill(W, None, fmt)[1]
        screen[0].fill_(-1)  # NaN in bf16
        _, indices, _ = cpu_screen.encode_topk(x, W, b, 8, None, None, 0, screen, "exact")
        assert int(indices.max()) < 17, fmt


@pytest.mark.skipif(not FORMATS or _cpu.Format.bf16 not in FORMATS, reason="there is no bf16 product here")
@pytest.mark.parametrize("D", [1, 15, 16, 31, 32, 33, 100])
def test_a_bf16_copy_holds_the_nearest_numbers_and_what_was_lost(D):
    """Words, norms and residuals of any width; ties, denormals, infinity and NaN; a row of zeros has neither."""
    M = 40
    W, _, g = dictionary(M, D)
    W = W * 10.0 ** torch.randint(-6, 6, (M, 1), generator=g)
    W[1], W[2], W[3] = 0, -0.0, 1 + 2.0**-8  # halfway, so to the even neighbour
    W[4] = 1e-30  # whose square vanishes
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e-40, 3.4e38])
    W[5:10, D - 1] = odd
    words, tables, _, factors = cpu_screen.fill(W, None, _cpu.Format.bf16)[1]
    blocks = _cpu.blocks_of(M)
    latents = torch.arange(M)
    packed = words.view(blocks, -1, 16).transpose(1, 2)[latents % blocks, latents // blocks]
    narrow = packed.contiguous().view(torch.bfloat16)[:, :D] * factors[0].bfloat16()  # signs, where no x is given
    assert torch.equal(narrow.isnan(), W.isnan())
    assert torch.equal(narrow.nan_to_num(nan=7), W.bfloat16().nan_to_num(nan=7))
    _, norm, residual = tables[:, latents % blocks * 16 + latents // blocks].double()
    fits = torch.isfinite(W.double().square().sum(1).float())
    for got, rows in ((norm, W.double()), (residual, W.double() - narrow.double())):
        wanted = rows[fits].norm(dim=1)
        assert (got[fits] >= wanted).all()
        assert (got[fits] <= wanted * 1.002 + 2.0**-61 * D**0.5).all()
    assert not torch.isfinite(norm[~fits]).any()
    assert (norm[1:3] == 0).all()
    assert (residual[1:3] == 0).all()
    assert norm[4] > 0


def test_screened_precision_is_close_and_fp32_is_exact():
    x, W, b, k = gaussian(N=300, D=256, M=8192)
    exact = encode(x, W, b, k, _cpu.fastest_format(256))
    fp32 = encode(x, W, b, k, _cpu.fastest_format(256), "fp32")
    screened = encode(x, W, b, k, _cpu.fastest_format(256), "screened")
    assert torch.equal(fp32[0], exact[0])
    assert torch.equal(fp32[1], exact[1])
    hits = sum(len(set(p.tolist()) & set(q.tolist())) for p, q in zip(screened[1], exact[1], strict=True))
    assert hits / exact[1].numel() > 0.95


def test_a_screen_of_another_dictionary_is_refused():
    _, W, b, _ = gaussian(N=2)
    screen = ops.prepare_screen(W, b, backend="cpu")
    with pytest.raises(ValueError, match="another dictionary"):
        ops.encode_topk(torch.randn(3, 96), W[:100], b[:100], 4, screen=screen, backend="cpu")


def test_a_screen_of_another_type_never_reaches_cpp():
    """C++ counts elements: with the same number of smaller elements it would read and write past the end."""
    x, W, b, _ = gaussian(N=2)
    words, tables, code, factors = ops.prepare_screen(W, b, backend="cpu").tensors
    integers = torch.int32
    for bad in (
        [words.to(torch.int8), tables, code, factors],
        [words, tables.view(integers), code, factors],
        [words, tables, code, factors.view(integers)],
    ):
        with pytest.raises(TypeError, match=r"where C\+\+ expects torch"):
            torch.ops.fastsae.encode_topk(x, W, b, 4, None, None, 0, bad, "exact", "cpu")


@pytest.mark.skipif(not FORMATS or _cpu.Format.i8 not in FORMATS, reason="there is no 8-bit product here")
def test_tokens_that_8_bits_leave_open_get_a_tighter_copy() -> None:
    """A direction that sets a token's scale and that W ignores: more 8-bit bounds pass than the longest list holds."""
    x, W, b, k = ignored_direction(M=12288)
    for considered in (x, torch.cat([x, torch.full((1, 96), torch.nan)])):
        acts, indices, redone = encode(considered, W, b, k, _cpu.Format.i8)
        expected, places, few = encode(considered, W, b, k, _cpu.tight_format())
        assert redone > 64
        assert few < redone
        assert torch.equal(acts.nan_to_num(nan=7), expected.nan_to_num(nan=7))
        assert torch.equal(indices, places)


@pytest.mark.skipif(not FORMATS or _cpu.fastest_format(96) == _cpu.tight_format(), reason="one format serves all here")
def test_the_format_for_thresholds_is_judged_by_what_its_bounds_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b, _ = gaussian()
    made = []
    fill = cpu_screen.fill
    monkeypatch.setattr(
        cpu_screen, "fill", lambda W, rows, fmt, factors: made.append(fmt) or fill(W, rows, fmt, factors)
    )
    bars = {"latent": torch.full((W.shape[0],), 2.0), "token": torch.full((x.shape[0], 1), 2.0)}
    for threshold in bars.values():
        for share, formats in ((1.0, [_cpu.fastest_format(96)]), (0.0, [_cpu.fastest_format(96), _cpu.tight_format()])):
            made.clear()
            monkeypatch.setattr(cpu_screen, "CANDIDATES_WORTH", share)
            codes, overflow = ops.encode_above(x, W, b, threshold, x.shape[0] * W.shape[0], backend="cpu")
            assert made == formats
            assert not bool(overflow)
            assert int(codes.nnz) == int((x.double() @ W.double().T + b > 2.0).sum())


@pytest.mark.skipif(not FORMATS or _cpu.fastest_format(96) == _cpu.tight_format(), reason="one format serves all here")
def test_a_format_that_cannot_separate_the_latents_is_replaced():
    x, *_ = gaussian()
    loose, W, b, k = ignored_direction()
    assert ops.prepare_screen(W, b, x=x, k=k, backend="cpu").format == f"cpu/{_cpu.fastest_format(96).name}"
    assert ops.prepare_screen(W, b, x=loose, k=k, backend="cpu").format == f"cpu/{_cpu.tight_format().name}"

    sae = fastsae.SparseAutoencoder(96, 4096, fastsae.TopK(32), seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(W)
    step = fastsae.FusedTrainStep(sae, lr=0, backend="cpu")
    step(x)  # the screen is chosen on harmless input; then the input changes
    shares = [float(step(loose)["redone"]) / x.shape[0] for _ in range(12)]
    assert shares[0] > 0.01
    assert shares[-1] <= 0.01


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_rows_of_zeros_and_masked_latents_cost_nothing(fmt):
    """Padding tokens and latents that a bias of -inf switches off are certain: hardly any token is redone."""
    x, W, b, k = gaussian(N=64)
    x = x.clone()
    x[::2] = 0
    acts, _, redone = encode(x, W, b * 0, k, fmt)
    assert redone <= 1
    assert (acts[::2] == 0).all()
    masked = (b * 0).index_fill(0, torch.arange(0, 4096, 2), float("-inf"))
    acts, indices, redone = encode(x, W, masked, k, fmt)
    assert redone <= 1
    assert (indices[acts > 0] % 2 == 1).all()
    assert (acts[1::2] > 0).all()
    W = W.clone()
    W[6, 0] = float("nan")  # a mask does not hide a broken latent
    acts, indices, _ = encode(x, W, masked, k, fmt)
    assert (indices[acts.isnan()] == 6).all()
    assert (acts.isnan().sum(dim=1) == 1).all()


def test_many_active_latents_are_not_scored_in_full():
    """encode_above at 0: half of the dictionary is above, and the list of each token has room for it."""
    x, W, b, _ = gaussian(N=20)
    codes, overflow = ops.encode_above(x, W, b, 0.0, 20 * 4096, backend="cpu")
    assert not overflow
    assert int(codes.redone) == 0
    assert int(codes.nnz) > 20 * 1500


def test_sizes_that_once_went_wrong():
    g = torch.Generator().manual_seed(0)
    W, b = torch.randn(1 << 17, 1, generator=g), torch.zeros(1 << 17)
    x = torch.randn(2, 1, generator=g)
    codes = ops.encode_batch_topk(x, W, b, 40000, backend="cpu")  # lists longer than a panel's share of memory
    assert int(codes.nnz) == 80000
    codes, _ = ops.encode_above(x, W[:0], b[:0], 0.0, 4, backend="cpu")  # no latents at all
    assert int(codes.nnz) == 0


@pytest.fixture(scope="module")
def ragged_problem():
    """x, W, b, every latent's fp32 score, and which of them are the best of all: 5 a token on average."""
    W, b, g = dictionary(1100, 33)
    W[1::2], b[1::2] = W[::2].clone(), b[::2].clone()
    x = torch.randn(4200, 33, generator=g)
    acts, indices, _ = encode(x, W, b, 1100, _cpu.Format.f32)
    scores = torch.zeros(4200, 1100).scatter_add(1, indices.long(), acts)
    best = scores.flatten().sort(descending=True, stable=True).indices[: 4200 * 5]
    return x, W, b, scores, torch.zeros(4200 * 1100, dtype=torch.bool).index_fill(0, best, True).view(4200, 1100)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_ragged_encoders_return_the_bits_of_the_full_fp32_scores(fmt, ragged_problem):
    """More tokens than one batch of work, incomplete panels and groups of tiles, ties, and a token of NaN."""
    x, W, b, scores, chosen = ragged_problem
    x, scores = x.clone(), scores.clone()

    def check(codes, chosen):
        acts, indices, offsets = codes[:3]
        n, latents = chosen.nonzero(as_tuple=True)
        assert torch.equal(offsets, torch.nn.functional.pad(chosen.sum(1).cumsum(0), (1, 0)))
        assert torch.equal(indices[: len(n)], latents.int())
        assert torch.equal(acts[: len(n)], scores[n, latents])

    screen = cpu_screen.fill(W, None, fmt)[1]
    bars = torch.linspace(0.1, 3, 4200)[:, None]
    above = scores > bars
    check(cpu_screen.encode_above(x, W, b, bars, int(above.sum()), screen, "exact"), above)
    check(cpu_screen.encode_batch_topk(x, W, b, 5, screen, "exact"), chosen)

    x[7], scores[7] = float("nan"), float("nan")
    *codes, redone = cpu_screen.encode_above(x, W, b, bars, int(above.sum()) + 1100, screen, "exact")
    assert int(redone) == 1
    assert codes[0][codes[2][7] : codes[2][8]].isnan().sum() == 1100
