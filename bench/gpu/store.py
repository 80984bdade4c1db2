"""results.json, rewritten after every item; which of its results still hold; and the archive of the whole folder."""

from __future__ import annotations

import hashlib
import json
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu.plan import CASES, Job
from bench.machine import ROOT
from fastsae.atomic import replace_file

FORMAT = 2
OURS = ("fastsae", "csrc")
SUFFIXES = (".py", ".cpp", ".cu", ".h")
FOUND_WRONG = ("failed", "error", "died", "timeout")
"""Statuses that need a look. oom, unserved and missing are answers too."""


def fingerprint(*paths: str) -> str:
    """12 hex digits over these files, and over the sources in these folders, committed or not."""
    digest = hashlib.sha256()
    for path in paths:
        whole = ROOT / path
        for file in [whole] if whole.is_file() else sorted(whole.rglob("*")):
            if file.suffix in SUFFIXES:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


class Store:
    """The folder of one device's results. machine: as machine.describe gave it."""

    def __init__(self, out: Path, machine: dict[str, Any], archive: Path | None = None) -> None:
        self.out, self.machine, self.archive = out, machine, archive
        (out / "logs").mkdir(parents=True, exist_ok=True)
        if archive is not None and archive.exists():
            unpack(archive, out)
        self.content: dict[str, dict[str, Any]] = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        path = self.out / "results.json"
        held = json.loads(path.read_text()) if path.exists() else {}
        return held["items"] if held.get("format") == FORMAT else {}

    def key(self, job: Job) -> dict[str, Any]:
        """What a stored result must agree in to be used again: ours depend on our sources, others on their own file."""
        about = {name: self.machine.get(name) for name in ("device", "torch", "size")} | {"case": self.case(job)}
        if job.file is None:
            return about | {"triton": self.machine.get("triton"), "source": fingerprint(*OURS)}
        return about | {"source": fingerprint(job.file)}

    def case(self, job: Job) -> dict[str, Any] | None:
        return asdict(CASES[self.machine["size"]][job.case]) if job.case else None

    def get(self, job: Job, item: str) -> dict[str, Any] | None:
        """The result of an item, from this run or an earlier one of the same key."""
        entry = self.content.get(f"{job.name}/{item}")
        return entry["result"] if entry is not None and entry["key"] == self.key(job) else None

    def put(self, job: Job, item: str, result: dict[str, Any]) -> None:
        self.content[f"{job.name}/{item}"] = {
            "job": job.name, "item": item, "backend": job.backend, "key": self.key(job), "case": self.case(job),
            "commit": self.machine["commit"], "result": result,
        }  # fmt: skip
        text = json.dumps({"format": FORMAT, "machine": self.machine, "items": self.content}, indent=1, allow_nan=False)
        replace_file(self.out / "results.json", lambda partial: partial.write_text(text + "\n"))

    def pack(self) -> None:
        """The folder as one file, whatever it holds."""
        if self.archive is not None:
            self.archive.parent.mkdir(parents=True, exist_ok=True)
            replace_file(self.archive, self._pack)

    def _pack(self, partial: Path) -> None:
        assert self.archive is not None
        with tarfile.open(partial, "w:gz") as tar:
            for path in sorted(self.out.rglob("*")):
                if path.is_file() and path.resolve() != self.archive.resolve() and path.suffix != ".partial":
                    tar.add(path, path.relative_to(self.out))


def unpack(archive: Path, out: Path) -> None:
    """Raises ValueError for a file that is no archive."""
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(out, filter="data")
    except tarfile.TarError as error:
        raise ValueError(f"{archive} cannot be unpacked: {error}") from error
