"""`python -m bench.gpu.choices`: writes fastsae/backends/choices.json, which says which GPU backend an op tries first.

The timings come from the newest run of `python -m bench.gpu` under bench/results/<device>/gpu, on this or another
machine, where it has both backends; the big case goes before the small one. A line that the run does not have, and
every line while there is no run, holds the bytes that each backend's kernels move (moved.py). "source" says which.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu import moved
from bench.gpu.plan import BIG
from bench.gpu.store import Store
from bench.results import RESULTS
from fastsae.atomic import replace_file
from fastsae.backends import choice

TARGET = Path(choice.__file__).with_name("choices.json")
CASES = ("big", "small")
Results = Mapping[str, Mapping[str, Any]]


def items_of(op: str, kind: str) -> tuple[str, tuple[str, ...]]:
    """The kind of job, and the items of it that are added up for a line."""
    if kind == "ragged":  # even and uneven ones
        return "codes", (f"{op} ragged", f"{op} heavy")
    return "ops", (f"{op} rows" if kind == "rows" else op,)


def timed(results: Results, op: str, kind: str) -> dict[str, float] | None:
    """Milliseconds of both backends, or None where one of them has no time for an item."""
    job, items = items_of(op, kind)
    for case in CASES:
        found = {}
        for backend in moved.BACKENDS:
            entries = results.get(f"{job}-{case}-{backend}", {}).get("items", {})
            times = [entries[item]["time"]["ms"] for item in items if "time" in entries.get(item, {})]
            if len(times) == len(items):
                found[backend] = float(f"{sum(times):.4g}")
        if len(found) == len(moved.BACKENDS):
            return found
    return None


def in_gigabytes(op: str, kind: str) -> dict[str, float]:
    return {backend: float(f"{moved.of(backend, op, kind, BIG) / 1e9:.4g}") for backend in moved.BACKENDS}


def runs(root: Path) -> list[tuple[dict[str, Any], Results]]:
    """(machine, results) of every whole run under bench/results, newest first."""
    stores = [Store.found(path.parent) for path in root.glob("*/gpu/machine.json")]
    kept = [store for store in stores if store.machine.get("size") == "full" and not store.machine.get("plant")]
    kept.sort(key=lambda store: str(store.machine["date"]), reverse=True)
    return [(store.machine, store.everything()) for store in kept]


def table(root: Path) -> dict[str, Any]:
    """choices.json, from the newest run that has a time of both backends for anything."""
    bytes_of = f"bytes moved at N={BIG.N} D={BIG.D} M={BIG.M} K={BIG.K} (bench/gpu/moved.py)"
    for machine, results in runs(root):
        times = {line: timed(results, *line) for line in moved.KINDS}
        if not any(times.values()):
            continue
        source = f"measured on {machine['device']}, commit {machine['commit'] or 'unknown'}, {machine['date']}"
        if not all(times.values()):
            source += f"; a line in GB was not measured there: {bytes_of}"
        lines = [
            {"op": op, "kind": kind, "cost": cost} if cost
            else {"op": op, "kind": kind, "cost": in_gigabytes(op, kind), "unit": "GB"}
            for (op, kind), cost in times.items()
        ]  # fmt: skip
        return {"source": source, "unit": "ms", "lines": lines}
    lines = [{"op": op, "kind": kind, "cost": in_gigabytes(op, kind)} for op, kind in moved.KINDS]
    return {
        "source": f"{bytes_of}; nothing has been measured yet, and cuda first where they are equal is a guess",
        "unit": "GB",
        "lines": lines,
    }


def text(content: Mapping[str, Any]) -> str:
    """As JSON, a line to a line."""
    lines = ",\n".join(f"  {json.dumps(line)}" for line in content["lines"])
    source, unit = json.dumps(content["source"], ensure_ascii=False), json.dumps(content["unit"])
    return f'{{\n "source": {source},\n "unit": {unit},\n "lines": [\n{lines}\n ]\n}}\n'


def main(arguments: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.gpu.choices", description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="default: bench/results")
    p.add_argument("--out", type=Path, default=TARGET, metavar="FILE", help="default: fastsae/backends/choices.json")
    options = p.parse_args(arguments)
    content = table(options.results)
    replace_file(options.out, lambda partial: partial.write_text(text(content)))
    print(f"{options.out}: {content['source']}")
    for line in content["lines"]:
        cuda, triton = (line["cost"][backend] for backend in moved.BACKENDS)
        first = "triton" if triton < cuda else "cuda"
        print(f"{line['op']:18} {line['kind']:7} cuda {cuda:<9g} triton {triton:<9g} {first} first")
    return 0


if __name__ == "__main__":
    sys.exit(main())
