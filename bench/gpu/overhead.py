"""What a call costs the host: the time of the Python call alone, at a size where the device has next to nothing to do.

BATCH calls in a row, each timed, then a wait outside the timing, so that the queue of launches never fills and no call
waits for the device. On a CPU the same call computes as well, so there the figures mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

import fastsae
from bench.cases import Case
from bench.gpu import layouts
from bench.gpu.check_update import make
from bench.gpu.clock import WARMUP, synchronize
from bench.gpu.plan import Job, Settings
from bench.gpu.sparse import transposed
from bench.gpu.truth import Hard
from bench.timing import Sample
from fastsae import ops
from fastsae.backends import choose

TINY = Case("tiny", N=16, D=64, M=256, K=4)
BATCH = 8
"""A fused step is some sixty launches, and a queue holds a thousand."""
CALLS, TOY_CALLS = 400, 16


def host_time(call: Callable[[], object], device: str, calls: int) -> Sample:
    for _ in range(WARMUP):
        call()
    spans: list[float] = []
    while len(spans) < calls:
        synchronize(device)
        for _ in range(BATCH):
            start = time.perf_counter()
            call()
            spans.append(time.perf_counter() - start)
    synchronize(device)
    return Sample.of(spans)


class Overhead:
    """The items of a job "overhead-<backend>", and of "overhead-torch", which is torch.sparse and a dense product."""

    def __init__(self, job: Job, settings: Settings) -> None:
        self.device, self.backend = settings.device, job.backend
        self.calls = TOY_CALLS if settings.is_toy else CALLS
        generator = torch.Generator(self.device).manual_seed(0)
        self.x, self.W = (torch.randn(n, TINY.D, generator=generator, device=self.device) for n in (TINY.N, TINY.M))
        self.codes = layouts.make("fixed", TINY, self.device)

    def __call__(self, item: str) -> dict[str, Any]:
        call = self.of_torch(item) if self.backend is None else self.of_backend(item, self.backend)
        return {"host": host_time(call, self.device, self.calls).in_ms()}

    def of_torch(self, item: str) -> Callable[[], object]:
        x, W, A = self.x, self.W, self.codes.to_torch_sparse_csr()
        match item:
            case "decode":
                return lambda: torch.sparse.mm(A, W)
            case "active_dot":
                return lambda: torch.sparse.sampled_addmm(A, x, W.mT, beta=0.0)
            case "active_outer":
                At = transposed(A)
                return lambda: torch.sparse.mm(At, x)
            case "torch.mm":
                return lambda: torch.mm(x, W.mT)
        raise LookupError(f"{item} is no item of this job")

    def of_backend(self, item: str, backend: str) -> Callable[[], object]:
        x, W, codes = self.x, self.W, self.codes
        match item:
            case "decode":
                return lambda: ops.decode(codes, W, backend=backend)
            case "decode bare":  # the backend's own function, without what fastsae.ops and torch.library add
                module = choose("decode", backend, codes.acts, codes.indices, W)
                return lambda: module.decode(codes.acts, codes.indices, None, W)
            case "active_dot":
                return lambda: ops.active_dot(x, codes, W, backend=backend)
            case "active_outer":
                order = ops.by_latent(codes, backend=backend)
                return lambda: ops.active_outer(codes, x, TINY.M, by_latent=order, backend=backend)
            case "by_latent":
                return lambda: ops.by_latent(codes, backend=backend)
            case "encode_topk":
                b = torch.zeros(TINY.M, device=self.device)
                return lambda: ops.encode_topk(x, W, b, TINY.K, backend=backend)
            case "update_latents_":
                problem = make(Hard("tiny", TINY.N, TINY.D, TINY.M, TINY.K), torch.float32).to(self.device)
                return lambda: problem.run(backend)
            case "fused step":
                sae = fastsae.SparseAutoencoder(TINY.D, TINY.M, fastsae.TopK(TINY.K), seed=0, device=self.device)
                sae.backend = backend
                step = fastsae.FusedTrainStep(sae, lr=1e-3, backend=backend)
                return lambda: step(x)
        raise LookupError(f"{item} is no item of this job")
