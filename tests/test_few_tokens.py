"""A few tokens are encoded by scoring every latent in fp32, without a narrow copy: with the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import ops
from tests import truth

pytestmark = pytest.mark.skipif(
    not fastsae.backends()["cpu"]["available"], reason="the C++ extension is not built: the cpu backend is missing"
)
SIZES = [(0, 8, 64), (1, 33, 1000), (5, 130, 2100), (7, 16, 65), (3, 4, 1), (300, 24, 500)]


def problem(N: int, D: int, M: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(N + D + M)
    x, W, b = (torch.randn(size, generator=g, dtype=torch.float32) for size in ((N, D), (M, D), (M,)))
    W[M // 2], b[M // 2] = W[0], b[0]  # a tie
    b[M // 3] = -torch.inf  # masked
    if N > 2:
        x[2, 0] = torch.nan
        x[1] = x[0]
    return x.to(dtype), W.to(dtype), (0.1 * b).to(dtype)


def results(x: Tensor, W: Tensor, b: Tensor) -> list[Tensor]:
    """What every encoder finds, all settings that reach C++ among them."""
    (N, _), M, wide = x.shape, W.shape[0], torch.float32
    screen = ops.prepare_screen(W, b, backend="cpu")
    rows = torch.arange(0, M, 2, dtype=torch.int32)
    found: list[Any] = []
    for k in {1, min(8, M)}:
        found.append(ops.encode_topk(x, W, b, k, backend="cpu"))
        found.append(ops.encode_topk(x, W, b, k, screen=screen, backend="cpu"))
        found.append(ops.encode_topk(x, W, b, min(k, len(rows)), rows=rows, backend="cpu"))
        found.append(ops.encode_topk(x, W, b, k, scale=W[:, 0].abs(), index_offset=9, backend="cpu"))
        found.append(ops.encode_batch_topk(x, W, b, k, backend="cpu"))
    bars = (torch.tensor(0.5, dtype=wide), b.to(wide).abs() + 0.3, torch.full((N, 1), 0.4, dtype=wide))
    found.extend(ops.encode_above(x, W, b, bar, capacity, backend="cpu")[0] for bar in bars for capacity in (N * M, 40))
    return [t for codes in found for t in (codes.acts, codes.indices, codes.offsets) if t is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("N", "D", "M"), SIZES)
def test_the_same_bits_with_a_narrow_copy_and_without(
    N: int, D: int, M: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsae.backends.cpu import screen

    given, found = problem(N, D, M, dtype), []
    for few in (0, N):
        monkeypatch.setattr(screen, "FEW", few)
        monkeypatch.setattr(screen, "FEW_KEPT", few)
        found.append(results(*given))
    for with_copy, without in zip(*found, strict=True):
        torch.testing.assert_close(without, with_copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_best_in_float64_are_found(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae.backends.cpu import screen

    monkeypatch.setattr(screen, "FEW", 128)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(size, generator=g) for size in ((9, 48), (777, 48), (777,)))
    codes = ops.encode_topk(x, W, b, 20, backend="cpu")
    pre, magnitude = truth.scores(x, W, b)
    truth.assert_top_k(codes, pre, magnitude, 20, exact=False)
    assert int(codes.redone) == 0


def test_no_copy_is_made_for_a_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastsae.backends.cpu import screen

    monkeypatch.setattr(screen, "fill", lambda *_: pytest.fail("a narrow copy was made"))
    monkeypatch.setattr(screen, "FEW", 4)
    W, b = torch.randn(64, 8), torch.zeros(64)
    for precision in ("exact", "screened", "fp32"):
        ops.encode_topk(W[:4], W, b, 3, precision=precision, backend="cpu")
    with pytest.raises(pytest.fail.Exception, match="a narrow copy was made"):
        ops.encode_topk(W[:5], W, b, 3, backend="cpu")
