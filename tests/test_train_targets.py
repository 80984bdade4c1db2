"""A Trainer on a source with targets: what it trains, resumes and refuses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae.data.tensor import TensorSource
from fastsae.model.rules import BatchTopK, JumpReLU
from fastsae.runs.evaluate import evaluate
from fastsae.runs.stopping import TrainingInterrupted
from fastsae.runs.trainer import Trainer
from tests.train_case import BATCH, D_IN, config, lines, module, rows, saved_bytes


def source(d_out: int = D_IN) -> TensorSource:
    """Inputs far from the targets' mean, as the inputs of an MLP are."""
    x = rows()
    mixing = torch.randn(D_IN, d_out, generator=torch.Generator().manual_seed(7))
    return TensorSource(x - x.mean(0), holdout=100, seed=3, target=torch.tanh(x @ mixing) + 5)


def trained(
    folder: Path, d_out: int = D_IN, data: Any = None, sae: dict[str, Any] | None = None, **settings: Any
) -> Any:
    made = module(d_out=d_out, **(sae or {}))
    run = Trainer(made, data or source(d_out), config(**settings), folder)
    return made, run.run()


def test_a_transcoder_with_default_settings_is_the_one_without_a_pre_bias(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="a target was given and pre_bias was left None: it is now off"):
        default, found = trained(tmp_path / "default")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _, off = trained(tmp_path / "off", sae={"pre_bias": False})
        _, on = trained(tmp_path / "on", sae={"pre_bias": True})
    assert not default.pre_bias
    assert saved_bytes(found.checkpoint)["sae.safetensors"] == saved_bytes(off.checkpoint)["sae.safetensors"]
    assert found.evaluation["fvu"] == off.evaluation["fvu"] != on.evaluation["fvu"]
    data = source()
    again = evaluate(default, data.held_out(), targets=data.held_out_targets(), batch_size=BATCH)
    assert found.evaluation["fvu"] == pytest.approx(again.fvu)


@pytest.mark.parametrize("fused", [True, False])
def test_a_run_with_targets_resumes_bit_for_bit(tmp_path: Path, fused: bool) -> None:
    whole = trained(tmp_path / "whole", d_out=9, fused=fused)[1]
    run = Trainer(module(d_out=9), source(9), config(fused=fused), tmp_path / "cut")
    run.after_step = lambda: run.stop._note(2, None) if run.step == 17 else None
    with pytest.raises(TrainingInterrupted):
        run.run()
    again = trained(tmp_path / "cut", d_out=9, fused=fused)[1]
    assert saved_bytes(again.checkpoint) == saved_bytes(whole.checkpoint)
    curve = [[line["loss"] for line in lines(tmp_path / name / "metrics.jsonl")] for name in ("whole", "cut")]
    assert curve[0] == curve[1]
    assert curve[0][-1] < 0.5 * curve[0][0]


@pytest.mark.parametrize("rule", [BatchTopK(6), JumpReLU(target_l0=6)])
def test_rules_that_start_or_end_with_data(tmp_path: Path, rule: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # so short a run is not at its L0
        sae, found = trained(tmp_path, d_out=9, sae={"activation": rule, "aux_k": None})
    assert found.evaluation["l0"] > 0
    assert sae.started


def test_a_bad_target_skips_its_step_and_is_named(tmp_path: Path) -> None:
    data, calls = source(9), []
    pair = data.next_pair

    def spoiled(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = pair(n)
        calls.append(n)
        if len(calls) == 6:
            y = y.index_fill(0, torch.tensor([11]), float("nan"))
        return x, y

    data.next_pair = spoiled  # type: ignore[method-assign]
    with pytest.warns(
        RuntimeWarning, match=f"step 6: 1 of {BATCH} rows of activations hold NaN .* row 11 of the batch"
    ):
        _, found = trained(tmp_path, d_out=9, data=data)
    assert found.metrics["skipped"] == 1


def test_what_does_not_fit(tmp_path: Path) -> None:
    plain = TensorSource(rows(), holdout=100)
    for arguments, message in [
        ((module(d_out=9), plain, config()), "d_out = 9, but this source has no targets; open it with target="),
        ((module(), source(9), config()), "has targets of 9 numbers, but the SAE has d_out = 24"),
        ((module(d_out=9), source(9), config(resample_at=(3,))), "resampling sets both dictionaries"),
    ]:
        with pytest.raises(ValueError, match=message):
            Trainer(*arguments, tmp_path)
