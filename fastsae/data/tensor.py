"""Shuffled training rows from a tensor in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.data.source import EpochSource, nonfinite_rows, permutation


class TensorSource(EpochSource):
    """Rows of `x` (rows, d_in), any float dtype and device, in a new random order every epoch.

    The last `holdout` rows are held out: activations come in windows of text, so a random choice would leave
    neighbours of nearly every held-out row in training. `x` is not copied.
    target: the rows' targets (rows, d_target) for a transcoder, in the dtype and on the device of x.
    Raises: ValueError for a wrong shape or dtype, NaN or inf (naming the first row), or a holdout that leaves no row.
    """

    def __init__(self, x: Tensor, holdout: int = 2048, seed: int = 0, target: Tensor | None = None):
        _check(x, "rows", "d_in")
        if target is not None:
            _check(target, "targets", "d_target")
            if len(target) != len(x) or (target.dtype, target.device) != (x.dtype, x.device):
                raise ValueError(
                    f"expected targets ({len(x)}, d_target) {x.dtype} on {x.device} like the rows, got "
                    f"{tuple(target.shape)} {target.dtype} on {target.device}"
                )
        if not 0 <= holdout < len(x):
            raise ValueError(f"holdout must be 0 or more and leave rows to train on: got {holdout} of {len(x)} rows")
        super().__init__(len(x) - holdout, x.shape[1], seed, None if target is None else target.shape[1])
        self.x = x.detach()
        self.target = None if target is None else target.detach()
        self._order: tuple[int, Tensor] | None = None

    @property
    def stats(self) -> dict[str, Any]:
        return {"epoch": self._epoch}

    def held_out(self) -> Tensor:
        return self.x[self._rows_per_epoch :]

    def held_out_targets(self) -> Tensor:
        """See TargetSource. Raises ValueError where there are no targets."""
        if self.target is None:
            raise ValueError("this source has no targets: open it with target=")
        return self.target[self._rows_per_epoch :]

    def _identity(self) -> dict[str, Any]:
        more = {} if self.d_target is None else {"d_target": self.d_target}
        return {"source": "tensor", "seed": self.seed, "rows": self._rows_per_epoch, "d_in": self.d_in, **more}

    def _place(self, epoch: int, index: int) -> str:
        return f"row {int(self._order_of(epoch)[index]):,} of the tensor"

    def _order_of(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, permutation(self._rows_per_epoch, self.seed, epoch))
        return self._order[1]

    def _take(self, epoch: int, start: int, n: int) -> Tensor:
        places = self._order_of(epoch)[start : start + n].to(self.x.device)
        return self.x[places] if self.target is None else torch.cat([self.x[places], self.target[places]], dim=1)


def _check(x: Tensor, what: str, width: str) -> None:
    """Raises ValueError for anything but finite rows."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"expected a float tensor (rows, {width}), got {x.dtype} of shape {tuple(x.shape)}")
    bad = nonfinite_rows(x)
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(f"{int(bad.sum()):,} of {len(x):,} {what} hold NaN or inf, first row {first}; drop them")
