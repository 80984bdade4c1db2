"""update_latents_ on the CPU backend: one call into csrc/cpu/update_latents.cpp."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsae import _cpu
from fastsae.backends import cpu_screen
from fastsae.backends.cpu_memory import DTYPES, codes, latent_order, matrix, sort
from fastsae.backends.errors import BackendError
from fastsae.reference import wide
from fastsae.update_call import UpdateCall


def update_latents_(*arguments: Any) -> Tensor:
    call = UpdateCall(*arguments)
    if not call.is_plain:
        raise BackendError("cpu: update_latents_ knows only Adam on its own terms' gradients; pass backend='reference'")
    W_enc, W_dec, moments, screen = call.W_enc, call.W_dec, call.moments, call.screen
    parameters = [
        _cpu.Parameter(weight.data_ptr(), moments[2 * i].data_ptr(), moments[2 * i + 1].data_ptr(), 2 * i)
        for i, weight in enumerate(call.parameters().values())
    ]
    if W_enc is None:
        parameters.insert(0, _cpu.Parameter(0, 0, 0, 0))
    latents, d_out = W_dec.shape
    d_in = d_out if W_enc is None else W_enc.shape[1]

    terms, held = [], []
    for act, index, rows, _, x, grad, bias in call.terms():
        act, x, grad = act.to(W_dec.dtype), wide(x).contiguous(), wide(grad).contiguous()
        code = codes(act, index, rows, latents)
        order = sort(code, act.numel(), latents)
        terms.append(_cpu.UpdateTerm(code, latent_order(*order), matrix(x), matrix(grad), bias))
        held.append((act, x, grad, order))

    t, (beta1, beta2) = int(call.step), (call.beta1, call.beta2)
    no_copy = _cpu.Screen(0, 0, 0, 0, _cpu.Format.f32, latents, d_in)
    narrow = cpu_screen.view(screen, latents, d_in) if screen else no_copy
    stats = torch.empty(4, dtype=torch.float64)
    _cpu.update_latents(
        *parameters,
        latents=latents,
        d_in=d_in,
        d_out=d_out,
        dtype=DTYPES[W_dec.dtype],
        narrow_moments=moments[0].dtype == torch.bfloat16,
        terms=terms,
        step_size=float(call.lr) / (1 - beta1**t),
        root2=math.sqrt(1 - beta2**t),
        beta1=beta1,
        beta2=beta2,
        eps=call.eps,
        unit_norm=call.unit_norm,
        pre_bias=call.pre_bias,
        seed=(call.seed or 0) & 0xFFFFFFFF,
        step=t,
        screen=narrow,
        threads=torch.get_num_threads(),
        stats=stats.data_ptr(),
    )
    del held
    return stats
