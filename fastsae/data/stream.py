"""From text to rows of activations, batch by batch; the live source and the harvest both use it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.data.filters import NonFinite, RowFilter, Rows
from fastsae.data.hooks import HookedModel
from fastsae.data.models import LanguageModel
from fastsae.data.source import check_seed
from fastsae.data.text import Corpus
from fastsae.data.windows import WindowStream

log = logging.getLogger(__name__)

MARGIN = 1.25  # reserve this multiple of the text that the held-out rows need if no row is dropped


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How text becomes rows."""

    hook: int | str
    """Where the activations are taken: a number L for the residual stream after L layers (0: the embeddings), or a
    module's name for its output ("model.layers.14"), or with ":input" for its input."""
    window: int = 256
    """Tokens in one window of text."""
    windows_per_batch: int = 16
    """Windows in one forward pass."""
    drop_first: bool = True
    """Drop the first position of every window, an attention sink with an enormous norm in most models."""
    norm_factor: float | None = 5.0
    """Drop rows whose norm is above this multiple of the median norm; None keeps them."""
    nonfinite: NonFinite = "raise"
    """Rows with NaN or inf: stop with an error, or drop and count them."""
    holdout: int = 4096
    """Rows held out for evaluation, from separate text at the end of the corpus."""
    shuffle_text: bool = True
    """Read the pieces of the corpus (4 to 64 kB each) in a random order."""
    seed: int = 0
    """Seed of the order of the text."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name, least in (("window", 2), ("windows_per_batch", 1), ("holdout", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.norm_factor is not None and self.norm_factor <= 1:
            raise ValueError(f"norm_factor multiplies the median norm and must be above 1, got {self.norm_factor}")
        if self.nonfinite not in ("raise", "drop"):
            raise ValueError(f"nonfinite must be 'raise' or 'drop', got {self.nonfinite!r}")


class ActivationStream:
    """The rows of a corpus at one hook of a model, in the order of the text; a position is a few numbers.

    The stream skips the last pieces of the corpus, as many as the held-out rows need.
    Deterministic: the same model, text, settings, thread count and machine give bit-identical rows.
    """

    def __init__(self, language_model: LanguageModel, corpus: Corpus, config: StreamConfig, *, repeat: bool = True):
        self.config = config
        self.corpus = corpus
        self.tokenizer = language_model.tokenizer
        self.hooked = HookedModel(language_model.model, config.hook)
        longest = getattr(getattr(language_model.model, "config", None), "max_position_embeddings", None)
        if longest is not None and config.window > longest:
            raise ValueError(f"window is {config.window} tokens, the model takes at most {longest}")
        self.n_train = self._split()
        self._windows = self._open(range(self.n_train), repeat)
        self.filter = RowFilter(
            self.hooked.name,
            n_prefix=len(self._windows.prefix),
            n_suffix=len(self._windows.suffix),
            drop_first=config.drop_first,
            norm_factor=config.norm_factor,
            nonfinite=config.nonfinite,
        )
        self.rows_per_window = self._rows_per_window(self._windows)
        self.d_in = self._calibrate()

    @property
    def stats(self) -> dict[str, Any]:
        return {**self.filter.stats, "epoch": self._windows.epoch}

    def next(self) -> Rows | None:
        """The rows of the next batch of windows, or None at the end of a stream that does not repeat."""
        token_ids = self._windows.next(self.config.windows_per_batch)
        return self._rows(self.filter, token_ids) if len(token_ids) else None

    def held_out(self) -> Rows:
        """The first `holdout` rows of the held-out text, through the same filter; fewer if it drops very many."""
        held_filter = self.filter.twin()  # separate counts: these rows are not part of the stream
        stream = self._open(range(self.n_train, len(self.corpus)), repeat=False)
        parts, have = [], 0
        while have < self.config.holdout:
            token_ids = stream.next(self.config.windows_per_batch)
            if not len(token_ids):
                log.warning("only %d of %d held-out rows pass the filter", have, self.config.holdout)
                break
            parts.append(self._rows(held_filter, token_ids))
            have += len(parts[-1])
        return join_rows(parts, self.d_in, self.config.window, self.config.holdout)

    def held_out_windows(self, tokens: int) -> Tensor:
        """The first windows (n, window) int64 of the held-out text with at least `tokens` tokens.

        Raises ValueError if the held-out text has fewer.
        """
        stream = self._open(range(self.n_train, len(self.corpus)), repeat=False)
        found = stream.next(math.ceil(tokens / self.config.window))
        if found.numel() < tokens:
            raise ValueError(
                f"the text is too short: its held-out part has {found.numel():,} tokens in windows of "
                f"{self.config.window}, {tokens:,} were asked for; ask for fewer, or give another text"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the place in the text, the median norm and the counts."""
        return {
            "pieces": self.n_train,
            "text": self._windows.state_dict(),
            "median": self.filter.median,
            "counts": dict(self.filter.counts),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        here, saved = self.filter.median or 0.0, float(state["median"])
        # Not to the last bit: other machines round differently. The saved median is used, so the limit does not change.
        if state["pieces"] != self.n_train or not math.isclose(here, saved, rel_tol=0.01):
            raise ValueError(
                f"the saved position is from a text of {state['pieces']} pieces with a median norm of {saved}, "
                f"but here they are {self.n_train} and {here}: resume with the same model and text"
            )
        self._windows.load_state_dict(state["text"])
        self.filter.median = saved
        self.filter.counts = dict(state["counts"])

    def _rows(self, row_filter: RowFilter, token_ids: Tensor) -> Rows:
        return row_filter(self.hooked(token_ids), token_ids)

    def _open(self, pieces: range, repeat: bool) -> WindowStream:
        return WindowStream(
            self.corpus,
            self.tokenizer,
            pieces,
            window=self.config.window,
            seed=self.config.seed,
            shuffle=self.config.shuffle_text,
            repeat=repeat,
        )

    def _rows_per_window(self, windows: WindowStream) -> int:
        rows = windows.content - int(self.config.drop_first and not windows.prefix)
        if rows < 1:
            raise ValueError(f"a window of {self.config.window} tokens leaves no row beside the dropped positions")
        return rows

    def _split(self) -> int:
        """The number of training pieces: those before the ones that the held-out rows need."""
        probe = self._open(range(1), repeat=False)
        needed = math.ceil(MARGIN * math.ceil(self.config.holdout / self._rows_per_window(probe))) * probe.content
        have, first = 0, len(self.corpus)
        while have < needed and first > 0:
            first -= 1
            have += len(self.corpus.tokens(first, self.tokenizer))
        if have < needed or first < len(self.corpus) / 2:
            raise ValueError(
                f"the text is too short: {self.config.holdout:,} held-out rows take {len(self.corpus) - first} of its "
                f"{len(self.corpus)} pieces; give more text or a smaller holdout"
            )
        return first

    def _calibrate(self) -> int:
        """Fix the median norm from the first batch of the text; returns the width of a row."""
        token_ids = self._open(range(self.n_train), repeat=False).next(self.config.windows_per_batch)
        if not len(token_ids):
            raise ValueError(f"the text does not fill one window of {self.config.window} tokens; give more text")
        activations = self.hooked(token_ids)
        self.filter.calibrate(activations, token_ids)
        return activations.shape[2]


def join_rows(parts: Sequence[Rows], d_in: int, window: int, most: int | None = None) -> Rows:
    """Several batches as one, with windows renumbered; at most the first `most` rows."""
    if not parts:
        nothing = torch.zeros(0, dtype=torch.int64, device="cpu")
        rows = torch.zeros(0, d_in, dtype=torch.float32, device="cpu")
        return Rows(rows, nothing.reshape(0, window), nothing, nothing)
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + len(part.token_ids))
    numbered = [part.window + start for part, start in zip(parts, starts, strict=False)]
    return Rows(
        torch.cat([part.activations for part in parts])[:most],
        torch.cat([part.token_ids for part in parts]),
        torch.cat(numbered)[:most],
        torch.cat([part.position for part in parts])[:most],
    )
