"""docs/interop.md lists every format."""

from __future__ import annotations

import re
from pathlib import Path

from fastsae.interop.registry import FORMATS, WRITTEN
from fastsae.interop.saelens import ARCHITECTURES

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "interop.md").read_text()
ROWS = {row[0]: row for row in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) ?\|$", TEXT, re.MULTILINE)}


def test_the_table_lists_every_format() -> None:
    assert ROWS.keys() == {"fastsae", *FORMATS}
    assert {name for name, row in ROWS.items() if row[3] == "yes"} == set(WRITTEN)
    assert all(architecture in ROWS["saelens"][2] for architecture in ARCHITECTURES)
