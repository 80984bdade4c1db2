"""What a run folder says: settings, metrics, evaluations and the dense reference's curve, complete or not."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from fastsae.runs.opening import EVALUATION, run_config
from fastsae.runs.rundir import CONFIG

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunLog:
    """A run as read from disk; every list may be empty, and records may lack any key."""

    folder: Path
    config: Record
    metrics: list[Record]
    evals: list[Record]
    dense: list[Record]
    """Learning curve of the dense reference on the same batches, from dense_metrics.jsonl."""
    step_times: dict[str, Record]
    """A whole step's {"ms": median, ...} by who computes it, from step_times.json: "fastsae" and references."""
    notes: list[str]
    """What was missing or unreadable, in words for the page."""

    def series(self, key: str, *, of: str = "metrics", x: str = "step") -> tuple[list[float], list[float]]:
        """(x, values) of the finite entries of one column; two empty lists where no record has it."""
        return column(getattr(self, of), key, x)

    def last(self, key: str, *, of: str = "metrics") -> float | None:
        """The last finite value of a column, or None."""
        values = self.series(key, of=of, x=key)[1]
        return values[-1] if values else None

    def median(self, key: str, *, of: str = "metrics") -> float | None:
        """The median of a column, the first tenth (warm-up) left out, or None."""
        values = self.series(key, of=of, x=key)[1]
        values = sorted(values[len(values) // 10 :])
        return values[len(values) // 2] if values else None


def column(records: list[Record], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """(x, values) of the records in which both are finite numbers."""
    xs, ys = [], []
    for record in records:
        a, b = record.get(x), record.get(key)
        if _is_number(a) and _is_number(b):
            xs.append(float(a))  # type: ignore[arg-type]
            ys.append(float(b))  # type: ignore[arg-type]
    return xs, ys


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_jsonl(path: Path, notes: list[str]) -> list[Record]:
    """The records of a JSON-lines file, sorted by step, the last of those with equal steps.

    A run killed while writing leaves half a line, and a resumed run repeats the steps after its checkpoint: half
    lines are skipped with a note, repeated steps keep what was written last.
    """
    if not path.exists():
        return []
    by_step: dict[float, Record] = {}
    skipped = 0
    for number, line in enumerate(path.read_text(errors="replace").splitlines()):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            skipped += 1
            continue
        if isinstance(record, dict):
            step = record.get("step")
            by_step[float(step) if _is_number(step) else -1.0 - number] = record  # type: ignore[arg-type]
        else:
            skipped += 1
    if skipped:
        notes.append(f"{path.name}: {skipped} unreadable line{'s' * (skipped > 1)} left out.")
    return [by_step[step] for step in sorted(by_step)]


def read_run(run_dir: str | Path) -> RunLog:
    """Reads a run folder.

    Raises FileNotFoundError where the folder, or both its config.json and its metrics.jsonl, are not there;
    ValueError where config.json is not a JSON object.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}; `fastsae train --run-dir {folder} ...` makes one")
    metrics_path = folder / "metrics.jsonl"
    if not (folder / CONFIG).exists() and not metrics_path.exists():
        raise FileNotFoundError(f"{folder} is not a run folder: it has neither config.json nor metrics.jsonl")
    notes: list[str] = []
    config = run_config(folder)
    if not config:
        notes.append("config.json is missing: the settings are not shown.")
    log = RunLog(
        folder=folder,
        config=config,
        metrics=read_jsonl(metrics_path, notes),
        evals=_evaluations(folder, notes),
        dense=read_jsonl(folder / "dense_metrics.jsonl", notes),
        step_times=_step_times(folder, notes),
        notes=notes,
    )
    if not log.metrics:
        notes.append("No training metrics yet.")
    if not log.evals:
        notes.append("No evaluation on held-out rows yet; `fastsae eval` makes one.")
    return log


def _evaluations(folder: Path, notes: list[str]) -> list[Record]:
    """The run's own evaluations, and the one that `fastsae eval` wrote where it is of the same step or a later one."""
    evals = read_jsonl(folder / "eval.jsonl", notes)
    record = _read_object(folder / EVALUATION, notes)
    if record and (not evals or record.get("step", -1) >= evals[-1].get("step", 0)):
        evals = [*(e for e in evals if e.get("step") != record.get("step")), record]
    return evals


def _step_times(folder: Path, notes: list[str]) -> dict[str, Record]:
    times = _read_object(folder / "step_times.json", notes)
    return {k: v for k, v in times.items() if isinstance(v, dict) and _is_number(v.get("ms")) and v["ms"] > 0}


def _read_object(path: Path, notes: list[str]) -> Record:
    """The JSON object in a file; empty, with a note unless the file is not there at all, where there is none."""
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(errors="replace"))
    except json.JSONDecodeError:
        record = None
    if isinstance(record, dict):
        return record
    notes.append(f"{path.name} is unreadable and left out.")
    return {}
