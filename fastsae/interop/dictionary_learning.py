"""dictionary_learning: ae.pt, a state dict, beside config.json, whose trainer.dict_class names the class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.interop.base import Format, says_its_rule, setting, write_json, write_tensors
from fastsae.interop.files import Checkpoint, take
from fastsae.interop.parts import Parts, jump_relu, parts_of, refuse, relu, running_threshold
from fastsae.model.files import SavedModuleError
from fastsae.model.rules import Activation, BatchTopK, Gated, JumpReLU, Matryoshka, ReLU, TopK
from fastsae.model.sae import SparseAutoencoder

CONFIG, WEIGHTS = "config.json", "ae.pt"
_LINEAR = {"encoder.weight": "d_sae d_in", "decoder.weight": "d_in d_sae"}
_OURS = {"W_enc": "d_in d_sae", "W_dec": "d_sae d_in", "b_enc": "d_sae", "b_dec": "d_in"}
LAYOUTS: dict[str, dict[str, str]] = {
    "AutoEncoder": {**_LINEAR, "encoder.bias": "d_sae", "bias": "d_in"},
    "AutoEncoderNew": {**_LINEAR, "encoder.bias": "d_sae", "decoder.bias": "d_in"},
    "AutoEncoderTopK": {**_LINEAR, "encoder.bias": "d_sae", "b_dec": "d_in"},
    "BatchTopKSAE": {**_LINEAR, "encoder.bias": "d_sae", "b_dec": "d_in", "threshold": ""},
    "MatryoshkaBatchTopKSAE": {**_OURS, "threshold": ""},
    "JumpReluAutoEncoder": {**_OURS, "threshold": "d_sae"},
    "GatedAutoEncoder": {
        **_LINEAR, "decoder_bias": "d_in", "r_mag": "d_sae", "gate_bias": "d_sae", "mag_bias": "d_sae"
    },
}  # fmt: skip
"""Each class's tensors and their axes."""
WHOLE = {"AutoEncoderTopK": {"k"}, "BatchTopKSAE": {"k"}, "MatryoshkaBatchTopKSAE": {"k", "group_sizes"}}
"""Buffers of whole numbers; older files of a TopK have none."""


def match(files: Checkpoint) -> str | None:
    return WEIGHTS if WEIGHTS in files else None


def _class(files: Checkpoint, names: set[str]) -> str:
    """The class: that of config.json, whose tensors are to be there, or the only one with these tensors."""
    path, cfg = files.path(WEIGHTS), files.path(CONFIG)
    fitting = [
        name
        for name, layout in LAYOUTS.items()
        if layout.keys() <= names <= layout.keys() | WHOLE.get(name, set()) | ({"threshold"} & names)
    ]
    if CONFIG not in files:
        if len(fitting) != 1:
            could = f"could be {' or '.join(fitting)}" if fitting else f"is none of {', '.join(LAYOUTS)}"
            raise SavedModuleError(f"{path} {could}, and there is no {CONFIG} beside it to say which")
        return fitting[0]
    trainer = files.json(CONFIG).get("trainer")
    named = setting(trainer if isinstance(trainer, dict) else {}, cfg, "dict_class", str)
    if named not in LAYOUTS:
        raise SavedModuleError(f"{cfg} has dict_class {named!r}, expected one of {', '.join(LAYOUTS)}")
    if fitting and named not in fitting:
        raise SavedModuleError(
            f"{cfg} says dict_class {named}, but {path.name} has the tensors of {' or '.join(fitting)}"
        )
    return named


def _whole(path: Path, name: str, found: Any, config: Mapping[str, Any], cfg: Path) -> Any:
    """A buffer of whole numbers, or config.json's copy of it. Raises SavedModuleError where they differ."""
    said = config.get(name)
    if found is None:
        return said
    if not isinstance(found, Tensor) or found.is_floating_point() or found.ndim > 1:
        raise SavedModuleError(
            f"{path}: {name} is {getattr(found, 'dtype', type(found).__name__)}, expected whole numbers"
        )
    if said is not None and said != found.tolist():
        raise SavedModuleError(f"{cfg} says {name} = {said!r}, but {path.name} has {found.tolist()!r}")
    return found.tolist()


def read(files: Checkpoint, rule: Activation | None) -> Parts:
    path, cfg = files.path(WEIGHTS), files.path(CONFIG)
    says_its_rule(files.label, rule)
    tensors = files.tensors(WEIGHTS)
    name = _class(files, set(tensors))
    trainer = files.json(CONFIG).get("trainer", {}) if CONFIG in files else {}
    numbers = {n: _whole(path, n, tensors.pop(n, None), trainer, cfg) for n in WHOLE.get(name, ())}
    threshold = {"threshold": ""} if name == "AutoEncoderTopK" else None
    sizes = {
        axis: (setting(trainer, cfg, theirs, int), CONFIG)
        for axis, theirs in (("d_in", "activation_dim"), ("d_sae", "dict_size"))
        if trainer.get(theirs) is not None
    }
    held = take(path, tensors, LAYOUTS[name], threshold, sizes)
    if name in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        W_enc, W_dec, b_enc, b_dec = held["W_enc"].mT, held["W_dec"], held["b_enc"], held["b_dec"]
    else:
        W_enc, W_dec = held["encoder.weight"], held["decoder.weight"].mT
        b_enc = held["gate_bias"] if name == "GatedAutoEncoder" else held["encoder.bias"]
        b_dec = next(held[n] for n in ("b_dec", "bias", "decoder.bias", "decoder_bias") if n in held)
    pre_bias = name not in ("JumpReluAutoEncoder", "AutoEncoderNew")
    parts = Parts(relu(), W_enc, W_dec, b_enc, b_dec, pre_bias)
    if name == "AutoEncoder":
        if not _unit(parts):  # as its own loader does, so that acts mean the same
            parts.fold_norms()
    elif name == "AutoEncoderTopK":
        parts.rule = TopK(_k(numbers, path))
    elif name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        # A threshold that was never trained is -1, which passes every positive act.
        inner = BatchTopK(_k(numbers, path))
        parts.rule, parts.rule_state = inner, running_threshold(held["threshold"])
        if name == "MatryoshkaBatchTopKSAE":
            groups, weights = numbers["group_sizes"], trainer.get("group_weights")
            if not isinstance(groups, list):
                raise SavedModuleError(f"{path} lacks group_sizes")
            if not isinstance(weights, list | None):
                raise SavedModuleError(f"{cfg} has group_weights = {weights!r}, expected a list of numbers")
            parts.rule = Matryoshka(inner, groups=tuple(groups), weights=None if weights is None else tuple(weights))
    elif name == "JumpReluAutoEncoder":
        parts.rule, parts.rule_state = jump_relu(held["threshold"], len(W_dec), dtype=W_enc.dtype)
    elif name == "GatedAutoEncoder":
        parts.rule = Gated(l1=0.0)
        parts.rule_state = {"r_mag": held["r_mag"], "b_mag": held["mag_bias"]}
    return parts


def _unit(parts: Parts) -> bool:
    norms = parts.norms()
    return torch.allclose(norms, torch.ones_like(norms))


def _k(numbers: Mapping[str, Any], path: Path) -> int:
    k = numbers["k"]
    if isinstance(k, bool) or not isinstance(k, int):
        raise SavedModuleError(f"{path} and its {CONFIG} have k = {k!r}, expected a whole number")
    return k


def write(sae: SparseAutoencoder, directory: Path) -> None:
    parts, rule, kind = parts_of(sae, "dictionary_learning"), sae.activation, "dictionary_learning"
    if sae.d_out != sae.d_in or sae.skip:
        raise refuse(kind, "skip connection" if sae.skip else f"d_out = {sae.d_out} beside d_in = {sae.d_in}")
    if "normalize" in parts.settings:
        raise refuse(kind, f"normalize={sae.norm.mode!r}")
    W_enc, W_dec, held = parts.W_enc, parts.W_dec, parts.rule_state
    linear = {"encoder.weight": W_enc, "encoder.bias": parts.b_enc, "decoder.weight": W_dec.mT}
    ours = {"W_enc": W_enc.mT, "W_dec": W_dec, "b_enc": parts.b_enc, "b_dec": parts.b_dec}
    numbers: dict[str, Any] = {}
    if isinstance(rule, ReLU):
        name = "AutoEncoder" if parts.pre_bias else "AutoEncoderNew"
        if parts.pre_bias and not _unit(parts):
            raise refuse(kind, "AutoEncoder with decoder norms other than 1: its loader would rescale the acts")
        tensors = {**linear, "bias" if parts.pre_bias else "decoder.bias": parts.b_dec}
    elif isinstance(rule, TopK):
        name, numbers = "AutoEncoderTopK", {"k": rule.k}
        tensors = {**linear, "b_dec": parts.b_dec, "threshold": torch.tensor(-1.0, device="cpu")}
    elif isinstance(rule, BatchTopK):
        name, numbers = "BatchTopKSAE", {"k": rule.k}
        tensors = {**linear, "b_dec": parts.b_dec, "threshold": held["threshold"]}
    elif isinstance(rule, Matryoshka) and isinstance(rule.inner, BatchTopK) and rule.groups:
        name, numbers = "MatryoshkaBatchTopKSAE", {"k": rule.inner.k, "group_sizes": list(rule.groups)}
        tensors = {**ours, "threshold": held["threshold"]}
    elif isinstance(rule, JumpReLU):
        name, tensors = "JumpReluAutoEncoder", {**ours, "threshold": held["log_threshold"].exp().to(W_enc.dtype)}
    elif isinstance(rule, Gated):
        name = "GatedAutoEncoder"
        tensors = {
            "encoder.weight": W_enc, "decoder.weight": W_dec.mT, "decoder_bias": parts.b_dec, "r_mag": held["r_mag"],
            "gate_bias": parts.b_enc, "mag_bias": held["b_mag"],
        }  # fmt: skip
    else:
        raise refuse(kind, repr(rule))
    if parts.pre_bias == (name in ("JumpReluAutoEncoder", "AutoEncoderNew")):
        raise refuse(kind, f"{name} with pre_bias = {parts.pre_bias}")
    whole = {"k": torch.int32, "group_sizes": torch.int64}
    buffers = {n: torch.tensor(value, dtype=whole[n], device="cpu") for n, value in numbers.items()}
    more = {"group_weights": list(rule.each_weight)} if isinstance(rule, Matryoshka) else {}
    trainer = {"dict_class": name, "activation_dim": sae.d_in, "dict_size": sae.d_sae, **numbers, **more}
    write_tensors(directory / WEIGHTS, {**tensors, **buffers})
    write_json(directory / CONFIG, {"trainer": trainer})


FORMAT = Format("dictionary_learning", match, read, write)
