"""One of R processes that train an SAE of every rule for many steps, and what one process makes of the same.

    python -m tests.parallel_proof_worker RANK WORLD STORE OUT DATA LATENTS WHICH

WHICH is "all", or "some": of every rule one way to store its weights and moments, another on each mesh.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

import fastsae
from fastsae.parallel import gathered, gathered_state, mesh, parallelize
from tests.family_case import RULES
from tests.parallel_worker import N, batch, sae_of, state_of

STEPS = 200 if "FASTSAE_TEST_PROOF" in os.environ else 20
MESHES = [(2, 1), (1, 2), (3, 1), (1, 3), (2, 2)]
WAYS = [(setting, moments) for setting in ("plain", "tied") for moments in ("fp32", "bf16")]
Case = tuple[str, str, str, str]  # rule, setting, moments, dtype

EXACT = ("topk", "topk-weighted", "batch_topk", "matryoshka", "matryoshka-by-norm", "hierarchical_topk", "group_max",
         "abs_topk")  # fmt: skip
"""Rules whose updates depend on no sum over the batch: with a shared batch they are to have one process's bits."""


def cases(data: int, latents: int, which: str) -> list[Case]:
    """In float64, where rounding stays small; also in float32, for the bits where only the batch is shared, and with
    "all" where the dictionary is, to see how far that takes them.
    """
    found: list[Case] = []
    for i, rule in enumerate(RULES):
        ways = WAYS if which == "all" else [WAYS[(i + MESHES.index((data, latents))) % len(WAYS)]]
        for setting, moments in ways:
            found.append((rule, setting, moments, "float64"))
            if latents == 1 and rule in EXACT:
                found.append((rule, setting, moments, "float32"))
        if latents > 1 and which == "all":
            found.append((rule, "plain", "fp32", "float32"))
    return found


def train(case: Case, grid: Any = None) -> dict[str, Any]:
    """Weights, counters, thresholds and moments after the steps, and the last metrics."""
    rule, setting, moments, name = case
    dtype = getattr(torch, name)
    sae = sae_of(rule, setting, dtype)
    sae = sae if grid is None else parallelize(sae, grid)
    step = fastsae.FusedTrainStep(sae, lr=1e-2, moments=moments)
    for i in range(STEPS):
        metrics = step(batch(i, grid, N).to(dtype))
    whole = gathered(sae)
    state = gathered_state(step.state_dict(), sae)
    assert state is not None
    kept = state["optimizer"]["state"]
    return {
        **state_of(whole),
        "fired": whole.fired,
        **{f"{p}.{key}": t for p, held in kept.items() for key, t in held.items()},
        **{f"metrics.{key}": value for key, value in metrics.items() if key != "redone"},
    }


alone = cache(train)


def main(rank: int, world: int, store: str, out: str, data: int, latents: int, which: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world))
    grid = mesh(data, latents)
    torch.save({case: train(case, grid) for case in cases(data, latents, which)}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5], int(sys.argv[5]), int(sys.argv[6]), sys.argv[7])
