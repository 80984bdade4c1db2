"""OpenMOSS: Llama Scope (hyperparams.json beside checkpoints/final.safetensors) and what llamascopium writes.

Both are trained on x · √D / (its average norm), and select by act x decoder norm (`sparsity_include_decoder_norm`).
Here acts are in the units of x, as their libraries have them at inference: pre-acts of x · s, divided by s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsae.interop.base import Format, says_its_rule, setting
from fastsae.interop.files import Checkpoint, take
from fastsae.interop.parts import Parts, jump_relu, relu
from fastsae.model.files import SavedModuleError
from fastsae.model.rules import Activation, BatchTopK, TopK

HYPERPARAMS, FINAL = "hyperparams.json", "checkpoints/final.safetensors"
CONFIG, WEIGHTS = "config.json", "sae_weights.safetensors"
FIRST = {
    "encoder.weight": "d_sae d_in", "encoder.bias": "d_sae", "decoder.weight": "d_in d_sae", "decoder.bias": "d_in"
}  # fmt: skip
SECOND = {"W_E": "d_in d_sae", "b_E": "d_sae", "W_D": "d_sae d_in", "b_D": "d_in"}
NORM = "dataset_average_activation_norm"
MAJOR = 2
"""The newest version of llamascopium whose layout is known here; its files say theirs."""
THRESHOLDS = ("activation_function.log_jumprelu_threshold", "log_jumprelu_threshold")


def _factors(norms: Mapping[str, Any], hooks: tuple[str, str], d_in: int, path: Path) -> tuple[float, float]:
    """√D / average norm, of input and output. Raises SavedModuleError for a norm that is missing or not positive."""
    found = []
    for hook in hooks:
        given = norms.get(hook)
        if isinstance(given, Tensor):  # of one number, in a floating dtype
            number = given.is_floating_point() and given.numel() == 1
            given = float(given) if number else f"{given.dtype} {given.tolist()}"
        value = float(given) if isinstance(given, (int, float)) and not isinstance(given, bool) else math.nan
        if not 0 < value < math.inf:
            raise SavedModuleError(
                f"{path} was trained on normalized activations, but has no average norm of {hook!r} (got {given!r:.80})"
            )
        found.append(math.sqrt(d_in) / value)
    return found[0], found[1]


def _no_glu(config: Mapping[str, Any], path: Path) -> None:
    if config.get("use_glu_encoder"):
        raise SavedModuleError(f"{path} has use_glu_encoder = True, which fastsae does not have")


def match_first(files: Checkpoint) -> str | None:
    return f"{FINAL} with {HYPERPARAMS}" if FINAL in files and HYPERPARAMS in files else None


def read_first(files: Checkpoint, rule: Activation | None) -> Parts:
    says_its_rule(files.label, rule)
    path, cfg, config = files.path(FINAL), files.path(HYPERPARAMS), files.json(HYPERPARAMS)
    _no_glu(config, cfg)
    d_in = setting(config, cfg, "d_model", int)
    sizes = {"d_in": (d_in, HYPERPARAMS)}
    if config.get("d_sae") is not None:
        sizes["d_sae"] = (setting(config, cfg, "d_sae", int), HYPERPARAMS)
        factor = config.get("expansion_factor")
        if factor is not None and int(d_in * setting(config, cfg, "expansion_factor", float)) != sizes["d_sae"][0]:
            raise SavedModuleError(
                f"{cfg} says d_sae = {sizes['d_sae'][0]}, and expansion_factor = {factor} of d_model = {d_in}"
            )
    with_bias = setting(config, cfg, "use_decoder_bias", bool, default=True)
    layout = {name: axes for name, axes in FIRST.items() if with_bias or name != "decoder.bias"}
    held = take(path, files.tensors(FINAL), layout, sizes=sizes)
    W_enc, W_dec = held["encoder.weight"], held["decoder.weight"].mT
    b_dec = held["decoder.bias"] if with_bias else W_dec.new_zeros(d_in)
    pre_bias = with_bias and setting(config, cfg, "apply_decoder_bias_to_pre_encoder", bool, default=True)
    parts = Parts(relu(), W_enc, W_dec, held["encoder.bias"], b_dec, pre_bias)
    mode = setting(config, cfg, "norm_activation", str, default="token-wise")
    if mode == "dataset-wise":
        norms = config.get(NORM)
        of_input, of_output = _factors(norms if isinstance(norms, dict) else {}, ("in", "out"), d_in, cfg)
        if pre_bias and of_input != of_output:
            raise SavedModuleError(
                f"{cfg} subtracts the bias of an output of another scale ({of_output}) than {of_input}"
            )
        parts.fold_input_scale(of_input, of_output)
        parts.rescale(1 / of_input, of_input)  # acts in the units of x, and rows that give back what they gave
    elif mode not in ("none", "inference"):
        raise SavedModuleError(f"{cfg} has norm_activation {mode!r}, expected 'dataset-wise', 'none' or 'inference'")
    if setting(config, cfg, "sparsity_include_decoder_norm", bool, default=True):
        parts.fold_norms()
    kind = setting(config, cfg, "act_fn", str, default="relu").lower()
    threshold = float(setting(config, cfg, "jump_relu_threshold", float, default=0.0))
    if kind == "jumprelu" or (kind == "topk" and threshold > 0):  # trained as TopK, used above one threshold
        if threshold < 0:
            raise SavedModuleError(f"{cfg} has jump_relu_threshold = {threshold}, expected 0 or more")
        parts.rule, parts.rule_state = jump_relu(
            torch.tensor(threshold, dtype=torch.float64), len(W_dec), dtype=W_enc.dtype
        )
    elif kind == "topk":
        parts.rule = TopK(setting(config, cfg, "top_k", int))
    elif kind != "relu":
        raise SavedModuleError(f"{cfg} has act_fn {kind!r}, expected relu, topk or jumprelu")
    return parts


def match_second(files: Checkpoint) -> str | None:
    if WEIGHTS not in files or CONFIG not in files:
        return None
    return f"{WEIGHTS} with {CONFIG}" if "act_fn" in files.json(CONFIG) or "sae_type" in files.json(CONFIG) else None


def read_second(files: Checkpoint, rule: Activation | None) -> Parts:
    says_its_rule(files.label, rule)
    path, cfg, config = files.path(WEIGHTS), files.path(CONFIG), files.json(CONFIG)
    version = files.metadata(WEIGHTS).get("version", "")
    if (found := re.match(r"\d+", version)) and int(found.group()) > MAJOR:
        raise SavedModuleError(
            f"{path} is of llamascopium {version}, expected {MAJOR} or older; a newer fastsae may read it"
        )
    _no_glu(config, cfg)
    if config.get("sae_type", "sae") != "sae":
        raise SavedModuleError(f"{cfg} has sae_type {config['sae_type']!r}, expected 'sae'")
    tensors = files.tensors(WEIGHTS)
    norms = {name.partition(".")[2]: tensors.pop(name) for name in list(tensors) if name.startswith(f"{NORM}.")}
    d_in = setting(config, cfg, "d_model", int)
    layout = dict(FIRST if "encoder.weight" in tensors else SECOND)  # the first were the names of its first year
    if not setting(config, cfg, "use_decoder_bias", bool, default=True):
        layout.pop("decoder.bias", None), layout.pop("b_D", None)
    kind = setting(config, cfg, "act_fn", str, default="relu").lower()
    theta = next((name for name in THRESHOLDS if name in tensors), THRESHOLDS[0])
    if kind == "jumprelu":
        layout[theta] = "d_sae"
    sizes = {
        "d_in": (d_in, CONFIG),
        "d_sae": (
            int(d_in * setting(config, cfg, "expansion_factor", float)),
            f"{CONFIG} (d_model x expansion_factor)",
        ),
    }
    held = take(path, tensors, layout, sizes=sizes)
    if "W_E" in held:
        W_enc, b_enc, W_dec, b_dec = held["W_E"].mT, held["b_E"], held["W_D"], held.get("b_D")
    else:
        W_enc, b_enc = held["encoder.weight"], held["encoder.bias"]
        W_dec, b_dec = held["decoder.weight"].mT, held.get("decoder.bias")
    parts = Parts(relu(), W_enc, W_dec, b_enc, W_dec.new_zeros(d_in) if b_dec is None else b_dec, False)
    by_norm = setting(config, cfg, "sparsity_include_decoder_norm", bool, default=True)
    gate = parts.norms() if by_norm else torch.ones((), dtype=torch.float64, device="cpu")
    mode, of_input = setting(config, cfg, "norm_activation", str, default="dataset-wise"), 1.0
    if mode == "dataset-wise":
        hooks = tuple(setting(config, cfg, f"hook_point_{end}", str) for end in ("in", "out"))
        of_input, of_output = _factors(norms, (hooks[0], hooks[1]), d_in, path)
        parts.fold_input_scale(of_input, of_output)
        parts.rescale(1 / of_input, of_input)
    elif mode != "inference":
        raise SavedModuleError(f"{cfg} has norm_activation {mode!r}, expected 'dataset-wise' or 'inference'")
    if kind == "jumprelu":
        # act · s · norm > θ, which has the sign of both sides: a row of 0 is never active.
        theta_of = held[theta].double().exp() / (gate * of_input)
        parts.rule, parts.rule_state = jump_relu(theta_of, len(W_dec), dtype=W_enc.dtype)
    elif kind == "topk":
        parts.rule = TopK(setting(config, cfg, "top_k", int), weighted=by_norm)
    elif kind == "batchtopk":
        if by_norm and not torch.allclose(gate, gate[:1].expand_as(gate)):
            raise SavedModuleError(
                f"{cfg} has batchtopk by act x decoder norm with norms that differ, which fastsae does not have; "
                "transform_to_unit_decoder_norm() of llamascopium makes them equal"
            )
        parts.rule = BatchTopK(setting(config, cfg, "top_k", int))
        parts.rule_state = {name: t for name, t in parts.rule.new_buffers().items()}
    elif kind != "relu":
        raise SavedModuleError(f"{cfg} has act_fn {kind!r}, expected relu, jumprelu, topk or batchtopk")
    return parts


FORMATS = (Format("llama_scope", match_first, read_first), Format("llamascopium", match_second, read_second))
