"""SAELens: cfg.json beside sae_weights.safetensors, with W_enc (d_in, d_sae) and W_dec (d_sae, d_out).

Settings of 6.0 and later are nested (`metadata` describes the model); older ones are one flat object, and may leave
the architecture out. BatchTopK and Matryoshka are saved for inference as JumpReLU, and for training with
their running threshold, `topk_threshold`.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.interop.base import Format, known_only, part, says_its_rule, setting, write_json, write_tensors
from fastsae.interop.files import Checkpoint, take
from fastsae.interop.parts import Parts, jump_relu, parts_of, plain_rule, refuse, relu, running_threshold
from fastsae.model.files import SavedModuleError
from fastsae.model.rules import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    HierarchicalTopK,
    JumpReLU,
    Matryoshka,
    ReLU,
    TopK,
)
from fastsae.model.sae import SparseAutoencoder
from fastsae.warn import warn

CONFIG, WEIGHTS, SCALER = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
ARCHITECTURES = ("standard", "topk", "abstopk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "gated", *TRANSCODERS)
MAJOR = 6
"""The newest layout known here."""
OF_TRAINING = {
    "decoder_init_norm", "l1_coefficient", "lp_norm", "l1_warm_up_steps", "use_sparse_activations",
    "aux_loss_coefficient", "jumprelu_init_threshold", "jumprelu_bandwidth", "jumprelu_sparsity_loss_mode",
    "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient", "jumprelu_tanh_scale", "jumprelu_ste_to_input",
    "target_l0", "topk_threshold_lr", "use_matryoshka_aux_loss",
}  # fmt: skip
"""Settings that do not change what the weights mean."""
KNOWN = OF_TRAINING | {
    "architecture", "d_in", "d_sae", "d_out", "dtype", "device", "apply_b_dec_to_input", "normalize_activations",
    "reshape_activations", "metadata", "k", "rescale_acts_by_decoder_norm", "matryoshka_widths",
}  # fmt: skip


def match(files: Checkpoint) -> str | None:
    return f"{WEIGHTS} with {CONFIG}" if WEIGHTS in files and CONFIG in files else None


def _config(files: Checkpoint) -> dict[str, Any]:
    """The settings in the layout of 6.0."""
    path, config = files.path(CONFIG), dict(files.json(CONFIG))
    metadata = part(config, path, "metadata")
    version = str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or "")
    found = re.match(r"\d+", version)
    if found and int(found.group()) > MAJOR:
        raise SavedModuleError(
            f"{path} is of sae_lens {version}, expected {MAJOR} or older; a newer fastsae may read it"
        )
    if found and int(found.group()) == MAJOR:
        known_only(config, path, KNOWN | {"sae_lens_version", "sae_lens_training_version"})
        return config
    # Before 6.0: settings that do not matter here are ignored.
    for name in ("finetuning_scaling_factor", "use_error_term", "noise_scale"):
        if config.get(name):
            raise SavedModuleError(f"{path} has {name} = {config[name]!r}, which fastsae does not have")
    config.setdefault("architecture", "standard")
    config.setdefault("apply_b_dec_to_input", config["architecture"] not in TRANSCODERS)
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation == "topk":
        config["architecture"], config["k"] = "topk", part(config, path, "activation_fn_kwargs").get("k")
    elif activation != "relu":
        raise SavedModuleError(f"{path} has the activation {activation!r}, expected relu or topk")
    given = config.get("normalize_activations") or "none"
    config["normalize_activations"] = "expected_average_only_in" if given is True else given
    return config


def read(files: Checkpoint, rule: Activation | None) -> Parts:
    config, path, cfg = _config(files), files.path(WEIGHTS), files.path(CONFIG)
    says_its_rule(files.label, rule)
    shape = config.get("reshape_activations") or "none"
    if shape not in ("none", "hook_z"):  # rows of all heads, either way
        raise SavedModuleError(f"{cfg} has reshape_activations = {shape!r}, expected 'none' or 'hook_z'")
    if SCALER in files and files.json(SCALER).get("has_whitening"):
        raise SavedModuleError(f"{files.path(SCALER)} has has_whitening = True: whitening that was not folded")
    name = setting(config, cfg, "architecture", str)
    if name not in ARCHITECTURES:
        raise SavedModuleError(f"{cfg} has architecture {name!r}, expected one of {', '.join(ARCHITECTURES)}")
    transcoder = name in TRANSCODERS
    sizes = {axis: (setting(config, cfg, axis, int), CONFIG) for axis in ("d_in", "d_sae")}
    out = "d_out" if transcoder else "d_in"
    if transcoder:
        sizes["d_out"] = (setting(config, cfg, "d_out", int), CONFIG)
    layout = {"W_enc": "d_in d_sae", "W_dec": f"d_sae {out}", "b_dec": out, "b_enc": "d_sae"}
    tensors = files.tensors(path.name)
    if isinstance(scale := tensors.get("scaling_factor"), Tensor) and bool((scale == 1).all()):
        del tensors["scaling_factor"]  # older files have one that does nothing
    optional: dict[str, str] = {}
    if name == "gated":
        layout |= {"b_gate": "d_sae", "b_mag": "d_sae", "r_mag": "d_sae"}
        del layout["b_enc"]
        optional["b_enc"] = "d_sae"  # some hold one that nothing reads
    if "jumprelu" in name:
        layout["log_threshold" if "log_threshold" in tensors else "threshold"] = "d_sae"
    if "skip" in name:
        layout["W_skip"] = "d_out d_in"
    if "batchtopk" in name:
        layout["topk_threshold"] = ""
    held = take(path, tensors, layout, optional, sizes)
    pre_bias = setting(config, cfg, "apply_b_dec_to_input", bool, default=True)
    if transcoder and pre_bias:
        raise SavedModuleError(f"{cfg} has apply_b_dec_to_input = True with architecture {name!r}, which never does")
    parts = Parts(
        relu(), held["W_enc"].mT, held["W_dec"], held.get("b_enc", held["b_dec"]), held["b_dec"], pre_bias,
        held.get("W_skip"),
    )  # fmt: skip
    parts.settings["normalize"] = _normalize(config, cfg, transcoder)
    if config.get("normalize_activations") == "expected_average_only_in":
        factor = _factor(files)
        parts.fold_input_scale(factor, factor)
        if "topk_threshold" in held and config.get("rescale_acts_by_decoder_norm"):
            held["topk_threshold"] = held["topk_threshold"] / factor  # of acts times norms, which the fold divided
    _set_rule(parts, name, config, cfg, held)
    return parts


def _factor(files: Checkpoint) -> float:
    """What inputs were multiplied by in training, outside of the SAE: a checkpoint of training has it in a file."""
    if SCALER not in files:
        warn(
            f"{files.path(CONFIG)} has normalize_activations = 'expected_average_only_in', but there is no {SCALER} "
            "with the factor: scale inputs yourself as in training, unless it was folded into the weights",
            UserWarning,
        )
        return 1.0
    factor = setting(files.json(SCALER), files.path(SCALER), "scaling_factor", float)
    if not 0 < factor < math.inf:
        raise SavedModuleError(f"{files.path(SCALER)} has scaling_factor = {factor}, expected a positive number")
    return float(factor)


def _normalize(config: dict[str, Any], cfg: Path, transcoder: bool) -> str:
    mode = setting(config, cfg, "normalize_activations", str, default="none")
    if mode in ("none", "expected_average_only_in"):
        return "none"
    if mode == "layer_norm" and not transcoder:
        return "standardize"
    raise SavedModuleError(
        f"{cfg} has normalize_activations = {mode!r}"
        + (" in a transcoder" if transcoder else "")
        + ", which fastsae does not have; expected 'none', 'expected_average_only_in' or, in an SAE, 'layer_norm'"
    )


def _set_rule(parts: Parts, name: str, config: dict[str, Any], cfg: Path, held: dict[str, Tensor]) -> None:
    d_sae = len(parts.W_dec)
    if name in ("topk", "abstopk", "batchtopk", "matryoshka_batchtopk"):
        k = setting(config, cfg, "k", int)
        if setting(config, cfg, "rescale_acts_by_decoder_norm", bool, default=False):
            parts.fold_norms()  # its acts are those times the norms, and it decodes with rows of norm 1
        parts.rule = AbsTopK(k) if name == "abstopk" else TopK(k)
        if "batchtopk" in name:
            parts.rule, parts.rule_state = BatchTopK(k), running_threshold(held["topk_threshold"])
        if name == "matryoshka_batchtopk":
            steps = _steps(config.get("matryoshka_widths"), d_sae, cfg)
            parts.rule = Matryoshka(BatchTopK(k), groups=tuple(steps), weights=(1.0,) * len(steps))
    elif name == "gated":
        parts.rule, parts.b_enc = Gated(l1=0.0), held["b_gate"]
        parts.rule_state = {"r_mag": held["r_mag"], "b_mag": held["b_mag"]}
    elif "jumprelu" in name:
        threshold = held["threshold"] if "threshold" in held else held["log_threshold"].exp()
        parts.rule, parts.rule_state = jump_relu(threshold, d_sae, dtype=parts.W_enc.dtype)


def _steps(widths: Any, d_sae: int, cfg: Path) -> list[int]:
    """The sizes of the groups between widths that ascend, the last of them d_sae, written or not."""
    if isinstance(widths, list) and widths and all(isinstance(width, int) for width in widths):
        ends = [*widths, *([] if widths[-1] == d_sae else [d_sae])]
        steps = [b - a for a, b in pairwise([0, *ends])]
        if min(steps) >= 1:
            return steps
    raise SavedModuleError(f"{cfg} has matryoshka_widths = {widths!r}, expected numbers ascending to {d_sae}")


def write(sae: SparseAutoencoder, directory: Path) -> None:
    parts = parts_of(sae, "saelens")
    rule, skip = plain_rule(sae), parts.W_skip is not None
    transcoder = skip or sae.d_out != sae.d_in
    tensors: dict[str, Tensor] = {"b_enc": parts.b_enc}
    config: dict[str, Any] = {}
    if isinstance(rule, ReLU):
        name = "standard"
    elif isinstance(rule, (TopK, AbsTopK, HierarchicalTopK)):
        name = "abstopk" if isinstance(rule, AbsTopK) else "topk"
        config = {"k": rule.k if isinstance(rule, AbsTopK) else rule.screen_k, "rescale_acts_by_decoder_norm": False}
    elif isinstance(rule, (JumpReLU, BatchTopK)):  # a BatchTopK above its threshold, as SAELens saves its own
        name = "jumprelu"
        wide = torch.promote_types(parts.b_enc.dtype, torch.float32)
        held = parts.rule_state
        threshold = held["log_threshold"].exp() if isinstance(rule, JumpReLU) else held["threshold"].expand(sae.d_sae)
        tensors["threshold"] = threshold.to(wide)
    elif isinstance(rule, Gated):
        name = "gated"
        tensors = {"b_gate": parts.b_enc, **{n: parts.rule_state[n] for n in ("b_mag", "r_mag")}}
    else:
        raise refuse("saelens", f"{type(rule).__name__}")
    normalize = {"none": "none", "standardize": "layer_norm"}.get(parts.settings.get("normalize", "none"))
    if normalize is None:
        raise refuse("saelens", f"normalize={sae.norm.mode!r}", "its own layer_norm is normalize='standardize'")
    if transcoder:
        known = {
            "standard": ("transcoder", "skip_transcoder"),
            "jumprelu": ("jumprelu_transcoder", "jumprelu_skip_transcoder"),
        }
        if name not in known or normalize != "none" or parts.pre_bias:
            raise refuse("saelens", f"skip connection or d_out with {name}, a pre-bias or normalize={sae.norm.mode!r}")
        name, config = known[name][skip], {"d_out": sae.d_out}
        if parts.W_skip is not None:
            tensors["W_skip"] = parts.W_skip
    config = {
        "architecture": name, "d_in": sae.d_in, "d_sae": sae.d_sae, **config,
        "dtype": str(parts.W_dec.dtype).removeprefix("torch."), "device": "cpu",
        "apply_b_dec_to_input": parts.pre_bias, "normalize_activations": normalize, "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0"},
    }  # fmt: skip
    tensors |= {"W_enc": parts.W_enc.mT, "W_dec": parts.W_dec, "b_dec": parts.b_dec}
    write_tensors(directory / WEIGHTS, tensors)
    write_json(directory / CONFIG, config)


FORMAT = Format("saelens", match, read, write)
