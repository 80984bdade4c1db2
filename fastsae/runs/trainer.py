"""Trains an SAE on a source of activations: schedules, evaluation, logs, checkpoints, and resuming bit for bit.

    Trainer(sae, source, TrainConfig(steps=2000), "runs/a").run()

The loop's state after a step is a function of the settings and the step alone (and, with precision="screened", of the
screen's format, chosen again at every start), so a killed run continues from its newest checkpoint to the same weights,
bit for bit, as one that was not killed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fastsae.data.source import ActivationSource, held_out_targets, next_pair, origin_of, target_width
from fastsae.model.files import load, save
from fastsae.model.resample import resample_
from fastsae.model.rules import Activation, JumpReLU
from fastsae.model.sae import SparseAutoencoder, as_sae
from fastsae.parallel import parallelize
from fastsae.runs import checkpoint, parts
from fastsae.runs.checkpoint import CheckpointError
from fastsae.runs.config import TrainConfig
from fastsae.runs.evaluate import density_histogram, evaluate
from fastsae.runs.logs import PartTimer, RunLogs, numbers
from fastsae.runs.rng import restore_rng_state, rng_state
from fastsae.runs.rundir import RunDirError, RunLock, claim
from fastsae.runs.stopping import (
    SKIPS_IN_A_ROW,
    SkipGuard,
    StopSignals,
    TrainingInterrupted,
    bad_rows,
    look_at_parameters,
    never_begun,
)
from fastsae.runs.together import FromFirst, NoLogs, OwnRows, Team
from fastsae.training.step import FusedTrainStep, PlainTrainStep
from fastsae.warn import warn

__all__ = ["TrainConfig", "TrainResult", "Trainer"]

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints."""
OWN_SETTINGS = ("threads", "tensorboard", "wandb", "progress")
"""Settings that may differ between the processes of a run."""
CALIBRATION_ROWS = 16_384
"""Rows on which a run's end sets BatchTopK's threshold: their mean L0 is within some 0.5 % of that of all rows."""
L0_OFF = 0.1
"""A run warns if it ends further than this share from its target L0."""
REDONE_LIMIT = 0.01
"""Share of tokens whose selection was repeated above which a run warns: the fast path is not what it should be."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: after `step` steps on `tokens` tokens (skipped ones included), saved in `checkpoint`."""

    step: int
    tokens: int
    checkpoint: Path
    metrics: dict[str, Any]
    """The last line of metrics.jsonl."""
    evaluation: dict[str, Any] | None
    """The last line of eval.jsonl; None where eval_every is 0."""


class Trainer:
    """`Trainer(sae, source, config, run_dir).run()` trains `sae` in place, or resumes the run in run_dir.

    A source with targets (fastsae.data.source.TargetSource) trains a transcoder.

    notes   JSON-able facts for config.json that are not settings, e.g. which model the activations come from.
    resume  False: refuse a directory that already has a checkpoint.
    after_step  called after every step, e.g. for a progress bar of several runs. It may change the SAE, to enforce a
            constraint: checkpoints and evaluations come after it.
    mesh    of fastsae.parallel.mesh: all its processes make the same Trainer, with the same SAE and source, and train
            it together. Each reads its rows of a batch and keeps its rows of the dictionary; the first one alone
            writes. Checkpoints are those of one process, and go on with any number of them.

    Raises ValueError when the module, the source and the settings do not fit together.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        source: ActivationSource,
        config: TrainConfig,
        run_dir: str | Path,
        *,
        resume: bool = True,
        notes: Mapping[str, Any] | None = None,
        after_step: Callable[[], object] = lambda: None,
        mesh: DeviceMesh | None = None,
    ):
        sae = as_sae(sae, "sae")
        if source.d_in != sae.d_in:
            raise ValueError(f"the source has rows of {source.d_in} numbers, but the SAE has d_in = {sae.d_in}")
        width = target_width(source)
        if width is None and sae.d_out != sae.d_in:
            raise ValueError(
                f"the SAE maps d_in = {sae.d_in} to d_out = {sae.d_out}, but this source has no targets; open it with "
                "target="
            )
        if width is not None and width != sae.d_out:
            raise ValueError(f"the source has targets of {width} numbers, but the SAE has d_out = {sae.d_out}")
        if width is not None and config.resample_at:
            raise ValueError(
                f"resample_at is {config.resample_at}: resampling sets both dictionaries of a latent to an input, but "
                "a transcoder's targets are not its inputs; leave it out, and revive dead latents with aux_k"
            )
        self.team = None if mesh is None else Team(mesh)
        self.rows: ActivationSource = source
        if self.team is not None:
            check_together(config, self.team)
            self.rows = OwnRows(source, self.team.share, self.team.shares)
        sae.train().settle_pre_bias_(target_given=width is not None)  # so that config.json says what is trained
        self.sae, self.source, self.config, self.resume = sae, source, config, resume
        self.run_dir, self.notes, self.after_step = Path(run_dir), dict(notes or {}), after_step
        self.checkpoints = self.run_dir / CHECKPOINTS
        self.total = config.total_steps(source.n_tokens)
        self.schedule = config.schedule(self.total)
        self.device = sae.W_dec.device
        self.step = 0
        self.seconds = 0.0
        self.last: dict[str, dict[str, Any] | None] = {"metrics": None, "evaluation": None}
        self._saved: Path | None = None
        self._warned = self._begun = False

    def run(self) -> TrainResult:
        """Trains to the end and returns the result; a run that is already at its end returns at once.

        After the first Ctrl-C or SIGTERM it finishes the current step, writes a checkpoint and raises
        TrainingInterrupted (a KeyboardInterrupt). Raises RunDirError (directory in use, or of another run),
        CheckpointError and LogWriteError (disk full), NonFiniteError (bad numbers), RuntimeError (a second call, none
        saved); each says what is saved.

        A step skips a batch whose loss or gradients are not finite (fastsae.training.step), and the run continues as if
        the batch had been left out. It warns at the first skip; "skipped" in metrics.jsonl is the number so far,
        resumed runs included. After SKIPS_IN_A_ROW in a row it saves and raises NonFiniteError, which names the rows of
        the data that caused the last one: those that are not finite, or else the largest.
        """
        with StopSignals() as stop:
            for _ in self._steps(stop):
                pass
        return self._result()

    def _steps(self, stop: StopSignals) -> Generator[None]:
        """The run, step by step, as a generator; it holds the directory's lock until it is exhausted or closed."""
        if self._begun and self._saved is None:
            raise RuntimeError(f"this Trainer stopped at step {self.step} before a checkpoint; make a new Trainer")
        if self.sae.placement is not None and (self.team is None or self.sae.placement.mesh is not self.team.mesh):
            raise RuntimeError(
                "this SAE is a shard, as after a run, on another mesh than the Trainer's; make a new Trainer with "
                "fastsae.parallel.gathered(sae)"
            )
        with ExitStack() as stack:
            self.stop = stop
            stack.enter_context(_settings_of_the_run(self.config, self.sae))
            with self._agreed():
                if self._writes:
                    stack.enter_context(RunLock(self.run_dir))
                    self._claim()
            torch.manual_seed(self.config.seed)
            self._open()
            with self._agreed():
                c = self.config
                logs = RunLogs(self.run_dir, self.step, self.total, c.tensorboard, c.progress, c.wandb)
                self.logs = stack.enter_context(logs) if self._writes else NoLogs()
            if self._saved:
                self.logs.say(f"continuing from step {self.step} of {self.total}: {self._saved}")
            yield  # opened, and where its checkpoint is
            yield from self._loop()
            self._raise_if_stopped()

    def _result(self) -> TrainResult:
        assert self._saved is not None
        return TrainResult(self.step, self._tokens, self._saved, self.last["metrics"] or {}, self.last["evaluation"])

    def seconds_per_step(self, steps: int = 3) -> float:
        """The median time of a few updates after a slower first one, for an estimate before a run.

        The updates train the module and read the source, but write nothing: use a module that is not needed afterwards,
        and reset the source.
        """
        if self.team is not None:
            raise ValueError("the time of a step of several processes is not estimated; run some steps")
        times = []
        with _settings_of_the_run(self.config, self.sae):
            torch.manual_seed(self.config.seed)
            update = self._make_step()
            for number in range(1 + steps):
                start = time.perf_counter()
                x, target = self._next()
                if number == 0:
                    self._initialize(x, target)
                numbers(update(x, target))  # waits for the device
                times.append(time.perf_counter() - start)
        return statistics.median(times[1:])

    # -- before the first step ----------------------------------------------------------------------------------------

    @property
    def _writes(self) -> bool:
        return self.team is None or self.team.writes

    def _agreed(self) -> AbstractContextManager[None]:
        return nullcontext() if self.team is None else self.team.agreed()

    def _claim(self) -> None:
        if not self.resume and checkpoint.list_checkpoints(self.checkpoints):
            what = f"{self.run_dir} holds a run with checkpoints"
            raise RunDirError(f"{what}; resume it (--resume) or give another directory")
        claim(self.run_dir, self._describe(), self._free(), why=self.config.why_not_free())
        checkpoint.remove_unfinished(self.checkpoints)

    def _describe(self) -> dict[str, Any]:
        processes = {} if self.team is None else {"processes": self.team.describe()}
        source = self.source.source if isinstance(self.source, FromFirst) else self.source
        return {
            "train": asdict(self.config),
            "sae": {
                **self.sae.config, "d_sae": self.sae.n_latents, "dtype": str(self.sae.W_dec.dtype),
                "precision": self.sae.precision,
            },
            "source": {
                "kind": type(source).__name__, "d_in": self.sae.d_in, "n_tokens": self.source.n_tokens,
                **({"d_target": self.sae.d_out} if target_width(self.source) is not None else {}),
            },
            "machine": {
                "torch": torch.__version__, "device": str(self.device), "threads": torch.get_num_threads(), **processes,
            },
            "notes": self.notes,
        }  # fmt: skip

    def _free(self) -> set[str]:
        return {"machine", "notes"} | {f"train.{name}" for name in self.config.free_settings()}

    def _make_step(self) -> FusedTrainStep | PlainTrainStep:
        c = self.config
        if c.penalty_warmup and not (self.sae.activation.penalizes and self.sae.activation.coef):
            raise ValueError(
                f"penalty_warmup is {c.penalty_warmup}, but {self.sae.activation} has no penalty; leave it out"
            )
        common: dict[str, Any] = {
            "lr": c.rate(self.sae.n_latents), "betas": c.betas, "eps": c.eps, "schedule": self.schedule,
            "optimizer": c.optimizer, "weight_decay": c.weight_decay, "clip_norm": c.clip_norm,
            "penalty_schedule": c.penalty_schedule(), "k_schedule": c.k_schedule(self.sae.activation.screen_k),
        }  # fmt: skip
        step: FusedTrainStep | PlainTrainStep
        if c.fused:
            step = FusedTrainStep(
                self.sae, **common, clip_rows=c.clip_rows, moments=c.moments, seed=c.seed, backend=self.sae.backend
            )
        else:
            step = PlainTrainStep(self.sae, **common)
        step.first_skip.said = True  # SkipGuard warns instead, with the rows of the data
        return step

    def _open(self) -> None:
        """Makes the step and loads the newest valid checkpoint; newer broken ones are reported and set aside."""
        path, problems = checkpoint.newest_valid(self.checkpoints) if self._writes else (None, [])
        if self.team is not None:
            path, problems = self.team.from_first((path, problems))
        if path is None and problems:
            raise CheckpointError(
                f"none of the checkpoints in {self.checkpoints} can be used: {'; '.join(problems)}. "
                "Restore one, or give another directory"
            )
        state: dict[str, Any] | None = None
        self._check_alike()
        if self.team is not None and self.sae.placement is None:
            parallelize(self.sae, self.team.mesh)
        with self._agreed():
            if path is not None:
                with _fitting(path):
                    if self.team is None:
                        state = checkpoint.read_state(path)
                        self.sae.load_state_dict(load(path).state_dict())
                    else:
                        state = parts.read(path, self.sae)
                    self.sae.fired.copy_(state["density"]["fired"])
                    self.sae.fired_over.fill_(state["density"]["over"])
        if path is None and self.team is not None:  # on all rows of the first batch, in every process
            position = self.source.state_dict()
            self._initialize(*self._next(self.source))
            self.source.load_state_dict(position)
        with self._agreed():
            self.update = self._make_step()
            if path is not None and state is not None:
                with _fitting(path):
                    self.update.load_state_dict(state["optimizer"])
                    self.source.load_state_dict(state["source"])
                    restore_rng_state(state["rng"])
                    self.step, self.seconds = state["step"], state["trainer"]["seconds"]
                    self.last = state["trainer"]["last"]
        if path is None:
            return
        self._saved = path
        if not self._writes:
            return
        moved = checkpoint.set_aside_newer(self.checkpoints, self.step)  # only now that this one was loaded
        checkpoint.prune(self.checkpoints, self.config.keep)  # a kill may have come between a checkpoint and this
        for problem in problems:
            warn(
                f"{problem}. Continuing from {path} instead; kept for inspection: {', '.join(str(m) for m in moved)}",
                RuntimeWarning,
            )

    def _check_alike(self) -> None:
        """Raises ValueError if processes have different settings, or are to read different rows."""
        if self.team is None:
            return
        facts = {name: value for name, value in asdict(self.config).items() if name not in OWN_SETTINGS}
        if not isinstance(self.source, FromFirst):  # of which the first process has all
            with self._agreed():
                facts["the data's position"] = position = self.source.state_dict()
                facts["the sum of the next row"] = float(self.source.next_batch(1).double().sum())
                self.source.load_state_dict(position)
        self.team.check_alike(facts)

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _loop(self) -> Iterator[None]:
        c = self.config
        if c.eval_every and self.step < self.total and len(self.source.held_out()) == 0:
            raise ValueError("the source holds out no rows to evaluate on; set its holdout, or eval_every to 0")
        self.sae.train()
        skipped = self.update.skipped.clone()
        self.guard = SkipGuard(self.device, int(skipped), alone=self.team is None)
        self.timer = PartTimer()
        self._window = self._resampled = 0
        self._redone = torch.zeros((), dtype=torch.int64, device=self.device)
        self._started = time.perf_counter() - self.seconds
        while self.step < self.total and not self._asked_to_stop():
            self._begun = True
            with self.timer("data"), self._agreed():
                x, target = self._next()
                self.guard.look_at_input(_side_by_side(x, target), origin_of(self.rows))
                if self.step == 0 and self.team is None:
                    self._initialize(x, target)
            with self.timer("step"):
                metrics = self.update(x, target)
                self.step += 1
                self.guard.look_at_metrics(metrics, self.step)
                # A bad row is always encoded twice, which says nothing about the fast path: skipped steps do not count.
                before, skipped = skipped, metrics["skipped"]
                self._redone += torch.where(skipped == before, metrics.pop("redone", 0), 0)
                self._window += 1
                self.after_step()
                at_end = self.step == self.total
                values = numbers(metrics) if at_end or self.step % c.log_every == 0 else None
            if self.step in c.resample_at:
                with self.timer("resample"):
                    self._resample()
            if at_end and self.sae.activation.mean_k is not None:
                with self.timer("calibrate"):
                    self._calibrate_threshold()
            if c.eval_every and (at_end or self.step % c.eval_every == 0):
                with self.timer("eval"):
                    self._evaluate()
            if values is not None:
                self._log(values)
            if at_end:
                self._look_at_l0()
            if at_end or self.step % c.checkpoint_every == 0 or self.guard.ended:
                self._checkpoint()
            self.logs.advance()
            if self.guard.ended:
                raise self.guard.ended
            yield

    def _raise_if_stopped(self) -> None:
        if self.stop.requested is None:
            return
        if self.step:
            self._checkpoint()
        where = f"the checkpoint is {self._saved}" if self._saved else "no step was done yet, so nothing is saved"
        goes_on = self._saved is not None and self.step < self.total
        what_next = "The run is complete" if self.step == self.total else "Start the same run again"
        raise TrainingInterrupted(
            f"stopped by {self.stop.requested.name} after step {self.step} of {self.total}; {where}. {what_next}"
            + (" to go on" if goes_on else ""),
            self.stop.requested,
            goes_on=goes_on,
        )

    def _asked_to_stop(self) -> bool:
        if self.team is not None:
            self.stop.requested = self.team.stop_of(self.stop.requested)
        return self.stop.requested is not None

    def _next(self, source: ActivationSource | None = None) -> tuple[Tensor, Tensor | None]:
        """The next batch and its targets, on the device and in the dtype of the weights; source: that of `rows`."""
        with self._agreed() if source is not None else nullcontext():  # all rows, before all processes go on with them
            x, target = next_pair(source or self.rows, self.config.batch_size)
        x = x.to(self.device, self.sae.W_dec.dtype, non_blocking=True)
        return x, None if target is None else target.to(self.device, self.sae.W_dec.dtype, non_blocking=True)

    def _initialize(self, x: Tensor, target: Tensor | None) -> None:
        """Initializes what the module takes from data, on the first finite batch; x is then trained on as usual."""
        centre = self.config.init_b_dec != "zero" and not bool(self.sae.b_dec.any())
        if centre or not (self.sae.norm.calibrated and self.sae.started):
            x, target = self._first_finite(x, target)
        if not self.sae.norm.calibrated:
            self.sae.calibrate_(x)
        if centre:
            self.sae.init_from_(x, target, how=self.config.init_b_dec)
        self.sae.start_(x, target)

    def _first_finite(self, x: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x and its target, or the next batch without a bad row; the data's position does not change.

        Raises NonFiniteError if there is none among as many batches as a run may skip.
        """
        position, origin, batch = self.source.state_dict(), origin_of(self.source), (x, target)
        try:
            for _ in range(SKIPS_IN_A_ROW):
                if not bad_rows(_side_by_side(*batch)):
                    return batch
                batch = self._next(self.source)
        finally:
            self.source.load_state_dict(position)
        raise never_begun(_side_by_side(x, target), origin)

    def _resample(self) -> None:
        """Resamples dead latents at badly reconstructed upcoming rows; the data's position does not change."""
        c, position = self.config, self.source.state_dict()
        blocks = (self._whole_batch(min(c.batch_size, c.resample_rows - start)) for start in
                  range(0, c.resample_rows, c.batch_size))  # fmt: skip
        try:
            count = resample_(self.sae, blocks, self.update, batch_size=c.batch_size, seed=c.seed + self.step)
        finally:
            self.source.load_state_dict(position)
        self._resampled += count
        self.logs.say(f"step {self.step}: resampled {count:,} dead latents of {self.sae.n_latents:,}")

    def _whole_batch(self, n: int) -> Tensor:
        """The next n rows, all of them in every process."""
        with self._agreed():
            return self.source.next_batch(n)

    def _calibrate_threshold(self) -> None:
        """Sets BatchTopK's inference threshold from upcoming training rows; the data's position does not change.

        Rows that are not finite are left out; if no row is finite, the running mean stays.
        """
        position = self.source.state_dict()
        try:
            size = self.config.batch_size
            blocks = (self._whole_batch(min(size, CALIBRATION_ROWS - start)) for start in
                      range(0, CALIBRATION_ROWS, size))  # fmt: skip
            rows = [block[torch.isfinite(block).all(-1)] for block in blocks]
        finally:
            self.source.load_state_dict(position)
        if not any(len(block) for block in rows):
            return
        self.sae.calibrate_threshold_(rows)

    def _look_at_l0(self) -> None:
        """Warns if the run ends further than L0_OFF from its rule's target L0."""
        rule = self.sae.activation
        if rule.asked_l0 is None:
            return
        last = self.last["evaluation"] if self.config.eval_every else self.last["metrics"]
        if not self._writes:
            return
        l0 = (last or {}).get("l0")
        if l0 is None or abs(l0 / rule.asked_l0 - 1) <= L0_OFF:
            return
        where = "held-out rows" if self.config.eval_every else "the last batch"
        warn(
            f"{self.run_dir}: the run ended at L0 {l0:.4g} on {where}, but {rule.asked_l0:.4g} was asked for "
            f"({l0 / rule.asked_l0 - 1:+.0%}). {_what_to_do(rule, l0)}",
            RuntimeWarning,
        )

    def _evaluate(self) -> None:
        self.guard.read()
        sae = self.sae
        with self._agreed():
            rows, targets = self.source.held_out(), held_out_targets(self.source)
        result = evaluate(sae, rows, targets=targets, batch_size=self.config.batch_size)
        record = {"step": self.step, "tokens": self._tokens, **result.to_json(), "source": self.source.stats}
        if sae.activation.asked_l0 is not None:
            record["asked_l0"] = sae.activation.asked_l0
        if int(sae.fired_over):
            # Of the training rows since the last evaluation: the held-out ones are too few to tell rare from dead.
            density = sae.density if sae.placement is None else torch.cat(sae.placement.latents.gather(sae.density))
            record["training_density"] = asdict(density_histogram(density.cpu(), int(sae.fired_over)))
            sae.reset_density_()
        with self._agreed():
            self.logs.evaluation(record)
        self.last["evaluation"] = record

    def _log(self, values: dict[str, float]) -> None:
        self.guard.read()
        share = int(self._redone) / (self._window * self.config.batch_size)
        parts = self.timer.take()
        # The cost of the update and of waiting for data; how rare evaluations and checkpoints are is the user's choice.
        training = parts.get("data", 0.0) + parts.get("step", 0.0)
        record: dict[str, Any] = {
            "step": self.step,
            "tokens": self._tokens,
            **values,
            "redone_share": share,
            **({"resampled": self._resampled} if self.config.resample_at else {}),
            "tokens_per_s": self._window * self.config.batch_size / training,
            "time_s": time.perf_counter() - self._started,
            **{f"ms_{part}": 1e3 * seconds / self._window for part, seconds in parts.items()},
        }
        if self.team is not None:  # who makes the others wait is seen in the data, which no process waits for
            each = self.team.every({name: parts.get(name, 0.0) for name in ("data", "step")})
            for name in ("data", "step"):
                record[f"ms_{name}_by_rank"] = [1e3 * one[name] / self._window for one in each]
        self.logs.metrics(record)
        self.last["metrics"] = record
        self._window = self._resampled = 0
        self._redone.zero_()
        if share > REDONE_LIMIT and not self._warned and self._writes:
            self._warned = True
            warn(
                f"step {self.step}: the encoder encoded {share:.1%} of the tokens twice, expected at most "
                f"{REDONE_LIMIT:.0%}. The results are exact, but it costs time; see redone_share in metrics.jsonl",
                RuntimeWarning,
            )

    def _checkpoint(self) -> None:
        if self._saved is not None and checkpoint.step_of(self._saved) == self.step:
            return
        with self.timer("checkpoint"):
            self.guard.read()
            with self._agreed():
                look_at_parameters(self.sae, self.step)
            with self._agreed():
                # The log first: a checkpoint must not be newer than the lines up to its step.
                self.logs.sync()
                self.seconds = time.perf_counter() - self._started
                others = {
                    "source": self.source.state_dict(),
                    "rng": rng_state(),
                    "trainer": {"seconds": self.seconds, "last": self.last},
                }
            sae, trained = self.sae, self.update.state_dict()
            if self.team is None:
                density = {"fired": sae.fired, "over": int(sae.fired_over)}
                state = {"optimizer": trained, **others, "density": density}
                self._saved = checkpoint.write_checkpoint(
                    self.checkpoints, self.step, state, lambda path: save(sae, path)
                )
            else:
                mine = others if self._writes else None
                saved = parts.write(self.checkpoints, self.step, sae, trained, mine, self._agreed)
                self._saved = self.team.from_first(saved)
            if self._writes:
                checkpoint.prune(self.checkpoints, self.config.keep)

    @property
    def _tokens(self) -> int:
        return self.step * self.config.batch_size


def run_together(trainers: Sequence[Trainer]) -> list[TrainResult]:
    """Trains several SAEs in step, each in a directory of its own, as `Trainer.run` each; for readers of one stream.

    Each step of one is followed by the same step of the others; a trainer that is behind, as after a kill between two
    checkpoints, catches up first. Raises as `run`; each is then at the checkpoint that its own message names, or at the
    last one before.
    """
    with StopSignals() as stop, ExitStack() as closing:
        steps = [trainer._steps(stop) for trainer in trainers]
        drawn: list[dict[str, Any]] = []  # what each has drawn from the generators that all would share
        for one in steps:
            closing.callback(one.close)  # last opened, first closed: they restore the thread count
            next(one)
            drawn.append(rng_state())
        while stop.requested is None and (left := [i for i, t in enumerate(trainers) if t.step < t.total]):
            number = min(left, key=lambda i: trainers[i].step)
            restore_rng_state(drawn[number])
            next(steps[number])
            drawn[number] = rng_state()
        ended: list[TrainingInterrupted] = []
        for number, one in reversed(list(enumerate(steps))):
            restore_rng_state(drawn[number])
            try:
                next(one, None)
            except TrainingInterrupted as stopped:
                ended.append(stopped)
        if ended:
            raise ended[-1]
    return [trainer._result() for trainer in trainers]


def _side_by_side(x: Tensor, target: Tensor | None) -> Tensor:
    return x if target is None else torch.cat([x, target], 1)


def _what_to_do(rule: Activation, l0: float) -> str:
    if rule.mean_k is not None:
        return (
            "Its threshold was set on training rows: these rows differ from them, or fewer latents are above 0. "
            "sae.calibrate_threshold_(x) sets it on rows of your choice"
        )
    more = "Train for more steps or at a higher --lr: biases and thresholds move by at most the rate per step"
    if isinstance(rule, JumpReLU) and rule.penalty_kind == "target":
        return f"{more}. Or leave penalty_kind out: a driven weight has no lasting error"
    return more if l0 > (rule.asked_l0 or 0) else f"{more}. Or its latents died: see dead in metrics.jsonl"


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"the checkpoint {path} does not fit this run: {error}") from error


def check_together(config: TrainConfig, team: Team) -> None:
    """Raises ValueError for settings that several processes cannot serve."""
    if config.batch_size < team.shares:
        raise ValueError(
            f"batch_size is {config.batch_size}, expected at least one row for each of {team.shares} processes"
        )
    if not config.fused:
        raise ValueError("fused is False, but only the fused step adds the processes' gradients; leave it out")


@contextmanager
def _settings_of_the_run(config: TrainConfig, sae: SparseAutoencoder) -> Iterator[None]:
    """Sets threads and backend from the config, and restores them afterwards."""
    threads, backend = torch.get_num_threads(), sae.backend
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.backend is not None:
        sae.backend = config.backend
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        sae.backend = backend
