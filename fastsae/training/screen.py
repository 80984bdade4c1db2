"""KeptScreen: the low-precision copy of an encoder between steps, rebuilt after other code wrote the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsae import ops
from fastsae.codes import Screen
from fastsae.ops.held import REDONE_LIMIT

# The screen is rebuilt after SCREEN_LIFE steps, or after SCREEN_TRIAL if more than REDONE_LIMIT of tokens are redone.
SCREEN_LIFE = 64
SCREEN_TRIAL = 2


def shared_backend(encoder: str | None, update: str | None) -> str | None:
    """The backend whose copy both can read; None: the fastest.

    No backend reads another one's copy: for two different backends it is the reference, which keeps none.
    """
    return encoder or update if None in (encoder, update) or encoder == update else "reference"


class KeptScreen:
    """`update_latents_` maintains the copy; this class decides when to rebuild it.

    It detects other writes by address and version, and on a CPU also by a sample of one weight in every row, because a
    write through `.data` changes neither; on a GPU the encoder compares 256 rows in each call. Such a write goes
    undetected where it misses those samples.
    `screen` is None where the backend or the rule uses none.

    W returns (M, D_in), b (M,): the encoder. k: returns the active latents per token, or None. used: whether the
    encoder uses a screen at all. backend: returns the backend whose copy it is.

    The current inputs determine the format and its basis. Speed depends on them, and with precision="screened" the
    selection too: such a run is reproducible only from its start, not from a state loaded in the middle.
    """

    def __init__(
        self, W: Callable[[], Tensor], b: Tensor, k: Callable[[], int | None], used: bool,
        backend: Callable[[], str | None],
    ):  # fmt: skip
        self.W, self.b, self.k, self.used, self.backend = W, b, k, used, backend
        self.in_place = False  # a CUDA graph needs the copy at the same address
        self.screen: Screen | None = None
        self.redone: Tensor | None = None  # share of tokens, in the last step
        self._seen: tuple[Any, ...] | None = None
        self._age = 0
        self._sample: Tensor | None = None

    def make(self, encoder_input: Tensor | None) -> None:
        """Rebuilds the copy."""
        fresh = None
        if self.used:
            fresh = ops.prepare_screen(self.W(), self.b, x=encoder_input, k=self.k(), backend=self.backend())
        if self.in_place and self.screen is not None and fresh is not None:
            for place, made in zip(self.screen.tensors, fresh.tensors, strict=True):
                place.copy_(made)
        else:
            self.screen = fresh
        self._age = 0
        self.remember()

    @torch.no_grad()
    def current(self, encoder_input: Tensor) -> Screen | None:
        """The copy for a step that encodes `encoder_input`, rebuilt if needed."""
        written = self.written()
        if written or self._outgrown() or (
            self._sample is not None and not torch.equal(self._sample, self._fingerprint())
        ):  # fmt: skip
            self.make(encoder_input.detach())
        self._age += 1
        return self.screen

    def written(self) -> bool:
        """Whether torch says that the weights changed since `remember`."""
        return self._seen != self._signature()

    def remember(self) -> None:
        """Records that the copy matches the current weights."""
        self._seen = self._signature()
        # Comparing is a host sync, so on a GPU there is no sample.
        sampled = self.screen is not None and self.b.device.type == "cpu"
        self._sample = self._fingerprint() if sampled else None

    def _outgrown(self) -> bool:
        """Whether the screen's format should be chosen again: training changes how well it separates latents."""
        if self.screen is None or self.redone is None or self.redone.device.type != "cpu":
            return False  # reading it on a GPU would be a host sync
        return self._age >= SCREEN_LIFE or (self._age >= SCREEN_TRIAL and float(self.redone) > REDONE_LIMIT)

    def _signature(self) -> tuple[Any, ...]:
        W = self.W()
        return W.data_ptr(), W._version, self.b.data_ptr(), self.b._version, self.backend()

    def _fingerprint(self) -> Tensor:
        """One weight of every row and every bias, as bits, so that NaN equals itself. 0.06 ms at M = 24576, D = 768."""
        W, b = self.W().detach(), self.b.detach()
        rows = torch.arange(W.shape[0], dtype=torch.int64, device=W.device)
        parts = (W.take(rows * W.shape[1] + rows * 7919 % W.shape[1]), b)
        # Not torch.cat of these: autocast changes its dtype.
        return torch.cat([part.view(torch.uint8) for part in parts])
