"""The border to native code: no setting of torch and no malformed tensor makes C++ read or write out of bounds.

torch's defaults (dtype, device) may change at any time, in any part of a program. Each setting is tried in a process of
its own (tests.border_worker), where a crash is a failed test. The results are compared bit for bit with those of a
process that changed no setting.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsae
from fastsae.backends import buffers
from tests import border_worker

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
needs_cpu = pytest.mark.skipif(
    not fastsae.backends()["cpu"]["available"], reason="the C++ extension is not built: the cpu backend is missing"
)


@cache
def outcomes(setting: str, when: str = "start") -> dict[str, str]:
    """What tests.border_worker prints. A process that dies fails the test."""
    command = [sys.executable, "-m", "tests.border_worker", setting, when]
    # glibc fills freed and fresh memory with a pattern, so that a read of either changes the bits.
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "MALLOC_PERTURB_": "165"}
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}:\n{done.stderr[-2000:]}"
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- torch's settings --------------------------------------------------------------------------------------------------


@needs_cpu
def test_no_call_fails_under_torchs_defaults() -> None:
    wrong = {name: got for name, got in outcomes("as it is").items() if ":" in got}
    assert not wrong


EVERY_TIME = ("two threads", "inference_mode", "float64 on meta")


def starts_and_midways() -> Iterator[Any]:
    """(setting, when): each from the start; midway, where what was made before is used on, one of each kind."""
    for setting in border_worker.SETTINGS:
        if setting != "as it is":
            yield pytest.param(setting, "start", marks=[] if setting in EVERY_TIME else pytest.mark.long)
        if setting in EVERY_TIME:
            yield pytest.param(setting, "midway", marks=pytest.mark.long)


every_setting = pytest.mark.parametrize(("setting", "when"), list(starts_and_midways()))


def differing(setting: str, when: str, *, steps: bool) -> dict[str, str]:
    """The calls that raise, or whose bits differ from the defaults': those of a trainer if steps, else all others."""
    expected, got = outcomes("as it is"), outcomes(setting, when)
    assert got.keys() == expected.keys()
    # The reference uses torch's own matmul, whose order of summation depends on the number of threads.
    compared = [name for name in expected if not ("threads" in setting and name.startswith("reference"))]
    return {name: got[name] for name in compared if got[name] != expected[name] and (": step" in name) == steps}


@pytest.mark.long
@needs_cpu
@every_setting
def test_no_setting_of_torch_changes_a_bit_of_an_op(setting: str, when: str) -> None:
    """This includes a module with its own dtype and device: its initial weights, its forward pass and its codes."""
    assert not differing(setting, when, steps=False)


@needs_cpu
@every_setting
def test_no_setting_of_torch_changes_a_bit_of_a_step(setting: str, when: str) -> None:
    wrong = differing(setting, when, steps=True)
    if setting == "inference_mode":  # training needs gradients, which this mode turns off: torch raises
        wrong = {name: what for name, what in wrong.items() if not what.startswith("RuntimeError: ")}
    assert not wrong


# -- malformed calls ---------------------------------------------------------------------------------------------------


@needs_cpu
def test_malformed_calls_never_reach_cpp() -> None:
    got = outcomes("hostile")
    assert len(got) > 100
    wrong = {name: what for name, what in got.items() if what.split(":")[0] not in ("ValueError", "TypeError")}
    assert not wrong, "\n".join(f"{name}: {what}" for name, what in wrong.items())


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_empty_batch_may_begin_past_the_end_of_its_memory(dtype: torch.dtype) -> None:
    """As one layer of an empty stack does: its storage holds nothing, and its offset is two rows."""
    x = torch.empty(3, 0, 8, dtype=dtype)[2]
    assert x.storage_offset() > x.untyped_storage().nbytes()
    sae = fastsae.SparseAutoencoder(8, 16, fastsae.TopK(2), dtype=dtype, seed=0)
    with torch.no_grad():
        out = sae(x)
    assert out.recon.shape == (0, 8)
    codes = fastsae.SparseCodes(x[:, :2], torch.empty(3, 0, 2, dtype=torch.int32)[2], 16)
    assert fastsae.ops.decode(codes, sae.W_dec).shape == (0, 8)
    assert fastsae.ops.active_dot(x, codes, sae.W_dec).shape == (0, 2)
    assert not fastsae.ops.active_outer(codes, x, 16).any()
    assert int(fastsae.ops.by_latent(codes).offsets[-1]) == 0


@pytest.mark.parametrize("shape", [(-1,), (2, -3), (2**61,), (2**40, 2**40), (2**31, 2**31)])
def test_a_size_that_int64_cannot_count_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a buffer has shape"):
        buffers.empty(shape, torch.float32, CPU)


def test_sizes_counted_in_int32() -> None:
    assert buffers.count_int32("slots", 2**31 - 1) == 2**31 - 1
    for n in (-1, 2**31):
        with pytest.raises(ValueError, match=f"slots: {n}, expected 0 to 2147483647"):
            buffers.count_int32("slots", n)


def test_buffers_have_the_requested_dtype_device_and_values() -> None:
    with torch.device("meta"):
        made = [
            buffers.empty((2, 3), torch.float32, CPU),
            buffers.zeros((2, 3), torch.int32, CPU),
            buffers.full((2, 3), -1, torch.int64, CPU),
            buffers.scalar(True, torch.bool, CPU),
            buffers.arange(4, torch.int32, CPU),
        ]
    assert [t.dtype for t in made] == [torch.float32, torch.int32, torch.int64, torch.bool, torch.int32]
    assert {t.device for t in made} == {CPU}
    assert [t.tolist() for t in made[1:]] == [[[0] * 3] * 2, [[-1] * 3] * 2, True, [0, 1, 2, 3]]


# -- the source --------------------------------------------------------------------------------------------------------

MAKERS = {
    "arange", "as_tensor", "asarray", "empty", "empty_strided", "eye", "frombuffer", "full", "linspace", "logspace",
    "normal", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices",
    "triu_indices", "zeros",
}  # fmt: skip
COVERED = (
    "fastsae/backends", "fastsae/kernels", "fastsae/codes.py", "fastsae/reference", "fastsae/data", "fastsae/runs",
    "fastsae/model", "fastsae/training", "fastsae/ops",
)  # fmt: skip
NOT_YET: set[str] = set()
"""Folders exempt from the rule while they are rewritten."""


def calls_of_torch(path: Path) -> Iterator[ast.Call]:
    """Calls of torch.<name>(...)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch":
                yield node


def source(parts: set[str]) -> Iterator[Path]:
    for part in sorted(parts):
        path = ROOT / part
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def unsaid(call: ast.Call) -> str | None:
    """What a call leaves to torch's defaults."""
    assert isinstance(call.func, ast.Attribute)
    given = {keyword.arg for keyword in call.keywords}
    if call.func.attr in MAKERS:
        if any(k.arg is None and isinstance(k.value, ast.Name) and k.value.id == "factory" for k in call.keywords):
            return None  # a module's own dtype and device
        return " and ".join(name for name in ("dtype", "device") if name not in given) or None
    if call.func.attr == "where" and len(call.args) == 3 and not any(map(_may_be_tensor, call.args[1:])):
        return "dtype: a choice of two plain numbers has the default dtype"
    return None


def _may_be_tensor(node: ast.expr) -> bool:
    return not all(
        isinstance(n, (ast.Constant, ast.UnaryOp, ast.unaryop, ast.BinOp, ast.operator)) for n in ast.walk(node)
    )


def test_every_new_tensor_states_its_dtype_and_device() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]} does not say {what}"
        for path in source(set(COVERED) - NOT_YET)
        for call in calls_of_torch(path)
        if (what := unsaid(call))
    ]
    assert not wrong, "\n".join(wrong)


def test_backends_make_buffers_in_one_place() -> None:
    """Only backends/buffers.py calls torch.empty and the like. `*_like` copy the dtype and device of a tensor."""
    allowed = {ROOT / "fastsae/backends/buffers.py", ROOT / "fastsae/backends/reference.py"}
    wrong = [
        f"{path.relative_to(ROOT)}:{call.lineno}: {ast.unparse(call)[:80]}; use fastsae.backends.buffers"
        for path in source({"fastsae/backends", "fastsae/kernels"})
        if path not in allowed
        for call in calls_of_torch(path)
        if isinstance(call.func, ast.Attribute) and call.func.attr in MAKERS
    ]
    assert not wrong, "\n".join(wrong)


def test_addresses_are_made_in_one_place() -> None:
    """Every address that C++ on the CPU receives is checked where it is made."""
    memory = ROOT / "fastsae/backends/cpu/memory.py"
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in source({"fastsae/backends", "fastsae/kernels"})
        if path != memory
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "data_ptr"
    ]
    assert not wrong, f"use fastsae.backends.cpu.memory.numbers: {wrong}"
