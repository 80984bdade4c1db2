"""`python -m bench.compiled`: compile every kernel for every target without a GPU, and record the results.

Every module of fastsae.kernels with `variants()` is compiled ahead of time for sm_80, sm_90, sm_100 and gfx942. The
record holds what decides speed on a GPU and can be seen without one: registers, spilled bytes, shared memory,
tensor-core instructions. The table is in bench/results/compiled/triton-<minor version>/, since these numbers differ
between versions; `--check` compiles again and exits with 1 if a kernel fails outright or is worse than in the table.

Triton's own cache keeps the compiled kernels, with these records beside them, so a second run takes seconds. The table
names what it was made of: with `--current`, nothing is compiled, and the exit code is 0 if that is what is here.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import multiprocessing
import pkgutil
import re
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fastsae.kernels
from fastsae import env
from fastsae.atomic import replace_file
from fastsae.kernels.variants import Variant

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "bench" / "results" / "compiled"
RECORD = "fastsae-record-1.json"  # count up when `measured` changes: it names the file in Triton's cache
GROWTH = 1.10
REPORT = "run `make kernels-report`"


@dataclass(frozen=True)
class Target:
    """gpu: Triton's GPUTarget (backend, architecture, threads of a warp). shared_limit: bytes a block may have.
    products: patterns of tensor-core instructions, any of which will do.
    """

    gpu: tuple[str, int | str, int]
    shared_limit: int
    products: dict[str, str]


TARGETS = {
    "sm_80": Target(("cuda", 80, 32), 163 << 10, {"mma": r"\bmma\.sync"}),
    "sm_90": Target(("cuda", 90, 32), 227 << 10, {"wgmma": r"\bwgmma\.mma_async"}),
    "sm_100": Target(("cuda", 100, 32), 227 << 10, {"tcgen05": r"\btcgen05\.mma", "mma": r"\bmma\.sync"}),
    "gfx942": Target(("hip", "gfx942", 64), 64 << 10, {"mfma": r"\bv_mfma"}),
}

# -- what there is to compile ------------------------------------------------------------------------------------------


def kernel_modules() -> list[str]:
    """The dotted names of the modules of fastsae.kernels that state variants."""
    found = [f"fastsae.kernels.{info.name}" for info in pkgutil.iter_modules(fastsae.kernels.__path__)]
    return [name for name in found if hasattr(importlib.import_module(name), "variants")]


def variants_of(modules: Iterable[str]) -> dict[str, tuple[str, Variant]]:
    """(module, variant) by the variant's name. Raises ValueError where two share one."""
    found: dict[str, tuple[str, Variant]] = {}
    for module in modules:
        for variant in importlib.import_module(module).variants():
            if variant.name in found:
                raise ValueError(f"two variants are called {variant.name}: in {found[variant.name][0]} and {module}")
            found[variant.name] = module, variant
    return found


def costs(module: str) -> dict[str, str]:
    """The paragraphs "Bytes: ..." and "Flops: ..." of a module's docstring, without their first words."""
    text = importlib.import_module(module).__doc__ or ""
    pattern = r"^(Bytes|Flops): (.+?)(?=^\w+: |^\s*$|\Z)"
    return {name: " ".join(body.split()) for name, body in re.findall(pattern, text, re.MULTILINE | re.DOTALL)}


# -- one compilation, in a worker --------------------------------------------------------------------------------------


def source_of(variant: Variant) -> Any:
    """Triton's ASTSource of a variant."""
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    aligned = [name for name, kind in variant.signature.items() if kind.startswith("*")] + list(variant.aligned)
    return ASTSource(
        variant.kernel,
        {name: variant.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )


def compile_one(module: str, name: str, target: str) -> dict[str, Any]:
    """The record of one variant on one target. Raises what Triton raises."""
    # Here and not above: `--help`, and what nvcc compiles (bench.ptxas), need no Triton.
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.cache import get_cache_manager

    _, variant = variants_of([module])[name]
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    if variant.maxnreg is not None and TARGETS[target].gpu[0] == "cuda":
        options["maxnreg"] = variant.maxnreg
    log, gpu = io.StringIO(), GPUTarget(*TARGETS[target].gpu)
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), contextlib.redirect_stdout(log):
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source_of(variant), target=gpu, options=options)
        cache = get_cache_manager(kernel.hash)
        if (known := cache.get_file(RECORD)) is not None:
            return json.loads(Path(known).read_text())
        if "ptx" in kernel.asm and "Used" not in log.getvalue():  # already cached: ptxas has to run again for its log
            triton.knobs.compilation.always_compile = True
            kernel = triton.compile(source_of(variant), target=gpu, options=options)
    record = measured(dict(kernel.asm), log.getvalue(), TARGETS[target])
    record |= {"shared_bytes": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    cache.put(json.dumps(record), RECORD, binary=False)
    return record


def measured(asm: dict[str, Any], ptxas_log: str, target: Target) -> dict[str, Any]:
    """Registers of a thread, bytes it spills, and the kind and number of tensor-core instructions."""
    if "amdgcn" in asm:
        text = asm["amdgcn"]
        registers = one_number(r"\.vgpr_count:\s+(\d+)", text)
        spilled = 4 * one_number(r"\.vgpr_spill_count:\s+(\d+)", text)
    else:
        text = asm["ptx"]
        registers = one_number(r"Used (\d+) registers", ptxas_log)
        spilled = one_number(r"(\d+) bytes spill stores", ptxas_log)
        spilled = max(spilled, one_number(r"(\d+) bytes spill loads", ptxas_log))
    counts = {kind: len(re.findall(pattern, text)) for kind, pattern in target.products.items()}
    kind = next((kind for kind, count in counts.items() if count), None)
    return {
        "registers": registers,
        "spill_bytes": spilled,
        "tensor_core": kind,
        "tensor_instructions": counts[kind] if kind else 0,
    }


def one_number(pattern: str, text: str) -> int:
    """The largest of the numbers found. Raises ValueError where there is none: the tools' output has changed then."""
    found = [int(number) for number in re.findall(pattern, text)]
    if not found:
        raise ValueError(f"no {pattern!r} in {text[-300:]!r}")
    return max(found)


# -- all of them -------------------------------------------------------------------------------------------------------


def compile_all(
    modules: Sequence[str], targets: Sequence[str] = tuple(TARGETS), only: str = "", workers: int = 2
) -> dict[str, Any]:
    """{"triton", "kernels": {variant: {"module", "product", "targets": {target: record or {"error"}}}}, "costs"}."""
    import triton

    variants = {name: found for name, found in variants_of(modules).items() if only in name}
    kernels: dict[str, Any] = {
        name: {"module": module, "product": variant.product, "targets": dict.fromkeys(targets)}
        for name, (module, variant) in variants.items()
    }
    start = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = {
            pool.submit(compile_one, module, name, target): (name, target)
            for name, (module, _) in variants.items()
            for target in targets
        }
        for done, task in enumerate(as_completed(tasks), start=1):
            name, target = tasks[task]
            error = task.exception()  # of any kind: a kernel that does not compile is a result
            kernels[name]["targets"][target] = task.result() if error is None else {"error": short(error)}
            told = f"[{done}/{len(tasks)}] {time.perf_counter() - start:.0f} s  {name} {target}"
            print(told if error is None else f"{told}: {short(error)}", file=sys.stderr, flush=True)
    return {
        "triton": triton.__version__,
        "kernels": kernels,
        "costs": {module: costs(module) for module in sorted({module for module, _ in variants.values()})},
    }


def short(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 400 else f"{text[:200]} ... {text[-200:]}"


# -- the table ---------------------------------------------------------------------------------------------------------


def table_folder(version: str) -> Path:
    return FOLDER / f"triton-{'.'.join(version.split('.')[:2])}"


def markdown(report: dict[str, Any]) -> str:
    """One row for each variant, the targets side by side, then what the kernels move and compute."""
    lines = [
        f"# Kernels as Triton {report['triton']} compiles them",
        "",
        "Written by `make kernels-report`. Registers (r) of a thread, shared memory of a block, how many tensor-core",
        "instructions the code has; spills are shown where there are any. sm_80 is an A100, sm_90 an H100 or H200,",
        "sm_100 a B200, gfx942 an MI300X.",
        "",
    ]
    targets = list(next(iter(report["kernels"].values()))["targets"])
    lines += [f"| variant | warps | {' | '.join(targets)} |", "|---" * (len(targets) + 2) + "|"]
    for name, kernel in report["kernels"].items():
        records = kernel["targets"]
        warps = {record["warps"] for record in records.values() if "warps" in record}
        cells = " | ".join(cell(record) for record in records.values())
        lines.append(f"| {name} | {'/'.join(map(str, sorted(warps)))} | {cells} |")
    lines += ["", "## Floors", ""]
    for module, stated in report["costs"].items():
        told = "; ".join(f"{name.lower()}: {text.rstrip('.')}" for name, text in stated.items())
        lines.append(f"- {module.rsplit('.', 1)[-1]}: {told or 'not stated'}")
    return "\n".join(lines) + "\n"


def cell(record: dict[str, Any]) -> str:
    if "error" in record:
        return "**does not compile**"
    parts = [f"{record['registers']} r"]
    if record["shared_bytes"]:
        parts.append(f"{record['shared_bytes'] / 1024:.3g} KiB")
    if record["tensor_core"]:
        parts.append(f"{record['tensor_core']} × {record['tensor_instructions']}")
    if record["spill_bytes"]:
        parts.append(f"**spills {record['spill_bytes']} B**")
    return ", ".join(parts)


def dumped(report: dict[str, Any]) -> str:
    """JSON with a line for each record, so that a change of the table shows as the lines that changed."""
    indented = json.dumps(report, indent=1, ensure_ascii=False)
    return re.sub(r"\{\n([^{}]*?)\n *\}", lambda record: "{" + " ".join(record[1].split()) + "}", indented) + "\n"


def digest(folder: Path, names: Iterable[str], compiler: str) -> str:
    """Of the files that these patterns name in a folder, and of a compiler's version: what a table is made of."""
    found = hashlib.sha256(compiler.encode())
    for path in sorted({path for name in names for path in folder.glob(name) if path.is_file()}):
        found.update(f"\0{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def is_current(folder: Path, made_of: str) -> bool:
    """Whether the committed table in this folder was made of that, and had no faults."""
    path = folder / "kernels.json"
    return path.exists() and json.loads(path.read_text()).get("made_of") == made_of


def write_table(folder: Path, report: dict[str, Any], page: str, made_of: str | None) -> Path:
    """Writes the report as JSON and as a page in Markdown; returns the folder. made_of: None where it has faults."""
    report = {"made_of": made_of} | report
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "kernels.json", lambda partial: partial.write_text(dumped(report)))
    replace_file(folder / "kernels.md", lambda partial: partial.write_text(page))
    return folder


def made_of(version: str) -> str:
    """What decides the table: the kernels, what compiles and judges them, and Triton's version."""
    return digest(ROOT, ("fastsae/kernels/*.py", "bench/compiled.py"), version)


def write(report: dict[str, Any]) -> Path:
    of = None if faults(report) else made_of(report["triton"])
    return write_table(table_folder(report["triton"]), report, markdown(report), of)


# -- the check ---------------------------------------------------------------------------------------------------------


def faults(report: dict[str, Any]) -> list[str]:
    """The faults that no table excuses."""
    found = []
    for name, kernel in report["kernels"].items():
        for target, record in kernel["targets"].items():
            where, limit = f"{name} on {target}", TARGETS[target].shared_limit
            if "error" in record:
                found.append(f"{where} does not compile: {record['error']}")
                continue
            if record["spill_bytes"]:
                found.append(f"{where} spills {record['spill_bytes']} bytes a thread")
            if record["shared_bytes"] > limit:
                found.append(f"{where} takes {record['shared_bytes']} bytes of shared memory, {limit} are there")
            if kernel["product"] and not record["tensor_core"]:
                wanted = " or ".join(TARGETS[target].products)
                found.append(f"{where} is a product without tensor-core instructions ({wanted})")
    return found


def regressions(fresh: dict[str, Any], committed: dict[str, Any], advice: str = REPORT) -> list[str]:
    """What got worse than in the committed table, is missing from it, or no longer exists."""
    now, before = fresh["kernels"], committed["kernels"]
    found = [f"{name} is not in the committed table: {advice}" for name in now if name not in before]
    found += [f"{name} is in the committed table and no longer there: {advice}" for name in before if name not in now]
    for name in now.keys() & before.keys():
        for target, record in now[name]["targets"].items():
            old = before[name]["targets"].get(target, {})
            for what in ("registers", "shared_bytes"):
                if what in record and what in old and record[what] > GROWTH * old[what]:
                    rise = f"{what} rose from {old[what]} to {record[what]}"
                    found.append(f"{name} on {target}: {rise}; if it is worth it, {advice}")
    return sorted(found)


def check(report: dict[str, Any], only: str = "") -> list[str]:
    """Faults, and regressions against the table of the same minor version."""
    path = table_folder(report["triton"]) / "kernels.json"
    if not path.exists():
        return [*faults(report), f"there is no committed table for Triton {report['triton']} ({path}): {REPORT}"]
    committed = json.loads(path.read_text())
    committed["kernels"] = {name: kernel for name, kernel in committed["kernels"].items() if only in name}
    return faults(report) + regressions(report, committed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of writing it")
    parser.add_argument("--current", action="store_true", help="say whether the committed table is of these kernels")
    parser.add_argument("--only", default="", help="variants whose name contains this; nothing is written")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        parser.error("Triton is not installed; it comes with torch's CUDA builds, and alone by: pip install triton")
    if env.triton_is_interpreted():
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    if options.current:
        version = importlib.metadata.version("triton")
        return 0 if is_current(table_folder(version), made_of(version)) else 1
    report = compile_all(kernel_modules(), options.targets, options.only, options.workers)
    partial = bool(options.only) or options.targets != list(TARGETS)
    if not options.check and not partial:
        print(f"wrote {write(report)}")
    elif partial:
        print(markdown(report))
    found = check(report, options.only) if options.check else faults(report)
    for line in found:
        print(f"FAIL {line}", file=sys.stderr)
    n = len(report["kernels"])
    print(f"{n} variants × {len(options.targets)} targets with Triton {report['triton']}: {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
