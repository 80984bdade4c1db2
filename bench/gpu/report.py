"""summary.md, made from the stored results and nothing else; and whether the targets are reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.cases import Case
from bench.gpu.cost import Ceilings, figures
from bench.gpu.store import FOUND_WRONG, Store
from fastsae.atomic import replace_file

Entries = Sequence[Mapping[str, Any]]  # stored results, as Store.put has them


def first_line(text: object, most: int = 160) -> str:
    line = str(text or "").strip().split("\n")[0]
    return (line if len(line) <= most else line[: most - 1] + "…").replace("|", "\\|")


def note(result: Mapping[str, Any]) -> str:
    """A result in a few words."""
    if "error" in result:
        return first_line(result["error"], 110)
    for name in ("step", "time"):
        if name in result:
            return f"{result[name]['ms']:.4g} ms ({result[name]['p20']:.4g} - {result[name]['p80']:.4g})"
    return f"{result['rate'] / 1e12:.4g} T/s, {result['what']}" if "rate" in result else str(result.get("summary", ""))


def cost_name(job: str, item: str, part: str) -> str:
    """The name under which cost.py knows what was timed; "" for what is not counted."""
    if part == "encode":
        return "encode_topk" if item.startswith("fastsae") else ""
    return item.split()[0] if job.startswith("codes-") else item


def rows(entries: Entries) -> list[dict[str, Any]]:
    """Flat rows: one for each time, and one for each item that has none."""
    ceilings = Ceilings.of({e["item"]: e["result"] for e in entries if e["job"] == "ceilings"})
    flat = []
    for entry in entries:
        result, case = entry["result"], Case(**entry["case"]) if entry["case"] else None
        row = {name: entry[name] for name in ("job", "item", "backend", "commit")} | (entry["case"] or {})
        row |= {name: result.get(name) for name in ("status", "error", "nnz", "redone_share")}
        if result.get("extra_peak_bytes") is not None:
            row["extra_peak_mb"] = round(result["extra_peak_bytes"] / 1e6, 1)
        times = {part: result[part] for part in ("time", "step", "encode") if part in result}
        for part, time in times.items():
            of = cost_name(entry["job"], entry["item"], part)
            counted = figures(of, case, time["ms"], ceilings, result.get("nnz")) if case else {}
            short = {name: None if value is None else float(f"{value:.5g}") for name, value in counted.items()}
            flat.append(row | {"part": part} | time | short)
        if not times:
            flat.append(row | {"part": ""})
    return flat


# -- targets -----------------------------------------------------------------------------------------------------------


def _best(flat: Entries, case: str, part: str = "step") -> Mapping[str, Any] | None:
    """Our fastest step of a case, of whichever backend, with or without a graph."""
    mine = [r for r in flat if r["job"].startswith(f"steps-{case}-") and r["part"] == part]
    return min(mine, key=lambda r: r["ms"], default=None)


def targets(flat: Entries) -> list[tuple[str, str, str, str]]:
    """(what, bar, measured, verdict) of every target, in the order of its weight. Times are meant for an H200."""

    def ratio(row: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> float | None:
        return row["ms"] / ours["ms"] if row and ours else None

    def contestant(name: str) -> Mapping[str, Any] | None:
        theirs = [r for r in flat if r["job"] in ("dense-big", "peers-big") and r["part"] == "step"]
        return next((r for r in theirs if r["item"] == name), None)

    def redone(case: str) -> float | None:
        mine = [r["redone_share"] for r in flat if r["job"].startswith(f"steps-{case}-")]
        return max((share for share in mine if share is not None), default=None)

    big, small = _best(flat, "big"), _best(flat, "small")
    wide, narrow = (_best(flat, case, "encode") for case in ("sweep-K-256", "sweep-base"))
    found: list[tuple[str, str, float | None, float]] = [
        ("whole exact step, big case", "≤ {:.3g} ms", big["ms"] if big else None, 27),
        ("whole exact step, small case", "≤ {:.3g} ms", small["ms"] if small else None, 1.8),
        ("against dense bf16 compiled, big case", "≥ {:.3g}×", ratio(contestant("dense bf16 compiled"), big), 3.5),
        ("against sparsify, big case", "≥ {:.3g}×", ratio(contestant("sparsify"), big), 2.5),
        *(
            (f"{case} against uniform use", "≤ {:.3g}×", ratio(_best(flat, case), small), 1.3)
            for case in ("zipf", "hot")
        ),
        ("encode from K = 32 to 256", "≤ {:.3g}×", ratio(wide, narrow), 1.3),
        *((f"tokens selected again, {case} case", "≤ {:.3%}", redone(case), 5e-4) for case in ("small", "big")),
    ]
    lines = []
    for what, form, value, bar in found:
        reached = value is not None and (value <= bar if form[0] == "≤" else value >= bar)
        verdict = "not measured" if value is None else "reached" if reached else "missed"
        lines.append((what, form.format(bar), "-" if value is None else form.format(value)[2:], verdict))
    return lines


# -- the summary -------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)) if lines else "Not reached."


def times_table(flat: Entries) -> str:
    def shown(row: Mapping[str, Any], name: str, form: str) -> str:
        return "-" if row.get(name) is None else format(row[name], form)

    forms = {"ms": ".3g", "p20": ".3g", "p80": ".3g", "gbs": ",.0f", "tflops": ".1f", "share_of_floor": ".0%",
             "extra_peak_mb": ",.0f"}  # fmt: skip
    lines = [(r["job"], r["item"], r["part"], *(shown(r, *form) for form in forms.items())) for r in flat if r["part"]]
    return table(("job", "item", "part", *forms), lines)


def summary(entries: Entries, machine: Mapping[str, Any], flat: Entries) -> str:
    about = [f"{name} {machine[name]}" for name in ("driver", "cuda", "torch", "triton", "python") if machine.get(name)]
    other = [(f"{e['job']} {e['item']}", e["result"]["status"], note(e["result"]))
             for e in entries if not {"step", "time"} & set(e["result"])]  # fmt: skip
    blocks = [
        f"# fastsae on {machine['device']}", f"{', '.join(about)}; commit {machine['commit'] or 'unknown'}; "
        f"{machine['date']}; size {machine['size']}.",
        "## Targets", "Times are targets for an H200; a rehearsal's verdicts mean nothing.",
        table(("target", "bar", "measured", "verdict"), targets(flat)),
        "## Checks, ceilings, and what has no time", table(("item", "status", "what it said"), other),
        "## Times", times_table(flat),
    ]  # fmt: skip
    for e in entries:
        if kernels := e["result"].get("kernels"):
            lines = [(r["kernel"].replace("|", "\\|"), f"{r['count']:g}", f"{r['mean_us']:.3g}",
                      f"{r['count'] * r['mean_us'] / 1e3:.3g}") for r in kernels]  # fmt: skip
            blocks += [f"## {e['job']}: {note(e['result'])}", table(("kernel", "a step", "mean, µs", "ms"), lines)]
    wrong = [f"- {e['job']} {e['item']}: {e['result']['status']}: {note(e['result'])}"
             for e in entries if e["result"]["status"] in FOUND_WRONG]  # fmt: skip
    return "\n\n".join([*blocks, "## To look at", "\n".join(wrong) or "Nothing."]) + "\n"


def write(store: Store) -> None:
    """The summary again."""
    entries = list(store.content.values())
    text = summary(entries, store.machine, rows(entries))
    replace_file(store.out / "summary.md", lambda partial: partial.write_text(text))
