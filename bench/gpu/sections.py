"""summary.md, section by section, from the flat rows of report.py and the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.gpu import targets
from bench.gpu.store import FOUND_WRONG

Results = Mapping[str, Mapping[str, Any]]


def number(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


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


def backends_section(machine: Mapping[str, Any]) -> str:
    """Which backends took part, and which did not and why."""
    lines = []
    for name, about in machine.get("backends", {}).items():
        detail = "; ".join(f"{key}: {value}" for key, value in about["detail"].items())
        word = "takes part" if about["available"] else "**left out**"
        lines.append((name, word, first_line(detail if about["available"] else about["reason"], 240)))
    return table(("backend", "", "what it says"), lines) if lines else "Not asked."


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


def label(r: Mapping[str, Any]) -> str:
    return r["item"] if r["backend"] is None else f"{r['item']} ({r['backend']})"


def steps_table(flat: Sequence[Mapping[str, Any]], case: str) -> str:
    """Whole training steps of one case, fastest first, then those that were not timed, with the reason."""
    mine = [r for r in flat if targets.is_of(r["job"], "steps", case) or r["job"] == f"more-steps-{case}"]
    steps = sorted((r for r in mine if r["part"] == "step"), key=lambda r: r["ms"])
    encodes = {label(r): r for r in mine if r["part"] == "encode"}
    best = min((r["ms"] for r in steps if r["item"] in ("fastsae", "fastsae graph")), default=None)
    lines = [
        (
            f"**{label(r)}**" if r["item"].startswith("fastsae") else label(r), ms(r), spread(r),
            number(r["tokens_per_s"]), ms(encodes.get(label(r))), number(r["gbs"]), number(r["tflops"]),
            share(r["share_of_floor"]), number(r.get("extra_peak_mb")), f"{r['ms'] / best:.2f}×" if best else "-",
        )
        for r in steps
    ]  # fmt: skip
    lines += [
        (label(r), r["status"], first_line(r["error"], 90), *["-"] * 7) for r in mine if r["part"] == ""
    ]  # fmt: skip
    head = ("whole training step", "ms", "p20 – p80", "tokens/s", "encode, ms", "GB/s", "TFLOP/s", "floor / time",
            "extra MB", "vs fastsae")  # fmt: skip
    return table(head, lines)


def ops_table(flat: Sequence[Mapping[str, Any]], case: str) -> str:
    """Op by op, the backends below each other."""
    mine = [r for r in flat if targets.is_of(r["job"], "ops", case)]
    order = list(dict.fromkeys(r["item"] for r in mine))
    mine.sort(key=lambda r: order.index(r["item"]))
    lines = [
        (name, ms(r), spread(r), number(r["gbs"]), number(r["tflops"], ".1f"), number(r["floor_ms"], ".3g"),
         share(r["share_of_floor"])) if r["part"]
        else (name, r["status"], first_line(r["error"], 90), *["-"] * 4)
        for r in mine for name in [r["item"] if r["item"] == "torch.topk" else label(r)]
    ]  # fmt: skip
    return table(("op", "ms", "p20 – p80", "GB/s", "TFLOP/s", "floor, ms", "floor / time"), lines)


def beside(flat: Sequence[Mapping[str, Any]], start: str, unit: float, head: str) -> str:
    """A row for each item, a column for each job with a name that begins with `start`: medians times `unit`."""
    mine = [r for r in flat if r["job"].startswith(start)]
    who = list(dict.fromkeys(r["job"].removeprefix(start) for r in mine))
    cells = {
        (r["item"], r["job"].removeprefix(start)): f"{r['ms'] * unit:.3g}" if r["part"] else r["status"] for r in mine
    }
    lines = [(item, *(cells.get((item, name), "-") for name in who)) for item in dict.fromkeys(r["item"] for r in mine)]
    reasons = [f"- {r['job'].removeprefix(start)} {r['item']}: {r['status']}: {first_line(r['error'])}"
               for r in mine if not r["part"]]  # fmt: skip
    return "\n\n".join([table((head, *who), lines), *(["\n".join(reasons)] if reasons else [])])


def codes_section(flat: Sequence[Mapping[str, Any]], case: str) -> str:
    about = "Codes of each layout (bench/gpu/layouts.py), every one with as many activations. cusparse: torch.sparse."
    return f"{about}\n\n{beside(flat, f'codes-{case}-', 1.0, 'op and layout, ms')}"


def overhead_section(flat: Sequence[Mapping[str, Any]]) -> str:
    about = (
        "The Python call alone at a tiny size, nothing waiting for the device, in µs (on a CPU it computes as well)."
    )
    return f"{about}\n\n{beside(flat, 'overhead-', 1e3, 'call, µs')}"


def sweep_table(flat: Sequence[Mapping[str, Any]]) -> str:
    mine = [r for r in flat if r["job"].startswith("sweep-")]
    by_part = {(label(r), r["part"]): r for r in mine}
    lines = []
    for name in dict.fromkeys(map(label, mine)):
        r = by_part.get((name, "step")) or by_part[name, ""]
        sizes = tuple(str(r.get(size)) for size in "NDMK")
        parts = [ms(by_part.get((name, p))) for p in ("encode", "part decode", "part update")]
        if "ms" in r:
            lines.append((name, *sizes, ms(r), *parts, number(r["tokens_per_s"]), share(r["share_of_floor"])))
        else:
            lines.append((name, *sizes, r["status"], first_line(r["error"], 60), *["-"] * 4))
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
        "## Backends", backends_section(machine),
        "## Correct", checks_section(results),
        "## Ceilings", ceilings_section(results),
    ]  # fmt: skip
    for case in ("small", "big", "zipf", "hot"):
        shown: list[str] = []
        for kind, make in (("steps", steps_table), ("ops", ops_table), ("codes", codes_section)):
            if any(targets.is_of(job, kind, case) for job in results):
                shown.append(make(flat, case))
        if shown:
            of_case = (content["case"] for job, content in results.items() if content.get("case"))
            c = next(c for c in of_case if c["name"] == case)
            sizes = f"N={c['N']}, D={c['D']}, M={c['M']}, K={c['K']}, {c['distribution']} inputs"
            blocks += [f"## {case}: {sizes}", *shown]
    if any(job.startswith("overhead-") for job in results):
        blocks += ["## Overhead", overhead_section(flat)]
    if any(job.startswith("sweep-") for job in results):
        blocks += ["## Sweeps: one size changed at a time", sweep_table(flat)]
    wrong = [f"- {r['job']} {r['item']}: {r['status']}: {first_line(r['error'])}"
             for r in flat if r["status"] in FOUND_WRONG]  # fmt: skip
    blocks += ["## To look at", "\n".join(dict.fromkeys(wrong)) or "Nothing."]
    blocks += [f"![{name}]({name}.svg)" for name in plots]
    return "\n\n".join(blocks) + "\n"
