"""sparsify (EleutherAI): cfg.json beside sae.safetensors, with encoder.weight and W_dec both (d_sae, d_in)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastsae.interop.base import Format, known_only, says_its_rule, setting, write_json, write_tensors
from fastsae.interop.files import Checkpoint, take
from fastsae.interop.parts import Parts, parts_of, plain_rule, refuse
from fastsae.model.files import HEADER, SavedModuleError
from fastsae.model.rules import Activation, GroupMax, HierarchicalTopK, TopK
from fastsae.model.sae import SparseAutoencoder

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
KNOWN = {
    "activation", "expansion_factor", "normalize_decoder", "num_latents", "k", "multi_topk", "skip_connection",
    "transcode", "d_in", "signed",
}  # fmt: skip


def match(files: Checkpoint) -> str | None:
    if WEIGHTS not in files or CONFIG not in files or HEADER in files.metadata(WEIGHTS):  # fastsae's has that name too
        return None
    return f"{WEIGHTS} with {CONFIG}"


def read(files: Checkpoint, rule: Activation | None) -> Parts:
    path, cfg, config = files.path(WEIGHTS), files.path(CONFIG), files.json(CONFIG)
    says_its_rule(files.label, rule)
    known_only(config, cfg, KNOWN)
    if config.get("signed"):
        raise SavedModuleError(f"{cfg} has signed = {config['signed']!r}: fastsae's acts are never negative")
    d_in, k = setting(config, cfg, "d_in", int), setting(config, cfg, "k", int)
    d_sae = setting(config, cfg, "num_latents", int, default=0)
    d_sae = d_sae or d_in * setting(config, cfg, "expansion_factor", int)
    skip = setting(config, cfg, "skip_connection", bool, default=False)
    transcode = setting(config, cfg, "transcode", bool, default=False)
    kind = setting(config, cfg, "activation", str, default="topk")
    if kind not in ("topk", "groupmax"):
        raise SavedModuleError(f"{cfg} has activation {kind!r}, expected topk or groupmax")
    layout = {"encoder.weight": "d_sae d_in", "encoder.bias": "d_sae", "W_dec": "d_sae d_in", "b_dec": "d_in"}
    if skip:
        layout["W_skip"] = "d_in d_in"
    held = take(path, files.tensors(WEIGHTS), layout, sizes={"d_in": (d_in, CONFIG), "d_sae": (d_sae, CONFIG)})
    return Parts(
        TopK(k) if kind == "topk" else GroupMax(k), held["encoder.weight"], held["W_dec"], held["encoder.bias"],
        held["b_dec"], not transcode, held.get("W_skip"), settings={"loss": "fvu"},
    )  # fmt: skip


def write(sae: SparseAutoencoder, directory: Path) -> None:
    parts, rule = parts_of(sae, "sparsify"), plain_rule(sae)
    if not isinstance(rule, (TopK, HierarchicalTopK, GroupMax)):
        raise refuse("sparsify", f"{type(rule).__name__}", "it has TopK and GroupMax")
    if sae.d_out != sae.d_in:
        raise refuse("sparsify", f"d_out = {sae.d_out} beside d_in = {sae.d_in}")
    if "normalize" in parts.settings:
        raise refuse("sparsify", f"normalize={sae.norm.mode!r}")
    k = rule.k if isinstance(rule, GroupMax) else rule.screen_k
    config: dict[str, Any] = {
        "activation": "groupmax" if isinstance(rule, GroupMax) else "topk", "expansion_factor": 0,
        "normalize_decoder": sae.decoder_norm == "unit", "num_latents": sae.d_sae, "k": k, "multi_topk": False,
        "skip_connection": parts.W_skip is not None, "transcode": not parts.pre_bias, "d_in": sae.d_in,
    }  # fmt: skip
    tensors = {
        "encoder.weight": parts.W_enc, "encoder.bias": parts.b_enc, "W_dec": parts.W_dec, "b_dec": parts.b_dec
    }  # fmt: skip
    if parts.W_skip is not None:
        tensors["W_skip"] = parts.W_skip
    write_tensors(directory / WEIGHTS, tensors)
    write_json(directory / CONFIG, config)


FORMAT = Format("sparsify", match, read, write)
