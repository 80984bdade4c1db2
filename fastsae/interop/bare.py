"""Files that hold only tensors, recognised by their names: Qwen-Scope, overcomplete, circuit-tracer's single layers.

If they do not say which latents are active, the caller does, with activation=.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor

from fastsae.interop.base import Format, says_its_rule, write_tensors
from fastsae.interop.files import Checkpoint, take
from fastsae.interop.parts import Parts, above_threshold, jump_relu, parts_of, refuse, relu
from fastsae.model.files import SavedModuleError
from fastsae.model.rules import Activation, ReLU, TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.warn import warn

QWEN = {"W_enc": "d_sae d_in", "W_dec": "d_in d_sae", "b_enc": "d_sae", "b_dec": "d_in"}
FINAL, DICTIONARY = "encoder.final_block", "dictionary._weights"
THRESHOLD = "activation_function.threshold"
TRACER = "transcoder.safetensors"
"""The file that is written; circuit-tracer's own names are layer_0.safetensors and so on, and it reads any."""
_BN = ("weight", "bias", "running_mean", "running_var")


def _only(files: Checkpoint, suffix: str) -> str | None:
    """The one file of weights with that suffix."""
    found = [name for name in files.weights() if name.endswith(suffix)]
    return found[0] if len(found) == 1 else None


# -- Qwen-Scope -------------------------------------------------------------------------------------------------------


def _qwen_file(files: Checkpoint) -> str | None:
    name = _only(files, ".sae.pt")
    return name if name is not None and QWEN.keys() <= files.names(name) else None


def read_qwen(files: Checkpoint, rule: Activation | None) -> Parts:
    name = _qwen_file(files)
    if name is None:
        raise SavedModuleError(
            f"{files.label} does not have exactly one *.sae.pt with {', '.join(QWEN)}; name the file"
        )
    said = re.search(r"L0_(\d+)", f"{files.label}/{files.root.resolve()}")
    if rule is None and said is None:
        raise SavedModuleError(
            f"{files.path(name)} does not say its k, and no folder above it is named ...L0_50; pass activation=TopK(50)"
        )
    held = take(files.path(name), files.tensors(name), QWEN)
    chosen = rule or TopK(int(said.group(1)))  # type: ignore[union-attr]
    return Parts(chosen, held["W_enc"], held["W_dec"].mT, held["b_enc"], held["b_dec"], False)


# -- overcomplete -----------------------------------------------------------------------------------------------------


def _overcomplete_file(files: Checkpoint) -> str | None:
    for suffix in (".pt", ".safetensors"):
        name = _only(files, suffix)
        if name is not None and name != "ae.pt" and DICTIONARY in files.names(name):
            return name
    return None


def read_overcomplete(files: Checkpoint, rule: Activation | None) -> Parts:
    """A linear encoder, with or without batch norm, whose running statistics are folded in, and a dictionary with rows
    of norm 1 times exp(multiplier). Jump's thresholds are logarithms, and it keeps what equals them.
    """
    name = _overcomplete_file(files)
    if name is None:
        raise SavedModuleError(f"{files.label} does not have exactly one file with {DICTIONARY}; name the file")
    path, tensors = files.path(name), files.tensors(name)
    layout = {f"{FINAL}.0.weight": "d_sae d_in", f"{FINAL}.0.bias": "d_sae", DICTIONARY: "d_sae d_in"}
    normed = f"{FINAL}.1.running_mean" in tensors
    if normed:
        tensors.pop(f"{FINAL}.1.num_batches_tracked", None)
        layout |= {f"{FINAL}.1.{part}": "d_sae" for part in _BN}
    jumps = "thresholds" in tensors
    if jumps:
        says_its_rule(files.label, rule)
        layout["thresholds"] = "d_sae"
    elif not isinstance(rule, (TopK, ReLU)):
        raise SavedModuleError(
            f"{path} does not say which latents are active; pass activation=TopK(k), or ReLU(l1=0.0), got {rule}"
        )
    held = take(path, tensors, layout, {"dictionary.multiplier": ""})
    rows = held[DICTIONARY].double()
    rows = rows / (torch.linalg.vector_norm(rows, dim=1, keepdim=True) + 1e-8)
    rows = rows * held.get("dictionary.multiplier", torch.zeros((), device="cpu")).double().exp()
    W_enc, b_enc, dtype = held[f"{FINAL}.0.weight"], held[f"{FINAL}.0.bias"], held[f"{FINAL}.0.weight"].dtype
    if normed:
        gain, shift, mean, variance = (held[f"{FINAL}.1.{part}"].double() for part in _BN)
        gain = gain / (variance + 1e-5).sqrt()
        W_enc, b_enc = (W_enc.double() * gain[:, None]).to(dtype), ((b_enc.double() - mean) * gain + shift).to(dtype)
    parts = Parts(rule or relu(), W_enc, rows.to(held[DICTIONARY].dtype), b_enc, W_enc.new_zeros(W_enc.shape[1]), False)
    if jumps:
        parts.rule, parts.rule_state = jump_relu(held["thresholds"].exp(), len(rows), inclusive=True, dtype=dtype)
    return parts


# -- circuit-tracer ---------------------------------------------------------------------------------------------------


def _tracer_file(files: Checkpoint) -> str | None:
    name = _only(files, ".safetensors")
    if name is None or name in ("sae_weights.safetensors", "sae.safetensors"):
        return None
    return name if {"W_enc", "W_dec", "b_enc", "b_dec"} <= files.names(name) else None


def read_tracer(files: Checkpoint, rule: Activation | None) -> Parts:
    """W_enc (d_sae, d_in) and W_dec (d_sae, d_out), or as the first had it its transpose; ReLU, or JumpReLU with a
    threshold, and whatever the caller says where there is none.
    """
    name = _tracer_file(files)
    if name is None:
        raise SavedModuleError(
            f"{files.label} does not have exactly one safetensors file with W_enc, W_dec, b_enc and b_dec; name it"
        )
    path, tensors = files.path(name), files.tensors(name)
    d_sae, d_out = (tensors[n].shape[-1:] for n in ("b_enc", "b_dec"))
    turned = tuple(tensors["W_dec"].shape) == (*d_out, *d_sae)
    if turned and d_sae == d_out:
        raise SavedModuleError(f"{path}: W_dec is square, so it could be (d_sae, d_out) or (d_out, d_sae)")
    layout = {
        "W_enc": "d_sae d_in", "W_dec": "d_out d_sae" if turned else "d_sae d_out", "b_enc": "d_sae", "b_dec": "d_out"
    }  # fmt: skip
    threshold = tensors.get(THRESHOLD)
    if isinstance(threshold, Tensor):
        says_its_rule(files.label, rule)
        layout[THRESHOLD] = "d_sae" if threshold.ndim else ""
    elif rule is None:
        warn(
            f"{path} does not say which latents are active: it is read as ReLU, as circuit-tracer's own loader does; "
            "pass activation=TopK(k), or ReLU(l1=0.0)",
            UserWarning,
        )
    held = take(path, tensors, layout, {"W_skip": "d_out d_in"})
    W_dec = held["W_dec"].mT if turned else held["W_dec"]
    parts = Parts(rule or relu(), held["W_enc"], W_dec, held["b_enc"], held["b_dec"], False, held.get("W_skip"))
    if THRESHOLD in held:
        if bool((held[THRESHOLD] < 0).any()):  # it passes what is between the threshold and 0, without a ReLU
            raise SavedModuleError(f"{path}: {THRESHOLD} has values below 0, but fastsae's acts are never negative")
        parts.rule, parts.rule_state = jump_relu(held[THRESHOLD], len(W_dec), dtype=W_dec.dtype)
    return parts


def write_tracer(sae: SparseAutoencoder, directory: Path) -> None:
    """A ReLU with thresholds of 0, so that the file says its rule."""
    parts, kind = parts_of(sae, "circuit_tracer"), "circuit_tracer"
    if sae.d_in != sae.d_out:
        raise refuse(kind, f"d_out = {sae.d_out} beside d_in = {sae.d_in}")
    if sae.d_sae == sae.d_out:
        raise refuse(kind, "d_sae = d_out, of which nobody could say whether W_dec is its transpose")
    tensors = {
        "W_enc": parts.W_enc, "W_dec": parts.W_dec, "b_enc": parts.b_enc, "b_dec": parts.b_dec,
        THRESHOLD: above_threshold(parts, kind),
    }  # fmt: skip
    if parts.W_skip is not None:
        tensors["W_skip"] = parts.W_skip
    write_tensors(directory / TRACER, tensors)


FORMATS = (
    Format("qwen_scope", _qwen_file, read_qwen, bare=True),
    Format("overcomplete", _overcomplete_file, read_overcomplete, bare=True),
    Format("circuit_tracer", _tracer_file, read_tracer, write_tracer, bare=True),
)
