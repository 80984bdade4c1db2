"""Replacing a file and locking a folder: what stays, what is removed, and what an error names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastsae.atomic import LOCK, is_partial, lock_folder, replace_file


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_error_names_the_file_and_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device", str(partial))

    with pytest.raises(OSError, match="No space left") as caught:
        replace_file(path, fail)
    assert caught.value.filename == str(path)
    with pytest.raises(FileNotFoundError) as caught:
        replace_file(tmp_path / "nowhere" / "a.txt", lambda partial: partial.write_text("x"))
    assert caught.value.filename == str(tmp_path / "nowhere" / "a.txt")
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.txt"}


def test_an_older_leftover_does_not_pass_on_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    left = tmp_path / f".a.txt.{os.getpid()}.partial"
    left.touch(mode=0o600)
    replace_file(tmp_path / "a.txt", lambda partial: partial.write_text("new"))
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_lock_removes_files_of_dead_processes_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone = tmp_path / f".a.txt.{int(dead.stdout)}.partial"
    stays = {f".a.txt.{os.getpid()}.partial", f".a.txt.{os.getppid()}.partial", "a.partial", ".7.partial"}
    for name in (gone.name, *stays):
        (tmp_path / name).touch()
    (tmp_path / f".folder.{int(dead.stdout)}.partial").mkdir()
    assert is_partial(gone)
    os.close(lock_folder(tmp_path))
    assert names(tmp_path) == {LOCK, f".folder.{int(dead.stdout)}.partial", *stays}


def test_an_interrupted_lock_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            lock_folder(tmp_path)
    os.close(lock_folder(tmp_path))
