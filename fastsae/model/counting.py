"""Counting training batches: each once, over all processes, in the order of their forward passes.

What is counted: tokens and firings of each latent, a running threshold, an adjusted penalty weight, drawn prefixes. A
batch counts at the end of the first backward pass that goes through its forward pass in training mode. So a forward
pass alone counts nothing, and all forward passes of one backward pass see the same counters, recomputed or not.

Activation checkpointing recomputes a forward pass inside the backward pass, when other batches may have counted since.
The recomputed pass sees the counters of its first run: torch numbers autograd nodes in the order of their creation, so
the node whose backward pass recomputes it tells when that was.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

KEPT = 16
"""How many counted batches ago a checkpointed forward pass may have run first; each of them keeps (M,) numbers."""


def in_backward() -> bool:
    """Whether a backward pass is running: a forward pass in it is one that activation checkpointing recomputes."""
    return torch._C._current_graph_task_id() != -1


def _under_hooks() -> bool:
    """Whether hooks on saved tensors are set, as they are where a non-reentrant checkpoint runs a forward again."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def first_run() -> int:
    """When the running forward pass first ran, as an autograd sequence number: nodes made before have smaller ones."""
    node = torch._C._current_autograd_node() if in_backward() else None
    if node is None:
        return torch._C._autograd._get_sequence_nr()
    # A reentrant checkpoint's node came just before its forward pass, which made no nodes. A non-reentrant checkpoint
    # is run again by a node of the forward pass itself.
    return node._sequence_nr() + (0 if _under_hooks() else 1)


@torch.library.custom_op("fastsae::counts_here", mutates_args=(), schema="(Tensor x) -> Tensor")
def counts_here(x: Tensor) -> Tensor:
    """True, 0-d on x's device, in a compiled forward pass, which counts while it runs.

    Raises RuntimeError if a non-reentrant checkpoint recomputes it: its graph would count twice and see other counters.
    It is an op, so that the check happens when the graph runs.
    """
    if in_backward() and _under_hooks():
        raise RuntimeError(
            "an activation checkpoint recomputes a compiled forward pass of an SAE, which would count its tokens "
            "twice; compile the function that calls torch.utils.checkpoint, or pass it use_reentrant=True"
        )
    return torch.ones((), dtype=torch.bool, device=x.device)


@counts_here.register_fake
def _counts_here_fake(x: Tensor) -> Tensor:
    return x.new_empty((), dtype=torch.bool)


# -- once, at the end of a backward pass ------------------------------------------------------------------------------


@dataclass(eq=False)
class _Batch:
    number: tuple[int, int]
    count: Callable[[], None]
    counted: bool = False


@dataclass(eq=False)
class _Passed:
    """The batches that a running backward pass went through. `end` is a callback of torch's engine, which holds the
    only reference to this object: if the backward pass fails, nothing counts and nothing is left over.
    """

    batches: dict[tuple[int, int], _Batch] = field(default_factory=dict)
    over: bool = False

    def end(self) -> None:
        self.over = True
        for _, batch in sorted(self.batches.items()):
            if not batch.counted:
                batch.counted = True
                batch.count()


_numbers = itertools.count()
_passed: weakref.WeakValueDictionary[int, _Passed] = weakref.WeakValueDictionary()  # by torch's number of the pass


def _of_this_pass() -> _Passed:
    number = torch._C._current_graph_task_id()
    found = _passed.get(number)
    if found is None:
        found = _passed[number] = _Passed()
        torch.autograd.Variable._execution_engine.queue_callback(found.end)  # type: ignore[no-untyped-call]
    return found


def when_passed(ends: Iterable[Tensor], count: Callable[[], None]) -> None:
    """Calls count once, at the end of the first backward pass that goes through what made one of these tensors.

    Batches of one backward pass count in the order of their forward passes.
    """
    batch = _Batch((first_run(), next(_numbers)), count)
    # A reentrant checkpoint runs a backward pass of its own inside this one, which is the one to wait for.
    outer = _of_this_pass() if in_backward() else None

    def pass_through(_: Any) -> None:
        passed = _of_this_pass() if outer is None or outer.over else outer
        passed.batches[batch.number] = batch

    for node in {end.grad_fn for end in ends} - {None}:
        node.register_prehook(pass_through)  # type: ignore[union-attr]


# -- the counters of a forward pass that is computed again ------------------------------------------------------------


class _Kept(NamedTuple):
    first: int
    state: dict[str, Tensor]


@dataclass(eq=False)
class _History:
    """The counters of a module before each of the last KEPT batches, with autograd's number at the first forward pass
    that saw them; first: that number for the current counters, None if no forward pass has seen them.
    """

    states: deque[_Kept] = field(default_factory=lambda: deque(maxlen=KEPT))
    first: int | None = None
    forgotten: bool = False

    def at(self, number: int) -> dict[str, Tensor] | None:
        """The counters that the last forward pass before that number saw; None for the current ones."""
        if self.first is not None and self.first <= number:
            return None
        for kept in reversed(self.states):
            if kept.first <= number:
                return kept.state
        if self.forgotten:
            raise RuntimeError(
                f"an activation checkpoint recomputes a forward pass after more than {KEPT} later batches counted; "
                "its counters are not kept that long. Run the backward pass sooner, or do not checkpoint the SAE"
            )
        return None


_histories: weakref.WeakKeyDictionary[nn.Module, _History] = weakref.WeakKeyDictionary()


def _history(module: nn.Module) -> _History:
    return _histories.setdefault(module, _History())


@contextmanager
def as_first_seen(module: nn.Module) -> Iterator[None]:
    """For a training forward pass: if a checkpoint recomputes it, it reads the counters that its first run read.

    Raises RuntimeError if these are no longer kept, see KEPT.
    """
    history, old = _history(module), None
    if in_backward():
        old = history.at(first_run())
    elif history.first is None:
        history.first = first_run()
    now = {name: module._buffers[name] for name in old or ()}
    module._buffers.update(old or {})
    try:
        yield
    finally:
        module._buffers.update(now)


def keep_counters(module: nn.Module, names: Iterable[str]) -> None:
    """Keeps these buffers before a batch changes them, if a forward pass saw them."""
    history = _history(module)
    if history.first is not None:
        history.forgotten |= len(history.states) == KEPT
        state = {name: t.clone() for name in names if (t := module._buffers[name]) is not None}
        history.states.append(_Kept(history.first, state))
        history.first = None


# -- over all processes -----------------------------------------------------------------------------------------------

_groups: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def processes_of(module: nn.Module) -> Any:
    """The process group over which DistributedDataParallel or fully_shard (FSDP2) runs this forward pass, or None.

    Raises RuntimeError inside `DistributedDataParallel.join()`, and for fully_shard over two axes of a mesh.
    """
    if in_backward():  # which is not inside DistributedDataParallel; the first run of this forward pass was
        return _groups.get(module)
    if (shards := _fsdp_group(module)) is not None:
        _groups[module] = shards
        return shards
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None:
        _groups.pop(module, None)
        return None
    if wrapper._join_config.enable:
        raise RuntimeError(
            "DistributedDataParallel.join() does not support an SAE, which sums its counts over processes: a process "
            "without inputs would not take part; give every process the same number of batches"
        )
    _groups[module] = wrapper.process_group
    return wrapper.process_group


def _fsdp_group(module: nn.Module) -> Any:
    """The process group of a module that torch's fully_shard was applied to; torch has no public name for it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return None
    state = module._get_fsdp_state()  # type: ignore[operator]
    found = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # before torch 2.13: one
    info = found[0].mesh_info
    if hasattr(info, "replicate_process_group"):
        raise RuntimeError(
            "fully_shard over two axes of a mesh does not support an SAE, which sums its counts over one group of "
            "processes; give it a mesh of one axis"
        )
    return info.shard_process_group


def several(module: nn.Module) -> bool:
    """Whether DistributedDataParallel or fully_shard runs this forward pass in more than one process."""
    group = processes_of(module)
    return group is not None and group.size() > 1


class Counted(NamedTuple):
    """A batch of one SAE, or of B. counts (*B, M): on how many tokens each latent was active, int64, or whether on any,
    bool; tokens: their number; measured (*B,): the result of `Activation.measure`, None for a rule without one.
    """

    counts: Tensor
    tokens: int | Tensor
    measured: Tensor | None


def over_processes(module: nn.Module, batch: Counted) -> Counted:
    """The batch of all processes together: sums of counts, and the mean of the finite measurements."""
    if (placement := getattr(module, "placement", None)) is not None:
        return placement.counted(batch)
    group = processes_of(module)
    if group is None:
        return batch
    counts, tokens, measured = batch
    one = counts.new_zeros(counts.shape[:-1]) if measured is None else measured
    known = one.isfinite()
    parts = [counts, known, torch.where(known, one, 0), torch.full_like(one, tokens, dtype=torch.float64)]  # type: ignore[arg-type]
    packed = torch.cat([part.double().flatten() for part in parts])  # whole numbers below 2⁵³ stay exact
    torch.distributed.all_reduce(packed, group=group)
    split = packed.split([part.numel() for part in parts])
    total, found, sums, n = (t.view(part.shape) for t, part in zip(split, parts, strict=True))
    if measured is not None:
        measured = torch.where(found > 0, sums / found.clamp(min=1), torch.inf).to(measured.dtype)
    return Counted(total.to(counts.dtype), n.flatten()[0].long(), measured)


def in_all_processes(module: nn.Module, good: Tensor) -> Tensor:
    """Whether `good` is true in every process: bool, elementwise."""
    if (placement := getattr(module, "placement", None)) is not None:
        return placement.everywhere(good)
    group = processes_of(module)
    if group is None:
        return good
    agreed = good.to(torch.int32)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN, group=group)
    return agreed.bool()
