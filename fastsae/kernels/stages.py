"""The Triton launchers under the names of fastsae.backends.gpu.stages: what this backend computes itself."""

from __future__ import annotations

from fastsae.kernels.active_dot import active_dot
from fastsae.kernels.active_outer import outer
from fastsae.kernels.bar import bars
from fastsae.kernels.by_latent import list_slots, sort_slots
from fastsae.kernels.candidates import select
from fastsae.kernels.decode import decode
from fastsae.kernels.decode_error import decode_error
from fastsae.kernels.exhaustive import exhaustive_top_k
from fastsae.kernels.narrow import narrow_rows
from fastsae.kernels.optimizers import step_numbers
from fastsae.kernels.pieces import piece_starts
from fastsae.kernels.product import product
from fastsae.kernels.ragged import count_listed, emit_listed, every_latent, histogram
from fastsae.kernels.rescore import rescore
from fastsae.kernels.survivors import append
from fastsae.kernels.top_k import top_k
from fastsae.kernels.update_bias import bias_parts, bias_programs, update_bias
from fastsae.kernels.update_rows import ROW_LIMIT, update_rows

__all__ = [
    "ROW_LIMIT", "active_dot", "append", "bars", "bias_parts", "bias_programs", "count_listed", "decode",
    "decode_error", "emit_listed", "every_latent", "exhaustive_top_k", "histogram", "list_slots", "narrow_rows",
    "outer", "piece_starts", "product", "rescore", "select", "sort_slots", "step_numbers", "top_k", "update_bias",
    "update_rows",
]  # fmt: skip
