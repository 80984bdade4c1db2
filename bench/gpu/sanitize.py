"""compute-sanitizer over every op: `python -m bench.gpu.sanitize OPTIONS` is the script that it watches."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import Any

import torch

from bench.gpu import check_codes, check_steps, check_update
from bench.gpu.plan import Job, Settings
from bench.gpu.truth import Hard
from bench.machine import ROOT

CASES = (Hard("odd", 37, 65, 259, 5), Hard("hot latent", 96, 40, 515, 8))
ERROR_CODE = 9  # what the tool exits with where it has found something
TOOL = "compute-sanitizer"


class Sanitizer:
    """The items of the job "sanitizer": memcheck and racecheck."""

    def __init__(self, job: Job, settings: Settings) -> None:
        assert job.backend is not None
        self.job, self.settings = job, settings

    def __call__(self, item: str) -> dict[str, Any]:
        tool = shutil.which(TOOL)
        if tool is None:
            return {"status": "missing", "error": f"{TOOL} is not on PATH: nothing was watched"}
        if self.settings.device != "cuda":
            return {"status": "missing", "error": "there are no CUDA kernels to watch on this device"}
        script = [sys.executable, "-m", "bench.gpu.sanitize", self.settings.device, self.job.backend or ""]
        # Without torch's cache every tensor is an allocation of its own, so reading past one is seen.
        command = [
            "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", tool, "--tool", item, "--error-exitcode", str(ERROR_CODE),
            "--print-limit", "20", *script,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        output = (done.stdout + done.stderr).strip()
        summary = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: .*$", output, re.MULTILINE)
        found: dict[str, Any] = {"summary": summary[-1].lstrip("= ") if summary else "the tool gave no summary"}
        if done.returncode == 0 and summary:
            return found
        status = "failed" if done.returncode == ERROR_CODE else "error"
        return found | {
            "status": status,
            "error": f"exit code {done.returncode}: {output[-1500:]}",
            "output": output[:6000],
        }


def main(device: str, backend: str) -> None:
    """Every op on small odd cases, then two fused steps: nothing is compared here."""
    for case in CASES:
        for dtype in (torch.float32, torch.bfloat16):
            check_codes.everything(case, dtype, device, backend)
            check_update.outputs(case, dtype, device, backend)
    check_steps.run(False, device, backend, graph=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
