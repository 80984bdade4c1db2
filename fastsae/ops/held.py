"""HeldScreen: an encoder's low-precision copy, held from call to call for as long as the weights stay what they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsae.backends import choose
from fastsae.codes import Held, Screen, reads_are_free

REDONE_LIMIT, JUDGED_TOKENS = 0.01, 1024
"""Share of tokens that had to be redone, above which a copy is made anew, for the inputs that come now; of how many."""


def plain_on_cpu(t: Tensor) -> bool:
    """Whether t is a tensor on the CPU whose numbers may be looked at now: nothing traces or transforms this call."""
    if not reads_are_free(t) or torch.jit.is_tracing():  # a graph would keep a copy as a constant
        return False
    ordinary = type(t) in (Tensor, torch.nn.Parameter) and not t.is_neg()
    return ordinary and not torch._C._are_functorch_transforms_active()


@dataclass(eq=False)
class HeldScreen:
    """A place for the low-precision copy of one encoder: pass the same one as `screen=` with every call.

    A CPU backend makes the copy once enough tokens came to repay it. Before each use it looks at all of W and makes the
    copy anew if W has changed, however it was written, so results are always those of a call without it. Nothing is
    held on a GPU, in float64, with another precision than "exact", or under torch.compile.
    It is meant for weights that rest; an optimizer updates a copy with the weights (`ops.prepare_screen`).
    Copied or pickled, it is empty. Memory: about a quarter of an fp32 W in 8 bits, half of it in bf16.
    """

    held: Held | None = None
    tokens: int = 0  # encoded with this copy
    redone: int = 0  # of them

    def current(
        self, x: Tensor, W: Tensor, b: Tensor, k: int | None, backend: str | None, precision: str
    ) -> Screen | None:
        """The copy for encoding x (N, D), if one pays; k: active latents per token, None where thresholds decide."""
        narrowed = precision == "exact" and W.dtype in (torch.float32, torch.bfloat16) and W.is_contiguous()
        if not narrowed or not all(plain_on_cpu(t) for t in (x, W, b)):
            return None
        fits = x.dtype == b.dtype == W.dtype and x.shape[-1] == W.shape[-1] and b.shape == W.shape[:1]
        if not fits or not (k is None or (isinstance(k, int) and 1 <= k <= W.shape[0])):
            return None  # the op says what is wrong
        given = W.detach(), b.detach()
        hold = getattr(choose("prepare_screen", backend, *given), "hold_screen", None)
        if hold is None:
            return None
        held, screen = hold(self.held, *given, x.detach(), k)
        if held is not self.held:
            self.held, self.tokens, self.redone = held, 0, 0
        return screen

    def served(self, tokens: int, redone: Tensor) -> None:
        """Counts tokens encoded with the copy, `redone` of them again; drops a copy that serves badly."""
        self.tokens, self.redone = self.tokens + tokens, self.redone + int(redone)
        if self.tokens >= JUDGED_TOKENS and self.redone > REDONE_LIMIT * self.tokens:
            self.held = None

    def __reduce__(self) -> tuple[Any, ...]:
        return HeldScreen, ()
