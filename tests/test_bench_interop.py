"""`python -m bench.interop`: what it refuses to time, and a run at a toy size. Needs SAELens and the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from bench import cases, interop, peers, real


def test_a_library_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers.SAELens, "module", "a_module_that_is_not_there")
    monkeypatch.setattr("sys.argv", ["interop"])
    assert interop.main() == 2
    assert ".venv-peers/bin/python -m bench.interop" in capsys.readouterr().err


def test_a_step_with_another_loss_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stepping:
        def __init__(self, loss: float) -> None:
            self.loss = loss

        def step(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor(self.loss)

    monkeypatch.setattr(interop, "contestant", lambda name, way, *rest: Stepping(1.01 if "optim" in way else 1.0))
    inputs = cases.build(cases.of_shape("8,4,16,2"), real.rows, real.trained)
    with pytest.raises(ValueError, match=r"accelerated, fastsae.optim: the loss of step 0 is 1.01.*nothing is timed"):
        interop.measure("sae-lens TopK", inputs, 2, 1, tqdm(disable=True))


def test_a_reconstruction_of_another_sae_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bias more on one latent, in what fastsae.load gives."""
    pytest.importorskip("sae_lens")
    load = interop.fastsae.load

    def other(folder: str) -> Any:
        sae = load(folder)
        with torch.no_grad():
            sae.b_dec[0] += 10
        return sae

    monkeypatch.setattr(interop.fastsae, "load", other)
    with pytest.raises(ValueError, match=r"fastsae.load: the reconstructions of 1 of 1 tokens.*nothing is timed"):
        interop.inference(1, cases.of_shape("8,4,16,2"), tqdm(disable=True))


def test_a_bar_leaves_as_many_latents_above_as_asked() -> None:
    pre_acts = torch.randn(2000, 1000, generator=torch.Generator().manual_seed(0))
    assert float((pre_acts > peers.bar(20, 1000)).sum(1).float().mean()) == pytest.approx(20, rel=0.02)


def test_a_run_at_a_toy_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for library, _ in interop.STEPS.values():
        pytest.importorskip(peers.PEERS[library][0].module)
    monkeypatch.setattr(interop, "INFERENCE", cases.of_shape("8,16,64,4"))
    monkeypatch.setattr("sys.argv", ["interop", "--size", "64,16,128,4", "--rounds", "1", "--out", str(tmp_path)])
    assert interop.main() == 0
    result: dict[str, Any] = json.loads((tmp_path / "interop.json").read_text())
    assert {key: result[key] for key in "NDMK"} == {"N": 64, "D": 16, "M": 128, "K": 4}
    assert set(result["steps"]) == set(interop.STEPS)
    for found in result["steps"].values():
        assert set(found["ways"]) == set(interop.WAYS)
        assert all(way["ms"] > 0 for way in found["ways"].values())
    assert set(result["inference"]["tokens"]) == {str(tokens) for tokens in interop.TOKENS}
    assert "JumpReLUSAE" in interop.shown(result)


def test_the_page_is_what_the_stored_results_give(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(interop.PAGE.read_text())
    interop.renew(page=copy)
    assert copy.read_text() == interop.PAGE.read_text(), "run python -m bench.interop --draw"


def test_a_result_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a-device").mkdir()
    (tmp_path / "a-device" / "interop.json").write_text('{"format": 1, "machine": {"date": "2026"}}')
    with pytest.raises(ValueError, match="has format 1, expected 2"):
        interop.section(tmp_path)
