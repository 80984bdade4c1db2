"""Files of text, plain or compressed, cut into pieces that can be read in any order; their documents as strings."""

from __future__ import annotations

import gzip
import html.parser
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Protocol

from fastsae.data.documents import Document, field_of

PLAIN = (".txt", ".md", ".rst", ".html", ".htm", ".jsonl")
PACKED = (".gz", ".zst")
# A line that ends this many pieces after the place where a piece should end is cut, and so is a page of that size.
REACH = 3
CHUNK = 1 << 20
BLOCK = 1 << 13


class FileOfText(Protocol):
    """One file, cut into pieces."""

    path: Path

    def __len__(self) -> int:
        """Number of pieces."""

    def documents(self, piece: int) -> list[Document]:
        """The documents in one piece. Raises ValueError, naming the file and the place, if it is damaged."""


class Spool:
    """Unpacked files, concatenated in an unnamed file of the temporary folder, which is deleted with this object."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="fastsae-text-")  # noqa: SIM115
        self.size = 0

    def add(self, chunks: Iterator[bytes]) -> tuple[int, int]:
        """(start, end) of these bytes. Raises as the chunks do, and OSError for a full disk."""
        start = self.size
        for chunk in chunks:
            self._file.write(chunk)
            self.size += len(chunk)
        self._file.flush()
        return start, self.size

    def fileno(self) -> int:
        return self._file.fileno()


class PlainFile:
    """A text file, JSON lines or a web page, UTF-8, each also compressed (.gz, .zst).

    step: bytes of a piece, approximately. A piece ends at a line's end. JSON lines are never cut. Other text is cut
    inside a line (at a carriage return, a space, or between two characters) if no line ends within REACH more pieces. A
    web page is one piece, unless it is REACH pieces long: then its text is cut. `as_ever` is False if a piece ends
    anywhere but at a line feed or at the end of a file on disk.
    """

    def __init__(self, path: Path, *, field: str, step: int, spool: Spool):
        self.path = path
        self.field = field
        self._kind, packed = kind_of(path)
        self._spool = None if packed is None else spool
        self._start, self._size = 0, path.stat().st_size
        if packed is not None:
            self._start, end = spool.add(_unpacked(path, packed))
            self._size = end - self._start
        self.as_ever = True
        if self._kind in (".html", ".htm"):
            if self._size > REACH * step:
                text = _html_text(self._decoded(0, self._size)).encode()
                self._spool = spool
                self._start, end = spool.add(iter([text]))
                self._size, self._kind, self.as_ever = end - self._start, ".txt", False
            else:
                self._ends = [self._size] if self._size else []
                return
        self._ends = self._cut(step)
        self.as_ever &= packed is None or len(self._ends) < 2

    def __len__(self) -> int:
        return len(self._ends)

    def documents(self, piece: int) -> list[Document]:
        start = self._ends[piece - 1] if piece else 0
        text = self._decoded(start, self._ends[piece])
        if self._kind == ".jsonl":
            lines = re.split(r"\r\n|\n|\r", text)  # not splitlines: JSON strings may hold its other line ends
            where = f"{self.path} after byte {start:,}"
            return [_json_document(line, self.field, where) for line in lines if line.strip()]
        return [_html_text(text) if self._kind in (".html", ".htm") else text]

    def _read(self, start: int, end: int) -> bytes:
        """Bytes [start, end) of the unpacked file."""
        if self._spool is not None:  # pread, because a thread that prefetches may read at the same time
            return os.pread(self._spool.fileno(), end - start, self._start + start)
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)

    def _decoded(self, start: int, end: int) -> str:
        try:
            text = self._read(start, end).decode().removeprefix("\ufeff").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path} is not UTF-8 at byte {start + error.start:,}; convert it") from error
        # A lone carriage return ends a line only in a text without line feeds.
        return text if "\n" in text else text.replace("\r", "\n")

    def _cut(self, step: int) -> list[int]:
        """The end of every piece."""
        ends, start = [], 0
        while start < self._size:
            start = min(self._size, self._line_end(start + step - 1, step))
            ends.append(start)
        return ends

    def _line_end(self, start: int, step: int) -> int:
        """The end of the line that byte `start` lies in, or of the part of a long line."""
        # In JSON lines every raw line end is a real one: inside a string it would be escaped.
        line_end = re.compile(rb"\n|\r(?!\n)" if self._kind == ".jsonl" else rb"\n")
        limit = self._size if self._kind == ".jsonl" else min(start + REACH * step, self._size)
        for at in range(start, limit, BLOCK):
            if found := line_end.search(self._read(at, min(at + BLOCK, limit))):
                return at + found.end()
        if limit == self._size:
            return limit
        self.as_ever = False
        ahead = self._read(start, limit)
        for end in (b"\r", b" "):
            if (place := ahead.find(end)) >= 0:
                return start + place + 1
        place = next((i for i in range(1, len(ahead)) if ahead[i] & 0xC0 != 0x80), 1)  # where a character begins
        return start + place


def kind_of(path: Path) -> tuple[str, str | None]:
    """(".jsonl", ".gz") of "a.jsonl.gz": what a file holds, and how it is compressed (None: not)."""
    packed = path.suffix if path.suffix in PACKED else None
    return (Path(path.stem).suffix if packed else path.suffix), packed


def _unpacked(path: Path, packed: str) -> Iterator[bytes]:
    """The bytes of a compressed file. Raises ValueError if it is damaged or ends early."""
    return _from_gzip(path) if packed == ".gz" else _from_zstandard(path)


def _from_gzip(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file ({error})") from error


def _from_zstandard(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(f"reading {path} needs zstandard: pip install 'fastsae-engine[text]'") from error
    # The largest window that a frame may ask for: large corpora are packed with it.
    maker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, given = None, b""
    try:
        with open(path, "rb") as file:
            while given or (given := file.read(CHUNK)):
                frame = frame or maker.decompressobj()
                yield frame.decompress(given)
                given, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise ValueError(f"{path} is not a zstandard file ({error})") from error
    if frame is not None:
        raise ValueError(f"{path} is not a complete zstandard file: it ends inside a frame")


def _json_document(line: str, field: str, where: str) -> Document:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON lines: {error} in {line[:60]!r}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected an object with a text in the field {field!r}, got {line[:60]!r}")
    return field_of(content, field, where)


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
