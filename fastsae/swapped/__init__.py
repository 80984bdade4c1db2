"""fastsae.accelerate: modules and trainers of other libraries, with their own mathematics computed by fastsae's ops.

The libraries are imported only when one of their objects is given. docs/accelerate.md says what is swapped.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from torch import nn

from fastsae.swapped.base import Swapped, Unsupported, accelerate_sae, check_sae, give_back
from fastsae.training.optimizers import FusedOptimizer

Given = TypeVar("Given")

_ROOMS = {
    "sae_lens": ("saelens", "saelens_training"),
    "sparsify": ("sparse_coder",),
    "dictionary_learning": ("dictionaries", "dictionary_thresholds"),
    "circuit_tracer": ("transcoders",),
    "overcomplete": ("overcomplete",),
    "llamascopium": ("llamascopium",),
}
"""By the top package of the class that is given: the modules here with its SWAPS, class by class."""


def swaps() -> dict[type, type]:
    """Each class of a library that is imported already, and the one that is put in its place."""
    import sys

    found: dict[type, type] = {}
    for package in _ROOMS:
        if package in sys.modules:
            found |= _swaps_of(package)
    return found


def _swaps_of(package: str) -> dict[type, type]:
    """The same of one library; imports it. Nothing for a package that is not known."""
    found: dict[type, type] = {}
    for room in _ROOMS.get(package, ()):
        found |= importlib.import_module(f"fastsae.swapped.{room}").SWAPS
    return found


def _swap_of(kind: type) -> type:
    """The class that takes the place of `kind`. Raises Unsupported for one that is not known."""
    known = _swaps_of(kind.__module__.split(".")[0])
    if kind in known:
        return known[kind]
    name = f"{kind.__module__}.{kind.__qualname__}"
    bases = [base.__name__ for base in kind.__mro__[1:] if base in swaps()]
    if bases:
        raise Unsupported(
            f"{name} is a subclass of {bases[0]}, whose methods it may have changed; expected the class itself"
        )
    listed = ", ".join(sorted(one.__name__ for one in known)) or "classes of " + ", ".join(sorted(_ROOMS))
    raise Unsupported(f"{name} cannot be accelerated; expected one of: {listed}")


def accelerate(given: Given) -> Given:
    """The given SAE or transcoder of another library, swapped in place to compute sparsely; returns it.

    Its class becomes a subclass of its own. Parameters stay the same objects, and state_dict, isinstance, hooks, copies
    and saved files what they were; a pickle has the library's class. Where the library stores a dictionary as (D, M),
    its memory is transposed under the same Parameter. `fastsae.optim.Adam(sae)` then steps it with fused updates.

    A trainer (SAELens' SAETrainer; sparsify's Trainer; dictionary_learning's trainers): its SAEs, and its Adam for
    `fastsae.optim.Adam` with the same settings, state and schedule. A class of such a trainer: a subclass, whose
    instances are accelerated. A model that holds such SAEs: all of them.
    Raises Unsupported (a ValueError) for another class, or a setting that has no sparse path, and changes nothing.
    """
    if isinstance(given, type):
        return _swap_of(given)  # type: ignore[return-value]
    if isinstance(given, Swapped) or isinstance(getattr(given, "optimizer", None), FusedOptimizer):
        return given  # it is accelerated already
    if isinstance(given, nn.Module) and type(given) not in swaps():
        kinds = tuple(swaps())
        inside = [m for m in given.modules() if isinstance(m, kinds) and not isinstance(m, Swapped)]
        if inside:
            for module in inside:  # a subclass of somebody's too, which _swap_of refuses rather than leaving it slow
                check_sae(module, {type(module): _swap_of(type(module))})
            for module in inside:
                accelerate(module)
            return given
    swap: Any = _swap_of(type(given))
    if issubclass(swap, Swapped):
        accelerate_sae(given, {type(given): swap})
    else:
        swap.take_over(given)
    return given


def unaccelerate(module: Given) -> Given:
    """Undoes `accelerate` of an SAE, or of all SAEs in a module: its own class and memory order. Returns it.

    Gradients that an optimizer of fastsae.optim keeps as terms are dropped with that optimizer, not here.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"unaccelerate got a {type(module).__name__}, expected a module; of a trainer, give its SAE")
    for one in [m for m in module.modules() if isinstance(m, Swapped)]:
        give_back(one)
    return module


__all__ = ["Unsupported", "accelerate", "unaccelerate"]
