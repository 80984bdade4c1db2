"""bench.gpu at toy size on the CPU takes the same path as on a GPU; a fault is noticed and costs one item."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import (
    check_codes,
    check_update,
    faults,
    parent,
    plan,
    truth,
)
from bench.gpu.checks import Checks
from bench.gpu.child import outcome
from bench.gpu.plan import Job, Settings
from bench.gpu.store import Store
from bench.gpu.timings import moved_alike
from bench.machine import ROOT
from fastsae import ops
from tests.bench_case import MACHINE, TOY


def go(out: Path, jobs: list[Job], settings: Settings = TOY, seconds: float = 120, **machine: Any) -> tuple[int, Store]:
    """The jobs with their real children, as `python -m bench.gpu` runs them; exit code and results."""
    store = Store(out, MACHINE | machine)
    store.begin()
    run = parent.Run(settings, time.monotonic() + seconds)
    run.store, run.logs = store, out
    return parent.everything(run, store, jobs, fresh=False), store


def statuses(store: Store, job: Job) -> dict[str, str]:
    return {item: result["status"] for item, result in store.items(job).items()}


def content_reason(out: Path) -> str:
    """Why the cuda backend is left out on this machine, according to machine.json."""
    reason = json.loads((out / "machine.json").read_text())["machine"]["backends"]["cuda"]["reason"]
    assert isinstance(reason, str)
    return reason


# -- the whole command -------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_toy_run_writes_everything_and_resumes(tmp_path: Path) -> None:
    items = ["decode", "fused step", "copy", "fp32 8192", "bf16 encoder", "fastsae", "fastsae graph", "fastsae by part",
             "dense bf16", "torch.topk", "update_latents_", "sweep-base", "sweep-N-8", "memcheck", "decode heavy",
             "active_dot ragged", "active_outer_regrouped hot"]  # fmt: skip
    jobs = ["check-cpu", "ceilings", "steps-small", "ops-small", "codes-small", "overhead", "sanitizer", "sweep"]
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--size", "toy", "--out", str(tmp_path)]
    command += ["--only", *jobs, "--items", *items, "--backends", "cuda", "cpu", "reference"]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stdout + first.stderr
    names = {path.name for path in tmp_path.iterdir()}
    written = ("check-cpu", "ceilings", "steps-small-cpu", "steps-small", "ops-small-cpu", "codes-small-cpu",
               "codes-small-cusparse", "overhead-cpu", "overhead-torch", "sanitizer-cpu", "sweep-cpu")  # fmt: skip
    assert names >= {"machine.json", "results.csv", "summary.md", *(f"{job}.json" for job in written)}
    assert names >= {f"{plot}.{kind}" for plot in ("roofline", "breakdown", "scaling", "contestants")
                     for kind in ("svg", "png")}  # fmt: skip
    store = Store.found(tmp_path)
    content = store.everything()
    assert content["check-cpu"]["items"]["decode"]["passed"] >= 16
    step = content["steps-small-cpu"]["items"]["fastsae"]
    assert step["status"] == "ok"
    assert step["step"]["p20"] <= step["step"]["ms"] <= step["step"]["p80"]
    assert content["steps-small-cpu"]["items"]["fastsae graph"]["status"] == "missing"
    assert set(content["steps-small"]["items"]) == {"dense bf16"}
    assert set(content["steps-small-cpu"]["items"]["fastsae by part"]["parts"]) == {
        "encode",
        "decode",
        "loss",
        "update",
    }
    assert content["sanitizer-cpu"]["items"]["memcheck"]["status"] == "missing"
    codes = content["codes-small-cusparse"]["items"]
    assert set(codes) == {"decode heavy", "active_dot ragged", "active_outer_regrouped hot"}
    assert {item["status"] for item in (*codes.values(), *content["codes-small-cpu"]["items"].values())} == {"ok"}
    assert {item["nnz"] for item in codes.values()} == {TOY.cases["small"].N * TOY.cases["small"].K}
    assert content["overhead-cpu"]["items"]["decode"]["host"]["ms"] > 0
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    (decode,) = (row for row in rows if (row["job"], row["item"]) == ("ops-small-cpu", "decode"))
    assert decode["backend"] == "cpu"
    assert float(decode["ms"]) > 0 < float(decode["gbs"])
    assert float(decode["share_of_floor"]) > 0
    summary = (tmp_path / "summary.md").read_text()
    for text in (
        "## Targets",
        "## Correct",
        "| whole exact step, big case | ≤ 27 ms | - | not measured |",
        "roofline.svg",
        "| cuda | **left out** | ",
        "| op and layout, ms | cpu | cusparse |",
        "| call, µs | cpu | torch |",
        "| **fastsae (cpu)** |",
    ):
        assert text in summary
    assert f"left out: cuda: {content_reason(tmp_path)}" in first.stdout

    when = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json") if path.stem != "machine"}
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "results are there already" in again.stdout
    assert when == {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json") if path.stem != "machine"}

    summary = (tmp_path / "summary.md").read_text()
    (tmp_path / "summary.md").unlink()
    assert parent.main(["--report-only", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "summary.md").read_text() == summary


@pytest.mark.long
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


@pytest.mark.long
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert parent.main(["--budget", "60"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_nothing_is_left_out_silently(capsys: pytest.CaptureFixture[str]) -> None:
    def about(**reasons: str | None) -> dict[str, Any]:
        backends = {
            name: {"available": reason is None, "reason": reason, "detail": {}} for name, reason in reasons.items()
        }
        return {"backends": backends}

    settings = parent.available(Settings(), about(cuda="there is no nvcc", triton=None, reference=None))
    assert settings.backends == ("triton", "reference")
    assert settings.timed == ("triton",)
    assert capsys.readouterr().out == "left out: cuda: there is no nvcc\n"
    assert not any("cuda" in job.name for job in plan.jobs(settings))
    with pytest.raises(ValueError, match="none of the backends works here: cuda: no; triton: nor this"):
        parent.available(Settings(backends=("cuda", "triton")), about(cuda="no", triton="nor this"))
    assert Settings(backends=("reference",)).timed == ("reference",)


@pytest.mark.long
def test_no_backend_at_all_is_an_error(tmp_path: Path) -> None:
    for backend, said in (
        ("cuad", "--backends cuad: expected some of cuda, triton"),
        ("triton", "none of the backends"),
    ):
        command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--size", "toy", "--out", str(tmp_path)]
        env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        command += ["--backends", backend]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert said in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [["--only", "nothing"], ["--plant", "decode:melt"], ["--report-only"]])
def test_wrong_usage_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert parent.main(wrong) == 2
    assert capsys.readouterr().err.startswith("error: ")


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.long
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


def test_a_process_that_cannot_start_is_reported_with_its_error(tmp_path: Path) -> None:
    job = Job("ops-small", "no such kind", ("decode", "by_latent"), "small", "cpu")
    code, store = go(tmp_path, [job])
    assert code == 1
    assert statuses(store, job) == {"decode": "died"}
    assert "KeyError: 'no such kind'" in store.items(job)["decode"]["error"]


@pytest.mark.long
def test_the_budget_holds(tmp_path: Path) -> None:
    jobs = [Job("ops-small", "ops", ("decode",), "small", "cpu"), Job("ops-big", "ops", ("decode",), "big", "cpu")]
    begun = time.monotonic()
    code, store = go(tmp_path, jobs, replace(TOY, plant="decode:hang"), seconds=6)
    assert time.monotonic() - begun < 6 + 10
    assert code == 0
    assert store.items(jobs[0]) == store.items(jobs[1]) == {}, "an item that the budget cut off was stored as a result"
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
        outcome(lambda: (_ for _ in ()).throw(EOFError()), "cpu")  # an unknown error ends the process


# -- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", plan.OPS)
def test_the_checks_notice_a_wrong_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = Checks(Job("quick-check", "quick check", plan.CHECKS, backend="cpu"), TOY)
    result = checks(op)
    assert result["status"] == "ok"
    assert result["failed"] == 0 < result["passed"]
    assert 0 <= result["worst_of_bound"] <= 1
    monkeypatch.setattr(ops, op, getattr(ops, op))  # so that monkeypatch restores it
    faults.plant(f"{op}:wrong")
    result = checks(op)
    assert result["status"] == "failed"
    assert op.startswith("by_latent") or "off by" in result["error"], result["error"]


@pytest.mark.parametrize("op", plan.OPS)
def test_the_checks_at_full_size_notice_a_wrong_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bench.gpu.op_times import OpTimes

    times = OpTimes(Job("ops-small", "ops", plan.OPS, "small", "cpu"), TOY)
    assert times(op)["time"]["runs"] >= 3
    monkeypatch.setattr(ops, op, getattr(ops, op))
    faults.plant(f"{op}:wrong")
    with pytest.raises(AssertionError):
        times(op)


def test_checks_across_ops_run_on_every_backend() -> None:
    for backend in ("cpu", "reference"):
        checks = Checks(Job("check", "check", plan.CHECKS, backend=backend), TOY)
        for item in ("exact is fp32", "run twice", "deterministic", "fused step"):
            result = checks(item)
            assert result["status"] == "ok", result
            assert "not_reached" not in result
    graph = checks("fused step as a CUDA graph")
    assert graph["status"] == "missing"


def test_a_step_that_moves_differently_is_noticed() -> None:
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
    assert codes.acts[-1].isnan(), "spare slots should hold NaN"
    assert check_codes.decode(by_name["wide"], torch.bfloat16, "cpu", "reference") <= 1
    problem = check_update.make(by_name["odd"], torch.float32, aux=True, ragged=True, tied=True)
    assert len(problem.moments) == 6
    assert len(problem.terms) == 2
