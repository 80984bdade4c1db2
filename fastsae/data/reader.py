"""Reading one file of activations: memory-mapped, its checksum verified, its tensors checked against the manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastsae.data.files import ShardError
from fastsae.data.manifest import FileEntry

Verify = Literal["lazy", "eager", "size"]


@dataclasses.dataclass(frozen=True)
class ShardContext:
    """The text of one file: row r is token `position[r]` of the window `token_ids[window[r]]`."""

    token_ids: Tensor  # (windows, window) int32; PAD at the end of windows that were not full
    window: Tensor  # (rows,) int32, ascending
    position: Tensor  # (rows,) int32, ascending within a window


class ShardReader:
    """One safetensors file of a folder, opened at first use and never read into memory as a whole."""

    def __init__(self, folder: Path, entry: FileEntry, d_in: int, dtype: str, verify: Verify):
        self.path = folder / entry.file
        self.rows = entry.rows
        self._folder = folder
        self._entry = entry
        self._shape = (entry.rows, d_in)
        self._dtype = getattr(torch, dtype)
        self._verify = verify
        self._activations: Tensor | None = None
        entry.check_size(folder)

    def verify(self) -> None:
        """Compare the file's sha256 with the manifest's. Raises ShardError."""
        self._entry.check_content(self._folder)
        self._verify = "size"  # verify once only

    @property
    def activations(self) -> Tensor:
        """(rows, d_in) in the stored dtype, a view of the mapped file: never write to it.

        Raises: ShardError if the file does not match the manifest.
        """
        if self._activations is None:
            if self._verify == "lazy":
                self.verify()
            tensor = self._tensors("activations")[0]
            if tuple(tensor.shape) != self._shape or tensor.dtype != self._dtype:
                raise ShardError(
                    f"{self.path} holds activations {tensor.dtype} {tuple(tensor.shape)}, "
                    f"but the manifest says {self._dtype} {self._shape}"
                )
            self._activations = tensor
        return self._activations

    def context(self) -> ShardContext:
        """The text of the rows. Raises ValueError if they were stored without it."""
        rows = len(self.activations)  # verifies the file
        context = ShardContext(*self._tensors("token_ids", "window", "position"))
        if len(context.window) != rows or len(context.position) != rows:
            raise ShardError(f"{self.path} stores text positions of {len(context.window)} rows but holds {rows} rows")
        return context

    def _tensors(self, *names: str) -> list[Tensor]:
        try:
            with safe_open(self.path, framework="pt") as file:
                missing = set(names) - set(file.keys())
                if "activations" in missing:
                    raise ShardError(f"{self.path} holds no tensor 'activations', only {sorted(file.keys())}")
                if missing:
                    raise ValueError(f"{self.path} was stored without the text of its rows: no {sorted(missing)}")
                return [file.get_tensor(name) for name in names]
        except SafetensorError as error:
            raise ShardError(f"{self.path} is not a readable safetensors file ({error})") from error
