"""Training rows straight from a running language model, shuffled in a buffer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor

from fastsae.data.filters import Rows
from fastsae.data.hooks import Hooks, hooks_of
from fastsae.data.models import LanguageModel
from fastsae.data.passes import Passes
from fastsae.data.source import check_state, pair_of, permutation
from fastsae.data.stream import EARLIER, ActivationStream, StreamConfig, join_rows, load_for
from fastsae.data.text import Corpus, load_text

_HALVES, _MIX = 0, 1  # which of a block's permutations a key belongs to
_AROUND = 8  # tokens before a row's own that are shown with its place


@dataclasses.dataclass
class _Block:
    """The rows of a fixed number of windows, the stream's position before them and its stats after them.

    text: these windows, and the window and position of each row, without activations; starts: the number of windows
    before each pass of the model, and where that pass began in the text.
    """

    number: int
    rows: Tensor
    before: dict[str, Any]
    stats: dict[str, Any]
    text: Rows
    starts: list[tuple[int, str]]

    def place(self, row: int, tokenizer: Any) -> str:
        """Where a row comes from, in words."""
        window, position = int(self.text.window[row]), int(self.text.position[row])
        first, where = next(start for start in reversed(self.starts) if start[0] <= window)
        ids = self.text.token_ids[window, max(0, position - _AROUND) : position + 1].tolist()
        text = f"tokens {ids}" if tokenizer is None else repr(tokenizer.decode(ids))
        return f"token {position} of window {window - first} after {where}: it ends {text}"


class LiveSource:
    """Endless training rows: a model's activations over a text, epoch after epoch.

    Shuffling: the stream is cut into blocks of buffer_rows / 2 rows. Each block is split at random in two; generation g
    returns, in a random order, one half of block g and the held-back half of block g - 1. So every row is returned once
    per epoch, and a batch mixes the text of two blocks. Unlike a buffer that keeps some rows indefinitely, this one
    depends on only two blocks: a saved position is a place in the text and a few numbers, and loading it runs the model
    over those two blocks again. Bit-exact on the same machine and thread count.

    model, text: spec strings (see `load_model`, `load_text`) or the objects themselves. If model is one that others run
    (fastsae.data.passes), they are asked for the next block's passes as soon as a block is there.
    With several hooks (config.hook), a token's activations stand side by side in a row, as a crosscoder reads them.
    target: the hook, or hooks, that a transcoder learns to predict; the same pass reads them.
    buffer_rows: rows in memory, roughly, in the model's dtype. dtype: of the returned rows; None keeps the model's.
    prefetch: compute the next block on a thread while this one is used, for a model on a device of its own; batches
    stay the same. Rows stay on the model's device.
    """

    n_tokens: int | None = None

    def __init__(
        self,
        model: str | LanguageModel | Passes,
        text: str | Corpus,
        config: StreamConfig,
        *,
        target: Hooks | None = None,
        buffer_rows: int = 65_536,
        dtype: torch.dtype | None = torch.float32,
        model_dtype: torch.dtype | None = None,
        device: str = "cpu",
        prefetch: bool = False,
    ):
        if buffer_rows < 4:
            raise ValueError(f"buffer_rows must be at least 4, got {buffer_rows}")
        targets = () if target is None else hooks_of(target)
        both = dataclasses.replace(config, hook=(*config.hooks, *targets))
        self.corpus = load_text(text) if isinstance(text, str) else text
        if isinstance(model, str):
            model = load_for(model, self.corpus, both, dtype=model_dtype, device=device)
        self.config = config
        self.target = target
        self.dtype = dtype
        self._stream = ActivationStream(model, self.corpus, both)
        self.d_in = sum(self._stream.widths[: len(config.hooks)])
        self.d_target = self._stream.d_in - self.d_in or None
        per_batch = config.windows_per_batch * self._stream.rows_per_window
        self._batches_per_block = max(1, math.ceil(buffer_rows / 2 / per_batch))
        self._rows_per_block = math.ceil(buffer_rows / 2) if config.pack == "documents" else 0
        self._worker = ThreadPoolExecutor(1, "fastsae-live") if prefetch else None
        self._held: Tensor | None = None
        self._last: list[tuple[Tensor, _Block | None, _Block | None]] = []  # of the last batch
        self._model_digest = self._stream.passes.digest
        self._stream.look_ahead(self._batches_per_block)
        self._reset(0)

    @property
    def stats(self) -> dict[str, Any]:
        """Counts of the rows computed up to the end of the block being served, dropped rows by reason, the epoch."""
        return dict(self._block.stats) if self._block is not None else self._stream.stats

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths of the activations at each hook, the targets' last."""
        return self._stream.widths

    def next_batch(self, n: int) -> Tensor:
        rows = self._next(n)
        return rows if self.d_target is None else pair_of(rows, self.d_in)[0]

    def next_pair(self, n: int) -> tuple[Tensor, Tensor]:
        """See TargetSource. Raises ValueError where there are no targets."""
        return pair_of(self._next(n), self.d_in)

    def _next(self, n: int) -> Tensor:
        if n < 1:
            raise ValueError(f"next_batch needs n >= 1 rows, got {n}")
        parts = []
        self._last = []
        while n > 0:
            if self._cursor == len(self._pool):
                self._advance()
            rows = self._pool[self._cursor : self._cursor + n]
            self._last.append((self._pool_from[self._cursor : self._cursor + n], self._previous, self._block))
            self._cursor += len(rows)
            n -= len(rows)
            parts.append(rows)
        rows = torch.cat(parts)
        return rows if self.dtype is None else rows.to(self.dtype)

    def origin(self) -> Callable[[Sequence[int]], list[str]]:
        """See NamesRows."""
        last, tokenizer = self._last, self._stream.tokenizer

        def places(rows: Sequence[int]) -> list[str]:
            found = []
            for row in rows:
                parts = iter(last)
                while row >= len((part := next(parts))[0]):
                    row -= len(part[0])
                at, previous, block = int(part[0][row]), part[1], part[2]
                from_block = previous if at < 0 else block
                assert from_block is not None
                found.append(from_block.place(~at if at < 0 else at, tokenizer))
            return found

        return places

    def held_out(self) -> Tensor:
        return self._held_out() if self.d_target is None else pair_of(self._held_out(), self.d_in)[0]

    def held_out_targets(self) -> Tensor:
        """See TargetSource. Raises ValueError where there are no targets."""
        return pair_of(self._held_out(), self.d_in)[1]

    def _held_out(self) -> Tensor:
        if self._held is None:
            self._wait()
            rows = self._stream.held_out().activations
            self._held = rows if self.dtype is None else rows.to(self.dtype)
        return self._held

    def state_dict(self) -> dict[str, Any]:
        """JSON-able. `replay` is the position in the text from which the buffer is refilled."""
        blocks = [block for block in (self._previous, self._block) if block is not None]
        replay = blocks[0].before if blocks else self._stream.state_dict()
        return {**self._identity(), "generation": self._generation, "cursor": self._cursor, "replay": replay}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position; runs the model over up to two blocks of text to refill the buffer."""
        if "config" in state:
            state = {**state, "config": {**EARLIER, **state["config"]}}
        check_state(state, self._identity())
        self._wait()
        self._stream.load_state_dict(state["replay"])
        self._reset(max(state["generation"] - 1, 0))
        while self._generation < state["generation"]:
            self._advance()
        if not 0 <= state["cursor"] <= len(self._pool):
            raise ValueError(
                f"the saved position is row {state['cursor']:,}, but the buffer holds only {len(self._pool):,} rows: "
                "resume with the same model and text"
            )
        self._cursor = state["cursor"]

    def close(self) -> None:
        """End the prefetching thread, after its current block."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)

    def _identity(self) -> dict[str, Any]:
        target = {} if self.target is None else {"target": list(hooks_of(self.target))}
        return {
            "source": "live",
            "config": self.config.to_record(),
            **target,
            "text": self.corpus.describe(),
            "model": self._model_digest,
            "batches_per_block": self._batches_per_block,
            **({"rows_per_block": self._rows_per_block} if self._rows_per_block else {}),
        }

    def _reset(self, first: int) -> None:
        """Empty the buffer; the stream is at the start of block `first`."""
        self._generation = first - 1  # the current one, -1 before the first
        self._previous: _Block | None = None
        self._block: _Block | None = None
        self._kept = self._pool = torch.zeros(0, self._stream.d_in, dtype=torch.float32, device="cpu")
        # Each row's number in the block; ~number for those held back from the block before.
        self._kept_from = self._pool_from = torch.zeros(0, dtype=torch.int64, device="cpu")
        self._cursor = 0
        self._coming: Future[_Block] | None = None

    def _wait(self) -> None:
        """Wait for the thread: only one thread may use the stream and the tokenizer."""
        if self._coming is not None:
            wait([self._coming])

    def _advance(self) -> None:
        """Fill the buffer with the next generation."""
        number = self._generation + 1
        block = self._compute(number) if self._coming is None else self._coming.result()
        self._coming = None if self._worker is None else self._worker.submit(self._compute, number + 1)
        order = permutation(len(block.rows), self.config.seed, number, _HALVES)
        half = (len(order) + 1) // 2
        places = torch.cat([~self._kept_from, order[:half]])
        mix = permutation(len(places), self.config.seed, number, _MIX)
        self._pool_from, self._kept_from = places[mix], order[half:]
        order = order.to(block.rows.device)
        pool = torch.cat([self._kept.to(block.rows), block.rows[order[:half]]])
        self._pool = pool[mix.to(pool.device)]
        self._kept = block.rows[order[half:]]
        # Not a slice of the rows: it would keep all of them in memory.
        self._previous, self._block = self._block, dataclasses.replace(block, rows=block.rows[:0].clone())
        self._generation, self._cursor = number, 0

    def _compute(self, number: int) -> _Block:
        before = self._stream.state_dict()
        parts: list[Rows] = []
        starts: list[tuple[int, str]] = []
        have = 0
        # The windows of short documents are far from full: a block needs more of them.
        while len(starts) < self._batches_per_block or 0 < have < self._rows_per_block:
            starts.append((sum(len(part.token_ids) for part in parts), self._stream.where()))
            if (part := self._stream.next()) is not None:
                parts.append(part)
                have += len(part)
        self._stream.look_ahead(len(starts))
        joined = join_rows(parts, self._stream.d_in, self.config.window)
        rows = joined.activations
        if not len(rows):
            raise ValueError(f"the filter drops every row of {self._batches_per_block} batches: {self._stream.stats}")
        text = dataclasses.replace(joined, activations=rows[:0].clone())
        return _Block(number, rows, before, self._stream.stats, text, starts)
