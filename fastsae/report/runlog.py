"""The content of a run folder: settings, metrics, evaluations and the dense reference's curve, complete or not.

It reads only what fastsae writes, by name and type: a value of another type counts as missing, and an unknown key
appears as text among the settings or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastsae.model.files import WEIGHTS
from fastsae.runs.opening import EVALUATION, SPLICED_EVALUATION, run_config
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
    """A whole step's {"ms": median, ...} by implementation, "fastsae" and references, from step_times.json."""
    notes: list[str]
    """Sentences for the page on what was missing or unreadable."""

    def series(self, key: str, *, of: str = "metrics", x: str = "step") -> tuple[list[float], list[float]]:
        """(x, values) of the finite entries of one column; two empty lists if no record has it."""
        return column(getattr(self, of), key, x)

    def last(self, key: str, *, of: str = "metrics") -> float | None:
        """The last finite value of a column, or None."""
        values = self.series(key, of=of, x=key)[1]
        return values[-1] if values else None

    def median(self, key: str, *, of: str = "metrics") -> float | None:
        """The median of a column without its first tenth (warm-up), or None."""
        values = self.series(key, of=of, x=key)[1]
        values = sorted(values[len(values) // 10 :])
        return values[len(values) // 2] if values else None


def column(records: list[Record], key: str, x: str = "step") -> tuple[list[float], list[float]]:
    """(x, values) of the records in which both are finite numbers."""
    xs, ys = [], []
    for record in records:
        a, b = record.get(x), record.get(key)
        if is_number(a) and is_number(b):
            xs.append(float(a))  # type: ignore[arg-type]
            ys.append(float(b))  # type: ignore[arg-type]
    return xs, ys


def is_number(value: object) -> bool:
    # JSON integers have no limit; one too large for a float is not a measurement.
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > sys.float_info.max:
        return False
    return math.isfinite(value)


def whole(record: object, *names: str) -> int | None:
    """The whole number at record[name][...]; None if there is none of at least 1."""
    for name in names:
        record = record.get(name) if isinstance(record, dict) else None
    return record if isinstance(record, int) and not isinstance(record, bool) and record >= 1 else None


def histogram(record: Record) -> tuple[list[float], list[int], int] | None:
    """An evaluation's density_histogram as (edges, counts, never); None if it is missing or invalid."""
    held = record.get("density_histogram")
    edges, counts, never = ((held if isinstance(held, dict) else {}).get(name) for name in ("edges", "counts", "never"))
    if not isinstance(edges, list) or not isinstance(counts, list) or len(edges) != len(counts) + 1 or not counts:
        return None
    good = all(map(is_number, [*edges, *counts, never])) and all(a < b for a, b in pairwise(edges))
    return (edges, [int(n) for n in counts], int(never)) if good else None  # type: ignore[arg-type]


def hooks_of(evaluation: Record) -> list[Record]:
    """An evaluation's entries by hook, as a language model's evaluation has them."""
    held = evaluation.get("hooks")
    return [one for one in held if isinstance(one, dict)] if isinstance(held, list) else []


def read_jsonl(path: Path, notes: list[str]) -> list[Record]:
    """The records of a JSON-lines file, sorted by step; of equal steps, the last record.

    A run killed while writing leaves a partial line, which is skipped with a note. A resumed run repeats the steps
    after its checkpoint; the record written last counts.
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
        except (ValueError, RecursionError):
            skipped += 1
            continue
        if isinstance(record, dict):
            step = record.get("step")
            by_step[float(step) if is_number(step) else -1.0 - number] = record  # type: ignore[arg-type]
        else:
            skipped += 1
    if skipped:
        notes.append(f"{path.name}: {skipped} unreadable line{'s' * (skipped > 1)} left out.")
    return [by_step[step] for step in sorted(by_step)]


def read_run(run_dir: str | Path) -> RunLog:
    """Reads a run folder.

    Raises FileNotFoundError if the folder, or both its config.json and its metrics.jsonl, are missing;
    ValueError if `fastsae train` did not write config.json, or the folder is a checkpoint or a saved SAE.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}; `fastsae train --run-dir {folder} ...` makes one")
    if (folder / WEIGHTS).is_file():
        # Its config.json is the SAE's own, and a page in a checkpoint would be a file outside its manifest.
        run = folder.resolve().parent.parent
        where = f"; give the run's folder, {run}" if folder.resolve().parent.name == "checkpoints" else ""
        raise ValueError(
            f"{folder} holds an SAE ({WEIGHTS}), not a run: a report needs config.json and metrics.jsonl"
            + (where or "; `fastsae eval` measures a saved SAE")
        )
    metrics_path = folder / "metrics.jsonl"
    if not (folder / CONFIG).exists() and not metrics_path.exists():
        raise FileNotFoundError(f"{folder} is not a run folder: it has neither config.json nor metrics.jsonl")
    notes: list[str] = []
    config = run_config(folder)
    if not config:
        notes.append("config.json is missing: the settings are not shown.")
    elif not all(isinstance(config.get(section), dict) for section in ("train", "sae")):
        raise ValueError(
            f"{folder / CONFIG} was not written by `fastsae train`: it lacks the sections train and sae; "
            "give the folder of a run"
        )
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
        notes.append(f"{_state_of(metrics_path)}: no training metrics yet.")
    if not log.evals:
        notes.append(
            f"{_state_of(folder / 'eval.jsonl')}: no evaluation on held-out rows yet; `fastsae eval` makes one."
        )
    return log


def _state_of(path: Path) -> str:
    return f"{path.name} {'has no usable line' if path.exists() else 'is missing'}"


def _evaluations(folder: Path, notes: list[str]) -> list[Record]:
    """The run's own evaluations, and those of `fastsae eval` that are of the last step or later.

    The one with a language model comes last.
    """
    own = read_jsonl(folder / "eval.jsonl", notes)
    steps, _ = column(own, "step")
    found = []
    for name in (EVALUATION, SPLICED_EVALUATION):
        record = _read_object(folder / name, notes)
        step = record.get("step")
        if record and (not own or (is_number(step) and float(step) >= (steps[-1] if steps else 0))):  # type: ignore[arg-type]
            found.append(record)
    # A curve has one value at a step.
    return [*(e for e in own if e.get("step") not in [record.get("step") for record in found]), *found]


def _step_times(folder: Path, notes: list[str]) -> dict[str, Record]:
    times = _read_object(folder / "step_times.json", notes)
    return {k: v for k, v in times.items() if isinstance(v, dict) and is_number(v.get("ms")) and v["ms"] > 0}


def _read_object(path: Path, notes: list[str]) -> Record:
    """The JSON object in a file; empty if there is none, with a note if the file exists."""
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(errors="replace"))
    except (ValueError, RecursionError):
        record = None
    if isinstance(record, dict):
        return record
    notes.append(f"{path.name} is unreadable and left out.")
    return {}
