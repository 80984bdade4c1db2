"""One job in a process of its own: `python -m bench.gpu.child SPEC`, started by parent.py.

SPEC is JSON: {"job", "settings", "items", "progress"}. For every item two lines of JSON go to the file `progress`:
{"begun": item}, and {"item": item, "result": {...}} when it is done. If the second line is missing, the parent knows of
a crash. Exit code 3: the CUDA context is lost, start another process for the rest.
"""

from __future__ import annotations

import gc
import importlib
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu.plan import Job, Settings

KINDS = {
    "machine": ("setup_machine", "Machine"),
    "quick check": ("checks", "Checks"),
    "check": ("checks", "Checks"),
    "ceilings": ("ceilings", "Ceilings"),
    "ops": ("op_times", "OpTimes"),
    "codes": ("op_times", "CodeTimes"),
    "sparse": ("sparse", "SparseTimes"),
    "overhead": ("overhead", "Overhead"),
    "step": ("timings", "StepTimes"),
    "sweep": ("timings", "StepTimes"),
    "sanitizer": ("sanitize", "Sanitizer"),
}
"""kind: module and class. Made with (job, settings), called with an item, it returns a result or raises."""
LOST = 3


def finite(value: Any) -> Any:
    """value as JSON can hold it: NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def outcome(call: Callable[[], dict[str, Any]], device: str) -> tuple[dict[str, Any], bool]:
    """The result of an item with its status, and whether this process can go on.

    Status: ok, failed (a wrong result), error, oom, unserved (a backend refused), missing (not there to be measured).
    """
    import torch

    from bench.gpu.faults import NotThere, Poisoned, caught, ensure_alive, text
    from fastsae import BackendError

    try:
        result = {"status": "ok"} | call()
        ensure_alive(device)
        return result, True
    except Poisoned as lost:
        return lost.result | {"status": "error", "error": text(lost)}, False
    except NotThere as error:
        return {"status": "missing", "error": str(error)}, True
    except caught() as error:
        kinds: tuple[tuple[type[BaseException], str], ...] = (
            (torch.OutOfMemoryError, "oom"), (BackendError, "unserved"), (AssertionError, "failed"),
        )  # fmt: skip
        status = next((status for kind, status in kinds if isinstance(error, kind)), "error")
        result = {"status": status, "error": text(error)}
    try:
        ensure_alive(device)
    except Poisoned as lost:
        return result | {"poisoned": text(lost)}, False
    return result, True


def run(spec: dict[str, Any]) -> int:
    job, settings = Job(**spec["job"]), Settings(**spec["settings"])
    module, name = KINDS[job.kind]
    measure: Callable[[str], dict[str, Any]] | None = None

    def report(line: dict[str, Any]) -> None:
        with open(Path(spec["progress"]), "a") as file:
            file.write(json.dumps(finite(line)) + "\n")

    def one(item: str) -> dict[str, Any]:
        nonlocal measure
        if measure is None:
            measure = getattr(importlib.import_module(f"bench.gpu.{module}"), name)(job, settings)
        return measure(item)

    if job.kind == "machine":  # before fastsae is imported: it may not be built yet
        for item in spec["items"]:
            report({"begun": item})
            try:
                result = {"status": "ok"} | one(item)
            except (RuntimeError, ImportError) as error:
                result = {"status": "error", "error": str(error)}
            report({"item": item, "result": result})
        return 0
    import torch

    from bench.gpu import faults

    if settings.device == "cpu":
        torch.set_num_threads(1)  # toys: a second thread only waits
    if settings.plant:
        faults.plant(settings.plant)
    for item in spec["items"]:
        report({"begun": item})
        begun = time.monotonic()
        result, alive = outcome(lambda item=item: one(item), settings.device)  # type: ignore[misc]
        report({"item": item, "result": result | {"took_s": round(time.monotonic() - begun, 2)}})
        if not alive:
            return LOST
        gc.collect()
        faults.free()
    return 0


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1])))
