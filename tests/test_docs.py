"""README, CONTRIBUTING and docs/: their Python code runs unchanged, and the names and files in them exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import demo
from tests.cli_case import write_text, write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
DEVELOPMENT = (ROOT / "docs/development.md").read_text()
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
FOLDERS = ("fastsae", "csrc", "bench", "tests")
PAGES = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
PEERS_NEEDED = ("docs/accelerate.md", "docs/recipes.md")
"""tests/test_recipes.py runs the second, where the libraries are."""


def blocks_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def run_page(page: str, blocks: list[str]) -> dict[str, object]:
    """Runs a page's blocks as its reader would: one after the other, in one session."""
    names: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    return names


@pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p) and p not in (*PEERS_NEEDED, "docs/tutorial.md")])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run_page(page, blocks_of(page))
    assert "sae" in names or not torch.cuda.is_available()  # the block for a GPU does nothing without one


def test_the_tutorial_runs_on_a_small_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its lines unchanged, but for the model, the text and three sizes."""
    model, text = (
        write_tiny_model(tmp_path / "model", head=True, longest=256),
        write_text(tmp_path / "sea.txt", words=60_000),
    )
    blocks, number = blocks_of("docs/tutorial.md"), r"^ROWS, STEPS, D_SAE = .*$"
    first, found = re.subn(number, "ROWS, STEPS, D_SAE = 2000, 4, 64", blocks[0], flags=re.MULTILINE)
    assert found == 1
    names = f'MODEL, TEXT, HOOK = "{model}", "{text}", 1'
    first, found = re.subn(r"^MODEL, TEXT, HOOK = .*$", names, first, flags=re.MULTILINE)
    assert found == 1
    monkeypatch.chdir(tmp_path)
    run_page("docs/tutorial.md", [first, *blocks[1:]])
    said = capsys.readouterr().out
    assert "FVU" in said
    assert said.count("My favourite") == 0, "the tiny tokenizer knows no such words, and the steered text came from it"
    assert len(re.findall(r"^(?:0|40|80)\.0 '", said, re.MULTILINE)) == 3


def test_there_are_blocks_to_run() -> None:
    assert len(blocks_of("README.md")) == 3
    assert len(blocks_of("README.md")[0].strip().splitlines()) <= 12
    assert len(README.splitlines()) < 150


def test_troubleshooting_quotes_what_is_said() -> None:
    """Every message in its first column, between its dots, is in the code or the Makefile."""
    said = " ".join(path.read_text() for path in [ROOT / "Makefile", *(ROOT / "fastsae").rglob("*.py")])
    rows = re.findall(r"^\| ([^|]+) \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall("`([^`]+)`", row) if quote != "CUBLAS_WORKSPACE_CONFIG"]
    assert len(quoted) > 8
    for quote in quoted:
        for part in filter(None, map(str.strip, quote.split("..."))):
            assert part in said, f"no message says {part!r}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for address in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
        path = "".join(address).partition("#")[0]
        if path and not path.startswith("http"):
            assert ((ROOT / page).parent / path).exists(), f"{page} links to {path}"


def test_every_page_is_linked_from_the_readme() -> None:
    assert {page for page in PAGES if page != "README.md"} <= set(re.findall(r"\]\(([^)]+)\)", README))


def test_the_demo_is_as_long_as_it_says() -> None:
    text = f"for the first {demo.Settings.dense_steps} of the {demo.Settings.steps} steps"
    prose = " ".join(README.split())  # wherever its lines break
    assert text in prose
    assert text in (demo.__doc__ or "")
    assert f"(of {demo.SLOW_STEPS} on a processor" in prose
    assert f"({demo.SLOW_STEPS} on a processor without" in (demo.__doc__ or "")


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
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", README + CONTRIBUTING + DEVELOPMENT, re.MULTILINE))
    assert {"demo", "test", "bench", "lint"} <= named <= targets


def test_commands_exist() -> None:
    from fastsae.cli.main import COMMANDS

    assert set(re.findall(r"^fastsae ([a-z]+)", README, re.MULTILINE)) == set(COMMANDS)


def test_named_files_exist() -> None:
    tree = ARCHITECTURE.split("## What lies where")[1].split("```")[1]
    for name in re.findall(r"\b([a-z_]+\.py)\b", tree):
        assert any(path for folder in FOLDERS for path in (ROOT / folder).rglob(name)), name
    for folder in re.findall(r"^([a-z]+(?:/[a-z]+)?)/ ", tree, re.MULTILINE):
        assert (ROOT / folder).is_dir(), f"{folder}/ is not on disk"
