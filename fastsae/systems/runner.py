"""Runs a system: its experiments in turn, each stored when done, then tables, pictures and page of all that is stored.

A new system is a package in fastsae/systems/ with a `SYSTEM` of the class below, listed in `SYSTEMS` (__init__.py) and
in pyproject.toml. `python -m bench.systems` then shows its stored results in docs/systems/ and in the README.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastsae.atomic import lock_folder, replace_file
from fastsae.progress import bar
from fastsae.runs.logs import duration
from fastsae.systems.page import PAGE, About, Run, render
from fastsae.systems.results import Results, Table, markdown

log = logging.getLogger("fastsae.systems")
TABLE = "table.md"


@dataclass(frozen=True)
class System:
    """A system's interface to `fastsae reproduce`. A record is what `perform` returned, with "settings" and "seconds".

    about         the system in words, captions of its pictures, and a sentence on its result; see `About`.
    experiments   every experiment by name, in order; True: so small that all of them take seconds. By keyword, what
                  changes in `scale`.
    perform       runs one for these seeds; returns the record to store, and the data of its own pictures. It may keep
                  files in the folder, in its subfolder "cache", for other experiments and runs.
    draw_all      draws pictures of all stored records. `about.pictures` has a caption for every file drawn.
    tables        tables and paragraphs from the stored records, published figures beside ours: for table.md, the page
                  and docs/systems/. Must cope with any part of the experiments.
    draw_one      draws an experiment's own pictures, from name, experiment, their data and the folder.
    settings      an experiment's settings as JSON; if they change, its stored record is out of date.
    ticks         how often an experiment calls `advance`, for so many seeds.
    unit          what a call of `advance` stands for.
    seeds         how many, where the user does not say.
    scale         the sizes that a user may change, by name, and what they are otherwise.
    seconds       about how long an experiment takes on one core, for so many seeds; None: not known.
    lacking       what has to be installed for an experiment, in one line; None: nothing.
    """

    about: About
    experiments: Callable[..., Mapping[str, Any]]
    perform: Callable[[Any, Sequence[int], Callable[[], object], Path], tuple[dict[str, Any], Any]]
    draw_all: Callable[[Mapping[str, Any], Path], None]
    tables: Callable[[Mapping[str, Any]], Sequence[Table | str]]
    draw_one: Callable[[str, Any, Any, Path], None] = lambda name, experiment, shown, folder: None
    settings: Callable[[Any], dict[str, Any]] = lambda experiment: experiment.settings
    ticks: Callable[[Any, int], int] = lambda experiment, seeds: experiment.steps(seeds)
    unit: str = "epoch"
    seeds: int = 10
    scale: Mapping[str, int | str] = field(default_factory=dict)
    seconds: Callable[[Any, int], float] | None = None
    lacking: Callable[[Any], str | None] = lambda experiment: None


def reproduce(
    name: str, system: System, folder: Path, *, seeds: int | None = None, quick: bool = False,
    only: Sequence[str] = (), scale: Mapping[str, int | str] | None = None, progress: bool = True, threads: int = 1,
) -> str:  # fmt: skip
    """Runs the experiments missing in `folder`; writes results.json, table.md, page.html and pictures; returns tables.

    only: these experiments, by name. scale: changes of the system's `scale`. threads: of the CPU; SAEs this small are
    slower with more than one.
    Experiments that lack something are left out, with a warning at the start and, after the others, a ValueError.
    Raises ValueError for an unknown experiment or size or fewer than one seed, and BlockingIOError if another process
    is writing there. KeyboardInterrupt loses only the current experiment.
    """
    if unknown := [one for one in scale or {} if one not in system.scale]:
        known = f"expected {', '.join(system.scale)}" if system.scale else "its scale is fixed"
        raise ValueError(f"{name} has no size {', '.join(map(repr, unknown))}; {known}")
    for one, value in (scale or {}).items():
        if type(value) is not type(system.scale[one]):
            wanted = "a whole number" if isinstance(system.scale[one], int) else "a name"
            raise ValueError(f"{name}: {one} is {value!r}, expected {wanted}, such as {system.scale[one]!r}")
    experiments = system.experiments(quick, **(scale or {}))
    seeds = system.seeds if seeds is None else seeds
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
        results.ask(quick, dict(scale or {}))
        settings = {one: {"seeds": seeds, **system.settings(experiments[one])} for one in chosen}
        missing = [one for one in chosen if not results.has(one, settings[one])]
        if len(missing) < len(chosen):
            log.info("%d of %d experiments are already in %s", len(chosen) - len(missing), len(chosen), folder)
        lacking = {one: reason for one in missing if (reason := system.lacking(experiments[one]))}
        missing = [one for one in missing if one not in lacking]
        if len(lacking) == len(chosen):
            raise ValueError(lacking[chosen[0]])
        if lacking:
            left_out = f"{len(lacking)} of {len(chosen)} experiments are left out: {next(iter(lacking.values()))}"
            log.warning("%s", left_out)
        if system.seconds is not None and missing:
            expected = sum(system.seconds(experiments[one], seeds) for one in missing)
            log.info("%d experiments, about %s on one core", len(missing), duration(expected))
        total = sum(system.ticks(experiments[one], seeds) for one in missing)
        with bar(total, system.unit, progress) as ticks:
            for one in missing:
                ticks.set_description(one)
                start = time.perf_counter()
                record, shown = system.perform(experiments[one], range(seeds), ticks.update, folder)
                system.draw_one(one, experiments[one], shown, folder)
                record["seconds"] = round(time.perf_counter() - start, 1)
                results.put(one, settings[one], record, list(experiments))
        system.draw_all(results.experiments, folder)
        text = publish(name, system, results)
        if lacking:
            raise ValueError(f"{left_out}. The others are in {folder / TABLE}")
        return text
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; what was done is in {folder}; the same command continues") from None
    finally:
        torch.set_num_threads(before)
        os.close(lock)


def publish(name: str, system: System, results: Results) -> str:
    """Writes table.md and page.html from stored records and pictures; returns the tables as Markdown."""
    folder, tables = results.path.parent, system.tables(results.experiments)
    text, page = markdown(tables), render(system.about, tables, stored_run(name, system, results), folder)
    replace_file(folder / TABLE, lambda partial: partial.write_text(text + "\n", encoding="utf-8"))
    replace_file(folder / PAGE, lambda partial: partial.write_text(page, encoding="utf-8"))
    return text


def stored_run(name: str, system: System, results: Results) -> Run:
    """What the page says of the run behind these results."""
    asked, records = results.data["asked"], results.experiments
    experiments = system.experiments(asked["quick"], **asked["scale"])
    to_come = None
    if system.seconds is not None:
        to_come = sum(system.seconds(experiments[one], system.seeds) for one in experiments if one not in records)
    stale = [
        one
        for one, record in records.items()
        if one not in experiments
        or not results.has(one, {"seeds": record["settings"]["seeds"], **system.settings(experiments[one])})
    ]
    return Run(
        name, system.seeds, asked["quick"], asked["scale"], records, list(experiments), stale,
        results.data["made_with"], to_come,
    )  # fmt: skip


def _locked(folder: Path) -> int:
    try:
        return lock_folder(folder)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, f"{folder} is in use by {error.strerror}") from None
