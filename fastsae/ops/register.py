"""torch.ops.fastsae.*: the raw ops, plain tensors in and out, with fake kernels and autocast rules.

Each op hands its arguments to the backend that fastsae.backends.choose picks at run time, so a compiled graph holds one
opaque call. Everything here is flat: x (N, D), fixed codes (N, K), ragged codes (capacity,) with offsets (N+1,).
Public callers use fastsae.ops, which says what is wrong in more words; what keeps a backend from touching memory that
is not there is checked for every call (fastsae.ops.raw_checks), on a GPU as far as it costs no host sync.

Autocast: the ops run in the weights' dtype. x and acts are cast to W's dtype (x to that of acts where there is no W),
weights never. Backends see contiguous tensors only; what is not, is copied first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.backends import choose
from fastsae.ops.raw_checks import check_call

_CODE = "Tensor acts, Tensor indices, Tensor? offsets"

SCHEMAS = {
    "encode_topk": "(Tensor x, Tensor W, Tensor b, SymInt k, Tensor? rows, Tensor? scale, SymInt index_offset, "
    "Tensor[]? screen, str precision, str? backend) -> (Tensor acts, Tensor indices, Tensor redone)",
    "encode_above": "(Tensor x, Tensor W, Tensor b, Tensor threshold, SymInt capacity, Tensor[]? screen, "
    "str precision, str? backend) -> (Tensor acts, Tensor indices, Tensor offsets, Tensor overflow, Tensor redone)",
    "encode_batch_topk": "(Tensor x, Tensor W, Tensor b, SymInt k, Tensor[]? screen, str precision, str? backend) "
    "-> (Tensor acts, Tensor indices, Tensor offsets, Tensor redone)",
    "decode": f"({_CODE}, Tensor W, str? backend) -> Tensor",
    "decode_error": f"({_CODE}, Tensor W, Tensor target, Tensor? bias, str? backend) -> (Tensor error, Tensor squares)",
    "active_dot": f"(Tensor x, {_CODE}, Tensor W, str? backend) -> Tensor",
    "active_outer": f"({_CODE}, Tensor x, SymInt d_sae, Tensor[]? by_latent, str? backend) -> Tensor",
    "by_latent": f"({_CODE}, SymInt d_sae, str? backend) -> (Tensor offsets, Tensor tokens, Tensor slots)",
    # offsets[i] of a fixed-K term, and dacts[i] where the acts' gradients are computed inside, are empty tensors;
    # scales, screen and added are empty lists where there are none.
    "update_latents_": "(Tensor(a!)? W_enc, Tensor(b!) W_dec, Tensor(c!) b_enc, Tensor(d!) b_dec, "
    "Tensor(e!)[] moments, Tensor(f!)[] scales, Tensor(g!)[] screen, Tensor[] acts, Tensor[] indices, "
    "Tensor[] offsets, Tensor[] dacts, Tensor[] xs, Tensor[] grads, bool[] has_bias, Tensor? decoder_pull, "
    "Tensor? db_enc, Tensor[] added, Tensor lr, Tensor step, Tensor? grad_scale, Tensor? skip, str optimizer, "
    "float beta1, float beta2, float eps, float weight_decay, float? clip_rows, bool unit_norm, bool pre_bias, "
    "bool norms_only, int? seed, str? backend) -> Tensor",
}


# -- fake kernels: shapes and dtypes only -----------------------------------------------------------------------------


def _ints(like: Tensor, *shape: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    return like.new_empty(shape, dtype=dtype)


def _fake_encode_topk(x, W, b, k, rows, scale, index_offset, screen, precision, backend):
    n = x.shape[0]
    return x.new_empty(n, k), _ints(x, n, k, dtype=torch.int32), _ints(x)


def _fake_encode_above(x, W, b, threshold, capacity, screen, precision, backend):
    acts, indices = x.new_empty(capacity), _ints(x, capacity, dtype=torch.int32)
    return acts, indices, _ints(x, x.shape[0] + 1), _ints(x, dtype=torch.bool), _ints(x)


def _fake_encode_batch_topk(x, W, b, k, screen, precision, backend):
    n = x.shape[0]
    return x.new_empty(n * k), _ints(x, n * k, dtype=torch.int32), _ints(x, n + 1), _ints(x)


def _fake_decode(acts, indices, offsets, W, backend):
    return W.new_empty(acts.shape[0] if offsets is None else offsets.shape[0] - 1, W.shape[1])


def _fake_decode_error(acts, indices, offsets, W, target, bias, backend):
    return target.new_empty(target.shape), target.new_empty(target.shape[0], dtype=torch.float64)


def _fake_active_dot(x, acts, indices, offsets, W, backend):
    return acts.new_empty(acts.shape)


def _fake_active_outer(acts, indices, offsets, x, d_sae, by_latent, backend):
    return x.new_empty(d_sae, x.shape[1])


def _fake_by_latent(acts, indices, offsets, d_sae, backend):
    size = acts.numel()
    return _ints(acts, d_sae + 1), _ints(acts, size, dtype=torch.int32), _ints(acts, size)


def _fake_update_latents_(*args):
    return args[1].new_empty(4, dtype=torch.float64)


# -- real kernels: check what is about to be used as an address, then dispatch ----------------------------------------

_MUTATED = ("W_enc", "W_dec", "b_enc", "b_dec", "moments", "scales", "screen")


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(item for item in value if isinstance(item, Tensor))
    return found


def _contiguous(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.contiguous()
    if isinstance(value, (list, tuple)):
        return [_contiguous(item) for item in value]
    return value


def _define(op: str, fake: Callable[..., Any], cast: tuple[str, ...] = (), to: str = "W") -> Any:
    mutated = _MUTATED if op == "update_latents_" else ()

    def run(*args: Any) -> Any:
        given = {n: v if n in mutated else _contiguous(v) for n, v in zip(names, args, strict=True)}
        check_call(op, given)
        backend = given.pop("backend")
        info = {n: v for n, v in given.items() if isinstance(v, (int, float, str))}
        module = choose(op, backend, *_tensors(list(given.values())), **info)
        return getattr(module, op)(*given.values())

    def autocast(*args: Any) -> Any:
        given = dict(zip(names, args, strict=True))
        dtype, device = given[to].dtype, given[to].device.type
        with torch.autocast(device, enabled=False):
            return raw(*(v.to(dtype) if n in cast else v for n, v in given.items()))

    custom = torch.library.custom_op(f"fastsae::{op}", run, mutates_args=mutated, schema=SCHEMAS[op])
    custom.register_fake(fake)
    raw = getattr(torch.ops.fastsae, op).default
    names = [argument.name for argument in raw._schema.arguments]
    if cast:
        for device in ("CPU", "CUDA"):
            _LIBRARY.impl(op, autocast, f"Autocast{device}")
    return custom


_LIBRARY = torch.library.Library("fastsae", "FRAGMENT")


encode_topk = _define("encode_topk", _fake_encode_topk, cast=("x",))
encode_above = _define("encode_above", _fake_encode_above, cast=("x",))
encode_batch_topk = _define("encode_batch_topk", _fake_encode_batch_topk, cast=("x",))
decode = _define("decode", _fake_decode, cast=("acts",))
decode_error = _define("decode_error", _fake_decode_error, cast=("acts", "target"))
active_dot = _define("active_dot", _fake_active_dot, cast=("x", "acts"))
active_outer = _define("active_outer", _fake_active_outer, cast=("x",), to="acts")
by_latent = _define("by_latent", _fake_by_latent)
update_latents_ = _define("update_latents_", _fake_update_latents_)
