"""The README's Python code runs unchanged, and the names in it exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import demo

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
FOLDERS = ("fastsae", "kernels", "csrc", "bench", "tests")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), names)
    assert "sae" in names or not torch.cuda.is_available()  # the block for a GPU does nothing without one


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) == 5
    assert len(BLOCKS[0].strip().splitlines()) <= 12


def test_the_demo_is_as_long_as_it_says() -> None:
    text = f"for the first {demo.Settings.dense_steps} of the {demo.Settings.steps} steps"
    assert text in README
    assert text in (demo.__doc__ or "")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("version", "fits"), [("3, 10, 0", False), ("3, 11, 0", True), ("3, 99, 1", True)])
def test_an_older_python_is_refused_with_what_to_do(version: str, fits: bool, tmp_path: Path) -> None:
    """pyproject.toml, the README and the Makefile name the same versions, without an upper limit."""
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()
    assert "Python 3.11 or newer" in README
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = ({version}); $2"\n')
    python.chmod(0o755)
    command = ["make", f"PYTHON={python}", f"VENV={tmp_path / 'venv'}", str(tmp_path / "venv" / ".made")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    refused = f"Python {'.'.join(version.split(', ')[:2])} found, 3.11 or newer needed: make PYTHON=python3.12"
    assert (refused in done.stderr) is not fits
    if not fits:
        assert done.returncode != 0
        assert not (tmp_path / "venv").exists()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "bench", "lint"} <= named <= targets


def test_commands_exist() -> None:
    from fastsae.cli.main import COMMANDS

    assert set(re.findall(r"^fastsae ([a-z]+)", README, re.MULTILINE)) == set(COMMANDS)


def test_named_files_exist() -> None:
    tree = README.split("## What lies where")[1].split("```")[1]
    for name in re.findall(r"\b([a-z_]+\.py)\b", tree):
        assert any(path for folder in FOLDERS for path in (ROOT / folder).rglob(name)), name
    for folder in re.findall(r"^([a-z]+(?:/[a-z]+)?)/ ", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), f"{folder}/ is not on disk"
