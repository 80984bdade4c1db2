"""The device's best rates, measured with torch: copied bytes, and products in 16 and 32 bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from bench.dense import fp32_products
from bench.gpu.clock import measure
from bench.gpu.plan import Job, Settings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Ceilings:
    """The items of the job "ceilings": {"rate": per second, "ms", "p20", "p80", "runs"}; the rate is of the p20."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self.device, self.toy = settings.device, settings.is_toy
        self.encoder = settings.cases["small"]

    def __call__(self, item: str) -> dict[str, Any]:
        seconds = 0.02 if self.toy else 0.5
        if item == "copy":
            n = 2**20 if self.toy else 2**30  # 4 GB a tensor on a GPU, if it has them
            if self.device == "cuda":
                n = min(n, torch.cuda.mem_get_info()[0] // 16)
            source, target = (torch.ones(n, device=self.device) for _ in range(2))
            sample = measure(partial(target.copy_, source), self.device, seconds)
            return {"rate": 2 * 4 * n / sample.p20, "what": f"copy of {4 * n / 1e9:.2f} GB"} | sample.in_ms()
        kind, shape = item.split()
        square = 128 if self.toy else 8192
        N, D, M = (square,) * 3 if shape == "8192" else (self.encoder.N, self.encoder.D, self.encoder.M)
        left, right = (torch.randn(rows, D, device=self.device).to(DTYPES[kind]) for rows in (N, M))
        out = torch.empty(N, M, dtype=DTYPES[kind], device=self.device)
        with fp32_products("highest"):
            sample = measure(partial(torch.mm, left, right.T, out=out), self.device, seconds)
        return {"rate": 2 * N * D * M / sample.p20, "what": f"({N}, {D}) x ({D}, {M}) in {kind}"} | sample.in_ms()
