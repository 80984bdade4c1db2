"""results.csv and summary.md, made from the result files and nothing else; draw.py makes the plots beside them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from bench.cases import Case
from bench.gpu import targets
from bench.gpu.cost import Ceilings, figures
from bench.gpu.plan import CASES
from bench.gpu.store import FOUND_WRONG, Store
from fastsae.files import replace_file

COLUMNS = (
    "job", "item", "part", "status", "case", "N", "D", "M", "K", "distribution", "ms", "p20", "p80", "runs",
    "tokens_per_s", "gbs", "tflops", "floor_ms", "share_of_floor", "extra_peak_mb", "redone_share", "worst_of_bound",
    "nnz", "passed", "error", "device", "torch", "triton", "commit", "date",
)  # fmt: skip
TIMED = ("ops", "steps", "more-steps", "sweep")
BY_PART = {"encode": "encode_topk", "decode": "decode", "update": "update_latents_"}
"""A part of the step and the op whose cost it has; the update sorts by latent first, which costs little."""
Results = Mapping[str, Mapping[str, Any]]


def case_of(job: str, content: Mapping[str, Any], item: str, size: str) -> Case | None:
    if job == "sweep":
        return CASES[size].get(item)
    return Case(**content["case"]) if content.get("case") else None


def times_of(item: str, entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{part: its times} of one item."""
    found = {part: entry[part] for part in ("time", "step", "encode") if part in entry}
    return found | {f"part {name}": times for name, times in entry.get("parts", {}).items()}


def cost_name(job: str, item: str, part: str) -> str:
    """The name under which cost.py knows what was timed; "" for what is not counted."""
    if part == "time":
        return item
    if part == "step":
        return "fastsae" if job == "sweep" or item.startswith("fastsae") else item
    if part == "encode":
        return "encode_topk" if job == "sweep" or item.startswith("fastsae") else ""
    return BY_PART.get(part.removeprefix("part "), "")


def rows(results: Results, machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Everything as flat rows: one for each time, and one for each item that has none."""
    ceilings = Ceilings.of(targets.items(results, "ceilings"))
    about = {name: machine.get(name) for name in ("device", "torch", "triton", "commit", "date")}
    flat = []
    for job, content in results.items():
        for item, entry in content["items"].items():
            case = case_of(job, content, item, machine["size"])
            row = {"job": job, "item": item, "status": entry["status"], "error": entry.get("error"), **about}
            row |= {name: entry.get(name) for name in ("worst_of_bound", "nnz", "passed", "redone_share")}
            if entry.get("extra_peak_bytes") is not None:
                row["extra_peak_mb"] = round(entry["extra_peak_bytes"] / 1e6, 1)
            if case is not None:
                row |= {"case": case.name, "distribution": case.distribution}
                row |= {"N": case.N, "D": case.D, "M": case.M, "K": case.K}
            times = times_of(item, entry) if case is not None else {}
            for part, time in times.items():
                assert case is not None
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


def number(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


# -- the summary ------------------------------------------------------------------------------------------------------


def first_line(text: object, most: int = 160) -> str:
    line = str(text or "").strip().split("\n")[0]
    return (line if len(line) <= most else line[: most - 1] + "…").replace("|", "\\|")


def ms(times: Mapping[str, Any] | None) -> str:
    return "-" if times is None else f"{times['ms']:.3g}"


def spread(times: Mapping[str, Any] | None) -> str:
    return "-" if times is None else f"{times['p20']:.3g} – {times['p80']:.3g}"


def share(value: Any) -> str:
    return number(value, ".0%")


def targets_section(results: Results) -> str:
    lines = [(t.what, t.bar, t.value, t.verdict) for t in targets.targets(results)]
    return table(("target", "bar", "measured", "verdict"), lines)


def checks_section(results: Results) -> str:
    lines = []
    for job, content in results.items():
        if not job.startswith(("quick-check", "check-", "sanitizer")):
            continue
        for item, r in content["items"].items():
            worst = f"{r['worst_of_bound']:.2f}" if r.get("passed") else "-"
            left = f"{r['not_reached']} not reached in time; " if r.get("not_reached") else ""
            what = left + (r.get("error") or r.get("summary") or "; ".join(r.get("unserved", [])))
            lines.append((f"{job} {item}", r["status"], str(r.get("passed", "-")), worst, first_line(what)))
    head = ("check", "status", "passed", "worst error / bound", "what it said")
    return table(head, lines) if lines else "Not reached."


def ceilings_section(results: Results) -> str:
    lines = []
    for item, r in targets.items(results, "ceilings").items():
        if "rate" in r:
            rate = f"{r['rate'] / 1e9:,.0f} GB/s" if item == "copy" else f"{r['rate'] / 1e12:,.1f} TFLOP/s"
            lines.append((item, rate, r["what"]))
        else:
            lines.append((item, r["status"], first_line(r.get("error"))))
    return table(("ceiling", "rate", "of"), lines) if lines else "Not reached."


def steps_table(flat: Sequence[Mapping[str, Any]], case: str) -> str:
    """Whole training steps of one case, fastest first, then those that were not timed, with the reason."""
    mine = [r for r in flat if r["job"] in (f"steps-{case}", f"more-steps-{case}")]
    steps = sorted((r for r in mine if r["part"] == "step"), key=lambda r: r["ms"])
    encodes = {r["item"]: r for r in mine if r["part"] == "encode"}
    best = min((r["ms"] for r in steps if r["item"] in ("fastsae", "fastsae graph")), default=None)
    lines = [
        (
            f"**{r['item']}**" if r["item"].startswith("fastsae") else r["item"], ms(r), spread(r),
            number(r["tokens_per_s"]), ms(encodes.get(r["item"])), number(r["gbs"]), number(r["tflops"]),
            share(r["share_of_floor"]), number(r.get("extra_peak_mb")), f"{r['ms'] / best:.2f}×" if best else "-",
        )
        for r in steps
    ]  # fmt: skip
    lines += [
        (r["item"], r["status"], first_line(r["error"], 90), *["-"] * 7) for r in mine if r["part"] == ""
    ]  # fmt: skip
    head = ("whole training step", "ms", "p20 – p80", "tokens/s", "encode, ms", "GB/s", "TFLOP/s", "floor / time",
            "extra MB", "vs fastsae")  # fmt: skip
    return table(head, lines)


def ops_table(flat: Sequence[Mapping[str, Any]], case: str) -> str:
    lines = [
        (r["item"], ms(r), spread(r), number(r["gbs"]), number(r["tflops"], ".1f"), number(r["floor_ms"], ".3g"),
         share(r["share_of_floor"])) if r["part"]
        else (r["item"], r["status"], first_line(r["error"], 90), *["-"] * 4)
        for r in flat if r["job"] == f"ops-{case}"
    ]  # fmt: skip
    return table(("op", "ms", "p20 – p80", "GB/s", "TFLOP/s", "floor, ms", "floor / time"), lines)


def sweep_table(flat: Sequence[Mapping[str, Any]]) -> str:
    mine = [r for r in flat if r["job"] == "sweep"]
    by_part = {(r["item"], r["part"]): r for r in mine}
    lines = []
    for item in dict.fromkeys(r["item"] for r in mine):
        r = by_part.get((item, "step")) or by_part[item, ""]
        sizes = tuple(str(r.get(name)) for name in "NDMK")
        parts = [ms(by_part.get((item, p))) for p in ("encode", "part decode", "part update")]
        if "ms" in r:
            lines.append((item, *sizes, ms(r), *parts, number(r["tokens_per_s"]), share(r["share_of_floor"])))
        else:
            lines.append((item, *sizes, r["status"], first_line(r["error"], 60), *["-"] * 4))
    head = ("fastsae's step", "N", "D", "M", "K", "ms", "encode", "decode", "update", "tokens/s", "floor / time")
    return table(head, lines)


def summary(
    results: Results, machine: Mapping[str, Any], flat: Sequence[Mapping[str, Any]], plots: Sequence[str]
) -> str:
    about = [f"{name} {machine[name]}" for name in ("driver", "cuda", "torch", "triton", "python") if machine.get(name)]
    planted = f" **An op was broken on purpose: {machine['plant']}.**" if machine.get("plant") else ""
    blocks = [
        f"# fastsae on {machine['device']}",
        f"{', '.join(about)}; commit {machine['commit'] or 'unknown'}, sources {machine['source']}; "
        f"{machine['date']}; size {machine['size']}.{planted}",
        "## Targets", "Times are targets for an H200; a toy run's verdicts mean nothing.", targets_section(results),
        "## Correct", checks_section(results),
        "## Ceilings", ceilings_section(results),
    ]  # fmt: skip
    for case in ("small", "big", "zipf", "hot"):
        shown = [(f"{kind}-{case}", make) for kind, make in (("steps", steps_table), ("ops", ops_table))]
        shown = [(job, make) for job, make in shown if job in results]
        if shown:
            c = results[shown[0][0]]["case"]
            sizes = f"N={c['N']}, D={c['D']}, M={c['M']}, K={c['K']}, {c['distribution']} inputs"
            blocks += [f"## {case}: {sizes}", *(make(flat, case) for _, make in shown)]
    if "sweep" in results:
        blocks += ["## Sweeps: one size changed at a time", sweep_table(flat)]
    wrong = [f"- {r['job']} {r['item']}: {r['status']}: {first_line(r['error'])}"
             for r in flat if r["status"] in FOUND_WRONG]  # fmt: skip
    blocks += ["## To look at", "\n".join(dict.fromkeys(wrong)) or "Nothing."]
    blocks += [f"![{name}]({name}.svg)" for name in plots]
    return "\n\n".join(blocks) + "\n"


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
    text = summary(results, store.machine, flat, drawn) + lack
    for name, content in (("results.csv", as_csv(flat)), ("summary.md", text)):
        replace_file(store.out / name, lambda partial, content=content: partial.write_text(content))  # type: ignore[misc]
