"""One chunk of the screening product: by cuBLAS, or by the backend's own kernel over a list of rows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsae.backends.gpu.narrow import Narrow
from fastsae.backends.gpu.stages import EncodeStages


@contextlib.contextmanager
def fp32_sums() -> Iterator[None]:
    """cuBLAS sums an fp16 product in fp32. torch has two settings that allow fp16 sums, for which no bound holds.

    Both are of the whole process: what is set here is put back, with the half of the second that is about split-K.
    """
    settings = torch.backends.cuda.matmul
    accumulated, reduced = settings.allow_fp16_accumulation, settings.allow_fp16_reduced_precision_reduction
    split_k = getattr(settings, "allow_fp16_reduced_precision_reduction_split_k", True)
    try:
        if accumulated:
            settings.allow_fp16_accumulation = False
        if reduced:
            settings.allow_fp16_reduced_precision_reduction = (False, split_k)
        yield
    finally:
        if accumulated:
            settings.allow_fp16_accumulation = True
        if reduced:
            settings.allow_fp16_reduced_precision_reduction = (True, split_k)


def chunk_product(
    stages: EncodeStages,
    x: Narrow,
    W: Narrow,
    rows: Tensor | None,
    count: Tensor,
    out: Tensor,
    chunk: int,
    stride: int,
) -> None:
    """Screened products of a chunk's positions chunk, chunk + stride, ... into the first columns of out (N, width)."""
    if rows is None and x.low.dtype == torch.float16:
        part = W.low[chunk::stride][: out.shape[1]]
        torch.mm(x.low, part.mT, out=out[:, : part.shape[0]])
        return
    stages.product(x.low, W.low, rows, count, out, chunk, stride)
