"""bench.gpu: at toy size on the CPU, the same path as on a GPU; faults are noticed and cost one item."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import Case
from bench.gpu import check_codes, check_update, cost, faults, parent, plan, report, spot, targets, truth
from bench.gpu.checks import Checks
from bench.gpu.child import finite, outcome
from bench.gpu.clock import PartWatch, extra_peak_bytes, measure
from bench.gpu.plan import Job, Settings
from bench.gpu.store import Store
from bench.gpu.timings import build, moved_alike
from bench.machine import ROOT
from fastsae import ops

TOY = Settings(device="cpu", size="toy", backends=("cpu", "reference"))
MACHINE = {"device": "a machine", "source": "0" * 12, "torch": "2", "triton": None, "size": "toy", "plant": None,
           "commit": "abc", "date": "2026-01-01"}  # fmt: skip


def go(out: Path, jobs: list[Job], settings: Settings = TOY, seconds: float = 120, **machine: Any) -> tuple[int, Store]:
    """The jobs with their real children, as `python -m bench.gpu` runs them; exit code and results."""
    store = Store(out, MACHINE | machine)
    store.begin()
    run = parent.Run(settings, time.monotonic() + seconds)
    run.store, run.logs = store, out
    return parent.everything(run, store, jobs, fresh=False), store


def statuses(store: Store, job: Job) -> dict[str, str]:
    return {item: result["status"] for item, result in store.items(job).items()}


# -- the whole command -------------------------------------------------------------------------------------------------


def test_a_toy_run_writes_everything_and_is_taken_up_again(tmp_path: Path) -> None:
    items = ["decode", "fused step", "copy", "fp32 8192", "bf16 encoder", "fastsae", "fastsae graph", "fastsae by part",
             "dense bf16", "torch.topk", "update_latents_", "sweep-base", "sweep-N-8", "memcheck"]  # fmt: skip
    jobs = ["check-cpu", "ceilings", "steps-small", "ops-small", "sanitizer", "sweep"]
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--size", "toy", "--out", str(tmp_path)]
    command += ["--only", *jobs, "--items", *items]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"machine.json", "check-cpu.json", "ceilings.json", "steps-small.json", "ops-small.json",
                     "sanitizer.json", "sweep.json", "results.csv", "summary.md"}  # fmt: skip
    assert names >= {f"{plot}.{kind}" for plot in ("roofline", "breakdown", "scaling", "contestants")
                     for kind in ("svg", "png")}  # fmt: skip
    store = Store.found(tmp_path)
    content = store.everything()
    assert content["check-cpu"]["items"]["decode"]["passed"] >= 16
    step = content["steps-small"]["items"]["fastsae"]
    assert step["status"] == "ok"
    assert step["step"]["p20"] <= step["step"]["ms"] <= step["step"]["p80"]
    assert content["steps-small"]["items"]["fastsae graph"]["status"] == "missing"
    assert set(content["steps-small"]["items"]["fastsae by part"]["parts"]) == {"encode", "decode", "loss", "update"}
    assert content["sanitizer"]["items"]["memcheck"]["status"] == "missing"
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (decode,) = (row for row in rows if (row["job"], row["item"]) == ("ops-small", "decode"))
    assert float(decode["ms"]) > 0 < float(decode["gbs"])
    assert float(decode["share_of_floor"]) > 0
    summary = (tmp_path / "summary.md").read_text()
    for text in (
        "## Targets",
        "## Correct",
        "| whole exact step, big case | ≤ 27 ms | - | not measured |",
        "roofline.svg",
    ):
        assert text in summary

    when = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json") if path.stem != "machine"}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "results are there already" in again.stdout
    assert when == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json") if path.stem != "machine"}

    summary = (tmp_path / "summary.md").read_text()
    (tmp_path / "summary.md").unlink()
    assert parent.main(["--report-only", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "summary.md").read_text() == summary


def test_a_run_that_is_terminated_leaves_its_results(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--size", "toy", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        begun = time.monotonic()
        while not (tmp_path / "check-cpu.json").exists() and time.monotonic() - begun < 60:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "the same command goes on from here" in said
    assert "check-cpu encode_topk" in (tmp_path / "summary.md").read_text()
    assert not list(tmp_path.glob(".*.partial"))


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert parent.main(["--budget", "60"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--only", "nothing"], ["--plant", "decode:melt"], ["--report-only"]])
def test_wrong_usage_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert parent.main(wrong) == 2
    assert capsys.readouterr().err.startswith("error: ")


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fault", "status"), [("wrong", "failed"), ("crash", "died"), ("hang", "timeout")])
def test_a_broken_op_costs_one_item(fault: str, status: str, tmp_path: Path) -> None:
    job = Job("ops-small", "ops", ("active_dot", "decode", "by_latent"), "small", "cpu", limit=5)
    code, store = go(tmp_path, [job], replace(TOY, plant=f"decode:{fault}"), plant=f"decode:{fault}")
    assert code == 1
    assert statuses(store, job) == {"active_dot": "ok", "decode": status, "by_latent": "ok"}
    assert "time" not in store.items(job)["decode"], "a wrong result was timed"
    summary = (tmp_path / "summary.md").read_text()
    assert f"- ops-small decode: {status}" in summary
    assert f"An op was broken on purpose: decode:{fault}" in summary


def test_a_process_that_cannot_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    job = Job("ops-small", "no such kind", ("decode", "by_latent"), "small", "cpu")
    code, store = go(tmp_path, [job])
    assert code == 1
    assert statuses(store, job) == {"decode": "died"}
    assert "KeyError: 'no such kind'" in store.items(job)["decode"]["error"]


def test_the_budget_holds(tmp_path: Path) -> None:
    jobs = [Job("ops-small", "ops", ("decode",), "small", "cpu"), Job("ops-big", "ops", ("decode",), "big", "cpu")]
    begun = time.monotonic()
    code, store = go(tmp_path, jobs, replace(TOY, plant="decode:hang"), seconds=6)
    assert time.monotonic() - begun < 6 + 10
    assert code == 0
    assert store.items(jobs[0]) == store.items(jobs[1]) == {}, "an item that the budget cut off is not a result"
    assert (tmp_path / "summary.md").exists()


def test_outcomes_are_told_apart() -> None:
    def raises(error: BaseException) -> Any:
        def call() -> dict[str, Any]:
            raise error

        return outcome(call, "cpu")

    from fastsae import BackendError

    for error, status in (
        (AssertionError("off"), "failed"), (torch.OutOfMemoryError("full"), "oom"), (RuntimeError("bad"), "error"),
        (BackendError("no"), "unserved"), (faults.NotThere("none"), "missing"), (KeyError("k"), "error"),
    ):  # fmt: skip
        result, alive = raises(error)
        assert (result["status"], alive) == (status, True)
    result, alive = raises(faults.Poisoned("illegal address", {"passed": 3}))
    assert (result["status"], result["passed"], alive) == ("error", 3, False)
    with pytest.raises(EOFError):
        outcome(lambda: (_ for _ in ()).throw(EOFError()), "cpu")  # what is not known ends the process


# -- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", plan.OPS)
def test_the_checks_notice_a_wrong_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks(Job("quick-check", "quick check", plan.CHECKS, backend="cpu"), TOY)
    result = checks(op)
    assert result["status"] == "ok"
    assert result["failed"] == 0 < result["passed"]
    assert 0 <= result["worst_of_bound"] <= 1
    monkeypatch.setattr(ops, op, getattr(ops, op))  # so that it is put back
    faults.plant(f"{op}:wrong")
    result = checks(op)
    assert result["status"] == "failed"
    assert op.startswith("by_latent") or "off by" in result["error"], result["error"]


@pytest.mark.parametrize("op", plan.OPS)
def test_the_checks_at_full_size_notice_a_wrong_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu.timings import OpTimes

    times = OpTimes(Job("ops-small", "ops", plan.OPS, "small", "cpu"), TOY)
    assert times(op)["time"]["runs"] >= 3
    monkeypatch.setattr(ops, op, getattr(ops, op))
    faults.plant(f"{op}:wrong")
    with pytest.raises(AssertionError):
        times(op)


def test_what_holds_over_all_ops_is_checked_on_every_backend() -> None:
    for backend in ("cpu", "reference"):
        checks = Checks(Job("check", "check", plan.CHECKS, backend=backend), TOY)
        for item in ("exact is fp32", "run twice", "deterministic", "fused step"):
            result = checks(item)
            assert result["status"] == "ok", result
            assert "not_reached" not in result
    graph = checks("fused step as a CUDA graph")
    assert graph["status"] == "missing"


def test_a_step_that_moves_otherwise_is_noticed() -> None:
    g = torch.Generator().manual_seed(0)
    before, theirs = torch.zeros(2000, 8), torch.randn(2000, 8, generator=g)
    swapped = theirs.clone()
    swapped[7] *= -1
    moved_alike(before, swapped, theirs, "W_dec")  # one row in 2000: two latents that tie to rounding
    swapped[:40] *= -1
    with pytest.raises(AssertionError, match="W_dec moved otherwise"):
        moved_alike(before, swapped, theirs, "W_dec")


def test_the_tally_goes_on_and_stops_in_time() -> None:
    tally = truth.Tally("cpu", seconds=60)
    for label, call in (("a", lambda: 0.5), ("b", lambda: 1 / 0), ("c", lambda: None)):
        tally.check(label, call)
    assert tally.result() | {"failures": 0} == {"status": "failed", "passed": 2, "failed": 1, "worst_of_bound": 0.5,
        "failures": 0, "error": "b: ZeroDivisionError: division by zero"}  # fmt: skip
    late = truth.Tally("cpu", seconds=-1)
    late.check("d", lambda: 0.0)
    assert late.result()["not_reached"] == 1


def test_the_bound_is_what_it_says() -> None:
    exact, size = torch.ones(3, dtype=torch.float64), 10 * torch.ones(3, dtype=torch.float64)
    u = 2.0**-24
    assert truth.within((exact + 100 * u).float(), exact, size, "sum") < 1
    with pytest.raises(AssertionError, match=r"sum is off by 1\.\d+ times .* in 3 of 3 places"):
        truth.within((exact + 180 * u).float(), exact, size, "sum")
    with pytest.raises(AssertionError, match="off by inf"):
        truth.within(torch.full((3,), float("nan")), exact, size, "sum")


def test_hard_cases_are_hard() -> None:
    by_name = {case.name: case for case in truth.HARD}
    assert {0, 1} <= {case.N for case in truth.HARD}
    assert {1, 512} <= {case.K for case in truth.HARD}
    assert by_name["hot latent"].fixed(torch.float32).l0.min() > 0
    x, W, b = by_name["all negative"].inputs(torch.float16)
    assert (x.double() @ W.double().T + b.double()).max() < 0
    codes = by_name["odd"].ragged(torch.bfloat16)
    assert codes.is_ragged
    assert codes.acts[-1].isnan(), "spare slots hold nonsense"
    assert check_codes.decode(by_name["wide"], torch.bfloat16, "cpu", "reference") <= 1
    problem = check_update.make(by_name["odd"], torch.float32, aux=True, ragged=True, tied=True)
    assert len(problem.moments) == 6
    assert len(problem.terms) == 2


# -- numbers -----------------------------------------------------------------------------------------------------------


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
        "steps-big": job(fastsae=timed(30) | {"extra_peak_bytes": 9, "memory_bound_bytes": 8}, fastsae_graph=timed(26),
                         dense_bf16_compiled=timed(80), sparsify={"status": "missing", "error": "none"}),
        "steps-small": job(fastsae=timed(1.7)),
        "steps-zipf": job(fastsae=timed(1.9)),
        "steps-hot": job(fastsae_graph=timed(3.4)),
    }  # fmt: skip
    verdicts = {target.what: target.verdict for target in targets.targets(results)}
    assert verdicts["whole exact step, big case"] == "reached"
    assert verdicts["against dense bf16 compiled, big case"] == "missed"
    assert verdicts["against sparsify, big case"] == "not measured"
    assert verdicts["whole exact step, small case"] == "reached"
    assert verdicts["zipf use of latents against uniform use"] == "reached"
    assert verdicts["hot use of latents against uniform use"] == "missed"
    assert verdicts["peak extra memory of a step, big case"] == "missed"
    assert set(verdicts.values()) == {"reached", "missed", "not measured"}


def test_the_plan_has_the_most_wanted_first() -> None:
    jobs = plan.jobs(Settings())
    names = [job.name for job in jobs]
    order = ["quick-check", "ceilings", "steps-small", "ops-small", "steps-big", "ops-big", "steps-zipf", "steps-hot",
             "check-triton", "sanitizer", "sweep"]  # fmt: skip
    assert [name for name in names if name in order] == order
    assert len(set(names)) == len(names)
    cases = Settings().cases
    assert (cases["big"].N, cases["big"].D, cases["big"].M, cases["big"].K) == (8192, 4096, 131072, 64)
    for axis, ends in (("N", (1024, 16384)), ("D", (384, 4096)), ("M", (6144, 98304)), ("K", (8, 512))):
        sizes = [getattr(case, axis) for name, case in cases.items() if name.startswith("sweep-")]
        assert (min(sizes), max(sizes)) == ends
    (only,) = plan.chosen(jobs, ["steps-big"], ["fastsae"])
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


def test_nothing_that_json_cannot_hold_is_written() -> None:
    value = {"a": [float("nan"), float("inf"), 1.0], 2: ("x", None)}
    assert json.loads(json.dumps(finite(value), allow_nan=False)) == {"a": [None, None, 1.0], "2": ["x", None]}


def test_a_summary_of_nothing_and_of_failures() -> None:
    text = report.summary({}, MACHINE | {"device": "d"}, [], [])
    assert "Not reached." in text
    content = {"job": {}, "case": None, "items": {"decode": {"status": "died", "error": "a | b\nsecond line"}}}
    flat = report.rows({"check-triton": content}, MACHINE)
    assert "- check-triton decode: died: a \\| b\n" in report.summary({"check-triton": content}, MACHINE, flat, [])
    assert report.as_csv(flat).splitlines()[1].startswith("check-triton,decode,,died")


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


def test_spots_hold_first_last_and_most_used() -> None:
    assert spot.some(10, 3, torch.device("cpu")).tolist() == [0, 4, 9]
    inputs = build(replace(Case("hot"), N=40, D=8, M=300, K=4, distribution="hot"), "cpu")
    codes = ops.encode_topk(inputs.x, inputs.W_enc, inputs.b_enc, 4)
    latents = spot.latents_of(codes)
    assert 100 in latents.tolist()
    assert torch.equal(spot.columns(codes, latents), codes.to_dense().double()[:, latents])
