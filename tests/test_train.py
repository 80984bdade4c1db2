"""The trainer: the same curve fused and plain, what it writes, what it refuses, how it resumes."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import warnings
from dataclasses import fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from fastsae.model.files import load
from fastsae.runs.boards import LogWriteError
from fastsae.runs.checkpoint import step_of
from fastsae.runs.evaluate import evaluate
from fastsae.runs.rundir import RunDirError
from fastsae.runs.trainer import TrainConfig, Trainer
from fastsae.training.step import FusedTrainStep
from tests.train_case import BATCH, D_IN, config, curve, lines, module, saved_bytes, source, trainer


def test_a_run_learns_and_writes_what_it_says(tmp_path: Path) -> None:
    run = trainer(tmp_path / "run", steps=40)
    result = run.run()
    metrics, evals = lines(tmp_path / "run" / "metrics.jsonl"), lines(tmp_path / "run" / "eval.jsonl")

    assert [line["step"] for line in metrics] == list(range(1, 41))
    assert [line["tokens"] for line in metrics] == [BATCH * step for step in range(1, 41)]
    assert metrics[-1]["fvu"] < 0.5 * metrics[0]["fvu"]
    for line in metrics:
        assert line["loss"] == pytest.approx(line["mse"] + line["aux"] / 32, rel=1e-6)
        assert line["redone_share"] == 0
        assert line["tokens_per_s"] > 0
        assert line["ms_data"] >= 0
        assert line["ms_step"] > 0
    # Every 10 steps an evaluation, every 7 a checkpoint: each is timed in the first line written after it.
    assert [line["step"] for line in metrics if "ms_eval" in line] == [10, 20, 30, 40]
    assert [line["step"] for line in metrics if "ms_checkpoint" in line] == [8, 15, 22, 29, 36]
    times = [line["time_s"] for line in metrics]
    assert times == sorted(times)

    # The learning rate rises for 5 updates and falls over the last fifth.
    rates = [line["lr"] for line in metrics]
    assert rates[:5] == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.005])
    assert set(rates[5:33]) == {0.005}
    assert rates[33:] == pytest.approx([0.005 * (1 - i / 8) for i in range(1, 8)])

    # The evaluation is of the held-out rows, with the weights of that step.
    assert [line["step"] for line in evals] == [10, 20, 30, 40]
    saved = load(result.checkpoint)
    expected = evaluate(saved, source().held_out())
    assert evals[-1]["fvu"] == pytest.approx(expected.fvu, rel=1e-6)
    assert evals[-1]["dead_share"] == expected.dead_share
    assert sum(evals[-1]["density_histogram"]["counts"]) + evals[-1]["density_histogram"]["never"] == run.sae.d_sae
    assert -1 <= evals[-1]["cosine"] <= 1
    assert evals[-1]["source"]["epoch"] == 40 * BATCH // 600

    assert result.step == 40
    assert result.tokens == 40 * BATCH
    assert result.metrics == metrics[-1]
    assert json.loads(json.dumps(result.evaluation)) == evals[-1]
    assert step_of(result.checkpoint) == 40
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["train"]["lr"] == 0.005
    assert written["sae"]["activation"] == run.sae.config["activation"]
    assert written["source"] == {"kind": "TensorSource", "d_in": D_IN, "n_tokens": 600}


def test_the_plain_step_gives_the_same_curve(tmp_path: Path) -> None:
    for fused in (True, False):
        trainer(tmp_path / str(fused), fused=fused).run()
    fused_curve, plain_curve = curve(tmp_path / "True"), curve(tmp_path / "False")
    for got, expected in zip(fused_curve, plain_curve, strict=True):
        assert got == pytest.approx(expected, rel=2e-3)
    for a, b in zip(lines(tmp_path / "True/eval.jsonl"), lines(tmp_path / "False/eval.jsonl"), strict=True):
        assert a["fvu"] == pytest.approx(b["fvu"], rel=5e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_logging_evaluating_and_saving_less_often_changes_nothing_else(tmp_path: Path, fused: bool) -> None:
    """How often a run logs, evaluates and saves changes nothing else."""
    result = trainer(tmp_path / "a", fused=fused, steps=12).run()
    other = trainer(
        tmp_path / "b", fused=fused, steps=12, log_every=5, eval_every=0, checkpoint_every=100, keep=1
    ).run()
    assert saved_bytes(result.checkpoint) == saved_bytes(other.checkpoint)
    assert curve(tmp_path / "b") == [curve(tmp_path / "a")[step - 1] for step in (5, 10, 12)]
    assert other.evaluation is None
    assert (tmp_path / "b" / "eval.jsonl").read_text() == ""


def test_the_centre_of_the_first_batch_is_where_b_dec_starts(tmp_path: Path) -> None:
    first = source().next_batch(BATCH)
    seen: dict[str, torch.Tensor] = {}

    def note(name: str, run: Trainer) -> None:
        original = run._initialize

        def initialize(*batch: Any) -> None:
            original(*batch)
            seen[name] = run.sae.b_dec.detach().clone()

        run._initialize = initialize  # type: ignore[method-assign]
        run.run()

    for name in ("mean", "geometric_median", "zero"):
        note(name, trainer(tmp_path / name, steps=1, init_b_dec=name))
    torch.testing.assert_close(seen["mean"], first.mean(0))
    assert 0 < float((seen["geometric_median"] - first.mean(0)).norm()) < float(first.mean(0).norm())
    assert not seen["zero"].any()

    sae = module(normalize="constant", aux_k=None)
    with torch.no_grad():
        sae.b_dec.fill_(0.5)
    fine_tuned = Trainer(sae, source(), config(steps=1), tmp_path / "kept")
    note("kept", fine_tuned)
    assert seen["kept"].eq(0.5).all()
    assert sae.norm.calibrated
    assert float(sae.norm.scale) == pytest.approx(float(first.square().mean().sqrt()))


def test_what_after_step_changes_is_saved(tmp_path: Path) -> None:
    sae = module()

    def after_step() -> None:
        with torch.no_grad():
            sae.b_dec.fill_(0.25)

    result = Trainer(sae, source(), config(steps=3, checkpoint_every=1), tmp_path, after_step=after_step).run()
    for saved in (tmp_path / "checkpoints").iterdir():
        assert load(saved).b_dec.eq(0.25).all()
    assert result.checkpoint.exists()


def test_length_in_steps_tokens_or_passes(tmp_path: Path) -> None:
    assert TrainConfig(steps=7).total_steps(None) == 7
    assert TrainConfig(tokens=1000, batch_size=300).total_steps(None) == 4
    assert TrainConfig(batch_size=256).total_steps(1000) == 4
    with pytest.raises(ValueError, match="endless, so the number of updates is unknown; set steps or tokens"):
        TrainConfig().total_steps(None)
    assert trainer(tmp_path, steps=None).total == math.ceil(600 / BATCH)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"steps": 5, "tokens": 5}, "steps is 5 and tokens is 5; give one of them"),
        ({"batch_size": 0}, "batch_size is 0, expected at least 1"),
        ({"lr": math.nan}, "lr is nan, expected a number above 0"),
        ({"keep": 0}, "keep is 0, expected at least 1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"moments": "bf16", "fused": False}, "moments='bf16' needs fused=True"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**settings)


def test_what_does_not_fit_together_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    wide = module(d_out=D_IN + 1, pre_bias=False)
    with pytest.raises(ValueError, match=f"maps d_in = {D_IN} to d_out = {D_IN + 1}"):
        Trainer(wide, source(), config(), tmp_path / "run")
    narrow = type(wide)(D_IN - 1, 64, wide.activation)
    with pytest.raises(ValueError, match=f"rows of {D_IN} numbers, but the SAE has d_in = {D_IN - 1}"):
        Trainer(narrow, source(), config(), tmp_path / "run")
    with pytest.raises(ValueError, match="warmup is 50 updates, expected 0 <= warmup <= total = 30"):
        trainer(tmp_path / "run", warmup=50)
    assert not (tmp_path / "run").exists()

    data = source()
    data.held_out = lambda: torch.empty(0, D_IN)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="holds out no rows to evaluate on; set its holdout, or eval_every to 0"):
        Trainer(module(), data, config(), tmp_path / "run").run()
    assert Trainer(module(), data, config(steps=2, eval_every=0), tmp_path / "other").run().step == 2


def test_every_setting_says_what_it_is() -> None:
    """`--help` is made from these texts."""
    text = Path(__file__).parent.parent.joinpath("fastsae/runs/config.py").read_text()
    for field in fields(TrainConfig):
        after = text.split(f"    {field.name}: ", 1)[1].split("\n")[1]
        assert after.startswith('    """'), f"{field.name} has no docstring"
        assert after.endswith('."""')


# -- resuming --------------------------------------------------------------------------------------------------------


def test_a_run_that_is_complete_returns_at_once(tmp_path: Path) -> None:
    first = trainer(tmp_path).run()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "LOCK"}
    again = trainer(tmp_path).run()
    assert again.step == first.step
    assert again.metrics == first.metrics
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "LOCK"} == before


def test_a_constant_rate_may_be_given_more_steps(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", steps=20, decay="constant").run()
    trainer(tmp_path / "grown", steps=9, decay="constant").run()
    grown = trainer(tmp_path / "grown", steps=20, decay="constant").run()
    assert saved_bytes(grown.checkpoint) == saved_bytes(whole.checkpoint)
    assert curve(tmp_path / "grown") == curve(tmp_path / "whole")

    trainer(tmp_path / "decay", steps=9).run()
    with pytest.raises(RunDirError, match=r"train.steps is 9 there and 20 here"):
        trainer(tmp_path / "decay", steps=20).run()


def test_another_run_in_the_directory_is_refused_by_name(tmp_path: Path) -> None:
    trainer(tmp_path, steps=3).run()
    with pytest.raises(RunDirError) as caught:
        Trainer(module(dead_after=999), source(), config(steps=3, lr=0.5), tmp_path).run()
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "sae.dead_after is 300 there and 999 here" in message
    assert "train.lr is 0.005 there and 0.5 here" in message
    assert "another directory" in message
    assert "batch_size" not in message
    # Settings that do not affect the weights may change, and the new values are stored.
    assert trainer(tmp_path, steps=3, log_every=2, keep=9, threads=1).run().step == 3
    assert json.loads((tmp_path / "config.json").read_text())["train"]["keep"] == 9
    with pytest.raises(RunDirError, match=r"a run with checkpoints; resume it \(--resume\) or give another directory"):
        Trainer(module(), source(), config(steps=3), tmp_path, resume=False).run()


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("somebody's\n")
    with pytest.raises(RunDirError, match=r"holds metrics.jsonl but no config.json"):
        trainer(tmp_path).run()
    assert (tmp_path / "metrics.jsonl").read_text() == "somebody's\n"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunDirError, match=r"cannot read .*config.json"):
        trainer(tmp_path).run()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirError, match="cannot use the run directory"):
        trainer(tmp_path / "file").run()


def test_a_missed_prune_is_done_by_the_next_run(tmp_path: Path) -> None:
    trainer(tmp_path, keep=9, steps=21).run()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
    trainer(tmp_path, keep=1, steps=21).run()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000021"]


# -- what it shows ----------------------------------------------------------------------------------------------------


def test_tensorboard_and_the_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path, steps=8, tensorboard=True, progress=True, eval_every=4).run()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/fvu", "train/redone_share", "eval/fvu"} <= set(events.Tags()["scalars"])
    logged = [(e.step, e.value) for e in events.Scalars("train/fvu")]
    expected = [(line["step"], line["fvu"]) for line in lines(tmp_path / "metrics.jsonl")]
    assert [step for step, _ in logged] == [step for step, _ in expected]
    assert [value for _, value in logged] == pytest.approx([value for _, value in expected], rel=1e-6)
    shown = capfd.readouterr().err
    assert "8/8" in shown
    for name in ("tok/s=", "loss=", "fvu=", "l0="):
        assert name in shown


def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """A module `wandb` that keeps the runs that were started and what they were told, by id."""
    runs: dict[str, list] = {"started": [], "points": [], "finished": []}
    run = SimpleNamespace(
        define_metric=lambda *a, **k: None, log=runs["points"].append, finish=lambda: runs["finished"].append(1)
    )
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.Error = RuntimeError  # type: ignore[attr-defined]
    module.init = lambda **settings: runs["started"].append(settings) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def test_weights_and_biases_get_every_line_and_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = fake_wandb(monkeypatch)
    trainer(tmp_path / "a", steps=4, eval_every=4, wandb="saes").run()
    points = [point for point in runs["points"] if "train/fvu" in point]
    expected = [(line["step"], line["fvu"]) for line in lines(tmp_path / "a" / "metrics.jsonl")]
    assert [(point["step"], point["train/fvu"]) for point in points] == expected
    assert any("eval/fvu" in point for point in runs["points"])
    first = runs["started"][0]
    assert (first["project"], first["name"], first["resume"]) == ("saes", "a", "allow")
    assert first["config"]["train"]["steps"] == 4
    trainer(tmp_path / "a", steps=4, eval_every=4, wandb="saes").run()
    trainer(tmp_path / "b", steps=4, wandb="saes").run()
    ids = [started["id"] for started in runs["started"]]
    assert ids[0] == ids[1] != ids[2]
    assert len(runs["finished"]) == 3


def test_weights_and_biases_that_fail_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wandb(monkeypatch)

    def refused(**settings: object) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(sys.modules["wandb"], "init", refused)
    with pytest.raises(LogWriteError, match="project 'saes': no API key; set WANDB_MODE=offline"):
        trainer(tmp_path / "a", steps=2, wandb="saes").run()
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="the package wandb is not installed: pip install wandb"):
        trainer(tmp_path / "b", steps=2, wandb="saes")


def test_weights_and_biases_themselves_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    summaries = []
    finish = wandb.Run.finish
    monkeypatch.setattr(wandb.Run, "finish", lambda run: (summaries.append(dict(run.summary)), finish(run)))
    trainer(tmp_path, steps=4, wandb="saes").run()
    last = lines(tmp_path / "metrics.jsonl")[-1]
    assert summaries[0]["train/fvu"] == pytest.approx(last["fvu"])
    assert summaries[0]["step"] == 4
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_a_warning_when_the_encoder_repeats_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = FusedTrainStep.__call__
    monkeypatch.setattr(
        FusedTrainStep, "__call__", lambda self, x, *y: original(self, x, *y) | {"redone": torch.tensor(len(x) // 16)}
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, steps=6, log_every=2).run()
    texts = [str(w.message) for w in caught if "of the tokens twice" in str(w.message)]
    assert len(texts) == 1
    assert "step 2: the encoder encoded 6.2% of the tokens twice, expected at most 1%" in texts[0]
    assert [line["redone_share"] for line in lines(tmp_path / "metrics.jsonl")] == [0.0625] * 3


def test_threads_and_backend_are_set_for_the_run_only(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    run = trainer(tmp_path, steps=1, threads=1, backend="reference")
    inside: list[Any] = []
    original = run._initialize
    run._initialize = lambda *x: (inside.append((torch.get_num_threads(), run.sae.backend)), original(*x))[1]  # type: ignore
    run.run()
    assert inside == [(1, "reference")]
    assert (torch.get_num_threads(), run.sae.backend) == (threads, None)
