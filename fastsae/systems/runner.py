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
    """

    experiments: Callable[[bool], Mapping[str, Any]]
    settings: Callable[[Any], dict[str, Any]]
    ticks: Callable[[Any], int]
    perform: Callable[[Any, Sequence[int], Callable[[], object]], tuple[dict[str, Any], Any]]
    draw_one: Callable[[str, Any, Any, Path], None]
    draw_all: Callable[[Mapping[str, Any], Path], None]
    tables: Callable[[Mapping[str, Any]], str]


def reproduce(
    name: str, system: System, folder: Path, *, seeds: int = 10, quick: bool = False, only: Sequence[str] = (),
    progress: bool = True, threads: int = 1,
) -> str:  # fmt: skip
    """Runs the experiments missing in `folder`, writes results.json, table.md and pictures there, returns the tables.

    only: these experiments, by name. threads: of the CPU; SAEs this small are slower with more than one.
    Raises ValueError for an unknown experiment or fewer than one seed, and BlockingIOError if another process is
    writing there. KeyboardInterrupt loses only the current experiment.
    """
    experiments = system.experiments(quick)
    if unknown := [one for one in only if one not in experiments]:
        raise ValueError(f"no experiment {', '.join(map(repr, unknown))}; expected {', '.join(experiments)}")
    if seeds < 1 or threads < 1:
        raise ValueError(f"seeds is {seeds} and threads {threads}, expected at least 1 of each")
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
        with tqdm(
            total=sum(system.ticks(experiments[one]) for one in missing), disable=not progress, unit="epoch"
        ) as bar:
            for one in missing:
                bar.set_description(one)
                start = time.perf_counter()
                record, shown = system.perform(experiments[one], range(seeds), bar.update)
                system.draw_one(one, experiments[one], shown, folder)
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
