"""torch.sparse as a contestant: cuSPARSE on a GPU, MKL's or ATen's own kernels on a CPU. Checked, then timed.

The code is a CSR tensor, made outside the timing: decode is torch.sparse.mm(A, W); active_outer torch.sparse.mm(Aᵀ, x),
with Aᵀ as CSR made outside the timing, and regrouped, inside it; active_dot torch.sparse.sampled_addmm.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu import spot
from bench.gpu.faults import NotThere
from bench.gpu.op_times import Layouts
from fastsae import SparseCodes


def transposed(A: Tensor) -> Tensor:
    """Aᵀ as CSR."""
    return A.transpose(0, 1).to_sparse_csr()


class SparseTimes(Layouts):
    """The items of a job "codes-<case>-cusparse"."""

    def decode(self, codes: SparseCodes) -> tuple[float, Callable[[], object]]:
        A = codes.to_torch_sparse_csr()
        return spot.decode(codes, self.W, torch.sparse.mm(A, self.W)), lambda: torch.sparse.mm(A, self.W)

    def active_dot(self, codes: SparseCodes) -> tuple[float, Callable[[], object]]:
        A, W = codes.to_torch_sparse_csr(), self.W.mT

        def call() -> Tensor:
            return torch.sparse.sampled_addmm(A, self.x, W, beta=0.0)

        try:
            dots = call().values()
        except RuntimeError as error:
            if "sampled_addmm" not in str(error):
                raise
            raise NotThere(f"torch.sparse.sampled_addmm is not there for this device: {error}") from error
        got = torch.zeros_like(codes.acts).masked_scatter(codes.occupied(), dots)
        return spot.active_dot(codes, self.x, self.W, got), call

    def active_outer(self, codes: SparseCodes) -> tuple[float, Callable[[], object]]:
        At = transposed(codes.to_torch_sparse_csr())
        return spot.active_outer(codes, self.x, torch.sparse.mm(At, self.x)), lambda: torch.sparse.mm(At, self.x)

    def active_outer_regrouped(self, codes: SparseCodes) -> tuple[float, Callable[[], object]]:
        A = codes.to_torch_sparse_csr()

        def call() -> Tensor:
            return torch.sparse.mm(transposed(A), self.x)

        return spot.active_outer(codes, self.x, call()), call
