"""Result files: <out>/<job>.json, rewritten after every item; and which of them are of this run."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu.plan import Job
from fastsae.atomic import replace_file

FORMAT = 1
KEY = ("device", "source", "torch", "triton", "size", "plant")
"""What results must agree in to be of one run: the device, the sources measured (committed or not), the versions."""
FOUND_WRONG = ("failed", "error", "died", "timeout")
"""Statuses that need a look. oom, unserved and missing are answers too."""


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    replace_file(path, lambda partial: partial.write_text(text))


class Store:
    """The folder of one device's results. machine: as setup_machine.describe gave it."""

    def __init__(self, out: Path, machine: dict[str, Any]) -> None:
        self.out, self.machine = out, machine
        self.key = {name: machine.get(name) for name in KEY}
        out.mkdir(parents=True, exist_ok=True)

    @classmethod
    def found(cls, out: Path) -> Store:
        """The store that was left in a folder. Raises FileNotFoundError where there is none."""
        path = out / "machine.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: no run has written results there yet")
        return cls(out, json.loads(path.read_text())["machine"])

    def begin(self) -> None:
        write_json(self.out / "machine.json", {"format": FORMAT, "key": self.key, "machine": self.machine})

    def path(self, name: str) -> Path:
        return self.out / f"{name}.json"

    def _read(self, path: Path) -> dict[str, Any] | None:
        """A job's file, or None for one of another run."""
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
        except json.JSONDecodeError:
            return None  # never half-written by us; done again
        return content if content.get("format") == FORMAT and content.get("key") == self.key else None

    def items(self, job: Job) -> dict[str, Any]:
        """The results of this job's items so far, from this run or an earlier one of the same key."""
        content = self._read(self.path(job.name))
        return content["items"] if content is not None and content["job"] == job.identity() else {}

    def put(self, job: Job, item: str, result: dict[str, Any], case: Any = None) -> None:
        items = self.items(job) | {item: result}
        content = {"format": FORMAT, "key": self.key, "job": job.identity(), "case": asdict(case) if case else None}
        write_json(self.path(job.name), content | {"commit": self.machine["commit"], "items": items})

    def everything(self) -> dict[str, dict[str, Any]]:
        """{job name: its file} of this run."""
        read = {path.stem: self._read(path) for path in sorted(self.out.glob("*.json")) if path.stem != "machine"}
        return {name: content for name, content in read.items() if content is not None and "items" in content}
