"""`python -m bench.parallel`: its formulas against bytes counted in real runs, and the page's tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.parallel import __main__ as program
from bench.parallel import model
from bench.parallel.model import Shape
from bench.results import RESULTS


@pytest.mark.parametrize(
    "shape",
    [
        Shape(512, 256, 2048, 16, data=2),
        Shape(512, 256, 2048, 16, latents=2),
        pytest.param(Shape(600, 256, 2048, 16, latents=3), marks=pytest.mark.long),
        pytest.param(Shape(512, 256, 2048, 16, data=2, latents=2), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_counted_bytes_are_those_of_the_formula(shape: Shape) -> None:
    expected = sum(model.received(shape).values())
    for process in program.launch(shape, threads=1, steps=2):
        assert process["received"] == pytest.approx(expected, rel=0.02)


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
