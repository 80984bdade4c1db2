"""The parent of a run: jobs in order, each in a process of its own, within the time; results written one by one.

A crash or a hang costs one item, and a run that was stopped continues where it was. Nothing of a backend is timed
before its tests have passed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.gpu import child, plan, report
from bench.gpu.plan import Job, Settings
from bench.gpu.store import FOUND_WRONG, Store
from bench.machine import ROOT
from bench.results import RESULTS

START_SECONDS = 90.0
"""Limit on the time before a process begins its first item: imports, which a cold machine reads from disk."""
LEAST_SECONDS = {"full": 12.0, "toy": 2.0}
"""With less than this left, no further job is begun."""
POLL_SECONDS = 0.05


class Child:
    """One process of a job, its items and where it is among them."""

    def __init__(self, job: Job, settings: Settings, items: Sequence[str], log: Path) -> None:
        self.folder, self.items, self.log = tempfile.TemporaryDirectory(prefix="bench-gpu-"), tuple(items), log
        self.progress = Path(self.folder.name) / "progress.jsonl"
        self.progress.touch()
        self.read = 0
        spec = {"job": asdict(job), "settings": asdict(settings), "items": items, "progress": str(self.progress)}
        self.output = open(log, "ab")  # noqa: SIM115 - closed with the process
        self.log_start = self.output.tell()
        # A session of its own, so that what it starts (compilers, the sanitizer) ends with it.
        before = ["env", "OMP_NUM_THREADS=1"] if settings.is_toy else []  # a toy's second thread only waits
        self.process = subprocess.Popen(
            [*before, sys.executable, "-m", "bench.gpu.child", json.dumps(spec)], cwd=ROOT, stdin=subprocess.DEVNULL,
            stdout=self.output, stderr=self.output, start_new_session=True,
        )  # fmt: skip

    def news(self) -> list[dict[str, Any]]:
        """The lines written since the last call."""
        with open(self.progress, "rb") as file:
            file.seek(self.read)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.read += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]

    def tail(self) -> str:
        """The end of what this process printed."""
        with open(self.log, "rb") as file:
            file.seek(self.log_start)
            return file.read()[-1500:].decode(errors="replace").strip()

    def end(self) -> None:
        """Kills it with everything that it started, if it still runs, and waits."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep a killed process for a while
            self.process.wait(timeout=10)
        self.output.close()
        self.folder.cleanup()


class Run:
    """A run: settings, its store, and the time that is left."""

    def __init__(self, settings: Settings, deadline: float, logs: Path) -> None:
        self.settings, self.deadline, self.logs = settings, deadline, logs
        self.store: Store | None = None

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, job: Job, item: str, result: dict[str, Any]) -> None:
        print(f"{job.name:20} {item:24} {result['status']:8} {report.note(result)}", flush=True)
        if self.store is not None:
            self.store.put(job, item, result)

    def job(self, job: Job, todo: Sequence[str]) -> dict[str, Any]:
        """Runs the items, in as many processes as it takes; returns the results. Stops where the time is up."""
        results: dict[str, Any] = {}
        while todo and self.left() > LEAST_SECONDS[self.settings.size]:
            worker = Child(job, self.settings, todo, self.logs / f"{job.name}.log")
            try:
                done, goes_on = self.watch(worker, job)
            finally:
                worker.end()
            results |= done
            todo = [item for item in todo if item not in done]
            if not goes_on:
                break
        return results

    def watch(self, worker: Child, job: Job) -> tuple[dict[str, Any], bool]:
        """Follows one process to its end: the results, and whether another process may do the rest."""
        begun: str | None = None
        since, limit, has_begun = time.monotonic(), START_SECONDS, False
        done: dict[str, Any] = {}

        def finish(item: str | None, result: dict[str, Any]) -> None:
            item = item or next((one for one in worker.items if one not in done), job.name)
            done[item] = result
            self.record(job, item, result)

        while True:
            code = worker.process.poll()  # before reading: what it wrote last is read below
            for line in worker.news():
                since, has_begun = time.monotonic(), True
                begun, limit = (line["begun"], job.limit) if "begun" in line else (None, START_SECONDS)
                if "item" in line:
                    finish(line["item"], line["result"])
            if code is not None:
                if begun is not None or code not in (0, child.LOST):
                    how = f"signal {-code}" if code < 0 else f"exit code {code}"
                    finish(begun, {"status": "died", "error": f"the process ended with {how}: {worker.tail()}"})
                return done, has_begun
            if self.left() <= 0:
                return done, False
            if time.monotonic() - since > limit:
                finish(begun, {"status": "timeout", "error": f"not done within {limit:.0f} s: {worker.tail()}"})
                return done, has_begun
            time.sleep(POLL_SECONDS)

    def outputs(self) -> None:
        if self.store is not None:
            report.write(self.store)
            self.store.pack()


def about_machine(run: Run) -> dict[str, Any]:
    """Builds what is missing and asks what this machine is. Raises ValueError where it cannot be used."""
    result: dict[str, Any] = {"status": "error", "error": f"nothing was said; see {run.logs / 'machine.log'}"}
    # A process for each: one that started before the build does not find what was built. A rehearsal builds nothing.
    for item in ("device",) if run.settings.is_toy else ("build", "device"):
        result = run.job(Job("machine", "machine", (item,), limit=640), [item]).get(item, result)
    if "machine" not in result:
        raise ValueError(str(result["error"]))
    machine: dict[str, Any] = result["machine"]
    return machine


def available(settings: Settings, machine: dict[str, Any]) -> Settings:
    """The settings with the backends that work here; says which do not, and why. Raises ValueError where none does."""
    reasons = {name: about["reason"] for name, about in machine["backends"].items() if not about["available"]}
    for name, reason in reasons.items():
        print(f"left out: {name}: {reason}", flush=True)
    kept = tuple(name for name in settings.backends if name not in reasons)
    if not kept:
        raise ValueError(f"none of the backends works here: {'; '.join(f'{n}: {r}' for n, r in reasons.items())}")
    return replace(settings, backends=kept)


def everything(
    settings: Settings, only: Sequence[str], budget: float, out: Path | None, archive: Path | None, fresh: bool
) -> int:
    """All jobs as far as the time goes. Returns the exit code. Raises ValueError where there is nothing to run on."""
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as logs:
        run = Run(settings, time.monotonic() + 0.97 * budget, Path(logs))
        machine = about_machine(run)
        run.settings = available(settings, machine)
        out = out or RESULTS / machine["folder"] / ("gpu-toy" if settings.is_toy else "gpu")
        run.store = Store(out, machine, archive)
        run.logs = out / "logs"
        try:
            return through(run, run.store, plan.chosen(plan.jobs(run.settings), only), fresh)
        except KeyboardInterrupt:
            print(f"interrupted; the same command goes on from here. Results so far: {out}", flush=True)
            return 130
        finally:
            run.outputs()


def through(run: Run, store: Store, jobs: Sequence[Job], fresh: bool) -> int:
    wrong: set[str] = set()
    for job in jobs:
        if job.backend in wrong:
            continue
        is_check = job.name == f"check-{job.backend}"
        # Checks are made in every run: a machine may be new, and hold no figure, or lack what a test needs.
        todo = [item for item in job.items if fresh or is_check or store.get(job, item) is None]
        if todo:
            run.job(job, todo)
            run.outputs()
        if is_check and (store.get(job, "tests") or {}).get("status") != "ok":
            print(f"left out: {job.backend}: its tests have not passed, so nothing of it is timed", flush=True)
            wrong.add(str(job.backend))
            if wrong == set(run.settings.backends):
                print("error: no backend is left", file=sys.stderr)
                return 2
    found = {f"{job.name} {item}": store.get(job, item) for job in jobs for item in job.items}
    missed = sum(result is None for result in found.values())
    if missed:
        print(f"{missed} of {len(found)} items were not reached; the same command goes on from here")
    faults = [name for name, result in found.items() if result is not None and result["status"] in FOUND_WRONG]
    for name in faults:
        print(f"to look at: {name}")
    print(f"results: {store.out}", flush=True)
    return 1 if faults else 0
