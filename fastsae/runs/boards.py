"""Dashboards for a run, beside its files: TensorBoard and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsae.warn import warn


class LogWriteError(RuntimeError):
    """A log line that did not reach the disk, e.g. because it is full."""


def scalars(prefix: str, record: Mapping[str, Any]) -> dict[str, float]:
    """Every finite number of a record as prefix/key, "step" apart."""
    return {
        f"{prefix}/{key}": value
        for key, value in record.items()
        if isinstance(value, int | float) and math.isfinite(value) and key != "step"
    }


class TensorBoardLog:
    """Scalars under tensorboard/, for `tensorboard --logdir RUN`."""

    def __init__(self, directory: Path, resumed_step: int) -> None:
        # Imported here: it takes seconds, and most processes that import fastsae never write an event.
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides the steps that a killed run logged after its last checkpoint, since they are logged again.
        purge = resumed_step + 1 if resumed_step else None
        try:
            self._writer = SummaryWriter(str(directory), purge_step=purge, max_queue=1000, flush_secs=30)
        except OSError as error:
            raise LogWriteError(f"cannot write TensorBoard events to {directory}: {error}") from error

    def add(self, prefix: str, record: Mapping[str, Any], step: int) -> None:
        """Adds every finite number of a record as prefix/key, "step" apart."""
        try:
            for key, value in scalars(prefix, record).items():
                self._writer.add_scalar(key, value, step)
        except OSError as error:
            raise LogWriteError(f"cannot write TensorBoard events: {error}; checkpoints are intact") from error

    def close(self) -> None:
        """Flushes and closes. Warns if that fails: the run itself is already saved."""
        try:
            self._writer.close()
        except OSError as error:
            warn(f"the last TensorBoard events could not be written: {error}", RuntimeWarning)


def check_wandb(project: str | None) -> None:
    """Raises ValueError where a project is named and the package `wandb` is missing."""
    if project is not None and importlib.util.find_spec("wandb") is None:
        raise ValueError(f"wandb is {project!r}, but the package wandb is not installed: pip install wandb")


class WandbLog:
    """Scalars of a run in a Weights & Biases project, under the name of its folder.

    Login, mode and server are set in wandb itself (`wandb login`, WANDB_MODE=offline). A resumed run continues the same
    wandb run: its random id is in the folder (wandb-id). Points are plotted over `step`; if a run was killed, the
    points after the checkpoint that it resumed from appear twice.
    """

    def __init__(self, project: str, run_dir: Path) -> None:
        import wandb

        config, name = run_dir / "config.json", run_dir / "wandb-id"
        try:
            if not name.exists():
                name.write_text(secrets.token_hex(8))
            self._run = wandb.init(
                project=project, name=run_dir.name, dir=str(run_dir), resume="allow",
                id=name.read_text().strip(),
                config=json.loads(config.read_text()) if config.exists() else {},
            )  # fmt: skip
        except (wandb.Error, OSError) as error:
            raise LogWriteError(
                f"wandb cannot start a run in the project {project!r}: {error}; set WANDB_MODE=offline to write it to "
                f"disk for `wandb sync`, or leave the wandb option out"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def add(self, prefix: str, record: Mapping[str, Any], step: int) -> None:
        """Adds every finite number of a record as prefix/key, and the step."""
        self._run.log({**scalars(prefix, record), "step": step})

    def close(self) -> None:
        """Sends what is left and finishes the wandb run."""
        self._run.finish()
