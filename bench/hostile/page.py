"""What came of hostile cases: a table, bench/results/<device>/hostile.json, and the figures of docs/reliability.md."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench import machine
from bench.hostile.run import PARTS, Tally, again
from bench.plot import with_numbers
from bench.results import FORMAT
from fastsae.atomic import replace_file, write_json

PAGE = machine.ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- hostile: begin (python -m bench.hostile --draw) -->", "<!-- hostile: end -->"
HOSTILE = "hostile.json"
"""The result, in a device's folder."""
HEADER = ("part", "cases", "right", "refused", "wrong", "crashed", "kills")


def parts(found: dict[str, Tally]) -> dict[str, Tally]:
    """The tallies of the kinds, added up by part."""
    sums: dict[str, Tally] = {}
    for place, tally in found.items():
        sums.setdefault(place.split("/")[0], Tally()).add(tally)
    return sums


def _row(name: str, t: Tally) -> list[str]:
    counts = (t.cases, t.right, t.refused, len(t.wrong), len(t.crashed), t.kills)
    return [name, *(f"{n:,}" for n in counts)]


def line(name: str, tally: Tally) -> str:
    """One line of progress."""
    row = _row(name, tally)
    return f"{row[0]:14}" + ", ".join(f"{n} {what}" for n, what in zip(row[1:], HEADER[1:], strict=True))


def table(found: dict[str, Tally], what: str = "part") -> str:
    """In Markdown; of several rows with their sum."""
    total = Tally()
    for tally in found.values():
        total.add(tally)
    rows = [_row(name, tally) for name, tally in found.items()] + ([_row("all", total)] if len(found) > 1 else [])
    head = [[what, *HEADER[1:]], ["---"] + ["---:"] * (len(HEADER) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (*head, *rows))


def store(results: Path, found: dict[str, Tally], seed: int, minutes: float) -> Path:
    """Writes this device's file: what ran, where, and what came of each kind."""
    path = results / machine.device_folder() / HOSTILE
    kinds = {place: asdict(tally) for place, tally in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {
        "format": FORMAT, "machine": machine.describe(), "seed": seed, "minutes": round(minutes, 1), "kinds": kinds,
    })  # fmt: skip
    return path


def _section(path: Path) -> str:
    result: dict[str, Any] = json.loads(path.read_text())
    if result.get("format") != FORMAT:
        raise ValueError(f"{path} has format {result.get('format')!r}, expected {FORMAT}; run it again")
    found = {place: Tally(**tally) for place, tally in result["kinds"].items()}
    here = result["machine"]
    bad = [
        f"- {how}: `{again(place, result['seed'], number, None)}`"
        for place, tally in found.items()
        for how, cases in (("wrong", tally.wrong), ("crashed", tally.crashed))
        for number, _ in cases
    ]
    kills = sum(tally.kills for tally in found.values())
    lost = sum(len(t.wrong) + len(t.crashed) for place, t in found.items() if t.kills)
    of_kind = {name: {p.split("/")[1]: t for p, t in found.items() if p.split("/")[0] == name} for name in PARTS}
    return "\n\n".join([
        f"### {path.parent.name}",
        f"{result['minutes']:g} minutes, seed {result['seed']}, commit {here['commit']}, torch {here['torch']}, "
        f"{here['date'][:10]}. Kills: {kills:,}; runs and harvests lost by them: {lost:,}.",
        table(parts(found)),
        *([*bad] and ["\n".join(bad)]),
        *(f"{name}:\n\n{table(kinds, 'kind')}" for name, kinds in of_kind.items() if kinds),
    ])  # fmt: skip


def renew(results: Path, page: Path = PAGE) -> None:
    """Puts the stored results into the page."""
    text = "\n\n".join(_section(path) for path in sorted(results.glob(f"*/{HOSTILE}"))) or "There is no result yet."
    replace_file(page, partial(Path.write_text, data=with_numbers(page.read_text(), text, BEGIN, END)))
