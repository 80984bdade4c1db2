"""Which rows of a window to train on, and how many were dropped, by reason."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastsae.data.padding import is_text
from fastsae.data.source import nonfinite_rows

NonFinite = Literal["raise", "drop"]


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that passed the filter, with their places: row r is token `position[r]` of `token_ids[window[r]]`."""

    activations: Tensor  # (rows, d_in) in the model's dtype
    token_ids: Tensor  # (windows, window) int64, on the CPU like the two below
    window: Tensor  # (rows,) int64, ascending
    position: Tensor  # (rows,) int64, ascending within a window

    def __len__(self) -> int:
        return len(self.activations)


@dataclasses.dataclass(frozen=True)
class Ordinary:
    """Which tokens of whole windows are ordinary: activations (windows, window, d_in) -> bool (windows, window).

    first, last  positions at either end of a window's text that are not: an attention sink, special tokens.
    max_norm     the largest norm of an ordinary activation; None: any.
    positions    more positions that are not; negative ones count from the end of a window's text.
    without      token ids that are never ordinary: `of(token_ids)` then gives the choice for these windows.

    A token whose activation is not finite is never ordinary, nor is padding. Where a model generates token by token, a
    pass sees one token at a time and positions mean nothing: give max_norm alone.
    """

    first: int = 1
    last: int = 0
    max_norm: float | None = None
    positions: tuple[int, ...] = ()
    without: tuple[int, ...] = ()

    def __call__(self, activations: Tensor, token_ids: Tensor | None = None) -> Tensor:
        if token_ids is None:
            if self.without:
                raise ValueError(
                    f"{len(self.without)} token ids are left out, but the windows' tokens are not known here: "
                    "pass of(token_ids)"
                )
            token_ids = torch.zeros(activations.shape[:-1], dtype=torch.int64, device=activations.device)
        norms = activations.float().norm(dim=-1)
        found = torch.isfinite(norms) if self.max_norm is None else norms <= self.max_norm
        return found & self.places(token_ids).to(found.device)

    def places(self, token_ids: Tensor) -> Tensor:
        """Bool (windows, window): the tokens whose ids (windows, window) and positions are ordinary."""
        kept = is_text(token_ids)
        place = torch.arange(token_ids.shape[-1], dtype=torch.int64, device=token_ids.device)
        from_end = place - kept.sum(dim=-1, keepdim=True)
        kept = kept & (place >= self.first) & (from_end < -self.last)
        for position in self.positions:
            kept &= (place if position >= 0 else from_end) != position
        if self.without:
            kept &= ~torch.isin(token_ids, torch.tensor(self.without, dtype=torch.int64, device=token_ids.device))
        return kept

    def of(self, token_ids: Tensor) -> Callable[[Tensor], Tensor]:
        """The choice in windows of these ids (windows, window): activations -> bool (windows, window)."""
        return lambda activations: self(activations, token_ids)


def in_windows(where: Callable[[Tensor], Tensor] | None, token_ids: Tensor) -> Callable[[Tensor], Tensor] | None:
    """A choice of activations -> bool, in windows of these ids (windows, window), that never includes padding.

    None: every token; the result is None if there is no padding.
    """
    if isinstance(where, Ordinary):
        return where.of(token_ids)
    text = is_text(token_ids)
    if bool(text.all()):
        return where

    def choose(activations: Tensor) -> Tensor:
        mask = text.to(activations.device)
        return mask if where is None else mask & where(activations)

    return choose


class RowFilter:
    """Drops first positions, special tokens, rows that are not finite, and rows of norm > norm_factor x median norm.

    Padding gives no rows either.
    n_prefix, n_suffix: special tokens around a window's text; drop_first: also its first position; positions, without:
    see `Ordinary`; without also has the tokens' names.
    The first position of a window is an attention sink in most language models: in SmolLM2 its norm is about 150 times
    the median, and a few other rows are similar. If kept, they dominate the variance and make any SAE look better than
    it is. The median is that of the first batch's other rows (`calibrate`), then fixed, so that the same limit applies
    to every row and the order of reading does not matter. Norms are computed in float32.
    """

    def __init__(
        self,
        name: str,
        *,
        n_prefix: int,
        n_suffix: int,
        drop_first: bool,
        norm_factor: float | None,
        nonfinite: NonFinite,
        positions: tuple[int, ...] = (),
        without: Mapping[int, str] | None = None,
    ):
        self.name = name
        self.without = dict(without or {})
        self._places = Ordinary(max(n_prefix, int(drop_first)), n_suffix, None, positions, tuple(self.without))
        self.norm_factor = norm_factor
        self._nonfinite = nonfinite
        self.median: float | None = None
        self.counts: dict[str, Any] = _no_counts()

    @property
    def stats(self) -> dict[str, Any]:
        """Counts so far.

        `tokens` counts the text with its special tokens; `padding` is counted in addition. `rows_dropped_first` counts
        dropped positions and the special tokens around windows, `rows_dropped_special` tokens dropped by their id,
        and `dropped_tokens` the same by name.
        """
        return {**self.counts, "norm_median": self.median, "norm_limit": self.limit}

    @property
    def limit(self) -> float | None:
        """The largest norm that passes, or None for no limit."""
        return None if self.norm_factor is None or self.median is None else self.norm_factor * self.median

    @property
    def ordinary(self) -> Ordinary:
        """The same choice of rows for whole windows, without counts; rows that are not finite are left out."""
        return dataclasses.replace(self._places, max_norm=self.limit)

    def twin(self) -> RowFilter:
        """The same filter with counts of its own."""
        twin = copy.copy(self)
        twin.counts = _no_counts()
        return twin

    def load_counts(self, counts: Mapping[str, Any]) -> None:
        """Continue from saved counts; those that an older version did not have are 0."""
        self.counts = {**_no_counts(), **counts}

    def calibrate(self, activations: Tensor, token_ids: Tensor) -> None:
        """Set the median norm from a first batch; arguments as for `__call__`. Counts nothing.

        Raises: ValueError if the median is 0 (most rows are 0): no multiple of it is a useful limit.
        """
        rows, _, _ = self._finite(activations, token_ids)
        norms = rows.float().norm(dim=1)
        median = float(norms.median()) if len(norms) else 0.0
        if self.norm_factor is not None and not median > 0:
            raise ValueError(
                f"the median norm at {self.name} is {median}, so it cannot tell which rows are too large; "
                "turn the norm filter off (norm_factor None)"
            )
        self.median = median

    def __call__(self, activations: Tensor, token_ids: Tensor) -> Rows:
        """activations (windows, width, d_in), token_ids (windows, window >= width) on the CPU -> the rows that pass.

        Positions from `width` on must be padding. Raises: ValueError for NaN or inf, naming the place, unless nonfinite
        is 'drop'.
        """
        rows, places, bad = self._finite(activations, token_ids)
        norms = rows.float().norm(dim=1)
        self._count(token_ids)
        self.counts["rows_dropped_nonfinite"] += bad
        if len(norms):
            self.counts["largest_norm"] = max(self.counts["largest_norm"], float(norms.max()))
        if self.limit is not None:
            kept = norms <= self.limit
            rows, places = rows[kept], places[kept.cpu()]
            self.counts["rows_dropped_norm"] += len(norms) - len(rows)
        self.counts["rows"] += len(rows)
        width = activations.shape[1]
        return Rows(rows, token_ids, places // width, places % width)

    def _count(self, token_ids: Tensor) -> None:
        """Count the tokens of these windows, and those that are left out whatever their activations."""
        tokens = int(is_text(token_ids).sum())
        placed = dataclasses.replace(self._places, without=()).places(token_ids)
        left = self._places.places(token_ids)
        self.counts["tokens"] += tokens
        self.counts["padding"] += token_ids.numel() - tokens
        self.counts["rows_dropped_first"] += tokens - int(placed.sum())
        self.counts["rows_dropped_special"] += int(placed.sum()) - int(left.sum())
        ids, numbers = token_ids[placed & ~left].unique(return_counts=True)
        by_name = dict(self.counts["dropped_tokens"])
        for token, number in zip(ids.tolist(), numbers.tolist(), strict=True):
            by_name[self.without[token]] = by_name.get(self.without[token], 0) + number
        self.counts["dropped_tokens"] = by_name  # a new dict: positions saved earlier hold the old one

    def _finite(self, activations: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, int]:
        """The finite rows at the places kept, these places in the flattened activations, and the count of the rest."""
        width = activations.shape[1]
        places = self._places.places(token_ids)[:, :width].flatten().nonzero()[:, 0]
        rows = activations.flatten(0, 1)[places.to(activations.device)]
        bad = nonfinite_rows(rows)
        count = int(bad.sum())
        if count and self._nonfinite == "raise":
            row = int(bad.nonzero()[0])
            window, position = divmod(int(places[row]), width)
            place = f"window {window} of its batch, position {position}, token id {int(token_ids[window, position])}"
            first = int(self.counts["tokens"]) + int(self.counts["padding"]) + window * token_ids.shape[1] + position
            raise ValueError(
                f"{self.name} gave {count:,} rows with NaN or inf, first in row {first:,} of the stream ({place}): the "
                "model overflows there or its weights are damaged; try float32, or drop such rows (nonfinite 'drop')"
            )
        return (rows[~bad], places[~bad.cpu()], count) if count else (rows, places, 0)


def _no_counts() -> dict[str, Any]:
    return {
        "tokens": 0,
        "padding": 0,
        "rows": 0,
        "rows_dropped_first": 0,
        "rows_dropped_special": 0,
        "dropped_tokens": {},
        "rows_dropped_norm": 0,
        "rows_dropped_nonfinite": 0,
        "largest_norm": 0.0,
    }
