"""`python -m bench.ptxas`: what nvcc's assembler, ptxas, reported about every CUDA kernel, as a table.

The table holds what decides speed on a GPU and can be seen without one: registers, spilled bytes, stack frames, shared
memory, and how many threads these leave a multiprocessor. Three sources, which must be of one build: the logs that
setup.py keeps beside the objects, the extension's PTX (launch bounds) and its machine code (which kernels and
registers).

The table is in bench/results/compiled/cuda-<version of nvcc>/; `--check` exits with 1 if something is wrong outright or
worse than in the table. CUB's kernels are listed, not judged. Dynamic shared memory is not known here: its
size comes with a launch. The table names what it was made of: with `--current`, nothing is read but the sources and
nvcc's version, and the exit code is 0 if that is what is here.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from bench.compiled import FOLDER, digest, is_current, regressions, write_table
from bench.ptxas_log import demangled, read_bounds, read_log, read_usage, said_by, short_name

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "cuda"
REPORT = "run `make cuda-report`"

TARGETS = ("sm_80", "sm_90a", "sm_100a")
SHARED = {"sm_80": 164 << 10, "sm_90a": 228 << 10, "sm_100a": 228 << 10}
"""Bytes of shared memory of a multiprocessor, of which each block takes another RESERVED for the system."""
RESERVED = 1 << 10
# The same for all three: threads of a warp, warps and blocks of a multiprocessor, its four parts, and the registers of
# one part, which a warp gets in units of 256.
WARP, WARPS, BLOCKS, PARTS, PART_REGISTERS, REGISTERS_AT_ONCE = 32, 64, 32, 4, 1 << 14, 256


class NotBuilt(Exception):
    """There is nothing to read, or it is not from a single build."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; build first: FASTSAE_CUDA=require pip install -e . where there is nvcc")


# -- the report --------------------------------------------------------------------------------------------------------


def fits(record: dict[str, Any], target: str, threads: int | None) -> dict[str, int | None]:
    """How many blocks the registers allow, and how many threads of them fit with everything else."""
    if threads is None or target not in SHARED:
        return {"blocks_allowed": None, "threads_resident": None}
    warps = -(-threads // WARP)
    of_warp = -(-record["registers"] * WARP // REGISTERS_AT_ONCE) * REGISTERS_AT_ONCE
    allowed = PART_REGISTERS // of_warp * PARTS // warps
    blocks = min(allowed, BLOCKS, WARPS // warps, SHARED[target] // (record["shared_bytes"] + RESERVED))
    return {"blocks_allowed": allowed, "threads_resident": blocks * threads}


def report_of(version: str, logs: dict[str, str], ptx: str, usage: str) -> dict[str, Any]:
    """{"nvcc", "kernels": {name: {"threads", "blocks", "targets": {target: record}}}, "cub", "called", "warnings"}.

    logs: by source without its ending. Raises NotBuilt where the three are not of one build.
    """
    bounds, registers = read_bounds(ptx), read_usage(usage)
    read = {source: read_log(text) for source, text in logs.items()}
    said = {key: record["registers"] for kernels, _ in read.values() for key, record in kernels.items()}
    if said != registers or {name for name, _ in said} != bounds.keys():
        one = next(iter(dict(said.items() ^ registers.items())), ("the launch bounds", "PTX"))
        raise NotBuilt(f"the logs are not of this extension (they differ in {one[0]} for {one[1]})")
    names = demangled({name for name, _ in said} | {name for _, called in read.values() for name in called})
    report: dict[str, Any] = {"nvcc": version, "kernels": {}, "cub": {}, "called": {}, "warnings": []}
    for source, (kernels, called) in sorted(read.items()):
        for (mangled, target), record in sorted(kernels.items(), key=lambda item: names[item[0][0]]):
            threads, blocks = bounds[mangled]
            name = short_name(names[mangled])
            is_cub = name.startswith("cub::")
            table = report["cub" if is_cub else "kernels"]
            kernel = table.setdefault(
                name if is_cub else f"{source}/{name}", {"threads": threads, "blocks": blocks, "targets": {}}
            )
            record |= fits(record, target, threads)
            if target in kernel["targets"] and not is_cub:
                raise ValueError(f"two kernels of {source}.cu are called {name}")
            old = kernel["targets"].get(target, record)  # where CUB has several kernels of one name, the largest
            kernel["targets"][target] = max(old, record, key=lambda r: (r["spill_bytes"], r["registers"]))
        report["called"] |= {f"{source}/{short_name(names[name])}": record for name, record in called.items()}
        report["warnings"] += [f"{source}.cu: {line}" for line in logs[source].splitlines() if "warning" in line]
    for kernel in [*report["kernels"].values(), *report["cub"].values()]:
        found = kernel["targets"]
        kernel["targets"] = {target: found[target] for target in sorted(found, key=lambda t: int(re.sub(r"\D", "", t)))}
    return report


# -- reading what is here ----------------------------------------------------------------------------------------------


def measure() -> dict[str, Any]:
    """The report of the extension of this tree. Raises NotBuilt."""
    extension = ROOT / "fastsae" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not extension.exists():
        raise NotBuilt(f"there is no {extension}")
    if newer := [p for p in (ROOT / "csrc" / "cuda").iterdir() if p.stat().st_mtime > extension.stat().st_mtime]:
        raise NotBuilt(f"{extension} is older than {newer[0]}")
    logs = {source.stem: BUILD / f"{source.name}.log" for source in (ROOT / "csrc" / "cuda").glob("*.cu")}
    if missing := [log for log in logs.values() if not log.exists()]:
        raise NotBuilt(f"there is no build log {missing[0]}")
    versions = set(re.findall(rb"Cuda compilation tools, release (\d+\.\d+)", extension.read_bytes()))
    if len(versions) != 1:
        raise NotBuilt(f"{extension} names {len(versions)} versions of nvcc, expected one")
    ptx, usage = (said_by("cuobjdump", option, str(extension)) for option in ("--dump-ptx", "--dump-resource-usage"))
    return report_of(versions.pop().decode(), {source: log.read_text() for source, log in logs.items()}, ptx, usage)


# -- the table ---------------------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# Kernels as nvcc {report['nvcc']} compiles them",
        "",
        "Written by `make cuda-report`. Threads of a block at most, and the blocks on a multiprocessor that the launch",
        "bounds state. For each target: registers of a thread (r), the blocks that these allow on a multiprocessor,",
        "the threads that fit with everything but dynamic shared memory, static shared memory of a block; spills and",
        "stack frames are shown where there are any. sm_80 is an A100, sm_90a an H100 or H200, sm_100a a B200.",
        "",
    ]
    for title, kernels in ((None, report["kernels"]), ("CUB's, which are listed and not judged", report["cub"])):
        lines += [f"## {title}", ""] if title else []
        lines += [f"| kernel | threads | blocks | {' | '.join(TARGETS)} |", "|---" * (len(TARGETS) + 3) + "|"]
        for name, kernel in kernels.items():
            cells = " | ".join(cell(kernel["targets"].get(target)) for target in TARGETS)
            stated = " | ".join(str(kernel[what] or "—") for what in ("threads", "blocks"))
            lines.append(f"| `{name}` | {stated} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return "—"
    parts = [f"{record['registers']} r"]
    if record["blocks_allowed"] is not None:
        parts.append(f"{record['blocks_allowed']} blocks, {record['threads_resident']} threads")
    if record["shared_bytes"]:
        parts.append(f"{record['shared_bytes'] / 1024:.3g} KiB")
    for what in ("spill", "stack"):
        if record[f"{what}_bytes"]:
            parts.append(f"**{what} {record[f'{what}_bytes']} B**")
    return ", ".join(parts)


def table_folder(version: str) -> Path:
    return FOLDER / f"cuda-{version}"


def made_of(nvcc: str) -> str:
    """What decides the table: the sources, what builds, reads and judges them, and what nvcc says of its version."""
    return digest(ROOT, ("csrc/cuda/*", "setup.py", "bench/ptxas*.py", "bench/compiled.py"), nvcc)


def installed_nvcc() -> str:
    """What nvcc says of its version; "" where there is none."""
    from torch.utils.cpp_extension import CUDA_HOME  # from CUDA_HOME or the PATH, as setup.py finds it

    nvcc = Path(CUDA_HOME or "/usr/local/cuda") / "bin" / "nvcc"
    if not nvcc.exists():
        return ""
    return subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout


def write(report: dict[str, Any]) -> Path:
    of = None if faults(report) else made_of(installed_nvcc())
    return write_table(table_folder(report["nvcc"]), report, markdown(report), of)


# -- the check ---------------------------------------------------------------------------------------------------------


def faults(report: dict[str, Any]) -> list[str]:
    """The faults that no table excuses."""
    found = list(report["warnings"])
    every = [(f"{name} (called)", record) for name, record in report["called"].items()]
    for name, kernel in report["kernels"].items():
        threads, blocks = kernel["threads"], kernel["blocks"]
        if threads is None:
            found.append(f"{name} has no launch bounds")
        elif blocks is None:
            found.append(f"{name} states no number of blocks on a multiprocessor (the launch bounds' second)")
        found += [f"{name} is missing for {target}" for target in TARGETS if target not in kernel["targets"]]
        for target, record in kernel["targets"].items():
            every.append((f"{name} on {target}", record))
            if threads is None or blocks is None or record["blocks_allowed"] is None:
                continue
            if record["blocks_allowed"] < blocks:
                allowed = f"{record['registers']} registers allow {record['blocks_allowed']} blocks"
                found.append(f"{name} on {target}: {allowed}, {blocks} are stated")
            elif record["threads_resident"] < blocks * threads:
                fit = f"{record['threads_resident'] // threads} blocks fit on a multiprocessor"
                found.append(f"{name} on {target}: {fit}, {blocks} are stated")
    for where, record in every:
        if record["spill_bytes"]:
            found.append(f"{where} spills {record['spill_bytes']} bytes a thread")
        elif record["stack_bytes"]:
            found.append(f"{where} has a stack frame of {record['stack_bytes']} bytes")
    return found


def check(report: dict[str, Any]) -> list[str]:
    """Faults, and regressions against the table of the same version."""
    path = table_folder(report["nvcc"]) / "kernels.json"
    if not path.exists():
        return [*faults(report), f"there is no committed table for nvcc {report['nvcc']} ({path}): {REPORT}"]
    return faults(report) + regressions(report, json.loads(path.read_text()), REPORT)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ptxas", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed table instead of writing it")
    parser.add_argument("--current", action="store_true", help="say whether the committed table is of these sources")
    options = parser.parse_args()
    if options.current:
        said = installed_nvcc()
        release = re.search(r"release (\d+\.\d+)", said)
        return 0 if release and is_current(table_folder(release[1]), made_of(said)) else 1
    try:
        report = measure()
    except NotBuilt as why:
        print(f"FAIL {why}", file=sys.stderr)
        return 1
    if not options.check:
        print(f"wrote {write(report)}")
    found = check(report) if options.check else faults(report)
    for line in found:
        print(f"FAIL {line}", file=sys.stderr)
    n = len(report["kernels"])
    print(f"{n} kernels × {len(TARGETS)} targets with nvcc {report['nvcc']}: {len(found)} faults")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
