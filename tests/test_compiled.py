"""The compile checks: their rules on made-up records, and what they find in toy kernels.

The toys are compiled in a process of their own, because Triton's interpreter may be on in this one.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from bench import compiled  # noqa: E402
from fastsae.kernels.variants import Variant  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# -- the rules ---------------------------------------------------------------------------------------------------------


def report(registers: int = 100, product: bool = False, target: str = "sm_90", **changes: Any) -> dict[str, Any]:
    record = {
        "registers": registers, "spill_bytes": 0, "shared_bytes": 1000, "warps": 4,
        "tensor_core": "wgmma" if product else None, "tensor_instructions": 4 if product else 0,
    } | changes  # fmt: skip
    return {
        "triton": triton.__version__,
        "kernels": {"toy/fp32": {"module": "toys", "product": product, "targets": {target: record}}},
        "costs": {"toys": {"Bytes": "4·N.", "Flops": "2·N."}},
    }


def test_every_launch_asks_for_fused_multiply_adds() -> None:
    """As the compile checks do. Triton 3.10 leaves them out where nobody asks, and other bits come out."""
    launches = []
    for path in (ROOT / "fastsae" / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Assign(targets=[ast.Name(id="common")], value=ast.Call(keywords=keywords)):
                    shared = {word.arg for word in keywords}
                case ast.Call(func=ast.Subscript(value=ast.Name(id=kernel)), keywords=keywords) if "kernel" in kernel:
                    words = {word.arg for word in keywords}
                    spread = {
                        word.value.id for word in keywords if word.arg is None and isinstance(word.value, ast.Name)
                    }
                    launches.append((f"{path.name}: {kernel}", words | (shared if "common" in spread else set())))
    assert len(launches) > 25
    assert [where for where, words in launches if "enable_fp_fusion" not in words] == []


@pytest.mark.parametrize("product", [False, True])
def test_a_sound_kernel_passes(product) -> None:
    fresh = report(product=product)
    assert compiled.faults(fresh) == []
    assert compiled.regressions(fresh, fresh) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes"),
        ({"shared_bytes": 228 << 10}, "takes 233472 bytes of shared memory, 232448 are there"),
        ({"product": True, "tensor_core": None}, r"without tensor-core instructions \(wgmma\)"),
    ],
)
def test_faults_are_named(changes, message) -> None:
    (found,) = compiled.faults(report(**changes))
    assert re.search(f"toy/fp32 on sm_90 .*{message}", found)


def test_sm_90_products_have_to_be_wgmma_and_sm_100_may_choose() -> None:
    asm = {"ptx": "mma.sync.aligned.m16n8k16 {%r1}"}
    log = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 40 registers"
    kinds = {
        name: compiled.measured(asm, log, compiled.TARGETS[name])["tensor_core"]
        for name in ("sm_80", "sm_90", "sm_100")
    }
    assert kinds == {"sm_80": "mma", "sm_90": None, "sm_100": "mma"}


def test_a_kernel_that_does_not_compile_is_a_fault() -> None:
    broken = report()
    broken["kernels"]["toy/fp32"]["targets"] = {"gfx942": {"error": "CompilationError: no"}}
    assert compiled.faults(broken) == ["toy/fp32 on gfx942 does not compile: CompilationError: no"]
    assert "**does not compile**" in compiled.markdown(broken)


def test_growth_beyond_a_tenth_is_a_regression() -> None:
    committed = report(registers=100, shared_bytes=1000)
    assert compiled.regressions(report(registers=110, shared_bytes=1100), committed) == []
    assert compiled.regressions(report(registers=60, shared_bytes=0), committed) == []
    (found,) = compiled.regressions(report(registers=111), committed)
    assert "toy/fp32 on sm_90: registers rose from 100 to 111" in found
    (found,) = compiled.regressions(report(shared_bytes=1101), committed)
    assert "shared_bytes rose from 1000 to 1101" in found


def test_the_table_and_the_kernels_have_to_list_the_same() -> None:
    fresh, committed = report(), report()
    committed["kernels"]["toy/old"] = committed["kernels"].pop("toy/fp32")
    gone, new = sorted(compiled.regressions(fresh, committed), key=lambda line: "is not in" in line)
    assert gone == "toy/old is in the committed table and no longer there: run `make kernels-report`"
    assert new == "toy/fp32 is not in the committed table: run `make kernels-report`"


def test_the_check_reads_the_table_of_its_minor_version(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "FOLDER", tmp_path)
    (missing,) = compiled.check(report())
    assert "there is no committed table" in missing
    folder = compiled.write(report())
    assert folder == tmp_path / f"triton-{'.'.join(triton.__version__.split('.')[:2])}"
    assert compiled.check(report()) == []
    assert len(compiled.check(report(registers=120))) == 1
    text = (folder / "kernels.md").read_text()
    assert "| toy/fp32 | 4 | 100 r, 0.977 KiB |" in text
    assert "- toys: bytes: 4·N; flops: 2·N" in text


def test_a_table_is_current_until_a_kernel_or_the_compiler_changes(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "FOLDER", tmp_path / "tables")
    monkeypatch.setattr(compiled, "ROOT", tmp_path)
    kernel = tmp_path / "fastsae" / "kernels" / "toy.py"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("one")
    asked = ["bench.compiled", "--current"]
    monkeypatch.setattr(sys, "argv", asked)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert compiled.main() == 1, "there is no table"
    compiled.write(report(spill_bytes=8))
    assert compiled.main() == 1, "a table with faults is no proof"
    compiled.write(report())
    assert compiled.main() == 0
    version = triton.__version__
    monkeypatch.setattr("importlib.metadata.version", lambda name: version + ".other")
    assert compiled.main() == 1
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    kernel.write_text("two")
    assert compiled.main() == 1


def test_costs_are_read_from_the_docstring(monkeypatch) -> None:
    module = SimpleNamespace(
        __doc__="out = A W\n\nBytes: N·D\n and more.\nFlops: none; 3 comparisons.\nWorkspace: 1.\n"
    )
    monkeypatch.setitem(sys.modules, "toy_costs", module)
    assert compiled.costs("toy_costs") == {"Bytes": "N·D and more.", "Flops": "none; 3 comparisons."}


def test_two_variants_of_one_name_are_refused(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "toy_twin", SimpleNamespace(variants=variants))
    with pytest.raises(ValueError, match="two variants are called toy/sum"):
        compiled.variants_of([__name__, "toy_twin"])


# -- toy kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def _sum_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + i)))


@triton.jit
def _product_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x))


@triton.jit
def _broken_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.load(x_ptr + tl.arange(0, BLOCK)).no_such_method())


@triton.jit
def _held_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """The sum needs all numbers and the store needs them again: each thread of the one warp holds 512."""
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x - tl.sum(x))


def variants() -> list[Variant]:
    def toy(kernel, name, kind, block, warps, product=False):
        signature = {"x_ptr": kind, "out_ptr": "*fp32"}
        return Variant(kernel, f"toy/{name}", signature, {"BLOCK": block}, warps, product=product)

    return [
        toy(_sum_kernel, "sum", "*fp32", 256, 4),
        toy(_product_kernel, "product", "*bf16", 64, 4, product=True),
        toy(_broken_kernel, "broken", "*fp32", 256, 4),
        toy(_held_kernel, "held", "*fp32", 16384, 1),
    ]


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> dict[str, Any]:
    """The toys' records on sm_90 and gfx942 from a cold cache, and again from a warm one."""
    code = (
        "import json; from bench.compiled import compile_all\n"
        "if __name__ == '__main__':\n"
        "    cold, warm = (compile_all(['tests.test_compiled'], ['sm_90', 'gfx942'], workers=1) for _ in range(2))\n"
        "    print(json.dumps([cold, warm]))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-3000:]
    cold, warm = json.loads(run.stdout)
    assert cold == warm
    return cold


@pytest.mark.long
def test_a_product_is_wgmma_and_a_sum_is_not(toys) -> None:
    product, plain = (toys["kernels"][f"toy/{name}"]["targets"] for name in ("product", "sum"))
    assert product["sm_90"]["tensor_core"] == "wgmma"
    assert product["gfx942"]["tensor_core"] == "mfma"
    assert product["sm_90"]["shared_bytes"] >= 64 * 64 * 2
    for target in ("sm_90", "gfx942"):
        assert plain[target]["tensor_core"] is None
        assert plain[target]["spill_bytes"] == 0
        assert 4 < plain[target]["registers"] < 64
        assert plain[target]["warps"] == 4


@pytest.mark.long
def test_what_spills_and_what_does_not_compile_is_found(toys) -> None:
    found = compiled.faults(toys)
    assert any(re.match(r"toy/held on sm_90 spills \d+ bytes", line) for line in found)
    for target in ("sm_90", "gfx942"):
        assert any(line.startswith(f"toy/broken on {target} does not compile: ") for line in found)
    assert not [line for line in found if "toy/sum" in line or "toy/product" in line]


def test_an_interpreting_process_is_refused() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "bench.compiled", "--check"], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert run.returncode == 2
    assert "TRITON_INTERPRET is set" in run.stderr
