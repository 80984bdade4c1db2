"""Result files: bench/results/<device>/<case>.json, one for each case, and one steps.csv over all of them.

A case's file is written when the case is done, so a run that is stopped keeps what it has measured.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from fastsae.atomic import replace_file

RESULTS = Path(__file__).parent / "results"
FORMAT = 1
COLUMNS = (
    "case", "N", "D", "M", "K", "distribution", "weights", "contestant", "part", "ms", "p20", "p80", "runs",
    "tokens_per_s", "share_of_floor", "extra_peak_mb", "redone_share", "times_fastsae", "device", "isa", "threads",
    "torch", "commit", "date",
)  # fmt: skip


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """A result file as flat rows, one for each contestant and part; columns as in COLUMNS."""
    case, machine, floor = result["case"], result["machine"], result["floors"]["floor_ms"]
    flat = []
    for name, contestant in result["contestants"].items():
        for part, time in contestant["parts"].items():
            ours = result["contestants"].get("fastsae", {}).get("parts", {}).get(part)
            peak = contestant.get("extra_peak_bytes")
            flat.append(
                {
                    **{key: case[key] for key in ("N", "D", "M", "K", "distribution", "weights")},
                    "case": case["name"],
                    "contestant": name,
                    "part": part,
                    **{key: round(time[key], 4) for key in ("ms", "p20", "p80")},
                    "runs": time["runs"],
                    "tokens_per_s": round(case["N"] / time["ms"] * 1e3) if part == "step" else None,
                    "share_of_floor": round(floor[part] / time["ms"], 4) if part in floor else None,
                    "extra_peak_mb": round(peak / 1e6, 1) if peak is not None and part == "step" else None,
                    "redone_share": contestant.get("redone_share") if part == "step" else None,
                    "times_fastsae": round(time["ms"] / ours["ms"], 3) if ours else None,
                    "isa": result["isa"],
                    **{key: machine[key] for key in ("device", "threads", "torch", "commit", "date")},
                }
            )
    return flat


def write(folder: Path, result: dict[str, Any]) -> Path:
    """Writes one case's JSON and renews steps.csv beside it. Returns the JSON's path."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = "" if result["isa"] == "best" else f"@{result['isa']}"
    path = folder / f"{result['case']['name']}{suffix}.json"
    text = json.dumps({"format": FORMAT, **result}, indent=1, allow_nan=False) + "\n"
    replace_file(path, lambda partial: partial.write_text(text))
    write_csv(folder)
    return path


def read(folder: Path) -> list[dict[str, Any]]:
    """The cases in a device's folder, by name; other benchmarks' files hold none. Raises ValueError for old formats."""
    found = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if "case" not in result:
            continue
        if result.get("format") != FORMAT:
            raise ValueError(f"{path} has format {result.get('format')!r}, expected {FORMAT}; measure it again")
        found.append(result)
    return found


def write_csv(folder: Path) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in read(folder):
        writer.writerows(rows(result))
    replace_file(folder / "steps.csv", lambda partial: partial.write_text(text.getvalue()))
