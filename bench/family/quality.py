"""`--part quality`: every rule on real activations, three sparsities each: FVU against L0, dead latents, speed.

All runs share data, width, batch, steps and schedule. For one sparsity of each rule the dense version is trained from
the same weights on the same batches for the first steps, in turns with the sparse one: this gives two curves and their
times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

import fastsae
from bench import real
from bench.dense import Dense
from bench.family.rules import groups
from bench.family.store import Store
from bench.timing import Sample
from fastsae.data import ShardSource
from fastsae.model.rules import Activation
from fastsae.runs.evaluate import evaluate

CHECK_EVERY = 10
ALLOWED = 0.005
"""The largest relative difference between the losses of the sparse and the dense curve."""


@dataclass(frozen=True)
class Settings:
    """The sizes of every run. dense_steps: of the dense version beside one run of each rule."""

    M: int = 2048
    batch: int = 1024
    steps: int = 200
    dense_steps: int = 40
    lr: float = 1e-3
    seed: int = 0
    toy: bool = False
    """Rows of the tests' fixture instead of a harvest."""

    @property
    def warmup(self) -> int:
        """Updates over which the learning rate and the penalties rise."""
        return max(1, self.steps // 10)


def quick(settings: Settings) -> Settings:
    return replace(settings, M=256, batch=256, steps=12, dense_steps=6, toy=True)


def rules(M: int) -> dict[str, list[Activation]]:
    """Three sparsities of each rule. Those without a K are given penalties that lead to L0s of the same size here.

    Inputs have a mean squared norm of D, so the standard deviation of a pre-act at random directions is some 0.7. A
    threshold moves slowly (log θ by the learning rate at most), so JumpReLU starts near where it should end.
    """
    ks = [k for k in (16, 32, 64) if k <= M // 4]
    return {
        "TopK": [fastsae.TopK(k) for k in ks],
        "BatchTopK": [fastsae.BatchTopK(k, decay=0.98) for k in ks],
        "ReLU": [fastsae.ReLU(l1) for l1 in (3.0, 2.2, 1.6)],
        "JumpReLU": [
            fastsae.JumpReLU(l0, threshold=t, bandwidth=1.0) for l0, t in ((0.5, 2.2), (0.5, 1.8), (0.5, 1.5))
        ],
        "Gated": [fastsae.Gated(l1) for l1 in (3.0, 2.2, 1.6)],
        "Matryoshka": [fastsae.Matryoshka(fastsae.TopK(k), groups=groups(M)) for k in ks],
        "HierarchicalTopK": [fastsae.HierarchicalTopK((k // 4, k // 2, k)) for k in ks],
        "GroupMax": [fastsae.GroupMax(k) for k in ks],
    }


class Data:
    """Training batches in an order that the seed fixes, and held-out rows of text of their own.

    Raises NoActivations where there are none.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        if settings.toy:
            rows = load_file(real.FIXTURE)["activations"].float()
            self.train, self.held_out = rows.tensor_split([len(rows) * 3 // 4])
            return
        try:
            real.harvest()
        except (OSError, ValueError, ImportError) as error:
            raise real.NoActivations(f"no activations: {error}. `make demo` installs model and text") from error
        source = ShardSource(real.ACTIVATIONS, seed=settings.seed, progress=False)
        assert source.n_tokens is not None
        self.train, self.held_out = source.next_batch(source.n_tokens), source.held_out()

    @property
    def width(self) -> int:
        return self.train.shape[1]

    def batch(self, step: int) -> Tensor:
        order = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
        return self.train[torch.randint(len(self.train), (self.settings.batch,), generator=order)]


def new_sae(rule: Activation, settings: Settings, data: Data) -> fastsae.SparseAutoencoder:
    sae = fastsae.SparseAutoencoder(data.width, settings.M, rule, normalize="constant", seed=settings.seed)
    return sae.calibrate_(data.train).init_from_(data.train)


def train(rule: Activation, settings: Settings, data: Data, label: str, beside: bool, progress: bool) -> dict[str, Any]:
    """One run; beside: its dense version takes turns with it for the first steps."""
    sae = new_sae(rule, settings, data)
    schedule = fastsae.Schedule(settings.steps, settings.warmup, "linear", 0.2)
    penalty = fastsae.Schedule(settings.warmup, settings.warmup)
    step = fastsae.FusedTrainStep(sae, lr=settings.lr, schedule=schedule, penalty_schedule=penalty)
    dense = Dense.of_sae(sae, settings.lr) if beside else None
    curves: dict[str, list[float]] = {"fastsae": [], "dense fp32": []}
    seconds: dict[str, list[float]] = {"fastsae": [], "dense fp32": []}
    both = settings.dense_steps if beside else 0
    all_seconds = 0.0
    for i in tqdm(range(settings.steps), desc=label, disable=not progress, leave=False):
        x = data.batch(i)
        started = time.perf_counter()
        metrics = step(x)
        loss = float(metrics["loss"])
        took = time.perf_counter() - started
        all_seconds += took
        if dense is not None and i < both:
            started = time.perf_counter()
            theirs = float(dense.step(x, lr_scale=schedule(i), penalty_scale=penalty(i)))
            seconds["dense fp32"].append(time.perf_counter() - started)
            seconds["fastsae"].append(took)
            if i % CHECK_EVERY == CHECK_EVERY - 1 or i == both - 1:
                curves["fastsae"].append(loss)
                curves["dense fp32"].append(theirs)
    result = evaluate(sae, data.held_out, batch_size=settings.batch)
    entry: dict[str, Any] = {
        "rule": rule.config(), "fvu": result.fvu, "l0": result.l0, "dead_share": result.dead_share,
        "tokens_per_s": settings.batch * settings.steps / all_seconds, "held_out": result.n_tokens,
    }  # fmt: skip
    if dense is not None:
        pairs = zip(curves["fastsae"], curves["dense fp32"], strict=True)
        entry["curves"], entry["off"] = curves, max(abs(a / b - 1) for a, b in pairs)
        entry["times"] = {name: Sample.of(values).in_ms() for name, values in seconds.items()}
    return entry


def run(
    store: Store, settings: Settings, only: Sequence[str], say: Callable[[str], None] = print, progress: bool = True
) -> list[str]:
    """Fills the store; returns the keys whose curves differ by more than is allowed."""
    data = Data(settings)
    kept, wrong = asdict(settings), []
    for name, three in rules(settings.M).items():
        if only and name not in only:
            continue
        for place, rule in enumerate(three):
            key = f"{name}-{place}"
            entry = store.get(key, {**kept, "rule": rule.config()})
            if entry is None:
                found = train(rule, settings, data, f"{key}", place == len(three) // 2, progress)
                entry = store.put(key, {**kept, "rule": rule.config()}, found)
            off = entry.get("off")
            say(
                f"{key}: FVU {entry['fvu']:.4f} at L0 {entry['l0']:.1f}, {entry['dead_share']:.1%} dead, "
                f"{entry['tokens_per_s']:,.0f} tokens/s" + ("" if off is None else f"; dense curve within {off:.2%}")
            )
            if off is not None and off > ALLOWED:
                wrong.append(key)
    return wrong
