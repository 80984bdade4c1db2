"""One job in a process of its own: `python -m bench.gpu.child SPEC`, started by run.py.

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
    "machine": ("machine", "Machine"),
    "check": ("checks", "Checks"),
    "ceilings": ("ceilings", "Ceilings"),
    "profile": ("steps", "Steps"),
    "steps": ("steps", "Steps"),
    "ops": ("op_times", "OpTimes"),
    "codes": ("op_times", "CodeTimes"),
}
"""kind: module and class. Made with (job, settings), called with an item, it returns a result or raises."""
LOST = 3
CAUGHT = (RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError, ImportError, OSError)
"""What ends an item and not its process. Anything else ends the process, and the parent records that."""


def finite(value: Any) -> Any:
    """value as JSON can hold it: NaN and infinity become None."""
    if isinstance(value, dict):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text(error: BaseException) -> str:
    """The kind and the message, cut to fit a table."""
    return f"{type(error).__name__}: {error}"[:1500]


def status_of(error: Exception) -> str:
    """failed (a wrong result), oom, unserved (a backend refused), missing (not there to be measured), or error."""
    kinds = {"NotThere": "missing", "OutOfMemoryError": "oom", "BackendError": "unserved"}
    return "failed" if isinstance(error, AssertionError) else kinds.get(type(error).__name__, "error")


def lost(device: str) -> Exception | None:
    """How an earlier launch broke the CUDA context: nothing more can be measured in this process."""
    import torch

    if device == "cuda" and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            return error
    return None


def outcome(call: Callable[[], dict[str, Any]], device: str) -> tuple[dict[str, Any], bool]:
    """The result of an item with its status, and whether this process can go on."""
    try:
        result = {"status": "ok"} | call()
    except CAUGHT as error:
        result = {"status": status_of(error), "error": text(error)}
        error.__traceback__ = None  # it holds the tensors of the item
    gc.collect()
    if (poisoned := lost(device)) is not None:
        return {"error": text(poisoned)} | result | {"status": "error", "poisoned": text(poisoned)}, False
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

    for item in spec["items"]:
        report({"begun": item})
        begun = time.monotonic()
        result, alive = outcome(lambda item=item: one(item), settings.device)  # type: ignore[misc]
        report({"item": item, "result": result | {"took_s": round(time.monotonic() - begun, 2)}})
        if not alive:
            return LOST
    return 0


if __name__ == "__main__":
    sys.exit(run(json.loads(sys.argv[1])))
