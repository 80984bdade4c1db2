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
from fastsae.data.hooks import Hook, HookedModel, Hooks, hooks_of
from fastsae.data.models import LanguageModel
from fastsae.data.source import check_seed
from fastsae.data.text import Corpus
from fastsae.data.windows import WindowStream

log = logging.getLogger(__name__)

MARGIN = 1.25  # reserve this multiple of the text that the held-out rows need if no row is dropped


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How text becomes rows."""

    hook: Hooks
    """Where the activations are taken: a number L for the residual stream after L layers (0: the embeddings), mlp.L or
    attn.L, or a module's name for its output ("model.layers.14"), or with ":input" for its input. Several are read in
    one pass; a token is left out at all of them if its norm is too large at any."""
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
        hooks = hooks_of(self.hook)
        # One hook is stored as it always was; several come back from JSON as a list.
        object.__setattr__(self, "hook", hooks[0] if len(hooks) == 1 else hooks)
        check_seed(self.seed)
        for name, least in (("window", 2), ("windows_per_batch", 1), ("holdout", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.norm_factor is not None and self.norm_factor <= 1:
            raise ValueError(f"norm_factor multiplies the median norm and must be above 1, got {self.norm_factor}")
        if self.nonfinite not in ("raise", "drop"):
            raise ValueError(f"nonfinite must be 'raise' or 'drop', got {self.nonfinite!r}")

    @property
    def hooks(self) -> tuple[Hook, ...]:
        """`hook` as a tuple."""
        return hooks_of(self.hook)

    @property
    def one_hook(self) -> Hook:
        """`hook`, where it is one. Raises ValueError for several."""
        if isinstance(self.hook, tuple):
            raise ValueError(f"expected one hook, got {', '.join(map(str, self.hook))}")
        return self.hook


class ActivationStream:
    """The rows of a corpus at the hooks of a model, in the order of the text; a position is a few numbers.

    Rows (n, d_in) have the activations of all hooks side by side, `widths` of them each, from one pass. Each hook has a
    filter of its own, and a token gives a row if it passes all of them: the input of an MLP is normalized and shows
    nothing of the huge norms of its output.
    The stream skips the last pieces of the corpus, as many as the held-out rows need.
    Deterministic: the same model, text, settings, thread count and machine give bit-identical rows.
    calibrate: False leaves out the pass over the first batch; nothing can be read then. See `check_stream`.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        corpus: Corpus,
        config: StreamConfig,
        *,
        repeat: bool = True,
        calibrate: bool = True,
    ):
        self.config = config
        self.corpus = corpus
        self.tokenizer = language_model.tokenizer
        self.hooked = HookedModel(language_model.model, config.hook)
        longest = _longest(language_model)
        if longest is not None and config.window > longest:
            raise ValueError(f"window is {config.window} tokens, the model takes at most {longest}")
        self.n_train = self._split()
        self._windows = self._open(range(self.n_train), repeat)
        self.filters = [
            RowFilter(
                name,
                n_prefix=len(self._windows.prefix),
                n_suffix=len(self._windows.suffix),
                drop_first=config.drop_first,
                norm_factor=config.norm_factor,
                nonfinite=config.nonfinite,
            )
            for name in self.hooked.names
        ]
        self._common = 0  # rows that passed all filters
        self.rows_per_window = self._rows_per_window(self._windows)
        if calibrate:
            if note := self.hooked.note():
                log.info("%s", note)
            self.widths = self._calibrate()
            self.d_in = sum(self.widths)

    @property
    def filter(self) -> RowFilter:
        """That of the first hook."""
        return self.filters[0]

    @property
    def stats(self) -> dict[str, Any]:
        """Counts so far, JSON-able. With several hooks those of the first one's filter; `rows_dropped_elsewhere` passed
        it and not another's.
        """
        first = self.filter.stats
        if len(self.filters) > 1:
            first |= {"rows": self._common, "rows_dropped_elsewhere": first["rows"] - self._common}
        return {**first, "epoch": self._windows.epoch}

    def next(self) -> Rows | None:
        """The rows of the next batch of windows, or None at the end of a stream that does not repeat."""
        token_ids = self._windows.next(self.config.windows_per_batch)
        if not len(token_ids):
            return None
        rows = self._rows(self.filters, token_ids)
        self._common += len(rows)
        return rows

    def held_out(self) -> Rows:
        """The first `holdout` rows of the held-out text, through the same filters; fewer if they drop very many."""
        held_filters = [one.twin() for one in self.filters]  # separate counts: these rows are not part of the stream
        stream = self._open(range(self.n_train, len(self.corpus)), repeat=False)
        parts, have = [], 0
        while have < self.config.holdout:
            token_ids = stream.next(self.config.windows_per_batch)
            if not len(token_ids):
                log.warning("only %d of %d held-out rows pass the filter", have, self.config.holdout)
                break
            parts.append(self._rows(held_filters, token_ids))
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
        """JSON-able: the place in the text, and the median norm and the counts of each hook."""
        first, *others = [{"median": one.median, "counts": dict(one.counts)} for one in self.filters]
        more = {"others": others, "common": self._common} if others else {}
        return {"pieces": self.n_train, "text": self._windows.state_dict(), **first, **more}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = [state, *state.get("others", [])]
        if len(saved) != len(self.filters):
            raise ValueError(f"the saved position is of {len(saved)} hooks, here are {len(self.filters)}")
        for one, kept in zip(self.filters, saved, strict=True):
            here, then = one.median or 0.0, float(kept["median"])
            # Not to the last bit: other machines round differently. The saved median is used: the limit stays.
            if state["pieces"] != self.n_train or not math.isclose(here, then, rel_tol=0.01):
                raise ValueError(
                    f"the saved position is from a text of {state['pieces']} pieces with a median norm of {then}, "
                    f"but here they are {self.n_train} and {here}: resume with the same model and text"
                )
        self._windows.load_state_dict(state["text"])
        for one, kept in zip(self.filters, saved, strict=True):
            one.median, one.counts = float(kept["median"]), dict(kept["counts"])
        self._common = state.get("common", 0)

    def _rows(self, filters: Sequence[RowFilter], token_ids: Tensor) -> Rows:
        parts = self.hooked.parts(token_ids)
        return _in_common([one(part, token_ids) for one, part in zip(filters, parts, strict=True)])

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

    def _calibrate(self) -> tuple[int, ...]:
        """Fix the median norms from the first batch of the text; returns the width of the activations at each hook."""
        token_ids = self._open(range(self.n_train), repeat=False).next(self.config.windows_per_batch)
        if not len(token_ids):
            raise ValueError(f"the text does not fill one window of {self.config.window} tokens; give more text")
        parts = self.hooked.parts(token_ids)
        for one, part in zip(self.filters, parts, strict=True):
            one.calibrate(part, token_ids)
        return tuple(part.shape[2] for part in parts)


def check_stream(language_model: LanguageModel, corpus: Corpus, config: StreamConfig) -> None:
    """Raises what ActivationStream would before it runs the model: a bad hook, too long windows, too short a text.

    The model's weights are not read: it may lie on the meta device, as `load_model(check=)` gives it.
    """
    ActivationStream(language_model, corpus, config, calibrate=False)


def _longest(language_model: LanguageModel) -> int | None:
    """The longest window that the model takes, if its configuration says so."""
    config: Any = getattr(language_model.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)


def _in_common(found: Sequence[Rows]) -> Rows:
    """The rows of several hooks side by side, of the tokens that are in all of them."""
    first = found[0]
    if len(found) == 1:
        return first
    width = first.token_ids.shape[1]
    places = [rows.window * width + rows.position for rows in found]
    count = torch.zeros(first.token_ids.numel(), dtype=torch.int64, device="cpu")
    for place in places:
        count[place] += 1
    kept = count == len(found)
    device = first.activations.device
    columns = [
        rows.activations[kept[place].to(rows.activations.device)].to(device)
        for rows, place in zip(found, places, strict=True)
    ]
    mine = kept[places[0]]
    return Rows(torch.cat(columns, dim=1), first.token_ids, first.window[mine], first.position[mine])


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
