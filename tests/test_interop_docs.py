"""docs/interop.md: its code runs, and its table lists every format."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastsae.interop.registry import FORMATS, WRITTEN
from fastsae.interop.saelens import ARCHITECTURES

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "interop.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
ROWS = {row[0]: row for row in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) ?\|$", TEXT, re.MULTILINE)}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "interop"}
    exec(compile(BLOCKS[number], f"docs/interop.md, block {number}", "exec"), names)
    assert "sae" in names


def test_the_table_lists_every_format() -> None:
    assert len(BLOCKS) == 2
    assert ROWS.keys() == {"fastsae", *FORMATS}
    assert {name for name, row in ROWS.items() if row[3] == "yes"} == set(WRITTEN)
    assert all(architecture in ROWS["saelens"][2] for architecture in ARCHITECTURES)
