"""Results of a system: one JSON file, replaced after every experiment, and tables made from it.

    {"format": 1, "system": ..., "made_with": {...}, "asked": {"quick": ..., "scale": {...}},
     "experiments": {name: {"settings": ..., "seconds": ..., ...}}}

A second run skips the experiments that are stored there, unless their settings have changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsae.atomic import write_json
from fastsae.runs.opening import version

FORMAT = 1
FILE = "results.json"


class Results:
    """The results file of `folder`. Raises ValueError for a file that another system or version wrote."""

    def __init__(self, folder: Path, system: str):
        self.path = folder / FILE
        self.data: dict[str, Any] = {
            "format": FORMAT, "system": system, "made_with": {}, "asked": {"quick": False, "scale": {}},
            "experiments": {},
        }  # fmt: skip
        if self.path.exists():
            self.data |= read(self.path, system)

    @property
    def experiments(self) -> dict[str, Any]:
        """Every stored record by name."""
        return self.data["experiments"]

    def has(self, name: str, settings: dict[str, Any]) -> bool:
        """Whether that experiment is stored with these settings."""
        # Through JSON, which turns tuples into lists.
        return self.experiments.get(name, {}).get("settings") == json.loads(json.dumps(settings))

    def put(self, name: str, settings: dict[str, Any], record: dict[str, Any], order: Sequence[str]) -> None:
        """Adds a record and writes the file, sorted by `order`. Raises OSError; the old file is then unchanged."""
        records = {**self.experiments, name: {"settings": settings, **record}}
        rank = {known: i for i, known in enumerate(order)}
        self.data["experiments"] = dict(sorted(records.items(), key=lambda item: rank.get(item[0], len(rank))))
        self.data["made_with"] = {"fastsae": version(), "torch": torch.__version__}
        write_json(self.path, self.data)

    def ask(self, quick: bool, scale: dict[str, int | str]) -> None:
        """Notes what the newest run was asked for, and writes the file if that is new. Raises OSError."""
        asked = {"quick": quick, "scale": scale}
        if self.data["asked"] != asked or not self.path.exists():
            self.data["asked"] = asked
            write_json(self.path, self.data)


def read(path: Path, system: str) -> dict[str, Any]:
    """A results file's content. Raises ValueError if it is damaged, or of another system or version."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); move it away, or choose another --out") from error
    if not isinstance(data, dict) or (data.get("format"), data.get("system")) != (FORMAT, system):
        raise ValueError(f"{path} holds no results of {system} in format {FORMAT}; choose another --out")
    return data


def key_of(settings: Any) -> str:
    """A name for what depends on these JSON-able settings, such as a file of a cache: 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Table:
    """A heading for each column and rows of as many texts: names in the first column, figures in the others.

    str() gives it as Markdown with aligned columns, figures to the right.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        cells = [list(self.header), *map(list, self.rows)]
        widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(self.header))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        padded = [
            [
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            for row in cells
        ]
        return "\n".join("| " + " | ".join(row) + " |" for row in (padded[0], rule, *padded[1:]))


def markdown(parts: Iterable[Table | str]) -> str:
    """Tables and paragraphs, one below the other."""
    return "\n\n".join(map(str, parts))


def rounded(value: float, digits: int) -> float | None:
    """A number for a record; None for NaN, which JSON has not: a share of what an ablation costs may be undefined."""
    return None if math.isnan(value) else round(value, digits)


def median(values: Sequence[float | None]) -> float:
    """The median of the values that are not None, of an even count the mean of the middle two; NaN of none."""
    known = [value for value in values if value is not None]
    return float(statistics.median(known)) if known else math.nan


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The second smallest and second largest. For ten seeds, they enclose the true median in 98 of 100 cases."""
    ordered = sorted(values)
    return (ordered[1], ordered[-2]) if len(ordered) > 3 else (ordered[0], ordered[-1])


def spread(values: Sequence[float | None], form: str) -> str:
    """The median, and the least and the largest where there are several; "-" where no value is defined."""
    known = [value for value in values if value is not None]
    between = f" [{min(known):{form}} – {max(known):{form}}]" if len(known) > 1 else ""
    return f"{median(known):{form}}{between}" if known else "-"
