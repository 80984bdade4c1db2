"""The files of a checkpoint that another library wrote: what is there, their JSON, and their tensors by name.

Nothing is unpickled: safetensors, numpy archives of plain arrays, and torch files by `weights_only=True` alone.
"""

from __future__ import annotations

import json
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastsae.model.files import SavedModuleError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SUFFIXES = (".safetensors", ".npz", ".pt")
"""What may hold weights."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder, or one file of it (`only`) beside its configurations. Names are relative to `root`, with slashes.

    label: its name in errors: the path, or the repository that was asked for.
    """

    root: Path
    only: str | None = None
    label: str = ""
    _read: dict[str, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def at(cls, path: Path, label: str = "") -> Checkpoint:
        """Raises SavedModuleError where nothing is there."""
        if path.is_dir():
            return cls(path, label=label or str(path))
        if path.is_file():
            return cls(path.parent, path.name, label or str(path))
        raise SavedModuleError(f"{path} does not exist")

    def __contains__(self, name: str) -> bool:
        if self.only is not None and name.endswith(SUFFIXES) and name != self.only:
            return False
        return (self.root / name).is_file()

    def weights(self) -> list[str]:
        """The files at the top that may hold weights, sorted."""
        if self.only is not None:
            return [self.only]
        return sorted(path.name for path in self.root.iterdir() if path.suffix in SUFFIXES and path.is_file())

    def path(self, name: str) -> Path:
        return self.root / name

    def json(self, name: str) -> dict[str, Any]:
        """The object in a JSON file. Raises SavedModuleError for anything else."""
        path = self.path(name)
        if name not in self._read:
            try:
                self._read[name] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise SavedModuleError(f"{path} is not a JSON file: {_line(error)}; take another copy of it") from error
        if not isinstance(self._read[name], dict):
            raise SavedModuleError(f"{path} holds a {type(self._read[name]).__name__}, expected a JSON object")
        return self._read[name]

    def names(self, name: str) -> set[str]:
        """The names of the tensors in a file. Raises SavedModuleError for a file that is not what its suffix says."""
        path = self.path(name)
        if path.suffix != ".safetensors":
            return set(self.tensors(name))
        try:
            with safe_open(path, framework="pt") as file:
                return set(file.keys())
        except (OSError, SafetensorError, ValueError) as error:
            raise _damaged(path, "safetensors", error) from error

    def metadata(self, name: str) -> Mapping[str, str]:
        """The metadata of a safetensors file; none where it is damaged, which reading its tensors will say."""
        try:
            with safe_open(self.path(name), framework="pt") as file:
                return file.metadata() or {}
        except (OSError, SafetensorError, ValueError):
            return {}

    def tensors(self, name: str) -> dict[str, Any]:
        """A file's tensors by name, on the CPU, and what else a torch file has: numbers, texts, dicts of them.

        Raises SavedModuleError naming the file for a damaged one, and for one with pickled objects.
        """
        if name not in self._read:
            path = self.path(name)
            read = {".safetensors": _safetensors, ".npz": _arrays}.get(path.suffix, _torch_file)
            self._read[name] = read(path)
        return dict(self._read[name])


def _safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned out of the mapped file: replacing the file does not change it.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise _damaged(path, "safetensors", error) from error


def _arrays(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, "numpy", error) from error


def _torch_file(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise SavedModuleError(
            f"{path} holds pickled objects other than tensors, or is damaged ({_line(error)}); fastsae unpickles "
            "nothing: save its state_dict() with torch.save, or as safetensors"
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise _damaged(path, "torch", error) from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise SavedModuleError(f"{path} holds a {type(found).__name__}, expected a dict of tensors by name")
    return found


def _damaged(path: Path, kind: str, error: BaseException) -> SavedModuleError:
    return SavedModuleError(f"{path} is truncated or no {kind} file: {_line(error)}; take another copy of it")


def _line(error: BaseException) -> str:
    """The first line of an error, no longer than is read."""
    return (" ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__)[:160]


def take(
    path: Path,
    tensors: Mapping[str, Any],
    layout: Mapping[str, str],
    optional: Mapping[str, str] | None = None,
    sizes: Mapping[str, tuple[int, str]] | None = None,
) -> dict[str, Tensor]:
    """The tensors that a layout names, each of its shape.

    layout, optional: name -> its axes, as "d_in d_sae", "d_sae", or "" for a number. sizes: name -> what a
    configuration says an axis has, and where; an axis that it leaves out has what the vectors say.
    Raises SavedModuleError for a missing or another tensor, and for a wrong dtype or shape.
    """
    axes = {**layout, **{name: of for name, of in (optional or {}).items() if name in tensors}}
    if missing := sorted(layout.keys() - tensors.keys()):
        raise SavedModuleError(f"{path} lacks {', '.join(missing)}; expected {', '.join(sorted(layout))}")
    if more := sorted(tensors.keys() - axes.keys()):
        raise SavedModuleError(
            f"{path} also holds {', '.join(more[:8])}, which is unknown; expected {', '.join(sorted(axes))}"
        )
    known = {axis: (size, f"{where} says {size}") for axis, (size, where) in (sizes or {}).items()}
    for name in sorted(axes, key=lambda name: len(axes[name].split())):
        tensor, wanted = tensors[name], axes[name].split()
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS:
            got = str(tensor.dtype) if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"
            raise SavedModuleError(f"{path}: {name} is {got}, expected float64, float32, float16 or bfloat16")
        shape = tuple(tensor.shape)
        if 0 in shape:
            raise SavedModuleError(f"{path}: {name} is {shape} and holds no number, expected ({', '.join(wanted)})")
        if len(shape) == len(wanted):
            for axis, size in zip(wanted, shape, strict=True):
                known.setdefault(axis, (size, f"{name} has {size}"))
        expected = tuple(known[axis][0] if axis in known else -1 for axis in wanted)
        if shape != expected:
            because = "; ".join(f"{axis}: {known[axis][1]}" for axis in dict.fromkeys(wanted) if axis in known)
            turned = len(shape) == 2 and shape[::-1] == expected and shape != expected
            raise SavedModuleError(
                f"{path}: {name} is {shape}, expected ({', '.join(wanted)}) = {expected} ({because})"
                + (", which is its transpose" if turned else "")
            )
    return {name: tensors[name] for name in axes}
