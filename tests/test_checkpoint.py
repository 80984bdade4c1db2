"""Checkpoints: a state comes back exactly, damage is detected, and older checkpoints stay."""

from __future__ import annotations

import builtins
import errno
import io
import json
import math
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastsae.model.files import load, save
from fastsae.runs.checkpoint import (
    CheckpointError,
    list_checkpoints,
    newest_valid,
    prune,
    read_state,
    remove_unfinished,
    set_aside_newer,
    step_of,
    verify_checkpoint,
    write_checkpoint,
)
from fastsae.runs.rng import restore_rng_state, rng_state
from fastsae.runs.state_tree import join_state, split_state
from tests.train_case import module


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "optimizer": {"count": 3, "lr": 0.1, "moments": {"m": torch.randn(5, 4, generator=generator)}},
        "source": {"cursor": 2**80, "epoch": 1, "name": "tensor", "none": None, "flag": True, "list": [1, [2.5]]},
    }


def write(root: Path, step: int) -> Path:
    return write_checkpoint(root, step, state(), lambda path: save(module(), path))


# -- a state without pickle -------------------------------------------------------------------------------------------


def test_a_state_comes_back_exactly() -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(6, 4, generator=generator)
    tree = {
        "big": 2**128 - 1,
        "floats": [0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan],
        "nested": {"a": {"b": base}, "a.b": base[1:3].t(), "same": base},
        "types": [base.bfloat16(), base.double(), torch.tensor(3), torch.zeros(0, 3), torch.tensor([True])],
        "tuple": (1, "two", None),
        "empty": {},
    }
    plain, tensors = split_state(tree)
    back = join_state(json.loads(json.dumps(plain, allow_nan=False)), tensors)

    assert back["big"] == tree["big"]
    assert [f.hex() for f in back["floats"]] == [f.hex() for f in tree["floats"]]
    assert torch.equal(back["nested"]["a"]["b"], base)
    assert torch.equal(back["nested"]["a.b"], base[1:3].t())
    assert torch.equal(back["nested"]["same"], base)
    for got, expected in zip(back["types"], tree["types"], strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
    assert back["tuple"] == [1, "two", None]
    assert back["empty"] == {}
    # safetensors refuses shared memory: the three entries of `base` share none, and only the first is not a copy.
    assert len({t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}) == len(tensors) - 1
    assert tensors["state.nested.a.b"].data_ptr() == base.data_ptr()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(2), r"state\.x is a numpy\.ndarray, which a checkpoint cannot hold"),
        (np.float64(1.0), r"state\.x is a numpy\.float64"),
        (b"bytes", r"state\.x is a builtins\.bytes"),
        ({3: 1}, r"state\.x has the key 3; expected a string"),
        ({"$tensor": "a"}, r"has the key '\$tensor'"),
    ],
)
def test_what_a_state_cannot_hold_is_named(value: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        split_state({"x": value})


def test_random_generators_resume_where_they_were() -> None:
    import random

    before = rng_state()
    plain, tensors = split_state(before)

    def draw() -> tuple[Any, ...]:
        return torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(2).tolist()  # noqa: NPY002

    first = draw()
    assert draw() != first
    restore_rng_state(join_state(json.loads(json.dumps(plain)), tensors))
    assert draw() == first


# -- one checkpoint ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_and_is_also_a_saved_module(tmp_path: Path) -> None:
    path = write(tmp_path, 12)
    assert path == tmp_path / "step_00000012"
    assert step_of(path) == 12
    verify_checkpoint(path)
    back = read_state(path)
    assert back["step"] == 12
    assert back["source"] == state()["source"]
    assert torch.equal(back["optimizer"]["moments"]["m"], state()["optimizer"]["moments"]["m"])
    for name, tensor in load(path).state_dict().items():
        assert torch.equal(tensor, module().state_dict()[name])
    # No other file is left, and every file has the same permissions.
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert len({stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()}) == 1


@pytest.mark.parametrize("name", ["sae.safetensors", "config.json", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "one bit", "missing", "longer"])
def test_damage_is_seen_and_named(tmp_path: Path, name: str, damage: str) -> None:
    path = write(tmp_path, 3)
    file = path / name
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "one bit":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "longer":
        file.write_bytes(data + b"\0")
    else:
        file.unlink()
    word = {"truncated": "truncated", "one bit": "corrupt", "missing": "missing", "longer": "truncated"}[damage]
    with pytest.raises(CheckpointError, match=rf"{name} is {word}"):
        verify_checkpoint(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"format": "fastsae-checkpoint", "version": 9, "step": 3, "files": {}}', "has format fastsae-checkpoint 9"),
        ('{"format": "fastsae-checkpoint", "version": 1, "step": 3, "files": {}}', "does not list state.json"),
        ('{"format": "fastsae-checkpoint", "version": 1, "step": 4, "files": {}}', "holds step 4: the directory was"),
    ],
)
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, 3)
    (path / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        verify_checkpoint(path)


def test_a_manifest_cannot_point_elsewhere(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../other"] = {"bytes": 0, "sha256": "0"}
    (tmp_path / "other").write_bytes(b"")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="other is missing"):
        verify_checkpoint(path)


def test_a_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    before = (path / "manifest.json").read_bytes()
    with pytest.raises(CheckpointError, match="already exists"):
        write(tmp_path, 3)
    assert (path / "manifest.json").read_bytes() == before


# -- a directory of them ----------------------------------------------------------------------------------------------


def test_the_newest_that_verifies_is_found(tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    assert newest_valid(root) == (None, [])
    paths = [write(root, step) for step in (100, 20, 100_000_000)]
    assert [step_of(p) for p in list_checkpoints(root)] == [20, 100, 100_000_000]
    assert newest_valid(root) == (paths[2], [])

    (paths[2] / "optimizer.safetensors").write_bytes(b"")
    (paths[0] / "manifest.json").unlink()
    found, problems = newest_valid(root)
    assert found == paths[1]
    assert len(problems) == 2
    assert "step_100000000/optimizer.safetensors is truncated: 0 bytes" in problems[0]
    assert "step_00000100 has no readable manifest.json" in problems[1]

    moved = set_aside_newer(root, 20)
    assert sorted(p.name for p in moved) == ["corrupt_step_00000100", "corrupt_step_100000000"]
    assert list_checkpoints(root) == [paths[1]]
    write(root, 100)
    assert [p.name for p in set_aside_newer(root, 20)] == ["corrupt_step_00000100_2"]
    assert all((p / "state.json").exists() for p in root.glob("corrupt_*"))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        write(tmp_path, step)
    prune(tmp_path, 2)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [3, 10]
    prune(tmp_path, 5)
    assert len(list_checkpoints(tmp_path)) == 2
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        prune(tmp_path, 0)


@pytest.mark.parametrize("name", ["manifest.json", "sae.safetensors"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_checkpoint_that_cannot_be_read_is_not_called_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    real_open = io.open

    def broken(file: Any, *args: Any, **kwargs: Any) -> Any:
        if str(file).endswith(f"step_00000002/{name}"):
            raise OSError(code, os.strerror(code), str(file))
        return real_open(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", broken)
    monkeypatch.setattr(builtins, "open", broken)
    with pytest.raises(CheckpointError, match=rf"cannot read .*{name} to verify it: .*may be intact, so nothing was"):
        newest_valid(tmp_path)
    assert [step_of(p) for p in list_checkpoints(tmp_path)] == [1, 2]


@pytest.mark.parametrize("call", ["rename", "rmtree"])
def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    doomed = tmp_path / ".unfinished-step_00000001"
    doomed.mkdir()
    (doomed / "half").touch()
    prune(tmp_path, 2)  # the remains of an earlier attempt do not get in the way
    assert not doomed.exists()

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os if call == "rename" else shutil, call, refuse)
    with pytest.warns(RuntimeWarning, match=r"cannot delete the old checkpoint .*step_00000002.*training continues"):
        prune(tmp_path, 1)
    assert (tmp_path / "step_00000003").is_dir()


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    kept = write(tmp_path, 1)
    (tmp_path / ".unfinished-step_00000002").mkdir()
    (tmp_path / ".unfinished-step_00000002" / "sae.safetensors").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]
    remove_unfinished(tmp_path / "nowhere")


def test_every_byte_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file and the directory are synced before the rename, and the parent directory after it."""
    events: list[tuple[str, str]] = []
    real_fsync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def fsync(fd: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        real_fsync(fd)

    def rename(a: Path, b: Path) -> None:
        events.append(("rename", Path(b).name))
        real_rename(a, b)

    def replace(a: Path, b: Path) -> None:
        real_replace(a, b)
        events.append(("replace", Path(b).name))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    monkeypatch.setattr(os, "replace", replace)
    root = tmp_path / "checkpoints"
    path = write(root, 5)
    at = events.index(("rename", path.name))
    synced = {name for kind, name in events[:at] if kind == "fsync"}
    assert {p.name for p in path.iterdir() if p.name != "manifest.json"} <= synced
    # The manifest is synced under its temporary name; the fsync of the directory after that syncs its final name.
    manifest = events.index(("replace", "manifest.json"))
    assert any(kind == "fsync" and "manifest.json" in name for kind, name in events[:manifest])
    assert ("fsync", f".unfinished-{path.name}") in events[manifest:at]
    assert ("fsync", root.name) in events[at:]
