"""The interface of training data: endless shuffled rows, held-out rows, and a position to resume from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor


@runtime_checkable
class ActivationSource(Protocol):
    """Rows of activations (n, d_in) for training, in an order that depends on the seed."""

    @property
    def d_in(self) -> int:
        """Width of a row."""

    @property
    def n_tokens(self) -> int | None:
        """Training rows in one epoch, or None for a stream of unknown length."""

    @property
    def stats(self) -> dict[str, Any]:
        """Counts so far, JSON-able: `epoch`, and for real activations `rows_dropped_norm`, `rows_dropped_first`, ..."""

    def next_batch(self, n: int) -> Tensor:
        """The next n training rows (n, d_in), shuffled; wraps over epochs. Raises ValueError for n < 1."""

    def held_out(self) -> Tensor:
        """The rows (holdout, d_in) that `next_batch` never returns; the same at every call."""

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able: an equal source that loads it returns bit-identical batches."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. Raises ValueError if it belongs to another source, naming the difference."""


@runtime_checkable
class TargetSource(ActivationSource, Protocol):
    """Rows with targets, for transcoders: the further methods of a source whose `d_target` is a number."""

    @property
    def d_target(self) -> int | None:
        """Width of a row's target; None: the rows are their own targets."""

    def next_pair(self, n: int) -> tuple[Tensor, Tensor]:
        """The next n rows (n, d_in) and their targets (n, d_target); `next_batch` would have given the same rows."""

    def held_out_targets(self) -> Tensor:
        """The targets (holdout, d_target) of the held-out rows."""


@runtime_checkable
class NamesRows(Protocol):
    """A source that knows where its rows come from."""

    def origin(self) -> Callable[[Sequence[int]], list[str]]:
        """A function from row numbers in the last returned batch to their places, in words. It stays valid when the
        source moves on, and keeps no rows.
        """


def origin_of(source: ActivationSource) -> Callable[[Sequence[int]], list[str]] | None:
    """`NamesRows.origin`; None if the source does not know, or has returned no batch."""
    return source.origin() if isinstance(source, NamesRows) else None


def target_width(source: ActivationSource) -> int | None:
    """The width of the targets; None if the rows are their own targets."""
    return getattr(source, "d_target", None)


def next_pair(source: ActivationSource, n: int) -> tuple[Tensor, Tensor | None]:
    """The next n rows of a source and their targets; None if the rows are their own targets."""
    if target_width(source) is None:
        return source.next_batch(n), None
    assert isinstance(source, TargetSource)
    return source.next_pair(n)


def held_out_targets(source: ActivationSource) -> Tensor | None:
    """The targets of a source's held-out rows; None if the rows are their own targets."""
    if target_width(source) is None:
        return None
    assert isinstance(source, TargetSource)
    return source.held_out_targets()


def pair_of(rows: Tensor, d_in: int) -> tuple[Tensor, Tensor]:
    """Splits rows that have both side by side into rows (n, d_in) and targets. Raises ValueError without targets."""
    if rows.shape[1] == d_in:
        raise ValueError("this source has no targets: open it with target=")
    return rows[:, :d_in].contiguous(), rows[:, d_in:].contiguous()


def permutation(n: int, *key: int) -> Tensor:
    """A random permutation of n (int64) that depends only on the key (non-negative integers).

    Counter-based: a position in the data is a few integers, and no generator state has to be saved.
    """
    return torch.from_numpy(np.random.default_rng(key).permutation(n))


def nonfinite_rows(x: Tensor) -> Tensor:
    """Bool (n,): rows of x (n, d_in) that contain NaN or infinity; in pieces, because the mask is as large as x."""
    return torch.cat([~torch.isfinite(piece).all(dim=1) for piece in x.split(65_536)])


def check_seed(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"seed must be 0 or more, got {seed}")
    return seed


def check_state(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError unless `state` agrees with every entry of `expected`, naming the first entry that differs."""
    for name, here in expected.items():
        if name not in state:
            raise ValueError(f"this is not the saved position of a {expected['source']} source: it has no {name!r}")
        if type(state[name]) is not type(here) or state[name] != here:
            raise ValueError(
                f"the saved position belongs to another source: {name} is {state[name]!r} in it and {here!r} here; "
                "resume with the data and settings of the original run"
            )


class EpochSource:
    """A known number of rows, epoch after epoch; a subclass reads one epoch's shuffled order.

    `n_tokens` training rows; the position is (epoch, rows returned in it). d_target: width of the targets, if any.
    """

    def __init__(self, n_tokens: int, d_in: int, seed: int, d_target: int | None = None):
        self.n_tokens: int | None = n_tokens
        self.d_in = d_in
        self.d_target = d_target
        self.seed = check_seed(seed)
        self._rows_per_epoch = n_tokens
        self._epoch = 0
        self._cursor = 0
        self._last = 0  # the row, counted over all epochs, with which the last batch began

    def _identity(self) -> dict[str, Any]:
        """Settings that a saved position must match: JSON-able, with at least the entry `source`."""
        raise NotImplementedError

    def _take(self, epoch: int, start: int, n: int) -> Tensor:
        """Between 1 and n rows of the epoch's order, from index `start` on, their targets beside them."""
        raise NotImplementedError

    def _place(self, epoch: int, index: int) -> str:
        """Where the row at an index of the epoch's order is stored, in words."""
        raise NotImplementedError

    def origin(self) -> Callable[[Sequence[int]], list[str]]:
        """See NamesRows."""
        first = self._last
        return lambda rows: [self._place(*divmod(first + row, self._rows_per_epoch)) for row in rows]

    def next_batch(self, n: int) -> Tensor:
        rows = self._next(n)
        return rows if self.d_target is None else pair_of(rows, self.d_in)[0]

    def next_pair(self, n: int) -> tuple[Tensor, Tensor]:
        """See TargetSource. Raises ValueError where there are no targets."""
        return pair_of(self._next(n), self.d_in)

    def _next(self, n: int) -> Tensor:
        if n < 1:
            raise ValueError(f"next_batch needs n >= 1 rows, got {n}")
        self._last = self._epoch * self._rows_per_epoch + self._cursor
        parts = []
        while n > 0:
            rows = self._take(self._epoch, self._cursor, min(n, self._rows_per_epoch - self._cursor))
            parts.append(rows)
            n -= len(rows)
            self._cursor += len(rows)
            if self._cursor == self._rows_per_epoch:
                self._epoch, self._cursor = self._epoch + 1, 0
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def skip(self, n: int) -> None:
        """Moves n rows on without reading them."""
        epochs, self._cursor = divmod(self._cursor + n, self._rows_per_epoch)
        self._epoch += epochs

    def state_dict(self) -> dict[str, Any]:
        return {**self._identity(), "epoch": self._epoch, "cursor": self._cursor}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_state(state, self._identity())
        epoch, cursor = state.get("epoch"), state.get("cursor")
        if not isinstance(epoch, int) or not isinstance(cursor, int) or not 0 <= cursor < self._rows_per_epoch:
            raise ValueError(
                f"expected an epoch and a cursor below {self._rows_per_epoch:,}, got epoch {epoch!r}, cursor {cursor!r}"
            )
        self._epoch, self._cursor = epoch, cursor
