"""Sums whose bits do not depend on the number of CPU threads."""

from __future__ import annotations

import torch
from torch import Tensor

SERIAL_SUM = 16384


def total(squares: Tensor) -> Tensor:
    """The sum of a float64 vector (N,), in a fixed order."""
    # torch splits a full sum of 32768 numbers or more over its threads; in a compiled graph the compiler sums.
    if torch.compiler.is_compiling() or squares.numel() <= SERIAL_SUM:
        return squares.sum()
    return torch.stack([piece.sum() for piece in squares.flatten().split(SERIAL_SUM)]).sum()


def sum_of_squares(t: Tensor) -> Tensor:
    """Σ t² of (N, D), by rows and then in float64: one pass, no copy."""
    return total(torch.linalg.vector_norm(t, dim=-1).double().square())


def fixed_sum(t: Tensor) -> Tensor:
    """The sum of t, in its dtype, added in float64; the rows of a float32 matrix in float32, without a wider copy."""
    # torch gives each row to one thread, but splits a single one.
    by_rows = t.ndim == 2 and t.shape[0] > 1 and t.dtype.itemsize >= 4
    parts = t.sum(-1) if by_rows else t.flatten()
    return total(parts.double()).to(t.dtype)
