"""The command line as a user types it: from a model to a report, its help, its errors and exit codes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import fastsae
from fastsae.cli import commands
from fastsae.cli import options as config
from fastsae.cli.main import COMMANDS, main
from fastsae.cli.options import LiveOptions
from fastsae.data.stream import StreamConfig
from fastsae.runs.opening import open_run
from fastsae.runs.stopping import TrainingInterrupted
from tests.cli_case import WORDS, write_text, write_tiny_model

QUIET = ["--no-progress", "--no-tensorboard"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model, a text, a tensor file, and a run trained on that file."""
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_model(folder / "model")
    write_text(folder / "text.txt")
    x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    np.save(folder / "rows.npy", x.numpy())
    assert main(train(folder, "rows.npy", "run")) == 0
    return folder


def train(place: Path, data: str, run: str, *more: str) -> list[str]:
    sizes = ["--d-sae", "48", "--k", "4", "--batch-size", "100", "--steps", "6", "--log-every", "2"]
    return ["train", str(place / data), "--run-dir", str(place / run), *sizes, *QUIET, *more]


def fails(capsys, arguments: list[str], code: int = 1) -> str:
    """Runs a command that must fail with this code and exactly one line on stderr; returns the line."""
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    assert captured.err.startswith("fastsae")
    return captured.err


def test_from_a_language_model_to_a_report(place, capsys):
    source = ["--model", str(place / "model"), "--text", str(place / "text.txt"), "--hook", "1"]
    sizes = ["--window", "32", "--rows", "1000", "--rows-per-shard", "600", "--holdout", "200", "--no-progress"]
    harvest = ["harvest", str(place / "acts"), *source, *sizes]
    assert main(harvest) == 0
    said = r"^rows +1,\d\d\d in 2 shards \(1,000 asked for, and batches are stored whole\)$"
    assert re.search(said, capsys.readouterr().out, re.M)
    # A lone "##" does not make a WordPiece vocabulary: words are stored as they are.
    assert json.loads((place / "acts" / "vocabulary.json").read_text()) == WORDS
    assert main(harvest) == 0  # the harvest is complete, so no model is loaded
    assert main(train(place, "acts", "lm")) == 0
    assert "fvu (held out)" in capsys.readouterr().out

    assert main(["eval", str(place / "lm")]) == 0
    assert "200 held-out rows" in capsys.readouterr().out
    record = json.loads((place / "lm" / "evaluation.json").read_text())
    assert record["step"] == 6
    assert record["l0"] == 4
    last = json.loads((place / "lm" / "eval.jsonl").read_text().splitlines()[-1])
    assert record["fvu"] == pytest.approx(last["fvu"], rel=1e-6)

    assert main(["report", str(place / "lm"), "--sample", "5", "--passages", "2"]) == 0
    path = Path(capsys.readouterr().out.strip())
    page = path.read_text()
    assert path == place / "lm" / "report.html"
    assert page.count('<details class="latent"') == 5
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "left out: the model" in page  # it was saved without a head
    assert "has no language-model head" in page


def test_latents_by_name(place, capsys):
    if not (place / "lm").exists():
        test_from_a_language_model_to_a_report(place, capsys)
    report = ["report", str(place / "lm"), "--passages", "2", "--no-time-step", "--no-promoted"]
    for given, shown in (("3,41", [3, 41]), ("41, 3 ,", [41, 3]), ("7,", [7])):
        assert main([*report, "--latents", given]) == 0
        page = Path(capsys.readouterr().out.strip()).read_text()
        assert [int(i) for i in re.findall(r"<b>Latent (\d+)</b>", page)] == shown
    for given, said in [
        ("12", "--latents 12 is ambiguous: --latents 12, (with a comma) shows latent 12, "
               "--sample 12 draws 12 at random"),
        ("48,", "no latent 48: the autoencoder has latents 0 to 47"),
        ("3,x", "--latents is '3,x', expected indices with commas, such as 12,415"),
        (",", "--latents is ',', expected indices"),
    ]:  # fmt: skip
        assert said in fails(capsys, [*report, "--latents", given])
    assert "give one of them" in fails(capsys, [*report, "--latents", "1,2", "--sample", "3"])


def test_a_live_model(place, capsys):
    live = ["--live.model", str(place / "model"), "--live.text", str(place / "text.txt"), "--live.hook", "1"]
    more = ["--live.window", "32", "--live.holdout", "100", "--live.buffer-rows", "600"]
    arguments = train(place, "live", "live", *live, *more)
    arguments[1] = "live"
    assert main(arguments) == 0
    capsys.readouterr()
    assert main(["eval", str(place / "live")]) == 0
    assert "100 held-out text of the run's live stream" in capsys.readouterr().out
    assert "needs --live.model" in fails(capsys, [*arguments[:3], str(place / "none"), "--d-sae", "48"])


def test_live_options_survive_the_notes():
    options = LiveOptions(model="m", text="t", stream=StreamConfig(hook="layers.3", window=64), prefetch=True)
    assert LiveOptions.from_notes(json.loads(json.dumps(dataclasses.asdict(options)))) == options
    with pytest.raises(ValueError, match="does not fit this version"):
        LiveOptions.from_notes({"stream": {"hook": 1, "unheard_of": 2}})


def test_resume_continues_and_must_be_requested(place, capsys):
    message = fails(capsys, train(place, "rows.npy", "run"))
    assert "holds a run with checkpoints" in message
    longer = train(place, "rows.npy", "longer", "--decay", "constant")
    assert main(longer) == 0
    longer[longer.index("--steps") + 1] = "9"
    assert main([*longer, "--resume"]) == 0
    assert open_run(place / "longer").step == 9
    assert "lr is 0.0002 there and 0.5 here" in fails(capsys, [*longer, "--resume", "--lr", "0.5"])


@pytest.mark.parametrize(("goes_on", "end"), [(True, "Start it again to go on, with --resume"), (False, "to go on")])
def test_resume_is_named_where_there_is_something_to_go_on_from(goes_on, end):
    with pytest.raises(TrainingInterrupted) as caught, commands.saying_resume():
        raise TrainingInterrupted("Start it again to go on", signal.SIGINT, goes_on=goes_on)
    assert str(caught.value).endswith(end)
    assert (caught.value.signal, caught.value.goes_on) == (signal.SIGINT, goes_on)


def test_a_file_of_another_run_in_a_checkpoint_is_refused(place, tmp_path, capsys):
    checkpoint = open_run(place / "run").path
    own = checkpoint.parent.parent
    copied = shutil.copytree(own, tmp_path / "run") / "checkpoints" / checkpoint.name
    fastsae.save(fastsae.SparseAutoencoder(8, 16, fastsae.TopK(4), seed=5), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "sae.safetensors", copied)
    assert main(["eval", str(copied)]) == 1
    assert "sae.safetensors" in capsys.readouterr().err


def test_eval_of_a_checkpoint_writes_beside_the_run_and_not_into_it(place, capsys):
    checkpoint = open_run(place / "run").path
    before = {p.name: p.read_bytes() for p in checkpoint.iterdir()}
    assert main(["eval", str(checkpoint)]) == 0
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before
    record = json.loads((place / "run" / f"evaluation_{checkpoint.name}.json").read_text())
    assert checkpoint.name.endswith(str(record["step"]))
    assert f"evaluation_{checkpoint.name}.json" in capsys.readouterr().out
    assert "not a run: a report needs" in fails(capsys, ["report", str(checkpoint)])
    assert {p.name: p.read_bytes() for p in checkpoint.iterdir()} == before
    shutil.copytree(checkpoint, place / "copied")  # an autoencoder of its own
    assert main(["eval", str(place / "copied"), "--data", str(place / "rows.npy")]) == 0
    assert (place / "copied" / "evaluation.json").is_file()


def test_eval_on_other_rows(place, capsys):
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    save_file({"a": x, "b": x.bfloat16()}, place / "two.safetensors")
    out = place / "elsewhere.json"
    run = ["eval", str(open_run(place / "run").path), "--data", str(place / "two.safetensors")]
    assert "name one of a, b" in fails(capsys, run)
    assert main([*run, "--tensor", "b", "--all-rows", "--density", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["n_tokens"] == 50
    assert len(record["density"]) == 48
    assert "--all-rows needs --data" in fails(capsys, ["eval", str(place / "run"), "--all-rows"])
    np.save(place / "narrow.npy", np.zeros((30, 5), np.float32))
    message = fails(capsys, ["eval", str(place / "run"), "--data", str(place / "narrow.npy")])
    assert "the rows have 5 numbers, the autoencoder expects d_in = 16" in message


def test_info_in_words_and_as_json(capsys):
    assert main(["info"]) == 0
    words = capsys.readouterr().out
    for expected in (torch.__version__, "threads", "reference", "cuda"):
        assert expected in words
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["torch"] == torch.__version__
    assert facts["backends"]["reference"]["available"] is True
    for entry in facts["backends"].values():
        assert entry["available"] or entry["reason"]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "bench"])
def test_every_option_is_documented(command, capsys):
    assert main([command, "--help"]) == 0
    # Drops the frame: its first and last column, which some terminals show as blanks.
    lines = [line[1:-1] for line in capsys.readouterr().out.splitlines()]
    blocks = re.split(r"^ (?=--[a-z])", "\n".join(lines), flags=re.M)[1:]
    positional = 2 if command == "convert" else 1
    assert len(blocks) >= len(dataclasses.fields(commands.OPTIONS[command])) - positional
    for block in blocks:
        # Without names, defaults and types, some help text must be left.
        help_text = re.sub(r"--[\w.-]+|\((default|required)[^)]*\)|\{.*?\}|\b[A-Z]+\b", "", block)
        assert len(help_text.split()) >= 2, block


@pytest.mark.parametrize("command", ["harvest", "train", "sweep", "eval"])
def test_help_begins_with_the_options_that_matter(command, capsys):
    assert main([command, "--help"]) == 0
    top, boxes = capsys.readouterr().out.split("positional arguments", 1)
    first, listed = top.partition("most calls set")[::2]
    assert first.startswith(f"usage: fastsae {command}")
    essential = commands.OPTIONS[command].essential
    assert 3 <= len(essential) <= 8
    for name, text in essential.items():
        assert f"{name} {text}" in " ".join(listed.split()), name
        assert re.search(rf"{name}\b", boxes), f"{name} is no option of {command}"
        assert name.startswith("--") or name.isupper()
    # Whatever must be given is among them.
    required = re.findall(r"(--[a-z][a-z0-9-]+) [^-]*?\(required\)", boxes)
    assert set(required) <= set(essential), required


@pytest.mark.parametrize(
    ("rule", "own", "others"),
    [
        ([], ["--k"], ["--target-l0", "--bandwidth", "--sampled"]),
        (["--activation", "jumprelu"], ["--target-l0", "--bandwidth"], ["--k ", "--sampled"]),
        (["--activation=matryoshka"], ["--k", "--sampled"], ["--bandwidth"]),
    ],
)
def test_help_goes_on_with_the_options_of_the_rule(rule, own, others, capsys):
    assert main(["train", *rule, "--help"]) == 0
    top = capsys.readouterr().out.partition("positional arguments")[0].partition("Options of the rule ")[2]
    assert top.startswith((rule or ["topk"])[-1].rpartition("=")[2])
    assert all(re.search(rf"^  {name} +\S", top, re.M) for name in own), top
    assert not any(re.search(rf"^  {name}", top, re.M) for name in others), top


def test_help_and_version_say_where_to_look(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {command}" in text for command in COMMANDS)
    assert main([]) == 2
    assert main(["--version"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no command 'trian'; the commands are harvest, train"),
        (["train"], "Missing from fastsae train: DATA --run-dir PATH --d-sae INT; see fastsae train --help"),
        (["train", "x", "--run-dir", "y", "--d-sae", "8", "--lrr", "1"], "Perhaps you meant: --lr FLOAT"),
        (["train", "x", "--run-dir", "y", "--d-sae", "many"], "Error parsing --d-sae"),
        (
            ["train", "x", "--run-dir", "y", "--d-sae", "8", "--decay", "no"],
            "invalid choice 'no' for argument '--decay'",
        ),
        (["train", "x", "--run-dir", "y", "--d-sae", "8", "--batch-size", "0"], "batch_size is 0, expected at least 1"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(arguments, message, capsys):
    assert message in fails(capsys, arguments, code=2)


def test_errors_name_the_thing(place, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("words")
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY\x01\x00garbage")
    (tmp_path / "cut.safetensors").write_bytes(
        (place / "run/checkpoints/step_00000006/sae.safetensors").read_bytes()[:99]
    )
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "whole.npy", np.ones((40, 3), np.int64))
    np.save(tmp_path / "cube.npy", np.ones((4, 3, 2), np.float32))
    np.save(tmp_path / "nan.npy", np.full((40, 16), np.nan, np.float32))
    for name, message in [
        ("missing.npy", "missing.npy does not exist"),
        ("empty", "holds no activations: expected a manifest.json"),
        ("text.txt", "neither a folder nor a .safetensors or .npy file"),
        ("broken.npy", "broken.npy is truncated or not a .npy file"),
        ("pickled.npy", "pickled.npy is truncated or not a .npy file of numbers"),
        ("cut.safetensors", "cut.safetensors is truncated or not a .safetensors file"),
        ("whole.npy", "holds int64 of shape (40, 3)"),
        ("cube.npy", "shape (4, 3, 2), expected rows (n, d_in)"),
        ("nan.npy", "40 of 40 rows hold NaN or inf"),
    ]:
        assert message in fails(capsys, train(tmp_path, name, "run")), name
    assert not (tmp_path / "run").exists()
    rows = str(place / "rows.npy")
    more = ["--run-dir", str(tmp_path / "run"), "--steps", "2", *QUIET]
    assert "k = 9, expected at most d_sae = 8" in fails(capsys, ["train", rows, *more, "--d-sae", "8", "--k", "9"])
    assert "CUDA devices" in fails(capsys, ["train", rows, *more, "--d-sae", "8", "--k", "2", "--device", "cuda:77"])
    assert "no rows are held out" in fails(capsys, ["train", rows, *more, "--d-sae", "8", "--k", "2", "--holdout", "0"])
    assert "no run or saved SAE" in fails(capsys, ["eval", str(tmp_path / "nowhere")])
    assert "no checkpoint" in fails(capsys, ["eval", str(tmp_path / "empty")])
    assert "is not a run folder" in fails(capsys, ["report", str(tmp_path / "empty")])
    assert "neither.html" in fails(capsys, ["report", str(place / "run"), "--out", str(tmp_path / "no/neither.html")])


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "fastsae info: interrupted\n"),
        (TrainingInterrupted("stopped after step 3", signal.SIGTERM), 143, "fastsae info: stopped after step 3\n"),
        (OSError(28, "No space left on device", "/x/y"), 1, "fastsae info: error: /x/y: No space left on device\n"),
        (ValueError("two\nlines"), 1, "fastsae info: error: two lines\n"),
    ],
)
def test_exit_codes(error, code, line, monkeypatch, capsys):
    def stop(options: config.Info) -> int:
        raise error

    monkeypatch.setitem(commands.RUN, "info", stop)
    assert main(["info"]) == code
    assert capsys.readouterr().err == line


def test_faults_of_the_program_keep_their_traceback(monkeypatch, capsys):
    def fault(options: config.Info) -> int:
        raise errors.pop()

    monkeypatch.setitem(commands.RUN, "info", fault)
    errors: list[Exception] = [ValueError("shown whole"), RuntimeError("torch's own"), TypeError("a bug")]
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError)):
            main(["info"])
    with pytest.raises(ValueError, match="shown whole"):
        main(["info", "--debug"])


def test_as_a_process(tmp_path):
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fastsae", *arguments], capture_output=True, text=True, check=False
        )

    broken = call("report", str(tmp_path / "nowhere"))
    assert (broken.returncode, broken.stdout) == (1, "")
    assert broken.stderr.startswith("fastsae report: error: no run folder at")
    assert broken.stderr.count("\n") == 1


def test_bench_without_the_repository(monkeypatch, capsys):
    monkeypatch.setattr(commands, "__file__", "/usr/lib/python3/site-packages/fastsae/cli/commands.py")
    assert "in the source repository" in fails(capsys, ["bench"])


def test_bench_passes_its_arguments_on(monkeypatch):
    called = {}

    def note(command, **keywords):
        called.update(command=command, **keywords)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(commands.subprocess, "run", note)
    assert main(["bench", "--quick", "--help"]) == 3
    assert called["command"][1:] == ["-m", "bench", "--quick", "--help"]
    assert (called["cwd"] / "bench" / "__main__.py").is_file()
