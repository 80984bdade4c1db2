"""Gemma Scope: params.npz, and its second edition's params.safetensors with names in lower case and a config.json.

relu(x W_enc + b_enc) where it is above the threshold; the same layout for SAEs and transcoders, none with a pre-bias.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fastsae.interop.base import Format, says_its_rule, write_tensors
from fastsae.interop.files import Checkpoint, take
from fastsae.interop.parts import Parts, above_threshold, jump_relu, parts_of, refuse
from fastsae.model.files import SavedModuleError
from fastsae.model.rules import Activation
from fastsae.model.sae import SparseAutoencoder

FIRST, SECOND, CONFIG = "params.npz", "params.safetensors", "config.json"
LAYOUT = {"w_enc": "d_in d_sae", "w_dec": "d_sae d_out", "b_enc": "d_sae", "b_dec": "d_out", "threshold": "d_sae"}
SKIP = "affine_skip_connection"


def _first(files: Checkpoint) -> str | None:
    """params.npz, or another archive that was named."""
    name = files.only if files.only is not None and files.only.endswith(".npz") else FIRST
    return name if name in files else None


def _second(files: Checkpoint) -> str | None:
    named = files.only if files.only is not None and files.only.endswith(".safetensors") else SECOND
    if named not in files or (named != SECOND and "w_enc" not in files.names(named)):
        return None
    return named


def _parts(held: dict[str, Tensor]) -> Parts:
    rule, state = jump_relu(held["threshold"], len(held["b_enc"]), dtype=held["w_enc"].dtype)
    skip = held[SKIP].mT if SKIP in held else None
    return Parts(rule, held["w_enc"].mT, held["w_dec"], held["b_enc"], held["b_dec"], False, skip, state)


def read_first(files: Checkpoint, rule: Activation | None) -> Parts:
    says_its_rule(files.label, rule)
    name = _first(files) or FIRST
    tensors = {("w_" + key[2:] if key.startswith("W_") else key): t for key, t in files.tensors(name).items()}
    return _parts(take(files.path(name), tensors, LAYOUT))


def write_first(sae: SparseAutoencoder, directory: Path) -> None:
    """In float32, or float64; numpy has no bfloat16."""
    parts = parts_of(sae, "gemma_scope")
    if parts.W_skip is not None:
        raise refuse("gemma_scope", "skip connection", "circuit_tracer's format has one")
    tensors = {
        "W_enc": parts.W_enc.mT, "W_dec": parts.W_dec, "b_enc": parts.b_enc, "b_dec": parts.b_dec,
        "threshold": above_threshold(parts, "gemma_scope"),
    }  # fmt: skip
    wide = {name: t.to(torch.promote_types(t.dtype, torch.float32)) for name, t in tensors.items()}
    write_tensors(directory / FIRST, wide)


def read_second(files: Checkpoint, rule: Activation | None) -> Parts:
    says_its_rule(files.label, rule)
    name = _second(files) or SECOND
    path, tensors = files.path(name), files.tensors(name)
    if isinstance(tensors.get("w_dec"), Tensor) and tensors["w_dec"].ndim == 3:
        raise SavedModuleError(
            f"{path} writes to several layers (w_dec {tuple(tensors['w_dec'].shape)}), expected a transcoder of one"
        )
    if CONFIG in files:
        cfg, config = files.path(CONFIG), files.json(CONFIG)
        if config.get("architecture") != "jump_relu":
            raise SavedModuleError(f"{cfg} has architecture {config.get('architecture')!r}, expected 'jump_relu'")
        affine = config.get("affine_connection")
        if affine is not None and bool(affine) != (SKIP in tensors):
            has = "has" if SKIP in tensors else "lacks"
            raise SavedModuleError(f"{cfg} says affine_connection = {affine!r}, but {path.name} {has} {SKIP}")
    return _parts(take(path, tensors, LAYOUT, {SKIP: "d_in d_out"}))


FORMATS = (Format("gemma_scope", _first, read_first, write_first), Format("gemma_scope_2", _second, read_second))
