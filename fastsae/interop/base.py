"""What a format is: a name, how it is recognised from files, and how its tensors become an SAE and come from one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastsae.atomic import replace_file
from fastsae.interop.files import Checkpoint
from fastsae.interop.parts import Parts
from fastsae.model.files import SavedModuleError
from fastsae.model.rules import Activation
from fastsae.model.sae import SparseAutoencoder


@dataclass(frozen=True)
class Format:
    """match: what in the checkpoint is of this format, in words, or None. read: the SAE's parts; the rule is the
    caller's, for files that do not record it. write: None if fastsae does not write this format. bare: recognised by
    the tensors inside, which are read only if no file names belong to another format.
    """

    name: str
    match: Callable[[Checkpoint], str | None]
    read: Callable[[Checkpoint, Activation | None], Parts]
    write: Callable[[SparseAutoencoder, Path], None] | None = None
    bare: bool = False


def says_its_rule(label: str, rule: Activation | None) -> None:
    """Raises SavedModuleError if a caller gives a rule although the checkpoint records it."""
    if rule is not None:
        raise SavedModuleError(f"{label} says which latents are active; leave activation={rule} out")


def setting(config: Mapping[str, Any], path: Path, name: str, kind: type, default: Any = None) -> Any:
    """A setting of that type. Raises SavedModuleError for another, and for one that is missing without a default."""
    value = config.get(name, default)
    whole_float = kind is int and isinstance(value, float) and value.is_integer()
    if whole_float:
        value = int(value)
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        fits = True
    if value is None or not fits:
        raise SavedModuleError(f"{path} has {name} = {value!r}, expected a {kind.__name__}")
    return value


def part(config: Mapping[str, Any], path: Path, name: str) -> dict[str, Any]:
    """The settings under a name, none if it is not there. Raises SavedModuleError for anything else."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise SavedModuleError(f"{path} has {name} = {value!r}, expected settings by name")
    return value or {}


def known_only(config: Mapping[str, Any], path: Path, known: set[str]) -> None:
    """Raises SavedModuleError for settings that this fastsae does not know: they may change what the weights mean."""
    if more := sorted(config.keys() - known):
        raise SavedModuleError(
            f"{path} has {', '.join(f'{name} = {config[name]!r}'[:80] for name in more[:5])}, which this fastsae does "
            "not know and cannot safely ignore; a newer one may know it"
        )


def write_json(path: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=2) + "\n"
    _writing(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file, or by its suffix a numpy archive or a torch file."""
    held = {name: t.detach().contiguous() for name, t in tensors.items()}
    if path.suffix == ".safetensors":
        _writing(path, lambda temporary: save_file(held, temporary, metadata={"format": "pt"}))
    elif path.suffix == ".npz":
        _writing(path, lambda temporary: _write_arrays(temporary, held))
    else:
        _writing(path, lambda temporary: torch.save(held, temporary))


def _write_arrays(path: Path, tensors: Mapping[str, Tensor]) -> None:
    import numpy as np

    with path.open("wb") as file:  # a name would get another suffix
        np.savez(file, **{name: t.numpy() for name, t in tensors.items()})  # type: ignore[arg-type]


def _writing(path: Path, write: Callable[[Path], Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)
    except OSError as error:
        raise SavedModuleError(f"cannot write {path}: {error}; an older file of that name is unchanged") from error
