"""A handful of tokens and latents, and the arguments of every op over them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import SparseCodes, UpdateTerm, ops
from tests import truth

N, D, M, K = 6, 8, 16, 4
raw = torch.ops.fastsae
every_backend = pytest.mark.parametrize("backend", truth.BACKENDS)


def inputs(dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    made = (torch.randn(*shape, generator=g).to(dtype) for shape in ((N, D), (M, D), (M,)))
    x, W, b = (t.requires_grad_(grad) for t in made)
    return x, W, b


def both_codes() -> list[SparseCodes]:
    x, W, b = inputs()
    return [ops.encode_topk(x, W, b, K), ops.encode_above(x, W, b, 1.0, N * M)[0]]


def update_arguments() -> dict[str, Any]:
    x, W, b = inputs()
    W_dec, b_dec = W / W.norm(dim=1, keepdim=True), torch.zeros(D)
    moments = [torch.zeros_like(p) for p in (W, W, W_dec, W_dec, b, b, b_dec, b_dec)]
    terms = [UpdateTerm(ops.encode_topk(x, W, b, K), x, torch.ones_like(x))]
    lr, step = torch.tensor(1e-3, dtype=torch.float64), torch.tensor(1)
    return {
        **{"W_enc": W, "W_dec": W_dec, "b_enc": b, "b_dec": b_dec, "moments": moments, "terms": terms},
        **{"lr": lr, "step": step},
    }


def encode(**changes: Any) -> SparseCodes:
    x, W, b = inputs()
    return ops.encode_topk(**{"x": x, "W": W, "b": b, "k": K, **changes})
