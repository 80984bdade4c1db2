"""Narrow copies of rows: t̂ = fp16(t · 2ᵉ), with ‖t̂‖ and ‖t - t̂‖ measured at the cast by `stages.narrow_rows`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.gpu.plan import cdiv
from fastsae.backends.gpu.stages import EncodeStages

WIDEST = 65504
"""Most columns of a row: products of two narrow rows are below that in magnitude, so they fit fp16."""
ALIGNMENT = 16
"""Columns of a narrow copy are padded with zeros to a multiple of this: products are fast on whole 32-byte sectors."""


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


def screening_copy(stages: EncodeStages, W: Tensor, kept: Narrow | None, precision: str) -> Narrow:
    """What an encoder screens with: the copy that was kept, or a new one; in float32 for precision "fp32"."""
    if kept is not None and precision != "fp32":
        return kept
    return narrowed(stages, W, torch.float32 if precision == "fp32" else torch.float16)
