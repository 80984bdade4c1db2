"""A sweep: rules × L0s × sizes × seeds over one set of activations, and a record of each cell's results.

    FOLDER/sweep.json     what the activations are, and the record of every finished cell; replaced after each of them
    FOLDER/runs/NAME/     each cell, an ordinary run of `Trainer`

Cells are trained one after the other. `SAEBatch` would train several at once, but it is slower above N·M = 2¹⁸ (64
latents at 4,096 tokens a step: `BATCH_WORTH`), does not support a target L0, and cannot be resumed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastsae.atomic import write_json
from fastsae.data.source import ActivationSource, held_out_targets, target_width
from fastsae.model.rules import Activation, HierarchicalTopK, Matryoshka, variants
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.checkpoint import list_checkpoints, step_of
from fastsae.runs.config import TrainConfig
from fastsae.runs.evaluate import evaluate
from fastsae.runs.logs import ProgressBar, duration
from fastsae.runs.opening import version
from fastsae.runs.rundir import RunDirError, RunLock, differences, other_settings
from fastsae.runs.stopping import NonFiniteError, TrainingInterrupted
from fastsae.runs.trainer import Trainer

FILE = "sweep.json"
RUNS = "runs"
FORMAT = 1
IDENTITY_ROWS = 1024
"""Held-out rows whose digest tells two sets of activations apart."""
MEASURED = ("n_tokens", "mse", "fvu", "explained_variance", "cosine", "l0", "dead_share")
"""What a record keeps of an `EvalResult`."""

Record = dict[str, Any]
Measure = Callable[[SparseAutoencoder], Record]
log = logging.getLogger("fastsae.sweep")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One SAE of a sweep, as settings."""

    name: str
    """Of its folder."""
    rule_name: str
    rule: Activation
    asked_l0: float
    d_sae: int
    config: TrainConfig
    """Its seed is that of the initial weights too."""
    sae: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Further arguments of SparseAutoencoder, such as aux_k or dtype."""
    precision: str = "exact"

    def build(self, d_in: int, d_target: int | None = None) -> SparseAutoencoder:
        """The SAE at its start; d_target: width of a transcoder's targets.

        Raises ValueError for settings that do not fit together.
        """
        settings = {**self.sae, **({} if d_target is None else transcoder_settings(self.sae, d_target))}
        sae = SparseAutoencoder(d_in, self.d_sae, self.rule, seed=self.config.seed, **settings)
        sae.precision = self.precision
        return sae

    def settings(self) -> Record:
        """JSON-able; a record with others is of another run."""
        own = {"d_sae": self.d_sae, "precision": self.precision, "activation": self.rule.config()}
        sae = {name: str(v) if isinstance(v, torch.dtype | torch.device) else v for name, v in self.sae.items()}
        return {"sae": {**own, **sae}, "train": dataclasses.asdict(self.config)}

    def free(self) -> set[str]:
        """Names in `settings` that may change from one start to the next."""
        return {"sae.device"} | {f"train.{name}" for name in self.config.free_settings()}


@dataclasses.dataclass(frozen=True)
class Further:
    """A measurement of every finished cell beside `evaluate`, such as in a language model.

    name   of its entry in a cell's record.
    asked  JSON-able: what is measured. If a record has another value, the measurement is repeated on the trained run.
    open   loads what it needs; called once, before any training, and only if a cell is missing.
    """

    name: str
    asked: Record
    open: Callable[[], Measure]


def transcoder_settings(settings: Mapping[str, Any], d_target: int) -> dict[str, Any]:
    """The arguments of SparseAutoencoder for targets of this width: no pre-bias, unless it was asked for. b_dec is a
    mean of targets; subtracted from inputs it would be noise.
    """
    asked = settings.get("pre_bias")
    return {"d_out": d_target, "pre_bias": False if asked is None else asked}


def rule_with_l0(name: str, l0: float, d_sae: int) -> Activation:
    """The rule of that name (`fastsae train --activation`) with an L0 as its k or its target_l0.

    Matryoshka gets five groups: d_sae/32, /16, /8, /4 and the rest; HierarchicalTopK k/4, k/2 and k.
    Raises ValueError for an unknown rule, a rule with neither, or an L0 that does not fit it or d_sae.
    """
    known = variants()
    if name not in known:
        raise ValueError(f"no rule {name!r}; the rules are {', '.join(sorted(known))}")
    rule, parts = known[name]
    made: dict[str, Any] = {"k": int(l0) if float(l0).is_integer() else l0}
    settings = {field.name for field in dataclasses.fields(rule)}  # type: ignore[arg-type]
    if issubclass(rule, Matryoshka):
        smaller = [d_sae // share for share in (32, 16, 8, 4) if d_sae >= share]
        made = {"inner": parts["inner"](**made), "groups": (*smaller, d_sae - sum(smaller))}
    elif issubclass(rule, HierarchicalTopK):
        smaller = [made["k"] // share for share in (4, 2) if made["k"] >= share]
        made = {"ks": tuple(dict.fromkeys([*smaller, made["k"]]))}
    elif "target_l0" in settings:
        made = {"target_l0": l0}
    elif "k" not in settings:
        raise ValueError(f"{name} has neither k nor target_l0, so a sweep cannot set its L0; leave it out")
    found = rule(**made)
    found.check(d_sae)
    return found


def grid(
    rules: Sequence[str],
    l0s: Sequence[float],
    sizes: Sequence[int],
    seeds: Sequence[int],
    config: TrainConfig,
    sae: Mapping[str, Any] | None = None,
    precision: str = "exact",
) -> list[Cell]:
    """Every combination, seeds innermost; each seed takes the place of the config's.

    Raises ValueError for an empty list, an invalid size or seed, and as `rule_with_l0`.
    """
    for what, values in (("rules", rules), ("L0s", l0s), ("sizes d_sae", sizes), ("seeds", seeds)):
        if not values:
            raise ValueError(f"the list of {what} is empty, expected at least one")
    if min(sizes) < 1:
        raise ValueError(f"d_sae is {min(sizes)}, expected at least 1")
    return [
        Cell(
            f"{rule}-l0_{l0:g}-d{d_sae}-seed{seed}", rule, rule_with_l0(rule, l0, d_sae), l0, d_sae,
            dataclasses.replace(config, seed=seed), dict(sae or {}), precision,
        )
        for rule, d_sae, l0, seed in product(
            dict.fromkeys(rules), dict.fromkeys(sizes), dict.fromkeys(l0s), dict.fromkeys(seeds)
        )
    ]  # fmt: skip


def run_cell(
    cell: Cell, source: ActivationSource, folder: Path, *, notes: Mapping[str, Any] | None = None,
    after_step: Callable[[], object] | None = None, further: Mapping[str, Measure] | None = None,
) -> Record:  # fmt: skip
    """Trains a cell in folder/runs/NAME, or resumes it, measures it, and returns its record.

    source      at its start; afterwards where the cell's last step left it.
    after_step  replaces the run's own progress bar.
    further     measurements by name, each of the trained SAE; their results are entries of the record.
    Raises as `Trainer.run`.
    """
    run = Path(RUNS) / cell.name
    sae = cell.build(source.d_in, target_width(source))
    config = cell.config if after_step is None else dataclasses.replace(cell.config, progress=False)
    trainer = Trainer(sae, source, config, folder / run, notes=notes, after_step=after_step or (lambda: None))
    result = trainer.run()
    measured = evaluate(
        sae, source.held_out(), targets=held_out_targets(source), batch_size=cell.config.batch_size
    ).to_json()
    return {
        **_head(cell), "run": str(run), "step": result.step, "tokens": result.tokens,
        "seconds": round(trainer.seconds, 3), **{name: measured[name] for name in MEASURED},
        **{name: measure(sae) for name, measure in (further or {}).items()},
    }  # fmt: skip


def run_sweep(
    cells: Sequence[Cell], source: ActivationSource, folder: str | Path, *, notes: Mapping[str, Any] | None = None,
    further: Further | None = None, progress: bool = True, after: Callable[[], object] | None = None,
) -> dict[str, Record]:  # fmt: skip
    """Trains and measures the cells that are missing in `folder`; returns all records there, by name.

    source  at its start, to which it is reset for every cell; it must hold rows out.
    notes   as `Trainer`'s.
    after   called after every cell, when sweep.json has been replaced.

    A cell whose numbers stop being finite is recorded as failed, and tried again by the next call.
    Raises ValueError if no rows are held out or sweep.json is damaged; RunDirError for other activations or settings
    than the folder's, or a folder in use; KeyboardInterrupt or TrainingInterrupted, after which the same call
    continues; and as `Trainer.run`.
    """
    folder = Path(folder)
    data = identity(source)
    with RunLock(folder):
        book = _Book(folder, data, notes)
        missing = [cell for cell in cells if not book.has(cell, source, further)]
        if len(missing) < len(cells):
            log.info("%d of %d cells are already in %s", len(cells) - len(missing), len(cells), folder)
        measures = {further.name: _with_asked(further)} if further and missing else {}
        totals = {cell.name: cell.config.total_steps(source.n_tokens) for cell in cells}
        done = {
            cell.name: min(totals[cell.name], _newest_step(folder / RUNS / cell.name)) if cell in missing
            else totals[cell.name] for cell in cells
        }  # fmt: skip
        begin = source.state_dict()
        untrained = [cell for cell in missing if done[cell.name] < totals[cell.name]]
        if untrained:
            per_step = _seconds_per_step(untrained, source, folder, book.records)
            source.load_state_dict(begin)
            seconds = sum(per_step[_shape(c)] * (totals[c.name] - done[c.name]) for c in untrained)
            log.info("%d cells to train, about %s of steps, and the measurements", len(untrained), duration(seconds))
        bar = ProgressBar(sum(totals.values()), sum(done.values()), progress)
        try:
            for cell in missing:
                bar.name(cell.name)
                source.load_state_dict(begin)
                try:
                    record = run_cell(cell, source, folder, notes=notes, after_step=bar.advance, further=measures)
                except NonFiniteError as error:
                    record = {**_head(cell), "run": f"{RUNS}/{cell.name}", "failed": str(error)}
                    log.warning("%s failed: %s", cell.name, error)
                book.put(cell, record)
                if after is not None:
                    after()
        except KeyboardInterrupt as stop:
            finished = sum(book.has(cell, source, further) for cell in cells)
            message = f"{finished} of {len(cells)} cells are finished in {folder}; the same command continues"
            if isinstance(stop, TrainingInterrupted):
                raise TrainingInterrupted(f"{stop}. {message}", stop.signal) from None
            raise KeyboardInterrupt(f"interrupted: {message}") from None
        finally:
            bar.close()
        return book.records


def read_sweep(folder: str | Path) -> Record:
    """The content of a folder's sweep.json. Raises FileNotFoundError, or ValueError for one that cannot be used."""
    path = Path(folder) / FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); move it away, or give another folder") from error
    whole = isinstance(found, dict) and all(isinstance(found.get(name), dict) for name in ("data", "notes", "cells"))
    if not whole or found.get("format") != FORMAT:
        raise ValueError(f"{path} is no sweep in format {FORMAT}; move it away, or give another folder")
    return found


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points are on the Pareto front: no other is as low in both numbers and lower in one. NaN never is."""
    return [
        not (math.isnan(x) or math.isnan(y)) and not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)
        for x, y in points
    ]


def identity(source: ActivationSource) -> Record:
    """Identifies these activations, their order and their held-out rows: JSON-able.

    Raises ValueError if no rows are held out.
    """
    rows = source.held_out()
    if len(rows) == 0:
        raise ValueError("the activations have no held-out rows to measure the runs on; give a holdout above 0")
    targets = held_out_targets(source)
    first = [part[:IDENTITY_ROWS].float().cpu() for part in (rows, targets) if part is not None]
    some = torch.cat(first, dim=1).contiguous().numpy()
    place = {"epoch", "cursor"}
    return {
        **{name: value for name, value in source.state_dict().items() if name not in place},
        "d_in": source.d_in, "held_out": len(rows), "digest": hashlib.sha256(some.tobytes()).hexdigest()[:16],
    }  # fmt: skip


class _Book:
    """sweep.json of a folder. Raises RunDirError where it is of other activations."""

    def __init__(self, folder: Path, data: Record, notes: Mapping[str, Any] | None):
        self.folder = folder
        if (folder / FILE).exists():
            self.content = read_sweep(folder)
            found = differences(self.content["data"], data)
            if found and (folder / RUNS).exists():
                raise RunDirError(
                    f"{folder} holds a sweep over other activations: {'; '.join(found)}. Give these activations to "
                    "continue it, or another folder"
                )
        else:
            self.content = {"format": FORMAT, "cells": {}}
        made = {"fastsae": version(), "torch": torch.__version__}
        self.content |= {"made_with": made, "data": data, "notes": dict(notes or {})}
        write_json(folder / FILE, self.content)

    @property
    def records(self) -> dict[str, Record]:
        return self.content["cells"]

    def has(self, cell: Cell, source: ActivationSource, further: Further | None) -> bool:
        """Whether the cell is fully trained and measured. Raises RunDirError if its record has other settings."""
        record, run = self.records.get(cell.name), self.folder / RUNS / cell.name
        if record is None or "failed" in record or not run.is_dir():
            return False
        if found := differences(record["settings"], cell.settings(), cell.free()):
            raise other_settings(run, found)
        as_asked = further is None or _given(record.get(further.name, {}).get("asked")) == _given(further.asked)
        return record["step"] >= cell.config.total_steps(source.n_tokens) and as_asked

    def put(self, cell: Cell, record: Record) -> None:
        # As read back: tuples become lists.
        self.records[cell.name] = json.loads(json.dumps({**record, "settings": cell.settings()}))
        write_json(self.folder / FILE, self.content)


def _given(asked: Any) -> Any:
    """What was asked, as stored, without options that were left out: versions differ in their options."""
    asked = json.loads(json.dumps(asked))
    return {name: value for name, value in asked.items() if value is not None} if isinstance(asked, dict) else asked


def _head(cell: Cell) -> Record:
    return {"rule": cell.rule_name, "asked_l0": cell.asked_l0, "d_sae": cell.d_sae, "seed": cell.config.seed}


def _with_asked(further: Further) -> Measure:
    measure = further.open()
    return lambda sae: {"asked": further.asked, **measure(sae)}


def _newest_step(run: Path) -> int:
    found = list_checkpoints(run / "checkpoints")
    return step_of(found[-1]) if found else 0


def _shape(cell: Cell) -> tuple[str, int]:
    """A key for cells whose steps take about the same time."""
    return cell.rule_name, cell.d_sae


def _seconds_per_step(
    cells: Sequence[Cell], source: ActivationSource, folder: Path, records: Mapping[str, Record]
) -> dict[tuple[str, int], float]:
    """By shape: from a finished cell, or else from a few updates of the one with the largest L0."""
    found = {
        (record["rule"], record["d_sae"]): record["seconds"] / record["step"]
        for record in records.values() if record.get("step")
    }  # fmt: skip
    for cell in sorted(cells, key=lambda c: -c.asked_l0):
        if _shape(cell) not in found:
            trial = Trainer(
                cell.build(source.d_in, target_width(source)), source, cell.config, folder / RUNS / cell.name
            )
            found[_shape(cell)] = trial.seconds_per_step()
    return found
