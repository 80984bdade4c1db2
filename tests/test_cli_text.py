"""Texts of other kinds on the command line: harvested, trained on live, measured on, and what is said of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from fastsae.cli.main import main
from fastsae.data import Manifest
from tests import text_case

pytest.importorskip("transformers", reason="transformers is not installed")

SIZES = ["--d-sae", "48", "--k", "4", "--batch-size", "100", "--steps", "6", "--no-progress", "--no-tensorboard"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    text_case.write_model(folder / "model")
    (folder / "chats.jsonl").write_bytes(text_case.as_lines("messages", text_case.chats(600)))
    np.concatenate(text_case.ids(900)).astype("<u4").tofile(folder / "ids.bin")
    return folder


def options(place: Path, text: str, *more: str, prefix: str = "") -> list[str]:
    given = ["--model", str(place / "model"), "--text", str(place / text), "--hook", "1", "--window", "24"]
    given += ["--holdout", "200", "--model-dtype", "float32", *more]
    return [f"--{prefix}{one[2:]}" if one.startswith("--") else one for one in given]


@pytest.mark.parametrize("pack", ["windows", "documents"])
@pytest.mark.parametrize(
    ("text", "given"), [("chats.jsonl", ["--text-field", "messages"]), ("ids.bin", ["--token-type", "uint32"])]
)
def test_from_text_to_report(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, given: list[str], pack: str
) -> None:
    """The run remembers how its text was read, so that its held-out part is found again."""
    acts, run = str(tmp_path / "acts"), str(tmp_path / "run")
    harvest = ["harvest", acts, *options(place, text, *given, "--pack", pack), "--rows", "1000", "--no-progress"]
    assert main(harvest) == 0
    shown, manifest = capsys.readouterr().out, Manifest.read(Path(acts))
    dropped = manifest.stats["rows_dropped_special"]
    # Where documents are apart, nothing ends a text but a document's own tokens.
    assert (dropped > 0) == (pack == "windows" or text == "chats.jsonl")
    assert (manifest.stats["padding"] > 0) == (pack == "documents")
    assert re.search(rf"^rows dropped special +{dropped:,}$", shown, re.M)
    if text == "chats.jsonl":
        # A chat of its own begins with <|user|>: that is the first position, which is dropped as such.
        names = ["<end>", *(["<|user|>"] if pack == "windows" else []), "<|assistant|>"]
        counts = manifest.stats["dropped_tokens"]
        assert sorted(counts) == sorted(names)
        listed = ", ".join(f"{number:,} {name}" for name, number in counts.items())
        assert re.search(rf"^dropped tokens +{re.escape(listed)}$", shown, re.M)
    assert main(["train", acts, "--run-dir", run, *SIZES]) == 0
    assert main(["eval", run, "--spliced", "--no-progress"]) == 0
    record = json.loads((tmp_path / "run" / "evaluation_spliced.json").read_text())
    assert "the tokens <end>, <|user|>, <|assistant|>" in record["spliced"]["special"]
    assert "as in training" in capsys.readouterr().out
    assert record["spliced"]["text"]["digest"] == manifest.settings["text"]["digest"]
    assert record["n_tokens"] == pytest.approx(200, rel=0.4)
    assert main(["report", run, "--sample", "2", "--passages", "1", "--no-time-step"]) == 0
    assert "#-1" not in (tmp_path / "run" / "report.html").read_text()

    live = str(tmp_path / "live")
    more = options(place, text, *given, "--pack", pack, "--buffer-rows", "600", prefix="live.")
    assert main(["train", "live", "--run-dir", live, *SIZES, *more]) == 0
    assert main(["eval", live, "--no-progress"]) == 0
    assert main(["eval", live, "--spliced", "--no-progress"]) == 0
    live_record = json.loads((tmp_path / "live" / "evaluation_spliced.json").read_text())
    assert live_record["spliced"]["n_windows"] == record["spliced"]["n_windows"]
    assert live_record["spliced"]["ce_untouched"] == pytest.approx(record["spliced"]["ce_untouched"], rel=1e-5)

    other = ["--text", str(place / "ids.bin"), "--token-type", "uint32", "--tokens", "100"]
    assert main(["eval", run, *other, "--no-progress"]) == 0


def test_what_is_wrong_with_a_text_is_one_line_and_early(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def loaded(*given: object, **more: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("fastsae.data.stream.load_model", loaded)
    for text, more, message in [
        (
            "chats.jsonl",
            [],
            "expected a text in the field 'text', got an object with the fields id, messages; name one",
        ),
        ("chats.jsonl", ["--text-field", "messages", "--holdout", "999999"], "the text is too short: 999,999 held-out"),
        ("ids.bin", [], "every second uint16 is 0, as in a file of uint32; set --token-type uint32"),
        ("ids.bin", ["--token-type", "uint32", "--drop-tokens", "<none>"], "the tokenizer has no token '<none>'"),
        ("none.txt", [], "matches no file"),
    ]:
        for command, prefix in ((["harvest", str(tmp_path / "x")], ""), (["train", "live", "--d-sae", "9"], "live.")):
            given = options(place, text, *more, prefix=prefix)
            assert main([*command, *given, *(["--run-dir", str(tmp_path / "r"), "--k", "2"] if prefix else [])]) == 1
            lines = capsys.readouterr().err.strip().splitlines()
            assert message in lines[-1]
            assert "error: " in lines[-1]


def test_few_held_out_rows_of_short_documents_are_measured(place: Path, tmp_path: Path) -> None:
    """Tokens of whole windows were asked for, more than the held-out documents have."""
    (tmp_path / "short.jsonl").write_bytes(text_case.as_lines("text", ["w1 w2 w3 w4"] * 3000))
    text = ["--model", str(place / "model"), "--text", str(tmp_path / "short.jsonl"), "--hook", "1"]
    few = ["--window", "48", "--holdout", "8", "--pack", "documents", "--model-dtype", "float32", "--no-progress"]
    assert main(["harvest", str(tmp_path / "acts"), *text, *few, "--rows", "600"]) == 0
    assert main(["train", str(tmp_path / "acts"), "--run-dir", str(tmp_path / "run"), *SIZES]) == 0
    assert main(["eval", str(tmp_path / "run"), "--spliced", "--no-progress"]) == 0
