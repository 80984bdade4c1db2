"""One of R processes that train SAEs together: `python -m tests.parallel_worker RANK WORLD STORE OUT`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

import fastsae
from bench.parallel.model import Shape, received
from fastsae.model.axis import bounds
from fastsae.parallel import Sharded, gathered, gathered_state, mesh, own_state, parallelize
from fastsae.runs.evaluate import evaluate
from tests.family_case import RULES, D, M, family_sae, tokens

STEPS = int(os.environ.get("FASTSAE_TEST_STEPS", "4"))
N = 37  # neither M nor N divides by 3

MESHES = {2: [(2, 1), (1, 2)], 3: [(3, 1), (1, 3)], 4: [(2, 2)]}
"""data x latents, by the number of processes."""

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "aux": {"aux_k": 3, "dead_after": N},
    "tied": {"tied": True},
    "fvu": {"loss": "fvu"},
    "unit, no pre-bias": {"decoder_norm": "unit", "pre_bias": False},
    "skip": {"skip": True, "pre_bias": False},
    "ghost": {"ghost": "residual", "dead_after": N},
    "ghost pull": {"ghost": "pull", "dead_after": N},
    "ghost, tied": {"ghost": "residual", "dead_after": N, "tied": True},
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adam": {},
    "clipped": {"clip_norm": 0.05, "clip_rows": 0.02},
    "lion": {"kind": fastsae.optim.Lion},
    "adamw": {"kind": fastsae.optim.AdamW},
}


def cases() -> dict[str, tuple[str, str, str]]:
    """Every rule; for TopK also every setting and optimizer, for some others AuxK."""
    found = [(rule, "plain", "adam") for rule in RULES]
    found += [("topk", setting, "adam") for setting in SETTINGS if setting != "plain"]
    found += [(rule, "plain", name) for rule in ("topk", "jumprelu") for name in OPTIMIZERS if name != "adam"]
    found += [(rule, "aux", "adam") for rule in ("batch_topk", "jumprelu-target", "matryoshka", "hierarchical_topk")]
    return {", ".join(case): case for case in found}


def sae_of(rule: str, setting: str, dtype: torch.dtype = torch.float64) -> fastsae.SparseAutoencoder:
    """A third of the latents hardly ever fire, so that AuxK has dead ones."""
    sae = family_sae(RULES[rule], dead=False, **{"dtype": dtype, **SETTINGS[setting]})
    with torch.no_grad():
        sae.b_enc[::3] -= 3.0
    sae.start_(tokens(N, seed=99).to(dtype))
    return sae


def state_of(sae: fastsae.SparseAutoencoder) -> dict[str, Tensor]:
    return {name: t for name, t in sae.state_dict().items() if name != "_extra_state"}


def batch(i: int, grid: Any = None, n: int = N) -> Tensor:
    """All rows of a batch, or those of this process."""
    x = tokens(n, seed=i)
    if grid is None:
        return x
    ends = bounds(n, grid.size(0))
    return x[ends[grid.get_local_rank("data")] : ends[grid.get_local_rank("data") + 1]]


def train(rule: str, setting: str, optimizer: str, grid: Any = None, dtype: torch.dtype = torch.float64) -> dict:
    """The state after some steps, with the metrics of the last one."""
    sae = sae_of(rule, setting, dtype)
    if grid is not None:
        sae = parallelize(sae, grid)
    settings = dict(OPTIMIZERS[optimizer])
    adam = settings.pop("kind", fastsae.optim.Adam)(sae, lr=1e-2, **settings)
    found: dict[str, Any] = {}
    for i in range(STEPS):
        result = sae(batch(i, grid).to(dtype))
        result.loss.backward()
        adam.step()
        found = {"loss": result.loss.detach(), "grad_norm": adam.grad_norm, **result.losses}
    whole = gathered(sae)
    return {**state_of(whole), "fired": whole.fired, "fired_over": whole.fired_over, **found}


def ties(grid: Any) -> dict[str, Tensor]:
    """Which latents are active where rows are alike in all shards: of equal acts, that of the lower latent.

    In float32, whose scores are sums in a fixed order.
    """
    found = {}
    for name in ("topk", "batch_topk", "abs_topk"):
        sae = _with_ties(RULES[name])
        sae = sae if grid is None else parallelize(sae, grid)
        dense = sae.encode(batch(0, grid).float()).to_dense()
        if sae.placement is not None:
            columns = sae.placement.latents.gather(dense.mT.contiguous())
            dense = torch.cat(sae.placement.tokens.gather(torch.cat(columns).mT.contiguous()))
        found[name] = dense
    return found


def _with_ties(rule: fastsae.model.rules.Activation) -> fastsae.SparseAutoencoder:
    sae = family_sae(rule, dead=False, dtype=torch.float32)
    with torch.no_grad():
        for p in (sae.W_enc, sae.W_dec, sae.b_enc):
            assert p is not None
            p[1::3] = p[0]
            p[2::6] = p[2]
    return sae


def microbatches(grid: Any) -> dict[str, Tensor]:
    """Two batches before each step, and a loss of the caller's own behind the reconstruction."""
    sae = sae_of("topk", "aux")
    sae = sae if grid is None else parallelize(sae, grid)
    adam = fastsae.optim.AdamW(sae, lr=1e-2)
    for i in range(STEPS):
        for half in (2 * i, 2 * i + 1):
            result = sae(batch(half, grid))
            (result.loss / 2 + result.recon.pow(4).sum() / N).backward()
        adam.step()
    return state_of(gathered(sae))


def transcoder(grid: Any) -> dict[str, Tensor]:
    """Targets, d_out other than d_in, and x's gradient, of which each data rank has that of its own rows."""
    sae = fastsae.SparseAutoencoder(
        D, M, fastsae.TopK(5), d_out=7, dtype=torch.float64, seed=3, skip=True, aux_k=3, dead_after=N
    )
    sae = sae if grid is None else parallelize(sae, grid)
    step, grads = fastsae.FusedTrainStep(sae, lr=1e-2), []
    for i in range(STEPS):
        x = batch(i, grid).requires_grad_()
        step(x, batch(i + 50, grid)[:, :7])
        assert x.grad is not None
        grads.append(x.grad if grid is None else torch.cat(sae.placement.tokens.gather(x.grad)))
    return {**state_of(gathered(sae)), "x.grad": torch.stack(grads)}


def torch_optimizer(grid: Any) -> dict[str, Tensor]:
    """Latent shards under torch's Adam; with the data shared too it is refused."""
    sae = sae_of("gated", "plain")
    sae = sae if grid is None else parallelize(sae, grid)
    adam = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for i in range(STEPS):
        sae(batch(i, grid)).loss.backward()
        adam.step()
        adam.zero_grad()
    return state_of(gathered(sae))


def moments(grid: Any, kind: str, dtype: torch.dtype = torch.float32, steps: int = STEPS) -> dict[str, Any]:
    """Through FusedTrainStep, stopped in the middle: its state is joined, and goes on in a step made anew."""
    state: dict[str, Any] = {}
    sae = sae_of("topk", "aux", dtype)
    for part in range(2):
        sae = sae if grid is None else parallelize(sae, grid)
        step = fastsae.FusedTrainStep(sae, lr=1e-2, moments=kind)
        if state:
            step.load_state_dict(own_state(state, sae))
        for i in range(part * steps, (part + 1) * steps):
            metrics = step(batch(i, grid).to(dtype))
        state = gathered_state(step.state_dict(), sae)
        _same_on_the_first(state, sae, step)
        sae = gathered(sae)
    return {**state_of(sae), **{f"metrics.{name}": value for name, value in metrics.items() if name != "redone"}}


def _same_on_the_first(state: dict[str, Any], sae: fastsae.SparseAutoencoder, step: fastsae.FusedTrainStep) -> None:
    """What the first process alone gathers is what all of them do; the others get nothing."""
    whole = gathered(sae)
    mine, its_state = gathered(sae, first_only=True), gathered_state(step.state_dict(), sae, first_only=True)
    if dist.is_initialized() and dist.get_rank():
        assert mine is its_state is None
        return
    assert mine is not None
    assert its_state is not None
    assert all(torch.equal(t, mine.state_dict()[name]) for name, t in state_of(whole).items())
    assert torch.equal(mine.fired, whole.fired)
    for name, kept in state["optimizer"]["state"].items():
        for key, t in kept.items():
            other = its_state["optimizer"]["state"][name][key]
            assert torch.equal(other.reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8)), (name, key)


def refusals(grid: Any) -> dict[str, str]:
    """What every process raises, by what was wrong."""
    rank, said = dist.get_rank(), {}

    def says(what: str, wrong: Callable[[], object]) -> None:
        try:
            wrong()
        except (ValueError, RuntimeError) as error:
            said[what] = re.sub(r"[\d,]+ bytes", "bytes", str(error))  # codes differ in length

    def other_weights() -> None:
        sae = sae_of("topk", "plain")
        with torch.no_grad():
            sae.b_dec += rank == dist.get_world_size() - 1
        parallelize(sae, grid)

    says("other weights", other_weights)
    says("a mesh that does not fit", lambda: mesh(2, 5))
    sae = parallelize(sae_of("topk", "plain"), grid)
    says("twice", lambda: parallelize(sae, grid))
    says("own rows", lambda: sae.calibrate_(batch(0, n=N + dist.get_rank())))
    latents = grid.size(1)
    if latents > 1:
        says("another batch", lambda: sae.eval()(batch(0)[: N - grid.get_local_rank("latents")]))
        sae.train()
        says("too few latents", lambda: parallelize(fastsae.SparseAutoencoder(D, 1, fastsae.TopK(1), seed=0), grid))
    else:
        says("torch's optimizer", lambda: sae(batch(0, grid)))
    adam = fastsae.optim.Adam(sae)
    sae(batch(0, grid)).loss.backward()
    says("clip_grad_norm_", lambda: torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0))
    adam.zero_grad()
    small = fastsae.optim.Adam(sae, term_bytes=1)
    for _ in range(2):
        loss = sae(batch(0, grid)).loss
        says("accumulated terms", loss.backward)
    small.zero_grad()
    sae(batch(0, grid)).loss.backward()
    small.step()  # and it goes on
    return said


def one_step(sae: fastsae.SparseAutoencoder, optimizer: torch.optim.Optimizer, i: int) -> None:
    sae(batch(i).float()).loss.backward()
    optimizer.step()


def saver(
    grid: Any, rule: str, kind: str, seed: int = 1, pre_bias: bool | None = None
) -> tuple[Any, fastsae.FusedTrainStep, dict[str, Sharded]]:
    sae = fastsae.SparseAutoencoder(D, M + 1, RULES[rule], seed=seed, aux_k=3, dead_after=N, pre_bias=pre_bias)
    if not sae.started:
        sae.start_(tokens(N, seed=99).float())
    sae = sae if grid is None else parallelize(sae, grid)
    step = fastsae.FusedTrainStep(sae, lr=1e-2 * seed, moments=kind)
    return sae, step, {"train": Sharded(sae, step)}


def stopped(grid: Any, path: str, rule: str, kind: str) -> None:
    """Some steps, then a checkpoint of torch.distributed.checkpoint."""
    _, step, state = saver(grid, rule, kind)
    for i in range(2):
        step(batch(i, grid).float())
    dcp.save(state, checkpoint_id=path, no_dist=grid is None)


def gone_on(grid: Any, path: str, rule: str, kind: str) -> dict[str, Any]:
    """From that checkpoint into an SAE of other weights, counters and learning rate."""
    sae, step, state = saver(grid, rule, kind, seed=2)
    step(batch(7, grid).float())
    dcp.load(state, checkpoint_id=path, no_dist=grid is None)
    for i in range(2, STEPS):
        metrics = step(batch(i, grid).float())
    whole = gathered(sae)
    return {**state_of(whole), "fired": whole.fired, "loss": metrics["loss"].detach(), "lr": metrics["lr"]}


SAVED = [("topk", "fp32"), ("topk", "8bit"), ("gated", "bf16")]


def started(grid: Any, rule: str) -> dict[str, Any]:
    """What a part takes from data, scale, centre and thresholds, and what is measured on it."""
    rules = {"jumprelu": fastsae.JumpReLU(target_l0=6.0), "gated": fastsae.Gated(target_l0=6.0), **RULES}
    sae = fastsae.SparseAutoencoder(D, M + 1, rules[rule], normalize="constant", dtype=torch.float64, seed=1)
    sae = sae if grid is None else parallelize(sae, grid)
    sae.calibrate_(tokens(N, seed=99)).init_from_(tokens(N, seed=99)).start_(tokens(N, seed=99))
    step = fastsae.FusedTrainStep(sae, lr=1e-2)
    for i in range(STEPS):
        step(batch(i, grid))
    if rule == "batch_topk":
        sae.calibrate_threshold_(tokens(N, seed=98))
    found = evaluate(sae, tokens(N, seed=97), batch_size=10)
    numbers = {k: torch.tensor(v) for k, v in vars(found).items() if isinstance(v, float)}
    return {**state_of(gathered(sae)), **numbers, "density": found.density}


def resampled(grid: Any, rule: str = "topk", **settings: Any) -> dict[str, Any]:
    """Dead latents, of which a shard may have none, become directions of badly reconstructed rows; then some steps."""
    sae = family_sae(RULES[rule], dead=False, dtype=torch.float64, **settings)
    sae.start_(tokens(N, seed=99))
    sae = sae if grid is None else parallelize(sae, grid)
    step = fastsae.FusedTrainStep(sae, lr=1e-2)
    step(batch(0, grid))
    first = 0 if sae.placement is None else sae.placement.first
    dead = torch.zeros(M, dtype=torch.bool)
    dead[[0, 3, 4, 7]] = True
    dead = dead[first : first + sae.d_sae]
    count = fastsae.resample_(sae, [batch(50), batch(51)[:5]], step, dead=dead, batch_size=16, seed=3)
    assert count == 4
    for i in range(1, STEPS):
        metrics = step(batch(i, grid))
    state = gathered_state(step.state_dict(), sae)["optimizer"]["state"]
    return {**state_of(gathered(sae)), "loss": metrics["loss"], "moments": state["W_dec"]["exp_avg"].double()}


def bad_numbers(grid: Any) -> dict[str, Any]:
    """NaN in the rows of one process: no process makes the step, and all go on."""
    sae = sae_of("batch_topk", "aux")
    sae = sae if grid is None else parallelize(sae, grid)
    step = fastsae.FusedTrainStep(sae, lr=1e-2)
    step.first_skip.said = True
    for i in range(STEPS):
        x = batch(i, grid)
        if i == 1 and (grid is None or grid.get_local_rank("data") == grid.size(0) - 1):
            x[-1, 0] = torch.nan
        skipped = step(x)["skipped"]
    return {**state_of(gathered(sae)), "skipped": skipped}


EDGES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "ties": ties,
    "microbatches": microbatches,
    "transcoder": transcoder,
    "fp32 moments": lambda grid: moments(grid, "fp32"),
    "bad numbers": bad_numbers,
    **{f"started {rule}": lambda grid, rule=rule: started(grid, rule) for rule in ("jumprelu", "gated", "batch_topk")},
    "resampled": resampled,
    "resampled, from data": lambda grid: resampled(grid, "gated"),
    "resampled, free": lambda grid: resampled(grid, decoder_norm="free"),
}


def counted_bytes(grid: Any) -> dict[str, float]:
    """What a process has received in a step, and what the formula says."""
    shape = Shape(512, 256, 2048, 16, grid.size(0), grid.size(1))
    sae = parallelize(fastsae.SparseAutoencoder(shape.D, shape.M, fastsae.TopK(shape.K), seed=0), grid)
    step, placement = fastsae.FusedTrainStep(sae), sae.placement
    assert placement is not None
    seen = []
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        ends, share = bounds(shape.N, grid.size(0)), grid.get_local_rank("data")
        step(torch.randn(shape.N, shape.D, generator=generator)[ends[share] : ends[share + 1]])
        seen.append(placement.tokens.received + placement.latents.received)
    return {"counted": seen[1] - seen[0], "formula": sum(received(shape).values())}


def everything(world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for data, latents in MESHES[world]:
        grid, shape = mesh(data, latents), f"{data}x{latents}"
        for name, case in cases().items():
            found[f"{shape}, {name}"] = train(*case, grid)
        for name, edge in EDGES.items():
            found[f"{shape}, {name}"] = edge(grid)
        for rule, kind in SAVED:
            stopped(grid, f"{sys.argv[4]}/{shape}-{rule}-{kind}", rule, kind)
            for saved in ("alone", shape):
                found[f"{shape}, {rule} {kind} from {saved}"] = gone_on(
                    grid, f"{sys.argv[4]}/{saved}-{rule}-{kind}", rule, kind
                )
        if latents == 1:
            found[f"{shape}, fp32"] = train("topk", "plain", "adam", grid, torch.float32)
            for kind in ("bf16", "8bit"):
                found[f"{shape}, {kind} moments"] = moments(grid, kind)
        if data == 1:
            found[f"{shape}, torch's optimizer"] = torch_optimizer(grid)
        found[f"{shape}, refusals"] = refusals(grid)
        found[f"{shape}, bytes"] = counted_bytes(grid)
    return found


def many_steps(world: int, steps: int) -> dict[str, Any]:
    return {
        f"{data}x{latents}, {steps} steps": moments(mesh(data, latents), "fp32", steps=steps // 2)
        for data, latents in MESHES[world]
    }


def main(rank: int, world: int, store: str, out: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world))
    torch.save(many_steps(world, steps) if steps else everything(world), f"{out}/{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]) if len(sys.argv) > 5 else 0)
