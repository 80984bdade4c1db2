"""A corpus as an endless, resumable stream of token windows: documents packed into full ones, or each in its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastsae.data.padding import PAD
from fastsae.data.source import permutation
from fastsae.data.specials import special_tokens
from fastsae.data.text import ByDocument, Corpus, Streamed

Pack = Literal["windows", "documents"]


class WindowStream:
    """Windows of `window` tokens each; every one begins and ends with the tokenizer's special tokens.

    pack "windows": the tokens of all pieces in turn, with a separator after each piece; every window is full. With
    `repeat` off, the last tokens are dropped if they do not fill one.
    pack "documents": a window holds text of only one document. A longer document takes several windows; its last one
    is filled up with PAD, after the special tokens. Special tokens that a document already has are not repeated.
    Pieces come in a random order, a new one each epoch, or in corpus order if `shuffle` is off or the corpus is
    streamed. With `repeat` off the stream ends after one epoch.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Any,
        pieces: range,
        *,
        window: int,
        seed: int,
        shuffle: bool = True,
        repeat: bool = True,
        pack: Pack = "windows",
    ):
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.pieces = pieces
        self.seed = seed
        self.shuffle = shuffle and not isinstance(corpus, Streamed)
        self.repeat = repeat
        self.pack = pack
        self.window = window
        if pack == "documents" and not isinstance(corpus, ByDocument):
            raise ValueError(
                f"pack 'documents' needs a corpus with token_documents(piece, tokenizer), but {type(corpus).__name__} "
                "has none; pack into windows, or add it"
            )
        self.prefix, self.suffix = special_tokens(tokenizer)
        self.content = window - len(self.prefix) - len(self.suffix)
        if self.content < 1:
            raise ValueError(f"a window of {window} tokens leaves no room for text between the special tokens")
        separator = None if tokenizer is None else tokenizer.eos_token_id
        self._separator = np.array([] if separator is None else [separator], dtype=np.int64)
        self.epoch = 0
        self._piece = 0  # place in the epoch's order
        self._offset = 0  # tokens of that piece already used, or its windows where documents are kept apart
        self._order: tuple[int, list[int]] | None = None
        self._read: tuple[int, np.ndarray] | None = None

    def next(self, n: int) -> Tensor:
        """The next n windows (n, window) int64; fewer or none at the end of a stream that does not repeat."""
        wanted = n * (self.content if self.pack == "windows" else 1)
        parts: list[np.ndarray] = []
        have = 0
        start_epoch = self.epoch
        while have < wanted:
            if self._at_end():
                if not self.repeat:
                    break
                if self.epoch > start_epoch and have == 0:
                    raise ValueError("the text holds no token")
                self.epoch, self._piece, self._offset = self.epoch + 1, 0, 0
                continue
            found = self._current()
            part = found[self._offset : self._offset + wanted - have]
            parts.append(part)
            have += len(part)
            self._offset += len(part)
            if self._offset == len(found):
                self._piece, self._offset = self._piece + 1, 0
        if self.pack == "documents":
            return torch.from_numpy(np.concatenate([np.zeros((0, self.window), dtype=np.int64), *parts]))
        flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        full = len(flat) // self.content
        body = torch.from_numpy(flat[: full * self.content].reshape(full, self.content))
        before = torch.tensor(self.prefix, dtype=torch.int64, device="cpu").expand(full, -1)
        after = torch.tensor(self.suffix, dtype=torch.int64, device="cpu").expand(full, -1)
        return torch.cat([before, body, after], dim=1)

    def of_piece(self, piece: int) -> Tensor:
        """The windows (n, window) int64 of one piece of the corpus, documents kept apart."""
        documents = self.corpus.token_documents(piece, self.tokenizer) if isinstance(self.corpus, ByDocument) else []
        return torch.from_numpy(np.concatenate([self._apart(ids) for ids in (np.zeros(0, np.int64), *documents)]))

    def where(self) -> str:
        """The place in the text from which `next` reads on, in words."""
        at_end = self._at_end()
        number = "the start" if at_end else f"piece {self.pieces[self._place()]:,}"
        unit = "token" if self.pack == "windows" else "window"
        return f"{number}, {unit} {0 if at_end else self._offset:,}, epoch {self.epoch + at_end:,}"

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "piece": self._piece, "offset": self._offset}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if not 0 <= state["piece"] <= len(self.pieces):
            raise ValueError(f"the saved place is piece {state['piece']}, but the text has {len(self.pieces)} pieces")
        self.epoch, self._piece, self._offset = state["epoch"], state["piece"], state["offset"]

    def _at_end(self) -> bool:
        """Whether the epoch has no further piece."""
        if self._piece == len(self.pieces):
            return True
        return isinstance(self.corpus, Streamed) and not self.corpus.has(self.pieces[self._piece])

    def _current(self) -> np.ndarray:
        """The current piece: tokens (n,), or windows (n, window) if documents are kept apart."""
        number = self.pieces[self._place()]
        if self._read is None or self._read[0] != number:
            if self.pack == "documents":
                found = self.of_piece(number).numpy()
            else:
                found = np.concatenate([self.corpus.tokens(number, self.tokenizer), self._separator])
            self._read = (number, found)
        return self._read[1]

    def _place(self) -> int:
        """The current piece's place in `pieces`."""
        if not self.shuffle:
            return self._piece
        if self._order is None or self._order[0] != self.epoch:
            self._order = (self.epoch, permutation(len(self.pieces), self.seed, self.epoch).tolist())
        return self._order[1][self._piece]

    def _apart(self, ids: np.ndarray) -> np.ndarray:
        """The windows (n, window) int64 of one document; none of an empty one."""
        before, after = np.array(self.prefix, np.int64), np.array(self.suffix, np.int64)
        if len(before) and np.array_equal(ids[: len(before)], before):
            ids = ids[len(before) :]
        if len(after) and np.array_equal(ids[-len(after) :], after):
            ids = ids[: -len(after)]
        windows = np.full((-(-len(ids) // self.content), self.window), PAD, dtype=np.int64)
        for row, start in zip(windows, range(0, len(ids), self.content), strict=True):
            whole = np.concatenate([before, ids[start : start + self.content], after])
            row[: len(whole)] = whole
        return windows
