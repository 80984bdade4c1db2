"""A trainer's torch optimizer replaced by fastsae's: the same settings, the same state, the same schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastsae.swapped.base import Unsupported, accelerate_sae, check_sae, give_back
from fastsae.training.optimizers import Adam, AdamW, FusedOptimizer

KINDS: dict[type, Any] = {torch.optim.Adam: Adam, torch.optim.AdamW: AdamW}


def check(old: torch.optim.Optimizer, saes: Sequence[nn.Module], kinds: Mapping[type, Any] = KINDS) -> None:
    """Raises Unsupported where `fused` has nothing for this optimizer: another kind, groups or settings."""
    if type(old) not in kinds:
        names = ", ".join(f"torch.optim.{one.__name__}" if one in KINDS else one.__name__ for one in kinds)
        raise Unsupported(f"the optimizer is a {type(old).__name__}, expected one of {names}")
    given = [[id(p) for p in group["params"]] for group in old.param_groups]
    if given != [[id(p) for p in sae.parameters()] for sae in saes]:
        raise Unsupported("the optimizer's groups are expected to be the parameters() of each SAE, in order")
    for group in old.param_groups:
        wrong = [name for name in ("amsgrad", "maximize", "capturable", "differentiable") if group.get(name)]
        if issubclass(kinds[type(old)], Adam) and group["weight_decay"]:
            wrong.append("weight_decay")
        if wrong:
            raise Unsupported(f"the optimizer has {', '.join(wrong)}, which a fused update does not have")


def fused(
    old: torch.optim.Optimizer, saes: Sequence[nn.Module], swaps: dict[type, type], kinds: Mapping[type, Any] = KINDS
) -> FusedOptimizer:
    """The optimizer of fastsae.optim that does what `old` does, which has one group for each of these SAEs.

    kinds: by the class of `old`, the class that does the same. Accelerates the SAEs. Raises Unsupported as `check` and
    the SAEs do, or the optimizer's ValueError, as for a parameter that requires no gradient; changes nothing then.
    """
    check(old, saes, kinds)
    taken = [sae for sae in saes if check_sae(sae, swaps) is not None]
    groups = []
    for sae, group in zip(saes, old.param_groups, strict=True):
        accelerate_sae(sae, swaps)
        groups.append({"params": sae, **{key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}})
    with contextlib.ExitStack() as undo:
        for sae in taken:
            undo.callback(give_back, sae)  # type: ignore[arg-type]
        new = _like(old, kinds[type(old)](groups))
        undo.pop_all()
    return new


def _like(old: torch.optim.Optimizer, new: FusedOptimizer) -> FusedOptimizer:
    """new, with the state and the rates of `old`."""
    # A scheduler marks the step of its optimizer, and torch warns where that mark is missing.
    torch.optim.lr_scheduler.LambdaLR(new, lambda _: 1.0)
    if old.state:
        new.load_state_dict(old.state_dict())
    for mine, theirs in zip(new.param_groups, old.param_groups, strict=True):
        mine.pop("initial_lr", None)
        mine |= {key: theirs[key] for key in ("lr", "initial_lr") if key in theirs}
    return new


def follow(scheduler: Any, new: torch.optim.Optimizer) -> None:
    """Makes a schedule, and those that it holds, set the rates of another optimizer."""
    scheduler.optimizer = new
    for inner in getattr(scheduler, "_schedulers", ()):
        follow(inner, new)
