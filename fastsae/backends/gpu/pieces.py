"""Long latents cut into pieces of equal length, so that no program has much more to add up than another.

A latent with more than `length` entries is summed by pieces: one program adds the entries of one piece into a row of a
workspace, and the latent's own program adds those rows in order. Short latents have no piece. Only the device knows the
number of pieces, so the launch grid is the most there can be, and a program past the last piece returns:

    Σ over long latents of ceil(count/length) <= nnz/length + (long latents) <= nnz/length + nnz/(length + 1)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastsae.backends.gpu.plan import cdiv
from fastsae.backends.gpu.stages import Pieces

SHORTEST = 64
"""Entries below which cutting costs more than it evens out."""


def cut(piece_starts: Callable[[Tensor, int], Tensor], starts: Tensor, slots: int, tokens: int) -> Pieces:
    """The pieces of a code in latent order: starts (M+1,) int64, over at most `slots` entries of `tokens` tokens.
    piece_starts: the stage.

    The length is eight tokens' worth of slots. Then a quarter as many workspace rows as tokens always suffice (1.03 at
    SHORTEST), and at N = 8192 a piece is a hundredth of what each of a hundred multiprocessors has to add.
    """
    length = max(SHORTEST, 8 * cdiv(slots, max(tokens, 1)))
    length = cdiv(length, 16) * 16
    if slots <= length:
        return Pieces(None, length, 0)
    return Pieces(piece_starts(starts, length), length, slots // length + slots // (length + 1))
