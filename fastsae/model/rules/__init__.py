"""Activation rules: which latents of a token are active and how strongly, as one object that a module owns.

To add a rule, write a file here with a frozen dataclass that subclasses `Activation` (base.py says what its methods
mean). Its `kind` registers it; its fields, each with a docstring below it, become options of `fastsae train`.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from fastsae.model.rules.base import ACTIVATIONS, Activation, EncodeOptions, RuleState, Selected
from fastsae.model.rules.nested import HierarchicalTopK, Matryoshka
from fastsae.model.rules.signed import AbsTopK
from fastsae.model.rules.threshold import Gated, JumpReLU, ReLU
from fastsae.model.rules.topk import BatchTopK, GroupMax, TopK

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)


def variants() -> dict[str, tuple[type[Activation], dict[str, type[Activation]]]]:
    """Every rule by its name on the command line: its class, and the class of every field that holds a rule."""
    return {name: (rule, parts) for rule in ACTIVATIONS.values() for name, parts in rule.variants().items()}


def activation_from_config(config: dict[str, Any]) -> Activation:
    """The rule that `config()` described. Raises ValueError for an unknown kind or unknown settings."""
    if not isinstance(config, dict) or config.get("kind") not in ACTIVATIONS:
        raise ValueError(f"activation is {config!r}, expected an object whose kind is one of {sorted(ACTIVATIONS)}")
    settings = {name: _from_json(value) for name, value in config.items() if name != "kind"}
    try:
        return ACTIVATIONS[config["kind"]](**settings)
    except TypeError as error:
        raise ValueError(f"activation {config['kind']} does not take the settings {settings}: {error}") from error


def _from_json(value: Any) -> Any:
    """A rule's setting from JSON: a rule from an object, a tuple from a list."""
    if isinstance(value, dict):
        return activation_from_config(value)
    return tuple(value) if isinstance(value, list) else value


__all__ = [
    "ACTIVATIONS", "AbsTopK", "Activation", "BatchTopK", "EncodeOptions", "Gated", "GroupMax", "HierarchicalTopK",
    "JumpReLU", "Matryoshka", "ReLU", "RuleState", "Selected", "TopK", "activation_from_config", "variants",
]  # fmt: skip
