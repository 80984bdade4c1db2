"""The manifest of a folder of activations: what is in it, how it was made, and the checksum of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsae.atomic import sha256_of
from fastsae.data.files import ShardError, write_atomically
from fastsae.data.stream import EARLIER

FORMAT = "fastsae-activations"
VERSION = 2
"""Version 1 had no checksum of the manifest itself, whose position a harvest continues from."""
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
            raise ShardError(f"{path} is missing, but {MANIFEST} lists it; restore the file or harvest again")
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
class HookFiles:
    """One hook of a folder: its name as given, the module's name, and the files, shard by shard."""

    hook: int | str | None
    """None if the rows were not read from a model by fastsae."""
    name: str
    d_in: int
    shards: list[FileEntry] = dataclasses.field(default_factory=list)
    held_out: FileEntry | None = None
    norm_median: float | None = None
    """The median norm that the norm filter multiplies."""


@dataclasses.dataclass
class Manifest:
    """The content of manifest.json. A harvest may continue only with equal `settings`; `provenance` is a record.

    The first hook's rows use the fields that existed when there was only one hook; `others` are further hooks, whose
    files have the same rows in the same order.
    """

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
    others: list[HookFiles] = dataclasses.field(default_factory=list)

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.shards)

    def entries(self) -> list[FileEntry]:
        """Every file that the manifest lists."""
        held = [self.held_out, self.vocabulary, *(one.held_out for one in self.others)]
        return [
            *self.shards, *(entry for one in self.others for entry in one.shards),
            *(entry for entry in held if entry is not None),
        ]  # fmt: skip

    def hooks(self) -> list[HookFiles]:
        """What is stored for every hook, the first one first."""
        asked = (self.settings.get("stream") or {}).get("hook")
        first = asked[0] if isinstance(asked, list | tuple) else asked
        name, median = str(self.provenance.get("layer") or "rows"), self.stats.get("norm_median")
        return [HookFiles(first, name, self.d_in, self.shards, self.held_out, median), *self.others]

    def of_hook(self, hook: int | str | None, folder: Path) -> HookFiles:
        """What is stored for a hook, by its name as given or by the module's name; None: for the only one.

        Raises ValueError, naming the stored hooks, for another one, or for None if there are several.
        """
        stored = self.hooks()
        if hook is None and len(stored) == 1:
            return stored[0]
        for one in stored:
            if hook is not None and (str(one.hook) == str(hook) or one.name == hook):
                return one
        there = ", ".join(str(one.hook) if one.hook is not None else one.name for one in stored)
        if hook is None:
            raise ValueError(f"{folder} holds rows of {len(stored)} hooks: {there}; choose one or more with hook")
        raise ValueError(f"{folder} holds no rows of the hook {hook!r}, only of {there}")

    def write(self, folder: Path) -> None:
        content = dataclasses.asdict(self)
        if not self.others:
            del content["others"]  # the format from before there were several hooks, which older versions read
        named = {"format": FORMAT, "version": VERSION, "sha256": _digest(content), **content}
        write_atomically(folder / MANIFEST, json.dumps(named, indent=1).encode())

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
            if version not in (1, VERSION):
                raise ShardError(f"{path} has format version {version}, expected {VERSION}; use the matching fastsae")
            if version > 1 and content.pop("sha256") != _digest(content):
                raise ShardError(f"{path} is damaged: its sha256 does not match; restore it or harvest again")
            content["shards"] = [_entry(entry) for entry in content["shards"]]
            for name in ("held_out", "vocabulary"):
                content[name] = None if content[name] is None else _entry(content[name])
            content["others"] = [_hook_files(one) for one in content.get("others", [])]
            manifest = cls(**content)
            if "stream" in manifest.settings:
                manifest.settings["stream"] = {**EARLIER, **manifest.settings["stream"]}
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{path} is damaged ({error}); restore it or harvest again") from error
        if manifest.dtype not in DTYPES or not isinstance(manifest.d_in, int) or manifest.d_in < 1:
            raise ShardError(f"{path} is damaged: dtype {manifest.dtype!r} of width {manifest.d_in!r}")
        rows, held = [entry.rows for entry in manifest.shards], manifest.held_out and manifest.held_out.rows
        for one in manifest.others:
            theirs = ([entry.rows for entry in one.shards], one.held_out and one.held_out.rows)
            if theirs != (rows, held) or not isinstance(one.d_in, int) or one.d_in < 1:
                raise ShardError(f"{path} is damaged: the hook {one.hook} has different rows than the first one")
        return manifest


def _digest(content: Mapping[str, Any]) -> str:
    as_read = json.loads(json.dumps(content))  # tuples are lists there, and every key is text
    return hashlib.sha256(json.dumps(as_read, sort_keys=True).encode()).hexdigest()


def _hook_files(content: dict[str, Any]) -> HookFiles:
    held = content["held_out"]
    files = {
        "shards": [_entry(entry) for entry in content["shards"]],
        "held_out": None if held is None else _entry(held),
    }
    return HookFiles(**{**content, **files})


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
