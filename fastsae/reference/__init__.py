"""The mathematics of every op and every rule: dense, any floating dtype, torch only.

This is the single source of truth: nothing here is fast and everything here is short. Every function is pure. A whole
training step is `forward`, torch's autograd, `shape_gradients`, `update`. The gradients of a reconstruction are here in
closed form as well, so the tests can compare them with autograd, and the sparse engine with them.

Shapes: x (N, D), W_enc (M, D), W_dec (M, D_out), b_enc (M,), b_dec (D_out,), A (N, M). Both dictionaries keep one
latent per row.
"""

from fastsae.reference.family import Forward, Rule, decoder_norms, forward
from fastsae.reference.gradients import Params, Parts, Term, gradients, squared_norms, with_parts
from fastsae.reference.ops import (
    active_dot,
    active_outer,
    batch_top_k,
    decode,
    is_above,
    keep_abs_top_k,
    keep_group_max,
    keep_top_k,
    pre_acts,
    top_k,
    wide,
)
from fastsae.reference.optimizers import MOMENTS_OF, Optimizer, adam, lion
from fastsae.reference.rounding import BLOCK, EightBit, mixed, round_to_bf16, round_to_fp8, scales_shape
from fastsae.reference.rules import gated, heaviside, in_band, jump_relu
from fastsae.reference.update import (
    Moment,
    Moments,
    clip_rows,
    normalize,
    project,
    shape_gradients,
    store,
    update,
    widened,
)

__all__ = [
    "BLOCK", "MOMENTS_OF", "EightBit", "Forward", "Moment", "Moments", "Optimizer", "Params", "Parts", "Rule", "Term",
    "active_dot", "active_outer", "adam", "batch_top_k", "clip_rows", "decode", "decoder_norms", "forward", "gated",
    "gradients", "heaviside", "in_band", "is_above", "jump_relu", "keep_abs_top_k", "keep_group_max", "keep_top_k",
    "lion", "mixed", "normalize", "pre_acts", "project", "round_to_bf16", "round_to_fp8", "scales_shape",
    "shape_gradients", "squared_norms", "store", "top_k", "update", "wide", "widened", "with_parts",
]  # fmt: skip
