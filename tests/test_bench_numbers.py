"""bench.gpu: costs, targets, the order of the plan, which results hold, and the summary made from them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import machine
from bench.gpu import cost, plan, report, store
from bench.gpu.child import finite
from bench.gpu.clock import extra_peak_bytes, measure
from bench.gpu.plan import Job, Settings
from bench.gpu.store import Store
from tests.bench_case import MACHINE


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


def entry(job: str, item: str, ms: float | None, **more: Any) -> dict[str, Any]:
    times = {} if ms is None else {"step": {"ms": ms, "p20": ms, "p80": ms, "runs": 3}}
    return {"job": job, "item": item, "backend": None, "case": None, "commit": "abc",
            "result": {"status": "ok"} | times | more}  # fmt: skip


def test_targets_are_reached_or_missed_by_the_results() -> None:
    entries = [
        entry("steps-big-cuda", "fastsae", 30, redone_share=0.001), entry("steps-big-cuda", "fastsae graph", 26),
        entry("dense-big", "dense bf16 compiled", 80), entry("peers-big", "sparsify", None, status="missing"),
        entry("steps-small-cuda", "fastsae", 2.7), entry("steps-small-triton", "fastsae", 1.7, redone_share=0.0),
        entry("steps-zipf-cuda", "fastsae", 1.9), entry("steps-hot-cuda", "fastsae graph", 3.4),
    ]  # fmt: skip
    found = {what: (value, verdict) for what, _, value, verdict in report.targets(report.rows(entries))}
    assert found["whole exact step, small case"] == ("1.7 ms", "reached")
    assert found["whole exact step, big case"] == ("26 ms", "reached")
    assert found["against dense bf16 compiled, big case"] == ("3.08×", "missed")
    assert found["against sparsify, big case"] == ("-", "not measured")
    assert found["zipf against uniform use"][1] == "reached"
    assert found["hot against uniform use"][1] == "missed"
    assert found["tokens selected again, small case"] == ("0.000%", "reached")
    assert found["tokens selected again, big case"] == ("0.100%", "missed")
    assert found["encode from K = 32 to 256"][1] == "not measured"


def test_the_plan_starts_with_the_most_wanted_jobs() -> None:
    names = [job.name for job in plan.jobs(Settings())]
    assert names == [
        "check-cuda", "ceilings", "profile-small-cuda", "profile-big-cuda", "steps-small-cuda", "steps-big-cuda",
        "dense-small", "peers-small", "dense-big", "peers-big", "ops-big-cuda",
        "check-triton", "profile-small-triton", "profile-big-triton", "steps-small-triton", "steps-big-triton",
    ]  # fmt: skip
    assert plan.jobs(Settings())[0].items == ("accumulation", "tests")
    everything = plan.jobs(Settings(everything=True))
    assert [job.name for job in everything[: len(names)]] == names
    assert len({job.name for job in everything}) == len(everything)
    assert {"sanitizer-cuda", "codes-big-triton", "codes-big", "steps-hot-cuda", "more-peers-big",
            "steps-sweep-K-256-triton", "ops-small-cuda", "ops-big-triton"} <= {j.name for j in everything}  # fmt: skip
    cases = Settings().cases
    assert (cases["big"].N, cases["big"].D, cases["big"].M, cases["big"].K) == (8192, 4096, 131072, 64)
    for axis, ends in (("N", (1024, 16384)), ("D", (384, 4096)), ("M", (6144, 98304)), ("K", (8, 512))):
        sizes = [getattr(case, axis) for name, case in cases.items() if name.startswith("sweep-")]
        assert (min(sizes), max(sizes)) == ends
    assert [job.name for job in plan.chosen(everything, ["steps-big-cuda"])] == ["check-cuda", "steps-big-cuda"]


def test_what_is_not_ours_outlives_a_change_of_our_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ours = Job("ops-small-cpu", "ops", ("decode",), "small", "cpu")
    dense = Job("dense-small", "steps", ("dense bf16",), "small", file="bench/dense.py")
    kept = Store(tmp_path, MACHINE)
    for job in (ours, dense):
        kept.put(job, job.items[0], {"status": "ok"})

    def held(**machine: Any) -> list[bool]:
        there = Store(tmp_path, MACHINE | machine)
        return [there.get(job, job.items[0]) is not None for job in (ours, dense)]

    assert held(commit="other", date="later") == [True, True]
    assert held(device="another") == held(torch="3") == [False, False]
    assert held(triton="4") == [False, True]
    for folder in ("fastsae", "csrc", "bench"):
        (tmp_path / "root" / folder).mkdir(parents=True)
    (tmp_path / "root" / "bench" / "dense.py").write_text("one")
    (tmp_path / "root" / "csrc" / "a.cu").write_text("one")
    monkeypatch.setattr(store, "ROOT", tmp_path / "root")
    for job in (ours, dense):
        kept.put(job, job.items[0], {"status": "ok"})
    assert held() == [True, True]
    (tmp_path / "root" / "csrc" / "a.cu").write_text("two")
    assert held() == [False, True]
    (tmp_path / "root" / "bench" / "dense.py").write_text("two")
    assert held() == [False, False]
    (tmp_path / "results.json").write_text('{"format": 1}')
    assert Store(tmp_path, MACHINE).content == {}


def test_an_archive_goes_on_elsewhere(tmp_path: Path) -> None:
    job = Job("dense-small", "steps", ("dense bf16",), "small", file="bench/dense.py")
    kept = Store(tmp_path / "here", MACHINE, tmp_path / "here" / "a.tar.gz")  # inside what it packs
    for item in ("one", "two"):
        kept.put(job, item, {"status": item})
        kept.pack()
    there = Store(tmp_path / "there", MACHINE | {"date": "later"}, tmp_path / "here" / "a.tar.gz")
    assert there.get(job, "one") == {"status": "one"}
    assert there.get(job, "two") == {"status": "two"}
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"results.json"} | {"logs"}


def test_values_that_json_cannot_hold_become_null() -> None:
    value = {"a": [float("nan"), float("inf"), 1.0], 2: ("x", None)}
    assert json.loads(json.dumps(finite(value), allow_nan=False)) == {"a": [None, None, 1.0], "2": ["x", None]}


def test_a_summary_of_nothing_and_of_failures() -> None:
    assert "Not reached." in report.summary([], MACHINE, [])
    entries = [entry("check-triton", "tests", None, status="died", error="a | b\nsecond line")]
    assert "- check-triton tests: died: a \\| b\n" in report.summary(entries, MACHINE, report.rows(entries))


def test_the_clock_on_a_cpu() -> None:
    sample = measure(lambda: time.sleep(0.002), "cpu", 0.01, least=4)
    assert sample.n >= 4
    assert 0.002 <= sample.p20 <= sample.median <= sample.p80
    assert extra_peak_bytes(lambda x: x, torch.zeros(1)) is None


def test_a_machine_without_git_is_described(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.describe()["commit"] == ""
