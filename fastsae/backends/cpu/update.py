"""update_latents_ on the CPU backend: one call into csrc/cpu/update_latents.cpp."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsae import _cpu
from fastsae.backends.contract import UpdateArguments
from fastsae.backends.cpu import screen as cpu_screen
from fastsae.backends.cpu.memory import DTYPES, address, codes, latent_order, matrix, sort
from fastsae.reference import EightBit, Moment, wide

STORED = {torch.bfloat16: _cpu.Stored.bf16, torch.float8_e4m3fn: _cpu.Stored.fp8}


def update_latents_(call: UpdateArguments) -> Tensor:
    if call.skip is not None and not call.norms_only and bool(call.skip):
        return torch.full((4,), torch.nan, dtype=torch.float64)
    (latents, d_out), d_in = call.W_dec.shape, call.encoder.shape[1]
    moments = call.stored_moments()
    parameters = [
        _parameter(p, moments[name], stream=2 * i) for i, (name, p) in enumerate(call.parameters().items())
    ]  # fmt: skip
    if call.tied:
        parameters.insert(0, _parameter(None, (), stream=0))
    held: list[Any] = []  # what C++ reads lives as long as this
    terms = _terms(call, held)
    parts = _parts(call, held)
    no_copy = _cpu.Screen(0, 0, 0, 0, _cpu.Format.f32, latents, d_in)
    refreshed = call.screen and not call.norms_only
    stats = torch.empty(4, dtype=torch.float64)
    _cpu.update_latents(
        *parameters,
        latents=latents,
        d_in=d_in,
        d_out=d_out,
        dtype=DTYPES[call.W_dec.dtype],
        terms=terms,
        parts=parts,
        optimizer=_optimizer(call),
        clip_rows=call.clip_rows or 0.0,
        grad_scale=1.0 if call.grad_scale is None else float(call.grad_scale),
        unit_norm=call.unit_norm,
        pre_bias=call.pre_bias,
        norms_only=call.norms_only,
        seed=(call.seed or 0) & 0xFFFFFFFF,
        step=int(call.step),
        screen=cpu_screen.view(call.screen, latents, d_in) if refreshed else no_copy,
        threads=torch.get_num_threads(),
        stats=stats.data_ptr(),
    )
    del held
    return stats


def _parameter(p: Tensor | None, moments: tuple[Moment, ...], stream: int) -> _cpu.Parameter:
    places, scales = [0, 0], [0, 0]
    stored = _cpu.Stored.wide
    for i, moment in enumerate(moments):
        numbers = moment.codes if isinstance(moment, EightBit) else moment
        places[i], stored = numbers.data_ptr(), STORED.get(numbers.dtype, _cpu.Stored.wide)
        if isinstance(moment, EightBit):
            scales[i] = moment.scales.data_ptr()
    return _cpu.Parameter(address(p), *places, *scales, stored, stream)


def _optimizer(call: UpdateArguments) -> _cpu.OptimizerArgs:
    lr, t = float(call.lr), int(call.step)
    return _cpu.OptimizerArgs(
        kind=getattr(_cpu.OptimizerKind, call.optimizer),
        lr=lr,
        step_size=lr / (1 - call.beta1**t),
        root2=math.sqrt(1 - call.beta2**t),
        beta1=call.beta1,
        beta2=call.beta2,
        eps=call.eps,
        kept=1 - lr * call.weight_decay,
    )


def _terms(call: UpdateArguments, held: list[Any]) -> list[_cpu.UpdateTerm]:
    terms = []
    for t in call.terms():
        acts, x, grad = t.acts.to(call.W_dec.dtype), wide(t.x).contiguous(), wide(t.grad).contiguous()
        dacts = None if t.dacts is None else wide(t.dacts).contiguous()
        code = codes(acts, t.indices, t.offsets, call.W_dec.shape[0])
        order = sort(code, acts.numel(), call.W_dec.shape[0])
        terms.append(
            _cpu.UpdateTerm(code, latent_order(*order), matrix(x), matrix(grad), address(dacts), t.has_bias)
        )  # fmt: skip
        held.append((acts, x, grad, dacts, order))
    return terms


def _parts(call: UpdateArguments, held: list[Any]) -> _cpu.UpdateParts:
    parts = call.parts()
    given = [parts.decoder_pull, parts.db_enc, parts.W_enc, parts.W_dec, parts.pre]
    pull, *others = [None if t is None else wide(t.detach()).contiguous() for t in given]
    held.append((pull, others))
    return _cpu.UpdateParts(address(pull), 1 if pull is None else pull.shape[1], *map(address, others))
