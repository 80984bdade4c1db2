"""update_latents_ on the CPU backend: one call into csrc/cpu/update_latents.cpp."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsae import _cpu
from fastsae.backends import buffers
from fastsae.backends.contract import UpdateArguments
from fastsae.backends.cpu import screen as cpu_screen
from fastsae.backends.cpu.memory import CPU, codes, matrix, numbers, sort
from fastsae.reference import EightBit, Moment, scales_shape, wide

NARROW = (torch.bfloat16, torch.float8_e4m3fn)


def update_latents_(call: UpdateArguments) -> Tensor:
    if call.skip is not None and not call.norms_only and bool(call.skip):
        return buffers.full((4,), torch.nan, torch.float64, CPU)
    (latents, d_out), d_in = call.W_dec.shape, call.encoder.shape[1]
    moments = call.stored_moments()
    parameters = [
        _parameter(call, name, p, moments[name], stream=2 * i) for i, (name, p) in enumerate(call.parameters().items())
    ]
    no_copy = cpu_screen.absent(latents, d_in)
    refreshed = call.screen and not call.norms_only
    stats = buffers.empty((4,), torch.float64, CPU)
    _cpu.update_latents(
        *([None] if call.tied else []),
        *parameters,
        latents=latents,
        d_in=d_in,
        d_out=d_out,
        terms=_terms(call),
        parts=_parts(call),
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
        stats=numbers("stats", stats, torch.float64, (4,)),
    )
    return stats


def _parameter(call: UpdateArguments, name: str, p: Tensor, moments: tuple[Moment, ...], stream: int) -> _cpu.Parameter:
    """p and its moments, which are stored alike, in the memory that C++ updates."""
    (latents, d_out), d_in, kinds = call.W_dec.shape, call.encoder.shape[1], call.rule().moments
    shape = {"W_enc": (latents, d_in), "W_dec": (latents, d_out), "b_enc": (latents,), "b_dec": (d_out,)}[name]
    if len(moments) != len(kinds):
        raise ValueError(f"got {len(moments)} moments of {name}, expected {len(kinds)}, those of {call.optimizer}")
    places: list[_cpu.Numbers | None] = [None, None]
    scales: list[_cpu.Numbers | None] = [None, None]
    stored = [moment.codes if isinstance(moment, EightBit) else moment for moment in moments]
    dtype = next((t.dtype for t in stored if t.dtype in NARROW), wide(p).dtype)
    for i, (kind, moment, held) in enumerate(zip(kinds, moments, stored, strict=True)):
        places[i] = numbers(f"moment {kind} of {name}", held, dtype, shape)
        if isinstance(moment, EightBit):
            scales[i] = numbers(f"the scales of {kind} of {name}", moment.scales, torch.float32, scales_shape(held))
    place = numbers(name, p, call.W_dec.dtype, shape)
    return _cpu.Parameter(place, *places, *scales, stream, call.numbers_before(name))


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


def _terms(call: UpdateArguments) -> list[_cpu.UpdateTerm]:
    terms = []
    for t in call.terms():
        acts, x, grad = t.acts.to(call.W_dec.dtype), wide(t.x).contiguous(), wide(t.grad).contiguous()
        dacts = None if t.dacts is None else wide(t.dacts).contiguous()
        code = codes(acts, t.indices, t.offsets, call.W_dec.shape[0])
        given = numbers("dacts", dacts, x.dtype, tuple(acts.shape))
        terms.append(_cpu.UpdateTerm(code, sort(code)[0], matrix("x", x), matrix("grad", grad), given, t.has_bias))
    return terms


def _parts(call: UpdateArguments) -> _cpu.UpdateParts:
    parts, (latents, d_out), dtype = call.parts(), call.W_dec.shape, wide(call.W_dec).dtype
    segments = 1 if parts.decoder_pull is None else parts.decoder_pull.shape[1]
    given = {
        "decoder_pull": (parts.decoder_pull, (latents, segments)),
        "db_enc": (parts.db_enc, (latents,)),
        "dW_enc": (parts.W_enc, (latents, call.encoder.shape[1])),
        "dW_dec": (parts.W_dec, (latents, d_out)),
        "dpre": (parts.pre, (latents,)),
    }
    places = []
    for name, (t, shape) in given.items():
        read = None if t is None else wide(t.detach()).contiguous()
        places.append(numbers(name, read, dtype, shape))
    pull, *others = places
    return _cpu.UpdateParts(pull, segments, *others)
