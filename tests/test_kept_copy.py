"""A narrow copy that a GPU backend kept, for weights that were written behind its back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastsae import ops
from tests import truth

BACKENDS = [name for name in ("cuda", "triton") if name in truth.BACKENDS]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not BACKENDS, reason="no backend for GPUs here"),
]
N, D, M, K = 6, 24, 600, 4  # two rows of W for each that is compared


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(M, D, generator=g)
    W[4] *= 1e20
    W[6] *= 1e-30
    W[8] = 0
    x = torch.randn(N, D, generator=g).abs()
    W[4] = -W[4].abs()
    return x.to(dtype), W.to(dtype), torch.zeros(M, dtype=dtype)


def _mirrored(W: Tensor) -> None:
    W.data.mul_(-1)


def _one_row(W: Tensor) -> None:
    W.data[10] += 3.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("write", [_mirrored, _one_row])
def test_a_write_through_data_is_noticed(write: Callable[[Tensor], None], dtype: torch.dtype, backend: str) -> None:
    x, W, b = _inputs(dtype)
    screen = ops.prepare_screen(W, b, backend=backend)
    fresh = ops.encode_topk(x, W, b, K, screen=screen, backend=backend)
    assert int(fresh.redone) == 0, "the copy is right, and was not trusted"
    write(W)
    codes = ops.encode_topk(x, W, b, K, screen=screen, backend=backend).check()
    assert int(codes.redone) == N
    pre, magnitude = truth.scores(x, W, b)
    truth.assert_top_k(codes, pre, magnitude, K, exact=False)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_is_no_sign(backend: str) -> None:
    x, W, b = _inputs(torch.float32)
    W[20], W[30, 3] = float("nan"), float("inf")
    screen = ops.prepare_screen(W, b, backend=backend)
    with_copy = ops.encode_topk(x, W, b, K, screen=screen, backend=backend)
    without = ops.encode_topk(x, W, b, K, backend=backend)
    assert int(with_copy.redone) == int(without.redone)
    assert torch.equal(with_copy.indices, without.indices)
