"""`fastsae eval` with a language model: from a harvest, a live run and none of both, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsae
from fastsae.cli.main import main
from fastsae.data import ActivationStream, load_model, load_text
from fastsae.data.hooks import HookedModel
from fastsae.data.stream import StreamConfig
from fastsae.report.page import HOOK_COLUMNS
from fastsae.runs.evaluate import evaluate
from fastsae.runs.opening import language_of_run, open_run
from fastsae.runs.spliced import spliced_loss
from tests.cli_case import write_text, write_tiny_model
from tests.data_case import sealed

pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = ["--d-sae", "48", "--k", "4", "--batch-size", "100", "--steps", "6", "--no-progress", "--no-tensorboard"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head, a text, runs on its activations after one layer and at an MLP."""
    folder = tmp_path_factory.mktemp("language")
    write_tiny_model(folder / "model", head=True)
    write_text(folder / "text.txt")
    strict = ["--no-drop-first", "--norm-factor", "1.2"]
    for hook, name, rest in (("1", "residual", []), ("mlp.0", "mlp", strict)):
        source = ["--model", str(folder / "model"), "--text", str(folder / "text.txt"), "--hook", hook]
        more = ["--window", "32", "--rows", "1000", "--holdout", "200", "--model-dtype", "float32", "--no-progress"]
        assert main(["harvest", str(folder / f"acts-{name}"), *source, *more, *rest, "--dtype", "float32"]) == 0
        assert main(["train", str(folder / f"acts-{name}"), "--run-dir", str(folder / name), *SIZES]) == 0
    return folder


def evaluated(run: Path, *more: str) -> dict[str, Any]:
    assert main(["eval", str(run), "--no-progress", *more]) == 0
    return json.loads(max(run.glob("evaluation*.json"), key=lambda path: path.stat().st_mtime_ns).read_text())


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
    assert loss["special"].startswith("the first position of a window, the token <s>, activations of norm above")
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
    for name in ("ce_untouched", "ce_spliced", "ce_zero", "ce_mean", "kl_spliced"):
        assert loss[name] == pytest.approx(getattr(again, name), rel=1e-4, abs=1e-6)
    assert loss["undefined"].keys() == again.undefined.keys()

    assert main(["report", str(place / "residual"), "--sample", "2", "--passages", "1", "--no-time-step"]) == 0
    page = (place / "residual" / "report.html").read_text()
    assert "In the language model" in page
    assert f"{loss['ce_spliced']:.4f}" in page


def test_several_runs_each_with_the_filter_of_its_training(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The mlp's training kept the first position and dropped many rows; the residual stream's did the reverse."""
    other = place / "other.txt"
    write_text(other, words=9000)
    more = ["--text", str(other), "--tokens", "330", "--also", str(place / "mlp")]
    record = evaluated(place / "residual", "--model", str(place / "model"), *more)
    shown = capsys.readouterr().out
    loss = record["spliced"]
    assert loss["hooks"] == ["model.layers.0", "model.layers.0.mlp"] == [one["hook"] for one in record["hooks"]]
    assert loss["n_windows"] == 11

    model = load_model(str(place / "model"), dtype=torch.float32, head=True)
    runs = {name: open_run(place / name) for name in ("residual", "mlp")}
    stream = ActivationStream(model, load_text(str(other)), StreamConfig(hook=1, window=32, holdout=330))
    ids = stream.held_out_windows(330)
    hooks, where = {1: runs["residual"].sae, "mlp.0": runs["mlp"].sae}, {}
    for (hook, sae), one, name in zip(hooks.items(), record["hooks"], runs, strict=True):
        x = HookedModel(model.model, hook)(ids)
        found = language_of_run(runs[name].config)
        assert found is not None
        keep = torch.ones(11, 32, dtype=torch.bool)
        keep[:, 0] = name == "mlp"
        keep &= x.norm(dim=-1) <= (1.2 if name == "mlp" else 5) * found.norm_median
        assert (name == "residual") == (int(keep.sum()) == 11 * 31)
        assert keep[:, 0].any() == (name == "mlp")
        where[hook] = lambda _, keep=keep: keep
        result = evaluate(sae, x[keep])
        assert (one["n_tokens"], one["weights"]) == (int(keep.sum()), str(runs[name].path))
        for key in ("fvu", "mse", "l0", "dead_share", "norm_ratio", "cosine", "fvu_per_token"):
            assert one[key] == pytest.approx(getattr(result, key), rel=1e-5), key
        assert one["density_histogram"]["counts"] == list(result.density_histogram.counts)
        assert re.search(rf"^at {one['hook']} +fvu {one['fvu']:.5f}, l0 {one['l0']:.2f}, dead share", shown, re.M)
        assert f"at {one['hook']} {one['special']}" in loss["special"]
    assert [one["special"].partition(" above ")[0] for one in record["hooks"]] == [
        "the first position of a window, the token <s>, activations of norm", "the token <s>, activations of norm"
    ]  # fmt: skip
    assert record["fvu"] == record["hooks"][0]["fvu"]
    again = spliced_loss(model, hooks, ids, where=where)
    for key in ("ce_spliced", "ce_zero", "ce_mean", "kl_spliced", "kl_mean", "replaced_share"):
        assert loss[key] == pytest.approx(getattr(again, key), rel=1e-5, abs=1e-7), key

    assert main(["report", str(place / "residual"), "--sample", "0", "--no-time-step"]) == 0
    page = (place / "residual" / "report.html").read_text()
    for one in record["hooks"]:
        assert f"Latent density at {one['hook']}<" in page
        numbers = [f"{one[key]:{form}}" for key, form in HOOK_COLUMNS.values()]
        assert f'<th scope="row">{one["hook"]}</th>' + "".join(f"<td>{cell}</td>" for cell in numbers) in page


@pytest.mark.parametrize(("output", "d_out"), [("mlp.1", 16), ("layers.1.mlp.gate_proj", 32)])
def test_a_saved_transcoder(place: Path, tmp_path: Path, output: str, d_out: int) -> None:
    sae = fastsae.SparseAutoencoder(16, 48, fastsae.TopK(4), d_out=d_out, pre_bias=False, seed=5)
    fastsae.save(sae, tmp_path)
    full = ["--model", str(place / "model"), "--model-dtype", "float32", "--text", str(place / "text.txt")]
    full += ["--window", "32", "--tokens", "128", "--hook", "mlp.1:input", "--target-hook", output]
    record = evaluated(tmp_path, *full)
    name = output if d_out == 32 else "layers.1.mlp"
    assert record["spliced"]["hooks"] == [f"model.layers.1.mlp:input -> model.{name}"] == [record["hooks"][0]["hook"]]

    model = load_model(str(place / "model"), dtype=torch.float32, head=True)
    stream = ActivationStream(
        model, load_text(str(place / "text.txt")), StreamConfig(hook="mlp.1:input", window=32, holdout=128)
    )
    ids, keep = stream.held_out_windows(128), torch.ones(4, 32, dtype=torch.bool)
    keep[:, 0] = False
    rows, targets = (HookedModel(model.model, hook)(ids)[keep] for hook in ("mlp.1:input", output))
    result = evaluate(sae.eval(), rows, targets=targets)
    assert record["n_tokens"] == 124
    assert record["fvu"] == pytest.approx(result.fvu, rel=1e-5)
    assert record["norm_ratio"] == pytest.approx(result.norm_ratio, rel=1e-5)
    again = spliced_loss(model, {("mlp.1:input", output): sae}, ids, where=lambda x: keep)
    for key in ("ce_spliced", "ce_zero", "ce_mean", "kl_spliced", "kl_mean"):
        assert record["spliced"][key] == pytest.approx(getattr(again, key), rel=1e-5, abs=1e-7), key


def test_a_transcoder_without_its_output_or_with_a_wrong_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fastsae.save(fastsae.SparseAutoencoder(16, 48, fastsae.TopK(4), d_out=32, seed=5), tmp_path)
    full = ["--model", str(place / "model"), "--text", str(place / "text.txt"), "--window", "32", "--tokens", "64"]
    for more, numbers in (([], 16), (["--target-hook", "mlp.1"], 16)):
        message = refused(capsys, tmp_path, *full, "--hook", "mlp.1:input", *more)
        assert f"is a transcoder of d_in = 16 to d_out = 32, and what it would replace has {numbers} numbers" in message
        assert "name the place with --target-hook" in message


def test_shares_that_are_undefined_are_dashes_with_the_reason(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny model has learnt nothing: that an ablation costs it anything cannot be seen in a few windows."""
    record = evaluated(place / "mlp", "--spliced")
    shown, loss = capsys.readouterr().out, record["spliced"]
    assert loss["undefined"]
    for key in ("recovered_over_zero", "recovered_over_mean"):
        assert (loss[key] is None) == (key in loss["undefined"])
    assert re.search(r"^recovered +.*– over ", shown, re.M)
    for why in loss["undefined"].values():
        assert why in shown
    assert main(["report", str(place / "mlp"), "--sample", "0", "--no-time-step"]) == 0
    page = (place / "mlp" / "report.html").read_text()
    for why in loss["undefined"].values():
        assert f"–: {why}." in page


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
        (["--spliced", "--data", str(place / "acts-residual")], "--spliced measures on text, --data on stored rows"),
        (["--model", "package:no_such_package"], "'no_such_package' is not installed"),
        (["--also", str(run)], "reads the hook 1, and so does another of these runs"),
    ]:
        options = more if "--model" in more or "--data" in more else ["--model", str(place / "model"), *more]
        assert part in refused(capsys, run, *options), more
    text = (place / "text.txt").read_text()
    (place / "text.txt").write_text(text + "more\n")
    try:
        assert "its held-out part may hold text of the training" in refused(capsys, run, "--spliced")
    finally:
        (place / "text.txt").write_text(text)


def copied(place: Path, target: Path, name: str, **stream: Any) -> tuple[Path, dict[str, Any]]:
    """A run with its activations, and the manifest of these; stream: settings that its record has instead."""
    shutil.copytree(place / name, target / name)
    shutil.copytree(place / f"acts-{name}", target / f"acts-{name}")
    config = json.loads((target / name / "config.json").read_text())
    config["notes"]["data"]["path"] = str(target / f"acts-{name}")
    config["notes"]["data"]["harvest"]["stream"] |= stream
    (target / name / "config.json").write_text(json.dumps(config))
    return target / name, json.loads((target / f"acts-{name}" / "manifest.json").read_text())


def test_the_norm_limit_is_that_of_the_training_at_every_hook(place: Path, tmp_path: Path) -> None:
    """Not that of the text which is measured on: half of it leaves out more, whichever run comes first."""
    run, manifest = copied(place, tmp_path, "mlp")
    manifest["stats"]["norm_median"] *= 0.8
    (tmp_path / "acts-mlp" / "manifest.json").write_text(json.dumps(sealed(manifest)))
    limit = f"the token <s>, activations of norm above {1.2 * manifest['stats']['norm_median']:.4g}: as in training"
    few = evaluated(run, "--spliced", "--tokens", "192")
    every = evaluated(place / "mlp", "--spliced", "--tokens", "192")
    assert few["n_tokens"] < every["n_tokens"]
    assert few["spliced"]["special"] == limit
    (also,) = evaluated(place / "residual", "--also", str(run), "--tokens", "192")["hooks"][1:]
    assert (also["n_tokens"], also["special"]) == (few["n_tokens"], limit)


def test_another_run_of_another_model_or_trained_on_this_text(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more, _ = copied(place, tmp_path, "residual", holdout=1500)
    message = refused(capsys, more, "--also", str(place / "mlp"), "--tokens", "64")
    assert f"{place / 'mlp'} was trained on part of the text that {more} held out; give another text" in message

    other, manifest = copied(place, tmp_path, "mlp")
    manifest["provenance"]["model"]["digest"] = "of another"
    (tmp_path / "acts-mlp" / "manifest.json").write_text(json.dumps(sealed(manifest)))
    message = refused(capsys, place / "residual", "--also", str(other), "--tokens", "64")
    assert f"{other}: the model {place / 'model'} has digest" in message
    assert "splice in runs of one model" in message


def test_a_record_that_was_edited() -> None:
    assert language_of_run({}) is None
    assert language_of_run({"notes": {"data": {"path": "x"}}}) is None
    for bad in ({"harvest": {"stream": {"hook": 1, "odd": 2}}, "path": "x"}, {"live": {"model": "m"}}):
        with pytest.raises(ValueError, match="does not fit this version"):
            language_of_run({"notes": {"data": bad}})
    live = {"model": "m", "text": "t", "model_dtype": "float32", "stream": {"hook": 3}}
    found = language_of_run({"notes": {"data": {"live": live}}})
    assert found is not None
    # From before there was a choice: the rows of special tokens were kept.
    assert (found.model, found.stream, found.dtype) == ("m", StreamConfig(hook=3, special_tokens="keep"), "float32")


def test_transformers_missing_is_one_line(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert "pip install 'fastsae-engine[lm]'" in refused(capsys, place / "residual", "--spliced")
