"""What ends a training run early: signals, and numbers that are not finite."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


class TrainingInterrupted(KeyboardInterrupt):
    """A run that was asked to stop and has saved where it was. `signal`: which signal asked."""

    def __init__(self, message: str, signum: signal.Signals):
        super().__init__(message)
        self.signal = signum


class NonFiniteError(RuntimeError):
    """NaN or infinity in the activations, the loss or the parameters. `step`: where it was first seen."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class StopSignals:
    """While it is entered, the first Ctrl-C (SIGINT) or SIGTERM is only noted; a second one stops at once.

    Outside the main thread Python hands out no signals, and this does nothing.
    """

    def __init__(self) -> None:
        self.requested: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        name = signal.Signals(signum)
        if self.requested is not None:
            raise KeyboardInterrupt(
                f"{name.name}, the second: stopped at once, nothing saved since the last checkpoint"
            )
        self.requested = name
        # os.write, because a handler may run in the middle of a buffered write to the same stream.
        line = f"\n{name.name}: finishing this step and writing a checkpoint; once more stops at once\n"
        os.write(2, line.encode())


class FiniteGuard:
    """Notices NaN and infinities before they reach a checkpoint.

    On a CPU each batch is looked at before it is trained on, so that no parameter is touched by a bad one. On another
    device the looks are queued with the step's own work and read where the run reads numbers anyway (`raise_noted`).
    """

    def __init__(self, device: torch.device):
        self._immediate = device.type == "cpu"
        self._input = torch.zeros(2, dtype=torch.int64, device=device)  # first bad step (0: none), its bad rows
        self._loss = torch.zeros((), dtype=torch.int64, device=device)  # first step with a bad loss

    def look_at_input(self, x: Tensor, step: int) -> None:
        """x (n, D) of the given step (from 1). Raises NonFiniteError on a CPU; elsewhere only notes it."""
        if self._immediate:
            # One sum sees any NaN or infinity. It may itself overflow, so the rows are asked before raising.
            if not bool(torch.isfinite(x.sum(dtype=_wide(x)))):
                bad = ~torch.isfinite(x).all(-1)
                if bool(bad.any()):
                    raise _bad_rows(step, int(bad.sum()), x.shape[0], int(bad.nonzero()[0]))
            return
        rows = (~torch.isfinite(x.sum(-1, dtype=_wide(x)))).sum()
        found = torch.stack([torch.full_like(rows, step), rows])
        self._input = torch.where((self._input[0] == 0) & (rows > 0), found, self._input)

    def look_at_loss(self, loss: Tensor, step: int) -> None:
        """The step's loss, 0-d. Raises NonFiniteError on a CPU; elsewhere only notes it."""
        bad = ~torch.isfinite(loss.detach())
        if self._immediate:
            if bool(bad):
                raise _bad_loss(step)
            return
        self._loss = torch.where((self._loss == 0) & bad, torch.full_like(self._loss, step), self._loss)

    def raise_noted(self) -> None:
        """Raises NonFiniteError if any look since the start found something. Waits for the device."""
        if self._immediate:
            return
        first, rows, loss = torch.cat([self._input, self._loss[None]]).tolist()
        if first and (not loss or first <= loss):
            raise _bad_rows(first, rows, None, None)
        if loss:
            raise _bad_loss(loss)

    @torch.no_grad()
    def look_at_parameters(self, module: nn.Module, step: int) -> None:
        """Raises NonFiniteError naming a parameter that is not finite; a pass over all of them, for checkpoints."""
        for name, parameter in module.named_parameters():
            # aminmax hands on NaN, and needs no mask as large as the parameter.
            low, high = torch.aminmax(parameter)
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                raise NonFiniteError(
                    f"after step {step} the parameter {name} holds NaN or infinity; it is not saved. "
                    "Go on from the newest checkpoint with a lower learning rate or a longer warm-up",
                    step,
                )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _bad_rows(step: int, rows: int, of: int | None, first: int | None) -> NonFiniteError:
    total = "" if of is None else f" of {of}"
    which = "" if first is None else f", the first is row {first} of the batch"
    return NonFiniteError(
        f"step {step}: {rows}{total} rows of activations hold NaN or infinity{which}. Training stopped and nothing of "
        "this step is saved; drop these rows where the activations are made",
        step,
    )


def _bad_loss(step: int) -> NonFiniteError:
    return NonFiniteError(
        f"step {step}: the loss is not finite although the activations are. Training stopped and nothing of this step "
        "is saved; use a lower learning rate, a longer warm-up or normalized activations",
        step,
    )
