"""The family in the trainer and from the command line: schedules, resampling, resuming bit for bit, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsae
from fastsae.cli.main import main
from fastsae.runs.checkpoint import list_checkpoints
from fastsae.runs.opening import open_run
from fastsae.runs.trainer import TrainConfig, Trainer
from tests.train_case import D_SAE, config, curve, lines, module, saved_bytes, source

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {
    "batch_topk": fastsae.BatchTopK(6),
    "jumprelu": fastsae.JumpReLU(0.01, threshold=0.1, bandwidth=0.1),
    "gated": fastsae.Gated(0.1),
    "matryoshka": fastsae.Matryoshka(fastsae.TopK(6), sampled=3, shortest=8),
    "relu": fastsae.ReLU(0.2),
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("name", RULES)
def test_a_run_that_is_continued_is_the_run(tmp_path: Path, name: str, fused: bool) -> None:
    """With penalty warm-up, resampling, clipping and decay on the way: everything that a checkpoint must hold."""
    settings = {
        "fused": fused, "optimizer": "adamw", "weight_decay": 0.01, "clip_norm": 0.5, "penalty_warmup": 8,
        "resample_at": (9, 20), "resample_rows": 100, "eval_every": 10, "decay": "constant",
    }  # fmt: skip
    settings["penalty_warmup"] = 8 if RULES[name].coef else 0

    def run(folder: str, steps: int) -> Path:
        sae = module(activation=RULES[name], aux_k=None, ghost="residual", dead_after=100, decoder_norm="free")
        Trainer(sae, source(), config(steps=steps, **settings), tmp_path / folder).run()
        return list_checkpoints(tmp_path / folder / "checkpoints")[-1]

    whole = run("whole", 30)
    run("parts", 13)
    assert saved_bytes(run("parts", 30)) == saved_bytes(whole)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    losses = [line["fvu"] for line in lines(tmp_path / "whole" / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_resampling_leaves_the_data_where_it_was_and_says_what_it_did(tmp_path: Path) -> None:
    sae = module(aux_k=None, dead_after=60)
    with torch.no_grad():
        sae.b_enc[::4] = -1e3
    before = sae.W_dec.detach().clone()
    Trainer(sae, source(), config(steps=12, resample_at=(5,), resample_rows=100), tmp_path / "a").run()
    plain = module(aux_k=None, dead_after=60)
    Trainer(plain, source(), config(steps=12), tmp_path / "b").run()
    assert not torch.equal(sae.W_dec[::4], before[::4])
    tokens = [[line["tokens"] for line in lines(tmp_path / run / "metrics.jsonl")] for run in "ab"]
    assert tokens[0] == tokens[1]
    resampled = [line["resampled"] for line in lines(tmp_path / "a" / "metrics.jsonl")]
    assert resampled[4] >= D_SAE // 4
    assert sum(resampled) == resampled[4]
    record = lines(tmp_path / "a" / "eval.jsonl")[-1]
    assert sum(record["training_density"]["counts"]) + record["training_density"]["never"] == D_SAE


def test_k_is_annealed_and_the_rate_follows_the_width(tmp_path: Path) -> None:
    sae = module(aux_k=None)
    settings = {"k_start": 24, "k_anneal": 9, "lr_rule": "inverse_sqrt", "warmup": 0, "decay": "constant"}
    Trainer(sae, source(), config(steps=12, lr=1e-4, **settings), tmp_path).run()
    log = lines(tmp_path / "metrics.jsonl")
    assert [line["l0"] for line in log][:3] == [24, 22, 20]
    assert [line["l0"] for line in log][-3:] == [6, 6, 6]
    assert log[0]["lr"] == pytest.approx(1e-4 * (2**14 / D_SAE) ** 0.5)
    with pytest.raises(ValueError, match="k_start is 24, but the activation has no K to anneal"):
        Trainer(module(activation=fastsae.ReLU(1.0)), source(), config(k_start=24), tmp_path / "none").run()


@pytest.mark.parametrize(("settings", "message"), [
    ({"fused": False, "moments": "8bit"}, "moments='8bit' needs fused=True"),
    ({"fused": False, "optimizer": "lion"}, "optimizer='lion' needs fused=True"),
    ({"fused": False, "clip_rows": 1.0}, "clip_rows=1.0 needs fused=True"),
    ({"k_start": 0}, "k_start is 0, expected at least 1"),
    ({"k_anneal": 0}, "k_anneal is 0"),
    ({"resample_at": (0,)}, r"resample_at is \(0,\), expected updates from 1 on"),
    ({"resample_rows": 0}, "resample_rows is 0"),
    ({"penalty_warmup": -1}, "penalty_warmup is -1"),
    ({"clip_norm": -1.0, "fused": False}, "clip_norm is -1.0, expected a number above 0"),
    ({"clip_rows": 0.0}, "clip_rows is 0.0"),
])  # fmt: skip
def test_bad_training_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


# -- the command line -------------------------------------------------------------------------------------------------

LINES = {
    "batch_topk": ["--k", "4"],
    "relu": ["--l1", "0.5", "--decoder-norm", "free", "--penalty-warmup", "3", "--no-pre-bias", "--init-norm", "0.1"],
    "jumprelu": ["--l0", "0.01", "--threshold", "0.1", "--bandwidth", "0.2", "--optimizer", "adamw"],
    "gated": ["--l1", "0.1", "--l1-norm", "plain", "--moments", "8bit"],
    "matryoshka": ["--k", "4", "--groups", "8", "16", "24"],
    "matryoshka_batch": ["--k", "4", "--prefixes", "3"],
    "hierarchical_topk": ["--ks", "2", "4", "8", "--skip"],
    "group_max": ["--k", "4", "--ghost", "residual", "--resample-at", "2", "--resample-rows", "50"],
    "topk": ["--k", "4", "--layers", "2", "--tied", "--k-start", "8", "--k-anneal", "3", "--clip-norm", "1"],
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    np.save(path, torch.randn(600, 16, generator=torch.Generator().manual_seed(0)).numpy())
    return path


def line(rows: Path, folder: Path, activation: str, *more: str) -> list[str]:
    sizes = ["--d-sae", "48", "--batch-size", "100", "--steps", "5", "--no-progress", "--no-tensorboard"]
    return ["train", str(rows), "--run-dir", str(folder), "--activation", activation, *sizes, *more]


@pytest.mark.parametrize("activation", LINES)
def test_every_rule_trains_from_the_command_line(rows: Path, tmp_path: Path, activation: str, capsys) -> None:
    assert main(line(rows, tmp_path / "run", activation, *LINES[activation])) == 0
    sae = fastsae.load(open_run(tmp_path / "run").path)
    assert sae.activation.kind == activation.removesuffix("_batch")
    assert main(["eval", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["fvu"] > 0
    assert main(["report", str(tmp_path / "run"), "--latents", "0", "--no-time-step"]) == 0


@pytest.mark.parametrize(("activation", "more", "message"), [
    ("relu", ["--k", "7"], "k is 7, which relu does not have; leave it"),
    ("topk", ["--l1", "1"], "l1 is 1.0, which topk does not have"),
    ("matryoshka", ["--k", "4", "--groups", "8", "16"], "groups that sum to 24, expected d_sae = 48"),
    ("hierarchical_topk", [], "expected at least one, ascending"),
    ("jumprelu", ["--penalty", "target"], "'target' needs it"),
    ("group_max", ["--k", "7"], "expected a divisor of d_sae = 48"),
])  # fmt: skip
def test_settings_of_another_rule_are_refused(rows, tmp_path, activation, more, message, capsys) -> None:
    assert main(line(rows, tmp_path / "run", activation, *more)) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
