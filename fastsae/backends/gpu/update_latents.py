"""update_latents_: the backward of a whole step and its Adam update, in place; no dictionary gradient is ever stored.

    dact_e = ⟨grad_n, W_dec_i⟩    dW_dec_i = Σ act_e · grad_n    dW_enc_i = Σ dact_e · x_n    db_enc_i = Σ dact_e
    db_dec = Σ_n grad_n - Σ_i db_enc_i · W_enc_i (pre_bias);  then project, Adam, renormalize: reference.update

The entries of all terms are listed latent by latent once, long latents are cut (pieces.py), and then a program holds
one latent's rows from gradient to step (stages.update_rows). Every sum has one order: nothing is atomic and the bits
never change. The launches depend on shapes only, and no number is read back.

Bytes: nnz·(D_in·sizeof(x) + D_out·sizeof(grad)) + M·(D_in + D_out)·(2·sizeof(W) + 4·sizeof(moment)) + N·D_out.
Flops: 6·nnz·D + 15·M·(D_in + D_out).
Workspace: 44 bytes a slot; pieces, at most 2·ΣN·(D_in + D_out) / 2 bytes (N/4 rows of float32); pre_bias, at most 4096
and N/2 rows of D float32 (1024 at least); wide rows, 4096 and N/2 rows more. At N = 8192: 4·N·D bytes in all.
With more than two terms, the second to the last are joined in one more copy of their x and grad.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.contract import RawTerm, UpdateArguments
from fastsae.backends.gpu.pieces import cut
from fastsae.backends.gpu.plan import cdiv
from fastsae.backends.gpu.stages import Entries, LatentStages


def list_entries(stages: LatentStages, terms: list[RawTerm], d_sae: int, x_like: Tensor, grad_like: Tensor) -> Entries:
    """x_like, grad_like: placeholders for x and grad if there is no term; nothing is read from them."""
    slots, tokens = sum(t.acts.numel() for t in terms), sum(t.grad.shape[0] for t in terms)
    buffers.count_int32("the slots of the terms", slots), buffers.count_int32("the tokens of the terms", tokens)
    keys, rows = (buffers.empty((slots,), torch.int32, grad_like.device) for _ in range(2))
    acts = buffers.empty((slots,), torch.float32, grad_like.device)
    slot = row = 0
    for t in terms:
        here = slice(slot, slot + t.acts.numel())
        stages.list_slots(t.acts, t.indices, t.offsets, d_sae, keys[here], rows[here], acts[here], first_row=row)
        slot, row = here.stop, row + t.grad.shape[0]
    starts, rows, _, sorted_acts = stages.sort_slots(keys, rows, acts, d_sae)
    assert sorted_acts is not None
    x, more_x = _in_two([t.x for t in terms], x_like)
    grad, more_grad = _in_two([t.grad for t in terms], grad_like)
    split = terms[0].grad.shape[0] if terms else 0
    return Entries(
        starts, rows, sorted_acts, x, more_x, grad, more_grad, split, cut(stages.piece_starts, starts, slots, tokens)
    )


def _in_two(matrices: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor | None]:
    """The first matrix, and the others joined, or None where there is no other; in one dtype."""
    if not matrices:
        return like, None
    first, rest = matrices[0], matrices[1:]
    if not rest:
        return first, None
    dtype = first.dtype
    for matrix in rest:
        dtype = torch.promote_types(dtype, matrix.dtype)
    more = rest[0] if len(rest) == 1 else torch.cat(rest)
    return first.to(dtype), more.to(dtype)


def programs_of(d_sae: int, tokens: int) -> int:
    """How many programs share the latents, and so how many partial rows the pre-bias term has.

    Four latents a program at least; 4096 programs at most, which fill 132 multiprocessors six times or more; and no
    more than half as many as there are tokens, to keep the partial rows small next to x.
    """
    return max(1, min(cdiv(d_sae, 4), 4096, max(1024, tokens // 2)))


def update_latents(stages: LatentStages, call: UpdateArguments) -> Tensor:
    """One step of a plain call, in place. Returns the squared gradient norms before projection, (4,) float64.

    If call.skip is True nothing changes, and the norms are NaN. A number next to the step size, on the device, decides
    it: the kernels that write then find no latents, and the work of the others is wasted.
    """
    W_enc, W_dec, b_enc, b_dec = call.W_enc, call.W_dec, call.b_enc, call.b_dec
    moments, terms, tied, encoder = call.moments, call.terms(), call.tied, call.encoder
    eps, unit_norm, pre_bias = call.eps, call.unit_norm, call.pre_bias
    (d_sae, d_out), d_in = W_dec.shape, encoder.shape[1]
    enc_moments = (None, None) if tied else (moments[0], moments[1])
    dec_moments, bias_moments, last_moments = zip(moments[-6::2], moments[-5::2], strict=True)
    stochastic = call.seed is not None and moments[0].dtype == torch.bfloat16
    betas = (call.beta1, 1 - call.beta1, call.beta2, 1 - call.beta2)

    numbers, keys = stages.step_numbers(call.lr, call.step, call.skip, call.beta1, call.beta2, call.seed)
    entries = list_entries(stages, terms, d_sae, encoder, W_dec)
    programs = programs_of(d_sae, sum(t.grad.shape[0] for t in terms))
    stats = buffers.empty((programs + stages.bias_programs(d_out), 4), torch.float64, W_dec.device)
    partial = buffers.empty((programs, d_in), torch.float32, W_dec.device) if pre_bias else None

    # All memory is allocated before a parameter changes.
    grads = [t.grad for t in terms if t.has_bias]
    parts = sum(stages.bias_parts(t.shape[0]) for t in (*grads, partial) if t is not None)
    workspace = buffers.empty((parts, d_out), torch.float32, W_dec.device)

    stages.update_rows(
        W_enc, W_dec, b_enc, enc_moments, dec_moments, bias_moments, entries, partial, stats,
        numbers, keys, eps, betas, unit_norm, stochastic, programs,
    )  # fmt: skip
    stages.update_bias(
        b_dec, *last_moments, grads, partial, stats[programs:], numbers, keys[4 if tied else 6 :], eps, betas,
        stochastic, workspace,
    )  # fmt: skip
    return stats.sum(0)
