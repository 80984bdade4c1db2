"""The README's Python runs as it stands, and what it names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), names)
    assert "sae" in names


def test_there_are_blocks_to_run() -> None:
    assert len(BLOCKS) == 2
    assert len(BLOCKS[0].strip().splitlines()) <= 12


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README, re.MULTILINE))
    assert {"demo", "test", "bench", "lint"} <= named <= targets


def test_commands_exist() -> None:
    from fastsae.__main__ import COMMANDS

    assert set(re.findall(r"^fastsae ([a-z]+)", README, re.MULTILINE)) == set(COMMANDS)


def test_named_files_exist() -> None:
    tree = README.split("## What lies where")[1].split("```")[1]
    for name in re.findall(r"\b([a-z_]+\.py)\b", tree):
        assert (ROOT / "fastsae" / name).exists() or (ROOT / "tests" / name).exists(), f"{name} is not on disk"
    for folder in re.findall(r"^([a-z]+(?:/[a-z]+)?)/ ", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), f"{folder}/ is not on disk"
