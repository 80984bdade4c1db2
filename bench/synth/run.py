"""Trains every rule by both trainers in one pass over the samples, in turns; then judges them.

The generator takes longer than most steps, hence one pass for all rules. Its time is measured apart.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.family.store import Others, Store
from bench.synth.trainers import RULES, Ours, SAELens
from bench.synth.world import Digest, Settings, World
from bench.timing import Sample
from fastsae.atomic import replace_file
from fastsae.runs.stopping import StopSignals, TrainingInterrupted

WARMUP = 5
"""Steps of each trainer that no time is taken from; both must have seen the same samples after them."""
SAVE_EVERY = 600.0
"""Seconds between two savings of all trainers."""
UNFINISHED = "training.partial"
"""All trainers of a run that is not finished."""
ALLOWED = 0.1
"""How far from k, as a share, an L0 may be: beyond that two trainers did not do the same work."""


class Lane:
    """One trainer of one rule, with the seconds of its steps and the digest of what it was given."""

    def __init__(self, trainer: Ours | SAELens):
        self.trainer = trainer
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self.digest = Digest()

    def step(self, x: Tensor) -> None:
        self.digest.add(x)
        synchronize(x.device)
        clock, cpu = time.perf_counter(), time.process_time()
        self.trainer.step(x)
        synchronize(x.device)
        self.seconds.append(time.perf_counter() - clock)
        self.cpu.append(time.process_time() - cpu)

    def state(self) -> dict[str, Any]:
        return {"state": self.trainer.state(), "seconds": self.seconds, "cpu": self.cpu, "digest": int(self.digest)}

    def load(self, saved: dict[str, Any]) -> None:
        self.trainer.load(saved["state"])
        self.seconds, self.cpu, self.digest = saved["seconds"], saved["cpu"], Digest(saved["digest"])

    def found(self) -> dict[str, Any]:
        """For the result: wall-clock and CPU seconds of all steps, and of one step in milliseconds."""
        return {
            "seconds": sum(self.seconds),
            "cpu_seconds": sum(self.cpu),
            "step": Sample.of(self.seconds[WARMUP:]).in_ms(),
            "cpu_step": Sample.of(self.cpu[WARMUP:]).in_ms(),
        }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_digests(lanes: dict[str, dict[str, Lane]]) -> int:
    """The digest of the samples. Raises RuntimeError where two trainers were given different ones."""
    digests = {f"{rule} {name}": int(lane.digest) for rule, pair in lanes.items() for name, lane in pair.items()}
    if len(set(digests.values())) > 1:
        listed = ", ".join(f"{name} {value:x}" for name, value in digests.items())
        raise RuntimeError(f"the trainers were not given the same samples, nothing is timed: {listed}")
    return next(iter(digests.values()))


class Pass:
    """One pass over the samples: lanes[rule][trainer], how many steps were made, and the generator's seconds."""

    def __init__(self, rules: Sequence[str], settings: Settings, world: World, path: Path):
        self.settings, self.world, self.path = settings, world, path
        self.steps, self.generator = 0, 0.0
        self.lanes: dict[str, dict[str, Lane]] = {}
        first = world.batch(0)
        for rule in rules:
            theirs = SAELens(rule, settings, first)
            ours = Ours(rule, settings, theirs.sae)
            self.lanes[rule] = {trainer.name: Lane(trainer) for trainer in (ours, theirs)}

    def restore(self) -> bool:
        """Goes on from the file, if it is of these settings and has these rules. Returns whether it did."""
        if not self.path.exists():
            return False
        saved = torch.load(self.path, map_location=self.settings.device, weights_only=True)
        if saved["settings"] != asdict(self.settings) or not set(self.lanes) <= set(saved["lanes"]):
            return False
        self.steps, self.generator = saved["steps"], saved["generator"]
        for rule, pair in self.lanes.items():
            for name, lane in pair.items():
                lane.load(saved["lanes"][rule][name])
        return True

    def save(self) -> None:
        lanes = {rule: {name: lane.state() for name, lane in pair.items()} for rule, pair in self.lanes.items()}
        content = {
            "settings": asdict(self.settings), "steps": self.steps, "generator": self.generator, "lanes": lanes
        }  # fmt: skip
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, lambda partial: torch.save(content, partial))

    def train(self, progress: bool = True) -> None:
        """The steps that are left. Saves every SAVE_EVERY seconds and at the end.

        Raises TrainingInterrupted where a signal asked to stop: the step was finished and all is saved.
        """
        saved, n = time.perf_counter(), self.settings.batch
        bar = tqdm(
            total=self.settings.steps * n, initial=self.steps * n, unit=" samples", unit_scale=True,
            desc=" ".join(self.lanes), disable=not progress,
        )  # fmt: skip
        with StopSignals() as stop, bar:
            while self.steps < self.settings.steps and stop.requested is None:
                self._step()
                bar.update(n)
                if self.steps == WARMUP:
                    check_digests(self.lanes)
                if time.perf_counter() - saved > SAVE_EVERY:
                    self.save()
                    saved = time.perf_counter()
            self.save()
        if stop.requested is not None:
            raise TrainingInterrupted(
                f"stopped after {self.steps * n:,} samples, which are saved; the same command goes on", stop.requested
            )

    def _step(self) -> None:
        clock = time.perf_counter()
        x = self.world.batch(self.steps)
        synchronize(x.device)
        self.generator += time.perf_counter() - clock
        for pair in self.lanes.values():
            # Each goes first every other time: the second one finds the batch in the cache.
            for lane in list(pair.values())[:: 1 if self.steps % 2 == 0 else -1]:
                lane.step(x)
        self.steps += 1


def key(rule: str, settings: Settings) -> str:
    return f"{rule}-{settings.samples}" + ("-autocast" if settings.autocast else "")


def run(
    store: Store,
    settings: Settings,
    device: str,
    only: Sequence[str] = (),
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> None:
    """Fills the store, each rule as soon as both its SAEs are judged. device: the processor's name, for the record.

    Raises ValueError for too few samples; RuntimeError where the trainers were not given the same ones; and as
    `Pass.train`.
    """
    if settings.steps <= WARMUP:
        raise ValueError(
            f"{settings.samples} samples are {settings.steps} batches of {settings.batch}, expected more than the "
            f"{WARMUP} that warm up; raise --samples"
        )
    rules = [rule for rule in RULES if not only or rule in only]
    left = [rule for rule in rules if store.get(key(rule, settings), kept(rule, settings)) is None]
    if left:
        world = World(settings)
        training = Pass(left, settings, world, store.path.parent / UNFINISHED)
        if training.restore():
            say(f"continued after {training.steps * settings.batch:,} samples")
        others = Others()
        training.train(progress)
        about = {
            "device": device,
            "digest": f"{check_digests(training.lanes) % 2**64:016x}",
            "generator_seconds": training.generator,
            "others": others.share(),
            "threads": torch.get_num_threads(),
            "versions": {name: importlib.metadata.version(name) for name in ("sae-lens", "torch")},
        }
        held_out = world.held_out()
        for rule in left:
            pair = training.lanes.pop(rule)
            found = {
                name: {**lane.found(), **world.scores(lane.trainer.judged(), held_out)} for name, lane in pair.items()
            }
            store.put(key(rule, settings), kept(rule, settings), {"trainers": found, **about})
        training.path.unlink()
    for rule in rules:
        entry = store.get(key(rule, settings), kept(rule, settings))
        assert entry is not None
        for name, found in entry["trainers"].items():
            say(
                f"{rule}, {name}: F1 {found['f1_score']:.3f}, MCC {found['mcc']:.3f}, explained variance "
                f"{found['explained_variance']:.3f} at L0 {found['sae_l0']:.1f}; {found['step']['ms']:.0f} ms a step"
                + (f"; L0 IS NOT NEAR {settings.k}" if is_off(found, settings.k) else "")
            )


def kept(rule: str, settings: Settings) -> dict[str, Any]:
    """What a stored entry is compared by."""
    return {**asdict(settings), "rule": rule}


def is_off(found: dict[str, Any], k: int) -> bool:
    """Whether an L0 is too far from k for the result to stand beside others."""
    return abs(found["sae_l0"] / k - 1) > ALLOWED
