"""The page of a system in one HTML file: what it is, its tables and pictures, how to run it, and what is not known."""

from __future__ import annotations

import base64
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsae.report import html
from fastsae.runs.logs import duration
from fastsae.systems.results import Table

PAGE = "page.html"
Records = Mapping[str, Any]


@dataclass(frozen=True)
class About:
    """A system in words: for its page, docs/systems/ and the README. Plain text throughout.

    title       heading.
    sources     publications and public code by name, each with its address.
    claim       what they claim, in a sentence or two.
    here        what runs here, in a paragraph: data, model, scale, and how the recipes differ from the published one.
    pictures    the caption of every picture by file name, in the page's order. The README shows the first.
    unverified  what no source says or nobody has checked, a sentence each.
    result      what came out, in a sentence or two with figures of the stored records; "" if they do not suffice.
    """

    title: str
    sources: Mapping[str, str]
    claim: str
    here: str
    pictures: Mapping[str, str]
    unverified: Sequence[str]
    result: Callable[[Records], str]


@dataclass(frozen=True)
class Run:
    """The run behind stored records.

    name, seeds   of the system; seeds: how many, where the user does not say.
    quick, scale  what the newest run asked for; scale: the changed sizes.
    experiments   every experiment of such a run.
    stale         stored experiments whose settings differ from those asked for.
    to_come       about how many seconds those that are not stored take on one core; None: not known.
    """

    name: str
    seeds: int
    quick: bool
    scale: Mapping[str, int | str]
    records: Records
    experiments: Sequence[str]
    stale: Sequence[str]
    made_with: Mapping[str, str]
    to_come: float | None

    @property
    def missing(self) -> list[str]:
        return [name for name in self.experiments if name not in self.records]

    @property
    def command(self) -> str:
        """The command line that gives these records."""
        words = ["fastsae", "reproduce", self.name, *(["--quick"] if self.quick else [])]
        if self.scale:
            words += ["--scale", *(f"{size}={value}" for size, value in self.scale.items())]
        seeds = {record["settings"]["seeds"] for record in self.records.values()}
        if len(seeds) == 1 and seeds != {self.seeds}:
            words += ["--seeds", str(*seeds)]
        if self.missing and self.records:
            words += ["--experiments", *self.records]
        return shlex.join(words)

    @property
    def took(self) -> str:
        """How long the stored experiments took together."""
        return duration(sum(record["seconds"] for record in self.records.values()))

    @property
    def notes(self) -> list[tuple[str, Sequence[str]]]:
        """What a reader must know before any figure, each with the experiments that it is about."""
        found: list[tuple[str, Sequence[str]]] = []
        if self.quick:
            found.append(("A quick run: so small that its figures mean nothing.", ()))
        if self.missing:
            total = len(self.experiments)
            done = total - len(self.missing)
            more = f", which would take about {duration(self.to_come)} on one core" if self.to_come else ""
            found.append(
                (
                    f"A part: {done} of {total} experiments were run. Missing{more}:",
                    grouped(self.missing, self.experiments),
                )
            )
        if self.stale:
            found.append(("Run with other settings than the rest:", self.stale))
        return found


def grouped(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names; but more than three that begin with `grid-` as `grid-*`, or `grid-* (4 of 9)` if there are others."""
    starts = {name: name.partition("-")[0] + "-" for name in known}
    found: dict[str, None] = {}
    for name in names:
        start = starts[name]
        here, all_of_them = ([one for one in some if starts[one] == start] for some in (names, known))
        part = "" if len(here) == len(all_of_them) else f" ({len(here)} of {len(all_of_them)})"
        found[f"{start}*{part}" if len(here) > 3 else name] = None
    return list(found)


def render(about: About, tables: Sequence[Table | str], run: Run, folder: Path) -> str:
    """The page's HTML, with those pictures that are in `folder`. The same records and pictures give the same page."""
    pictures = [
        {"data": base64.b64encode((folder / name).read_bytes()).decode(), "caption": caption}
        for name, caption in about.pictures.items()
        if (folder / name).exists()
    ]
    return html.render(
        "fastsae.systems",
        "page.html",
        title=about.title,
        about=about,
        run=run,
        result=about.result(run.records),
        tables=tables,
        pictures=pictures,
        settings=_settings(run.records) if run.records else [],
        footer="Made with " + ", ".join(f"{name} {version}" for name, version in run.made_with.items()) + ".",
    )


def _settings(records: Records) -> list[html.SettingsGroup]:
    """The most frequent value of every setting; then each experiment's time, and where it differs."""
    each = {name: dict(html.flat(record["settings"])) for name, record in records.items()}
    keys = dict.fromkeys(key for one in each.values() for key in one)
    usual = {key: Counter(one[key] for one in each.values() if key in one).most_common(1)[0][0] for key in keys}
    rows = []
    for name, one in each.items():
        other = [f"{key} = {value}" for key, value in one.items() if value != usual[key]]
        rows.append((name, ", ".join([f"{records[name]['seconds']:,.1f} s", *other])))
    return [
        html.SettingsGroup("every experiment, where the next list says nothing else", list(usual.items())),
        html.SettingsGroup("each experiment's time, and what differs", rows),
    ]
