"""`pytest bench`: every op on its own, beside what torch would do, with pytest-benchmark.

`pytest bench --benchmark-only -k encode` narrows it down; `--benchmark-json FILE` keeps the numbers. The results that
docs/benchmarks.md shows come from `python -m bench`, which takes turns and checks; this is for working on one op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastsae
from bench import cases, real
from bench.cases import Case, Inputs
from fastsae import SparseCodes, UpdateTerm, ops

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install pytest-benchmark")

Workload = tuple[Case, Inputs, SparseCodes, Tensor]


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="module", params=["random", "zipf", "hot"])
def workload(request: pytest.FixtureRequest) -> Workload:
    """A case, its inputs, their code and the gradient of the reconstruction."""
    case = cases.BY_NAME[request.param]
    inputs = cases.build(case, real.rows, real.trained)
    codes = ops.encode_topk(inputs.x, inputs.W_enc, inputs.b_enc, case.K)
    return case, inputs, codes, (ops.decode(codes, inputs.W_dec) - inputs.x) * (2 / case.N)


def fastest_backend() -> str:
    return next(name for name, about in fastsae.backends().items() if about["available"])


def compare(benchmark: Any, op: str, case: Case, who: str, call: Callable[[], object]) -> None:
    """Times one call in the group of its op and case."""
    benchmark.group = f"{op} {case.name}"
    benchmark.name = who
    benchmark.extra_info.update(N=case.N, D=case.D, M=case.M, K=case.K, backend=fastest_backend())
    benchmark.pedantic(call, rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("who", ["fastsae", "torch"])
def test_encode_topk(benchmark: Any, workload: Workload, who: str) -> None:
    case, inputs, codes, _ = workload
    screen = ops.prepare_screen(inputs.W_enc, inputs.b_enc)
    call = {
        "fastsae": lambda: ops.encode_topk(inputs.x, inputs.W_enc, inputs.b_enc, case.K, screen=screen),
        "torch": lambda: torch.relu(F.linear(inputs.x, inputs.W_enc, inputs.b_enc)).topk(case.K, dim=-1),
    }[who]
    compare(benchmark, "encode_topk", case, who, call)
    assert codes.k == case.K


@pytest.mark.parametrize("who", ["fastsae", "torch"])
def test_decode(benchmark: Any, workload: Workload, who: str) -> None:
    case, inputs, codes, _ = workload
    indices, acts = codes.indices.long(), codes.acts
    call = {
        "fastsae": lambda: ops.decode(codes, inputs.W_dec),
        "torch": lambda: F.embedding_bag(indices, inputs.W_dec, per_sample_weights=acts, mode="sum"),
    }[who]
    compare(benchmark, "decode", case, who, call)
    torch.testing.assert_close(ops.decode(codes, inputs.W_dec)[:8], codes[:8].to_dense() @ inputs.W_dec)


def test_active_dot(benchmark: Any, workload: Workload) -> None:
    case, inputs, codes, grad = workload
    compare(benchmark, "active_dot", case, "fastsae", lambda: ops.active_dot(grad, codes, inputs.W_dec))


def test_by_latent(benchmark: Any, workload: Workload) -> None:
    case, _, codes, _ = workload
    compare(benchmark, "by_latent", case, "fastsae", lambda: ops.by_latent(codes))


@pytest.mark.parametrize("who", ["fastsae", "torch"])
def test_active_outer(benchmark: Any, workload: Workload, who: str) -> None:
    case, _, codes, grad = workload
    order = ops.by_latent(codes)
    crow = torch.arange(case.N + 1) * case.K
    by_token = torch.sparse_csr_tensor(crow, codes.indices.flatten().long(), codes.acts.flatten(), (case.N, case.M))
    call = {
        "fastsae": lambda: ops.active_outer(codes, grad, case.M, by_latent=order),
        "torch": lambda: by_token.t() @ grad,
    }[who]
    compare(benchmark, "active_outer", case, who, call)


def test_update_latents(benchmark: Any, workload: Workload) -> None:
    case, inputs, codes, grad = workload
    W_enc, W_dec, b_enc, b_dec = (t.clone() for t in (inputs.W_enc, inputs.W_dec, inputs.b_enc, inputs.b_dec))
    moments = [torch.zeros_like(t) for t in (W_enc, W_dec, b_enc, b_dec) for _ in range(2)]
    screen = ops.prepare_screen(W_enc, b_enc)
    terms = [UpdateTerm(codes, inputs.x, grad, has_bias=True)]

    def update() -> None:
        ops.update_latents_(
            W_enc, W_dec, b_enc, b_dec, moments, terms, lr=torch.tensor(1e-6, dtype=torch.float64),
            step=torch.tensor(1), betas=(0.9, 0.999), eps=1e-8, unit_norm=True, pre_bias=True, screen=screen,
        )  # fmt: skip

    compare(benchmark, "update_latents_", case, "fastsae", update)
