"""The bound on the error of a screened score, and the tables that it is computed from.

A screened score v of the exact score s obeys |v - s| <= e with
    v = ŝ · 2^(..) · g + b·g,      e = p_n · A_i + q_n · B_i + (|v| + |b_i·g|) · r + t_n
    A_i = |g_i| ‖ŵ_i‖,  B_i = |g_i| ‖w_i - ŵ_i‖,  p_n = ‖x_n - x̂_n‖ + c ‖x_n‖,  q_n = ‖x_n‖
where g is the gate of a latent (1 without), c bounds the accumulation of both scores (`accumulation`), r the
rounding of ŝ to its storage and of the last operations, and t_n keeps underflow from hiding a positive score. t_n is
left out where A_i = B_i = 0, so that a latent of zeros never survives a bar of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.backends.gpu import accumulation
from fastsae.backends.gpu.narrow import Narrow

TABLE_ROWS = 5
"""scale·gate, bias·gate, A, B, threshold: by chunk, then by row of the table, then by column of the chunk."""


def bound_of_sums(D: int, constant: float) -> float:
    """c: what the product loses (accumulation.constant), and the exact score's own roundings, a 32nd of D and few."""
    return ((constant + 1 / 32) * D + 64) * 2.0**-24


def tables(
    narrow: Narrow,
    b: Tensor,
    scale: Tensor | None,
    threshold: Tensor | None,
    rows: Tensor | None,
    chunks: int,
    width: int,
    strided: bool,
) -> Tensor:
    """(chunks, TABLE_ROWS, width) fp32: what a score's bound needs of each latent, in the order of the product."""
    gate = None if scale is None else scale.float()
    columns = [narrow.scale, b.float(), narrow.norm, narrow.residual]
    if gate is not None:
        columns = [columns[0] * gate, columns[1] * gate, columns[2] * gate.abs(), columns[3] * gate.abs()]
    columns.append(torch.zeros_like(narrow.scale) if threshold is None else threshold)
    table = torch.stack(columns)
    if rows is not None:
        table = table.index_select(1, rows.clamp(min=0))
    table = torch.nn.functional.pad(table, (0, chunks * width - table.shape[1]))
    if strided:
        return table.view(TABLE_ROWS, width, chunks).permute(2, 0, 1).contiguous()
    return table.view(TABLE_ROWS, chunks, width).transpose(0, 1).contiguous()


def token_bounds(x: Narrow, D: int) -> Tensor:
    """(4, N) fp32: the scale of each token's narrow row, p, q and t."""
    full = x.norm + x.residual
    c = bound_of_sums(D, accumulation.constant(x.low.device, x.low.dtype))
    p = (x.residual + c * full) * (1 + 2.0**-16)
    floor = torch.full_like(full, 1e-37)  # two plain numbers would give torch.where's result the default dtype
    return torch.stack([x.scale, p, full * (1 + 2.0**-16), torch.where(full > 0, floor, 0)])


def roundoff(dtype: torch.dtype) -> float:
    """r: ŝ is stored with unit roundoff 2⁻¹¹ (fp16), or 2⁻²⁴; each side's last multiply-adds cost 2⁻²² together."""
    return (2.0**-11 if dtype == torch.float16 else 0.0) * 1.01 + 2.0**-21
