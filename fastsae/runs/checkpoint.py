"""Checkpoints: directories that are complete or absent, and can be verified.

    checkpoints/step_00001200/
        sae.safetensors, config.json     the module, as `fastsae.save` writes it: the directory is also a saved SAE
        optimizer.safetensors, ...       the tensors of one section of the training state each
        state.json                       everything of the training state that is not a tensor
        manifest.json                    bytes and sha256 of every other file; written last

A checkpoint is written under a temporary name, each file and the directory are fsync'ed, then it is renamed: a reader
sees all of it or nothing, even after `kill -9` or a power cut. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastsae.atomic import fsync_path, sha256_of, write_json
from fastsae.model.files import SavedModuleError
from fastsae.runs.state_tree import join_state, split_state
from fastsae.warn import warn

MANIFEST = "manifest.json"
STATE = "state.json"
FORMAT = "fastsae-checkpoint"
VERSION = 1
_NAME = re.compile(r"step_(\d{8,})")
_UNFINISHED = ".unfinished-"
_log = logging.getLogger("fastsae")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, or that does not match its manifest."""


class UnreadableError(CheckpointError):
    """A checkpoint that may be complete, but cannot be read because of the disk or permissions."""


def checkpoint_path(root: Path, step: int) -> Path:
    """The path of a step's checkpoint."""
    return root / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step in a checkpoint's name. Raises CheckpointError for another name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint: expected a directory named step_ and eight digits")
    return int(match[1])


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoints under `root` by step, ascending; verified or not. Empty if `root` does not exist."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()), key=step_of)


@dataclass(frozen=True)
class Written:
    """A section of the state whose tensors are in their file already; tree: the rest of it, from `split_state`."""

    tree: Any


def write_checkpoint(
    root: Path, step: int, state: Mapping[str, Mapping[str, Any]], save_module: Callable[[Path], object]
) -> Path:
    """Writes checkpoints/step_XXXXXXXX and returns its path.

    state         sections (optimizer, source, ...) of nested dicts and lists of tensors, numbers, strings and None.
    save_module   writes the module's own files into the directory it is given.
    Raises CheckpointError if the disk is full or the directory cannot be written; it leaves no partial checkpoint and
    does not touch earlier ones.
    """
    with writing(root, step) as partial:
        save_module(partial)
        write_state(partial, step, state)
    return checkpoint_path(root, step)


def write_state(partial: Path, step: int, state: Mapping[str, Mapping[str, Any] | Written]) -> None:
    """Writes the sections of a training state into the directory of an unfinished checkpoint."""
    plain: dict[str, Any] = {}
    for section, tree in state.items():
        if isinstance(tree, Written):
            plain[section] = tree.tree
            continue
        plain[section], tensors = split_state(tree, section)
        if tensors:
            save_file(tensors, partial / f"{section}.safetensors")
    (partial / STATE).write_text(json.dumps({"step": step, **plain}, allow_nan=False), encoding="utf-8")


@contextmanager
def writing(root: Path, step: int) -> Iterator[Path]:
    """The directory in which the block writes a checkpoint's files; afterwards it has its name and manifest.

    Raises as `write_checkpoint`, whatever the block raises; nothing is left then.
    """
    final = checkpoint_path(root, step)
    partial = root / f"{_UNFINISHED}{final.name}"
    if final.exists():
        raise CheckpointError(f"{final} already exists; a checkpoint is never overwritten")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        _seal(partial, step)
        os.rename(partial, final)
        fsync_path(root)
        fsync_path(root.parent)
    except (OSError, SafetensorError, SavedModuleError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = list_checkpoints(root)
        last = f"the newest earlier checkpoint, {kept[-1]}, is intact" if kept else "there is no earlier checkpoint"
        raise CheckpointError(
            f"cannot write the checkpoint of step {step} to {root}: {error}; {last}. "
            "Make room (or fix the directory) and start the same run again to continue from there."
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _seal(directory: Path, step: int) -> None:
    """Fsyncs every file, then writes the manifest."""
    # safetensors makes its files readable by the owner only; give them the directory's mode, from the user's umask.
    mode = directory.stat().st_mode & 0o666
    files = {}
    for path in sorted(directory.iterdir()):
        path.chmod(mode)
        fsync_path(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(directory / MANIFEST, {"format": FORMAT, "version": VERSION, "step": step, "files": files})


def verify_checkpoint(path: Path, only: Collection[str] | None = None) -> None:
    """Raises CheckpointError naming the first file, of these or of all, that is missing, truncated or changed.

    Raises UnreadableError if a file exists but cannot be read; its content may still be right.
    """
    try:
        _verify(path, only)
    except OSError as error:
        raise UnreadableError(
            f"cannot read {error.filename or path} to verify it: {error.strerror or error}; it may be intact, so "
            "nothing was changed. Make it readable (permissions, disk) and start the same run again"
        ) from error


def _verify(path: Path, only: Collection[str] | None) -> None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or manifest["version"] != VERSION:
            raise CheckpointError(
                f"{path} has format {manifest['format']} {manifest['version']}, expected {FORMAT} {VERSION}"
            )
        step, files = manifest["step"], {name: (e["bytes"], e["sha256"]) for name, e in manifest["files"].items()}
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CheckpointError(f"{path} has no readable {MANIFEST}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} is damaged: {type(error).__name__} {error}") from error
    if step != step_of(path):
        raise CheckpointError(f"{path} holds step {step}: the directory was renamed")
    if STATE not in files:
        raise CheckpointError(f"{path / MANIFEST} is damaged: it does not list {STATE}")
    for name, (size, digest) in files.items():
        if only is not None and name not in only:
            continue
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} is truncated: {file.stat().st_size} bytes, expected {size}")
        if sha256_of(file) != digest:
            raise CheckpointError(f"{file} is corrupt: its sha256 is not the one in {MANIFEST}")


def read_state(path: Path, rows: Callable[[str], slice | None] = lambda name: None) -> dict[str, Any]:
    """The sections given to `write_checkpoint`, with "step" beside them. Tensors are on the CPU; tuples become lists.

    rows: which rows to read of a tensor, by its name, such as "optimizer.optimizer.state.W_dec.exp_avg"; None: all.
    Call `verify_checkpoint` first. Raises CheckpointError for a file that cannot be read.
    """
    try:
        plain = json.loads((path / STATE).read_text(encoding="utf-8"))
        state: dict[str, Any] = {"step": plain.pop("step")}
        for section, tree in plain.items():
            file = path / f"{section}.safetensors"
            tensors: dict[str, Tensor] = {}
            if file.exists():
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118
                        wanted = rows(name)
                        tensors[name] = opened.get_tensor(name) if wanted is None else opened.get_slice(name)[wanted]
            state[section] = join_state(tree, tensors)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {type(error).__name__} {error}") from error
    return state


def newest_valid(root: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, or None, and what is wrong with each newer one. Raises UnreadableError."""
    problems = []
    for path in reversed(list_checkpoints(root)):
        try:
            verify_checkpoint(path)
        except UnreadableError:
            raise
        except CheckpointError as error:
            problems.append(str(error))
            continue
        return path, problems
    return None, problems


def set_aside_newer(root: Path, step: int) -> list[Path]:
    """Renames every checkpoint after `step` to corrupt_step_..., so that training can write these steps again.

    Nothing is deleted, so that the user can inspect them. Returns the new paths.
    """
    moved = []
    for path in list_checkpoints(root):
        if step_of(path) > step:
            target, n = path.with_name(f"corrupt_{path.name}"), 1
            while target.exists():
                n += 1
                target = path.with_name(f"corrupt_{path.name}_{n}")
            os.rename(path, target)
            moved.append(target)
    if moved:
        fsync_path(root)
    return moved


def prune(root: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints. Only warns if one cannot be deleted."""
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    for path in list_checkpoints(root)[:-keep]:
        # Rename first: a kill during the deletion must not leave something that looks like a checkpoint.
        doomed = root / f"{_UNFINISHED}{path.name}"
        try:
            if doomed.exists():
                shutil.rmtree(doomed)
            os.rename(path, doomed)
            shutil.rmtree(doomed)
        except OSError as error:
            warn(
                f"cannot delete the old checkpoint {path}: {error}; training continues, and newer checkpoints are "
                "safe. It uses disk space until you delete it",
                RuntimeWarning,
            )


def remove_unfinished(root: Path) -> None:
    """Deletes partial checkpoints that a killed process left. Call it under the run's lock."""
    if root.is_dir():
        for path in root.glob(f"{_UNFINISHED}*"):
            _log.info("removing the unfinished checkpoint %s, left by a killed run", path)
            shutil.rmtree(path)
