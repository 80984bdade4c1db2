"""A child process seen from the parent: started, followed by what it writes, and ended with all that it started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.gpu.plan import Job, Settings
from bench.machine import ROOT


class Child:
    """One process of a job, its items and where it is among them."""

    def __init__(self, job: Job, settings: Settings, items: Sequence[str], log: Path) -> None:
        folder = tempfile.TemporaryDirectory(prefix="bench-gpu-")
        self.folder, self.job, self.items, self.log = folder, job, tuple(items), log
        self.has_begun = False
        self.progress = Path(folder.name) / "progress.jsonl"
        self.progress.touch()
        self.read = 0
        spec = {
            "job": asdict(job), "settings": asdict(settings), "items": list(items), "progress": str(self.progress),
        }  # fmt: skip
        command = [sys.executable, "-m", "bench.gpu.child", json.dumps(spec)]
        if job.kind in ("check", "quick check"):
            # What torch's own products need to be deterministic, which the checks ask for.
            command = ["env", "CUBLAS_WORKSPACE_CONFIG=:4096:8", *command]
        self.output = open(log, "ab")  # noqa: SIM115 - closed with the process
        self.log_start = self.output.tell()
        # A session of its own, so that what it starts (compilers, the sanitizer) ends with it.
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=self.output, stderr=self.output, start_new_session=True
        )

    def news(self) -> list[dict[str, Any]]:
        """The lines written since the last call."""
        with open(self.progress, "rb") as file:
            file.seek(self.read)
            text = file.read()
        whole, newline, _ = text.rpartition(b"\n")
        self.read += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]

    def tail(self) -> str:
        """The end of what this process printed."""
        with open(self.log, "rb") as file:
            file.seek(self.log_start)
            return file.read()[-1500:].decode(errors="replace").strip()

    def end(self) -> None:
        """Kills it with everything that it started, if it still runs, and waits."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may keep a killed process for a while
            self.process.wait(timeout=10)
        self.output.close()
        self.folder.cleanup()
