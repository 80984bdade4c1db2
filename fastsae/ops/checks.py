"""What the ops refuse, and the words for it: what was got, what was expected, what to do. No check costs a host sync
unless its docstring says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsae.codes import SparseCodes, UpdateTerm
from fastsae.reference import BLOCK, MOMENTS_OF, scales_shape

EIGHT_BIT = torch.float8_e4m3fn
PRECISIONS = ("exact", "screened", "fp32")
MOST = 2**31 - 1
"""Tokens and latents are counted in int32."""


def fits_int32(name: str, n: int) -> None:
    if n > MOST:
        raise ValueError(f"{name} is {n}, expected at most {MOST}: tokens and latents are counted in int32")


def dictionary(name: str, W: Tensor) -> None:
    if W.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(W.shape)}, expected (M, D): one latent per row")
    fits_int32(f"the number of rows of {name}", W.shape[0])
    if not W.is_floating_point():
        raise TypeError(f"{name} has dtype {W.dtype}, expected a floating dtype: float32, bfloat16, float64, float16")


def same_kind(name: str, t: Tensor, other_name: str, other: Tensor, castable: bool = False) -> None:
    """Same dtype and device. castable: autocast will see to the dtype of t, where it is on."""
    if t.dtype != other.dtype and not (castable and torch.is_autocast_enabled(t.device.type)):
        raise TypeError(
            f"{name} has dtype {t.dtype} but {other_name} has {other.dtype}; cast with {name}.to({other.dtype}), or "
            "run under autocast, which casts inputs to the weights' dtype"
        )
    same_device(name, t, other_name, other)


def same_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.device != other.device:
        raise ValueError(f"{name} is on {t.device} but {other_name} is on {other.device}; move one with .to(...)")


def rows(name: str, x: Tensor, other_name: str, W: Tensor) -> None:
    """x (*batch, D) against W (M, D)."""
    if x.ndim < 2:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected (*batch, {W.shape[1]}); for one token pass {name}[None]"
        )
    if x.shape[-1] != W.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and {other_name} {tuple(W.shape)}, expected the same last dimension "
            f"({x.shape[-1]} != {W.shape[1]}); dictionaries are stored (M, D), one latent per row"
        )
    fits_int32(f"the number of tokens of {name}", x.shape[:-1].numel())
    same_kind(name, x, other_name, W, castable=True)


def vector(name: str, v: Tensor, W: Tensor) -> None:
    """One number per latent."""
    if v.shape != W.shape[:1]:
        raise ValueError(f"{name} has shape {tuple(v.shape)}, expected ({W.shape[0]},): one number per latent of W")
    same_kind(name, v, "W", W)


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {list(allowed)}")


def k_fits(k: int, most: int, what: str) -> None:
    if not 1 <= k <= most:
        raise ValueError(f"k is {k}, expected 1 <= k <= {most}, the size of {what}")


def offset(index_offset: int, W: Tensor) -> None:
    if index_offset < 0:
        raise ValueError(f"index_offset is {index_offset}, expected 0 or more")
    fits_int32("index_offset + M", index_offset + W.shape[0])


def latent_rows(rows: Tensor, W: Tensor) -> None:
    """Which latents they name is checked by the raw op (fastsae.ops.raw_checks)."""
    if rows.dtype != torch.int32 or rows.ndim != 1:
        got = f"{rows.dtype} of shape {tuple(rows.shape)}"
        raise ValueError(f"rows are {got}, expected torch.int32 of shape (capacity,)")
    same_device("rows", rows, "W", W)


def no_nan(name: str, x: Tensor) -> None:
    """Costs a host sync."""
    bad = ~x.isfinite()
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name} holds {int(bad.sum())} values that are NaN or infinite, the first at {where}; expected finite "
            "activations; drop those rows, or pass check=False to let them propagate"
        )


def threshold(threshold: Tensor | float, x: Tensor, W: Tensor) -> Tensor:
    """The threshold as a tensor of shape (), (M,) or (N, 1) in the dtype that scores are computed in."""
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    if not isinstance(threshold, Tensor):
        return torch.full((), float(threshold), dtype=wide, device=W.device)
    same_device("threshold", threshold, "W", W)
    threshold = threshold.detach().to(wide)
    if threshold.ndim == 0 or threshold.shape == W.shape[:1]:
        return threshold
    if threshold.shape == (*x.shape[:-1], 1):
        return threshold.reshape(-1, 1)
    raise ValueError(
        f"threshold has shape {tuple(threshold.shape)}, expected a number, ({W.shape[0]},) for one per latent, or "
        f"{(*x.shape[:-1], 1)} for one per token"
    )


def tokens(name: str, x: Tensor, codes: SparseCodes) -> None:
    if tuple(x.shape[:-1]) != tuple(codes.batch_shape):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected (*batch, D) with the codes' batch "
            f"{tuple(codes.batch_shape)}; use codes.with_batch(...) or reshape"
        )


def codes(codes: SparseCodes, W: Tensor, d_sae: int | None = None, name: str = "W") -> None:
    """Codes against their dictionary W (M, D), or, with d_sae, against a width."""
    if W.ndim < 2:
        raise ValueError(f"{name} has shape {tuple(W.shape)}, expected two dimensions or more")
    width = W.shape[0] if d_sae is None else d_sae
    fits_int32("d_sae", width)
    fits_int32("the number of tokens of the codes", codes.n_tokens)
    if codes.d_sae != width:
        raise ValueError(f"codes have d_sae = {codes.d_sae}, expected {width}, the latents of their dictionary")
    if codes.indices.dtype != torch.int32:
        raise TypeError(f"codes.indices have dtype {codes.indices.dtype}, expected torch.int32; use .int()")
    same_kind("codes.acts", codes.acts, name, W, castable=True)
    same_device("codes.indices", codes.indices, name, W)


def optimizer(kind: str, betas: tuple[float, float], eps: float, weight_decay: float = 0.0) -> None:
    """An optimizer's settings. Raises ValueError."""
    one_of("optimizer", kind, tuple(MOMENTS_OF))
    if not (eps >= 0 and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
        raise ValueError(f"betas {betas}, eps {eps}: expected 0 <= beta < 1 and eps >= 0")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay}, expected a number >= 0")
    if kind == "adam" and weight_decay:
        raise ValueError(
            f"weight_decay is {weight_decay} and optimizer 'adam', which has none; pass optimizer='adamw' for decay "
            "apart from the gradient"
        )


def update(
    W_enc: Tensor | None,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    moments: Sequence[Tensor],
    lr: Tensor,
    step: Tensor,
    pre_bias: bool,
    seed: int | None,
    optimizer: str = "adam",
    scales: Sequence[Tensor] = (),
) -> None:
    """What `update_latents_` writes, and its numbers."""
    dictionary("W_dec", W_dec)
    params = {"W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec}
    if W_enc is not None:
        dictionary("W_enc", W_enc)
        params = {"W_enc": W_enc, **params}
        if W_enc.shape[0] != W_dec.shape[0]:
            raise ValueError(f"W_enc has {W_enc.shape[0]} latents and W_dec {W_dec.shape[0]}, expected as many")
    vector("b_enc", b_enc, W_dec)
    if b_dec.shape != W_dec.shape[1:]:
        raise ValueError(f"b_dec has shape {tuple(b_dec.shape)}, expected ({W_dec.shape[1]},), the width of W_dec")
    for name, p in params.items():
        same_kind(name, p, "W_dec", W_dec)
        if not p.is_contiguous():
            raise ValueError(f"{name} is not contiguous, and it is updated in place; pass a contiguous tensor")
    _moments(moments, params, MOMENTS_OF[optimizer], seed)
    _scales(scales, [m for m in moments if m.dtype == EIGHT_BIT])
    if pre_bias and (W_dec if W_enc is None else W_enc).shape[1] != W_dec.shape[1]:
        raise ValueError("pre_bias subtracts b_dec from the input, so d_in must equal d_out; pass pre_bias=False")
    if lr.shape != () or lr.dtype != torch.float64:
        raise ValueError(f"lr is {lr.dtype} of shape {tuple(lr.shape)}, expected a 0-d torch.float64 tensor")
    if step.shape != () or step.dtype != torch.int64:
        raise ValueError(f"step is {step.dtype} of shape {tuple(step.shape)}, expected a 0-d torch.int64 tensor")
    for name, number in (("lr", lr), ("step", step)):
        same_device(name, number, "W_dec", W_dec)


def _moments(moments: Sequence[Tensor], params: dict[str, Tensor], kept: str, seed: int | None) -> None:
    """kept: the optimizer's moments of a parameter, a letter each."""
    if len(moments) != len(kept) * len(params):
        whose = f"{' and '.join(kept)} of {', '.join(params)}" if kept else "it keeps none"
        raise ValueError(f"got {len(moments)} moments, expected {len(kept) * len(params)}: {whose}")
    weights = params["W_dec"].dtype
    wide = torch.promote_types(weights, torch.float32)
    dtypes = {name: {m.dtype for m in moments[i * len(kept) :][: len(kept)]} for i, name in enumerate(params)}
    found = set().union(*dtypes.values())
    eight = all(dtypes[name] == {EIGHT_BIT if name.startswith("W") else wide} for name in params)
    if found and found not in ({torch.bfloat16}, {wide}) and not (eight and kept == "mv"):
        got = ", ".join(sorted(str(dtype) for dtype in found))
        raise TypeError(
            f"moments are {got}, expected all {wide} or all torch.bfloat16 for {weights} weights, or, of adam and "
            f"adamw, the dictionaries' {EIGHT_BIT} and the biases' {wide}"
        )
    for i, name in enumerate(params):
        for which, moment in zip(kept, moments[i * len(kept) :], strict=False):
            _moment(f"{which} of {name}", moment, params[name], seed)


def _moment(name: str, moment: Tensor, p: Tensor, seed: int | None) -> None:
    if moment.shape != p.shape:
        raise ValueError(f"moment {name} has shape {tuple(moment.shape)}, expected {tuple(p.shape)}")
    if moment.dtype in (torch.bfloat16, EIGHT_BIT) and seed is None:
        kind = str(moment.dtype).removeprefix("torch.")
        raise ValueError(f"moment {name} is {kind}, which needs a seed for its stochastic rounding; pass seed=")
    if not moment.is_contiguous():
        raise ValueError(f"moment {name} is not contiguous, and it is updated in place; pass a contiguous tensor")
    same_device(f"moment {name}", moment, "its parameter", p)


def _scales(scales: Sequence[Tensor], moments: Sequence[Tensor]) -> None:
    """The scales of the 8-bit moments."""
    if len(scales) != len(moments):
        raise ValueError(f"got {len(scales)} scales, expected {len(moments)}: one for each moment of {EIGHT_BIT}")
    for i, (scale, moment) in enumerate(zip(scales, moments, strict=True)):
        if scale.dtype != torch.float32 or tuple(scale.shape) != scales_shape(moment):
            raise ValueError(
                f"scales[{i}] is {scale.dtype} of shape {tuple(scale.shape)}, expected torch.float32 of shape "
                f"{scales_shape(moment)}: one for every {BLOCK} numbers of a row"
            )
        if not scale.is_contiguous():
            raise ValueError(f"scales[{i}] is not contiguous, and it is updated in place; pass a contiguous tensor")
        same_device(f"scales[{i}]", scale, "its moment", moment)


def update_parts(
    W_enc: Tensor | None,
    W_dec: Tensor,
    decoder_pull: Tensor | None,
    db_enc: Tensor | None,
    added: Sequence[Tensor],
    clip_rows: float | None,
    grad_scale: Tensor | None,
) -> None:
    """What `update_latents_` adds to the gradients of its terms, and does to them before the optimizer."""
    latents, d_out = W_dec.shape
    if decoder_pull is not None:
        shape = tuple(decoder_pull.shape)
        if len(shape) != 2 or shape[0] != latents or shape[1] < 1 or d_out % shape[1]:
            raise ValueError(
                f"decoder_pull has shape {shape}, expected ({latents}, L) with L dividing {d_out}, the width of W_dec"
            )
        _gradient("decoder_pull", decoder_pull, W_dec)
    if db_enc is not None:
        if tuple(db_enc.shape) != (latents,):
            raise ValueError(f"db_enc has shape {tuple(db_enc.shape)}, expected ({latents},), that of b_enc")
        _gradient("db_enc", db_enc, W_dec)
    wanted = {} if W_enc is None else {"dW_enc": tuple(W_enc.shape)}
    wanted |= {"dW_dec": (latents, d_out), "dpre": (latents,)}
    if len(added) not in (0, len(wanted)):
        raise ValueError(f"got {len(added)} tensors in added, expected none or {len(wanted)}: {', '.join(wanted)}")
    for i, (t, (name, size)) in enumerate(zip(added, wanted.items(), strict=False)):
        if tuple(t.shape) != size:
            raise ValueError(f"added[{i}], {name}, has shape {tuple(t.shape)}, expected {size}")
        _gradient(f"added[{i}]", t, W_dec)
    if clip_rows is not None and not clip_rows > 0:
        raise ValueError(f"clip_rows is {clip_rows}, expected a norm > 0, or None for no clipping")
    if grad_scale is not None:
        if grad_scale.shape != () or grad_scale.dtype != torch.float64:
            got = f"{grad_scale.dtype} of shape {tuple(grad_scale.shape)}"
            raise ValueError(f"grad_scale is {got}, expected a 0-d torch.float64 tensor")
        same_device("grad_scale", grad_scale, "W_dec", W_dec)


def _gradient(name: str, t: Tensor, W: Tensor) -> None:
    """A part of a gradient of W's: narrower ones are widened before they are read, those of autocast for instance."""
    same_device(name, t, "W_dec", W)
    if not t.is_floating_point() or torch.promote_types(t.dtype, torch.float32) != torch.promote_types(
        W.dtype, torch.float32
    ):
        raise TypeError(f"{name} is {t.dtype} but W_dec has {W.dtype}; cast with .to({W.dtype})")


def update_term(name: str, term: UpdateTerm, W_enc: Tensor, W_dec: Tensor) -> None:
    """One of the terms that `update_latents_` reads. W_enc: W_dec where they are tied."""
    codes(term.codes, W_dec)
    n = term.codes.n_tokens
    for what, t, width in (("x", term.x, W_enc.shape[1]), ("grad", term.grad, W_dec.shape[1])):
        if tuple(t.shape) != (n, width):
            raise ValueError(f"{name}.{what} has shape {tuple(t.shape)}, expected ({n}, {width})")
        same_kind(f"{name}.{what}", t, f"{name}.codes.acts", term.codes.acts)
    if term.dacts is not None:
        shape = tuple(term.codes.acts.shape)
        if tuple(term.dacts.shape) != shape:
            raise ValueError(f"{name}.dacts has shape {tuple(term.dacts.shape)}, expected {shape}, that of codes.acts")
        _gradient(f"{name}.dacts", term.dacts, W_dec)
