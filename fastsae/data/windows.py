"""A corpus as an endless, resumable stream of full token windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsae.data.source import permutation
from fastsae.data.text import Corpus


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and after a text ([CLS] and [SEP], or BOS, or nothing)."""
    if tokenizer is None:
        return [], []
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise ValueError(f"cannot tell the tokenizer's special tokens: 'a' is {plain} without them and {whole} with them")


class WindowStream:
    """Windows of `window` tokens each: the tokens of all pieces in turn, with a separator after each piece.

    Every window begins and ends with the special tokens of the tokenizer. Pieces come in a random order, a new one
    each epoch, or in corpus order if `shuffle` is off. With `repeat` off the stream ends after one epoch and drops the
    last tokens if they do not fill a window.
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
    ):
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.pieces = pieces
        self.seed = seed
        self.shuffle = shuffle
        self.repeat = repeat
        self.prefix, self.suffix = special_tokens(tokenizer)
        self.content = window - len(self.prefix) - len(self.suffix)
        if self.content < 1:
            raise ValueError(f"a window of {window} tokens leaves no room for text between the special tokens")
        separator = None if tokenizer is None else tokenizer.eos_token_id
        self._separator = np.array([] if separator is None else [separator], dtype=np.int64)
        self.epoch = 0
        self._piece = 0  # place in the epoch's order
        self._offset = 0  # tokens of that piece already used
        self._order: tuple[int, list[int]] | None = None
        self._tokens: tuple[int, np.ndarray] | None = None

    def next(self, n: int) -> Tensor:
        """The next n windows (n, window) int64; fewer or none at the end of a stream that does not repeat."""
        wanted = n * self.content
        parts: list[np.ndarray] = []
        have = 0
        start_epoch = self.epoch
        while have < wanted:
            if self._piece == len(self.pieces):
                if not self.repeat:
                    break
                if self.epoch > start_epoch and have == 0:
                    raise ValueError("the text holds no token")
                self.epoch, self._piece, self._offset = self.epoch + 1, 0, 0
            tokens = self._current()
            part = tokens[self._offset : self._offset + wanted - have]
            parts.append(part)
            have += len(part)
            self._offset += len(part)
            if self._offset == len(tokens):
                self._piece, self._offset = self._piece + 1, 0
        flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        full = len(flat) // self.content
        body = torch.from_numpy(flat[: full * self.content].reshape(full, self.content))
        before = torch.tensor(self.prefix, dtype=torch.int64, device="cpu").expand(full, -1)
        after = torch.tensor(self.suffix, dtype=torch.int64, device="cpu").expand(full, -1)
        return torch.cat([before, body, after], dim=1)

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "piece": self._piece, "offset": self._offset}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if not 0 <= state["piece"] <= len(self.pieces):
            raise ValueError(f"the saved place is piece {state['piece']} of a text that has {len(self.pieces)} here")
        self.epoch, self._piece, self._offset = state["epoch"], state["piece"], state["offset"]

    def _current(self) -> np.ndarray:
        if self._order is None or self._order[0] != self.epoch:
            count = len(self.pieces)
            order = permutation(count, self.seed, self.epoch).tolist() if self.shuffle else list(range(count))
            self._order = (self.epoch, order)
        number = self.pieces[self._order[1][self._piece]]
        if self._tokens is None or self._tokens[0] != number:
            self._tokens = (number, np.concatenate([self.corpus.tokens(number, self.tokenizer), self._separator]))
        return self._tokens[1]
