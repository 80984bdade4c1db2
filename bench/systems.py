"""`python -m bench.systems`: the README's tables of reproduced systems, from bench/results/systems/ and nothing else.

`fastsae reproduce NAME --out bench/results/systems/NAME` makes those results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.machine import ROOT
from fastsae.atomic import replace_file
from fastsae.systems import system
from fastsae.systems.results import FILE, read

SHOWN = ("clustering", "interpretable_directions")
"""The systems whose tables stand in the README. Of the others it links table.md."""
RESULTS = Path(__file__).parent / "results" / "systems"
BEGIN, END = "<!-- system {}: begin (python -m bench.systems) -->", "<!-- system: end -->"


def renewed(readme: str, name: str, text: str) -> str:
    """The README with this text between the markers of that system. Raises ValueError where they are missing."""
    begin = BEGIN.format(name)
    before, found, rest = readme.partition(begin)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"the README has no {begin} ... {END}")
    return f"{before}{begin}\n\n{text.strip()}\n\n{END}{after}"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    for name in SHOWN:
        text = renewed(text, name, system(name).tables(read(RESULTS / name / FILE, name)["experiments"]))
    replace_file(path, lambda partial: partial.write_text(text))


if __name__ == "__main__":
    main()
