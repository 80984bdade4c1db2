"""bench.family: the dense versions compute what the reference computes, and both parts run, resume and draw."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastsae
from bench.dense import Dense
from bench.family import draw, quality, speed
from bench.family.__main__ import main
from bench.family.store import Store, read
from bench.plot import PAGE, with_numbers
from bench.results import RESULTS
from fastsae import reference
from tests.family_case import RULES, D, M, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", RULES)
def test_a_dense_version_is_the_reference(name: str) -> None:
    sae = fastsae.SparseAutoencoder(D, M, RULES[name], dtype=torch.float64, seed=0)
    with torch.no_grad():
        sae.b_enc.normal_(generator=torch.Generator().manual_seed(0))
    dense = Dense.of_sae(sae, lr=1e-3)
    truth = reference.forward(dict(sae.named_parameters()), tokens(), sae.activation, sae.rule_state, penalty_scale=0.5)
    found = dense.forward(tokens(), penalty_scale=0.5)
    torch.testing.assert_close(found.loss, truth.losses["loss"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.mse, truth.losses["mse"], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["batch_topk", "jumprelu", "gated", "matryoshka-sampled", "hierarchical_topk"])
def test_the_dense_curve_is_that_of_the_fused_step(name: str) -> None:
    sae = fastsae.SparseAutoencoder(D, M, RULES[name], dtype=torch.float64, seed=0)
    dense, step = Dense.of_sae(sae, lr=1e-3), fastsae.FusedTrainStep(sae, lr=1e-3)
    for i in range(6):
        mine, theirs = step(tokens(seed=i)), dense.metrics(tokens(seed=i))
        assert float(dense.step(tokens(seed=i))) == float(theirs["loss"])
        for key in ("loss", "mse", "fvu"):
            assert float(mine[key]) == pytest.approx(float(theirs[key]), rel=1e-8), (i, key)
        assert float(mine["l0"]) == pytest.approx(float(theirs["l0"]))


def test_a_dense_version_refuses_what_it_does_not_have() -> None:
    with pytest.raises(ValueError, match="the dense version has no tied=True"):
        Dense.of_sae(fastsae.SparseAutoencoder(D, M, RULES["topk"], tied=True), lr=1e-3)


def test_both_parts_run_resume_and_draw(tmp_path: Path) -> None:
    settings = replace(quality.quick(quality.Settings()), steps=4, dense_steps=2)
    said: list[str] = []
    assert quality.run(Store(tmp_path, "quality"), settings, ("TopK", "ReLU"), said.append, progress=False) == []
    entries = read(tmp_path / "quality.json")["entries"]
    assert set(entries) == {"TopK-0", "TopK-1", "TopK-2", "ReLU-0", "ReLU-1", "ReLU-2"}
    assert all(entry["off"] < 1e-3 for key, entry in entries.items() if key.endswith("1"))
    before = entries["TopK-0"]["date"]
    quality.run(Store(tmp_path, "quality"), settings, ("TopK",), said.append, progress=False)
    assert read(tmp_path / "quality.json")["entries"]["TopK-0"]["date"] == before

    timed = speed.quick(speed.Settings())
    assert speed.run(Store(tmp_path, "speed"), timed, ("Matryoshka", "crossing", "ragged"), said.append) == []
    folder = tmp_path / "bench" / "results" / "device" / "family"
    folder.mkdir(parents=True)
    for part in ("speed", "quality"):
        (tmp_path / f"{part}.json").rename(folder / f"{part}.json")
    files = {path.name for path in draw.draw(folder)}
    assert files == {"family.md", "quality.svg", "quality.png", "speed.svg", "speed.png"}
    text = (folder / "family.md").read_text()
    section = draw.section(folder.parent.parent, tmp_path / "docs" / "page.md")
    assert text.strip() in section
    assert "![speed](../bench/results/device/family/speed.svg)" in section
    assert "× TopK's time, at most 1.6×" in text
    assert text.count("\n| ReLU |") == 3


def test_wrong_results_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Dense.metrics
    monkeypatch.setattr(Dense, "metrics", lambda *a, **k: {n: 2 * v for n, v in real(*a, **k).items()})
    said: list[str] = []
    assert speed.run(Store(tmp_path, "speed"), speed.quick(speed.Settings()), ("TopK",), said.append) == ["TopK"]
    assert "wrong, not timed" in said[0]
    assert not (tmp_path / "speed.json").exists()


def test_the_page_has_the_numbers_of_the_results() -> None:
    """The tables between the markers are those that the result files give."""
    page = PAGE.read_text()
    assert with_numbers(page, draw.section(RESULTS, PAGE), draw.BEGIN, draw.END) == page


def test_toy_sizes_do_not_replace_results(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick"])
    assert "name another folder: --out" in capsys.readouterr().err


def test_unknown_rules_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--only", "Relu"])
    assert "unknown rules Relu, expected some of BatchTopK" in capsys.readouterr().err
