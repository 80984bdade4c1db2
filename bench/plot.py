"""`python -m bench.plot`: plots, the tables of docs/benchmarks.md and the README's headline, from bench/results/ alone.

Writes <device>/*.svg and *.png beside the results, and replaces what stands between two markers of each page.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bench import results
from bench.machine import ROOT

PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- numbers: begin (python -m bench.plot) -->", "<!-- numbers: end -->"
DENSE = {"dense fp32": "dense PyTorch in fp32", "dense bf16": "in bf16"}
HEADLINE = "<!-- headline: begin (python -m bench.plot) -->", "<!-- headline: end -->"
NO_RESULTS = "No results yet: `make bench` measures this machine and fills in this section."
PRIMARY = "random"
PARTS = ("encode", "decode", "loss", "update")
COLORS = {"encode": "#3b6fb6", "decode": "#5aa469", "loss": "#b0a04f", "update": "#c2703d"}


def step_ms(result: dict[str, Any], name: str, part: str = "step") -> float | None:
    times = result["contestants"].get(name, {}).get("parts", {})
    return times[part]["ms"] if part in times else None


def best_peer(result: dict[str, Any]) -> str | None:
    """The fastest public library in this result, or None where none took part."""
    names = [name for name, entry in result["contestants"].items() if "version" in entry]
    return min(names, key=lambda name: step_ms(result, name) or float("inf"), default=None)


def number(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def times(result: dict[str, Any], name: str | None, part: str = "step") -> str:
    """How many times as long as fastsae a contestant takes."""
    ours, theirs = step_ms(result, "fastsae", part), step_ms(result, name, part) if name else None
    return f"{theirs / ours:{'.1f' if theirs > ours else '.2f'}}×" if ours and theirs else "-"


def milliseconds(value: float | None) -> str:
    return number(value, ",.0f" if value is not None and value >= 100 else ",.1f")


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines))


def label(name: str, entry: dict[str, Any]) -> str:
    """fastsae in bold, a library with its version, and what is special about its settings."""
    if "version" in entry:
        return f"{entry['version']} {name.partition(' ')[2]}".strip()
    return f"**{name}**" if name == "fastsae" else name


def contestants_table(result: dict[str, Any]) -> str:
    """One case: every contestant, fastest first."""
    lines = []
    for name, entry in sorted(result["contestants"].items(), key=lambda item: item[1]["parts"]["step"]["ms"]):
        ms = entry["parts"]["step"]["ms"]
        peak = entry.get("extra_peak_bytes")
        lines.append(
            [
                label(name, entry),
                milliseconds(ms),
                f"{milliseconds(entry['parts']['step']['p20'])} – {milliseconds(entry['parts']['step']['p80'])}",
                number(result["case"]["N"] / ms * 1e3),
                milliseconds(step_ms(result, name, "encode alone")),
                number(peak / 1e6 if peak is not None else None),
                times(result, name),
            ]
        )
    head = ("whole training step", "ms", "p20 – p80", "tokens/s", "encode alone, ms", "extra memory, MB", "vs fastsae")
    return table(head, lines)


def cases_table(found: Sequence[dict[str, Any]]) -> str:
    """Every case: fastsae's step, its parts, and how many times as long the others take."""
    lines = []
    for result in found:
        case, ours = result["case"], result["contestants"].get("fastsae")
        if ours is None:
            continue
        ms, redone = ours["parts"]["step"]["ms"], ours.get("redone_share")
        isa = "" if result["isa"] == "best" else f", {result['isa']} only, screened in {engine(result)['screening']}"
        lines.append(
            [
                f"{case['name']}{isa} ({case['N']}, {case['D']}, {case['M']}, {case['K']})",
                milliseconds(ms),
                " / ".join(milliseconds(step_ms(result, "fastsae", part)) for part in PARTS),
                f"{result['floors']['floor_ms']['step'] / ms:.0%}",
                times(result, "dense fp32"),
                times(result, "dense bf16"),
                times(result, "sparse eager"),
                times(result, "sparse eager bf16"),
                times(result, best_peer(result)),
                number(redone, ".2%"),
            ]
        )
    head = ("case (N, D, M, K)", "ms", "encode / decode / loss / update", "floor / step", "dense fp32", "dense bf16",
            "sparse eager", "sparse bf16", "best peer", "encoded twice")  # fmt: skip
    return table(head, lines)


def smaller(folder: Path) -> list[str]:
    """What shapes other than the headline's gain, mostly less: of `--size`, and of the family's real runs."""
    said = []
    for result in results.read(folder):
        case, ratio = result["case"], times(result, "dense fp32")
        if case["name"].startswith("shape-") and ratio != "-":
            said.append(f"{ratio} at N={case['N']}, D={case['D']}, M={case['M']}, K={case['K']}")
    quality = folder / "family" / "quality.json"
    for entry in json.loads(quality.read_text())["entries"].values() if quality.exists() else ():
        if entry["rule"] == {"kind": "topk", "k": 32} and "times" in entry:
            s, ratio = entry["settings"], entry["times"]["dense fp32"]["ms"] / entry["times"]["fastsae"]["ms"]
            said.append(f"{ratio:.1f}× at N={s['batch']}, M={s['M']}, K=32 on real activations")
    return said


def engine(result: dict[str, Any]) -> dict[str, Any]:
    """What the cpu backend reported: its instruction set and its screening format."""
    detail = result["machine"]["backends"].get("cpu", {}).get("detail", {})
    return {"isa": "-", "screening": "-"} | detail


def provenance(result: dict[str, Any]) -> str:
    m, floors, own = result["machine"], result["floors"], engine(result)
    return (
        f"{m['device']} ({', '.join(m['flags'])}), {m['threads']} threads, torch {m['torch']}, commit {m['commit']}, "
        f"{m['date'][:10]}; fastsae used {own['isa']} and screened in {own['screening']}. Measured beside it: "
        f"{rates(floors)}."
    )


def rates(floors: dict[str, Any]) -> str:
    """The machine's rates in words. Older results have those of torch's best products, not of the units."""
    copies, fp32 = f"copies {floors['copy_gbs']:.1f} GB/s", f"{floors['fp32_tflops']:.2f} TFLOP/s in fp32"
    if "l3_gbs" not in floors:
        bf16, int8 = f"{floors['bf16_tflops']:.2f} in bf16", f"{floors['int8_tops']:.2f} TOP/s in int8"
        return f"{copies}, torch's best product {fp32} and {bf16}, {int8}"
    others = (
        ("bf16_tflops", "TFLOP/s in bf16"), ("int8_tops", "TOP/s in int8"),
        ("amx_bf16_tflops", "TFLOP/s in bf16 by AMX"), ("amx_int8_tops", "TOP/s in int8 by AMX"),
    )  # fmt: skip
    units = [fp32, *(f"{floors[key]:.2f} {unit}" for key, unit in others if floors[key])]
    cached = f"{floors['l2_gbs']:.0f} GB/s from L2, {floors['l3_gbs']:.0f} from L3"
    return f"{', '.join(units)}; reads of {cached}, {floors['read_gbs']:.1f} from memory, {copies}"


def headline(results_folder: Path, readme: Path) -> str:
    """The README's figure and sentence: the device with the fastest step, and every other one beside it."""
    primary = {
        result["machine"]["device"]: (folder, result)
        for folder in sorted(results_folder.glob("*"))
        for result in results.read(folder)
        if (result["case"]["name"], result["isa"]) == (PRIMARY, "best")
    }
    if not primary:
        return NO_RESULTS
    ordered = sorted(primary.values(), key=lambda pair: step_ms(pair[1], "fastsae") or float("inf"))
    folder, result = ordered[0]
    case, machine, peer = result["case"], result["machine"], best_peer(result)
    faster = [f"{times(result, name)} as fast as {text}" for name, text in DENSE.items() if times(result, name) != "-"]
    if peer is not None:
        library = label(peer, result["contestants"][peer])
        faster.append(f"{times(result, peer)} as fast as the fastest public library ({library})")
    sizes = f"{case['N']:,} tokens, D={case['D']}, M={case['M']:,}, K={case['K']}"
    took = f"{milliseconds(step_ms(result, 'fastsae'))} ms on {machine['threads']} threads of an {machine['device']}"
    others = [f"{times(one, 'dense fp32')} ({times(one, best_peer(one))}) on an {one['machine']['device']}"
              for _, one in ordered[1:]]  # fmt: skip
    others += [line for where in sorted(results_folder.glob("*")) for line in smaller(where)]
    less = f" Against dense fp32 (and that library) it is {'; '.join(others)}." if others else ""
    return (
        f"![tokens per second]({link(folder / 'contestants.svg', readme)})\n\n"
        f"**{', '.join(faster)}**: a whole training step of {sizes}, in {took}.{less} "
        f"[All tables]({link(PAGE, README)})."
    )


def link(path: Path, page: Path) -> str:
    """The address of a file as a page names it."""
    return Path(os.path.relpath(path, page.parent)).as_posix()


def pictures(folder: Path, page: Path) -> list[str]:
    """Every picture of a folder, as Markdown of this page."""
    return [f"![{path.stem}]({link(path, page)})" for path in sorted(folder.glob("*.svg"))]


def section(folder: Path, page: Path) -> str:
    """One device's part of docs/benchmarks.md."""
    found = results.read(folder)
    by_name = {(result["case"]["name"], result["isa"]): result for result in found}
    main = by_name.get((PRIMARY, "best"))
    blocks = [f"### {folder.name}"]
    if main is not None:
        case = main["case"]
        sizes = f"N={case['N']}, D={case['D']}, M={case['M']}, K={case['K']}"
        blocks += [provenance(main), f"{sizes}, random inputs and weights:", contestants_table(main)]
        blocks += [f"Left out: {name}: {reason}" for name, reason in main["left_out"].items()]
    other = smaller(folder)
    blocks += [f"Other shapes, against dense fp32: {'; '.join(other)}."] if other else []
    shown = [result for result in found if not result["case"]["name"].startswith("sweep-")]
    blocks += ["All cases, each against the others in the same run:", cases_table(shown)]
    return "\n\n".join([*blocks, *pictures(folder, page)])


def save(figure: Figure, folder: Path, name: str) -> None:
    matplotlib.rcParams["svg.hashsalt"] = "fastsae"  # the same results give the same bytes
    figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    figure.savefig(folder / f"{name}.png", dpi=130, bbox_inches="tight")


def plot_contestants(result: dict[str, Any], folder: Path) -> None:
    """Tokens per second of a whole step, one bar for each contestant."""
    n = result["case"]["N"]
    pairs = sorted((n / entry["parts"]["step"]["ms"] * 1e3, name) for name, entry in result["contestants"].items())
    figure = Figure(figsize=(7, 0.45 * len(pairs) + 1))
    axes = figure.subplots()
    bars = axes.barh([name for _, name in pairs], [rate for rate, _ in pairs],
                     color=["#c2703d" if name == "fastsae" else "#9aa5b1" for _, name in pairs])  # fmt: skip
    axes.bar_label(bars, [f"{rate:,.0f}" for rate, _ in pairs], padding=4)
    axes.set_xlabel("tokens per second, whole training step")
    axes.set_xlim(right=max(rate for rate, _ in pairs) * 1.15)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder, "contestants")


def plot_parts(found: Sequence[dict[str, Any]], folder: Path) -> None:
    """Where fastsae's step spends its time, case by case, and the machine's floor as a mark."""
    shown = [r for r in found if step_ms(r, "fastsae", "encode") and not r["case"]["name"].startswith("sweep-")]
    if not shown:
        return
    labels = [r["case"]["name"] + ("" if r["isa"] == "best" else f" {r['isa']}") for r in shown]
    figure = Figure(figsize=(7, 0.45 * len(shown) + 1.2))
    axes = figure.subplots()
    left = [0.0] * len(shown)
    for part in PARTS:
        widths = [step_ms(r, "fastsae", part) or 0.0 for r in shown]
        axes.barh(labels, widths, left=left, color=COLORS[part], label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.plot([r["floors"]["floor_ms"]["step"] for r in shown], labels, "k|", markersize=16, label="floor")
    axes.set_xlabel("milliseconds of a fastsae step, by part")
    axes.legend(ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, folder, "parts")


def plot_sweep(found: Sequence[dict[str, Any]], folder: Path) -> None:
    """The step's time as one size grows, the others those of the primary case."""
    ours = {r["case"]["name"]: r for r in found if r["isa"] == "best" and step_ms(r, "fastsae")}
    if "sweep-base" not in ours:
        return
    figure = Figure(figsize=(10, 2.6))
    for axes, axis in zip(figure.subplots(1, 4), "NMDK", strict=True):
        line = [r for name, r in ours.items() if name == "sweep-base" or name.startswith(f"sweep-{axis}-")]
        line.sort(key=lambda r: r["case"][axis])
        sizes = [r["case"][axis] for r in line]
        for part, style in (("step", "-"), ("encode", "--"), ("update", ":")):
            axes.plot(sizes, [step_ms(r, "fastsae", part) for r in line], f"o{style}", markersize=3, label=part)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes], rotation=40)
        axes.set_xlabel(axis)
    figure.axes[0].set_ylabel("ms")
    figure.axes[0].legend(frameon=False)
    save(figure, folder, "sweep")


def plot(folder: Path) -> None:
    found = results.read(folder)
    for result in found:
        if (result["case"]["name"], result["isa"]) == (PRIMARY, "best"):
            plot_contestants(result, folder)
    plot_parts(found, folder)
    plot_sweep(found, folder)


def with_numbers(page: str, text: str, first: str = BEGIN, last: str = END) -> str:
    """A page with `text` between two markers. Raises ValueError where one is missing."""
    before, begin, rest = page.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"the page must hold the lines {first!r} and {last!r}, in this order; it begins {page[:60]!r}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def texts(results_folder: Path, page: Path, readme: Path) -> dict[Path, str]:
    """The two pages with the numbers of these results."""
    folders = sorted(folder for folder in results_folder.glob("*") if results.read(folder))
    tables = "\n\n".join(section(folder, page) for folder in folders) or NO_RESULTS
    return {
        page: with_numbers(page.read_text(), tables),
        readme: with_numbers(readme.read_text(), headline(results_folder, readme), *HEADLINE),
    }


def renew(results_folder: Path, page: Path, readme: Path) -> int:
    """Plots every device and puts its numbers into both pages. Returns the number of devices."""
    folders = sorted(folder for folder in results_folder.glob("*") if results.read(folder))
    for folder in folders:
        plot(folder)
        results.write_csv(folder)
    for path, text in texts(results_folder, page, readme).items():
        path.write_text(text)
    return len(folders)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--readme", type=Path, default=README)
    options = parser.parse_args()
    devices = renew(options.results, options.page, options.readme)
    print(f"{devices} devices plotted; numbers written to {options.page} and {options.readme}")


if __name__ == "__main__":
    main()
