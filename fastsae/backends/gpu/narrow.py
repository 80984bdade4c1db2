"""Narrow copies of rows: t̂ = fp16(t · 2ᵉ), with ‖t̂‖ and ‖t - t̂‖ measured at the cast by `stages.narrow_rows`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.gpu.plan import cdiv
from fastsae.backends.gpu.stages import EncodeStages

WIDEST = 65504
"""Most columns of a row: products of two narrow rows are below that in magnitude, so they fit fp16."""
ALIGNMENT = 16
"""Columns of a narrow copy are padded with zeros to a multiple of this: products are fast on whole 32-byte sectors."""
SAMPLED = 256
"""Rows of a kept copy that are compared with W before it is used."""


@dataclass(frozen=True)
class Narrow:
    """low (rows, padded D) fp16; scale, norm, residual fp32 (rows,): t̂ = low · scale, ‖t̂‖, ‖t - t̂‖, rounded up."""

    low: Tensor
    scale: Tensor
    norm: Tensor
    residual: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.low, self.scale, self.norm, self.residual]


def padded_width(D: int) -> int:
    return cdiv(D, ALIGNMENT) * ALIGNMENT


def allocate(t: Tensor, dtype: torch.dtype = torch.float16) -> Narrow:
    """Memory for a narrow copy of t (rows, D), not filled.

    None of it is an inference tensor: training may update a copy that was made under torch.inference_mode.
    """
    rows, D = t.shape
    with torch.inference_mode(False):
        low = buffers.empty((rows, padded_width(D)), dtype, t.device)
        return Narrow(low, *(buffers.empty((rows,), torch.float32, t.device) for _ in range(3)))


def narrowed(stages: EncodeStages, t: Tensor, dtype: torch.dtype = torch.float16) -> Narrow:
    """A narrow copy of t (rows, D)."""
    copy = allocate(t, dtype)
    stages.narrow_rows(t, *copy.tensors())
    return copy


def trusted(kept: Narrow, W: Tensor) -> Narrow:
    """A kept copy for a W that may have been written since, as through `.data`, of which torch keeps no record.

    Some rows are compared. If one of them is farther from W than its residual says, the residuals of all become
    infinite: then no bound excludes a latent, and every token is scored from W itself. The host reads nothing back.
    """
    step = max(1, W.shape[0] // SAMPLED)
    rows, low, up = W[::step].float(), kept.low[::step, : W.shape[1]].float(), kept.scale[::step].reciprocal()
    lost = torch.linalg.vector_norm(torch.addcmul(low, rows, up[:, None], value=-1), dim=1)
    # In units of the row, where no square overflows; the residual was rounded too. NaN, of rows with NaN, is not above.
    stale = (lost > kept.residual[::step] * up * (1 + 2.0**-10) + 2.0**-20).any()
    return replace(kept, residual=torch.where(stale, float("inf"), kept.residual))


def screening_copy(stages: EncodeStages, W: Tensor, kept: Narrow | None, precision: str) -> Narrow:
    """What an encoder screens with: the copy that was kept, or a new one; in float32 for precision "fp32"."""
    if kept is not None and precision != "fp32":
        return trusted(kept, W)
    return narrowed(stages, W, torch.float32 if precision == "fp32" else torch.float16)
