"""Settings: checks that they fit together, and state dicts that record them; errors say what was got and expected."""

from __future__ import annotations

import copy
import json
import numbers
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsae.model import losses
from fastsae.model.rules import Activation
from fastsae.ops.checks import at_least_0

DECODER_NORMS = ("unit", "free")
GHOSTS = (None, "residual", "pull")
MAY_DIFFER = ("aux_k", "aux_coef", "dead_after", "ghost", "ghost_coef", "init_norm", "rule_dtype")
"""Settings that only training uses: they do not change what the weights mean."""
RULES_MAY_DIFFER = ("activation.decay", "activation.inner.decay")
"""The same of a rule."""
BEFORE: dict[str, Any] = {"normalize": "none", "layers": 1, "tied": False, "skip": False, "topk.weighted": False}
"""What the states of older versions meant that lack a setting; of a rule's, with its kind before it."""
EXTRA_STATE = "_extra_state"
"""torch's name in a state dict for what `get_extra_state` returns."""
EXTRA_BYTES = 4096
"""The extra state is padded to a multiple of this: DCP loads in place, which needs a tensor of the saved size."""


class Config(dict[str, Any]):
    """The settings of an SAE: a dict with the methods that Hugging Face's Trainer calls on `model.config`.

    The Trainer also sets attributes on it (use_cache), which a plain dict does not allow.
    """

    def to_dict(self) -> dict[str, Any]:
        return dict(self)

    def to_json_string(self) -> str:
        return json.dumps(self, indent=2)


def check_settings(sae: Any) -> None:
    """Raises ValueError for settings, attributes of `sae`, that are out of range or do not fit each other."""
    for name in ("d_in", "d_sae", "d_out", "dead_after", "layers"):
        value = getattr(sae, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
    for name in ("pre_bias", "tied", "skip"):
        if not isinstance(getattr(sae, name), bool):
            raise ValueError(f"{name} is {getattr(sae, name)!r}, expected True or False")
    if not isinstance(sae.activation, Activation):
        raise ValueError(f"activation is {sae.activation!r}, expected a rule such as fastsae.TopK(32)")
    sae.activation.check(sae.d_sae)
    for name, choices in (("decoder_norm", DECODER_NORMS), ("loss", losses.LOSSES), ("ghost", GHOSTS)):
        if getattr(sae, name) not in choices:
            expected = ", ".join(str(choice) for choice in choices)
            raise ValueError(f"{name} is {getattr(sae, name)!r}, expected one of {expected}")
    if sae.d_out != sae.d_in:
        sizes = f"d_in = {sae.d_in} and d_out = {sae.d_out}"
        if sae.tied:
            raise ValueError(f"tied weights need one width, got {sizes}; pass tied=False")
        if sae.pre_bias:
            raise ValueError(f"the pre-bias subtracts b_dec from x, got {sizes}; leave pre_bias out, or pass False")
        if sae.ghost == "pull":
            raise ValueError(f"ghost='pull' turns encoder and decoder towards the same inputs, got {sizes}")
    if sae.d_out % sae.layers or sae.d_in % sae.layers:
        raise ValueError(f"layers is {sae.layers}, expected a divisor of d_in = {sae.d_in} and d_out = {sae.d_out}")
    for name in ("init_norm", "aux_coef", "ghost_coef"):
        at_least_0(name, getattr(sae, name))
    if sae.init_norm == 0:
        raise ValueError(f"init_norm is {sae.init_norm}, expected a number above 0")
    if sae.tied and sae.decoder_norm == "unit" and sae.init_norm != 1:
        raise ValueError(f"init_norm is {sae.init_norm}, but tied unit rows start at 1; leave it out, or free them")
    whole = isinstance(sae.aux_k, int) and not isinstance(sae.aux_k, bool)
    if sae.aux_k is not None and not (whole and 1 <= sae.aux_k <= sae.d_sae):
        raise ValueError(f"aux_k is {sae.aux_k!r}, expected 1 <= aux_k <= d_sae = {sae.d_sae}, or None")
    if sae.aux_k is not None and sae.ghost is not None:
        raise ValueError(f"aux_k is {sae.aux_k} and ghost is {sae.ghost!r}: both revive dead latents; give one of them")


def check_creation(dtype: Any, seed: Any) -> None:
    """Raises ValueError for a dtype that weights cannot have, and for a seed that is not a number."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise ValueError(f"dtype is {dtype!r}, expected a floating one of torch, such as torch.float32, or None")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, numbers.Integral)):
        raise ValueError(f"seed is {seed!r}, expected a whole number, or None")


def check_rule_dtype(rule: Activation, dtype: torch.dtype) -> None:
    """Raises ValueError for a rule_dtype narrower than float32: rounding would swallow the parameters' steps."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"rule_dtype is {dtype}, expected torch.float32 or torch.float64: {dtype} cannot hold the small steps of "
            f"{type(rule).__name__}'s parameters; leave rule_dtype out, only the weights may be narrower"
        )


class RecordsSettings(nn.Module):
    """A module whose state dict has its `config` beside the tensors, and which refuses a state with other settings."""

    @property
    def config(self) -> Config:
        """The settings as JSON."""
        raise NotImplementedError

    def _recorded(self) -> dict[str, Any]:
        """What a state records of the module it is of."""
        return self.config

    def get_extra_state(self) -> Tensor:
        """`config` as JSON, padded with blanks: uint8 on the CPU, for torch.save, safetensors and DCP alike."""
        text = json.dumps(self._recorded()).encode()
        padded = text.ljust(-len(text) % EXTRA_BYTES + len(text))
        return torch.tensor(list(padded), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: `load_state_dict` compares the settings, and a state sets none."""

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False, allow_other_config: bool = False
    ) -> Any:
        """As torch's, but it refuses the state of a module with other settings, before it changes anything.

        Settings that do not change what the weights mean may differ, see fastsae.model.settings.MAY_DIFFER.
        allow_other_config: load the tensors without comparing settings; with strict=False also if one of the rules has
        tensors that the other lacks. A state without settings, such as plain tensors by name, is never compared.
        Raises ValueError naming each setting that differs, with what was got and expected.
        """
        if allow_other_config:
            state_dict = copy.copy(state_dict)
            state_dict.pop(EXTRA_STATE, None)  # type: ignore[attr-defined]
        self._compare_settings(state_dict, "")
        state_dict = self._of_older(state_dict, "")
        if strict and not self._load_state_dict_pre_hooks:  # which may rename what does not fit
            self._refuse_names(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _compare_settings(self, state_dict: Mapping[str, Any], prefix: str) -> None:
        key = prefix + EXTRA_STATE
        if key in state_dict:
            instead = f"remove {key!r} from the state" if prefix else "pass allow_other_config=True"
            check_state_config(config_of(state_dict[key], instead), self._recorded(), instead)

    def _refuse_names(self, state_dict: Mapping[str, Any]) -> None:
        """Raises torch's error for missing and unknown names, which torch raises when it has copied the others."""
        ours, theirs = ({name for name in state if name != EXTRA_STATE} for state in (self.state_dict(), state_dict))
        said = [
            f"{what} key(s) in state_dict: {', '.join(sorted(names))}."
            for what, names in (("Missing", ours - theirs), ("Unexpected", theirs - ours))
            if names
        ]
        if said:
            raise RuntimeError(f"Error(s) in loading state_dict for {type(self).__name__}:\n\t" + "\n\t".join(said))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        # Checked here, so that it also works inside a larger module, and before torch copies a tensor.
        self._compare_settings(state_dict, prefix)
        state_dict = self._of_older(state_dict, prefix)
        if not self._load_state_dict_pre_hooks:
            refuse_misfits(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)
        if prefix + EXTRA_STATE in missing:
            missing.remove(prefix + EXTRA_STATE)

    def _of_older(self, state_dict: Mapping[str, Any], prefix: str) -> Mapping[str, Any]:
        """The state, which fits, with the entries added that a state of an older fastsae lacks."""
        return state_dict


def refuse_misfits(module: nn.Module, state: Mapping[str, Any], prefix: str) -> None:
    """Raises torch's error for tensors that do not fit the module's, before any is copied: torch copies those that
    fit, and raises afterwards.
    """
    own = {prefix + name: t for name, t in module.state_dict().items() if name != EXTRA_STATE}
    said = []
    for name in sorted(own.keys() & state.keys()):
        given, here = state[name], own[name]
        if not isinstance(given, Tensor):
            said.append(f"{name} is a {type(given).__name__}, expected a tensor.")
        elif given.shape != here.shape and not (here.ndim == 0 and given.shape == (1,)):
            said.append(
                f"size mismatch for {name}: copying a param with shape {given.shape} from checkpoint, the shape in "
                f"current model is {here.shape}."
            )
        elif given.is_meta and not here.is_meta:
            said.append(f"{name} is on meta and has no values.")
    if said:
        raise RuntimeError(f"Error(s) in loading state_dict for {type(module).__name__}:\n\t" + "\n\t".join(said))


def check_state_config(got: Mapping[str, Any], expected: Mapping[str, Any], instead: str) -> None:
    """Raises ValueError naming each setting in which a state's config differs from the module's.

    Those in MAY_DIFFER and RULES_MAY_DIFFER are not compared. instead: what to do to load the tensors all the same.

    A pre_bias that either leaves open fits any other. A setting that the state lacks counts as in BEFORE, and is not
    compared if it is not there.
    """
    theirs, ours = (flat(json.loads(json.dumps(config))) for config in (got, expected))
    for name in ours.keys() - theirs.keys():
        parent, _, last = name.rpartition(".")
        meant = f"{theirs.get(f'{parent}.kind')}.{last}" if parent else name
        if meant in BEFORE:
            theirs[name] = BEFORE[meant]
    # A rule's setting that another fastsae did not know yet is not compared either: its kind is.
    names = [name for name in theirs if compared(name)]
    if None in (got.get("pre_bias"), expected.get("pre_bias")):
        names = [name for name in names if name != "pre_bias"]
    none = "no such setting"
    differing = [
        f"{name} (got {theirs.get(name, none)!r}, expected {ours.get(name, none)!r})"
        for name in sorted(names)
        if theirs.get(name, none) != ours.get(name, none)
    ]
    if differing:
        raise ValueError(
            f"the state is of an SAE with other settings: {', '.join(differing)}. Build the SAE with these settings, "
            f"or {instead} to load it anyway"
        )


def compared(name: str) -> bool:
    """Whether a setting, by its dotted name, says what the weights mean."""
    return name.partition(".")[0] not in MAY_DIFFER and name not in RULES_MAY_DIFFER


def config_of(state: Any, instead: str = "pass allow_other_config=True") -> dict[str, Any]:
    """The settings in an extra state. Raises ValueError for anything else."""
    if isinstance(state, Tensor) and state.dtype == torch.uint8 and state.ndim == 1 and not state.is_meta:
        try:
            config = json.loads(bytes(state.tolist()))
        except ValueError:
            config = None
        if isinstance(config, dict):
            return config
    raise ValueError(
        f"{EXTRA_STATE} in the state is {type(state).__name__}, expected uint8 (n,) holding a JSON object, as "
        f"`get_extra_state` writes it; {instead} to load the tensors without it"
    )


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"activation.k": 32, ...}: the settings of the rule, and of the rule in it, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
