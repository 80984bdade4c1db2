"""What has to be right before a backend is timed: what tensor cores lose, and a selection of the test suite."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from typing import Any

import torch
from torch import Tensor

from bench.gpu.plan import Job, NotThere, Settings
from bench.machine import ROOT
from fastsae.backends.gpu import accumulation
from fastsae.backends.gpu.product import fp32_sums

TESTS = ("tests/test_ops.py", "tests/test_update.py", "tests/test_kept_copy.py")
TOY_TESTS = ("tests/test_update.py",)
CASE = "odd or data"
"""Every op at odd sizes, and a narrow copy that was written behind; the whole suite is `make test`."""
STAGES = {"cuda": "fastsae.backends.cuda.stages", "triton": "fastsae.kernels.stages"}
WIDTHS = (1024, 4096)
TOKENS, REPEATED = 2048, 4
"""A product of (8192, D) and (D, 2048): a chunk of the screen's."""


class Checks:
    """The items of the jobs "check-<backend>" and "sanitizer-<backend>"."""

    def __init__(self, job: Job, settings: Settings) -> None:
        assert job.backend is not None
        self.backend, self.settings = job.backend, settings

    def __call__(self, item: str) -> dict[str, Any]:
        if item == "accumulation":
            return self.accumulation()
        return self.tests([] if item == "tests" else self.watching(item))

    def accumulation(self) -> dict[str, Any]:
        """Measures cuBLAS and the backend's own product, and keeps the larger constant for this kind of device."""
        device = torch.device(self.settings.device)
        stages: Any = importlib.import_module(STAGES[self.backend])
        tokens, widths = (16, WIDTHS[:1]) if self.settings.is_toy else (TOKENS, WIDTHS)
        count = torch.tensor(tokens, dtype=torch.int32, device=device)
        rows = torch.arange(tokens, dtype=torch.int32, device=device)

        def by_torch(x: Tensor, W: Tensor) -> Tensor:
            out = torch.empty(len(x) * REPEATED, len(W), dtype=torch.float16, device=device)
            with fp32_sums():
                torch.mm(x.repeat(REPEATED, 1), W.mT, out=out)
            return out[: len(x)]

        def by_stage(x: Tensor, W: Tensor) -> Tensor:
            out = torch.empty(len(x), len(W), dtype=torch.float16, device=device)
            with fp32_sums():
                stages.product(x, W, rows, count, out, 0, 1)
            return out

        found = {
            f"{name} D={D}": accumulation.measure(product, D, tokens, device)
            for name, product in (("torch", by_torch), (self.backend, by_stage)) for D in widths
        }  # fmt: skip
        constant = max(one["constant"] for one in found.values())
        before = accumulation.constant(device, torch.float16)
        result = {"constant": constant, "by": found, "summary": f"{constant:.3g}·D·2⁻²⁴, until now {before:.3g}"}
        if device.type == "cuda":
            # Both backends are measured in turn, and either may have lost more.
            accumulation.keep(device, max(constant, accumulation.measured().get(accumulation.kind(device), 0.0)))
        if constant > accumulation.UNMEASURED:
            unsound = f"unmeasured devices use {accumulation.UNMEASURED}, and this one loses {constant:.3g}"
            return result | {"status": "failed", "error": unsound}
        return result

    def tests(self, before: list[str]) -> dict[str, Any]:
        files = TOY_TESTS if self.settings.is_toy else TESTS
        options = ("-q", "-o", "addopts=", "-p", "no:cacheprovider", "--maxfail", "5", "-k")
        command = [*before, sys.executable, "-m", "pytest", *options, f"{self.backend} and ({CASE})", *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        said = (done.stdout + done.stderr).strip()
        counts = re.findall(r"\d+ passed.*|^=+ (?:ERROR|RACECHECK) SUMMARY: .*$", said, re.MULTILINE)
        if done.returncode == 0 and counts:
            return {"summary": counts[-1].strip("= ")}
        return {"status": "failed", "error": f"exit code {done.returncode}: {said[-3000:]}"}

    def watching(self, tool: str) -> list[str]:
        """What the same tests are started with. What racecheck says of bulk copies is a lead, no proof."""
        program = shutil.which("compute-sanitizer")
        if program is None or self.settings.device != "cuda":
            raise NotThere("compute-sanitizer or a CUDA device is not there: nothing was watched")
        # Without torch's cache every tensor is an allocation of its own, so reading past one is seen.
        return ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", program, "--tool", tool, "--error-exitcode", "9"]
