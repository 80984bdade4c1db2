"""Damaged, truncated and missing shards, a full disk, a second writer, other settings: clear errors, no data lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastsae.atomic import is_partial
from fastsae.data import Manifest, ShardError, ShardSource, ShardWriter, harvest, save_rows
from fastsae.data.files import write_atomically
from tests.data_case import sealed, toy_config, toy_corpus, toy_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    save_rows(tmp_path / "rows", torch.randn(900, 8, generator=generator), holdout=100, rows_per_shard=300)
    return tmp_path / "rows"


@pytest.mark.parametrize("verify", ["lazy", "eager", "size"])
def test_a_truncated_shard_is_named_at_opening(folder: Path, verify: str) -> None:
    path = folder / "shard_00001.safetensors"
    size = path.stat().st_size
    os.truncate(path, size - 5)
    with pytest.raises(
        ShardError, match=f"shard_00001.safetensors is truncated: expected {size:,} bytes, got {size - 5:,}"
    ):
        ShardSource(folder, verify=verify, progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["shard_00002.safetensors", "held_out.safetensors"])
def test_a_damaged_shard_is_named_with_both_checksums(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-7] ^= 1  # one bit
    (folder / name).write_bytes(data)
    expected = next(entry.sha256 for entry in Manifest.read(folder).entries() if entry.file == name)
    message = f"{name} is damaged: expected sha256 {expected}, got [0-9a-f]{{64}}"
    with pytest.raises(ShardError, match=message):
        ShardSource(folder, verify="eager", progress=False)
    source = ShardSource(folder)  # lazy: checked when it is read
    with pytest.raises(ShardError, match=message):
        source.held_out() if name.startswith("held") else source.next_batch(800)
    assert ShardSource(folder, verify="size").next_batch(800).shape == (800, 8)


def test_a_missing_shard_and_a_foreign_one_are_named(folder: Path) -> None:
    path = folder / "shard_00000.safetensors"
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(ShardError, match=r"shard_00000.safetensors is missing, but manifest.json lists it"):
        ShardSource(folder)
    garbage = os.urandom(len(data))
    path.write_bytes(garbage)
    with pytest.raises(ShardError, match="is not a readable safetensors file"):
        ShardSource(folder, verify="size").next_batch(800)
    manifest = json.loads((folder / "manifest.json").read_text())
    save_file({"activations": torch.zeros(300, 7)}, path)
    manifest["shards"][0]["bytes"] = path.stat().st_size
    (folder / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ShardError, match=r"activations torch.float32 \(300, 7\), but the manifest says .* \(300, 8\)"):
        ShardSource(folder, verify="size").next_batch(800)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=3), "has format version 3, expected 2"),
        (lambda m: m.update(format="other"), "not a manifest of activations"),
        (lambda m: m.pop("shards"), "manifest.json is damaged"),
        (lambda m: m.update(surprise=1), "manifest.json is damaged"),
        (lambda m: m.update(dtype="complex64"), "dtype 'complex64' of width 8"),
        (lambda m: m["shards"][0].update(file="../../secret"), "expected the name of a file in its own folder"),
    ],
)
def test_a_damaged_or_foreign_manifest(folder: Path, change, message: str) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(sealed(manifest)))
    with pytest.raises(ShardError, match=message):
        ShardSource(folder)
    path.write_text('{"format": "fastsae')
    with pytest.raises(ShardError, match=r"manifest\.json is damaged"):
        ShardSource(folder)


def test_a_manifest_that_changed_is_damaged_and_an_older_one_without_checksum_is_read(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["stats"]["rows"] = 7
    path.write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"manifest\.json is damaged: its sha256 does not match"):
        ShardSource(folder)
    del manifest["sha256"]
    path.write_text(json.dumps(manifest | {"version": 1}))
    assert ShardSource(folder).n_tokens == 800


def test_a_writer_refuses_other_settings_foreign_files_and_a_second_writer(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    settings = {"layer": 3, "text": {"spec": "a", "window": 16}}
    with ShardWriter(folder, 4, torch.bfloat16, settings) as writer:
        writer.append(torch.ones(5, 4))
        with pytest.raises(BlockingIOError, match=f"another process \\(pid {os.getpid()} on .*\\) is writing to"):
            ShardWriter(folder, 4, torch.bfloat16, {"layer": 3})
    with pytest.raises(ValueError, match=r"layer is 3, asked for 5; text.window is 16, asked for 32"):
        ShardWriter(folder, 4, torch.bfloat16, {"layer": 5, "text": {"spec": "a", "window": 32}})
    with pytest.raises(ValueError, match=r"d_in is 4, asked for 6; dtype is 'bfloat16', asked for 'float32'; lay"):
        ShardWriter(folder, 6, torch.float32, {})
    with ShardWriter(folder, 4, torch.bfloat16, settings) as writer:
        with pytest.raises(ValueError, match=r"expected activations \(rows, 4\), got \(5, 3\)"):
            writer.append(torch.ones(5, 3))
        assert writer.manifest.rows == 5
    with pytest.raises(ValueError, match="one of float32, bfloat16, float16, got int8"):
        ShardWriter(tmp_path / "x", 4, torch.int8, {})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("important")
    with pytest.raises(ValueError, match=r"is not empty and holds no activations \(it has 'thesis.tex'\)"):
        ShardWriter(tmp_path / "other", 4, torch.float32, {})
    with pytest.raises(ValueError, match="already holds 5 rows"):
        save_rows(folder, torch.ones(9, 4).bfloat16(), holdout=2, settings=settings)


def test_values_that_do_not_fit_the_stored_type_are_not_stored(tmp_path: Path) -> None:
    x = torch.ones(9, 4)
    x[6, 1] = 70_000
    message = r"1 rows of shard_00000.safetensors .* float16 \(first row 6, largest value 70000 before the cast\)"
    with ShardWriter(tmp_path, 4, torch.float16, {}) as writer, pytest.raises(ValueError, match=message):
        writer.append(x)
    assert writer.manifest.rows == 0


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"before")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"could not write .*file \(5 bytes\): No space left .* bytes are free") as caught:
        write_atomically(path, b"after")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_harvest_resumes_after_the_disk_was_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = harvest_toy(tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    rename, renamed = os.replace, []

    def fill_up(source: Path, target: Path) -> None:
        rename(source, target)
        renamed.append(Path(target).name)
        if renamed[-1] == "shard_00001.safetensors":
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # from here on the system refuses to write

    monkeypatch.setattr(os, "replace", fill_up)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(OSError, match=r"could not write .*manifest\.json .*: File too large; nothing saved before"):
            harvest_toy(tmp_path / "cut")
    finally:
        monkeypatch.undo()
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert ShardSource(tmp_path / "cut", verify="eager", progress=False).n_tokens == whole.shards[0].rows
    assert harvest_toy(tmp_path / "cut") == whole


def harvest_toy(folder: Path) -> Manifest:
    return harvest(toy_model(), toy_corpus(), folder, toy_config(), rows=300, rows_per_shard=120, progress=False)


KILLED = """
import os, signal, sys
import torch
torch.set_num_threads(1)
from fastsae.data import harvest
from tests.data_case import toy_config, toy_corpus, toy_model

def run(folder):
    harvest(toy_model(), toy_corpus(), folder, toy_config(), rows=300, rows_per_shard=120, progress=False)

real = os.replace
for when in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        calls = iter(range(10**6))
        def dying(source, target, when=when):
            if next(calls) == when // 2:
                if when % 2:
                    real(source, target)  # dies just after the rename, before the folder's fsync
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)
        os.replace = dying
        run(f"{sys.argv[1]}/{when}")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    run(f"{sys.argv[1]}/{when}")
"""


def test_a_harvest_resumes_after_kill_9_at_any_rename(tmp_path: Path) -> None:
    whole = harvest_toy(tmp_path / "whole")
    # A rename completes each file: the held-out rows, the shards, and the manifest after each of them and at the end.
    renames = 2 * (1 + len(whole.shards)) + 1
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(2 * renames)]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for when in range(2 * renames):
        folder = tmp_path / str(when)
        assert Manifest.read(folder) == whole, f"killed at rename {when / 2}"
        assert not [path for path in folder.iterdir() if is_partial(path)]
        for entry in whole.entries():
            entry.check_content(folder)
