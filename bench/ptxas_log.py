"""Reads what nvcc's assembler and cuobjdump report of compiled kernels, for bench.ptxas."""

from __future__ import annotations

import re
import shutil
import subprocess
from math import prod
from typing import Any

from bench.compiled import one_number

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<target>\w+)'\n"
    r"[^\n]*Function properties for (?P=name)\n"
    r"(?P<said>[^\n]* spill [^\n]*\n[^\n]*Used \d+ registers[^\n]*)"
)
CALLED = re.compile(r"Function properties for (?P<name>\S+)\n(?P<said>[^\n]* spill [^\n]*)")
Found = dict[tuple[str, str], dict[str, Any]]  # by mangled name and target


def read_log(text: str) -> tuple[Found, dict[str, dict[str, Any]]]:
    """The records of a source's kernels, and of the functions that they call. Raises ValueError for other text."""
    kernels = {
        (entry["name"], entry["target"]): {"registers": one_number(r"Used (\d+) registers", entry["said"])}
        | sizes(entry["said"])
        for entry in ENTRY.finditer(text)
    }
    if len(kernels) != text.count("Compiling entry function"):
        raise ValueError("ptxas's output has changed, or what it said of several targets is mixed: build again")
    names = {name for name, _ in kernels}
    return kernels, {f["name"]: sizes(f["said"]) for f in CALLED.finditer(text) if f["name"] not in names}


def sizes(said: str) -> dict[str, int]:
    shared = re.search(r"(\d+) bytes smem", said)
    return {
        "spill_bytes": one_number(r"(\d+) bytes spill (?:stores|loads)", said),
        "stack_bytes": one_number(r"(\d+) bytes (?:stack frame|cumulative stack size)", said),
        "shared_bytes": int(shared[1]) if shared else 0,
    }


def read_bounds(ptx: str) -> dict[str, tuple[int | None, int | None]]:
    """Threads of a block and blocks on a multiprocessor as __launch_bounds__ states them, by mangled name."""
    found = {}
    for name, head in re.findall(r"\.entry\s+([\w$]+)([^{]*)\{", ptx):
        threads = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:,\s*(\d+))?(?:,\s*(\d+))?", head)
        blocks = re.search(r"\.minnctapersm\s+(\d+)", head)
        sides = [int(side) for side in threads.groups() if side] if threads else []
        found[name] = (prod(sides) if sides else None, int(blocks[1]) if blocks else None)
    return found


def read_usage(text: str) -> dict[tuple[str, str], int]:
    """Registers by mangled name and target, as cuobjdump lists them."""
    found, target = {}, ""
    for arch, name, registers in re.findall(r"^arch = (\S+)|^ Function (\S+):\n\s*REG:(\d+)", text, re.MULTILINE):
        target = arch or target
        if name:
            found[name, target] = int(registers)
    return found


def short_name(demangled: str) -> str:
    """A kernel's name as one would say it: no result, no arguments, no namespaces."""
    name = re.sub(r"\(anonymous namespace\)::|\bfastsae::|^void |CUB_\w+::", "", demangled)
    depth = 0
    for at, sign in enumerate(name):
        depth += (sign == "<") - (sign == ">")
        if sign == "(" and depth == 0:
            name = name[:at]
            break
    if name.startswith("cub::"):  # its template arguments take lines
        return f"cub::{name.split('<')[0].rsplit('::', 1)[-1]}"
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "f16").replace("> >", ">>").replace("> >", ">>")


def said_by(program: str, *arguments: str, said: str | None = None) -> str:
    found = shutil.which(program)
    if found is None and program == "cuobjdump":  # Triton brings one, the toolkit's smaller packages do not
        import triton

        found = triton.knobs.nvidia.cuobjdump.path
    if found is None:
        raise FileNotFoundError(f"{program} is not installed (package binutils)")
    return subprocess.run([found, *arguments], check=True, capture_output=True, text=True, input=said).stdout


def demangled(names: set[str]) -> dict[str, str]:
    listed = sorted(names)
    return dict(zip(listed, said_by("c++filt", said="\n".join(listed)).splitlines(), strict=True))
