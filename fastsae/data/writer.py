"""Writes a folder of activations shard by shard; a kill, a full disk or a second writer loses no finished shard."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fastsae.atomic import LOCK, is_partial, lock_folder
from fastsae.data.files import write_atomically
from fastsae.data.manifest import DTYPES, HELD_OUT, MANIFEST, VOCABULARY, FileEntry, HookFiles, Manifest, differences
from fastsae.data.source import nonfinite_rows


class ShardWriter:
    """A context manager that opens (or creates) a folder of activations for one writer and appends shards to it.

    A shard is one safetensors file: `activations` (rows, d_in) and, where the rows come from text, `token_ids`
    (windows, window) int32, `window` (rows,) int32 and `position` (rows,) int32. Each shard is written,
    fsync'ed and renamed, then the manifest in the same way. A kill in between leaves a file that the manifest does not
    list; the next writer overwrites it.
    Several hooks have a file each, shard_00000.1.safetensors for the second one: a run reads and verifies those of its
    own hooks alone. One manifest lists the files of a shard together, so their rows line up after any kill.
    others: the further hooks, without files; rows then have d_in numbers followed by those of each other hook.
    Raises: ValueError if the folder was made with other settings (naming them) or is not a folder of activations;
    BlockingIOError if another process is writing to it.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        d_in: int,
        dtype: torch.dtype,
        settings: dict[str, Any],
        others: Sequence[HookFiles] = (),
    ):
        self.folder = Path(folder)
        self.dtype = dtype
        name = str(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise ValueError(f"activations are stored as one of {', '.join(DTYPES)}, got {name}")
        self._lock = _lock(self.folder)
        try:
            if (self.folder / MANIFEST).exists():
                self.manifest = Manifest.read(self.folder)
                check_settings(
                    self.folder,
                    {**settings, "d_in": d_in, "dtype": name, "others": _places(others)},
                    {
                        **self.manifest.settings, "d_in": self.manifest.d_in, "dtype": self.manifest.dtype,
                        "others": _places(self.manifest.others),
                    },
                )  # fmt: skip
                for entry in self.manifest.entries():
                    entry.check_size(self.folder)
            else:
                _refuse_strangers(self.folder)
                self.manifest = Manifest(d_in=d_in, dtype=name, settings=settings, others=list(others))
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)  # closing releases the lock, as the end of the process does

    def append(self, activations: Tensor, context: dict[str, Tensor] | None = None) -> None:
        """Write one training shard; the manifest lists it when this returns. `context`: the text tensors, see above."""
        name = f"shard_{len(self.manifest.shards):05d}.safetensors"
        first, *others = self._write_rows(name, activations, context)
        self.manifest.shards.append(first)
        for one, entry in zip(self.manifest.others, others, strict=True):
            one.shards.append(entry)
        self.manifest.write(self.folder)

    def write_held_out(self, activations: Tensor, context: dict[str, Tensor] | None = None) -> None:
        """Write the rows that are never trained on."""
        self.manifest.held_out, *others = self._write_rows(HELD_OUT, activations, context)
        for one, entry in zip(self.manifest.others, others, strict=True):
            one.held_out = entry
        self.manifest.write(self.folder)

    def write_vocabulary(self, data: bytes) -> None:
        """Write the JSON list of token strings, so that contexts can be shown without the model."""
        sha256 = write_atomically(self.folder / VOCABULARY, data)
        self.manifest.vocabulary = FileEntry(VOCABULARY, 0, len(data), sha256)
        self.manifest.write(self.folder)

    def _write_rows(self, name: str, activations: Tensor, context: dict[str, Tensor] | None) -> list[FileEntry]:
        """A file for each hook."""
        widths = [self.manifest.d_in, *(one.d_in for one in self.manifest.others)]
        if activations.ndim != 2 or activations.shape[1] != sum(widths):
            raise ValueError(f"expected activations (rows, {sum(widths)}), got {tuple(activations.shape)}")
        stem, kind = name.split(".")
        names = [name, *(f"{stem}.{number}.{kind}" for number in range(1, len(widths)))]
        columns = zip(names, activations.split(widths, dim=1), strict=True)
        return [self._write_file(file, column, context) for file, column in columns]

    def _write_file(self, name: str, activations: Tensor, context: dict[str, Tensor] | None) -> FileEntry:
        stored = activations.to("cpu", self.dtype).contiguous()
        bad = nonfinite_rows(stored)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            largest = float(activations[row].abs().max())
            raise ValueError(
                f"{int(bad.sum()):,} rows of {name} are NaN or infinite in {self.manifest.dtype} (first row {row}, "
                f"largest value {largest:g} before the cast); store a wider dtype or drop these rows"
            )
        data = save({"activations": stored, **(context or {})}, metadata={"format": "pt"})
        sha256 = write_atomically(self.folder / name, data)
        return FileEntry(name, len(stored), len(data), sha256)


def save_rows(
    folder: str | os.PathLike,
    x: Tensor,
    *,
    holdout: int = 2048,
    rows_per_shard: int = 65_536,
    settings: dict[str, Any] | None = None,
) -> None:
    """Store x (rows, d_in) as a folder of activations, the last `holdout` rows as the held-out ones.

    Use it for activations from elsewhere. Raises: ValueError if the folder already holds rows.
    """
    if not 0 <= holdout < len(x):
        raise ValueError(f"holdout must be 0 or more and leave rows to train on: got {holdout} of {len(x)} rows")
    with ShardWriter(folder, x.shape[1], x.dtype, settings or {}) as writer:
        if writer.manifest.shards:
            raise ValueError(f"{folder} already holds {writer.manifest.rows:,} rows; give a new folder")
        train = x[: len(x) - holdout]
        for rows in train.split(rows_per_shard):
            writer.append(rows)
        if holdout:
            writer.write_held_out(x[len(train) :])
        writer.manifest.complete = True
        writer.manifest.write(writer.folder)


def check_settings(folder: Path, wanted: dict[str, Any], made: dict[str, Any]) -> None:
    """Raise ValueError, naming every difference, if a folder was made with other settings than `wanted`."""
    found = differences(wanted, made)
    if found:
        raise ValueError(
            f"{folder} was made with different settings: {'; '.join(found)}. Use those settings, another folder, "
            "or remove this one"
        )


def _lock(folder: Path) -> int:
    try:
        return lock_folder(folder)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno, f"another process ({error.strerror}) is writing to {folder}; wait for it or stop it"
        ) from None


def _places(others: Sequence[HookFiles]) -> list[str]:
    """Which further hooks, in words."""
    return [f"{one.hook} at {one.name} of width {one.d_in}" for one in others]


def _refuse_strangers(folder: Path) -> None:
    """A folder without a manifest must be empty, or hold only what an unfinished first shard may have left."""
    known, files = {LOCK, VOCABULARY}, re.compile(r"(held_out|shard_00000)(\.\d+)?\.safetensors")
    strange = sorted(
        p.name for p in folder.iterdir() if p.name not in known and not files.fullmatch(p.name) and not is_partial(p)
    )
    if strange:
        raise ValueError(
            f"{folder} is not empty and holds no activations (it has {strange[0]!r}); give a new or an empty folder"
        )
