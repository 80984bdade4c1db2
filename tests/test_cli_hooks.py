"""Several hooks and transcoders on the command line: harvest, train, eval, report and sweep, stored and live."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsae.cli.main import main
from fastsae.data import ShardSource, load_model
from fastsae.data.hooks import HookedModel
from fastsae.runs.evaluate import evaluate
from fastsae.runs.opening import language_of_run, open_run
from tests.cli_case import write_text, write_tiny_model
from tests.train_case import saved_bytes

pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = ["--d-sae", "48", "--k", "4", "--batch-size", "100", "--steps", "6", "--no-progress", "--no-tensorboard"]
MORE = ["--window", "32", "--holdout", "200"]
PAIR = ["--hook", "mlp.1:input", "--target-hook", "mlp.1"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of four hooks from one pass, and a transcoder, a crosscoder and two autoencoders trained on them."""
    folder = tmp_path_factory.mktemp("hooks")
    write_tiny_model(folder / "model", head=True)
    write_text(folder / "text.txt")
    source = ["--model", str(folder / "model"), "--text", str(folder / "text.txt"), "--model-dtype", "float32"]
    hooks = ["--hook", "1", "--hook", "2", "--hook", "mlp.1:input", "--hook", "mlp.1"]
    rows = ["--rows", "1000", "--dtype", "float32", "--no-progress"]
    assert main(["harvest", str(folder / "acts"), *source, *hooks, *MORE, *rows]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # the pre-bias of a transcoder is off without a word
        assert main(["train", str(folder / "acts"), "--run-dir", str(folder / "transcoder"), *SIZES, *PAIR]) == 0
    for name, layers in (("cross", ["--layers", "2"]), ("each", [])):
        two = ["--hook", "1", "--hook", "2", *layers]
        assert main(["train", str(folder / "acts"), "--run-dir", str(folder / name), *SIZES, *two]) == 0
    return folder


def evaluated(run: Path, *more: str) -> dict[str, Any]:
    assert main(["eval", str(run), *more]) == 0
    return json.loads(max(run.glob("evaluation*.json"), key=lambda path: path.stat().st_mtime_ns).read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 1) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == code
    return capsys.readouterr().err.splitlines()[-1]


def test_a_transcoder_from_harvest_to_report(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(place / "transcoder")
    assert (run.sae.d_in, run.sae.d_out, run.sae.pre_bias) == (16, 16, False)
    source = ShardSource(place / "acts", hook="mlp.1:input", target="mlp.1")
    expected = evaluate(run.sae, source.held_out(), targets=source.held_out_targets())
    stored = evaluated(place / "transcoder")
    assert stored["fvu"] == pytest.approx(expected.fvu)
    assert stored["n_tokens"] == 200
    assert evaluated(place / "transcoder", "--data", str(place / "acts"))["fvu"] == pytest.approx(expected.fvu)
    every = evaluated(place / "transcoder", "--data", str(place / "acts"), "--all-rows")
    assert every["n_tokens"] == source.manifest.rows + 200

    record = language_of_run(run.config)
    assert record is not None
    assert (record.stream.hook, record.target, record.others) == ("mlp.1:input", "mlp.1", (1, 2))
    assert record.norm_median == source.manifest.hooks()[2].norm_median
    capsys.readouterr()
    spliced = evaluated(place / "transcoder", "--spliced", "--no-progress")["spliced"]
    assert spliced["hooks"] == ["model.layers.1.mlp:input -> model.layers.1.mlp"]
    assert "as in training, which also left out tokens by their norms at 1, 2, mlp.1" in spliced["special"]
    model = load_model(str(place / "model"), dtype=torch.float32, head=True).model
    ids = torch.randint(4, 50, (1, 32), generator=torch.Generator().manual_seed(0))
    x, y = HookedModel(model, ("mlp.1:input", "mlp.1")).parts(ids)
    assert run.sae(x, y).recon.shape == y.shape

    assert main(["report", str(place / "transcoder"), "--sample", "3", "--passages", "1"]) == 0
    page = (place / "transcoder" / "report.html").read_text()
    assert "transcoder of mlp.1:input to mlp.1" in page
    assert "A latent promotes the tokens" in page
    assert "Inside one update" in page


def test_a_crosscoder_of_the_hooks_side_by_side(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(place / "cross")
    assert (run.sae.d_in, run.sae.layers) == (32, 2)
    source = ShardSource(place / "acts", hook=(1, 2))
    assert evaluated(place / "cross")["fvu"] == pytest.approx(evaluate(run.sae, source.held_out()).fvu)
    assert main(["report", str(place / "cross"), "--sample", "2", "--passages", "1", "--no-time-step"]) == 0
    page = (place / "cross" / "report.html").read_text()
    assert "crosscoder of 1, 2" in page
    assert "A latent promotes the tokens" in page
    message = refused(capsys, "eval", str(place / "cross"), "--spliced", "--no-progress")
    assert "is a crosscoder of 1, 2" in message
    assert "measure it on stored rows" in message


def test_an_autoencoder_of_each_hook(place: Path) -> None:
    for hook in ("1", "2"):
        run = open_run(place / "each" / hook)
        source = ShardSource(place / "acts", hook=hook)
        assert evaluated(place / "each" / hook)["fvu"] == pytest.approx(evaluate(run.sae, source.held_out()).fvu)
    assert main(["train", str(place / "acts"), "--run-dir", str(place / "each"), *SIZES, "--hook", "1", "--hook", "2",
                 "--resume"]) == 0  # fmt: skip
    # One alone is the same run.
    assert main(["train", str(place / "acts"), "--run-dir", str(place / "alone"), *SIZES, "--hook", "2"]) == 0
    assert saved_bytes(open_run(place / "alone").path) == saved_bytes(open_run(place / "each" / "2").path)


def test_several_runs_of_one_store_spliced_in_together(place: Path) -> None:
    also = ["--also", str(place / "each" / "2"), str(place / "transcoder")]
    record = evaluated(place / "each" / "1", "--no-progress", *also)
    assert [one["hook"] for one in record["hooks"]] == [
        "model.layers.0", "model.layers.1", "model.layers.1.mlp:input -> model.layers.1.mlp"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["transcoder", "crosscoder"])
def test_live(place: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    live = ["--live.model", str(place / "model"), "--live.text", str(place / "text.txt"), "--live.window", "32"]
    live += ["--live.holdout", "200", "--live.buffer-rows", "600", "--live.model-dtype", "float32"]
    if kind == "transcoder":
        live += ["--live.hook", "mlp.1:input", "--target-hook", "mlp.1"]
    else:
        live += ["--live.hook", "1", "--live.hook", "2", "--layers", "2"]
    run = place / f"live-{kind}"
    assert main(["train", "live", "--run-dir", str(run), *SIZES, *live, "--decay", "constant"]) == 0
    trained = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert evaluated(run)["fvu"] == pytest.approx(trained["fvu"])
    longer = [*SIZES[:-3], "9", *SIZES[-2:]]
    assert main(["train", "live", "--run-dir", str(run), *longer, *live, "--decay", "constant", "--resume"]) == 0
    whole = place / f"whole-{kind}"
    assert main(["train", "live", "--run-dir", str(whole), *longer, *live, "--decay", "constant"]) == 0
    assert saved_bytes(open_run(run).path) == saved_bytes(open_run(whole).path)
    record = language_of_run(open_run(run).config)
    assert record is not None
    if kind == "transcoder":
        assert (record.stream.hook, record.target) == ("mlp.1:input", "mlp.1")
        assert evaluated(run, "--spliced", "--no-progress")["spliced"]["hooks"][0].endswith("-> model.layers.1.mlp")
    else:
        assert record.stream.hook == (1, 2)
    message = refused(capsys, "train", "live", "--run-dir", str(place / "x"), *SIZES, *live, "--hook", "1")
    assert "--hook is for stored rows; training live has --live.hook" in message


def test_an_autoencoder_of_each_live_hook(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    live = ["--live.model", str(place / "model"), "--live.text", str(place / "text.txt"), "--live.window", "32"]
    live += ["--live.holdout", "200", "--live.buffer-rows", "600", "--live.hook", "1", "--live.hook", "mlp.1"]
    run = place / "live-each"
    assert main(["train", "live", "--run-dir", str(run), *SIZES, *live]) == 0
    for hook in ("1", "mlp.1"):
        trained = json.loads((run / hook / "eval.jsonl").read_text().splitlines()[-1])
        assert evaluated(run / hook)["fvu"] == pytest.approx(trained["fvu"])
        record = language_of_run(open_run(run / hook).config)
        assert record is not None
        assert (str(record.stream.hook), len(record.others)) == (hook, 1)
    message = refused(capsys, "train", "live", "--run-dir", str(run), *SIZES, *live, "--target-hook", "mlp.0")
    assert "--target-hook with 2 live hooks: train transcoders one by one" in message


def test_a_sweep_of_transcoders(place: Path) -> None:
    sizes = ["--rules", "topk", "--l0s", "4", "--d-sae", "48", "--steps", "4", "--batch-size", "100", "--no-progress"]
    out = ["--out", str(place / "sweep"), "--no-tensorboard", "--spliced"]
    assert main(["sweep", str(place / "acts"), *out, *sizes, *PAIR]) == 0
    record = json.loads((place / "sweep" / "sweep.json").read_text())["cells"]["topk-l0_4-d48-seed0"]
    run = open_run(place / "sweep" / record["run"])
    source = ShardSource(place / "acts", hook="mlp.1:input", target="mlp.1")
    expected = evaluate(run.sae, source.held_out(), targets=source.held_out_targets())
    assert record["fvu"] == pytest.approx(expected.fvu)
    assert not run.sae.pre_bias
    assert record["spliced"]["hooks"] == ["model.layers.1.mlp:input -> model.layers.1.mlp"]


def test_targets_in_a_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(1))
    save_file({"x": x, "y": x[:, :5].relu().contiguous()}, place / "pairs.safetensors")
    names = ["--tensor", "x", "--target-tensor", "y"]
    run = place / "file"
    assert main(["train", str(place / "pairs.safetensors"), "--run-dir", str(run), *SIZES, *names]) == 0
    assert open_run(run).sae.d_out == 5
    kept = evaluated(run)
    again = evaluated(run, "--data", str(place / "pairs.safetensors"), *names)
    assert kept["fvu"] == pytest.approx(again["fvu"])
    asked = ["--hook", "mlp.1:input", "--model", str(place / "model"), "--text", str(place / "text.txt"), "--l0s", "4"]
    sizes = ["--out", str(place / "swept"), "--rules", "topk", "--d-sae", "48", "--steps", "4", "--batch-size", "100"]
    message = refused(capsys, "sweep", str(place / "pairs.safetensors"), *names, *asked, *sizes, "--no-progress")
    assert "has targets of a transcoder; name their place with --target-hook" in message


def test_what_is_refused(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    acts, run = str(place / "acts"), ["--run-dir", str(tmp_path / "run"), *SIZES]
    for more, part in [
        ([], "holds rows of 4 hooks: 1, 2, mlp.1:input, mlp.1; choose one or more with hook"),
        (["--hook", "3"], "holds no rows of the hook 3"),
        (["--hook", "1", "--hook", "2", "--hook", "mlp.1", "--layers", "2"], "--layers is 2 with 3 hooks"),
        (["--hook", "1", "--target-tensor", "y"], "is a folder: name the hook of its targets"),
        ([*PAIR, "--resample-at", "3"], "resampling sets both dictionaries"),
        (["--hook", "1", "--resume", "--steps", "0"], "steps is 0, expected at least 1"),
    ]:
        assert part in refused(capsys, "train", acts, *run, *more, code=2 if "--steps" in more[2:] else 1), more
    assert not (tmp_path / "run" / "checkpoints").exists()
    message = refused(capsys, "eval", str(place / "transcoder"), "--data", acts, "--hook", "1", "--target-hook", "3")
    assert "holds no rows of the hook '3'" in message
    harvest = ["harvest", str(tmp_path / "h"), "--model", str(place / "model"), "--text", str(place / "text.txt")]
    assert "no hook" in refused(capsys, *harvest, code=2)
    assert "Unrecognized options: 2" in refused(capsys, *harvest, "--hook", "1", "2", code=2)
    assert "--no-pre-bias is now --pre-bias False" in refused(capsys, "train", acts, *run, "--no-pre-bias", code=2)


def test_resume_without_a_run_is_said_and_what_would_allow_a_longer_one(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin = ["train", str(place / "acts"), "--run-dir", str(tmp_path / "run"), *SIZES, "--hook", "1", "--resume"]
    assert main(begin) == 0
    assert f"--resume: {tmp_path / 'run'} holds no checkpoint, so a new run starts there" in capsys.readouterr().err
    assert main(begin) == 0
    assert "a new run starts" not in capsys.readouterr().err
    begin[begin.index("--steps") + 1] = "9"
    message = refused(capsys, *begin)
    assert "train.steps is 6 there and 9 here" in message
    assert "only a run started with --decay constant can" in message
    assert "constant" not in refused(capsys, *begin[:-1], "--steps", "6", "--lr", "0.5", "--resume")


def test_a_transcoder_to_two_hooks_side_by_side(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """It trains and has a report. Only one hook can be put into a model, which is said before one is loaded."""
    run, two = tmp_path / "two", ["--hook", "mlp.1:input", "--target-hook", "mlp.1", "--target-hook", "2"]
    assert main(["train", str(place / "acts"), "--run-dir", str(run), *SIZES, *two]) == 0
    record = language_of_run(open_run(run).config)
    assert record is not None
    assert (record.targets, record.others) == (("mlp.1", 2), (1,))
    assert main(["report", str(run)]) == 0
    html = (run / "report.html").read_text()
    assert "transcoder of mlp.1:input to mlp.1, 2" in html
    assert "only one hook can be spliced into a model" in refused(capsys, "eval", str(run), "--spliced")


def test_a_hook_that_is_called_by_its_modules_name_is_not_another_one(place: Path, tmp_path: Path) -> None:
    name = ShardSource(place / "acts", hook="2").manifest.hooks()[1].name
    run = tmp_path / "named"
    assert main(["train", str(place / "acts"), "--run-dir", str(run), *SIZES, "--hook", name]) == 0
    record = language_of_run(open_run(run).config)
    assert record is not None
    assert record.others == (1, "mlp.1:input", "mlp.1")
