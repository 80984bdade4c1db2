"""Which rows of a window to train on, and how many were dropped, by reason."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor

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

    first, last  positions at either end of a window that are not: an attention sink, special tokens.
    max_norm     the largest norm of an ordinary activation; None: any.

    A token whose activation is not finite is never ordinary. Where a model generates token by token, a pass sees one
    token at a time and positions mean nothing: give max_norm alone.
    """

    first: int = 1
    last: int = 0
    max_norm: float | None = None

    def __call__(self, activations: Tensor) -> Tensor:
        norms = activations.float().norm(dim=-1)
        found = torch.isfinite(norms) if self.max_norm is None else norms <= self.max_norm
        found[..., : self.first] = False
        if self.last:
            found[..., -self.last :] = False
        return found


class RowFilter:
    """Drops special tokens, first positions, rows that are not finite, and rows of norm > norm_factor x median norm.

    The first position of a window is an attention sink in most language models: in SmolLM2 its norm is about 150 times
    the median, and a few other rows are like it. If kept, they are most of the variance and flatter any SAE. The median
    is that of the first batch's other rows (`calibrate`), then fixed, so that the same limit applies to every row and
    the order of reading does not matter. Norms in float32.
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
    ):
        self.name = name
        self._first = max(n_prefix, int(drop_first))
        self._n_suffix = n_suffix
        self.norm_factor = norm_factor
        self._nonfinite = nonfinite
        self.median: float | None = None
        self.counts: dict[str, int | float] = {
            "tokens": 0,
            "rows": 0,
            "rows_dropped_first": 0,
            "rows_dropped_norm": 0,
            "rows_dropped_nonfinite": 0,
            "largest_norm": 0.0,
        }

    @property
    def stats(self) -> dict[str, Any]:
        """Counts so far; `rows_dropped_first` counts first positions and special tokens."""
        return {**self.counts, "norm_median": self.median, "norm_limit": self.limit}

    @property
    def limit(self) -> float | None:
        """The largest norm that passes, or None for no limit."""
        return None if self.norm_factor is None or self.median is None else self.norm_factor * self.median

    @property
    def ordinary(self) -> Ordinary:
        """The same choice of rows for whole windows, without counts; rows that are not finite are left out."""
        return Ordinary(self._first, self._n_suffix, self.limit)

    def twin(self) -> RowFilter:
        """The same filter with counts of its own."""
        twin = copy.copy(self)
        twin.counts = dict.fromkeys(self.counts, 0)
        return twin

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
        """activations (windows, window, d_in), token_ids (windows, window) on the CPU -> the rows that pass.

        Raises: ValueError for NaN or inf, naming the place, unless nonfinite is 'drop'.
        """
        rows, places, bad = self._finite(activations, token_ids)
        norms = rows.float().norm(dim=1)
        self.counts["tokens"] += token_ids.numel()
        self.counts["rows_dropped_first"] += token_ids.numel() - len(places) - bad
        self.counts["rows_dropped_nonfinite"] += bad
        if len(norms):
            self.counts["largest_norm"] = max(self.counts["largest_norm"], float(norms.max()))
        if self.limit is not None:
            kept = norms <= self.limit
            rows, places = rows[kept], places[kept.cpu()]
            self.counts["rows_dropped_norm"] += len(norms) - len(rows)
        self.counts["rows"] += len(rows)
        width = token_ids.shape[1]
        return Rows(rows, token_ids, places // width, places % width)

    def _finite(self, activations: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, int]:
        """The finite rows in the positions kept, their places in the flattened windows, and the count of the rest."""
        windows, width = token_ids.shape
        places = torch.arange(windows * width, dtype=torch.int64, device="cpu").view(windows, width)
        inside = slice(self._first, width - self._n_suffix)
        rows, places = activations[:, inside].flatten(0, 1), places[:, inside].flatten()
        bad = nonfinite_rows(rows)
        count = int(bad.sum())
        if count and self._nonfinite == "raise":
            row = int(bad.nonzero()[0])
            window, position = divmod(int(places[row]), width)
            place = f"window {window} of its batch, position {position}, token id {int(token_ids[window, position])}"
            raise ValueError(
                f"{self.name} gave {count:,} rows with NaN or inf, first in row "
                f"{int(self.counts['tokens']) + int(places[row]):,} of the stream ({place}): the model overflows there "
                "or its weights are damaged; try float32, or drop such rows (nonfinite 'drop')"
            )
        return (rows[~bad], places[~bad.cpu()], count) if count else (rows, places, 0)
