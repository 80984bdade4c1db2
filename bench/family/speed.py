"""`--part speed`: a whole training step of each rule against its dense version, in turns, checked before it is timed.

Three kinds of entries: one for each rule; `crossing-<share>`, ReLU at that density with sparse and with dense steps,
which shows where DENSE_ABOVE belongs; `ragged`, a code whose longest token has a hundred times the mean, against a
fixed K.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

import fastsae
from bench import cases, real
from bench.cases import Case, Inputs
from bench.check import WrongResult
from bench.dense import LR, Dense
from bench.family.rules import TIMED, Timed, quantile, sae_of
from bench.family.store import Others, Store, wait_for_quiet
from bench.run import rotating
from bench.timing import interleaved

CASE = Case("family")
DENSITIES = (0.01, 0.02, 0.04, 0.08, 0.16)
LONGEST = 100
"""The longest token's L0 over the mean, in the ragged case."""
LOSS_OFF = {"dense fp32": 1e-3, "dense bf16": 2e-2}
"""Relative difference of the loss that a check allows. In bfloat16 a few other latents are chosen."""


@dataclass(frozen=True)
class Settings:
    """case: the sizes; rounds and turn (seconds) as bench.timing.interleaved has them; wait: seconds for a quiet
    machine before each entry."""

    case: Case = CASE
    rounds: int = 2
    turn: float = 1.0
    wait: float = 0.0

    @property
    def kept(self) -> dict[str, Any]:
        """What an entry depends on."""
        return {"case": asdict(self.case), "rounds": self.rounds, "turn_s": self.turn}


def quick(settings: Settings) -> Settings:
    return replace(settings, case=cases.quick(settings.case), rounds=1, turn=0.0)


def check(name: str, ours: dict[str, Tensor], theirs: dict[str, Tensor], allowed: float) -> dict[str, float]:
    """The relative differences of loss and L0 of one step from the same weights. Raises WrongResult."""
    off = {key: abs(float(ours[key]) / float(theirs[key]) - 1) for key in ("loss", "l0")}
    if not max(off.values()) <= allowed:
        raise WrongResult(
            f"{name}: loss {float(ours['loss']):.6g} and L0 {float(ours['l0']):.6g}, expected "
            f"{float(theirs['loss']):.6g} and {float(theirs['l0']):.6g} within {allowed}"
        )
    return off


def time_rule(name: str, timed: Timed, inputs: Inputs, settings: Settings) -> dict[str, Any]:
    """One rule: its step, both dense versions, and for Matryoshka plain TopK."""
    case = settings.case
    rule, bias = timed.make(case), timed.bias(case)
    fused = fastsae.FusedTrainStep(sae_of(inputs, rule, bias), lr=LR)
    dense = {"dense fp32": Dense.of_sae(fused.sae, LR), "dense bf16": Dense.of_sae(fused.sae, LR, autocast=True)}
    ours = fused(inputs.x)
    differences = {
        other: check(f"{name}, {other}", ours, step.metrics(inputs.x), LOSS_OFF[other]) for other, step in dense.items()
    }
    calls = {"fastsae": rotating(inputs, fused)}
    if name == "Matryoshka":
        calls["TopK"] = rotating(inputs, fastsae.FusedTrainStep(sae_of(inputs, TIMED["TopK"].make(case)), lr=LR))
    calls |= {other: rotating(inputs, step.step) for other, step in dense.items()}
    return {
        "rule": rule.config(), "l0": float(ours["l0"]), "off": differences, "target": timed.target,
        **measured(calls, settings),
    }  # fmt: skip


def measured(calls: dict[str, Callable[[], object]], settings: Settings) -> dict[str, Any]:
    """times by name, and the share of the cores that others took meanwhile."""
    wait_for_quiet(settings.wait)
    others = Others()
    times = interleaved(calls, settings.rounds, settings.turn)
    return {"times": {name: sample.in_ms() for name, sample in times.items()}, "others": others.share()}


def time_density(density: float, inputs: Inputs, settings: Settings) -> dict[str, Any]:
    """ReLU with this share of the latents active: the sparse step and the dense one, which must agree."""
    case = settings.case
    bias = -quantile(density * case.M, case.M)
    ways = {
        way: fastsae.FusedTrainStep(sae_of(inputs, fastsae.ReLU(5.0), bias), lr=LR, dense_above=above)
        for way, above in (("sparse", 1.0), ("dense", 0.0))
    }
    found = {way: step(inputs.x) for way, step in ways.items()}
    off = check(f"density {density}", found["sparse"], found["dense"], LOSS_OFF["dense fp32"])
    calls = {way: rotating(inputs, step) for way, step in ways.items()}
    return {"density": float(found["sparse"]["l0"]) / case.M, "off": off, **measured(calls, settings)}


def crossing(entries: Sequence[dict[str, Any]]) -> float | None:
    """The density at which both ways take equally long, between the two measured ones, by a line in their logarithms.

    None where one way is faster at all of them.
    """
    points = sorted((e["density"], e["times"]["sparse"]["ms"] / e["times"]["dense"]["ms"]) for e in entries)
    for (below, a), (above, b) in itertools.pairwise(points):
        if a <= 1 < b:
            share = -torch.log(torch.tensor(a)) / torch.log(torch.tensor(b / a))
            return float(below * (above / below) ** share)
    return None


def uneven(inputs: Inputs, case: Case) -> tuple[Inputs, float]:
    """The inputs with rows scaled by a power law, so that the longest token has LONGEST times the mean L0 of case.K.

    Scores of a token with scale s are N(0, s²): P(score > bar) follows, and the power is found by bisection. Returns
    the inputs and the longest token's L0 over the mean that the arithmetic gives.
    """
    n = case.N
    ranks = [(i + 0.5) / n for i in range(n)]

    def lengths(power: float) -> list[float]:
        low, high = 0.0, 50.0
        scales = [rank**-power for rank in ranks]
        for _ in range(50):
            bar = (low + high) / 2
            counts = [case.M * (1 - NormalDist().cdf(bar / scale)) for scale in scales]
            low, high = (bar, high) if sum(counts) > n * case.K else (low, bar)
        return counts

    wanted = min(LONGEST, 0.45 * case.M / case.K)  # half of all latents is the most that any scale gives
    low, high = 0.0, 2.0
    for _ in range(20):
        power = (low + high) / 2
        low, high = (power, high) if max(lengths(power)) < wanted * case.K else (low, power)
    shuffled = torch.tensor(ranks)[torch.randperm(n, generator=torch.Generator().manual_seed(case.seed))]
    batches = tuple(x * shuffled.pow(-power)[:, None] for x in inputs.batches)
    return replace(inputs, batches=batches), max(lengths(power)) / case.K


def time_ragged(inputs: Inputs, settings: Settings) -> dict[str, Any]:
    """BatchTopK on rows of very uneven scale, and TopK on the same rows: equally many active latents."""
    case = settings.case
    inputs, _ = uneven(inputs, case)
    steps = {
        name: fastsae.FusedTrainStep(sae_of(inputs, TIMED[name].make(case)), lr=LR) for name in ("BatchTopK", "TopK")
    }
    lengths = steps["BatchTopK"].sae.encode(inputs.x).l0.double()
    found = {name: float(step(inputs.x)["l0"]) for name, step in steps.items()}
    if abs(found["BatchTopK"] / found["TopK"] - 1) > 1e-3:
        raise WrongResult(f"ragged: mean L0 {found['BatchTopK']} and {found['TopK']}, expected the same")
    calls = {name: rotating(inputs, step) for name, step in steps.items()}
    return {"l0": float(lengths.mean()), "longest": float(lengths.max()), **measured(calls, settings)}


def jobs(inputs: Inputs, settings: Settings) -> dict[str, Callable[[], dict[str, Any]]]:
    """Every entry by its key, most wanted first."""
    made: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, timed in TIMED.items():
        made[name] = partial(time_rule, name, timed, inputs, settings)
    for density in DENSITIES:
        made[f"crossing-{density:g}"] = partial(time_density, density, inputs, settings)
    made["ragged"] = partial(time_ragged, inputs, settings)
    return made


def run(store: Store, settings: Settings, only: Sequence[str], say: Callable[[str], None] = print) -> list[str]:
    """Fills the store. only: keys, none for all. Returns the keys that were wrong, which are not timed."""
    inputs = cases.build(settings.case, real.rows, real.trained)
    wrong = []
    for key, job in jobs(inputs, settings).items():
        if only and not any(key == name or key.startswith(f"{name}-") for name in only):
            continue
        if store.get(key, settings.kept):
            say(f"{key}: measured before")
            continue
        try:
            entry = store.put(key, settings.kept, job())
        except WrongResult as error:
            say(f"{key}: wrong, not timed: {error}")
            wrong.append(key)
            continue
        times = ", ".join(f"{name} {t['ms']:.0f}" for name, t in entry["times"].items())
        say(f"{key}: ms {times}; others took {entry['others'] or 0:.0%} of the cores")
    return wrong
