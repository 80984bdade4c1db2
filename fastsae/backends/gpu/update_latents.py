"""update_latents_: the backward of a whole step and its optimizer, in place; no dictionary gradient is ever stored.

    dact_e = ⟨grad_n, W_dec_i⟩, or given    dW_dec_i = Σ act_e · grad_n    dW_enc_i = Σ dact_e · x_n
    db_enc_i = Σ dact_e    db_dec = Σ_n grad_n - Σ_i db_enc_i · W_enc_i (pre_bias);  parts are added
    then project, clip, scale, step (Adam, Lion, signs), renormalize: reference.update

The entries of all terms are listed latent by latent once, long latents are cut (pieces.py), and then a program holds
one latent's rows from gradient to step (stages.update_rows). Every sum has one order: nothing is atomic and the bits
never change. The launches depend on shapes only, and no number is read back. A global clip takes two calls, of which
the first (norms_only) writes nothing: the gradients are computed again and not kept.

Bytes: nnz·(D_in·sizeof(x) + D_out·sizeof(grad)) + M·(D_in + D_out)·(2·sizeof(W) + 4·sizeof(moment)) + N·D_out.
Flops: 6·nnz·D + 15·M·(D_in + D_out).
Workspace: 44 bytes a slot, and 16 more where gradients of pre-acts are given; pieces, at most 2·ΣN·(D_in + D_out) / 2
bytes (N/4 rows of float32); pre_bias, at most 4096 and N/2 rows of D float32 (1024 at least); wide rows, twice as many
more. At N = 8192: 4·N·D bytes in all, 8·N·D with wide rows. With more than two terms, the second to the last are joined
in one more copy of their x and grad. Parts that are narrower than float32 are widened in a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsae.backends import buffers
from fastsae.backends.contract import RawTerm, UpdateArguments
from fastsae.backends.gpu.pieces import cut
from fastsae.backends.gpu.plan import cdiv
from fastsae.backends.gpu.stages import Entries, Moments, Stages, Step
from fastsae.reference import EightBit, Moment, Parts


def list_entries(stages: Stages, terms: list[RawTerm], W_dec: Tensor, x_like: Tensor) -> Entries:
    """x_like: a placeholder for x if there is no term, as W_dec is one for grad; nothing is read from them."""
    slots, tokens = sum(t.acts.numel() for t in terms), sum(t.grad.shape[0] for t in terms)
    buffers.count_int32("the slots of the terms", slots), buffers.count_int32("the tokens of the terms", tokens)
    keys, rows = (buffers.empty((slots,), torch.int32, W_dec.device) for _ in range(2))
    acts = buffers.empty((slots,), torch.float32, W_dec.device)
    d_sae = W_dec.shape[0]
    slot = row = 0
    for t in terms:
        here = slice(slot, slot + t.acts.numel())
        stages.list_slots(
            t.acts, t.indices, t.offsets, d_sae, keys[here], rows[here], acts[here], row, zeros=t.dacts is not None
        )
        slot, row = here.stop, row + t.grad.shape[0]
    starts, rows, places, sorted_acts = stages.sort_slots(keys, rows, acts, d_sae)
    assert sorted_acts is not None
    dacts = None
    if any(t.dacts is not None for t in terms):
        given = torch.cat([_dacts(stages, t, W_dec).float().flatten() for t in terms])
        dacts = given[places.clamp_(min=0)]
    x, more_x = _in_two([t.x for t in terms], x_like)
    grad, more_grad = _in_two([t.grad for t in terms], W_dec)
    split = terms[0].grad.shape[0] if terms else 0
    pieces = cut(stages.piece_starts, starts, slots, tokens)
    return Entries(starts, rows, sorted_acts, dacts, x, more_x, grad, more_grad, split, pieces)


def _dacts(stages: Stages, term: RawTerm, W_dec: Tensor) -> Tensor:
    """Those given, or beside terms that have them ⟨grad_n, W_dec_i⟩; if dtypes differ, from copies in float32."""
    if term.dacts is not None:
        return term.dacts
    operands = (term.grad, term.acts, W_dec)
    if any(t.dtype != torch.float32 for t in operands):
        operands = (term.grad.float(), term.acts.float(), W_dec.float())
    grad, acts, W = operands
    return stages.active_dot(grad, acts, term.indices, term.offsets, W)


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


def _moments(stored: tuple[Moment, ...]) -> Moments:
    """m and v, as far as the optimizer keeps them, as they are stored."""
    codes = [m.codes if isinstance(m, EightBit) else m for m in stored]
    scales = [m.scales if isinstance(m, EightBit) else None for m in stored]
    none = [None] * (2 - len(stored))
    return Moments(*codes, *none, *scales, *none)


def _in_float32(parts: Parts) -> Parts:
    given = (parts.decoder_pull, parts.db_enc, parts.W_enc, parts.W_dec, parts.pre)
    return Parts(*(None if t is None else t.float().contiguous() for t in given))


def step_of(stages: Stages, call: UpdateArguments) -> Step:
    """adam and adamw are one rule: without decay, 1 - lr · weight_decay is 1."""
    rule = "none" if call.norms_only else "adam" if call.optimizer == "adamw" else call.optimizer
    decay = 0.0 if call.optimizer == "adam" else call.weight_decay
    skip, scale = (None, None) if call.norms_only else (call.skip, call.grad_scale)
    numbers, keys = stages.step_numbers(call.lr, call.step, skip, scale, rule, call.beta1, call.beta2, decay, call.seed)
    betas = (call.beta1, 1 - call.beta1, call.beta2, 1 - call.beta2)
    return Step(rule, numbers, keys, call.eps, betas, call.first_latent)


def update_latents(stages: Stages, call: UpdateArguments) -> Tensor:
    """One step, in place, or with norms_only nothing but the norms. Returns squared gradient norms, (4,) float64.

    If call.skip is True nothing changes, and the norms are NaN. A number next to the step size, on the device, decides
    it: the kernels that write then find no latents, and the work of the others is wasted.
    """
    W_enc, W_dec, b_enc, b_dec = call.W_enc, call.W_dec, call.b_enc, call.b_dec
    terms, encoder = call.terms(), call.encoder
    d_out, d_in = W_dec.shape[1], encoder.shape[1]
    stored = {} if call.norms_only else call.stored_moments()
    moments = {name: _moments(stored.get(name, ())) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}

    step, parts = step_of(stages, call), _in_float32(call.parts())
    entries = list_entries(stages, terms, W_dec, encoder)
    programs = programs_of(W_dec.shape[0], sum(t.grad.shape[0] for t in terms))
    stats = buffers.empty((programs + stages.bias_programs(d_out), 4), torch.float64, W_dec.device)
    partial = buffers.empty((programs, d_in), torch.float32, W_dec.device) if call.pre_bias else None

    # All memory is allocated before a parameter changes.
    grads = [t.grad for t in terms if t.has_bias]
    rows = sum(stages.bias_parts(t.shape[0]) for t in (*grads, partial) if t is not None)
    workspace = buffers.empty((rows, d_out), torch.float32, W_dec.device)

    stages.update_rows(
        W_enc, W_dec, b_enc, moments["W_enc"], moments["W_dec"], moments["b_enc"], entries, parts, partial, stats, step,
        call.unit_norm, call.clip_rows, programs,
    )  # fmt: skip
    stream = 4 if call.tied else 6
    stages.update_bias(b_dec, moments["b_dec"], grads, partial, stats[programs:], step, stream, workspace)
    return stats.sum(0)
