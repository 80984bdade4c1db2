"""`python -m bench.parallel`: its formulas by hand, a run, and the page's tables; test_parallel.py counts the bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.parallel import __main__ as program
from bench.parallel import model
from bench.parallel.model import Shape
from bench.results import RESULTS


@pytest.mark.long
def test_a_run_at_a_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = ["--size", "256,64,1024,8", "--rounds", "1", "--steps", "2", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["parallel", *size])
    assert program.main() == 0
    ways = json.loads((tmp_path / "parallel.json").read_text())["ways"]
    assert [(way["data"], way["latents"]) for way in ways.values()] == [(1, 1), (2, 1), (1, 2)]
    assert all(way["received"] == pytest.approx(way["formula"], rel=0.05) for way in ways.values())


def test_known_sizes() -> None:
    """By hand: 131,072 x 4096 in float32 is 2.147 GB; of two dictionaries DDP's ring receives 7/4 on 8 processes."""
    s = Shape(65_536, 4096, 131_072, 64, data=8)
    assert model.ddp(s) == pytest.approx(2 * 2.147e9 * 7 / 4, rel=1e-3)
    assert model.fsdp(s) == pytest.approx(2 * 2.147e9 * 21 / 8, rel=1e-3)
    # Weights, two moments, each of two dictionaries, and the bf16 copy of one.
    assert model.kept(s) == pytest.approx(2.147e9 * 6.5, rel=1e-2)
    assert model.received(Shape(1024, 64, 4096, 8)) == {}


def test_the_page_shows_the_stored_results(tmp_path: Path) -> None:
    copy = tmp_path / "distributed.md"
    copy.write_text(program.PAGE.read_text())
    program.renew(RESULTS, copy)
    assert copy.read_text() == program.PAGE.read_text(), "python -m bench.parallel --draw"
