"""A run's directory: one process at a time, and one set of settings for the whole run."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsae.atomic import lock_folder, write_json

CONFIG = "config.json"


class RunDirError(RuntimeError):
    """A run directory that is in use, holds a run with other settings, or cannot be written."""


class RunLock:
    """Holds run_dir/LOCK while training; use as a context manager."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._fd = -1

    def __enter__(self) -> RunLock:
        """Raises RunDirError naming the directory and the process that holds it."""
        try:
            self._fd = lock_folder(self._run_dir)
        except BlockingIOError as error:
            raise RunDirError(
                f"the run directory {self._run_dir} is in use by {error.strerror}; "
                "wait for it, stop it, or give another directory"
            ) from None
        except OSError as error:
            raise RunDirError(f"cannot use the run directory {self._run_dir}: {error.strerror}") from error
        return self

    def __exit__(self, *exc: object) -> None:
        # Keep the file: deleting it would let a third process lock a new file while a second waits on the old one.
        os.close(self._fd)
        self._fd = -1


def claim(
    run_dir: Path, config: Mapping[str, Any], free: Collection[str], why: Mapping[str, str] | None = None
) -> None:
    """Writes config.json into a new run directory, or compares it with the existing one.

    If the run has saved nothing yet, its settings are overwritten.

    config  JSON-able sections of settings.
    free    dotted names that may change from one start to the next, such as "train.log_every"; they are updated.
    why     what would allow a setting to change, by dotted name; the error says it if that setting differs.
    Raises RunDirError naming every other setting that differs, or a config.json that cannot be read.
    """
    path = run_dir / CONFIG
    wanted = json.loads(json.dumps(config))  # as read back: tuples become lists
    if not path.exists():
        held = [name for name in ("checkpoints", "metrics.jsonl") if (run_dir / name).exists()]
        if held:
            raise RunDirError(f"{run_dir} holds {' and '.join(held)} but no {CONFIG}; give another directory")
        _write_config(path, wanted)
        return
    if not _has_begun(run_dir):
        _write_config(path, wanted)
        return
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirError(f"cannot read {path}: {error}; restore it or give another directory") from error
    if not isinstance(saved, dict):
        raise RunDirError(f"{path} holds a {type(saved).__name__}, expected a JSON object; give another directory")
    if found := differences(saved, wanted, free):
        reasons = [reason for name, reason in (why or {}).items() if any(one.startswith(f"{name} ") for one in found)]
        raise other_settings(run_dir, found, list(dict.fromkeys(reasons)))
    if saved != wanted:
        _write_config(path, wanted)


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], free: Collection[str] = ()) -> list[str]:
    """Every setting that differs between two JSON-able trees, `free` ones apart, each as one clause."""
    old, new = _flat(saved), _flat(json.loads(json.dumps(wanted)))
    missing = "(not set)"
    # An older fastsae did not have a setting that is None now.
    return [
        f"{name} is {json.dumps(old.get(name, missing))} there and {json.dumps(new.get(name, missing))} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and not _covered(name, free)
    ]


def other_settings(run_dir: Path, found: Sequence[str], reasons: Sequence[str] = ()) -> RunDirError:
    """The error for a directory whose run has other settings, from `differences`; reasons: why they may not change."""
    return RunDirError(
        f"{run_dir} holds a run with other settings: {'; '.join(found)}. "
        "Give these settings to continue it, or another directory" + "".join(f". {reason}" for reason in reasons)
    )


def _has_begun(run_dir: Path) -> bool:
    """Whether anything was saved: a start that failed before its first step must not fix the settings."""
    kept = [run_dir / "checkpoints", run_dir / "metrics.jsonl"]
    return any(p.exists() and (any(p.iterdir()) if p.is_dir() else p.stat().st_size > 0) for p in kept)


def _write_config(path: Path, config: Mapping[str, Any]) -> None:
    try:
        write_json(path, config)
    except OSError as error:
        raise RunDirError(f"cannot write {path}: {error.strerror}; make room or give another directory") from error


def _covered(name: str, free: Collection[str]) -> bool:
    return any(name == f or name.startswith(f + ".") for f in free)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
