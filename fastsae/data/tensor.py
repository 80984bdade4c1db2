"""Shuffled training rows from a tensor in memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastsae.data.source import EpochSource, nonfinite_rows, permutation


class TensorSource(EpochSource):
    """Rows of `x` (rows, d_in), any float dtype and device, in a new random order every epoch.

    The last `holdout` rows are held out: activations come in windows of text, so a random choice would leave
    neighbours of nearly every held-out row in training. `x` is not copied.
    Raises: ValueError for a wrong shape or dtype, NaN or inf (naming the first row), or a holdout that leaves no row.
    """

    def __init__(self, x: Tensor, holdout: int = 2048, seed: int = 0):
        if x.ndim != 2 or not x.is_floating_point():
            raise ValueError(f"expected a float tensor (rows, d_in), got {x.dtype} of shape {tuple(x.shape)}")
        if not 0 <= holdout < len(x):
            raise ValueError(f"holdout must be 0 or more and leave rows to train on: got {holdout} of {len(x)} rows")
        bad = nonfinite_rows(x)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise ValueError(f"{int(bad.sum()):,} of {len(x):,} rows hold NaN or inf, first row {first}; drop them")
        super().__init__(len(x) - holdout, x.shape[1], seed)
        self.x = x.detach()
        self._order: tuple[int, Tensor] | None = None

    @property
    def stats(self) -> dict[str, Any]:
        return {"epoch": self._epoch}

    def held_out(self) -> Tensor:
        return self.x[self._rows_per_epoch :]

    def _identity(self) -> dict[str, Any]:
        return {"source": "tensor", "seed": self.seed, "rows": self._rows_per_epoch, "d_in": self.d_in}

    def _take(self, epoch: int, start: int, n: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self._rows_per_epoch, self.seed, epoch))
        return self.x[self._order[1][start : start + n].to(self.x.device)]
