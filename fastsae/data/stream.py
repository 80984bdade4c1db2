"""From text to rows of activations, batch by batch; the live source and the harvest both use it."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastsae.data.filters import NonFinite, RowFilter, Rows
from fastsae.data.hooks import Hook, HookedModel, Hooks, hooks_of
from fastsae.data.models import LanguageModel, load_model, load_tokenizer
from fastsae.data.padding import is_text
from fastsae.data.passes import ModelPasses, Passes, PassStream, check_window
from fastsae.data.source import check_seed
from fastsae.data.specials import named_ids, special_ids
from fastsae.data.text import Corpus, Streamed
from fastsae.data.windows import Pack, WindowStream

log = logging.getLogger(__name__)

MARGIN = 1.25  # reserve this multiple of the text that the held-out rows need if no row is dropped
EARLIER: dict[str, Any] = {
    "pack": "windows", "special_tokens": "keep", "drop_tokens": [], "keep_tokens": [], "drop_positions": []
}  # fmt: skip
"""The meaning of records from before these options: the rows of special tokens inside a text were kept."""


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """How text becomes rows."""

    hook: Hooks
    """Where the activations are taken: a number L for the residual stream after L layers (0: the embeddings), mlp.L or
    attn.L, or a module's name for its output ("model.layers.14"), or with ":input" for its input. Several are read in
    one pass; a token is dropped at all of them if its norm is too large at any."""
    window: int = 256
    """Tokens in one window of text."""
    windows_per_batch: int = 16
    """Windows in one forward pass."""
    pack: Pack = "windows"
    """windows: documents follow each other, separated by the tokenizer's end of text, and fill every window.
    documents: a window holds text of only one document; its last window is padded, and the model gets a mask."""
    drop_first: bool = True
    """Drop the first position of every window, an attention sink with an enormous norm in most models."""
    drop_positions: tuple[int, ...] = ()
    """More positions of every window to drop, counted from 0; negative ones from the end of its text."""
    special_tokens: Literal["drop", "keep"] = "drop"
    """Rows of the tokenizer's special tokens inside a text (end of text, marks of a chat). Those that the tokenizer
    puts around every window are dropped either way, unless keep_tokens names them; the first position also needs
    drop_first to be off."""
    drop_tokens: tuple[str, ...] = ()
    """More tokens whose rows are dropped, by name, or by id as #13."""
    keep_tokens: tuple[str, ...] = ()
    """Special tokens whose rows are kept, by name, or by id as #13."""
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
        # One hook is stored as a single value, as in older versions; several come back from JSON as a list.
        object.__setattr__(self, "hook", hooks[0] if len(hooks) == 1 else hooks)
        check_seed(self.seed)
        for name, least in (("window", 2), ("windows_per_batch", 1), ("holdout", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.norm_factor is not None and self.norm_factor <= 1:
            raise ValueError(f"norm_factor multiplies the median norm and must be above 1, got {self.norm_factor}")
        choices = {"nonfinite": ("raise", "drop"), "special_tokens": ("drop", "keep"), "pack": ("windows", "documents")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}")
        for position in self.drop_positions:
            if not -self.window <= position < self.window:
                raise ValueError(f"drop_positions has {position}, expected positions from 0 to {self.window - 1}")

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

    def to_record(self) -> dict[str, Any]:
        """JSON-able, equal to itself after a round trip through JSON."""
        record = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in record.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> StreamConfig:
        """What `to_record` gave, in this version or an earlier one. Raises TypeError for an option that is unknown."""
        made: dict[str, Any] = {**EARLIER, **record}
        made |= {name: tuple(value) for name, value in made.items() if isinstance(value, list)}
        return cls(**made)


class SplitText:
    """A corpus as windows for training and held-out windows: the part of a stream that needs no model.

    The last pieces of the corpus are held out (the first ones if it is streamed), as many as the held-out rows need.
    Raises: ValueError for a text that is too short or does not fit the tokenizer, and for a token that it lacks.
    """

    def __init__(self, corpus: Corpus, tokenizer: Any, config: StreamConfig):
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.config = config
        probe = self._open(range(1), repeat=False)
        kept = named_ids(config.keep_tokens, tokenizer)
        dropped = special_ids(tokenizer) if config.special_tokens == "drop" else {}
        dropped = {number: name for number, name in dropped.items() if number not in kept}
        self.without = {**dropped, **named_ids(config.drop_tokens, tokenizer)}
        """Tokens whose rows are dropped: {id: name}."""
        # If a special token around windows is to be kept, they are filtered by id; otherwise all are dropped by number.
        frame = [*enumerate(probe.prefix), *enumerate(probe.suffix, -len(probe.suffix))]
        gaps = any(number in kept for _, number in frame)
        self.n_prefix, self.n_suffix = (0, 0) if gaps else (len(probe.prefix), len(probe.suffix))
        places = tuple(place for place, number in frame if gaps and number not in kept)
        self.positions = (*config.drop_positions, *places)
        full = torch.zeros(1, config.window, dtype=torch.int64, device="cpu")
        choice = dataclasses.replace(self.filter("").ordinary, without=())
        self.rows_per_window = int(choice.places(full).sum())
        """Rows of a full window, if no token is dropped by its id."""
        if self.rows_per_window < 1:
            raise ValueError(f"window is {config.window} tokens, and all of its positions are dropped; make it longer")
        streamed = isinstance(corpus, Streamed)
        held = self._pieces_to_hold_out(probe.content, streamed)
        count = len(corpus)
        self.train_pieces, self.held_pieces = range(count - held), range(count - held, count)
        if streamed:
            self.train_pieces, self.held_pieces = range(held, count), range(held)
        if not len(self.train(repeat=False).next(1)):
            raise ValueError(f"the text does not fill one window of {config.window} tokens; give more text")

    def train(self, repeat: bool) -> WindowStream:
        return self._open(self.train_pieces, repeat)

    def held_out(self) -> WindowStream:
        return self._open(self.held_pieces, repeat=False)

    def filter(self, name: str) -> RowFilter:
        """The filter of the rows at a hook of this name."""
        return RowFilter(
            name,
            n_prefix=self.n_prefix,
            n_suffix=self.n_suffix,
            drop_first=self.config.drop_first,
            norm_factor=self.config.norm_factor,
            nonfinite=self.config.nonfinite,
            positions=self.positions,
            without=self.without,
        )

    def _open(self, pieces: range, repeat: bool) -> WindowStream:
        return WindowStream(
            self.corpus,
            self.tokenizer,
            pieces,
            window=self.config.window,
            seed=self.config.seed,
            shuffle=self.config.shuffle_text,
            repeat=repeat,
            pack=self.config.pack,
        )

    def _pieces_to_hold_out(self, content: int, streamed: bool) -> int:
        """The number of pieces that the held-out rows need."""
        apart = self.config.pack == "documents"
        needed = math.ceil(MARGIN * math.ceil(self.config.holdout / self.rows_per_window)) * content
        needed = math.ceil(MARGIN * self.config.holdout) if apart else needed  # rows, else tokens
        choice, windows = self.filter("").ordinary, self._open(range(1), repeat=False)
        have, held, count = 0, 0, len(self.corpus)
        while have < needed and held < count:
            piece = held if streamed else count - held - 1
            if isinstance(self.corpus, Streamed) and not self.corpus.has(piece):
                break
            if apart:
                have += int(choice.places(windows.of_piece(piece)).sum())
            else:
                ids = self.corpus.tokens(piece, self.tokenizer)
                have += len(ids) - int(np.isin(ids, list(self.without)).sum())
            held += 1
        if have < needed or (not streamed and count - held < count / 2):
            raise ValueError(
                f"the text is too short: {self.config.holdout:,} held-out rows take {held} of its "
                f"{held if streamed else count} pieces; give more text or a smaller holdout"
            )
        return held


def load_for(
    spec: str,
    corpus: Corpus,
    config: StreamConfig,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    head: bool = False,
    tokens: int = 0,
) -> LanguageModel:
    """`load_model`, after every check that needs no weights: the text, with the model's tokenizer, and the hooks.

    tokens: of held-out text that must exist. Raises as `load_model`, `SplitText`, `held_out_windows` and `check_model`.
    """
    tokenizer = load_tokenizer(spec)
    held_out_windows(SplitText(corpus, tokenizer, config), tokens)
    return load_model(
        spec, dtype=dtype, device=device, head=head, tokenizer=tokenizer, check=lambda found: check_model(found, config)
    )


def held_out_windows(text: SplitText, tokens: int) -> Tensor:
    """The first windows (n, window) int64 of the held-out text with at least `tokens` tokens in all.

    If documents are kept apart, windows end with PAD, which is not counted. Raises ValueError if there are fewer.
    """
    stream = text.held_out()
    parts = [stream.next(math.ceil(tokens / text.config.window))]
    while (have := sum(int(is_text(part).sum()) for part in parts)) < tokens and len(parts[-1]):
        parts.append(stream.next(math.ceil((tokens - have) / text.config.window)))
    if have < tokens:
        raise ValueError(
            f"the text is too short: its held-out part has {have:,} tokens in windows of "
            f"{text.config.window}, expected {tokens:,}; ask for fewer, or give another text"
        )
    return torch.cat(parts)


class ActivationStream:
    """The rows of a corpus at the hooks of a model, in the order of the text; a position is a few numbers.

    Rows (n, d_in) have the activations of all hooks side by side, with these `widths`, from one pass. Each hook has a
    filter of its own, and a token gives a row only if it passes all of them: the input of an MLP is normalized and does
    not show the huge norms of its output.
    The stream skips the pieces of the corpus that are held out, see `SplitText`.
    Deterministic: the same model, text, settings, thread count and machine give bit-identical rows.
    """

    def __init__(self, model: LanguageModel | Passes, corpus: Corpus, config: StreamConfig, *, repeat: bool = True):
        if isinstance(model, LanguageModel):
            model = ModelPasses(model, config.hook, config.window)
        self.config = config
        self.corpus = corpus
        self.passes = model
        self.tokenizer = model.tokenizer
        self.text = SplitText(corpus, self.tokenizer, config)
        self.n_train = len(self.text.train_pieces)
        self._windows = PassStream(self.text.train(repeat), self.passes, config.windows_per_batch)
        self.filters = [self.text.filter(name) for name in self.names]
        self._common = 0  # rows that passed all filters
        self.rows_per_window = self.text.rows_per_window
        self.widths = self._calibrate()
        self.d_in = sum(self.widths)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the places in the model that are read."""
        return self.passes.names

    @property
    def name(self) -> str:
        return ", ".join(self.names)

    @property
    def filter(self) -> RowFilter:
        """That of the first hook."""
        return self.filters[0]

    @property
    def stats(self) -> dict[str, Any]:
        """Counts so far, JSON-able. With several hooks these are the first filter's; `rows_dropped_elsewhere` passed it
        but not another one.
        """
        first = self.filter.stats
        if len(self.filters) > 1:
            first |= {"rows": self._common, "rows_dropped_elsewhere": first["rows"] - self._common}
        return {**first, "epoch": self._windows.epoch}

    def where(self) -> str:
        """The place in the text from which `next` reads on, in words."""
        return f"{self.corpus.describe().get('spec', type(self.corpus).__name__)}, {self._windows.where()}"

    def next(self) -> Rows | None:
        """The rows of the next batch of windows, or None at the end of a stream that does not repeat."""
        found = self._windows.next()
        if found is None:
            return None
        rows = self._rows(self.filters, *found)
        self._common += len(rows)
        return rows

    def look_ahead(self, batches: int) -> None:
        """So many batches will be needed next: passes for them begin now if others than this process run them."""
        self._windows.ahead = self.passes.room(batches)

    def held_out(self) -> Rows:
        """The first `holdout` rows of the held-out text, through the same filters; fewer if they drop very many."""
        held_filters = [one.twin() for one in self.filters]  # separate counts: these rows are not part of the stream
        stream = self.text.held_out()
        parts, have = [], 0
        while have < self.config.holdout:
            token_ids = stream.next(self.config.windows_per_batch)
            if not len(token_ids):
                log.warning("only %d of %d held-out rows pass the filter", have, self.config.holdout)
                break
            parts.append(self._rows(held_filters, token_ids, self.passes.begin(token_ids)()))
            have += len(parts[-1])
        return join_rows(parts, self.d_in, self.config.window, self.config.holdout)

    def held_out_windows(self, tokens: int) -> Tensor:
        """See `held_out_windows`."""
        return held_out_windows(self.text, tokens)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able: the place in the text, and the median norm and the counts of each hook."""
        first, *others = [{"median": one.median, "counts": dict(one.counts)} for one in self.filters]
        more = {"others": others, "common": self._common} if others else {}
        return {"pieces": self.n_train, "text": self._windows.state_dict(), **first, **more}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = [state, *state.get("others", [])]
        if len(saved) != len(self.filters):
            raise ValueError(f"the saved position has {len(saved)} hooks, expected {len(self.filters)}")
        for one, kept in zip(self.filters, saved, strict=True):
            here, then = one.median or 0.0, float(kept["median"])
            # Not to the last bit: other machines round differently. The saved median is used, so the limit stays.
            if state["pieces"] != self.n_train or not math.isclose(here, then, rel_tol=0.01):
                raise ValueError(
                    f"the saved position is from a text of {state['pieces']} pieces with a median norm of {then}, "
                    f"but here they are {self.n_train} and {here}: resume with the same model and text"
                )
        self._windows.load_state_dict(state["text"])
        for one, kept in zip(self.filters, saved, strict=True):
            one.median = float(kept["median"])
            one.load_counts(kept["counts"])
        self._common = state.get("common", 0)

    def _rows(self, filters: Sequence[RowFilter], token_ids: Tensor, parts: Sequence[Tensor]) -> Rows:
        return _in_common([one(part, token_ids) for one, part in zip(filters, parts, strict=True)])

    def _calibrate(self) -> tuple[int, ...]:
        """Fix the median norms from the first batch of the text; returns the width of the activations at each hook."""
        token_ids = self.text.train(repeat=False).next(self.config.windows_per_batch)
        parts = self.passes.begin(token_ids)()
        for one, part in zip(self.filters, parts, strict=True):
            one.calibrate(part, token_ids)
        return tuple(part.shape[2] for part in parts)


def check_model(language_model: LanguageModel, config: StreamConfig) -> None:
    """Raises ValueError for a hook that the model does not have, and for windows that are longer than it takes.

    Weights are not read: the model may be on the meta device, as in `load_model(check=)`.
    """
    HookedModel(language_model.model, config.hook)
    check_window(language_model, config.window)


def _in_common(found: Sequence[Rows]) -> Rows:
    """The rows of several hooks side by side, for the tokens that all of them have."""
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
