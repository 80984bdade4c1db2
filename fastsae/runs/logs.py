"""The logs of a training run: JSONL files, dashboards, a progress bar, and where the time went."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.atomic import replace_file
from fastsae.progress import bar
from fastsae.runs.boards import LogWriteError, TensorBoardLog, WandbLog


class JsonlLog:
    """Appends one JSON object per line; each line is handed to the system at once, so it survives `kill -9`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def open(self) -> None:
        """Opens the file for appending. Raises LogWriteError."""
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise self._failed("open", error) from error

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line; NaN and infinities, which JSON does not have, as null.

        Raises LogWriteError if the disk is full; the file then still ends with the previous line.
        """
        line = json.dumps(_jsonable(record), allow_nan=False).encode() + b"\n"
        end = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                # A nearly full disk may accept part of the line and refuse the rest.
                written += os.write(self._fd, line[written:])
        except OSError as error:
            os.ftruncate(self._fd, end)
            raise self._failed("write to", error) from error

    def cut_after(self, step: int) -> int:
        """Removes the lines of later steps, and an incomplete last line left by a kill; returns how many were removed.

        A resumed run calls it with its checkpoint's step, so that each step is there exactly once.
        """
        with open(self._fd, "rb", closefd=False) as f:
            f.seek(0)
            data = f.read()
        kept, lines = [], data.splitlines(keepends=True)
        for line in lines:
            record = _parse(line)
            # A line of garbage in the middle is the user's to look at: only lines known to be later go.
            if line.endswith(b"\n") and (record is None or record.get("step", 0) <= step):
                kept.append(line)
        if len(kept) < len(lines):
            # Written beside and renamed: a kill or a full disk in here must not lose the earlier lines.
            try:
                replace_file(self.path, lambda partial: partial.write_bytes(b"".join(kept)))
            except OSError as error:
                raise self._failed("shorten", error) from error
            self.close()
            self.open()
        return len(lines) - len(kept)

    def sync(self) -> None:
        """Blocks until the lines are on the disk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._failed("sync", error) from error

    def close(self) -> None:
        """Closes the file; may be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _failed(self, verb: str, error: OSError) -> LogWriteError:
        return LogWriteError(
            f"cannot {verb} {self.path}: {error.strerror}; the lines and checkpoints written so far are intact. "
            "Make room (or fix the directory) and start the same run again to continue."
        )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step", 0), int) else None


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    return value


def numbers(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """0-d tensors as floats, in one transfer."""
    names = list(metrics)
    device = metrics[names[0]].device
    values = torch.stack([metrics[name].detach().double().to(device) for name in names]).tolist()
    return dict(zip(names, values, strict=True))


def duration(seconds: float) -> str:
    """In the unit that gives a number of one or two digits."""
    for unit, size in (("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


class PartTimer:
    """Seconds by part since the last `take`, as the host sees them.

    On a GPU, work is only queued in the part that starts it and is waited for in the part that reads a result: there
    the sum is right and the split says where the host waited.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """{part: seconds}; resets the timer."""
        seconds, self._seconds = self._seconds, {}
        return seconds


class ProgressBar:
    """One line on stderr: steps, tokens/s, loss, fvu, l0. See `fastsae.progress.bar`."""

    def __init__(self, steps: int, start: int, enabled: bool) -> None:
        self._bar = bar(steps, "step", enabled, done=start)

    def advance(self) -> None:
        """Advances by one step. Costs no device sync: the numbers shown are those of the last logged step."""
        self._bar.update(1)

    def name(self, what: str) -> None:
        """Shows what is running, where one bar serves several runs."""
        self._bar.set_description(what)

    def show(self, record: Mapping[str, Any]) -> None:
        """Shows a metrics record."""
        parts = {"tok/s": f"{record['tokens_per_s']:,.0f}"} if record.get("tokens_per_s") else {}
        parts |= {name: f"{record[name]:.4g}" for name in ("loss", "fvu", "l0") if record.get(name) is not None}
        self._bar.set_postfix(parts, refresh=False)

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if not self._bar.disable:
            self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        self._bar.close()


class RunLogs:
    """Everything a run writes besides checkpoints; a context manager.

    metrics.jsonl and eval.jsonl are cut after `step`, where the run resumes, so that each step is there exactly once.
    Every method raises LogWriteError if the disk is full.
    """

    def __init__(
        self, run_dir: Path, step: int, total: int, tensorboard: bool, progress: bool, wandb: str | None = None
    ) -> None:
        self._run_dir, self._step, self._total = run_dir, step, total
        self._tensorboard, self._progress, self._wandb = tensorboard, progress, wandb
        self._files = [JsonlLog(run_dir / "metrics.jsonl"), JsonlLog(run_dir / "eval.jsonl")]

    def __enter__(self) -> RunLogs:
        with ExitStack() as stack:
            for log in self._files:
                log.open()
                stack.callback(log.close)
                log.cut_after(self._step)
            self._boards: list[TensorBoardLog | WandbLog] = []
            if self._tensorboard:
                self._boards.append(TensorBoardLog(self._run_dir / "tensorboard", self._step))
                stack.callback(self._boards[-1].close)
            if self._wandb:
                self._boards.append(WandbLog(self._wandb, self._run_dir))
                stack.callback(self._boards[-1].close)
            self._bar = ProgressBar(self._total, self._step, self._progress)
            stack.callback(self._bar.close)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Writes a line of metrics.jsonl, and shows it in the bar."""
        self._files[0].append(record)
        for board in self._boards:
            board.add("train", record, record["step"])
        self._bar.show(record)

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """A line of eval.jsonl."""
        self._files[1].append(record)
        for board in self._boards:
            board.add("eval", record, record["step"])

    def advance(self) -> None:
        """Advances the bar by one step."""
        self._bar.advance()

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._bar.say(line)

    def sync(self) -> None:
        """Blocks until the files are on the disk."""
        for log in self._files:
            log.sync()
