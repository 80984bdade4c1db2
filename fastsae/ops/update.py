"""update_latents_: the fused backward and optimizer step of a whole SAE, in place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from fastsae.backends.contract import WRITTEN, UpdateArguments
from fastsae.codes import Screen, UpdateTerm
from fastsae.ops import checks as check_that
from fastsae.ops.encode import screen_tensors
from fastsae.ops.register import define
from fastsae.reference import BLOCK, MOMENTS_OF, scales_shape

_raw = torch.ops.fastsae

EIGHT_BIT = torch.float8_e4m3fn


def update_latents_(
    W_enc: Tensor | None,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    moments: Sequence[Tensor],
    terms: Sequence[UpdateTerm],
    *,
    lr: Tensor,
    step: Tensor,
    optimizer: str = "adam",
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    unit_norm: bool = True,
    pre_bias: bool = True,
    decoder_pull: Tensor | None = None,
    db_enc: Tensor | None = None,
    added: Sequence[Tensor] = (),
    clip_rows: float | None = None,
    grad_scale: Tensor | None = None,
    skip: Tensor | None = None,
    norms_only: bool = False,
    seed: int | None = None,
    first_latent: int = 0,
    scales: Sequence[Tensor] = (),
    screen: Screen | None = None,
    backend: str | None = None,
) -> Tensor:
    """The fused backward and optimizer step of an SAE, in place. A backend stores a gradient only if it must.

    W_enc (M, D), or None if it is tied to W_dec (M, D_out); b_enc (M,), b_dec (D_out,). lr: 0-d float64, step: 0-d
    int64, the count including this step, both on the device. pre_bias: the encoder's input had b_dec subtracted.
    Order: accumulate terms and parts, norms, project (unit_norm), clip_rows, grad_scale, optimizer, renormalize
    (unit_norm), refresh the screen. Formulas: fastsae.reference.gradients, .optimizers and .update.

    optimizer, weight_decay: "adam" as in torch.optim.Adam, without decay; "adamw" as torch.optim.AdamW; "lion"
    (arXiv:2302.06675) and "signsgd" (p -= lr · sign(g)) with decay like AdamW's, on all parameters alike.
    moments: [mW_enc, vW_enc, mW_dec, vW_dec, mb_enc, vb_enc, mb_dec, vb_dec], without W_enc's when tied, without every
    v for lion, none for signsgd; shaped like their parameter. All in the weights' dtype (float32 at least); or all
    bfloat16; or, of adam and adamw, the dictionaries' in float8_e4m3fn, each with its own of `scales` in the same
    order, float32 (M, ceil(D / 128)), and the biases' wide. bfloat16 and 8 bits need a seed for their stochastic
    rounding: rounded to nearest, v would never move, since a step changes it by less than half a unit.
    first_latent: of rows of a larger SAE, the number of the first one; they are rounded as they would be in the whole.

    Added to the gradients of the terms:
    decoder_pull (M, L), L dividing D_out: dW_dec_i gains decoder_pull[i, l] · W_dec_i in the l-th of L equal segments.
    db_enc (M,): added to b_enc's gradient alone, not to what pre_bias passes on to b_dec.
    added: [dW_enc (M, D), dW_dec (M, D_out), dpre (M,)] of a dense path, dpre being Σ_n of the pre-acts' gradient;
    tied: [dW_dec, dpre], dW_dec the sum of both dictionaries'. Only read.

    clip_rows: each latent's row of each dictionary's gradient is scaled by min(1, clip_rows / its norm).
    grad_scale: 0-d float64 on the device, multiplies all gradients; with norms_only, which changes nothing and returns
    the squared norms after projection and clip_rows (grad_scale is not in them), it makes a global clip in two calls.
    skip: 0-d bool on the device: if True, the call changes nothing, as after a loss that is not finite. A GPU
    reads no value back for it. With norms_only, which changes nothing either, it has no effect.

    Returns float64 (4,): [Σ dW_enc², Σ dW_dec², Σ db_enc², Σ db_dec²] before projection; tied: the first is 0, the
    second that of the summed gradient. Skipped: the same where the backend computes them anyway, else NaN (the CPU
    backend, and a GPU's fused kernels).
    """
    check_that.optimizer(optimizer, betas, eps, weight_decay)
    beta1, beta2 = betas
    with torch.no_grad():
        return _raw.update_latents_(
            W_enc=W_enc,
            W_dec=W_dec,
            b_enc=b_enc,
            b_dec=b_dec,
            moments=list(moments),
            scales=list(scales),
            screen=list(screen_tensors(screen, backend) or []),
            **_columns(terms, W_dec),
            decoder_pull=decoder_pull,
            db_enc=db_enc,
            added=list(added),
            lr=lr,
            step=step,
            grad_scale=grad_scale,
            skip=skip,
            optimizer=optimizer,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            clip_rows=clip_rows,
            unit_norm=unit_norm,
            pre_bias=pre_bias,
            norms_only=norms_only,
            seed=seed,
            first_latent=first_latent,
            backend=backend,
        )


def _columns(terms: Sequence[UpdateTerm], W_dec: Tensor) -> dict[str, Any]:
    """The terms as the raw op takes them, one list per field. An empty tensor stands for none."""
    for i, term in enumerate(terms):
        check_that.latents_of(term.codes, W_dec.shape[0])
        if term.dacts is not None:
            check_that.shape(f"terms[{i}].dacts", term.dacts, term.codes.acts.shape, ", that of codes.acts")
    codes = [term.codes.flatten() for term in terms]
    fixed, computed = W_dec.new_empty(0, dtype=torch.int64), W_dec.new_empty(0)
    return {
        "acts": [code.acts.detach() for code in codes],
        "indices": [code.indices for code in codes],
        "offsets": [fixed if code.offsets is None else code.offsets for code in codes],
        "dacts": [
            computed if term.dacts is None else term.dacts.detach().reshape(code.acts.shape)
            for term, code in zip(terms, codes, strict=True)
        ],
        "xs": [term.x.detach() for term in terms],
        "grads": [term.grad.detach() for term in terms],
        "has_bias": [term.has_bias for term in terms],
    }


def _fake(call: UpdateArguments) -> Tensor:
    return call.W_dec.new_empty(4, dtype=torch.float64)


# -- checks -----------------------------------------------------------------------------------------------------------


def _check(call: UpdateArguments) -> None:
    check_that.optimizer(call.optimizer, (call.beta1, call.beta2), call.eps, call.weight_decay)
    _check_parameters(call)
    _check_moments(call)
    _check_numbers(call)
    _check_parts(call)
    _check_terms(call)


def _check_parameters(call: UpdateArguments) -> None:
    W_enc, W_dec = call.W_enc, call.W_dec
    check_that.dictionary("W_dec", W_dec)
    if W_enc is not None:
        check_that.dictionary("W_enc", W_enc)
        if W_enc.shape[0] != W_dec.shape[0]:
            raise ValueError(f"W_enc has {W_enc.shape[0]} latents and W_dec {W_dec.shape[0]}, expected equal numbers")
    check_that.shape("b_enc", call.b_enc, W_dec.shape[:1], ": one number per latent")
    check_that.shape("b_dec", call.b_dec, W_dec.shape[1:], ", the width of W_dec")
    for name, p in call.parameters().items():
        check_that.same_kind(name, p, "W_dec", W_dec)
        _check_written(name, p)
    if call.pre_bias and call.encoder.shape[1] != W_dec.shape[1]:
        raise ValueError("pre_bias subtracts b_dec from the input, so d_in must equal d_out; pass pre_bias=False")


def _check_written(name: str, t: Tensor) -> None:
    if not t.is_contiguous():
        raise ValueError(f"{name} is not contiguous, but is updated in place; pass a contiguous tensor")
    if t.is_inference() and not torch.is_inference_mode_enabled():  # torch would see it when all is written
        raise ValueError(f"{name} was made under torch.inference_mode, but is updated outside of it; pass .clone()")


def _check_moments(call: UpdateArguments) -> None:
    """The number and the dtypes of the moments, then each, and the scales of those in 8 bits."""
    moments, params, kept = call.moments, call.parameters(), MOMENTS_OF[call.optimizer]
    if len(moments) != len(kept) * len(params):
        whose = f"{' and '.join(kept)} of {', '.join(params)}" if kept else "it keeps none"
        raise ValueError(f"got {len(moments)} moments, expected {len(kept) * len(params)}: {whose}")
    weights = call.W_dec.dtype
    wide = torch.promote_types(weights, torch.float32)
    dtypes = {name: {m.dtype for m in moments[i * len(kept) :][: len(kept)]} for i, name in enumerate(params)}
    found = set().union(*dtypes.values())
    eight = all(dtypes[name] == {EIGHT_BIT if name.startswith("W") else wide} for name in params)
    if found and found not in ({torch.bfloat16}, {wide}) and not (eight and kept == "mv"):
        got = ", ".join(sorted(str(dtype) for dtype in found))
        raise TypeError(
            f"moments are {got}, expected all {wide} or all torch.bfloat16 for {weights} weights, or, for adam and "
            f"adamw, {EIGHT_BIT} for dictionaries and {wide} for biases"
        )
    for i, (name, p) in enumerate(params.items()):
        for which, moment in zip(kept, moments[i * len(kept) :], strict=False):
            _check_moment(f"moment {which} of {name}", moment, p, call.seed)
    _check_scales(call.scales, [m for m in moments if m.dtype == EIGHT_BIT])


def _check_moment(name: str, moment: Tensor, p: Tensor, seed: int | None) -> None:
    check_that.shape(name, moment, p.shape)
    if moment.dtype in (torch.bfloat16, EIGHT_BIT) and seed is None:
        kind = str(moment.dtype).removeprefix("torch.")
        raise ValueError(f"{name} is {kind}, which needs a seed for its stochastic rounding; pass seed=")
    _check_written(name, moment)
    check_that.same_device(name, moment, "its parameter", p)


def _check_scales(scales: list[Tensor], moments: list[Tensor]) -> None:
    if len(scales) != len(moments):
        raise ValueError(f"got {len(scales)} scales, expected {len(moments)}: one for each moment of {EIGHT_BIT}")
    for i, (scale, moment) in enumerate(zip(scales, moments, strict=True)):
        if scale.dtype != torch.float32 or tuple(scale.shape) != scales_shape(moment):
            raise ValueError(
                f"scales[{i}] is {scale.dtype} of shape {tuple(scale.shape)}, expected torch.float32 of shape "
                f"{scales_shape(moment)}: one for every {BLOCK} numbers of a row"
            )
        _check_written(f"scales[{i}]", scale)
        check_that.same_device(f"scales[{i}]", scale, "its moment", moment)


def _check_numbers(call: UpdateArguments) -> None:
    if call.clip_rows is not None and not call.clip_rows > 0:
        raise ValueError(f"clip_rows is {call.clip_rows}, expected a norm > 0, or None for no clipping")
    if call.first_latent < 0:
        raise ValueError(f"first_latent is {call.first_latent}, expected the number of a latent, 0 or more")
    for name, number, dtype in (
        ("lr", call.lr, torch.float64),
        ("step", call.step, torch.int64),
        ("grad_scale", call.grad_scale, torch.float64),
        ("skip", call.skip, torch.bool),
    ):
        if number is None:
            continue
        if number.shape != () or number.dtype != dtype:
            raise ValueError(f"{name} is {number.dtype} of shape {tuple(number.shape)}, expected a 0-d {dtype} tensor")
        check_that.same_device(name, number, "W_dec", call.W_dec)


def _check_parts(call: UpdateArguments) -> None:
    """What adds to the gradients of the terms."""
    latents, d_out = call.W_dec.shape
    if (pull := call.decoder_pull) is not None:
        if pull.ndim != 2 or pull.shape[0] != latents or pull.shape[1] < 1 or d_out % pull.shape[1]:
            raise ValueError(
                f"decoder_pull has shape {tuple(pull.shape)}, expected ({latents}, L) with L dividing {d_out}, the "
                "width of W_dec"
            )
        _check_gradient("decoder_pull", pull, call.W_dec)
    if call.db_enc is not None:
        check_that.shape("db_enc", call.db_enc, (latents,), ", that of b_enc")
        _check_gradient("db_enc", call.db_enc, call.W_dec)
    wanted = {} if call.W_enc is None else {"dW_enc": call.W_enc.shape}
    wanted |= {"dW_dec": call.W_dec.shape, "dpre": call.W_dec.shape[:1]}
    if len(call.added) not in (0, len(wanted)):
        raise ValueError(f"got {len(call.added)} tensors in added, expected none or {len(wanted)}: {', '.join(wanted)}")
    for i, (t, (name, size)) in enumerate(zip(call.added, wanted.items(), strict=False)):
        check_that.shape(f"added[{i}], {name},", t, size)
        _check_gradient(f"added[{i}]", t, call.W_dec)


def _check_gradient(name: str, t: Tensor, W_dec: Tensor) -> None:
    """A dtype narrower than the weights', as from autocast, is widened before it is read."""
    check_that.same_device(name, t, "W_dec", W_dec)
    check_that.floating(name, t)
    if torch.promote_types(t.dtype, torch.float32) != torch.promote_types(W_dec.dtype, torch.float32):
        raise TypeError(f"{name} is {t.dtype} but W_dec has {W_dec.dtype}; cast with .to({W_dec.dtype})")


def _check_terms(call: UpdateArguments) -> None:
    columns = ("acts", "indices", "offsets", "dacts", "xs", "grads", "has_bias")
    counts = {name: len(getattr(call, name)) for name in columns}
    if len(set(counts.values())) > 1:
        got = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"got {got}, expected equal numbers of each")
    for i, (term, dacts) in enumerate(zip(call.terms(), call.dacts, strict=True)):
        of = f"terms[{i}]"
        check_that.code(term.acts, term.indices, term.offsets, f"{of}.codes.")
        _check_gradient(f"{of}.codes.acts", term.acts, call.W_dec)
        n = check_that.code_tokens(term.acts, term.offsets)
        widths = {"x": (term.x, call.encoder.shape[1]), "grad": (term.grad, call.W_dec.shape[1])}
        for name, (t, width) in widths.items():
            check_that.shape(f"{of}.{name}", t, (n, width))
            check_that.same_kind(f"{of}.{name}", t, f"{of}.codes.acts", term.acts)
        if dacts.numel():
            check_that.shape(f"{of}.dacts", dacts, term.acts.shape, ", that of codes.acts, or none")
        _check_gradient(f"{of}.dacts", dacts, call.W_dec)


def _check_values(call: UpdateArguments) -> None:
    if call.step.device.type == "cpu" and int(call.step) < 1:
        raise ValueError(f"step is {int(call.step)}, expected >= 1: the count includes this step")
    for term in call.terms():
        check_that.code_inside(term.indices, term.offsets, call.W_dec.shape[0])
    _check_apart(call)


def _check_apart(call: UpdateArguments) -> None:
    """Checks that written arguments share no memory with another one: a new row would be read as an old one."""
    places = []
    for field in fields(call):
        value = getattr(call, field.name)
        for i, t in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(t, Tensor) and t.numel():
                name = f"{field.name}[{i}]" if isinstance(value, list) else field.name
                places.append((t.data_ptr(), t.data_ptr() + t.nbytes, field.name in WRITTEN, name))
    # By address: the memory that reaches furthest so far, and the written memory that does.
    furthest = written = (0, 0, False, "")
    for place in sorted(places):
        before = furthest if place[2] else written
        if place[0] < before[1]:
            raise ValueError(
                f"{before[3]} and {place[3]} share memory, and one of them is updated in place; pass .clone() of one"
            )
        furthest = max(furthest, place, key=itemgetter(1))
        written = max(written, place, key=itemgetter(1)) if place[2] else written


# offsets[i] of a fixed-K term, and dacts[i] where the acts' gradients are computed inside, are empty tensors; scales,
# screen and added are empty lists where there are none.
define(
    "update_latents_",
    "(Tensor(a!)? W_enc, Tensor(b!) W_dec, Tensor(c!) b_enc, Tensor(d!) b_dec, Tensor(e!)[] moments, "
    "Tensor(f!)[] scales, Tensor(g!)[] screen, Tensor[] acts, Tensor[] indices, Tensor[] offsets, Tensor[] dacts, "
    "Tensor[] xs, Tensor[] grads, bool[] has_bias, Tensor? decoder_pull, Tensor? db_enc, Tensor[] added, Tensor lr, "
    "Tensor step, Tensor? grad_scale, Tensor? skip, str optimizer, float beta1, float beta2, float eps, "
    "float weight_decay, float? clip_rows, bool unit_norm, bool pre_bias, bool norms_only, int? seed, "
    "int first_latent, str? backend) -> Tensor",
    fake=_fake,
    check=_check,
    check_values=_check_values,
    mutates=WRITTEN,
    bundle=UpdateArguments,
)
