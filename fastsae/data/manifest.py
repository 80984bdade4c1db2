"""The manifest of a folder of activations: what is in it, how it was made, and the checksum of every file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsae.atomic import sha256_of
from fastsae.data.files import ShardError, write_atomically
from fastsae.data.stream import EARLIER

FORMAT = "fastsae-activations"
VERSION = 1
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.json"
HELD_OUT = "held_out.safetensors"
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file of the folder: its name (no folder part), rows (0 if it has none), bytes and sha256."""

    file: str
    rows: int
    bytes: int
    sha256: str

    def check_size(self, folder: Path) -> None:
        """Raise ShardError if the file is missing or its length differs from the manifest's."""
        path = folder / self.file
        if not path.is_file():
            raise ShardError(f"{path} is missing, {MANIFEST} lists it; restore the file or harvest again")
        size = path.stat().st_size
        if size != self.bytes:
            raise ShardError(
                f"{path} is {'truncated' if size < self.bytes else 'too long'}: expected {self.bytes:,} bytes, "
                f"got {size:,}; restore the file or harvest again"
            )

    def check_content(self, folder: Path) -> None:
        """Raise ShardError if the file's sha256 is not the manifest's."""
        self.check_size(folder)
        got = sha256_of(folder / self.file)
        if got != self.sha256:
            raise ShardError(
                f"{folder / self.file} is damaged: expected sha256 {self.sha256}, got {got}; "
                "restore the file or harvest again"
            )


@dataclasses.dataclass
class Manifest:
    """The content of manifest.json. A harvest may continue only with equal `settings`; `provenance` is a record."""

    d_in: int
    dtype: str
    settings: dict[str, Any]
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    shards: list[FileEntry] = dataclasses.field(default_factory=list)
    held_out: FileEntry | None = None
    vocabulary: FileEntry | None = None
    position: dict[str, Any] | None = None  # the stream's position after the last shard
    stats: dict[str, Any] = dataclasses.field(default_factory=dict)
    complete: bool = False  # all requested rows are stored, or the text has ended
    text_ended: bool = False

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.shards)

    def entries(self) -> list[FileEntry]:
        """Every file that the manifest lists."""
        return [*self.shards, *(entry for entry in (self.held_out, self.vocabulary) if entry is not None)]

    def write(self, folder: Path) -> None:
        text = json.dumps({"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}, indent=1)
        write_atomically(folder / MANIFEST, text.encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises ShardError if there is no manifest, or one that this version cannot read."""
        path = folder / MANIFEST
        if not path.is_file():
            raise ShardError(f"{folder} holds no activations (no {MANIFEST}); make them with: fastsae harvest")
        try:
            content = json.loads(path.read_bytes())
            if content.pop("format") != FORMAT:
                raise ShardError(f"{path} is not a manifest of activations: expected format {FORMAT!r}")
            version = content.pop("version")
            if version != VERSION:
                raise ShardError(f"{path} has format version {version}, this program reads {VERSION}")
            content["shards"] = [_entry(entry) for entry in content["shards"]]
            for name in ("held_out", "vocabulary"):
                content[name] = None if content[name] is None else _entry(content[name])
            manifest = cls(**content)
            if "stream" in manifest.settings:
                manifest.settings["stream"] = {**EARLIER, **manifest.settings["stream"]}
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path} is damaged ({error}); restore it or harvest again") from error
        if manifest.dtype not in DTYPES or not isinstance(manifest.d_in, int) or manifest.d_in < 1:
            raise ShardError(f"{path} is damaged: dtype {manifest.dtype!r} of width {manifest.d_in!r}")
        return manifest


def _entry(content: dict[str, Any]) -> FileEntry:
    entry = FileEntry(**content)
    # A manifest may come from another program: it must not lead to a read outside its folder.
    if Path(entry.file).name != entry.file:
        raise ShardError(f"the manifest lists {entry.file!r}: expected the name of a file in its own folder")
    return entry


def differences(expected: Mapping[str, Any], got: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Sentences naming every setting that differs, nested ones by dotted names; empty if all are equal."""
    found = []
    for name in sorted({*expected, *got}):
        here, there = expected.get(name), got.get(name)
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            found += differences(here, there, f"{prefix}{name}.")
        elif here != there:
            found.append(f"{prefix}{name} is {there!r}, asked for {here!r}")
    return found
