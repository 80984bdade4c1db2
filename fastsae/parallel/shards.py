"""Cuts an SAE, and the state of what trains it, into the parts of the processes of a mesh, and joins them again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fastsae.model.axis import Axis, bounds
from fastsae.model.norm import InputNorm
from fastsae.model.parameters import EXTRA_STATE
from fastsae.model.placement import Placement
from fastsae.model.rules import GroupMax
from fastsae.model.sae import SparseAutoencoder, as_sae
from fastsae.ops import checks
from fastsae.ops.ledger import LedgerGradient

AXES = ("data", "latents")
"""The names of a mesh's axes."""
COUNTERS = ("tokens_since_fired", "fired")


def mesh(
    data: int | None = None, latents: int = 1, device_type: str = "cpu", *, processes: int | None = None,
    timeout: timedelta | None = None,
) -> DeviceMesh:  # fmt: skip
    """A mesh of all processes: `data` groups that share the tokens of a batch, of `latents` shards of the dictionary.

    data: None takes all processes / latents. Neighbouring ranks share a batch's rows and split the dictionary.
    processes: None takes all, a number the first so many; the others, which are not in it, have to make it too.
    timeout: how long a process waits for the others of its axes; None takes torch's, half an hour with gloo. On GPUs
    call torch.cuda.set_device first.
    Raises RuntimeError before `torch.distributed.init_process_group`; ValueError if the axes do not fit the processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError("no processes are joined: call torch.distributed.init_process_group first, or use torchrun")
    world = dist.get_world_size() if processes is None else processes
    if latents < 1 or world % latents or (data is not None and data * latents != world):
        asked = f"data = {'any' if data is None else data} x latents = {latents}"
        raise ValueError(f"a mesh of {asked} does not fit {world} processes; their product must be {world}")
    grid = torch.arange(world, dtype=torch.int64, device="cpu").view(world // latents, latents)
    # Not init_device_mesh, whose groups have torch's default time-out whatever that of the processes is.
    groups = [dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=timeout)[0] for ranks in (grid.mT, grid)]
    if world < dist.get_world_size():
        _groups[tuple(range(world))] = dist.new_group(list(range(world)), timeout=timeout)
    # A process that is not in the mesh is in no group of it either, and asks for none.
    groups = [dist.group.WORLD if group is None else group for group in groups]
    return DeviceMesh.from_group(groups, device_type, grid, mesh_dim_names=AXES)


_groups: dict[tuple[int, ...], Any] = {}
"""Of the processes of meshes that do not have all processes, by their ranks."""


def group_of(mesh: DeviceMesh) -> Any:
    """The process group of all processes of a mesh; None for all that there are.

    Raises ValueError for a mesh of some processes that `mesh(processes=)` has not made.
    """
    if mesh.size() == dist.get_world_size():
        return None
    ranks = tuple(mesh.mesh.flatten().tolist())
    if ranks not in _groups:
        raise ValueError(
            f"a mesh of the processes {list(ranks)} of {dist.get_world_size()}; make it with mesh(processes=)"
        )
    return _groups[ranks]


def parallelize(
    sae: SparseAutoencoder,
    mesh: DeviceMesh,
    *,
    seed: int | None = None,
    device: torch.device | str | None = None,
) -> SparseAutoencoder:
    """Keeps this process's latents of `sae`, the same module in every process, in place, and returns it.

    An SAE made with device="meta", which has no memory, gets this process's rows of SparseAutoencoder(..., seed=seed),
    on `device` (None: that of the mesh): so no process ever holds more.

    mesh: with axes named "data" and "latents", or one of them. From then on its parameters are rows of the whole
    dictionary's, its training step exchanges what docs/distributed.md says, and a fastsae optimizer made for it steps
    the whole. Call it before making the optimizer. What takes rows of data once, such as `start_`, `calibrate_` or
    `evaluate`, then needs the same rows in every process.
    Raises ValueError if processes have different weights, settings or seeds, if the dictionary cannot be cut so, or if
    an SAE with weights has a seed or one without has none; TypeError for one that fully_shard has cut; RuntimeError for
    one that is on several processes already, or has gradients pending.
    """
    sae = as_sae(sae, "sae")
    names = mesh.mesh_dim_names or ()
    if not names or not set(names) <= set(AXES):
        raise ValueError(
            f"the mesh has axes {names}, expected 'data' and 'latents'; make it with fastsae.parallel.mesh"
        )
    checks.not_fully_sharded(dict(sae.named_parameters()))
    if sae.placement is not None:
        raise RuntimeError("this SAE is on several processes already; gathered(sae) makes an ordinary one")
    if pending := [name for name, p in sae.named_parameters() if isinstance(p.grad, LedgerGradient)]:
        raise RuntimeError(f"{', '.join(pending)} have gradients pending in an optimizer; step or zero_grad() first")
    meta = sae.W_dec.is_meta
    if meta != (seed is not None):
        what = "is on meta, and its rows are drawn from one" if meta else "has weights"
        raise ValueError(f"seed is {seed}, but this SAE {what}; give a seed for an SAE made with device='meta'")
    device = torch.device(mesh.device_type) if device is None else torch.device(device)
    tokens, latents = (Axis(mesh.get_group(name) if name in names else None) for name in AXES)
    _check_alike(sae, tokens, latents, seed, device if meta else sae.W_dec.device)
    rule, d_sae = sae.activation, sae.d_sae
    unit = d_sae // rule.k if isinstance(rule, GroupMax) else 1  # a group stays whole
    if d_sae // unit < latents.size:
        raise ValueError(
            f"{d_sae} latents in units of {unit} cannot be shared by {latents.size} processes, expected at least one "
            "unit each"
        )
    each = -(-d_sae // latents.size)
    ends = [min(each * rank, d_sae) for rank in range(latents.size + 1)]  # as DTensor cuts: the last has fewer
    if each % unit or ends[-2] == d_sae:
        ends = [unit * end for end in bounds(d_sae // unit, latents.size)]
    first, last = ends[latents.rank], ends[latents.rank + 1]
    sae.placement = Placement(tokens, latents, first, last - first, d_sae, mesh)
    sae.d_sae = last - first
    for name in by_latent(sae):
        whole = getattr(sae, name)
        own = _empty(whole, device, last - first) if meta else whole.detach()[first:last].clone()
        setattr(sae, name, nn.Parameter(own, whole.requires_grad) if isinstance(whole, nn.Parameter) else own)
    if meta:
        sae._apply(lambda t: _empty(t, device, *t.shape[:1]))
        sae.norm = InputNorm(sae.norm.mode, dtype=sae.W_dec.dtype, device=device)
        sae.reset_parameters(seed)
    return sae


@overload
def gathered(sae: SparseAutoencoder) -> SparseAutoencoder: ...
@overload
def gathered(sae: SparseAutoencoder, *, first_only: bool) -> SparseAutoencoder | None: ...
def gathered(sae: SparseAutoencoder, *, first_only: bool = False) -> SparseAutoencoder | None:
    """An ordinary SAE with the latents of all processes, in each of them; `sae` itself if it is one already.

    first_only: only in the first process, on its CPU, and None in the others: less memory, for a checkpoint.
    """
    placement = sae.placement
    if placement is None:
        return sae
    join = _joining(placement, first_only)
    joined = {name: join(getattr(sae, name)) for name in by_latent(sae)}
    rows = {name: t for name, t in joined.items() if t is not None}
    if len(rows) < len(joined):
        return None
    settings = sae.config.to_dict() | {"d_sae": placement.d_sae}
    whole = SparseAutoencoder.from_config(settings, device="meta", dtype=sae.W_dec.dtype)
    device = torch.device("cpu") if first_only else sae.W_dec.device
    state = {name: t.to(device) for name, t in sae.state_dict().items() if name != EXTRA_STATE and name not in rows}
    state |= {name: t for name, t in rows.items() if name != "fired"}
    whole.load_state_dict({**state, EXTRA_STATE: whole.get_extra_state()}, assign=True)
    whole.fired.copy_(rows["fired"])
    whole.fired_over.copy_(sae.fired_over)
    for name, p in whole.named_parameters():
        p.requires_grad_(sae.get_parameter(name).requires_grad)
    whole.backend, whole.precision = sae.backend, sae.precision
    return whole.train(sae.training)


def gathered_state(
    state: Mapping[str, Any], sae: SparseAutoencoder, *, first_only: bool = False
) -> dict[str, Any] | None:
    """A step's `state_dict()` of a part as that of a step for the whole SAE: moments of all latents.

    The state may then go on with any number of processes, or with one. first_only: as for `gathered`.
    Raises TypeError for a state that has no "optimizer", such as an optimizer's own.
    """
    if "optimizer" not in state:
        raise TypeError(f"got a state of {sorted(state)}, expected that of a FusedTrainStep, whose moments have names")
    if sae.placement is None:
        return dict(state)
    found = _of_rows(state, sae, _joining(sae.placement, first_only), sae.placement.d_sae)
    return None if first_only and not _is_first(sae.placement) else found


def own_state(state: Mapping[str, Any], sae: SparseAutoencoder) -> dict[str, Any]:
    """The part of a step's `state_dict()` of the whole SAE that belongs to this process."""
    p = sae.placement
    if p is None:
        return dict(state)
    return _of_rows(state, sae, lambda t: t[p.first : p.first + p.own].clone(), p.own)


def of_size(state: Mapping[str, Any], sae: SparseAutoencoder, d_sae: int) -> dict[str, Any]:
    """A step's state with the same tensors, as that of an SAE of d_sae latents."""
    return _of_rows(state, sae, lambda t: t, d_sae)


def _of_rows(
    state: Mapping[str, Any], sae: SparseAutoencoder, change: Callable[[Tensor], Tensor | None], d_sae: int
) -> dict[str, Any]:
    rows, inner, settings = by_latent(sae), state["optimizer"], state["settings"]
    moments = {
        name: {key: change(t) if name in rows and key != "step" else t for key, t in kept.items()}
        for name, kept in sorted(inner["state"].items())
    }
    return {
        **state,
        "optimizer": {**inner, "state": moments},
        "settings": {**settings, "sae": {**settings["sae"], "d_sae": d_sae}},
    }


def _joining(placement: Placement, first_only: bool) -> Callable[[Tensor], Tensor | None]:
    """What joins the rows of all latents: in every process, or in the first alone."""
    if not first_only:
        return lambda t: torch.cat(placement.latents.gather(t))
    if placement.tokens.rank:
        return lambda t: None  # the first process has its latents from those that share its rows
    return placement.latents.collect


def _empty(t: Tensor, device: torch.device, *rows: int) -> Tensor:
    """Memory like t, of that many rows. torch.empty_like and indexing of what is on meta import sympy, for a third of a
    second."""
    return torch.empty((*rows, *t.shape[1:]), dtype=t.dtype, device=device)


def _is_first(placement: Placement) -> bool:
    return placement.tokens.rank == placement.latents.rank == 0


def by_latent(sae: SparseAutoencoder) -> list[str]:
    """The parameters and buffers that have a row for each latent, in one order everywhere."""
    tied = () if sae.W_enc is None else ("W_enc",)
    return [*tied, "W_dec", "b_enc", *sae.rule_parameters, *COUNTERS]


def _check_alike(
    sae: SparseAutoencoder, tokens: Axis, latents: Axis, seed: int | None, device: torch.device
) -> None:  # fmt: skip
    """Raises ValueError naming the processes whose weights, or seed, or settings differ from the first one's."""
    digest = hashlib.sha256(repr((sae.config.to_dict(), sae.W_dec.dtype, seed)).encode())
    for name, t in sorted(sae.state_dict().items()):
        if name != EXTRA_STATE and not t.is_meta:
            digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(device)
    everyone = tokens.stack(latents.stack(own)).flatten(0, 1)
    others = (everyone != everyone[0]).any(1).nonzero()[:, 0].tolist()
    if others:
        raise ValueError(
            f"processes {others} of the mesh have other weights, seeds or settings than process 0; make the SAE with "
            "the same seed and settings in all of them, or load the same file"
        )
