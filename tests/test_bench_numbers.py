"""bench.gpu: costs, targets, the order of the plan, result files and the reports made from them."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine
from bench.gpu import (
    cost,
    plan,
    report,
    sections,
    targets,
)
from bench.gpu.child import finite
from bench.gpu.clock import PartWatch, extra_peak_bytes, measure
from bench.gpu.plan import Job, Settings
from bench.gpu.store import Store
from tests.bench_case import MACHINE, TOY


def test_costs_are_the_arithmetic_of_the_docstring() -> None:
    case = plan.BIG
    encode, step, dense = (cost.of(name, case) for name in ("encode_topk", "fastsae graph", "dense bf16 compiled"))
    assert encode is not None
    assert step is not None
    assert dense is not None
    assert encode.flops == pytest.approx(8.80e12, rel=1e-3)
    assert dense.flops == 5 * encode.flops
    gather = case.N * case.K * case.D * 4
    assert 4 * gather + case.M * case.D * 50 < step.bytes < 1.15 * (4 * gather + case.M * case.D * 52)
    assert cost.of("sparsify", case) is None
    ceilings = cost.Ceilings.of({"copy": {"rate": 4.3e12}, "bf16 8192": {"rate": 790e12}, "fp32 8192": {"status": "x"}})
    found = cost.figures("encode_topk", case, 22.2, ceilings)
    assert found["floor_ms"] == pytest.approx(11.1, rel=0.01)
    assert found["share_of_floor"] == pytest.approx(0.5, rel=0.01)
    assert found["tokens_per_s"] == pytest.approx(8192 / 0.0222)
    assert cost.figures("decode", case, 1.0, cost.Ceilings(0, 0, 0))["floor_ms"] is None


def timed(ms: float) -> dict[str, Any]:
    return {"status": "ok", "step": {"ms": ms, "p20": ms, "p80": ms, "runs": 3}}


def test_targets_are_reached_or_missed_by_the_results() -> None:
    def job(**items: dict[str, Any]) -> dict[str, Any]:
        return {"items": {name.replace("_", " "): item for name, item in items.items()}}

    results = {
        "steps-big-cuda": job(fastsae=timed(30) | {"extra_peak_bytes": 9, "memory_bound_bytes": 8},
                              fastsae_graph=timed(26)),
        "steps-big-triton": job(fastsae=timed(31) | {"extra_peak_bytes": 7, "memory_bound_bytes": 8}),
        "steps-big": job(dense_bf16_compiled=timed(80), sparsify={"status": "missing", "error": "none"}),
        "steps-small-cuda": job(fastsae=timed(2.7)),
        "steps-small-triton": job(fastsae=timed(1.7)),
        "steps-zipf-cuda": job(fastsae=timed(1.9)),
        "steps-hot-cuda": job(fastsae_graph=timed(3.4)),
    }  # fmt: skip
    verdicts = {target.what: target.verdict for target in targets.targets(results)}
    values = {target.what: target.value for target in targets.targets(results)}
    assert values["whole exact step, small case"] == "1.7 ms (fastsae, triton)"
    assert values["whole exact step, big case"] == "26 ms (fastsae graph, cuda)"
    assert verdicts["whole exact step, big case"] == "reached"
    assert verdicts["against dense bf16 compiled, big case"] == "missed"
    assert verdicts["against sparsify, big case"] == "not measured"
    assert verdicts["whole exact step, small case"] == "reached"
    assert verdicts["zipf use of latents against uniform use"] == "reached"
    assert verdicts["hot use of latents against uniform use"] == "missed"
    assert verdicts["peak extra memory of a step, big case"] == "missed"
    assert set(verdicts.values()) == {"reached", "missed", "not measured"}


def test_the_plan_starts_with_the_most_wanted_jobs() -> None:
    jobs = plan.jobs(Settings())
    names = [job.name for job in jobs]
    order = ["quick-check-cuda", "quick-check-triton", "ceilings", "steps-small-cuda", "steps-small-triton",
             "steps-small", "ops-small-cuda", "ops-small-triton", "steps-big-cuda", "steps-big", "ops-big-triton",
             "overhead-cuda", "overhead-torch", "codes-big-cuda", "codes-big-cusparse", "steps-zipf-cuda",
             "steps-hot-triton", "check-cuda", "check-triton", "sanitizer-cuda", "sweep-cuda", "sweep-triton",
             "check-reference"]  # fmt: skip
    assert [name for name in names if name in order] == order
    assert len(set(names)) == len(names)
    cases = Settings().cases
    assert (cases["big"].N, cases["big"].D, cases["big"].M, cases["big"].K) == (8192, 4096, 131072, 64)
    for axis, ends in (("N", (1024, 16384)), ("D", (384, 4096)), ("M", (6144, 98304)), ("K", (8, 512))):
        sizes = [getattr(case, axis) for name, case in cases.items() if name.startswith("sweep-")]
        assert (min(sizes), max(sizes)) == ends
    for op in plan.OPS:
        timed = [job.backend for job in jobs if job.name.startswith("ops-big-") and op in job.items]
        assert timed == ["cuda", "triton"]
    (only,) = plan.chosen(jobs, ["steps-big-cuda"], ["fastsae"])
    assert only.items == ("fastsae",)


def test_results_of_another_run_are_not_taken_for_this_one(tmp_path: Path) -> None:
    job = Job("ops-small", "ops", ("decode",), "small", "cpu")
    store = Store(tmp_path, MACHINE)
    store.put(job, "decode", {"status": "ok"}, TOY.cases["small"])
    assert Store(tmp_path, MACHINE | {"commit": "other", "date": "later"}).items(job) == {"decode": {"status": "ok"}}
    assert Store(tmp_path, MACHINE | {"source": "1" * 12}).items(job) == {}
    assert store.items(replace(job, backend="triton")) == {}
    assert store.items(replace(job, limit=1.0)) != {}
    store.path(job.name).write_text("{")
    assert store.items(job) == store.everything() == {}
    with pytest.raises(FileNotFoundError, match="no run has written results there"):
        Store.found(tmp_path / "elsewhere")


def test_values_that_json_cannot_hold_become_null() -> None:
    value = {"a": [float("nan"), float("inf"), 1.0], 2: ("x", None)}
    assert json.loads(json.dumps(finite(value), allow_nan=False)) == {"a": [None, None, 1.0], "2": ["x", None]}


def test_a_summary_of_nothing_and_of_failures() -> None:
    text = sections.summary({}, MACHINE | {"device": "d"}, [], [])
    assert "Not reached." in text
    content = {"job": {}, "case": None, "items": {"decode": {"status": "died", "error": "a | b\nsecond line"}}}
    flat = report.rows({"check-triton": content}, MACHINE)
    assert "- check-triton decode: died: a \\| b\n" in sections.summary({"check-triton": content}, MACHINE, flat, [])
    assert report.as_csv(flat).splitlines()[1].startswith("check-triton,decode,,,died")


def test_the_clock_on_a_cpu() -> None:
    sample = measure(lambda: time.sleep(0.002), "cpu", 0.01, least=4)
    assert sample.n >= 4
    assert 0.002 <= sample.p20 <= sample.median <= sample.p80
    watch = PartWatch("cpu")
    for _ in range(2):
        watch.start()
        watch.mark("first")
        watch.mark("second")
    assert {name: sample.n for name, sample in watch.samples().items()} == {"first": 2, "second": 2}
    assert extra_peak_bytes(lambda x: x, torch.zeros(1)) is None


def test_a_machine_without_git_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.describe()["commit"] == ""
