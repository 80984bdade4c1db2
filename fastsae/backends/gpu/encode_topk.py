"""acts, indices = the K largest of relu((x Wᵀ + b) · g) of each token; (N, M) is never stored.

The stages, in order:
    narrow_rows       x and W in row-scaled fp16, with the norms of what is kept and lost
    product           x̂ Ŵᵀ in chunks that stay in L2: cuBLAS, or the backend's own over a list of rows
    bars              from the first chunks, a guess τ of what a few K latents of a token reach
    append            of every chunk, the latents that may reach τ: the survivors
    select            of the survivors, those that may be among the K largest: the candidates; the certificate
    rescore           their exact fp32 scores
    top_k             the K largest of them
    exhaustive_top_k  tokens without a certificate, from every latent
The host reads nothing back: all sizes depend on shapes, so a CUDA graph can capture the whole op.

Why a cuBLAS product and a pass over its result, and not one fused kernel: at N=8192 D=4096 M=131072 the product is
8.8 TFLOP, 11.1 ms at the 790 TFLOP/s that cuBLAS reaches on an H200; a chunk of scores is written to and read from L2
at a few TB/s, 2.1 GB in all: 0.8 ms. A fused product would have to reach 93 % of cuBLAS to break even. At D=768 the
same pass weighs more (0.15 of 0.55 ms), and a fused kernel may win there; it has not been measured.

Bytes: (N + M)·D·2 a chunk's product and 4·N·M through L2; 1.03-1.25·N·K·D·sizeof(W) to rescore.
Flops: 2·N·M·D on tensor cores, about 12·N·M beside them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.gpu.bounds import tables, token_bounds
from fastsae.backends.gpu.narrow import Narrow, narrowed, screening_copy
from fastsae.backends.gpu.plan import Plan, plan
from fastsae.backends.gpu.product import chunk_product, fp32_sums
from fastsae.backends.gpu.stages import EncodeStages


def encode_topk(
    stages: EncodeStages,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    rows: Tensor | None,
    scale: Tensor | None,
    index_offset: int,
    screen: Narrow | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """acts (N, k) in x's dtype, indices int32 (N, k), and 0-d int64: the tokens that had to be done exhaustively."""
    n, positions = x.shape[0], W.shape[0] if rows is None else rows.shape[0]
    acts = buffers.empty((n, k), x.dtype, x.device)
    indices = buffers.empty((n, k), torch.int32, x.device)
    redone = buffers.scalar(0, torch.int64, x.device)
    if n == 0:
        return acts, indices, redone
    screen = screening_copy(stages, W, screen, precision)
    if rows is None:
        count = buffers.scalar(buffers.count_int32("latents", positions), torch.int32, x.device)
    else:
        rows = rows.clamp(max=W.shape[0] - 1)  # the host does not see a row past W: no kernel may read there
        count = (rows >= 0).sum(dtype=torch.int32)
    p = plan(n, positions, k, screen.low.itemsize)
    table = tables(screen, b, scale, None, rows, p.chunks, p.width, strided=True)
    for start in range(0, n, p.tokens):
        part = slice(start, start + p.tokens)
        redone += _encode_slab(
            stages, x[part], W, b, scale, rows, count, screen, table, p, precision, acts[part], indices[part],
            index_offset,
        )  # fmt: skip
    return acts, indices, redone


def listed_tokens(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens where wanted (N,) bool, ascending, as int32 (N+1,) of which the first `listed` (0-d int32) count."""
    n = wanted.shape[0]
    place = torch.where(wanted, wanted.cumsum(0) - 1, n)
    tokens = buffers.zeros((n + 1,), torch.int32, wanted.device)
    tokens.scatter_(0, place, buffers.arange(n, torch.int32, wanted.device))
    return tokens, wanted.sum(dtype=torch.int32)


def _encode_slab(
    stages: EncodeStages,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    scale: Tensor | None,
    rows: Tensor | None,
    count: Tensor,
    screen: Narrow,
    table: Tensor,
    p: Plan,
    precision: str,
    acts: Tensor,
    indices: Tensor,
    offset: int,
) -> Tensor:
    """Writes acts and indices of some tokens; returns how many were done exhaustively."""
    n, k = acts.shape
    device, dtype = x.device, screen.low.dtype
    narrow = narrowed(stages, x, dtype)
    bounds = token_bounds(narrow, x.shape[1])
    scores = buffers.empty((n, p.sampled_chunks * p.width), dtype, device)
    bar = buffers.empty((n,), torch.float32, device)
    values = buffers.empty((n, p.survivors), torch.float32, device)
    places = buffers.empty((n, p.survivors), torch.int32, device)
    counts = buffers.zeros((n,), torch.int32, device)

    def keep(of_chunk: Tensor, j: int) -> None:
        stages.append(of_chunk, table[j], bounds, bar, count, values, places, counts, j, p.chunks, j * p.width)

    with fp32_sums():
        sampled = [scores[:, j * p.width : (j + 1) * p.width] for j in range(p.sampled_chunks)]
        for j, out in enumerate(sampled):
            chunk_product(stages, narrow, screen, rows, count, out, j, p.chunks)
        stages.bars(scores, table, bounds, count, bar, p)
        for j, out in enumerate(sampled):
            keep(out, j)
        for j in range(p.sampled_chunks, p.chunks):
            chunk_product(stages, narrow, screen, rows, count, sampled[0], j, p.chunks)
            keep(sampled[0], j)
    del scores, sampled  # the largest of all, and not needed any more
    exact = precision != "screened"
    latents, best, found, certified = stages.select(
        values, places, counts, table, bounds, bar, rows, k, p, dtype, exact
    )
    if exact:
        stages.rescore(x, W, b, scale, latents, found, best)
    last = offset + W.shape[0] - 1
    stages.top_k(latents, best, found, certified, acts, indices, offset, last)
    tokens, listed = listed_tokens(certified == 0)
    stages.exhaustive_top_k(x, W, b, scale, rows, count, tokens, listed, acts, indices, offset, last)
    return listed
