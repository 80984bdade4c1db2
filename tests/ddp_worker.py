"""One of two processes that train an SAE under DistributedDataParallel: `python -m tests.ddp_worker RANK STORE OUT`."""

from __future__ import annotations

import contextlib
import sys
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import fastsae
from fastsae.training.batch import BatchTrainStep, SAEBatch
from fastsae.training.step import PlainTrainStep
from tests.counts_case import buffers
from tests.family_case import RULES, D, M, family_sae, tokens

RANKS, STEPS, N = 2, 3, 20


def sae_of(rule: str) -> fastsae.SparseAutoencoder:
    """A third of the latents hardly ever fire; some fire in one half of a batch only. Dead means silent for a batch."""
    sae = family_sae(RULES[rule], aux_k=3, dead_after=N, dead=False)
    with torch.no_grad():
        sae.b_enc[::3] -= 3.0
    return sae


def batch(i: int, rank: int | None) -> Tensor:
    x = tokens(N, seed=i)
    return x if rank is None else x[rank * N // RANKS :][: N // RANKS]


def train(rule: str, rank: int | None) -> dict[str, Tensor]:
    """Three steps of torch's Adam on half of each batch, or, with rank None, on all of it in one process."""
    sae = sae_of(rule)
    return train_on(sae, sae if rank is None else DistributedDataParallel(sae, find_unused_parameters=True), rank)


def train_on(sae: fastsae.SparseAutoencoder, model: torch.nn.Module, rank: int | None) -> dict[str, Tensor]:
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2, eps=1e-4)
    dead = []
    for i in range(STEPS):
        model(batch(i, rank)).loss.backward()
        dead.append(sae.dead)
        adam.step()
        adam.zero_grad()
    return {**sae.state_dict(), "fired": sae.fired, "fired_over": sae.fired_over, "dead": torch.stack(dead)}


def train_alone(rank: int) -> dict[str, Tensor]:
    """Each process trains its own SAE on its own inputs: with fastsae.optim and with the fused step."""
    sae, other = sae_of("topk"), sae_of("topk")
    optimizer = fastsae.optim.Adam(sae, lr=1e-2, independent=True)
    step = fastsae.FusedTrainStep(other, lr=1e-2, independent=True)
    for i in range(STEPS):
        x = tokens(N, seed=10 * rank + i)
        sae(x).loss.backward()
        optimizer.step()
        step(x)
    return {f"{how}.{k}": v for how, one in (("loop", sae), ("step", other)) for k, v in one.state_dict().items()}


BY_TOKEN = (
    "topk", "relu", "jumprelu", "jumprelu-tanh", "gated", "matryoshka", "hierarchical_topk", "group_max", "abs_topk",
)  # fmt: skip
"""Rules that look at each token alone: two processes train as one does."""
BY_BATCH = ("batch_topk", "matryoshka-weights", "matryoshka-sampled")
"""Rules that choose among a batch's tokens: each process among its own."""


class Checkpointed(nn.Module):
    """A model that does not keep what its SAE computes."""

    Out = namedtuple("Out", "loss")

    def __init__(self, sae: fastsae.SparseAutoencoder, reentrant: bool):
        super().__init__()
        self.sae, self.reentrant = sae, reentrant

    def forward(self, x: Tensor) -> Any:
        return self.Out(checkpoint(lambda t: self.sae(t).loss, x.requires_grad_(), use_reentrant=self.reentrant))


def sampled() -> fastsae.SparseAutoencoder:
    """Prefixes are drawn from the count of batches, and AuxK looks at dead latents: all depends on the counts."""
    rule = fastsae.Matryoshka(fastsae.TopK(5), sampled=4, shortest=3)
    sae = family_sae(rule, aux_k=3, dead_after=N, dead=False)
    with torch.no_grad():
        sae.b_enc[::3] -= 3.0
    return sae


WRAPPED: dict[str, Callable[[fastsae.SparseAutoencoder], nn.Module]] = {
    "plain": lambda sae: DistributedDataParallel(sae),
    "reentrant": lambda sae: DistributedDataParallel(Checkpointed(sae, True)),
    "not_reentrant": lambda sae: DistributedDataParallel(Checkpointed(sae, False)),
    "compiled": lambda sae: DistributedDataParallel(torch.compile(sae, backend="eager")),  # type: ignore[arg-type]
    "no_broadcast": lambda sae: DistributedDataParallel(sae, broadcast_buffers=False),
}


LONG = ("compiled",)  # half of the time of all


def train_wrapped(how: str, rank: int | None) -> dict[str, Tensor]:
    """As `train`, with two microbatches a step; the first process alone looks at something, in eval mode."""
    sae = sampled()
    model: Any = sae if rank is None else WRAPPED[how](sae)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2, eps=1e-4)
    for i in range(STEPS):
        with contextlib.nullcontext() if rank is None else model.no_sync():
            model(batch(10 * i, rank)).loss.backward()
        model(batch(10 * i + 1, rank)).loss.backward()
        if rank == 0 and how == "no_broadcast":
            model.eval()
            with torch.no_grad():
                model(batch(50, rank))
            model.train()
        adam.step()
        adam.zero_grad()
    return buffers(sae) | {n: p.detach() for n, p in sae.named_parameters()}


def codes_of(rule: str, rank: int) -> dict[str, Tensor]:
    """What a process has counted after each of a few steps, and the codes (STEPS, N / RANKS, M) of its tokens."""
    sae = sae_of(rule)
    model, adam = DistributedDataParallel(sae), torch.optim.Adam(sae.parameters(), lr=1e-2, eps=1e-4)
    codes = []
    for i in range(STEPS):
        out = model(batch(i, rank))
        out.loss.backward()
        codes.append(out.codes.to_dense().detach())
        adam.step()
        adam.zero_grad()
    return buffers(sae) | {n: p.detach() for n, p in sae.named_parameters()} | {"codes": torch.stack(codes)}


def not_finite(rank: int | None) -> dict[str, Tensor]:
    """A batch with a NaN in the second process's tokens does not count, in any process; the next one does."""
    sae = sae_of("topk")
    model = sae if rank is None else DistributedDataParallel(sae)
    for i in range(2):
        x = batch(i, None)
        if i == 0:
            x[N - 1, 2] = torch.nan
        model(x if rank is None else x[rank * N // RANKS :][: N // RANKS]).loss.backward()
        sae.zero_grad()
    return buffers(sae)


def many() -> SAEBatch:
    return SAEBatch(2, D, M, [fastsae.BatchTopK(3), fastsae.BatchTopK(5)], dead_after=N, dtype=torch.float64)


def codes_of_many(rank: int) -> dict[str, Tensor]:
    """As `codes_of`: codes (STEPS, 2, N / RANKS, M)."""
    saes, codes = many(), []
    model = DistributedDataParallel(saes)
    for i in range(STEPS):
        out = model(batch(i, rank))
        out.losses["loss"].sum().backward()
        codes.append(out.A.detach())
        saes.zero_grad()
    return buffers(saes) | {"codes": torch.stack(codes)}


STARTED = ("first_process", "own_rows", "loaded")


def targeted(seed: int = 0) -> fastsae.SparseAutoencoder:
    """An SAE that takes its thresholds, the penalty's weight and the scale of its input from data."""
    return fastsae.SparseAutoencoder(D, M, fastsae.JumpReLU(target_l0=4.0), seed=seed, dtype=torch.float64)


def train_started(how: str, rank: int | None) -> dict[str, Tensor]:
    """As `train`, of an SAE that was started from the first process's rows before.

    first_process: the others leave it to DistributedDataParallel to copy what that one has. own_rows: each process
    starts from its own rows, and the first one's count. loaded: the wrapped module of each loads a started state.
    """
    sae, first = targeted(0 if rank is None else rank), batch(0, 0)
    if rank is None or (how == "first_process" and rank == 0):
        sae.start_(first)
    elif how == "own_rows":
        sae.start_(batch(0, rank))
    if rank is None:
        return train_on(sae, sae, rank)
    model = DistributedDataParallel(sae, find_unused_parameters=True)
    if how == "loaded":
        model.load_state_dict({f"module.{name}": t for name, t in targeted().start_(first).state_dict().items()})
    return train_on(sae, model, rank)


FULLY_SHARDED = ("topk", "jumprelu", "gated", "matryoshka")


def train_fully_sharded(rule: str, rank: int | None) -> dict[str, Tensor]:
    """As `train`, with FSDP2 in place of DistributedDataParallel."""
    sae = sae_of(rule)
    if rank is not None:
        fully_shard(sae, mesh=one_axis())
    found = train_on(sae, sae, rank)
    whole = {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}
    return {name: t for name, t in whole.items() if name != "_extra_state"}


def one_axis() -> DeviceMesh:
    return init_device_mesh("cpu", (RANKS,))


def fully_sharded_refusals() -> dict[str, str]:
    """What is said where a fully sharded SAE meets what cannot serve it."""
    attempts: dict[str, Callable[[fastsae.SparseAutoencoder], object]] = {
        "optimizer": fastsae.optim.Adam,
        "parallelize": lambda sae: fastsae.parallel.parallelize(sae, fastsae.parallel.mesh()),
        "start": lambda sae: sae(batch(0, dist.get_rank())),
        "two axes": lambda sae: sae(batch(0, dist.get_rank())),
    }
    said = {}
    for name, attempt in attempts.items():
        sae = targeted() if name == "start" else sae_of("topk")
        mesh = init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("a", "b")) if name == "two axes" else one_axis()
        try:
            attempt(fully_shard(sae, mesh=mesh))
        except (TypeError, RuntimeError) as error:
            said[name] = str(error)
    return said


def without_start(rank: int) -> tuple[str, bool]:
    """The error message of a forward pass without a start, and whether the state is unchanged."""
    sae = targeted()
    try:
        DistributedDataParallel(sae)(batch(0, rank))
    except RuntimeError as error:
        before = targeted().state_dict()
        same = all(torch.equal(t.nan_to_num(7), before[name].nan_to_num(7)) for name, t in sae.state_dict().items())
        return str(error), same
    return "", False


def by_optimizer(sae: fastsae.SparseAutoencoder) -> None:
    optimizer = fastsae.optim.Adam(sae)
    sae(tokens(N)).loss.backward()
    optimizer.step()


def by_step(sae: fastsae.SparseAutoencoder) -> None:
    fastsae.FusedTrainStep(sae)(tokens(N))


def by_plain_step(sae: fastsae.SparseAutoencoder) -> None:
    PlainTrainStep(sae, lr=1e-3)(tokens(N))


def by_batch_step(sae: fastsae.SparseAutoencoder) -> None:
    BatchTrainStep(many(), lr=1e-3)(tokens(N))


def by_wrapped_optimizer(sae: fastsae.SparseAutoencoder) -> None:
    model = DistributedDataParallel(sae)
    optimizer = fastsae.optim.Adam(model, independent=True)
    model(tokens(N)).loss.backward()
    optimizer.step()


def by_join(sae: fastsae.SparseAutoencoder) -> None:
    model = DistributedDataParallel(sae)
    with model.join():
        model(tokens(N)).loss.backward()


ATTEMPTS = (by_optimizer, by_step, by_plain_step, by_batch_step, by_wrapped_optimizer, by_join)


def refusal(attempt: Callable[[fastsae.SparseAutoencoder], None]) -> tuple[str, bool]:
    """The error message, and whether the weights are unchanged."""
    sae = sae_of("topk")
    try:
        attempt(sae)
    except RuntimeError as error:
        before = sae_of("topk")
        return str(error), all(torch.equal(p, before.get_parameter(name)) for name, p in sae.named_parameters())
    return "", False


def main(rank: int, store: str, out: str, only: str | None = None) -> None:
    """only: one of WRAPPED that takes long, alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    if only is not None:
        torch.save({"found": {only: train_wrapped(only, rank)}}, f"{out}/{rank}.pt")
        dist.destroy_process_group()
        return
    found = {rule: train(rule, rank) for rule in BY_TOKEN}
    found |= {how: train_wrapped(how, rank) for how in WRAPPED if how not in LONG}
    found |= {f"codes.{rule}": codes_of(rule, rank) for rule in (*BY_BATCH, "jumprelu-target")}
    found |= {"not_finite": not_finite(rank), "many": codes_of_many(rank)}
    refused = {attempt.__name__: refusal(attempt) for attempt in ATTEMPTS}
    refused["without_start"] = without_start(rank)
    found |= {how: train_started(how, rank) for how in STARTED}
    found |= {f"fully sharded {rule}": train_fully_sharded(rule, rank) for rule in FULLY_SHARDED}
    refused["fully sharded"] = fully_sharded_refusals()
    torch.save({"found": found, "refused": refused, "alone": train_alone(rank)}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
