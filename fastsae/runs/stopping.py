"""What ends a training run early: signals, and numbers that are not finite."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.training.skipped import worst_rows
from fastsae.warn import warn

SKIPS_IN_A_ROW = 10
"""Steps in a row that changed nothing, after which a run ends: the next batches will be no better."""
READ_AFTER = 1024
"""At most this many steps' numbers stay on the device before they are read."""
DROP = "Drop these rows where the activations are made"
CALM = "use a lower learning rate, a longer warm-up or normalized activations"


class TrainingInterrupted(KeyboardInterrupt):
    """A run that was asked to stop and has saved where it was. `signal`: which signal asked.

    goes_on: whether the run can be continued: there is a checkpoint, and steps are left.
    """

    def __init__(self, message: str, signum: signal.Signals, *, goes_on: bool = False):
        super().__init__(message)
        self.signal, self.goes_on = signum, goes_on


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
            raise KeyboardInterrupt(f"second {name.name}: stopped at once, nothing saved since the last checkpoint")
        self.requested = name
        # os.write, because a handler may run in the middle of a buffered write to the same stream.
        line = f"\n{name.name}: finishing this step and writing a checkpoint; a second one stops at once\n"
        os.write(2, line.encode())


Origin = Callable[[Sequence[int]], list[str]]
"""Where rows of a batch come from, by their numbers in it: see fastsae.data.source.origin_of."""


class SkipGuard:
    """A step skips a bad batch: this warns once, with the place, and ends a run that only skips.

    `ended` is the error to raise when SKIPS_IN_A_ROW steps in a row were skipped; the weights are fine then, so they
    can be saved first. On a CPU it is set right after that step. On another device the numbers are kept there and read
    when the run reads numbers anyway (`read`), at the latest after READ_AFTER steps.
    The steps in a row are those of this process: a run that resumes from a checkpoint may skip as many again.

    skipped: how many the step had skipped before the first that this sees. alone: whether x are all rows of a step.
    """

    def __init__(self, device: torch.device, skipped: int, *, alone: bool = True):
        self.ended: NonFiniteError | None = None
        self._immediate, self._skipped = device.type == "cpu", skipped
        self._seen: tuple[Tensor, Origin | None] | None = None
        # Step, rows of the batch, where they come from, (skipped, bad rows, the worst of them).
        self._noted: list[tuple[int, int, Origin | None, Tensor]] = []
        self._in_a_row, self._began, self._said = 0, (0, ""), False
        whose = "the rows are" if alone else "this process's rows are; look at what the others say"
        self._why_else = f"the loss or a gradient is not finite although {whose}"

    def look_at_input(self, x: Tensor, origin: Origin | None = None) -> None:
        """x (n, D) of the coming step; its rows are counted when the step has said whether it skipped."""
        self._seen = (x, origin)

    def look_at_metrics(self, metrics: Mapping[str, Tensor], step: int) -> None:
        """What the step (from 1) returned for the input before: "skipped" is the running number. Warns at the first
        skip.
        """
        assert self._seen is not None
        (x, origin), self._seen = self._seen, None
        if self._immediate and int(metrics["skipped"]) == self._skipped:
            self._in_a_row = 0
            return
        bad, worst = worst_rows(x)
        self._noted.append((step, x.shape[0], origin, torch.cat([torch.stack([metrics["skipped"], bad]), worst])))
        if self._immediate or len(self._noted) == READ_AFTER:
            self.read()

    def read(self) -> None:
        """Processes the recorded steps: warns at the first skip, sets `ended`. Waits for the device."""
        noted, self._noted = self._noted, []
        values = iter(torch.cat([found for *_, found in noted]).tolist() if noted else ())
        for step, of, origin, found in noted:
            skipped, bad, *worst = itertools.islice(values, found.numel())
            if skipped == self._skipped:
                self._in_a_row = 0
                continue
            self._skipped, self._in_a_row = skipped, self._in_a_row + 1
            what = _rows(bad, of, worst[0]) if bad else self._why_else
            if self._in_a_row == 1:
                self._began = (step, what)
            if not self._said:
                self._said = True
                warn(
                    f"step {step}: {what}. The step changed nothing and the run continues; further skips are counted "
                    'without a warning, as "skipped" in metrics.jsonl',
                    RuntimeWarning,
                )
            if self._in_a_row == SKIPS_IN_A_ROW and self.ended is None:
                begin, what = self._began
                self.ended = NonFiniteError(
                    f"step {begin}: {what}. From there to step {step}, {SKIPS_IN_A_ROW} steps in a row changed "
                    "nothing, so training stopped; everything up to there is saved. "
                    + _named(f"step {step}", bad, worst, origin)
                    + (DROP if bad else f"Continue from an earlier checkpoint and {CALM}"),
                    begin,
                )


@torch.no_grad()
def look_at_parameters(module: nn.Module, step: int) -> None:
    """Raises NonFiniteError naming a parameter that is not finite; a pass over all of them, for checkpoints."""
    for name, parameter in module.named_parameters():
        # aminmax propagates NaN, and needs no mask as large as the parameter.
        low, high = torch.aminmax(parameter)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NonFiniteError(
                f"after step {step} the parameter {name} holds NaN or infinity; it is not saved. "
                "Continue from the newest checkpoint with a lower learning rate or a longer warm-up",
                step,
            )


def bad_rows(x: Tensor) -> int:
    """How many rows of x (n, D) hold NaN or infinity. Waits for the device."""
    return int(worst_rows(x)[0])


def _rows(rows: int, of: int, first: int) -> str:
    return f"{rows} of {of} rows of activations hold NaN or infinity, the first is row {first} of the batch"


def _named(when: str, bad: int, worst: list[int], origin: Origin | None) -> str:
    """Where the worst rows of a batch come from: the bad ones, or else the largest; empty if not known."""
    if origin is None or not worst:
        return ""
    rows = worst[:bad] if bad else worst[:1]
    places = "; ".join(f"row {row} is {place}" for row, place in zip(rows, origin(rows), strict=True))
    more = f"; and {bad - len(rows)} more" if bad > len(rows) else ""
    return f"In {when}{'' if bad else ', the largest'}: {places}{more}. "


def never_begun(x: Tensor, origin: Origin | None) -> NonFiniteError:
    """The error of a run whose first batches, x (n, D) and those after it, are all bad."""
    bad, worst = worst_rows(x)
    return NonFiniteError(
        f"step 1: {_rows(int(bad), x.shape[0], int(worst[0]))}, and each of the first {SKIPS_IN_A_ROW} batches holds "
        f"such rows. Training did not start. {_named('step 1', int(bad), worst.tolist(), origin)}{DROP}",
        1,
    )
