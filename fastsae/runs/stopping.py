"""What ends a training run early: signals, and numbers that are not finite."""

from __future__ import annotations

import math
import os
import signal
import threading
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

SKIPS_IN_A_ROW = 10
"""Steps in a row that changed nothing, after which a run ends: the next batches will be no better."""
READ_AFTER = 1024
"""Steps whose numbers stay on the device at most, where a run reads none for that long."""
DROP = "Drop these rows where the activations are made"
CALM = "use a lower learning rate, a longer warm-up or normalized activations"


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
    """For torch's optimizers, which would write NaN: ends a run at the first bad batch or loss.

    On a CPU each batch is looked at before it is trained on, so that no parameter is touched by a bad one. On another
    device the looks are queued with the step's own work and read where the run reads numbers anyway (`read`).
    """

    ended: NonFiniteError | None = None
    """None: this guard raises where it finds something."""

    def __init__(self, device: torch.device):
        self._immediate = device.type == "cpu"
        self._input = torch.zeros(4, dtype=torch.int64, device=device)  # first bad step (0: none), and its rows
        self._loss = torch.zeros((), dtype=torch.int64, device=device)  # first step with a bad loss

    def look_at_input(self, x: Tensor, step: int) -> None:
        """x (n, D) of the given step (from 1). Raises NonFiniteError on a CPU; elsewhere only notes it."""
        rows, first = bad_rows(x)
        if self._immediate:
            if int(rows):
                raise _stopped_at_rows(step, int(rows), x.shape[0], int(first))
            return
        found = torch.stack([torch.full_like(rows, step), rows, torch.full_like(rows, x.shape[0]), first])
        self._input = torch.where((self._input[0] == 0) & (rows > 0), found, self._input)

    def look_at_metrics(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """What the step returned. Raises NonFiniteError for a bad loss on a CPU; elsewhere only notes it."""
        bad = ~torch.isfinite(metrics["loss"].detach())
        if self._immediate:
            if bool(bad):
                raise _stopped_at_loss(step)
            return
        self._loss = torch.where((self._loss == 0) & bad, torch.full_like(self._loss, step), self._loss)

    def read(self) -> None:
        """Raises NonFiniteError if any look since the start found something. Waits for the device."""
        if self._immediate:
            return
        first, *rows, loss = torch.cat([self._input, self._loss[None]]).tolist()
        if first and (not loss or first <= loss):
            raise _stopped_at_rows(first, *rows)
        if loss:
            raise _stopped_at_loss(loss)


class SkipGuard:
    """For a fused step, which makes no update of a bad batch: says once where, and ends a run that only skips.

    `ended` is the error to raise when SKIPS_IN_A_ROW steps in a row were skipped; nothing is wrong with the weights
    then, so they can be saved first. On a CPU it is set after that very step. On another device the numbers are noted
    there and read where the run reads numbers anyway (`read`), at the latest after READ_AFTER steps.
    The steps in a row are those of this process: a run that goes on from a checkpoint may skip as many again.

    skipped: how many the step had skipped before the first that this sees.
    """

    def __init__(self, device: torch.device, skipped: int):
        self.ended: NonFiniteError | None = None
        self._immediate, self._skipped = device.type == "cpu", skipped
        self._x: Tensor | None = None
        self._noted: list[tuple[int, int, Tensor]] = []  # step, rows of the batch, (skipped, bad rows, first of them)
        self._in_a_row, self._began, self._said = 0, (0, ""), False

    def look_at_input(self, x: Tensor, step: int) -> None:
        """x (n, D) of the given step (from 1); its rows are counted when the step has said whether it skipped."""
        self._x = x

    def look_at_metrics(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """What the step returned for the input before: "skipped" is the running number. Warns at the first skip."""
        x, self._x = self._x, None
        assert x is not None
        if self._immediate and int(metrics["skipped"]) == self._skipped:
            self._in_a_row = 0
            return
        self._noted.append((step, x.shape[0], torch.stack([metrics["skipped"], *bad_rows(x)])))
        if self._immediate or len(self._noted) == READ_AFTER:
            self.read()

    def read(self) -> None:
        """Takes in what was noted: warns at the first skip, sets `ended`. Waits for the device."""
        noted, self._noted = self._noted, []
        values = torch.stack([found for _, _, found in noted]).tolist() if noted else []
        for (step, of, _), (skipped, rows, first) in zip(noted, values, strict=True):
            if skipped == self._skipped:
                self._in_a_row = 0
                continue
            self._skipped, self._in_a_row = skipped, self._in_a_row + 1
            what = _rows(rows, of, first) if rows else "the loss or a gradient is not finite although the rows are"
            if self._in_a_row == 1:
                self._began = (step, what)
            if not self._said:
                self._said = True
                warnings.warn(
                    f"step {step}: {what}. The step changed nothing and the run goes on; further ones are counted "
                    'without a warning, as "skipped" in metrics.jsonl',
                    RuntimeWarning,
                    stacklevel=2,
                )
            if self._in_a_row == SKIPS_IN_A_ROW and self.ended is None:
                begin, what = self._began
                self.ended = NonFiniteError(
                    f"step {begin}: {what}. From there to step {step}, {SKIPS_IN_A_ROW} steps in a row changed "
                    "nothing, so training stopped; everything up to there is saved. "
                    + (DROP if rows else f"Go on from an earlier checkpoint and {CALM}"),
                    begin,
                )


@torch.no_grad()
def look_at_parameters(module: nn.Module, step: int) -> None:
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


def bad_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """How many rows of x (n, D) hold NaN or infinity, and the first of them (0 where there is none): 0-d int64."""
    # The largest magnitude hands on NaN and, unlike a sum, cannot overflow; it needs no mask as large as x.
    bad = ~torch.isfinite(torch.linalg.vector_norm(x, ord=math.inf, dim=-1))
    return bad.sum(), bad.int().argmax()


def _rows(rows: int, of: int, first: int) -> str:
    return f"{rows} of {of} rows of activations hold NaN or infinity, the first is row {first} of the batch"


def never_begun(x: Tensor) -> NonFiniteError:
    """The error of a run whose first batches, x (n, D) and those after it, are all bad."""
    rows, first = (int(value) for value in bad_rows(x))
    return NonFiniteError(
        f"step 1: {_rows(rows, x.shape[0], first)}, and each of the first {SKIPS_IN_A_ROW} batches holds such rows. "
        f"Training did not begin. {DROP}",
        1,
    )


def _stopped_at_rows(step: int, rows: int, of: int, first: int) -> NonFiniteError:
    return NonFiniteError(
        f"step {step}: {_rows(rows, of, first)}. Training stopped and nothing of this step is saved. {DROP}", step
    )


def _stopped_at_loss(step: int) -> NonFiniteError:
    return NonFiniteError(
        f"step {step}: the loss is not finite although the activations are. Training stopped and nothing of this step "
        f"is saved; {CALM}",
        step,
    )
