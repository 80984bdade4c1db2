"""A bound on the registers of a thread, where the compiler takes one."""

from __future__ import annotations

import torch


def register_limit(registers: int) -> dict[str, int]:
    """Launch options: at most so many registers a thread.

    Left to itself ptxas spills a few numbers to fit one more block on a multiprocessor, and where it does so changes
    with its version; told how many there are, it uses them. AMD's compiler has no such option.
    """
    return {} if torch.version.hip else {"maxnreg": registers}
