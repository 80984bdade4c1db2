"""The check of the CUDA kernels' registers: its rules on made-up logs, and a reading of this tree's extension."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from bench import ptxas, ptxas_log

ROOT = Path(__file__).resolve().parent.parent
needs_filt = pytest.mark.skipif(shutil.which("c++filt") is None, reason="c++filt (binutils) is not installed")

# fastsae::(anonymous namespace)::add_kernel<true, __nv_bfloat16>(__nv_bfloat16*), another source's twin, one of CUB's
ADD = "_ZN7fastsae41_GLOBAL__N__8b207604_9_adding_cu_b1904ad710add_kernelILb1E13__nv_bfloat16EEvPT0_"
TWIN = ADD.replace("8b207604_9_adding_cu_b1904ad7", "11223344_9_gather_cu_aabbccdd")
CUB = "_ZN3cub26CUB_300001_SM_800_900_10006detail11EmptyKernelIvEEvv"


def said(name: str, target: str, registers: int = 40, spill: int = 0, stack: int = 0, more: str = "") -> str:
    """What ptxas prints about one kernel."""
    return (
        f"ptxas info    : Compiling entry function '{name}' for '{target}'\n"
        f"ptxas info    : Function properties for {name}\n"
        f"    {stack} bytes stack frame, {spill} bytes spill stores, 0 bytes spill loads\n"
        f"ptxas info    : Used {registers} registers, used 0 barriers{more}\n"
        "ptxas info    : Compile time = 1.000 ms\n"
    )


def entry(name: str, bounds: str) -> str:
    return f".visible .entry {name}(\n.param .u64 {name}_param_0\n)\n{bounds}\n{{\nret;\n}}\n"


def usage(*kernels: tuple[str, str, int]) -> str:
    return "\n".join(f"arch = {target}\n Function {name}:\n  REG:{n} STACK:0 SHARED:0" for name, target, n in kernels)


def report(
    blocks: int | None = 4, threads: int | None = 128, targets: tuple[str, ...] = ptxas.TARGETS, **changes: Any
) -> dict[str, Any]:
    """A report of one kernel. The changes apply to its record for sm_90a."""
    record = {"registers": 40, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 0}
    records = {target: record | (changes if target == "sm_90a" else {}) for target in targets}
    for target in targets:
        records[target] |= ptxas.fits(records[target], target, threads)
    kernel = {"threads": threads, "blocks": blocks, "targets": records}
    return {"nvcc": "13.0", "kernels": {"adding/add_kernel": kernel}, "cub": {}, "called": {}, "warnings": []}


# -- reading -----------------------------------------------------------------------------------------------------------


def test_a_log_is_read_by_kernel_and_target() -> None:
    more = ", 24 bytes cumulative stack size, 640 bytes smem, 360 bytes cmem[0]"
    kernels, called = ptxas_log.read_log(
        "ptxas info    : 0 bytes gmem\n" + said(ADD, "sm_80") + said(ADD, "sm_90a", 107, spill=16, stack=8, more=more)
    )
    plain = {"registers": 40, "spill_bytes": 0, "stack_bytes": 0, "shared_bytes": 0}
    other = {"registers": 107, "spill_bytes": 16, "stack_bytes": 24, "shared_bytes": 640}
    assert kernels == {(ADD, "sm_80"): plain, (ADD, "sm_90a"): other}
    assert called == {}


def test_spills_are_the_larger_of_stores_and_loads() -> None:
    text = said(ADD, "sm_80", spill=16).replace("0 bytes spill loads", "32 bytes spill loads")
    kernels, _ = ptxas_log.read_log(text)
    assert kernels[ADD, "sm_80"]["spill_bytes"] == 32


def test_a_called_function_is_not_taken_for_a_kernel() -> None:
    text = said(ADD, "sm_80") + (
        "ptxas info    : Function properties for _Z1gPfi\n"
        "    8 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads\n"
    )
    kernels, called = ptxas_log.read_log(text)
    assert list(kernels) == [(ADD, "sm_80")]
    assert called == {"_Z1gPfi": {"spill_bytes": 4, "stack_bytes": 8, "shared_bytes": 0}}


def test_interleaved_lines_of_two_targets_are_refused() -> None:
    first, second = said(ADD, "sm_80").splitlines(), said(ADD, "sm_90a").splitlines()
    mixed = "\n".join([first[0], second[0], *first[1:], *second[1:]]) + "\n"
    with pytest.raises(ValueError, match="what it said of several targets is mixed"):
        ptxas_log.read_log(mixed)


def test_launch_bounds_are_read_from_ptx() -> None:
    text = entry("both", ".maxntid 32, 8, 1\n.minnctapersm 4") + entry("threads", ".maxntid 64") + entry("none", "")
    assert ptxas_log.read_bounds(text) == {"both": (256, 4), "threads": (64, None), "none": (None, None)}


def test_usage_is_read_by_target() -> None:
    text = usage(("a", "sm_80", 30), ("a", "sm_90a", 32)) + "\n Function b:\n  REG:8 STACK:0"
    assert ptxas_log.read_usage(text) == {("a", "sm_80"): 30, ("a", "sm_90a"): 32, ("b", "sm_90a"): 8}


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        ("fastsae::(anonymous namespace)::starts_kernel(int const*, long)", "starts_kernel"),
        ("void fastsae::(anonymous namespace)::add<true, __half>(__half const*)", "add<true, f16>"),
        (
            "void fastsae::sum<float, fastsae::(anonymous namespace)::Rows<__nv_bfloat16> >(float*)",
            "sum<float, Rows<bf16>>",
        ),
        ("void cub::CUB_300001_SM_800::detail::Sort<(cub::CUB_300001_SM_800::Order)0, int>(int*)", "cub::Sort"),
    ],
)
def test_short_names(demangled: str, short: str) -> None:
    assert ptxas_log.short_name(demangled) == short


# -- one report of three sources ---------------------------------------------------------------------------------------

BOUNDS = ".maxntid 128, 1, 1\n.minnctapersm 4"


@needs_filt
def test_kernels_are_named_by_source_and_cubs_kernels_are_listed_apart() -> None:
    logs = {"adding": said(ADD, "sm_90a", 107) + said(CUB, "sm_90a", 4), "gather": said(TWIN, "sm_90a", 108)}
    logs["gather"] += "ptxas warning : Value of threads per SM for entry x is out of range\n"
    made = ptxas.report_of(
        "13.0",
        logs,
        entry(ADD, BOUNDS) + entry(TWIN, BOUNDS) + entry(CUB, ""),
        usage((ADD, "sm_90a", 107), (TWIN, "sm_90a", 108), (CUB, "sm_90a", 4)),
    )
    assert list(made["kernels"]) == ["adding/add_kernel<true, bf16>", "gather/add_kernel<true, bf16>"]
    kernel = made["kernels"]["adding/add_kernel<true, bf16>"]
    assert (kernel["threads"], kernel["blocks"]) == (128, 4)
    assert kernel["targets"]["sm_90a"]["blocks_allowed"] == 4
    assert list(made["cub"]) == ["cub::EmptyKernel"]
    assert made["warnings"] == ["gather.cu: ptxas warning : Value of threads per SM for entry x is out of range"]
    row = "| `adding/add_kernel<true, bf16>` | 128 | 4 | — | 107 r, 4 blocks, 512 threads | — |"
    assert row in ptxas.markdown(made).splitlines()
    assert not [line for line in ptxas.faults(made) if "cub" in line]


@needs_filt
@pytest.mark.parametrize("stale", ["registers", "gone", "ptx"])
def test_logs_of_another_build_are_refused(stale: str) -> None:
    logs = {"adding": said(ADD, "sm_90a", 107)}
    ptx = entry(TWIN if stale == "ptx" else ADD, BOUNDS)
    used = {"registers": usage((ADD, "sm_90a", 90)), "gone": "", "ptx": usage((ADD, "sm_90a", 107))}[stale]
    with pytest.raises(ptxas.NotBuilt, match=r"the logs are not of this extension.* build first"):
        ptxas.report_of("13.0", logs, ptx, used)


# -- the rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks", "resident"),
    [
        (128, 128, 0, 4, 512),
        (129, 32, 0, 12, 384),  # rounded up to 136: three warps in each of the four partitions
        (64, 256, 0, 4, 1024),
        (32, 32, 0, 64, 1024),  # no more than 32 blocks
        (20, 256, 0, 10, 2048),  # no more than 64 warps
        (32, 256, 114 << 10, 8, 256),  # the system reserves some, so two blocks of half the shared memory do not fit
        (255, 33, 0, 4, 132),  # a block of 33 threads has two warps
    ],
)
def test_what_fits_on_a_multiprocessor(registers: int, threads: int, shared: int, blocks: int, resident: int) -> None:
    found = ptxas.fits({"registers": registers, "shared_bytes": shared}, "sm_90a", threads)
    assert found == {"blocks_allowed": blocks, "threads_resident": resident}


def test_a_sound_kernel_passes() -> None:
    assert ptxas.faults(report()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spill_bytes": 8, "stack_bytes": 8}, "on sm_90a spills 8 bytes a thread"),
        ({"stack_bytes": 16}, "on sm_90a has a stack frame of 16 bytes"),
        ({"registers": 130}, "on sm_90a: 130 registers allow 3 blocks, 4 are stated"),
        ({"shared_bytes": 60 << 10}, "on sm_90a: 3 blocks fit on a multiprocessor, 4 are stated"),
        ({"threads": None, "blocks": None}, "has no launch bounds"),
        ({"blocks": None}, "states no number of blocks"),
        ({"targets": ("sm_80", "sm_90a")}, "is missing for sm_100a"),
    ],
)
def test_faults_are_named(changes: dict[str, Any], message: str) -> None:
    (found,) = ptxas.faults(report(**changes))
    assert re.match(f"adding/add_kernel .*{message}|adding/add_kernel {message}", found)


def test_called_functions_and_warnings_are_faults() -> None:
    made = report()
    made["called"] = {"adding/g": {"spill_bytes": 4, "stack_bytes": 8, "shared_bytes": 0}}
    made["warnings"] = ["adding.cu: ptxas warning : no"]
    assert ptxas.faults(made) == ["adding.cu: ptxas warning : no", "adding/g (called) spills 4 bytes a thread"]


def test_the_check_compares_with_the_table_of_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptxas, "FOLDER", tmp_path)
    (missing,) = ptxas.check(report())
    assert "there is no committed table for nvcc 13.0" in missing
    assert ptxas.write(report()) == tmp_path / "cuda-13.0"
    assert ptxas.check(report(registers=44)) == []
    (grown,) = ptxas.check(report(registers=45))
    assert grown.startswith(
        "adding/add_kernel on sm_90a: registers rose from 40 to 45; if it is worth it, run `make cuda"
    )
    other = report()
    other["kernels"]["adding/new_kernel"] = other["kernels"].pop("adding/add_kernel")
    new, gone = sorted(ptxas.check(other), reverse=True)
    assert new == "adding/new_kernel is not in the committed table: run `make cuda-report`"
    assert gone == "adding/add_kernel is in the committed table and no longer there: run `make cuda-report`"


def test_a_table_is_current_until_a_source_or_nvcc_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = ["Cuda compilation tools, release 13.0, V13.0.88"]
    monkeypatch.setattr(ptxas, "FOLDER", tmp_path / "tables")
    monkeypatch.setattr(ptxas, "ROOT", tmp_path)
    monkeypatch.setattr(ptxas, "installed_nvcc", lambda: said[0])
    monkeypatch.setattr(sys, "argv", ["bench.ptxas", "--current"])
    source = tmp_path / "csrc" / "cuda" / "adding.cu"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    assert ptxas.main() == 1, "there is no table"
    ptxas.write(report(spill_bytes=8))
    assert ptxas.main() == 1, "a table with faults is no proof"
    ptxas.write(report())
    assert ptxas.main() == 0
    said[0] = "Cuda compilation tools, release 13.0, V13.0.90"
    assert ptxas.main() == 1
    said[0] = ""
    assert ptxas.main() == 1, "there is no nvcc"
    said[0] = "Cuda compilation tools, release 13.0, V13.0.88"
    assert ptxas.main() == 0
    source.write_text("two")
    assert ptxas.main() == 1


# -- a tree that is not built ------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree with one source, its log and its extension, which holds no code."""
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "adding.cu").touch()
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "adding.cu.log").touch()
    monkeypatch.setattr(ptxas, "ROOT", tmp_path)
    monkeypatch.setattr(ptxas, "BUILD", tmp_path / "build")
    monkeypatch.setattr(sys, "argv", ["bench.ptxas", "--check"])
    return tmp_path


def built(tree: Path) -> Path:
    extension = tree / "fastsae" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    extension.parent.mkdir()
    extension.write_bytes(b"\0Cuda compilation tools, release 13.0, V13.0.88\0")
    return extension


def test_without_an_extension_it_says_how_to_build(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ptxas.main() == 1
    told = capsys.readouterr().err
    assert re.match(r"FAIL there is no .*_cuda.*; build first: FASTSAE_CUDA=require pip install -e \. where", told)


def test_without_a_log_it_says_how_to_build(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built(tree)
    (tree / "build" / "adding.cu.log").unlink()
    assert ptxas.main() == 1
    assert re.match(r"FAIL there is no build log .*adding\.cu\.log; build first: ", capsys.readouterr().err)


def test_a_source_that_is_newer_than_the_extension_is_seen(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    extension = built(tree)
    later = extension.stat().st_mtime + 10
    source = tree / "csrc" / "cuda" / "adding.cu"
    os.utime(source, (later, later))
    assert ptxas.main() == 1
    assert re.search(r"is older than .*adding\.cu; build first: ", capsys.readouterr().err)


# -- the extension that is here ----------------------------------------------------------------------------------------


@needs_filt
def test_the_extension_of_this_tree_can_be_read() -> None:
    try:
        made = ptxas.measure()
    except ptxas.NotBuilt as why:
        pytest.skip(f"no CUDA extension of this tree's sources with its build logs: {why}")
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr)
    assert made["kernels"]
    assert made["cub"]
    for name, kernel in made["kernels"].items():
        assert kernel["threads"], name
        assert re.fullmatch(r"\w+/\w+(<[\w, <>]+>)?", name), name
