"""Activation rules: which latents of a token are active and how strongly, as one object that a module owns.

To add a rule, subclass `Activation` (base.py says what its methods mean) and list it in `ACTIVATIONS`.
"""

from __future__ import annotations

from typing import Any

from fastsae.model.rules.base import Activation, EncodeOptions, RuleState, Selected
from fastsae.model.rules.nested import HierarchicalTopK, Matryoshka
from fastsae.model.rules.threshold import Gated, JumpReLU, ReLU
from fastsae.model.rules.topk import BatchTopK, GroupMax, TopK

ACTIVATIONS: dict[str, type[Activation]] = {
    rule.kind: rule for rule in (TopK, BatchTopK, ReLU, JumpReLU, Gated, Matryoshka, HierarchicalTopK, GroupMax)
}


def activation_from_config(config: dict[str, Any]) -> Activation:
    """The rule that `config()` described. Raises ValueError for an unknown kind or unknown settings."""
    if not isinstance(config, dict) or config.get("kind") not in ACTIVATIONS:
        raise ValueError(f"activation is {config!r}, expected an object whose kind is one of {sorted(ACTIVATIONS)}")
    settings = {name: value for name, value in config.items() if name != "kind"}
    if isinstance(settings.get("inner"), dict):
        settings["inner"] = activation_from_config(settings["inner"])
    try:
        return ACTIVATIONS[config["kind"]](**settings)
    except TypeError as error:
        raise ValueError(f"activation {config['kind']} does not take the settings {settings}: {error}") from error


__all__ = [
    "ACTIVATIONS",
    "Activation",
    "BatchTopK",
    "EncodeOptions",
    "Gated",
    "GroupMax",
    "HierarchicalTopK",
    "JumpReLU",
    "Matryoshka",
    "ReLU",
    "RuleState",
    "Selected",
    "TopK",
    "activation_from_config",
]  # fmt: skip
