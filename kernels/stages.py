"""The Triton launchers under the names of fastsae.backends.gpu.stages: what this backend computes itself."""

from __future__ import annotations

from fastsae.kernels import update_rows as in_registers
from fastsae.kernels import update_wide as in_tiles
from fastsae.kernels.active_dot import active_dot
from fastsae.kernels.active_outer import outer
from fastsae.kernels.adam import step_numbers
from fastsae.kernels.bar import bars
from fastsae.kernels.by_latent import list_slots, sort_slots
from fastsae.kernels.candidates import select
from fastsae.kernels.decode import decode
from fastsae.kernels.decode_error import decode_error
from fastsae.kernels.exhaustive import exhaustive_top_k
from fastsae.kernels.narrow import narrow_rows
from fastsae.kernels.pieces import piece_starts
from fastsae.kernels.product import product
from fastsae.kernels.ragged import count_listed, emit_listed, every_latent, histogram
from fastsae.kernels.rescore import rescore
from fastsae.kernels.survivors import append
from fastsae.kernels.top_k import top_k
from fastsae.kernels.update_bias import bias_parts, bias_programs, update_bias
from torch import Tensor

from fastsae.backends.gpu.stages import Entries, Moments

__all__ = [
    "active_dot", "append", "bars", "bias_parts", "bias_programs", "count_listed", "decode", "decode_error",
    "emit_listed", "every_latent", "exhaustive_top_k", "histogram", "list_slots", "narrow_rows", "outer",
    "piece_starts", "product", "rescore", "select", "sort_slots", "step_numbers", "top_k", "update_bias", "update_rows",
]  # fmt: skip


def update_rows(
    W_enc: Tensor | None, W_dec: Tensor, b_enc: Tensor, enc_moments: Moments, dec_moments: Moments,
    bias_moments: Moments, entries: Entries, pre_bias: Tensor | None, stats: Tensor, numbers: Tensor, keys: Tensor,
    eps: float, betas: tuple[float, float, float, float], unit_norm: bool, stochastic: bool, programs: int,
) -> None:  # fmt: skip
    """In registers if the rows fit there, else in tiles."""
    d_in, d_out = (W_dec if W_enc is None else W_enc).shape[1], W_dec.shape[1]
    rows = in_registers if max(d_in, d_out) <= in_registers.ROW_LIMIT else in_tiles
    rows.update(
        W_enc, W_dec, b_enc, enc_moments, dec_moments, bias_moments, entries, pre_bias, stats, numbers, keys, eps,
        betas, unit_norm, stochastic, programs,
    )  # fmt: skip
