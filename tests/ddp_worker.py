"""One of two processes that train an SAE under DistributedDataParallel: `python -m tests.ddp_worker RANK STORE OUT`."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import fastsae
from tests.family_case import RULES, family_sae, tokens

RANKS, STEPS, N = 2, 3, 20


def sae_of(rule: str) -> fastsae.SparseAutoencoder:
    return family_sae(RULES[rule], aux_k=3, dead_after=50)


def train(rule: str, rank: int | None) -> dict[str, torch.Tensor]:
    """Three steps of torch's Adam on half of each batch, or, with rank None, on all of it in one process."""
    sae = sae_of(rule)
    model = sae if rank is None else DistributedDataParallel(sae, find_unused_parameters=True)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2, eps=1e-4)
    for i in range(STEPS):
        x = tokens(N, seed=i)
        model(x if rank is None else x[rank * N // RANKS :][: N // RANKS]).loss.backward()
        adam.step()
        adam.zero_grad()
    return {**sae.state_dict(), "fired": sae.fired, "fired_over": sae.fired_over}


def refusal() -> str:
    try:
        fastsae.FusedTrainStep(sae_of("topk"))(tokens(N))
    except RuntimeError as error:
        return str(error)
    return ""


def main(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    found = {rule: train(rule, rank) for rule in ("topk", "jumprelu")}
    refused = refusal()
    alone = fastsae.optim.Adam(sae_of("topk"), independent=True)
    alone.step()
    torch.save({"found": found, "refused": refused}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
