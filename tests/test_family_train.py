"""The family in the trainer and from the command line: schedules, resampling, resuming bit for bit, refusals."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

import fastsae
from fastsae.cli import commands
from fastsae.cli.main import main, parse
from fastsae.model.rules import ACTIVATIONS, Selected
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


@pytest.mark.parametrize(
    ("name", "fused"),
    [pytest.param(name, True, id=f"{name}-fused") for name in RULES]
    + [
        pytest.param(
            name, False, id=f"{name}-plain", marks=[] if name in ("jumprelu", "matryoshka") else pytest.mark.long
        )
        for name in RULES
    ],
)
def test_a_continued_run_equals_an_uninterrupted_one(tmp_path: Path, name: str, fused: bool) -> None:
    """The run has penalty warm-up, resampling, clipping and weight decay: everything that a checkpoint must hold."""
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


def test_resampling_leaves_the_data_position_and_is_logged(tmp_path: Path) -> None:
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
    "relu": [
        "--l1",
        "0.5",
        "--decoder-norm",
        "free",
        "--penalty-warmup",
        "3",
        "--pre-bias",
        "False",
        "--init-norm",
        "0.1",
    ],
    "jumprelu": ["--l0", "0.01", "--threshold", "0.1", "--bandwidth", "0.2", "--optimizer", "adamw"],
    "gated": ["--l1", "0.1", "--weighted", "True", "--moments", "8bit"],
    "matryoshka": ["--k", "4", "--groups", "8", "16", "24"],
    "matryoshka_batch": ["--k", "4", "--sampled", "3", "--shortest", "8", "--activation-decay", "0.5"],
    "hierarchical_topk": ["--ks", "2", "4", "8", "--skip"],
    "abs_topk": ["--k", "4", "--aux-k", "4", "--dead-after", "100"],
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
    if activation in ("gated", "matryoshka_batch", "topk"):  # the page does not depend on the rule
        assert main(["report", str(tmp_path / "run"), "--sample", "0", "--no-time-step"]) == 0


@pytest.mark.parametrize(("activation", "more", "message"), [
    ("relu", ["--k", "7"], "k is 7, but relu has no such setting; leave it"),
    ("topk", ["--l1", "1"], "l1 is 1.0, but topk has no such setting"),
    ("matryoshka", ["--k", "4", "--groups", "8", "16"], "groups that sum to 24, expected d_sae = 48"),
    ("relu", ["--k", "32"], "k is 32, but relu has no such setting; leave it"),
    ("topk", ["--activation-decay", "0.5"], "activation_decay is 0.5, but topk has no such setting"),
    ("matryoshka", ["--groups", "48", "--activation-decay", "0.5"], "activation_decay is 0.5, but matryoshka has"),
    ("hierarchical_topk", [], "hierarchical_topk needs --ks"),
    ("matryoshka", ["--sampled", "3"], "shortest = 64, expected at most d_sae = 48; lower it"),
    ("jumprelu", ["--penalty-kind", "target"], "'target' needs a target_l0"),
    ("group_max", ["--k", "7"], "expected a divisor of d_sae = 48"),
])  # fmt: skip
def test_settings_of_another_rule_are_refused(rows, tmp_path, activation, more, message, capsys) -> None:
    assert main(line(rows, tmp_path / "run", activation, *more)) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(("option", "message"), [
    (["--l1-norm", "plain"], "--l1-norm is now --weighted True or --weighted False"),
    (["--penalty=target"], "--penalty is now --penalty-kind"),
    (["--prefixes", "3"], "--prefixes is now --sampled"),
])  # fmt: skip
def test_a_renamed_option_names_its_successor(rows, tmp_path, option, message, capsys) -> None:
    assert main(line(rows, tmp_path / "run", "relu", *option)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "rule"), [
    ([], fastsae.TopK(32)),
    (["--k", "32"], fastsae.TopK(32)),
    (["--activation", "jumprelu", "--l0", "0.01", "--threshold", "0.1"], fastsae.JumpReLU(0.01, 0.1)),
    (["--activation", "jumprelu", "--penalty-kind", "target", "--target-l0", "32"],
     fastsae.JumpReLU(penalty_kind="target", target_l0=32.0)),
    (["--activation", "matryoshka_batch", "--k", "32", "--groups", "1024", "7168"],
     fastsae.Matryoshka(fastsae.BatchTopK(32), groups=(1024, 7168))),
    (["--activation", "matryoshka", "--sampled", "3", "--activation-seed", "5", "--seed", "6"],
     fastsae.Matryoshka(fastsae.TopK(32), sampled=3, seed=5)),
    (["--activation", "hierarchical_topk", "--ks", "8", "16", "32", "--weights", "1", "2", "3"],
     fastsae.HierarchicalTopK((8, 16, 32), weights=(1.0, 2.0, 3.0))),
    (["--activation", "relu", "--l1", "5"], fastsae.ReLU(5.0)),
    (["--activation", "relu", "--weighted", "False"], fastsae.ReLU(weighted=False)),
    (["--activation", "gated", "--l1", "1"], fastsae.Gated(1.0)),
    (["--activation", "batch_topk", "--activation-decay", "0.5", "--decay", "cosine"],
     fastsae.BatchTopK(32, decay=0.5)),
])  # fmt: skip
def test_the_command_line_builds_the_rule(arguments: list[str], rule: fastsae.model.rules.Activation) -> None:
    options = parse(commands.OPTIONS["train"], "train", ["acts", "--run-dir", "r", "--d-sae", "8192", *arguments])
    assert options.sae.rule.rule() == rule
    assert options.sae.build(16).activation == rule


@pytest.fixture
def fewer():
    """A custom rule: defining the class is all it takes to register it."""

    @dataclass(frozen=True)
    class Fewer(fastsae.TopK):
        """The k·share largest pre-acts."""

        share: float = 0.25
        """Share of the k latents that stays."""
        lr: int = 3
        """A setting whose name another option has."""
        tags: tuple[str, ...] = field(default_factory=lambda: ("a", "b"))
        """A setting with a default that is made."""
        kind: ClassVar[str] = "fewer"

        @property
        def kept(self) -> int:
            return round(self.k * self.share)

        def select(self, x, W, b, rule_state, training, options, capacity=None):
            return Selected(fastsae.ops.encode_topk(x, W, b, self.kept, **options.arguments()))

        def dense(self, pre, rows, rule_state, training):
            return fastsae.TopK(self.kept).dense(pre, rows, rule_state, training)

    yield Fewer
    del ACTIVATIONS["fewer"]


def test_a_custom_rule_has_its_options_and_trains(fewer, rows: Path, tmp_path: Path, capsys) -> None:
    given = ["--k", "4", "--share", "0.5", "--activation-lr", "7", "--lr", "0.01"]
    assert main(line(rows, tmp_path / "run", "fewer", *given)) == 0
    sae = open_run(tmp_path / "run").sae
    assert sae.activation == fewer(4, share=0.5, lr=7)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["lr"] == 0.01
    log = lines(tmp_path / "run" / "metrics.jsonl")
    assert log[-1]["l0"] == 2
    capsys.readouterr()
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").replace("|", " ").split())
    assert "fewer: Share of the k latents that stays. (default: 0.25)" in text
    assert "fewer: A setting with a default that is made. (default: ('a', 'b'))" in text
    assert "topk, matryoshka, fewer: Active latents per token." in text
    assert main(line(rows, tmp_path / "other", "topk", "--share", "0.5")) == 1
    assert "share is 0.5, but topk has no such setting" in capsys.readouterr().err


def test_a_kind_belongs_to_one_rule() -> None:
    with pytest.raises(TypeError, match=r"Mine has kind = 'relu', but so has ReLU; rename one"):

        class Mine(fastsae.ReLU):
            kind: ClassVar[str] = "relu"

    assert ACTIVATIONS["relu"] is fastsae.ReLU
