"""What the latent-major steps are handed: the occupied slots of all terms in latent order, long latents in pieces."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

Moments = tuple[Tensor | None, Tensor | None]
"""Adam's m and v of one parameter; None where the parameter is absent."""


@dataclass(frozen=True)
class Pieces:
    """first (M+1,) int32: the first piece of each latent, ascending; first[M] is how many there are. None where no
    latent can be long. length: entries of a piece; capacity: the most pieces that there can be."""

    first: Tensor | None
    length: int
    capacity: int


@dataclass(frozen=True)
class Entries:
    """The occupied slots of all terms in latent order, and the matrices their rows are in.

    starts (M+1,) int64; rows (slots,) int32 and acts (slots,) float32; row r is row r of x and grad, or from `split` on
    row r - split of more_x and more_grad (None with one term).
    """

    starts: Tensor
    rows: Tensor
    acts: Tensor
    x: Tensor
    more_x: Tensor | None
    grad: Tensor
    more_grad: Tensor | None
    split: int
    pieces: Pieces
