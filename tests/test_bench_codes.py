"""bench.gpu: ops on codes of every layout, torch.sparse beside them, and the host's cost of a call."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.cases import Case
from bench.gpu import (
    faults,
    layouts,
    plan,
    spot,
)
from bench.gpu.child import outcome
from bench.gpu.op_times import CodeTimes, build
from bench.gpu.overhead import Overhead
from bench.gpu.plan import Job
from bench.gpu.sparse import SparseTimes
from fastsae import ops
from tests.bench_case import TOY


@pytest.mark.parametrize("op", ["decode", "decode_error", "active_dot", "active_outer", "by_latent"])
@pytest.mark.parametrize("layout", plan.LAYOUTS)
def test_the_checks_of_every_layout_notice_a_wrong_op(op: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = CodeTimes(Job("codes-small-cpu", "codes", plan.CODES, "small", "cpu"), TOY)
    assert times(f"{op} {layout}")["time"]["runs"] >= 3
    monkeypatch.setattr(ops, op, getattr(ops, op))
    faults.plant(f"{op}:wrong")
    with pytest.raises(AssertionError):
        times(f"{op} {layout}")


@pytest.mark.parametrize("item", plan.SPARSE_CODES)
def test_the_checks_of_torch_sparse_notice_a_wrong_product(item: str, monkeypatch: pytest.MonkeyPatch) -> None:
    times = SparseTimes(Job("codes-small-cusparse", "sparse", plan.SPARSE_CODES, "small"), TOY)
    assert times(item)["worst_of_bound"] <= 1
    name = "sampled_addmm" if item.startswith("active_dot") else "mm"
    right = getattr(torch.sparse, name)
    monkeypatch.setattr(torch.sparse, name, lambda *args, **more: 1.01 * right(*args, **more))
    with pytest.raises(AssertionError, match="off by"):
        times(item)


def test_torch_sparse_says_where_it_has_no_sampled_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **more: Any) -> None:
        raise RuntimeError("sampled_addmm: computation on CPU is not implemented")

    times = SparseTimes(Job("codes-small-cusparse", "sparse", plan.SPARSE_CODES, "small"), TOY)
    monkeypatch.setattr(torch.sparse, "sampled_addmm", refuse)
    result, alive = outcome(lambda: times("active_dot fixed"), "cpu")
    assert (result["status"], alive) == ("missing", True)
    assert "not there for this device" in result["error"]


def test_layouts_are_what_they_say() -> None:
    case = Case("some", N=250, D=8, M=4000, K=6)
    codes = {layout: layouts.make(layout, case, "cpu").check() for layout in plan.LAYOUTS}
    assert {int(code.nnz) for code in codes.values()} == {case.N * case.K}
    assert [codes[layout].is_ragged for layout in ("fixed", "ragged", "heavy", "hot")] == [False, True, True, False]
    l0 = codes["heavy"].l0
    heavy = torch.arange(0, case.N, 100)
    others = torch.ones(case.N, dtype=torch.bool).index_fill(0, heavy, False)
    assert l0[heavy].double() / l0[others].double().mean() == pytest.approx(100, rel=0.02)
    assert (codes["hot"].indices == 0).any(-1).all()
    assert codes["fixed"].indices.unique().numel() > 1000
    with pytest.raises(ValueError, match="does not fit into 250"):
        layouts.make("heavy", replace(case, M=250), "cpu")


def test_overhead_is_measured_for_every_call() -> None:
    for backend, calls in (("cpu", plan.CALLS), (None, plan.TORCH_CALLS)):
        times = Overhead(Job("overhead", "overhead", calls, backend=backend), TOY)
        for item in calls:
            host = times(item)["host"]
            assert 0 < host["p20"] <= host["ms"] <= host["p80"]
            assert host["runs"] >= 16


def test_spots_hold_first_last_and_most_used() -> None:
    assert spot.some(10, 3, torch.device("cpu")).tolist() == [0, 4, 9]
    inputs = build(replace(Case("hot"), N=40, D=8, M=300, K=4, distribution="hot"), "cpu")
    codes = ops.encode_topk(inputs.x, inputs.W_enc, inputs.b_enc, 4)
    latents = spot.latents_of(codes)
    assert 100 in latents.tolist()
    for layout in (codes, layouts.make("ragged", Case("c", N=40, D=8, M=300, K=4), "cpu")):
        assert torch.equal(spot.columns(layout, latents), layout.to_dense().double()[:, latents])
        truth, size = spot.decoded(layout, inputs.W_dec)
        A, W = layout.to_dense().double(), inputs.W_dec.double()
        torch.testing.assert_close(truth, A @ W)
        torch.testing.assert_close(size, A.abs() @ W.abs())
