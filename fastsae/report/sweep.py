"""A sweep's table, plot and page, made from its sweep.json."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fastsae.atomic import replace_file
from fastsae.report.drawing import Group, Plot, front_plot, side_by_side
from fastsae.report.html import style
from fastsae.report.page import Tile, fill, footer, settings_groups
from fastsae.report.runlog import Record, column, is_number
from fastsae.runs.logs import duration
from fastsae.runs.sweep import pareto, read_sweep
from fastsae.systems.results import Table

TABLE, PLOT, PAGE = "table.md", "pareto.svg", "sweep.html"
HEADER = ("rule", "latents", "asked L0", "seed", "L0", "FVU", "explained", "cosine", "dead", "seconds")
SPLICED_HEADER = ("CE", "CE rise", "recovered")
FRONT = "front"


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell as text; best: no other is as low in L0 and FVU and lower in one. href: its report, or its folder."""

    cells: list[str]
    best: bool
    href: str


@dataclasses.dataclass(frozen=True)
class Cells:
    """The table of all cells."""

    lead: str
    header: list[str]
    rows: list[Row]


def write_sweep(folder: str | Path) -> str:
    """Writes table.md, pareto.svg and sweep.html of the finished cells into a sweep's folder; returns the table.

    Each file is replaced in one step. Raises as `read_sweep`, and OSError.
    """
    folder = Path(folder)
    content = read_sweep(folder)
    records = ordered(content["cells"])
    cells, plots = cells_of(records, folder), plots_of(records)
    text = str(Table(cells.header, [row.cells for row in cells.rows]))
    files = {TABLE: text + "\n", PAGE: page(folder.resolve().name, content, cells, plots)}
    if plots:
        files[PLOT] = side_by_side(plots, style())
    for name, written in files.items():
        replace_file(folder / name, functools.partial(Path.write_text, data=written, encoding="utf-8"))
    return text


def ordered(records: dict[str, Record]) -> list[Record]:
    """By rule, as they first come, then size, L0 asked for and seed."""
    rules = list(dict.fromkeys(record["rule"] for record in records.values()))
    return sorted(
        records.values(), key=lambda r: (rules.index(r["rule"]), r["d_sae"], r["asked_l0"], r["seed"])
    )  # fmt: skip


def front(records: Sequence[Record], y: Sequence[float | None]) -> list[bool]:
    """`pareto` of the records' measured L0 and y; a record with a missing number is not on the front."""
    nan = float("nan")
    return pareto([(_or(record.get("l0"), nan), _or(value, nan)) for record, value in zip(records, y, strict=True)])


def cells_of(records: Sequence[Record], folder: Path) -> Cells:
    """The table of these records; columns of a language model where any was measured in one."""
    spliced = any("spliced" in record for record in records)
    rows = []
    for record, best in zip(records, front(records, [record.get("fvu") for record in records]), strict=True):
        cells = [
            record["rule"], str(record["d_sae"]), f"{record['asked_l0']:g}", str(record["seed"]),
            "failed" if "failed" in record else _shown(record.get("l0"), ".2f"), _shown(record.get("fvu"), ".4f"),
            _shown(record.get("explained_variance"), ".4f"), _shown(record.get("cosine"), ".4f"),
            _shown(record.get("dead_share"), ".1%"), _shown(record.get("seconds"), ",.0f"),
        ]  # fmt: skip
        if spliced:
            loss = record.get("spliced", {})
            cells += [
                _shown(loss.get("ce_spliced"), ".4f"), _shown(_rise(loss), "+.4f"),
                _shown(loss.get("recovered_over_mean"), ".4f"),
            ]  # fmt: skip
        run = Path(record["run"])
        report = run / "report.html"
        href = quote(str(report)) if (folder / report).is_file() else f"{quote(str(run))}/"
        rows.append(Row([*cells, "●" if best else ""], best, href))
    lead = "On held-out rows. ●: no other cell is as low in L0 and FVU, and lower in one of them. "
    if spliced:
        lead += (
            "CE: cross-entropy of the language model with the reconstruction in place of its activations, in nats; "
            "rise: over the untouched model; recovered: the share of what mean ablation costs, – where the "
            "predictions do not show that it costs anything. "
        )
    lead += "Links lead to a cell's report, where `fastsae report` has written one, or else to its run folder."
    return Cells(lead, [*HEADER, *(SPLICED_HEADER if spliced else ()), FRONT], rows)


def plots_of(records: Sequence[Record]) -> list[Plot]:
    """FVU against measured L0 and, if measured, the cross-entropy in the language model."""
    caption = "A point for each cell, lines through the means over seeds. Rings: no other is as low in both."
    spliced = [record.get("spliced", {}) for record in records]
    ce = [loss.get("ce_spliced") for loss in spliced]
    untouched = column(spliced, "ce_untouched", "ce_untouched")[1]
    xlabel = "active latents per token (L0), measured"
    found = [
        front_plot("fvu", "FVU against L0", caption, groups_of(records, [record.get("fvu") for record in records]),
                   xlabel=xlabel, ylabel="FVU"),
        front_plot("ce", "Cross-entropy against L0", caption, groups_of(records, ce), xlabel=xlabel,
                   ylabel="cross-entropy, nats", level=("untouched model", untouched[0]) if untouched else None),
    ]  # fmt: skip
    return [plot for plot in found if plot is not None]


def groups_of(records: Sequence[Record], y: Sequence[float | None]) -> list[Group]:
    """A group for each rule and size, its line through the means over seeds of each L0 asked for."""
    found: dict[tuple[str, int], list[tuple[float, float, float, bool]]] = {}
    for record, value, best in zip(records, y, front(records, y), strict=True):
        if is_number(record.get("l0")) and is_number(value):
            found.setdefault((record["rule"], record["d_sae"]), []).append(
                (record["asked_l0"], record["l0"], float(value), best)  # type: ignore[arg-type]
            )
    groups = []
    for (rule, d_sae), points in found.items():
        asked = sorted({point[0] for point in points})
        same = [[point for point in points if point[0] == l0] for l0 in asked]
        line = [(statistics.mean(p[1] for p in of), statistics.mean(p[2] for p in of)) for of in same]
        shown = [(x, value) for _, x, value, _ in points]
        groups.append(Group(rule, f"{d_sae:,} latents", shown, [point[3] for point in points], line))
    return groups


def page(title: str, content: Record, cells: Cells, plots: list[Plot]) -> str:
    """The page's HTML."""
    records = ordered(content["cells"])
    trained = [record for record in records if "failed" not in record]
    notes = [f"{Path(r['run']).name} failed: {r['failed']}" for r in records if "failed" in r]
    best = min((r for r in trained if is_number(r["fvu"])), key=lambda r: r["fvu"], default=None)
    tiles = [
        Tile("Cells", f"{len(trained):,}", f"{sum(row.best for row in cells.rows)} of them not beaten"),
        Tile("Trained for", duration(sum(r["seconds"] for r in trained)), "all cells together"),
    ]
    if best is not None:
        tiles.append(Tile("Lowest FVU", f"{best['fvu']:.4f}", f"{best['rule']} at L0 {best['l0']:.1f}"))
    rules = ", ".join(dict.fromkeys(r["rule"] for r in records))
    values = {name: sorted({r[name] for r in records}) for name in ("d_sae", "asked_l0", "seed")}
    shared: dict[str, Any] = {
        "grid": {"rule": rules, **{k: ", ".join(f"{v:g}" for v in vs) for k, vs in values.items()}}
    }
    if records:
        own = {"seed", "d_sae", "activation"}
        shared |= {
            section: {k: v for k, v in settings.items() if k not in own}
            for section, settings in records[0]["settings"].items()
        }
    shared |= {"activations": {**content["notes"].get("data", {}), **content["data"]}}
    return fill(
        kind="fastsae sweep", title=title,
        subtitle=f"{rules} · {content['data']['held_out']:,} held-out rows",
        notes=notes, tiles=tiles, heading="Pareto front", plots=plots, wide=True, cells=cells,
        settings=settings_groups(shared), footer=footer(content["made_with"]["torch"]),
    )  # fmt: skip


def _rise(loss: Record) -> float | None:
    spliced, untouched = loss.get("ce_spliced"), loss.get("ce_untouched")
    return None if spliced is None or untouched is None else spliced - untouched


def _or(value: float | None, other: float) -> float:
    return other if value is None else value


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
