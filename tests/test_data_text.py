"""Text by spec: files, folders, patterns, JSON lines, gzip, HTML, packages, documentation folders; bad files named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from fastsae.data import TextCorpus, load_text


class Letters:
    """A tokenizer: one id for each character."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def whole(corpus: TextCorpus) -> str:
    return "".join(document for i in range(len(corpus)) for document in corpus.documents(i))


def test_files_are_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = [f"Zeile {i}: {'wörtlich ' * (i % 40)}\n" for i in range(3000)]
    (tmp_path / "b.txt").write_text("".join(lines))
    (tmp_path / "a.txt").write_text("ohne Zeilenende")
    (tmp_path / "empty.txt").write_text("")
    corpus = load_text(str(tmp_path))
    assert whole(corpus) == "ohne Zeilenende" + "".join(lines)
    assert len(corpus) > 50
    pieces = ["".join(corpus.documents(i)) for i in range(1, len(corpus))]
    assert all(piece.endswith("\n") and 4000 < len(piece.encode()) < 6000 for piece in pieces[:-1])
    tokens = corpus.tokens(3, Letters())
    assert tokens.dtype == np.int64
    assert "".join(map(chr, tokens)) == pieces[2]
    described = corpus.describe()
    assert described["files"] == 3
    assert described["bytes"] == len(whole(corpus).encode())
    (tmp_path / "a.txt").write_text("anderes")
    assert load_text(str(tmp_path)).describe()["digest"] != described["digest"]


def test_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "1.txt").write_bytes("\ufeffone\r\ntwo\n".encode())
    (tmp_path / "2.txt.gz").write_bytes(gzip.compress(b"three\n"))
    page = "<html><style>x{}</style><title>T</title><body><p>four  &amp;\n five<script>no()</script></p></body>"
    (tmp_path / "3.html").write_text(page)
    (tmp_path / "4.jsonl").write_text("".join(json.dumps({"text": text}) + "\n\n" for text in ("six", "se\nven", "")))
    (tmp_path / "sub" / "5.md").write_text("eight")
    (tmp_path / "6.py").write_text("not text")
    corpus = load_text(str(tmp_path))
    assert [corpus.documents(i) for i in range(len(corpus))] == [
        ["one\ntwo\n"], ["three\n"], ["T\nfour &\nfive"], ["six", "se\nven", ""], ["eight"]
    ]  # fmt: skip
    # The end-of-text token joins the documents of a piece.
    assert corpus.tokens(3, Letters()).tolist() == [*map(ord, "six"), 0, *map(ord, "se\nven"), 0]
    only = load_text(str(tmp_path / "**" / "*.md"))
    assert whole(only) == "eight"
    assert whole(load_text(str(tmp_path / "1.txt"))) == "one\ntwo\n"
    (tmp_path / "4.jsonl").write_text('{"body": "nine"}\n')
    assert whole(load_text(str(tmp_path / "4.jsonl"), field="body")) == "nine"


def test_text_inside_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier_of_text"
    (package / "texts").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "texts" / "x_gut.txt").write_text("hamlet")
    (package / "texts" / "x_gut_f.txt").write_text("folio")
    monkeypatch.syspath_prepend(tmp_path)
    assert whole(load_text("package:carrier_of_text/texts/*_gut.txt")) == "hamlet"
    assert whole(load_text("package:carrier_of_text")) == "hamletfolio"
    with pytest.raises(ValueError, match="'no_such' is not installed; install the distribution that holds it"):
        load_text("package:no_such/x")
    with pytest.raises(ValueError, match=r"'package:carrier_of_text/nothing\*' matches no file"):
        load_text("package:carrier_of_text/nothing*")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.txt", b"fine\n" * 10 + b"caf\xe9\n", r"bad\.txt is not UTF-8 at byte 53; convert it"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', r"bad\.jsonl after byte 0 is not JSON lines: .*'\{\"text\": '"),
        ("bad.jsonl", b'{"txt": "a"}\n', r"expected an object with a string in 'text', got '\{\"txt\": \"a\"\}'"),
        ("bad.jsonl", b'["text"]\n', r"expected an object with a string in 'text'"),
        ("bad.txt.gz", b"no gzip", r"bad\.txt\.gz is not a complete gzip file"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    corpus = load_text(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        corpus.tokens(0, Letters())


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no text: '.*nothing\.txt' matches no file"):
        load_text(str(tmp_path / "nothing.txt"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"the 1 files of .* are empty"):
        load_text(str(tmp_path))
    with pytest.raises(ValueError, match="install the package with: apt-get install no-such-package"):
        load_text("debian:no-such-package")
