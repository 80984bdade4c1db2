"""One of two processes of test_parallel_faults.py: RANK WORLD STORE OUT SHAPE CASE."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import fastsae
from fastsae.data.tensor import TensorSource
from fastsae.model import tensorfile
from fastsae.parallel import gathered, gathered_state, mesh, parallelize
from fastsae.runs import checkpoint, parts
from fastsae.runs.evaluate import evaluate
from fastsae.runs.together import Team
from fastsae.runs.trainer import TrainConfig, Trainer
from tests.parallel_worker import batch, state_of

D, M, N = 12, 41, 37


def sae_of(grid: Any, rule: Any = None, M: int = M, **settings: Any) -> fastsae.SparseAutoencoder:
    rule = rule or fastsae.TopK(5)
    sae = fastsae.SparseAutoencoder(D, M, rule, seed=1, **{"dtype": torch.float64, **settings})
    return sae if grid is None else parallelize(sae, grid)


def all_rows(sae: fastsae.SparseAutoencoder, t: Tensor) -> Tensor:
    return t if sae.placement is None else torch.cat(sae.placement.tokens.gather(t))


def through_encode(grid: Any) -> dict[str, Tensor]:
    """x's gradient through encode and decode, and torch's Adam on that loss where only the dictionary is shared."""
    sae = sae_of(grid)
    x = batch(0, grid).requires_grad_()
    (sae.decode(sae.encode(x)) - x).pow(2).sum().backward()
    assert x.grad is not None
    found = {"x.grad": all_rows(sae, x.grad)}
    if grid is None or grid.size(0) == 1:
        assert sae.b_dec.grad is not None
        found["b_dec.grad"] = sae.b_dec.grad
    return found


def hooked(grid: Any) -> dict[str, Tensor]:
    """With a hook on a parameter gradients are dense: b_dec's has a share of every shard's encoder."""
    sae = sae_of(grid)
    adam = fastsae.optim.Adam(sae, lr=1e-2)
    assert sae.W_enc is not None
    sae.W_enc.register_hook(lambda grad: grad)
    for i in range(3):
        sae(batch(i, grid)).loss.backward()
        adam.step()
    return state_of(gathered(sae))


def fvu_of_x(grid: Any) -> dict[str, Tensor]:
    sae = sae_of(grid, loss="fvu").eval()
    x = batch(0, grid).requires_grad_()
    sae(x).loss.backward()
    assert x.grad is not None
    return {"x.grad": all_rows(sae, x.grad)}


def annealed(grid: Any) -> dict[str, Tensor]:
    sae = sae_of(grid, fastsae.Matryoshka(fastsae.TopK(5), groups=(10, 31)))
    step = fastsae.FusedTrainStep(sae, lr=1e-2, k_schedule=lambda i: 30 - i)
    for i in range(3):
        step(batch(i, grid))
    return state_of(gathered(sae))


def scaled_rate(grid: Any) -> dict[str, Tensor]:
    """The learning rate by the number of latents is that of the whole dictionary."""
    rows = torch.randn(500, D, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        steps=4, batch_size=40, eval_every=0, log_every=4, checkpoint_every=4, progress=False, lr_rule="inverse_sqrt"
    )
    sae = fastsae.SparseAutoencoder(D, M, fastsae.TopK(5), seed=1)
    run_dir = Path(sys.argv[4]) / ("together" if grid is not None else f"alone{sys.argv[1]}")
    Trainer(sae, TensorSource(rows, holdout=50), config, run_dir, mesh=grid).run()
    return {name: t.double() for name, t in state_of(gathered(sae)).items()}


def into_an_ordinary_one(grid: Any) -> dict[str, Tensor]:
    """The state of an SAE that shares only its batch is that of an ordinary one."""
    sae, other = sae_of(grid), sae_of(None)
    fastsae.FusedTrainStep(sae, lr=1e-2)(batch(0, grid))
    other.load_state_dict((sae if grid is None or grid.size(1) == 1 else gathered(sae)).state_dict())
    return state_of(other)


def scaler(grid: Any) -> dict[str, Tensor]:
    """A gradient that is not finite in one process: no process makes the step, and all lower their scale."""
    sae = sae_of(grid)
    adam, scaler = fastsae.optim.Adam(sae, lr=1e-2), torch.amp.GradScaler("cpu", init_scale=4.0)
    last = grid is None or dist.get_rank() == dist.get_world_size() - 1
    for i in range(3):
        result = sae(batch(i, grid))
        loss = result.loss
        if i == 1 and last:
            loss = loss + result.codes.acts.sum() * torch.inf
        scaler.scale(loss).backward()
        scaler.step(adam)
        scaler.update()
        adam.zero_grad()
    return {**state_of(gathered(sae)), "scale": torch.tensor(scaler.get_scale())}


def no_rows(grid: Any) -> dict[str, Tensor]:
    """All rows in the first process of the data axis: through a step, and a decoder whose codes are held fixed."""
    sae = sae_of(grid)
    x = batch(0)[: 0 if grid is not None and grid.get_local_rank("data") else None]
    fastsae.FusedTrainStep(sae, lr=1e-2)(x)
    adam = fastsae.optim.Adam(sae, lr=1e-2)
    with torch.no_grad():
        codes = sae.encode(x)
    ((sae.decode(codes) - x).pow(2).sum() / N).backward()
    adam.step()
    return state_of(gathered(sae))


def ahead(grid: Any) -> dict[str, Tensor]:
    """The inputs of both encoder passes, AuxK's too, are on their way before the step where exchanges overlap."""
    sae = sae_of(grid, M=400, aux_k=3, dead_after=1)
    step = fastsae.FusedTrainStep(sae, lr=1e-2)
    for i, overlaps in enumerate((False, True)):
        if sae.placement is None:
            step(batch(i, grid))
            continue
        axis, later = sae.placement.tokens, []
        axis.overlaps, gather = overlaps and axis.size > 1, axis.gather
        axis.gather = lambda t, later=later, gather=gather: (later.append(t.shape[1:] == (D,)), gather(t))[1]
        step(batch(i, grid))
        axis.gather = gather
        # In the step: the gradients of the reconstruction and of AuxK's, and both inputs unless they went ahead.
        assert sum(later) == (0 if axis.size == 1 else 2 if overlaps else 4), later
    return state_of(gathered(sae))


def slow(grid: Any) -> dict[str, Tensor]:
    """One process that takes its time, now before a pass and now before a step: the others wait for it."""
    sae = sae_of(grid, fastsae.BatchTopK(5))
    adam = fastsae.optim.Adam(sae, lr=1e-2)
    last = grid is not None and dist.get_rank() == dist.get_world_size() - 1
    for i in range(4):
        time.sleep(0.2 * last * (i % 2))
        sae(batch(i, grid)).loss.backward()
        time.sleep(0.2 * last * (1 - i % 2))
        adam.step()
    return state_of(gathered(sae))


def built(grid: Any) -> dict[str, Tensor]:
    """From nothing but a seed: each process's rows, with the bits that one process draws."""
    rules = {"topk": fastsae.TopK(5), "gated": fastsae.Gated(target_l0=4.0), "jumprelu": fastsae.JumpReLU(0.1)}
    for rule in rules.values() if grid is not None else ():
        for more in ({}, {"d_out": 7}, {"tied": True}, {"decoder_norm": "free", "init_norm": 0.3}):
            settings: dict[str, Any] = {"skip": "tied" not in more, "normalize": "constant", **more}
            whole = fastsae.SparseAutoencoder(D, M, rule, seed=5, dtype=torch.bfloat16, **settings)
            empty = fastsae.SparseAutoencoder(D, M, rule, dtype=torch.bfloat16, device="meta", **settings)
            part = parallelize(empty, grid, seed=5)
            for name, t in state_of(gathered(part)).items():
                other = state_of(whole)[name]
                assert torch.equal(t.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name
            assert part.started == whole.started
            assert all(p.requires_grad and not p.is_meta for p in part.parameters())
    return {}


def files_of_one_process(grid: Any) -> dict[str, Tensor]:
    """A checkpoint written from parts has the bytes of one that a process writes which has all; each reads its rows."""
    if grid is None:
        return {}
    for moments in ("fp32", "8bit"):
        root = Path(sys.argv[4]) / f"checkpoint {moments}"
        sae = sae_of(grid, fastsae.Gated(0.2), dtype=torch.float32, skip=True, pre_bias=False)
        step = fastsae.FusedTrainStep(sae, lr=1e-2, moments=moments)
        for i in range(2):
            step(batch(i, grid).float())
        team, others = Team(grid), {"rng": {"some": torch.arange(3), "more": 1.5}}
        path = parts.write(root / "parts", 7, sae, step.state_dict(), others if team.writes else None, team.agreed)
        whole, state = gathered(sae), gathered_state(step.state_dict(), sae)
        assert state is not None
        if team.writes:
            density = {"fired": whole.fired, "over": int(whole.fired_over)}
            alone = checkpoint.write_checkpoint(
                root / "whole",
                7,
                {"optimizer": state, **others, "density": density},
                functools.partial(fastsae.save, whole),
            )
            assert path is not None
            assert {one.name for one in path.iterdir()} == {one.name for one in alone.iterdir()}
            for one in alone.iterdir():
                assert one.read_bytes() == (path / one.name).read_bytes(), one.name
            fastsae.load(path)  # which compares the checksum
        path = team.from_first(path)
        other = sae_of(grid, fastsae.Gated(0.2), dtype=torch.float32, skip=True, pre_bias=False)
        again = fastsae.FusedTrainStep(other, lr=1e-3, moments=moments)
        again.load_state_dict(parts.read(path, other)["optimizer"])
        for one, two in ((sae, step), (other, again)):
            two(batch(3, grid).float())
            assert torch.equal(one.W_dec, sae.W_dec)
    return {}


NUMBERS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "through encode": through_encode,
    "hooked": hooked,
    "fvu of x": fvu_of_x,
    "annealed": annealed,
    "scaled rate": scaled_rate,
    "scaler": scaler,
    "no rows": no_rows,
    "ahead": ahead,
    "slow": slow,
    "into an ordinary one": into_an_ordinary_one,
    "built": built,
    "files of one process": files_of_one_process,
}


# -- what has to be refused: each returns what it did instead, or raises ----------------------------------------------


def other_rows(grid: Any) -> object:
    """Rows split by rank, as a DistributedSampler would, along the axis of latents."""
    return fastsae.FusedTrainStep(sae_of(grid))(batch(dist.get_rank()))


def saved(grid: Any) -> object:
    return fastsae.save(sae_of(grid), Path(sys.argv[4]) / f"saved{dist.get_rank()}")


def rows_of_others(grid: Any) -> object:
    """The state of the other process's latents, of equal number: what DCP gives for plain tensors."""
    sae = sae_of(grid, M=40)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, sae.state_dict())
    return sae.load_state_dict(everyone[1 - dist.get_rank()])


def groups_in_unequal_parts(grid: Any) -> object:
    return fastsae.parallel.Sharded(sae_of(grid, fastsae.GroupMax(3), M=42))


def other_settings(grid: Any) -> object:
    sae = sae_of(grid)
    adam = fastsae.optim.Adam(sae, eps=1e-8 * (1 + dist.get_rank()))
    sae(batch(0, grid)).loss.backward()
    return adam.step()


def other_rates(grid: Any) -> object:
    """In a second step, which nothing of is made: with the same rate it goes on."""
    sae = sae_of(grid)
    adam = fastsae.optim.Adam(sae, lr=1e-3)
    for i in range(2):
        sae(batch(i, grid)).loss.backward()
        adam.param_groups[0]["lr"] = 1e-3 * (1 + i * dist.get_rank())
        before = sae.W_dec.detach().clone()
        try:
            adam.step()
        except RuntimeError:
            assert torch.equal(sae.W_dec, before)
            adam.param_groups[0]["lr"] = 1e-3
            adam.step()
            assert not torch.equal(sae.W_dec, before)
            raise
    return None


def other_evaluated_rows(grid: Any) -> object:
    return evaluate(sae_of(grid), batch(dist.get_rank()), batch_size=10)


def fewer_evaluated_rows(grid: Any) -> object:
    """The first batches are alike, and then one process has no further one."""
    return evaluate(sae_of(grid), batch(0)[: 30 if dist.get_rank() else None], batch_size=10)


def other_targets(grid: Any) -> object:
    sae = sae_of(grid, d_out=7)
    return evaluate(sae, batch(0), targets=batch(1 + dist.get_rank())[:, :7], batch_size=10)


def fewer_calibrated_rows(grid: Any) -> object:
    blocks = (batch(i) for i in range(2 + dist.get_rank()))
    return sae_of(grid, fastsae.BatchTopK(5)).calibrate_threshold_(blocks)


def resampled_at_other_rows(grid: Any, **changes: Any) -> object:
    sae = sae_of(grid)
    dead = torch.ones(sae.d_sae, dtype=torch.bool)
    before = {name: t.clone() for name, t in state_of(sae).items()}
    given = {"rows": batch(0), "seed": 0, **changes}
    try:
        return fastsae.resample_(sae, given["rows"], dead=dead, seed=given["seed"])
    finally:
        assert all(torch.equal(t, before[name]) for name, t in state_of(sae).items())


def disk_full(grid: Any) -> object:
    """In the first process, in the middle of the rows: the others do not wait for ever, and nothing is left."""

    def add(self: tensorfile.TensorWriter, t: Tensor) -> None:
        raise OSError(28, "No space left on device", "somewhere")

    sae, team, root = sae_of(grid), Team(grid), Path(sys.argv[4]) / "full"
    step, add_before = fastsae.FusedTrainStep(sae, lr=1e-2), tensorfile.TensorWriter.add
    tensorfile.TensorWriter.add = add  # type: ignore[method-assign]
    try:
        return parts.write(root, 7, sae, step.state_dict(), {} if team.writes else None, team.agreed)
    finally:
        tensorfile.TensorWriter.add = add_before  # type: ignore[method-assign]
        assert not list(root.iterdir())


def other_seeds(grid: Any) -> object:
    sae = fastsae.SparseAutoencoder(D, M, fastsae.TopK(5), device="meta")
    return parallelize(sae, grid, seed=dist.get_rank())


def unstarted(grid: Any) -> object:
    return sae_of(grid, fastsae.JumpReLU(target_l0=4.0))(batch(0, grid))


def too_large_in_one_shard(grid: Any) -> object:
    sae = sae_of(grid, fastsae.JumpReLU(target_l0=4.0))
    assert sae.W_enc is not None
    with torch.no_grad():
        sae.W_enc[0] *= 1e308 if dist.get_rank() else 1.0
    return sae.start_(1e3 * batch(0))


def run_of(grid: Any, rows_seed: int, **settings: Any) -> object:
    rows = torch.randn(500, D, generator=torch.Generator().manual_seed(rows_seed))
    config = TrainConfig(steps=2, batch_size=40, eval_every=0, progress=False, **settings)
    sae = fastsae.SparseAutoencoder(D, M, fastsae.TopK(5), seed=1)
    return Trainer(sae, TensorSource(rows, holdout=50), config, Path(sys.argv[4]) / "refused", mesh=grid).run()


def wrapped(grid: Any) -> object:
    sae = sae_of(grid, M=40)  # equal parts, or DistributedDataParallel itself refuses them
    return torch.nn.parallel.DistributedDataParallel(sae)(batch(0))


def some_latents(grid: Any) -> object:
    return sae_of(grid).encode(batch(0), latents=[1, 2])


def read(grid: Any) -> object:
    sae = sae_of(grid)
    adam = fastsae.optim.Adam(sae)
    sae(batch(0, grid)).loss.backward()
    grad: Any = sae.b_dec.grad
    found = grad.to_dense()
    adam.zero_grad()
    return found


EACH: dict[str, Callable[[Any], object]] = {
    "disk full": disk_full,
    "other seeds": other_seeds,
    "no seed": lambda grid: parallelize(fastsae.SparseAutoencoder(D, M, fastsae.TopK(5), device="meta"), grid),
    "a seed of what has weights": lambda grid: parallelize(sae_of(None), grid, seed=1),
    "other evaluated rows": other_evaluated_rows,
    "fewer evaluated rows": fewer_evaluated_rows,
    "other targets": other_targets,
    "fewer calibrated rows": fewer_calibrated_rows,
    "resampled at other rows": lambda grid: resampled_at_other_rows(grid, rows=batch(dist.get_rank())),
    "resampled with other seeds": lambda grid: resampled_at_other_rows(grid, seed=dist.get_rank()),
}
REFUSED: dict[str, dict[str, Callable[[Any], object]]] = {
    "1x2": {
        "other rows": other_rows,
        "saved": saved,
        "rows of others": rows_of_others,
        "groups in unequal parts": groups_in_unequal_parts,
        "wrapped": wrapped,
        "some latents": some_latents,
        "read": read,
        "too large in one shard": too_large_in_one_shard,
        "other settings": other_settings,
        "other rates": other_rates,
        **EACH,
    },
    "2x1": {
        **EACH,
        "other settings": other_settings,
        "other rates": other_rates,
        "unstarted": unstarted,
        "a run's other data": lambda grid: run_of(grid, dist.get_rank()),
        "a run's other settings": lambda grid: run_of(grid, 0, lr=1e-3 * (1 + dist.get_rank())),
    },
}
"""By the mesh, data x latents."""


def outcome(what: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"found": what(), "said": None}
    except (RuntimeError, ValueError, TypeError) as error:
        return {"found": None, "said": f"{type(error).__name__}: {error}"}


def main(rank: int, world: int, store: str, out: str, shape: str) -> None:
    torch.set_num_threads(1)
    expected = {name: case(None) for name, case in NUMBERS.items()}
    joined = dist.FileStore(store, world)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=joined, timeout=timedelta(seconds=60))
    data, latents = map(int, shape.split("x"))
    grid = mesh(data, latents)
    found = {name: outcome(lambda case=case: case(grid)) for name, case in NUMBERS.items()}
    found |= {name: outcome(lambda case=case: repr(case(grid))) for name, case in REFUSED[shape].items()}
    torch.save({"found": found, "expected": expected}, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6])
