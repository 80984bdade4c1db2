"""A bound on the registers of a thread, where the compiler takes one."""

from __future__ import annotations

import torch


def register_limit(registers: int) -> dict[str, int]:
    """Launch options: at most this many registers a thread.

    Without a limit ptxas spills a few numbers to fit one more block on a multiprocessor, and where it does so changes
    with its version; with a limit it uses all of them. AMD's compiler has no such option.
    """
    return {} if torch.version.hip else {"maxnreg": registers}
