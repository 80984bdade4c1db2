"""Text by spec: files, folders, patterns, JSON lines, gzip, HTML, packages, documentation folders; bad files named."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fastsae.data import StreamConfig, TextCorpus, TokenCorpus, load_text
from fastsae.data.stream import SplitText
from fastsae.data.text import Streamed
from tests import text_case


class Letters:
    """A tokenizer: one id for each character."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool = True, **more: bool) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": ids, "special_tokens_mask": [0] * len(ids)}


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
        (
            "bad.jsonl",
            b'{"txt": "a", "n": 1}\n',
            r"expected a text in the field 'text', got .* the fields txt, n; name",
        ),
        ("bad.jsonl", b'["text"]\n', r"expected an object with a text in the field 'text', got '\[\"text\"\]'"),
        ("bad.jsonl", b'{"text": 7}\n', r"expected a text in the field 'text', or messages .*, got '7'"),
        ("bad.jsonl", b'{"text": [{"role": "user"}]}\n', r"messages that have texts as 'role' and 'content', got"),
        ("bad.txt.gz", b"no gzip", r"bad\.txt\.gz is not a complete gzip file"),
        ("bad.txt.gz", gzip.compress(b"some text" * 99, mtime=0)[:-12], r"bad\.txt\.gz is not a complete gzip file"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(str(tmp_path)).tokens(0, Letters())


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no text: '.*nothing\.txt' matches no file"):
        load_text(str(tmp_path / "nothing.txt"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"the 1 files of .* are empty"):
        load_text(str(tmp_path))
    with pytest.raises(ValueError, match="install the package with: apt-get install no-such-package"):
        load_text("debian:no-such-package")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", " ", ""])
def test_any_line_ends_and_none(tmp_path: Path, end: str) -> None:
    """A file of 340 kB, however its lines end, is many pieces, and its text is the one with line feeds."""
    words = [f"wörter{i}" for i in range(30_000)]
    (tmp_path / "a.txt").write_bytes(end.join(words).encode())
    corpus = load_text(str(tmp_path / "a.txt"))
    assert whole(corpus) == (end if end in (" ", "") else "\n").join(words)
    sizes = [len("".join(corpus.documents(i)).encode()) for i in range(len(corpus))]
    assert len(corpus) > 50
    if end:
        last = " " if end == " " else "\n"
        assert all(corpus.documents(i)[0].endswith(last) for i in range(len(corpus) - 1))  # type: ignore[union-attr]
    assert max(sizes) < 4 * 4096
    assert min(sizes[:-1]) > 3000
    split = SplitText(corpus, Letters(), StreamConfig(hook=0, special_tokens="keep"))
    assert 0 < len(split.held_pieces) < len(corpus) / 2


def test_lines_that_end_as_ever_leave_the_pieces_and_the_digest_as_they_were(tmp_path: Path) -> None:
    """What a folder of before was harvested from is still the same text."""
    lines = [f"{i} " + "x" * (i % 9000) + "\n" for i in range(300)]
    (tmp_path / "a.txt").write_text("".join(lines))
    corpus = load_text(str(tmp_path / "a.txt"))
    ends, at, size = [], 0, sum(map(len, lines))
    while at < size:
        with open(tmp_path / "a.txt", "rb") as file:
            file.seek(min(at + 4095, size))
            file.readline()
            at = file.tell()
        ends.append(at)
    assert len(corpus) == len(ends)
    assert np.cumsum([len("".join(corpus.documents(i))) for i in range(len(corpus))]).tolist() == ends
    sizes = [["a.txt", ends[-1]]]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]
    about = {"spec": str(tmp_path / "a.txt"), "files": 1, "bytes": ends[-1], "digest": digest}
    assert corpus.describe() == about
    (tmp_path / "a.txt").write_bytes("".join(lines).replace("\n", " ").encode())  # the same size, cut elsewhere
    assert load_text(str(tmp_path / "a.txt")).describe()["digest"] != digest


def test_json_lines_are_cut_at_their_ends_alone(tmp_path: Path) -> None:
    """Other line ends may stand in a string; a line may be longer than any piece."""
    texts = [f"{i}\u2028\x85 " + "y" * (40_000 if i == 7 else i % 300) for i in range(900)]
    for end in ("\n", "\r\n", "\r"):
        lines = [json.dumps({"body": text}, ensure_ascii=False) for text in texts]
        (tmp_path / "a.jsonl").write_bytes(end.join(lines).encode())
        corpus = load_text(str(tmp_path / "a.jsonl"), field="body")
        assert [text for i in range(len(corpus)) for text in corpus.documents(i)] == texts
        assert len(corpus) > 20
    assert corpus.describe()["field"] == "body"
    (tmp_path / "a.jsonl").write_text('{"text": null}\n')
    assert load_text(str(tmp_path / "a.jsonl")).documents(0) == [""]


@pytest.mark.parametrize("packed", ["gz", "zst"])
def test_compressed_files_are_cut_as_plain_ones(tmp_path: Path, packed: str) -> None:
    lines = "".join(f"Zeile {i}: {'wörtlich ' * (i % 40)}\n" for i in range(3000))
    (tmp_path / "a.txt").write_text(lines)
    plain = load_text(str(tmp_path / "a.txt"))
    half = len(lines) // 2
    if packed == "gz":
        pack = gzip.compress
    else:
        pack = pytest.importorskip("zstandard", reason="zstandard is not installed").compress
    data = pack(lines[:half].encode()) + pack(lines[half:].encode())  # two members of one file
    path = tmp_path / f"b.txt.{packed}"
    path.write_bytes(data)
    corpus = load_text(str(path))
    assert whole(corpus) == lines == whole(plain)
    assert len(corpus) == len(plain)
    for kept in (len(data) - 3, len(data) // 4):
        path.write_bytes(data[:kept])
        with pytest.raises(ValueError, match=rf"b\.txt\.{packed} is not a complete"):
            load_text(str(path))
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=rf"b\.txt\.{packed} is not a"):
        load_text(str(path))


def test_small_compressed_files_and_pages_are_what_they_were(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("<p>one</p>")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"two\n"))
    sizes = [[path.name, path.stat().st_size] for path in sorted(tmp_path.iterdir())]
    digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]
    corpus = load_text(str(tmp_path))
    assert (len(corpus), corpus.describe()["digest"]) == (2, digest)
    pages = "".join(f"<p>This is   paragraph {i}.</p>" for i in range(9000))
    (tmp_path / "c.html").write_text(pages)
    corpus = load_text(str(tmp_path / "c.html"))
    assert len(corpus) > 30
    assert whole(corpus) == "\n".join(f"This is paragraph {i}." for i in range(9000))


def test_chats_are_written_by_the_template_of_the_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = text_case.words()
    chat = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    (tmp_path / "a.jsonl").write_bytes(text_case.as_lines("messages", [chat, chat[:1]]))
    corpus = load_text(str(tmp_path / "a.jsonl"), field="messages")
    expected = [[2, 5, 6, 1, 3, 7, 1], [2, 5, 6, 1]]
    assert [ids.tolist() for ids in corpus.token_documents(0, tokenizer)] == expected
    assert corpus.tokens(0, tokenizer).tolist() == [*expected[0], 1, *expected[1]]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"a\.jsonl: the chat template refuses .*: roles must alternate"):
        corpus.tokens(0, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="holds chats, but the tokenizer has no chat template"):
        corpus.tokens(0, tokenizer)
    with pytest.raises(ValueError, match="holds text, but the model has no tokenizer; give token ids"):
        corpus.tokens(0, None)


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [None if i == 3 else f"text {i} " + "z" * (i % 200) for i in range(1000)]
    chats = [[{"role": "user", "content": f"w{i}"}] for i in range(1000)]
    path = tmp_path / "sub" / "a.parquet"
    path.parent.mkdir()
    parquet.write_table(pyarrow.table({"body": texts, "messages": chats}), path, row_group_size=300)
    corpus = load_text(str(tmp_path), field="body")
    assert [text for i in range(len(corpus)) for text in corpus.documents(i)] == ["" if t is None else t for t in texts]
    assert 20 < len(corpus) < 60
    assert corpus.documents(5) == corpus.documents(5) != corpus.documents(6)
    corpus = load_text(str(path), field="messages")
    assert [chat for i in range(len(corpus)) for chat in corpus.documents(i)] == chats
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'text'; its columns are body, messages; name one"):
        load_text(str(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet is not a readable parquet file"):
        load_text(str(path))


def test_files_of_token_ids(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = text_case.words()
    stream = np.arange(10_000) % 30 + 1
    rows = stream.reshape(100, 100)
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(stream)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "row.npy", stream.astype(np.uint8))
    stream.astype("<u2").tofile(tmp_path / "narrow.bin")
    stream.astype("<u4").tofile(tmp_path / "wide.bin")
    (tmp_path / "llmc.bin").write_bytes(header.tobytes() + stream.astype("<u2").tobytes())
    for name, pieces, given in [
        ("rows.npy", 100, {}), ("row.npy", 3, {}), ("narrow.bin", 3, {}), ("wide.bin", 3, {"token_type": "uint32"}),
        ("llmc.bin", 3, {}), ("llmc.bin", 3, {"token_type": "uint32"}),
    ]:  # fmt: skip
        corpus = load_text(str(tmp_path / name), **given)
        assert len(corpus) == pieces, name
        parts = [corpus.tokens(i, tokenizer) for i in range(pieces)]
        assert all(part.dtype == np.int64 for part in parts)
        assert np.array_equal(np.concatenate(parts), stream), name
        documents = [part.tolist() for i in range(pieces) for part in corpus.token_documents(i, tokenizer)]
        # A row of the matrix is a document; in a row of tokens <end>, which is 1, lies between documents.
        expected = len(rows) if name == "rows.npy" else 334 + 2 * (4096 % 30 != 0)
        assert len(documents) == expected, name
        assert any(1 in document for document in documents) == (name == "rows.npy")
    with pytest.raises(ValueError, match="every second uint16 is 0, as in a file of uint32; set --token-type"):
        load_text(str(tmp_path / "wide.bin"))
    with pytest.raises(
        ValueError, match=r"holds the token id \d{6,}, but the tokenizer has ids 0 to 33: is it of another"
    ):
        load_text(str(tmp_path / "narrow.bin"), token_type="uint32").tokens(0, tokenizer)
    np.save(tmp_path / "bad.npy", np.zeros(9))
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "no.npy").write_bytes(b"abc")
    np.save(tmp_path / "minus.npy", np.array([3, -1]))
    for name, message in [
        ("bad.npy", r"expected integer ids \(tokens,\) or \(documents, tokens\), got float64 \(9,\)"),
        ("odd.bin", "3 bytes are not a whole number of uint16 ids"),
        ("no.npy", "cannot be read as token ids"),
        ("minus.npy", "holds the token id -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_text(str(tmp_path / name)).tokens(0, tokenizer)
    (tmp_path / "none.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="are empty"):
        load_text(str(tmp_path / "none.bin"))


def test_documents_of_any_lengths_in_memory() -> None:
    corpus = TokenCorpus([[5, 6], [7], [8, 9, 4]])
    assert [corpus.tokens(i, None).tolist() for i in range(3)] == [[5, 6], [7], [8, 9, 4]]
    assert corpus.describe()["digest"] != TokenCorpus([[5], [6, 7], [8, 9, 4]]).describe()["digest"]
    assert TokenCorpus(np.arange(6)).describe()["digest"] == TokenCorpus(list(range(6))).describe()["digest"]
    with pytest.raises(ValueError, match="token ids are 0 or more, got -1"):
        TokenCorpus([[1, 2], [-1, 3]])


@pytest.mark.parametrize(
    ("package", "name", "extra"),
    [("zstandard", "a.txt.zst", "text"), ("pyarrow", "a.parquet", "text"), ("datasets", "datasets:x", "datasets")],
)
def test_a_missing_package_is_one_line(
    package: str, name: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).touch()
    spec = name if package == "datasets" else str(tmp_path / name)
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'fastsae-engine\[{extra}\]'"):
        load_text(spec)


def test_data_sets_are_streamed_in_order(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    texts = text_case.texts()
    (tmp_path / "train.jsonl").write_bytes(text_case.as_lines("body", texts))
    corpus = load_text(f"datasets:{tmp_path}", field="body")
    assert isinstance(corpus, Streamed)
    assert [t for i in range(25) for t in corpus.documents(i)] == texts
    assert corpus.has(24)
    assert not corpus.has(25)
    again = load_text(f"datasets:{tmp_path}@train", field="body")
    assert again.documents(20) == corpus.documents(20)  # skips there
    assert again.documents(2) == corpus.documents(2)  # and back
    assert again.describe()["digest"] == corpus.describe()["digest"]
    assert corpus.describe()["field"] == "body"
    for spec, field, message in [
        (f"datasets:{tmp_path}", "text", r"rows 0 to 16: expected a text in the field 'text', .* the fields id, body"),
        (f"datasets:{tmp_path}@test", "body", "cannot stream .*@test"),
        ("datasets:", "body", "expected datasets:NAME"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_text(spec, field=field)
