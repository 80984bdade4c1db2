"""Data sets that the package `datasets` reads, from the hub or a folder, streamed: nothing is stored on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fastsae.data.documents import FIELD, Document, chosen, field_of, ids_of, joined
from fastsae.data.hub import why_unreachable

DOCUMENTS = 16
"""Documents in a piece."""
RECENT = 256
"""Pieces kept in memory, so that held-out text and the first batch are not read twice."""
MOST_PIECES = 1 << 40


class DatasetCorpus:
    """`datasets:NAME`, `datasets:NAME:CONFIG`, each also `@SPLIT` (train if left out): rows in the data set's order.

    The text, or the messages of a chat, are in `field`. Only what is read is downloaded. How many rows there are is not
    known: the first pieces are held out, and the order is not shuffled. To go to a saved position, the rows before it
    are skipped, which reads them again.
    Raises: ImportError without the package; ValueError for a data set that is not there or has no such field.
    """

    def __init__(self, spec: str, *, field: str = FIELD):
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"{spec} needs datasets: pip install 'fastsae-engine[datasets]'") from error
        self.spec = spec
        self.field = field
        place, _, split = spec.removeprefix("datasets:").partition("@")
        name, _, config = place.partition(":")
        if not name:
            raise ValueError(f"expected datasets:NAME, datasets:NAME:CONFIG or datasets:NAME@SPLIT, got {spec!r}")
        if not Path(name).exists() and (reason := why_unreachable()):
            raise ValueError(f"cannot stream {spec!r}: there is no such folder, and the hub does not answer ({reason})")
        try:
            self._rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        except (OSError, ValueError) as error:  # also datasets' own errors for names, configurations and splits
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(f"cannot stream {spec!r}: {reason}") from error
        self._iterator: tuple[int, Iterator[dict[str, Any]]] | None = None  # the piece that comes next
        self._recent: OrderedDict[int, list[Document]] = OrderedDict()
        if not self.has(0):
            raise ValueError(f"{spec!r} holds no rows")

    def __len__(self) -> int:
        """An upper bound on the number of pieces: see `has`."""
        return MOST_PIECES

    def has(self, piece: int) -> bool:
        return bool(self.documents(piece))

    def documents(self, piece: int) -> list[Document]:
        """The documents of one piece; empty after the end."""
        if piece in self._recent:
            self._recent.move_to_end(piece)
        else:
            self._recent[piece] = self._read(piece)
            if len(self._recent) > RECENT:
                self._recent.popitem(last=False)
        return self._recent[piece]

    def token_documents(self, piece: int, tokenizer: Any) -> list[np.ndarray]:
        return [ids_of(document, tokenizer, self.spec) for document in self.documents(piece)]

    def tokens(self, piece: int, tokenizer: Any) -> np.ndarray:
        return joined(self.token_documents(piece, tokenizer), tokenizer)

    def describe(self) -> dict[str, Any]:
        """The digest covers the first rows: later ones are not known before they are read."""
        digest = hashlib.sha256(json.dumps(self.documents(0)).encode()).hexdigest()[:16]
        return {"spec": self.spec, "digest": digest, **chosen(self.field)}

    def _read(self, piece: int) -> list[Document]:
        if self._iterator is None or self._iterator[0] != piece:
            self._iterator = (piece, iter(self._rows.skip(piece * DOCUMENTS)))
        rows = list(itertools.islice(self._iterator[1], DOCUMENTS))
        self._iterator = (piece + 1, self._iterator[1])
        where = f"{self.spec}, rows {piece * DOCUMENTS:,} to {piece * DOCUMENTS + len(rows):,}"
        return [field_of(row, self.field, where) for row in rows]
