"""`python -m bench.gpu`: proves and times the engine on this GPU, unattended and within a budget.

Goes through the jobs of plan.py, most important first: what the machine is (and building what is missing), every op of
every backend against float64, the device's ceilings, every op and whole training step against dense PyTorch,
torch.sparse and public libraries, compute-sanitizer, sweeps over N, D, M and K. Each job runs in a process of its own
and each result is written at once, so a crash or a hang costs one case, and a run that was stopped continues where it
was.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.gpu import child, faults, plan, report
from bench.gpu.options import parser, settings_of
from bench.gpu.plan import Job, Settings
from bench.gpu.setup_machine import result_folder
from bench.gpu.store import FOUND_WRONG, Store
from bench.gpu.worker import Child
from bench.results import RESULTS

START_SECONDS = 90.0
"""Limit on the time before a process begins its first item: imports, which a cold machine reads from disk."""
LEAST_SECONDS = {"full": 12.0, "toy": 2.0}
"""With less than this left, no further job is begun."""
POLL_SECONDS = 0.1
PLOT_SECONDS = 20.0
"""Plots take seconds of CPU time, so during a run they are drawn no more often than this."""


class Stopped(KeyboardInterrupt):
    """SIGTERM, made to unwind like Ctrl-C."""


@contextlib.contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Run:
    """A run: settings, its store, and the time that is left."""

    def __init__(self, settings: Settings, deadline: float) -> None:
        self.settings, self.deadline = settings, deadline
        self.store: Store | None = None
        self.logs = Path(tempfile.gettempdir())
        self.stale = False  # results since the outputs were made
        self.drawn = -PLOT_SECONDS

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def record(self, job: Job, item: str, result: dict[str, Any]) -> None:
        say(f"{job.name:20} {item:28} {result['status']:8} {note(result)}")
        if self.store is not None:
            self.store.put(job, item, result, self.settings.cases[job.case] if job.case else None)
            self.stale = True

    def job(self, job: Job, todo: list[str], bar: Any = None) -> dict[str, Any]:
        """Runs the items, in as many processes as it takes; returns the results. Stops where the time is up."""
        results: dict[str, Any] = {}
        while todo and self.left() > LEAST_SECONDS[self.settings.size]:
            worker = Child(job, self.settings, todo, self.logs / f"{job.name}.log")
            try:
                self.outputs()  # of what there was before, while the child starts
                done, end = self.watch(worker, bar)
            finally:
                worker.end()
            results |= done
            todo = [item for item in todo if item not in done]
            if end == "budget" or not worker.has_begun:
                break
        return results

    def watch(self, worker: Child, bar: Any) -> tuple[dict[str, Any], str]:
        """Follows one process to its end: the results, and what ended it, "exit" or "budget"."""
        job, begun, since, limit = worker.job, None, time.monotonic(), START_SECONDS
        done: dict[str, Any] = {}

        def finish(item: str, result: dict[str, Any]) -> None:
            done[item] = result
            self.record(job, item, result)
            if bar is not None:
                bar.update()

        while True:
            code = worker.process.poll()  # before reading: what it wrote last is read below
            for line in worker.news():
                since = time.monotonic()
                if "begun" in line:
                    worker.has_begun = True
                    begun, limit = line["begun"], job.limit
                else:
                    begun, limit = None, START_SECONDS
                    finish(line["item"], line["result"])
            if code is not None:
                if begun is not None:
                    how = f"signal {-code}" if code < 0 else f"exit code {code}"
                    finish(begun, {"status": "died", "error": f"the process ended with {how}: {worker.tail()}"})
                elif code not in (0, child.LOST):
                    first = next((item for item in worker.items if item not in done), job.name)
                    finish(first, {"status": "died", "error": f"exit code {code} outside an item: {worker.tail()}"})
                return done, "exit"
            if self.left() <= 0:
                return done, "budget"
            if time.monotonic() - since > limit:
                if begun is not None:
                    finish(begun, {"status": "timeout", "error": f"not done within {limit:.0f} s: {worker.tail()}"})
                else:
                    first = next(item for item in worker.items if item not in done)
                    finish(first, {"status": "timeout", "error": f"not begun within {limit:.0f} s: {worker.tail()}"})
                return done, "exit"
            time.sleep(POLL_SECONDS)

    def outputs(self, last: bool = False) -> None:
        """CSV and summary from the files, where something is new; the plots too, if the last ones are old enough."""
        if self.store is None or not (self.stale or last):
            return
        plots = last or time.monotonic() - self.drawn > PLOT_SECONDS
        report.write(self.store, plots=plots)
        self.stale = False
        if plots:
            self.drawn = time.monotonic()


def note(result: dict[str, Any]) -> str:
    """A result in a few words."""
    if "error" in result:
        return str(result["error"]).splitlines()[0][:110]
    for name in ("step", "time", "host"):
        if name in result:
            return f"{result[name]['ms']:.4g} ms ({result[name]['p20']:.4g} - {result[name]['p80']:.4g})"
    if "rate" in result:
        return f"{result['rate'] / 1e12:.4g} T/s, {result['what']}"
    if "passed" in result:
        return f"{result['passed']} checks, the worst at {result['worst_of_bound']:.2f} of its bound"
    return str(result.get("summary", ""))


def say(text: str) -> None:
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def about_machine(run: Run) -> dict[str, Any] | str:
    """Builds what is missing and asks what this machine is; or the reason why it cannot be used."""
    # A process for each: one that started before the build does not find what was built.
    for item in ("build", "device"):
        found = run.job(Job("machine", "machine", (item,), limit=640), [item])
        if item not in found:
            return f"the machine could not be asked; see {run.logs / 'machine.log'}"
    result = found["device"]
    return result["machine"] if result["status"] == "ok" else str(result["error"])


def available(settings: Settings, machine: dict[str, Any]) -> Settings:
    """The settings with the backends that work here; says which do not, and why. Raises ValueError where all are."""
    reasons = {name: about["reason"] for name, about in machine["backends"].items() if not about["available"]}
    for name, reason in reasons.items():
        say(f"left out: {name}: {reason}")
    kept = tuple(name for name in settings.backends if name not in reasons)
    if not kept:
        raise ValueError(f"none of the backends works here: {'; '.join(f'{n}: {r}' for n, r in reasons.items())}")
    return replace(settings, backends=kept)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    settings = settings_of(options)
    try:
        jobs = plan.chosen(plan.jobs(settings), options.only, options.items)
        if settings.plant:
            faults.parse(settings.plant)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        for job in jobs:
            print(f"{job.name:20} {', '.join(job.items)}")
        return 0
    if options.report_only:
        return report_only(options.out)
    # A twentieth is kept for the last outputs.
    run = Run(settings, time.monotonic() + options.budget - min(8.0, 0.05 * options.budget))
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as logs, terminated_like_interrupted():
        run.logs = Path(logs)
        machine = about_machine(run)
        if isinstance(machine, str):
            print(f"error: {machine}", file=sys.stderr)
            return 2
        try:
            settings = run.settings = available(settings, machine)
            jobs = plan.chosen(plan.jobs(settings), options.only, options.items)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        out = options.out or result_folder(RESULTS, machine, settings)
        store = run.store = Store(out, machine | {"size": settings.size, "plant": settings.plant})
        store.begin()
        run.logs = out / "logs"
        run.logs.mkdir(exist_ok=True)
        return everything(run, store, jobs, options.fresh)


def everything(run: Run, store: Store, jobs: Sequence[Job], fresh: bool) -> int:
    """All jobs as far as the time goes. Returns the exit code."""
    todo = {job: [item for item in job.items if fresh or item not in store.items(job)] for job in jobs}
    total, count = sum(len(job.items) for job in jobs), sum(map(len, todo.values()))
    if count < total:
        say(f"{total - count} of {total} results are there already (--fresh measures them again)")
    try:
        with tqdm(total=count, unit="item", disable=None, file=sys.stderr) as bar:
            for job, items in todo.items():
                run.job(job, items, bar)
    except KeyboardInterrupt:
        run.outputs(last=True)
        say(f"interrupted; the same command goes on from here. Results so far: {store.out}")
        return 130
    run.outputs(last=True)
    held = {job.name: store.items(job) for job in jobs}
    wrong = [f"{name}: {item}" for name, items in held.items() for item, r in items.items()
             if r["status"] in FOUND_WRONG]  # fmt: skip
    missed = sum(item not in held[job.name] for job in jobs for item in job.items)
    if missed:
        say(f"{missed} of {total} items were not reached; the same command goes on from here")
    for line in wrong:
        say(f"to look at: {line}")
    say(f"results: {store.out}")
    return 1 if wrong else 0


def report_only(out: Path | None) -> int:
    if out is None:
        print("error: --report-only needs --out FOLDER, the results' folder", file=sys.stderr)
        return 2
    try:
        store = Store.found(out)
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report.write(store)
    print(f"results: {out}")
    return 0
