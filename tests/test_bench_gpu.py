"""bench.gpu rehearsed on the CPU takes the same path as on a GPU; a fault is noticed and costs one item."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.cases import Case
from bench.gpu import checks, child, layouts, plan, run
from bench.gpu.__main__ import main
from bench.gpu.checks import Checks
from bench.gpu.plan import Job, NotThere, Settings
from bench.gpu.steps import Steps, differing
from bench.gpu.store import Store
from bench.machine import ROOT
from fastsae import BackendError
from tests.bench_case import MACHINE, TOY

COMMAND = [sys.executable, "-m", "bench.gpu", "--rehearse"]


def go(out: Path, jobs: list[Job], seconds: float = 120) -> tuple[int, Store]:
    """The jobs with their real children; exit code and results."""
    store = Store(out, MACHINE, out / "all.tar.gz")
    now = run.Run(TOY, time.monotonic() + seconds, out)
    now.store = store
    return run.through(now, store, jobs, fresh=False), store


def statuses(store: Store, job: Job) -> dict[str, Any]:
    return {item: (store.get(job, item) or {}).get("status") for item in job.items}


# -- the whole command -------------------------------------------------------------------------------------------------


def rehearsed(tmp_path: Path, *options: str, folder: str = "here") -> dict[str, Any]:
    """Runs the command; the results of its archive."""
    archive = tmp_path / "gpu.tar.gz"
    command = [*COMMAND, "--out", str(tmp_path / folder), "--archive", str(archive), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    if folder != "here":  # what the archive holds is not done again
        assert [line.split()[0] for line in done.stdout.splitlines()[:-1]] == ["machine", "check-cpu"]
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        assert {"results.json", "summary.md", "logs/check-cpu.log"} <= names
        held = json.load(tar.extractfile("results.json"))  # type: ignore[arg-type]
    items: dict[str, Any] = held["items"]
    summary = (tmp_path / folder / "summary.md").read_text()
    for text in ("## Targets", "| whole exact step, big case | ≤ 27 ms | ", "check-cpu tests", "## To look at"):
        assert text in summary
    return {name: entry["result"] for name, entry in items.items()}


def test_a_rehearsal_writes_everything(tmp_path: Path) -> None:
    results = rehearsed(tmp_path, "--only", "profile-small", "steps-small")
    assert set(results) == {"check-cpu/tests", "profile-small-cpu/kernels", "steps-small-cpu/fastsae",
                            "steps-small-cpu/fastsae graph", "steps-small-cpu/graph is step"}  # fmt: skip
    assert "passed" in results["check-cpu/tests"]["summary"]
    step = results["steps-small-cpu/fastsae"]
    assert step["step"]["p20"] <= step["step"]["ms"] <= step["step"]["p80"]
    assert step["encode"]["ms"] > 0
    assert results["steps-small-cpu/graph is step"]["status"] == "missing"
    kernels = results["profile-small-cpu/kernels"]["kernels"]
    assert 5 < len(kernels) <= 25
    spent = [row["count"] * row["mean_us"] for row in kernels]
    assert spent == sorted(spent, reverse=True)


@pytest.mark.long
def test_a_rehearsal_of_everything(tmp_path: Path) -> None:
    results = rehearsed(tmp_path, "--all", "--budget", "900")
    assert {result["status"] for result in results.values()} <= {"ok", "missing"}
    wanted = {f"{job.name}/{item}" for job in plan.jobs(replace(TOY, everything=True)) for item in job.items}
    assert set(results) == wanted
    for name in ("ops-big-cpu/update_latents_", "codes-big-cpu/decode heavy", "codes-big/active_outer hot"):
        assert results[name]["time"]["runs"] >= 3
    assert rehearsed(tmp_path, "--all", "--budget", "900", folder="there").keys() == results.keys()


@pytest.mark.long
def test_a_run_that_is_terminated_leaves_its_results(tmp_path: Path) -> None:
    command = [*COMMAND, "--out", str(tmp_path), "--archive", str(tmp_path / "a.tar.gz")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        begun = time.monotonic()
        while not (tmp_path / "results.json").exists() and time.monotonic() - begun < 60:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert "the same command goes on from here" in said
    assert "check-cpu tests" in (tmp_path / "summary.md").read_text()
    assert (tmp_path / "a.tar.gz").exists()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.long
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert main(["--budget", "60"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_no_backend_that_works_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def about(**reasons: str | None) -> dict[str, Any]:
        return {"backends": {n: {"available": r is None, "reason": r, "detail": {}} for n, r in reasons.items()}}

    settings = run.available(Settings(), about(cuda="there is no nvcc", triton=None))
    assert settings.backends == ("triton",)
    assert capsys.readouterr().out == "left out: cuda: there is no nvcc\n"
    assert not any("cuda" in job.name for job in plan.jobs(settings))
    with pytest.raises(ValueError, match="none of the backends works here: cuda: no; triton: nor this"):
        run.available(Settings(), about(cuda="no", triton="nor this"))


@pytest.mark.parametrize("wrong", [["--only", "nothing"], ["--rehearse", "--backends", "cuad"]])
def test_wrong_usage_is_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(wrong) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"a\.tar\.gz cannot be unpacked"):
        Store(tmp_path / "out", MACHINE, tmp_path / "a.tar.gz")


# -- nothing is timed before the tests have passed ---------------------------------------------------------------------


def test_a_backend_whose_tests_fail_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [Job("check-cpu", "check", ("tests",), backend="cpu"),
            Job("ops-small-cpu", "ops", ("decode",), "small", "cpu")]  # fmt: skip
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    code, store = go(tmp_path, jobs)
    assert code == 2
    assert statuses(store, jobs[0]) == {"tests": "failed"}
    assert statuses(store, jobs[1]) == {"decode": None}
    assert "left out: cpu: its tests have not passed" in capsys.readouterr().out
    monkeypatch.delenv("PYTEST_ADDOPTS")
    code, store = go(tmp_path, jobs[:1])  # mended: the check is made again
    assert code == 0
    assert statuses(store, jobs[0]) == {"tests": "ok"}


def test_no_test_that_ran_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "CASE", "no such case")
    assert Checks(Job("check-cpu", "check", ("tests",), backend="cpu"), TOY)("tests")["status"] == "failed"


def test_every_tests_file_exists() -> None:
    assert all((ROOT / path).exists() for path in (*checks.TESTS, *checks.TOY_TESTS))


def test_a_graph_that_leaves_other_bits_is_noticed() -> None:
    steps = Steps(Job("steps-small-cpu", "steps", ("graph is step",), "small", "cpu"), TOY)
    ours, theirs = (steps.after(steps.fused(graph=False)) for _ in range(2))
    assert set(ours) == {"W_enc", "W_dec", "b_enc", "b_dec", "losses"}
    assert len(ours["losses"]) == 4
    assert differing(ours, theirs) == []
    theirs["W_dec"][3, 1] = torch.nextafter(theirs["W_dec"][3, 1], torch.tensor(9.0))
    assert differing(ours, theirs) == ["W_dec"]


# -- faults ------------------------------------------------------------------------------------------------------------


FAULT = """
import os, sys, time
from bench.gpu import child, op_times
def decode(*args):
    {fault}
op_times.sparse_call = decode
sys.exit(child.run(child.json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("raise ValueError('planted')", "error"), ("os._exit(7)", "died"),
        pytest.param("time.sleep(60)", "timeout", marks=pytest.mark.long),
    ],
)  # fmt: skip
def test_a_broken_item_costs_one_item(fault: str, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.sparse stands for what breaks; the job's other item goes on in a process of its own."""
    job = Job("codes-big", "codes", ("decode fixed", "decode hot"), "big", limit=6, file="bench/gpu/op_times.py")
    start, started = subprocess.Popen, []

    def once(command: list[str], **more: Any) -> Any:
        if not started:  # the first process has the fault
            command = [*command[:-3], "-c", FAULT.format(fault=fault), command[-1]]
        started.append(command)
        return start(command, **more)

    monkeypatch.setattr(subprocess, "Popen", once)
    code, store = go(tmp_path, [replace(job, items=("decode fixed",)), job])
    assert code == 1
    assert statuses(store, job) == {"decode fixed": status, "decode hot": "ok"}
    assert "- codes-big decode fixed: " + status in (tmp_path / "summary.md").read_text()


def test_a_process_that_cannot_start_is_reported_with_its_error(tmp_path: Path) -> None:
    job = Job("ops-small", "no such kind", ("decode", "by_latent"), "small", "cpu")
    code, store = go(tmp_path, [job])
    assert code == 1
    assert statuses(store, job) == {"decode": "died", "by_latent": None}
    assert "KeyError: 'no such kind'" in (store.get(job, "decode") or {})["error"]


def test_the_budget_holds(tmp_path: Path) -> None:
    begun = time.monotonic()
    job = Job("ops-small-cpu", "ops", ("decode",), "small", "cpu")
    code, store = go(tmp_path, [job], seconds=0.5)
    assert time.monotonic() - begun < 10
    assert code == 0
    assert store.content == {}, "an item that the budget cut off was stored as a result"


def test_outcomes_are_told_apart() -> None:
    def of(error: Exception) -> tuple[Any, bool]:
        def call() -> dict[str, Any]:
            raise error

        result, alive = child.outcome(call, "cpu")
        return result["status"], alive

    for error, status in (
        (AssertionError("off"), "failed"), (torch.OutOfMemoryError("full"), "oom"), (RuntimeError("bad"), "error"),
        (BackendError("no"), "unserved"), (NotThere("none"), "missing"), (KeyError("k"), "error"),
    ):  # fmt: skip
        assert of(error) == (status, True)


def test_a_lost_context_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "lost", lambda device: RuntimeError("illegal address"))
    result, alive = child.outcome(lambda: {"passed": 3}, "cuda")
    assert (result["status"], result["passed"], alive) == ("error", 3, False)
    assert "illegal address" in result["error"]


# -- codes -------------------------------------------------------------------------------------------------------------


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
