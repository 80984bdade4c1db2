"""`fastsae eval` with a language model: from a harvest, a live run and none of both, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae.cli.main import main
from fastsae.data import ActivationStream, load_model, load_text
from fastsae.data.stream import StreamConfig
from fastsae.runs.opening import language_of_run, open_run
from fastsae.runs.spliced import spliced_loss
from tests.cli_case import write_text, write_tiny_model

pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = ["--d-sae", "48", "--k", "4", "--batch-size", "100", "--steps", "6", "--no-progress", "--no-tensorboard"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head, a text, runs on its activations after one layer and at an MLP."""
    folder = tmp_path_factory.mktemp("language")
    write_tiny_model(folder / "model", head=True)
    write_text(folder / "text.txt")
    for hook, name in (("1", "residual"), ("mlp.0", "mlp")):
        source = ["--model", str(folder / "model"), "--text", str(folder / "text.txt"), "--hook", hook]
        more = ["--window", "32", "--rows", "1000", "--holdout", "200", "--model-dtype", "float32", "--no-progress"]
        assert main(["harvest", str(folder / f"acts-{name}"), *source, *more, "--dtype", "float32"]) == 0
        assert main(["train", str(folder / f"acts-{name}"), "--run-dir", str(folder / name), *SIZES]) == 0
    return folder


def evaluated(run: Path, *more: str) -> dict[str, Any]:
    assert main(["eval", str(run), "--no-progress", *more]) == 0
    return json.loads((run / "evaluation.json").read_text())


def refused(capsys: pytest.CaptureFixture[str], run: Path, *more: str) -> str:
    capsys.readouterr()
    assert main(["eval", str(run), "--no-progress", *more]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    line = captured.err.splitlines()[-1]  # transformers draws a bar before it
    assert line.startswith("fastsae eval: error: ")
    return line


def test_the_run_s_own_model_and_text(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = evaluated(place / "residual")
    record = evaluated(place / "residual", "--spliced")
    shown = capsys.readouterr().out
    # The same rows, but 200 of whole windows: 7 windows of 31 ordinary tokens.
    assert record["n_tokens"] == 217
    assert record["fvu"] == pytest.approx(stored["fvu"], rel=0.05)
    loss = record["spliced"]
    assert loss["hooks"] == ["model.layers.0"]
    assert loss["n_windows"] == 7
    assert loss["replaced_share"] == pytest.approx(31 / 32)
    assert loss["special"].startswith("the first position of a window, activations of norm above")
    assert "zero ablation" in shown
    assert "mean ablation" in shown
    assert "as in training" in shown
    assert "as in training" in loss["special"]

    run = open_run(place / "residual")
    found = language_of_run(run.config)
    assert found is not None
    model = load_model(str(place / "model"), dtype=torch.float32, head=True)
    assert found.digest == model.base.describe()["digest"] == loss["model"]["digest"]
    stream = ActivationStream(model, load_text(str(place / "text.txt")), found.stream)
    again = spliced_loss(model, {1: run.sae}, stream.held_out_windows(200), where=stream.filter.ordinary)
    for name in ("ce_untouched", "ce_spliced", "ce_zero", "ce_mean", "kl_spliced", "recovered_over_mean"):
        assert loss[name] == pytest.approx(getattr(again, name), rel=1e-4, abs=1e-6)

    assert main(["report", str(place / "residual"), "--latents", "2", "--passages", "1", "--no-time-step"]) == 0
    page = (place / "residual" / "report.html").read_text()
    assert "In the language model" in page
    assert f"{loss['ce_spliced']:.4f}" in page


def test_other_text_more_hooks_and_a_transcoder(place: Path) -> None:
    other = place / "other.txt"
    write_text(other, words=9000)
    more = ["--text", str(other), "--tokens", "330", "--also", str(place / "mlp")]
    loss = evaluated(place / "residual", "--model", str(place / "model"), *more)["spliced"]
    assert loss["hooks"] == ["model.layers.0", "model.layers.0.mlp"]
    assert loss["n_windows"] == 11
    loss = evaluated(place / "mlp", "--hook", "mlp.0:input", "--output-hook", "mlp.0")["spliced"]
    assert loss["hooks"] == ["model.layers.0.mlp:input -> model.layers.0.mlp"]


def test_a_live_run_and_a_saved_sae(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = ["--live.model", str(place / "model"), "--live.text", str(place / "text.txt"), "--live.hook", "1"]
    live += ["--live.window", "32", "--live.holdout", "100", "--live.buffer-rows", "600"]
    assert main(["train", "live", "--run-dir", str(place / "live"), *SIZES, *live]) == 0
    assert evaluated(place / "live", "--spliced")["spliced"]["n_windows"] == 4
    saved = place / "saved"
    shutil.copytree(open_run(place / "residual").path, saved)
    full = ["--model", str(place / "model"), "--text", str(place / "text.txt"), "--hook", "1", "--window", "32"]
    assert evaluated(saved, *full, "--tokens", "64")["spliced"]["n_windows"] == 2
    for left, message in [
        (full[2:], "does not record its language model; name it with --model"),
        (full[:2] + full[4:], "does not record its text; name one"),
        (full[:4], "does not record where its activations were taken; name the place with --hook"),
    ]:
        assert message in refused(capsys, saved, *left)


def test_what_it_refuses(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = place / "residual"
    another = write_tiny_model(tmp_path / "another", head=True, seed=1)
    message = refused(capsys, run, "--model", str(another))
    assert "has digest" in message
    assert "with digest" in message
    assert "--any-model" in message
    assert main(["eval", str(run), "--model", str(another), "--any-model", "--no-progress"]) == 0
    headless = write_tiny_model(tmp_path / "headless")
    assert "has no language-model head: lm_head.weight missing" in refused(capsys, run, "--model", str(headless))
    for more, part in [
        (["--hook", "9"], "the model has 2 layers: hook must be 0 to 2, got 9"),
        (["--hook", "mlp.0.down_proj:input"], "no module 'mlp.0.down_proj'"),
        (["--hook", "layers.0.mlp.down_proj:input"], "have 32 numbers, the autoencoder expects d_in = 16"),
        (["--tokens", "1000000"], "the text is too short: its held-out part has"),
        (["--tokens", "0"], "0 tokens of held-out text were asked for, expected at least 1"),
        (["--text", str(tmp_path / "none.txt")], "matches no file"),
        (["--spliced", "--data", str(place / "acts-residual")], "--spliced measures on text and --data on stored rows"),
        (["--model", "package:no_such_package"], "'no_such_package' is not installed"),
        (["--also", str(run)], "is of the hook 1, as another of these runs"),
    ]:
        options = more if "--model" in more or "--data" in more else ["--model", str(place / "model"), *more]
        assert part in refused(capsys, run, *options), more
    text = (place / "text.txt").read_text()
    (place / "text.txt").write_text(text + "more\n")
    try:
        assert "its held-out part may hold text of the training" in refused(capsys, run, "--spliced")
    finally:
        (place / "text.txt").write_text(text)


def test_a_record_that_was_edited() -> None:
    assert language_of_run({}) is None
    assert language_of_run({"notes": {"data": {"path": "x"}}}) is None
    for bad in ({"harvest": {"stream": {"hook": 1, "odd": 2}}, "path": "x"}, {"live": {"model": "m"}}):
        with pytest.raises(ValueError, match="does not fit this version"):
            language_of_run({"notes": {"data": bad}})
    live = {"model": "m", "text": "t", "model_dtype": "float32", "stream": {"hook": 3}}
    found = language_of_run({"notes": {"data": {"live": live}}})
    assert found is not None
    assert (found.model, found.stream, found.dtype) == ("m", StreamConfig(hook=3), "float32")


def test_transformers_missing_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "pip install 'fastsae-engine[lm]'" in refused(capsys, place / "residual", "--spliced")
