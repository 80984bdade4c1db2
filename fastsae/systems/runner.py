"""Runs a system: its experiments in turn, each stored when done, then tables and pictures of all stored results."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastsae.atomic import lock_folder, replace_file
from fastsae.systems.results import Results

log = logging.getLogger("fastsae.systems")
TABLE = "table.md"


@dataclass(frozen=True)
class System:
    """A system's interface to `fastsae reproduce`.

    experiments   every experiment by name, in order; True: so small that all of them take seconds.
    settings      an experiment's settings as JSON; if they change, its stored record is out of date.
    ticks         how often an experiment calls `advance`.
    perform       runs one for these seeds; returns the record to store, and the data of its own pictures.
    draw_one      draws those pictures, from name, experiment, their data and the folder.
    draw_all      draws pictures of all stored records.
    tables        Markdown from the stored records.
    seeds         how many, where the user does not say.
    shortened     an experiment with at most so many steps; None: the system has no steps to choose.
    expected_seconds  about how long these experiments take with so many seeds, which is said before they start.
    finish        for a system that keeps files beside the results: called after `perform` with name, experiment, the
                  pictures' data and the folder; returns more for the record.
    """

    experiments: Callable[[bool], Mapping[str, Any]]
    settings: Callable[[Any], dict[str, Any]]
    ticks: Callable[[Any], int]
    perform: Callable[[Any, Sequence[int], Callable[[], object]], tuple[dict[str, Any], Any]]
    draw_one: Callable[[str, Any, Any, Path], None]
    draw_all: Callable[[Mapping[str, Any], Path], None]
    tables: Callable[[Mapping[str, Any]], str]
    seeds: int = 10
    shortened: Callable[[Any, int], Any] | None = None
    expected_seconds: Callable[[Sequence[Any], int], float] | None = None
    finish: Callable[[str, Any, Any, Path], dict[str, Any]] | None = None


def reproduce(
    name: str, system: System, folder: Path, *, seeds: int | None = None, steps: int | None = None, quick: bool = False,
    only: Sequence[str] = (), progress: bool = True, threads: int = 1,
) -> str:  # fmt: skip
    """Runs the experiments missing in `folder`, writes results.json, table.md and pictures there, returns the tables.

    seeds: None for the system's own number. steps: at most so many in every experiment, where the system has steps.
    only: these experiments, by name. threads: of the CPU; SAEs this small are slower with more than one.
    Raises ValueError for an unknown experiment, fewer than one seed, or steps of a system without them, and
    BlockingIOError if another process is writing there. KeyboardInterrupt loses only the current experiment.
    """
    experiments = system.experiments(quick)
    if unknown := [one for one in only if one not in experiments]:
        raise ValueError(f"no experiment {', '.join(map(repr, unknown))}; expected {', '.join(experiments)}")
    seeds = system.seeds if seeds is None else seeds
    if seeds < 1 or threads < 1:
        raise ValueError(f"seeds is {seeds} and threads {threads}, expected at least 1 of each")
    if steps is not None:
        if system.shortened is None or steps < 1:
            raise ValueError(f"steps is {steps}, expected {'none: they are fixed' if steps >= 1 else 'at least 1'}")
        experiments = {one: system.shortened(experiment, steps) for one, experiment in experiments.items()}
    chosen = list(dict.fromkeys(only)) or list(experiments)
    before = torch.get_num_threads()
    lock = _locked(folder)
    try:
        torch.set_num_threads(threads)
        results = Results(folder, name)
        settings = {one: {"seeds": seeds, **system.settings(experiments[one])} for one in chosen}
        missing = [one for one in chosen if not results.has(one, settings[one])]
        if len(missing) < len(chosen):
            log.info("%d of %d experiments are already in %s", len(chosen) - len(missing), len(chosen), folder)
        if missing and system.expected_seconds is not None:
            minutes = system.expected_seconds([experiments[one] for one in missing], seeds) / 60
            log.info(
                "%d experiments to do, about %.0f minutes at the speed this machine has now", len(missing), minutes
            )
        with tqdm(
            total=sum(system.ticks(experiments[one]) for one in missing), disable=not progress, unit="epoch"
        ) as bar:
            for one in missing:
                bar.set_description(one)
                start = time.perf_counter()
                record, shown = system.perform(experiments[one], range(seeds), bar.update)
                system.draw_one(one, experiments[one], shown, folder)
                if system.finish is not None:
                    record |= system.finish(one, experiments[one], shown, folder)
                record["seconds"] = round(time.perf_counter() - start, 1)
                results.put(one, settings[one], record, list(experiments))
        system.draw_all(results.experiments, folder)
        text = system.tables(results.experiments)
        replace_file(folder / TABLE, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
        return text
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what was done is in {folder}; the same command continues") from None
    finally:
        torch.set_num_threads(before)
        os.close(lock)


def _locked(folder: Path) -> int:
    try:
        return lock_folder(folder)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, f"{folder} is in use by {error.strerror}") from None
