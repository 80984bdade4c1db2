"""The build of the C++ extension: it runs on every x86-64, exports only its entry and uses torch's threads."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastsae import _cpu

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = Path(_cpu.__file__)
# Instructions of AVX and later start with v (vaddps); their registers are called ymm, zmm and k.
AVX = re.compile(r"\tv[a-z]{2}|%[yz]mm|%k[0-7]")


def objdump(*arguments: str) -> str:
    program = shutil.which("objdump")
    if program is None:
        pytest.skip("objdump (binutils) is not installed")
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def functions(listing: str) -> dict[str, list[str]]:
    """The lines of a disassembly by function."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        if header := re.fullmatch(r"[0-9a-f]+ <(.+)>:", line):
            lines = found.setdefault(header[1], [])
        else:
            lines.append(line)
    return found


def test_nothing_is_compiled_for_the_build_machine() -> None:
    for path in [ROOT / "setup.py", ROOT / "pyproject.toml", *(ROOT / "csrc").rglob("*.*")]:
        flags = re.findall(r"^[^#/\n]*-m(?:arch|tune|cpu)=\S*", path.read_text(), re.MULTILINE)
        stated = [flag for flag in flags if "Never -march=native" not in flag]
        assert not stated, f"{path} builds for one processor: {stated}"


def exported(extension: Path) -> list[str]:
    table = objdump("-T", str(extension))
    return [line.split()[-1] for line in table.splitlines() if re.match(r"[0-9a-f]{8,} ", line) and "*UND*" not in line]


def test_only_the_entry_is_exported() -> None:
    assert exported(EXTENSION) == ["PyInit__cpu"]


def test_base_objects_hold_no_avx() -> None:
    objects = sorted(path for group in ("base", "once") for path in (ROOT / "build").glob(f"temp.*/{group}/*.o"))
    if not objects:
        pytest.skip("the build objects are not here (build/temp.*/base): the extension was not built in this tree")
    for path in objects:
        wrong = [line for line in objdump("-d", "--no-show-raw-insn", str(path)).splitlines() if AVX.search(line)]
        assert not wrong, f"{path} does not run on every x86-64: {wrong[0]}"


def test_what_instruction_sets_share_holds_no_avx() -> None:
    """If several objects hold the same inline function, the linker keeps one: never one compiled for a wider set.

    A clone (its name has a dot) belongs to the object that made it, so it may use the instructions of that object.
    """
    if _cpu.isas() == ["base"]:
        pytest.skip(f"this processor has no instruction set but base in this build ({EXTENSION.name})")
    found = functions(objdump("-d", "--no-show-raw-insn", str(EXTENSION)))
    own = {name for name in found if "avx" in name}
    assert len(own) > 10, "the extension has no symbols left (stripped?), so nothing was looked at"
    assert any(AVX.search(line) for name in own for line in found[name])
    wrong = [
        name for name, lines in found.items() if name not in own and "." not in name and any(map(AVX.search, lines))
    ]
    assert not wrong, f"shared by all instruction sets, but not every processor can run it: {wrong}"


# -- threads and instruction set, in processes of their own -----------------------------------------------------------


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)


def test_threads_are_torchs_own() -> None:
    """set_num_threads(1) starts none, 3 starts two, and torch's own ops then use the same two: one OpenMP runtime."""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("/proc is not there, so threads cannot be counted")
    program = """
import os, torch
from fastsae import SparseCodes, ops
def count(): return len(os.listdir("/proc/self/task"))
codes = SparseCodes(torch.ones(4096, 8), torch.arange(8, dtype=torch.int32).repeat(4096, 1), 8)
W, counts = torch.ones(8, 64), []
torch.set_num_threads(1); ops.decode(codes, W, backend="cpu"); counts.append(count())
torch.set_num_threads(3); ops.decode(codes, W, backend="cpu"); counts.append(count())
torch.ones(1 << 20).exp(); counts.append(count())
torch.set_num_threads(1); ops.decode(codes, W, backend="cpu"); counts.append(count())
print(*(c - counts[0] for c in counts))
print(len({line.split()[-1] for line in open("/proc/self/maps") if "gomp" in line}))
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "2", "2", "2", "1"]


@pytest.mark.long
def test_the_environment_chooses_the_instruction_set() -> None:
    program = "import fastsae; print(fastsae.backends()['cpu']['detail']['isa'])"
    for isa in _cpu.isas()[-1:]:
        done = run(program, FASTSAE_CPU_ISA=isa)
        assert done.stdout.split() == [isa], done.stderr
    done = run(program, FASTSAE_CPU_ISA="mmx")
    assert done.returncode != 0
    assert f'instruction set "mmx" is not available here; this processor has: {", ".join(_cpu.isas())}' in done.stderr
