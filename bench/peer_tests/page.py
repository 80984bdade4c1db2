"""The result of other libraries' tests as the table of docs/interop.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.machine import ROOT
from bench.peer_tests.libraries import explained, named
from bench.plot import table, with_numbers
from bench.results import FORMAT, RESULTS
from fastsae.atomic import replace_file, write_json

PAGE = ROOT / "docs" / "interop.md"
STORED = RESULTS / "peers" / "tests.json"
BEGIN, END = "<!-- peer tests: begin (python -m bench.peer_tests --draw) -->", "<!-- peer tests: end -->"
HEADER = ("library", "test file", "theirs", "ours", "through fastsae", "objects", "differences")


def read(path: Path = STORED) -> dict[str, Any]:
    """The libraries' entries. Raises ValueError for another format."""
    result: dict[str, Any] = json.loads(path.read_text())
    if result.get("format") != FORMAT:
        raise ValueError(f"{path} has format {result.get('format')!r}, expected {FORMAT}; run the tests again")
    return result["libraries"]


def store(found: dict[str, Any], path: Path = STORED) -> None:
    """Writes these libraries' entries beside those that were stored before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = read(path) if path.exists() else {}
    write_json(path, {"format": FORMAT, "libraries": dict(sorted({**kept, **found}.items()))})


def unexplained(found: dict[str, Any]) -> list[str]:
    """The differences without a reason in EXPLAINED."""
    return [
        f"{variable} {file}::{test}: {why}"
        for variable, entry in found.items()
        for file, its in entry["files"].items()
        for test, why in its["differs"].items()
        if explained(named(variable), f"{file}::{test}") is None
    ]


def _differences(variable: str, file: str, entry: dict[str, Any]) -> str:
    reasons: dict[str, list[str]] = {}
    for test, why in entry["differs"].items():
        reason = explained(named(variable), f"{file}::{test}") or f"not explained: {why}"
        reasons.setdefault(reason, []).append(test)
    told = [f"{len(tests)}: {reason}" for reason, tests in reasons.items()]
    told += [f"{way} was cut off ({why})" for way, why in entry["cut"].items()]
    if not entry["met"]:
        told.append("no op of fastsae runs" if entry["objects"] else "no object of an accelerated class")
    return "; ".join(told).replace("|", "\\|")


def shown(found: dict[str, Any]) -> str:
    """The results in Markdown: a row for each file in which a test can run, and below them what could not."""
    rows, left_out = [], []
    for variable, entry in found.items():
        name = f"{entry['distribution']} {entry['version']}"
        if entry["tests_of"] != entry["version"]:
            name += f", tests of {entry['tests_of']}"
        files = {file: its for file, its in entry["files"].items() if its["theirs"]}
        for file, its in files.items():
            counts = (its["theirs"], its["ours"], its["met"], sum(its["objects"].values()))
            rows.append([name, f"`{file}`", *map(str, counts), _differences(variable, file, its)])
        own = rows[len(rows) - len(files) :]
        rows.append([name, "all", *(str(sum(int(row[column]) for row in own)) for column in range(2, 6)), ""])
        missing = sum(len(its["not_run"]) for its in entry["files"].values())
        left_out.append(f"{missing} of {entry['distribution']}")
    adapted = [f"{named(one).distribution}: {'; '.join(its)}" for one in found if (its := named(one).adapted())]
    return (
        f"{table(HEADER, rows)}\n\nNot run here, either way: {', '.join(left_out)}. Changed for both ways: "
        f"{'. '.join(adapted) or 'nothing'}."
    )


def renew(stored: Path = STORED, page: Path = PAGE) -> None:
    """Puts the table between the page's markers."""
    text = with_numbers(page.read_text(), shown(read(stored)), BEGIN, END)
    replace_file(page, lambda partial: partial.write_text(text))
