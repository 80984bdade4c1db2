"""results.csv and summary.md, made from the result files and nothing else.

The rows are made here, the summary in sections.py and the plots in draw.py.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from bench.cases import Case
from bench.gpu import sections, targets
from bench.gpu.cost import Ceilings, figures
from bench.gpu.plan import CASES
from bench.gpu.store import Store
from fastsae.atomic import replace_file

COLUMNS = (
    "job", "item", "backend", "part", "status", "case", "N", "D", "M", "K", "distribution", "ms", "p20", "p80", "runs",
    "tokens_per_s", "gbs", "tflops", "floor_ms", "share_of_floor", "extra_peak_mb", "redone_share", "worst_of_bound",
    "nnz", "passed", "error", "device", "torch", "triton", "commit", "date",
)  # fmt: skip
BY_PART = {"encode": "encode_topk", "decode": "decode", "update": "update_latents_"}
"""A part of the step and the op whose cost it has; the update sorts by latent first, which costs little."""
Results = Mapping[str, Mapping[str, Any]]


def case_of(job: str, content: Mapping[str, Any], item: str, size: str) -> Case | None:
    if job.startswith("sweep-"):
        return CASES[size].get(item)
    return Case(**content["case"]) if content.get("case") else None


def times_of(item: str, entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{part: its times} of one item."""
    found = {part: entry[part] for part in ("time", "host", "step", "encode") if part in entry}
    return found | {f"part {name}": times for name, times in entry.get("parts", {}).items()}


def cost_name(job: str, item: str, part: str) -> str:
    """The name under which cost.py knows what was timed; "" for what is not counted."""
    sweep = job.startswith("sweep-")
    if part == "time":  # "<op> <layout>" of a job of codes; encode_topk of some rows is not counted
        return item.split()[0].removesuffix("_regrouped") if job.startswith("codes-") else item
    if part == "step":
        return "fastsae" if sweep or item.startswith("fastsae") else item
    if part == "encode":
        return "encode_topk" if sweep or item.startswith("fastsae") else ""
    return BY_PART.get(part.removeprefix("part "), "")


def rows(results: Results, machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Everything as flat rows: one for each time, and one for each item that has none."""
    ceilings = Ceilings.of(targets.items(results, "ceilings"))
    about = {name: machine.get(name) for name in ("device", "torch", "triton", "commit", "date")}
    flat = []
    for job, content in results.items():
        for item, entry in content["items"].items():
            case = case_of(job, content, item, machine["size"])
            backend = content["job"].get("backend")
            row = {
                "job": job,
                "item": item,
                "backend": backend,
                "status": entry["status"],
                "error": entry.get("error"),
                **about,
            }
            row |= {name: entry.get(name) for name in ("worst_of_bound", "nnz", "passed", "redone_share")}
            if entry.get("extra_peak_bytes") is not None:
                row["extra_peak_mb"] = round(entry["extra_peak_bytes"] / 1e6, 1)
            if case is not None:
                row |= {"case": case.name, "distribution": case.distribution}
                row |= {"N": case.N, "D": case.D, "M": case.M, "K": case.K}
            times = times_of(item, entry)
            for part, time in times.items():
                counted = {}
                if case is not None:
                    counted = figures(cost_name(job, item, part), case, time["ms"], ceilings, entry.get("nnz"))
                flat.append(row | {"part": part} | dict(time) | {k: rounded(v) for k, v in counted.items()})
            if not times:
                flat.append(row | {"part": ""})
    return flat


def rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.5g}")


def as_csv(flat: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def write(store: Store, plots: bool = True) -> None:
    """All outputs again, or all but the plots. Raises nothing where a package is missing: the summary says so then."""
    results = store.everything()
    flat = rows(results, store.machine)
    lack = ""
    if plots:
        try:
            from bench.gpu import draw
        except ImportError as error:
            lack = f"\nNo plots: {error}.\n"
        else:
            draw.draw(flat, targets.items(results, "ceilings"), store.out)
    drawn = [path.stem for path in sorted(store.out.glob("*.svg"))]
    text = sections.summary(results, store.machine, flat, drawn) + lack
    for name, content in (("results.csv", as_csv(flat)), ("summary.md", text)):
        replace_file(store.out / name, lambda partial, content=content: partial.write_text(content))  # type: ignore[misc]
