"""The AMX screening pass, on its software twin: the same loop, with the tile unit in C++. Results never depend on the
screen, so each is compared with fp32 screening bit by bit; what it lets in is compared with the other bf16 kernel's.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import fastsae

if fastsae.backends()["cpu"]["available"]:
    from fastsae import _cpu
    from fastsae.backends.cpu import screen as cpu_screen

    HERE = _cpu.format_supported(_cpu.Format.amx_emulated)
else:
    HERE = False

pytestmark = pytest.mark.skipif(not HERE, reason="the twin is compiled for AVX-512, which is missing here")

INF, NAN = float("inf"), float("nan")
# Numbers of an input: below and past a tile (32), a part (256) and two; even and uneven parts; powers of two.
WIDTHS = [0, 1, 31, 33, 255, 257, 512, 576, 1000, 1024, 4096]


def problem(N: int, D: int, M: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(M, D, generator=g) / max(1, D) ** 0.5
    return torch.randn(N, D, generator=g), W, torch.randn(M, generator=g) * 0.1


def copy_of(W: Tensor, fmt: "_cpu.Format") -> list[Tensor]:
    return cpu_screen.fill(W, None, fmt)[1]


def encode(
    x: Tensor, W: Tensor, b: Tensor, k: int, fmt: "_cpu.Format", scale: Tensor | None = None, precision: str = "exact"
) -> tuple[Tensor, Tensor, Tensor]:
    return cpu_screen.encode_topk(x, W, b, k, None, scale, 0, copy_of(W, fmt), precision)


def check(x: Tensor, W: Tensor, b: Tensor, k: int, scale: Tensor | None = None) -> None:
    wanted, places, _ = encode(x, W, b, k, _cpu.Format.f32, scale)
    acts, indices, _ = encode(x, W, b, k, _cpu.Format.amx_emulated, scale)
    assert torch.equal(acts.nan_to_num(nan=-7), wanted.nan_to_num(nan=-7))
    assert torch.equal(indices, places)


def counts(x: Tensor, W: Tensor, b: Tensor, k: int, fmt: "_cpu.Format", scale: Tensor | None = None) -> tuple[int, int]:
    """Tokens without a certificate at first, latents scored beyond the k best."""
    args = cpu_screen.arguments(x, W, b, k, None, scale, 0, copy_of(W, fmt), "exact")
    return _cpu.encode_topk(args, *cpu_screen._fixed(x.shape[0], k)[1])


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("D", WIDTHS)
def test_any_width(D: int) -> None:
    """And tokens and latents that fill no last tile: 77 tokens, a panel of 64 and one of 13; 2117 latents."""
    check(*problem(77, D, 2117), 16)


@pytest.mark.parametrize("N", [13, 16, 17, 32, 33, 64, 97, 700])
@pytest.mark.parametrize("M", [1, 31, 33, 2048])
def test_any_number_of_tokens_and_latents(N: int, M: int, threads: int) -> None:
    check(*problem(N, 300, M), min(8, M))


@pytest.mark.parametrize("D", [96, 600])
def test_it_lets_in_no_more_than_the_bounds_do(D: int) -> None:
    """One compare with the tile's bar goes before each bound, and never in its place."""
    x, W, b = problem(500, D, 4096)
    W = W * torch.rand(4096, 1).exp()
    scale = torch.rand(4096) + 0.5
    for gain in (None, scale, scale.masked_fill(torch.arange(4096) % 64 == 0, 1.0)):
        plain, ours = counts(x, W, b, 32, _cpu.Format.bf16, gain), counts(x, W, b, 32, _cpu.Format.amx_emulated, gain)
        assert ours[0] <= plain[0] + 2
        assert abs(ours[1] - plain[1]) <= 0.02 * plain[1] + 10


def test_scaled_latents(threads: int) -> None:
    """Tiles whose latents are scaled start from 0: by any number, by none, by 0, in one tile of many."""
    x, W, b = problem(100, 300, 2200)
    g = torch.Generator().manual_seed(1)
    scales = {
        "positive": torch.rand(2200, generator=g) + 0.5,
        "either sign": torch.randn(2200, generator=g),
        "some 0": torch.where(torch.rand(2200, generator=g) < 0.3, 0.0, 1.0),
        "far apart": 10 ** (6 * torch.randn(2200, generator=g)).clamp(-15, 15),
        "one": torch.ones(2200).index_fill(0, torch.tensor([70]), 3.0),
    }
    for scale in scales.values():
        check(x, W, b, 16, scale)


def test_hot_blocks(threads: int) -> None:
    """Neighbours, in the dictionary and in its packed order, that win for every token; and sorted ones."""
    x, W, b = problem(90, 300, 4096)
    check(x, W, b.index_add(0, torch.arange(1000, 1020), torch.full((20,), 50.0)), 32)
    blocks = _cpu.blocks_of(4096)
    packed = torch.arange(16) * blocks + 40
    check(x, W, b.index_add(0, packed, torch.full((16,), 50.0)), 32)
    check(x, W * torch.linspace(6, 0.01, 4096)[:, None], b, 32)
    check(x, W * torch.linspace(0.01, 6, 4096)[:, None], b, 32)


def test_ties(threads: int) -> None:
    x, W, b = problem(40, 300, 4096)
    W[500:3500], b[500:3500] = W[7].clone(), b[7].clone()
    check(torch.cat([x, W[7:8] * 10]), W, b, 32)
    check(x * 0, W, b.abs().round(decimals=1), 32)
    check(x, W * 0, b * 0 + 1, 32)


def test_extreme_tokens_and_latents() -> None:
    x, W, b = problem(150, 300, 2200)
    x = x * torch.tensor([0, 1e-30, 1e-20, 1, 1e4, 1e18, 1e30]).repeat(30)[:150, None]
    x[:, [5, 50]] *= 100
    check(x, W, b, 16)
    check(x, W * torch.tensor([1e-30, 1, 1e4, 1e18]).repeat(550)[:, None], b, 16)
    check(x, W, b * 10.0 ** torch.arange(-40, 40).repeat(28)[:2200], 16)


def test_tokens_and_latents_that_are_no_numbers(threads: int) -> None:
    """In one token or latent of a tile of 32; none of its neighbours changes."""
    x, W, b = problem(150, 300, 2200)
    for value in (NAN, INF, -INF):
        broken = x.clone()
        broken[3, 7], broken[50] = value, value
        check(broken, W, b, 16)
        latents = W.clone()
        latents[33, 4], latents[1500] = value, value
        check(x, latents, b, 16)
        check(broken, latents, b, 16)
        check(x, W, b.index_fill(0, torch.tensor([0, 900]), value), 16)
    masked = b.index_fill(0, torch.arange(0, 2200, 2), -INF)
    check(x, W, masked, 16)
    assert counts(x, W, masked, 16, _cpu.Format.amx_emulated)[0] <= 1


def test_a_bias_takes_part_in_the_roundings_of_its_sum() -> None:
    """Numbers that are exact in bf16, so that nothing else widens the bounds. Beside 2²⁰ each product of a tile, .0586,
    rounds away: summed so, latent 0 scores less than latent 1, whose product comes at once.
    """
    D, M = 768, 64
    x, W, b = torch.ones(20, D), torch.zeros(M, D), torch.full((M,), 2.0**20)
    W[0], W[1, 0] = 15 * 2.0**-13, 1.0
    acts, indices, _ = encode(x, W, b, 1, _cpu.Format.amx_emulated)
    assert (indices == 0).all()
    assert (acts == 2.0**20 + 1.375).all()
    check(x, W, b, 3)


@pytest.mark.parametrize("rounded", ["tokens", "latents"])
def test_what_rounding_hides_is_found(rounded: str) -> None:
    """All numbers of a row lose nearly half a step, in one direction: the error is as large as its bound."""
    D, hidden = 768, 1 + 0.99 * 2.0**-9
    x, W = torch.zeros(40, D), torch.zeros(70, D)
    x[[3, 35]], W[[18, 69]] = hidden if rounded == "tokens" else 1.0, hidden if rounded == "latents" else 1.0
    bars = torch.full((40, 1), D + 1.2)  # the scores are D + 1.48, and D in bf16
    screen = copy_of(W, _cpu.Format.amx_emulated)
    _, indices, offsets, _, _ = cpu_screen.encode_above(x, W, torch.zeros(70), bars, 100, screen, "exact")
    assert int(offsets[-1]) == 4
    assert indices[:4].tolist() == [18, 69, 18, 69]  # one in the first block of its tile, one in the second


def test_a_denormal_bias_counts() -> None:
    """The tile unit takes it for 0, and a token of zeros adds nothing to it."""
    x, W, b = torch.zeros(20, 64), torch.zeros(64, 64), torch.full((64,), -1.0)
    b[[3, 40]] = 2e-42
    acts, indices, _ = encode(x, W, b, 2, _cpu.Format.amx_emulated)
    assert torch.equal(indices, torch.tensor([[3, 40]], dtype=torch.int32).expand(20, 2))
    assert (acts > 0).all()


@pytest.mark.parametrize("D", [33, 600])
def test_thresholds(D: int, threads: int) -> None:
    """Any number may be one: where every bar, or every bound, is infinite, and where they are no numbers."""
    x, W, b = problem(310, D, 2117)
    x[5, 0], W[9, 0] = NAN, INF
    token = torch.linspace(-1, 4, 310)[:, None]
    token[[7, 70]], token[[8, 80]], token[[9, 90]] = INF, -INF, NAN
    latent = torch.linspace(-1, 4, 2117)
    latent[[7, 70]], latent[[8, 80]], latent[[10, 90]] = INF, -INF, NAN
    for threshold in (token, latent):
        results = [
            cpu_screen.encode_above(x, W, b, threshold, 310 * 2117, copy_of(W, fmt), "exact")
            for fmt in (_cpu.Format.f32, _cpu.Format.amx_emulated)
        ]
        size = int(results[0][2][-1])
        for wanted, got in zip(results[0][:3], results[1][:3], strict=True):
            n = min(wanted.numel(), size if wanted.numel() != 311 else 311)
            assert torch.equal(got[:n].nan_to_num(nan=-7), wanted[:n].nan_to_num(nan=-7))


def test_batch_topk(threads: int) -> None:
    x, W, b = problem(1500, 100, 2117)
    wanted = cpu_screen.encode_batch_topk(x, W, b, 8, copy_of(W, _cpu.Format.f32), "exact")
    got = cpu_screen.encode_batch_topk(x, W, b, 8, copy_of(W, _cpu.Format.amx_emulated), "exact")
    for w, g in zip(wanted[:3], got[:3], strict=True):
        assert torch.equal(w, g)


def test_screened_precision_is_close() -> None:
    x, W, b = problem(200, 300, 4096)
    exact = encode(x, W, b, 32, _cpu.Format.amx_emulated)[1]
    screened = encode(x, W, b, 32, _cpu.Format.amx_emulated, precision="screened")[1]
    hits = sum(len(set(p) & set(q)) for p, q in zip(screened.tolist(), exact.tolist(), strict=True))
    assert hits / exact.numel() > 0.98


def test_many_k() -> None:
    """Lists that are pruned while the tile's bars are older than the token's."""
    x, W, b = problem(60, 200, 3000)
    check(x, W, b, 700)
    check(x, W, b, 3000)
