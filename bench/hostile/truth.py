"""Whether what a raw op returned is right: float64 arithmetic in NumPy on the arguments as they were.

|got - truth| <= (32 + D) · u · magnitude + u_out · |truth|, the magnitude being the same sum of absolute values, u
float32's unit roundoff (float64's for float64). Sums that are past what float32 holds have no truth: they are passed
over, and so are those with an infinite number in them, which may be NaN by one order of summation and not by another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.hostile.calls import Call
from bench.hostile.spoil import AUTOCAST

Array = NDArray[Any]
MOST = 1e37
"""A sum of float32 numbers past this may have been infinite on the way."""
TINY = 1e-36
"""Below this float32 loses digits."""
CAST = {
    "encode_topk": ("x",), "encode_above": ("x",), "encode_batch_topk": ("x",), "decode": ("acts",),
    "decode_error": ("acts", "target"), "active_dot": ("x", "acts"), "active_outer": ("x",), "by_latent": (),
    "update_latents_": (),
}  # fmt: skip
"""What autocast casts, to the dtype of W, or of acts in active_outer."""


def array(t: Tensor) -> Array:
    """The values of t, in float64 if they are floating."""
    t = t.detach().as_subclass(Tensor).resolve_neg().resolve_conj()
    if t.layout != torch.strided:
        t = t.to_dense()
    return t.to(torch.float64).numpy() if t.is_floating_point() else t.numpy()


def is_finite(t: Tensor) -> bool:
    return not t.is_floating_point() or bool(np.isfinite(array(t)).all())


def roundoff(dtype: torch.dtype) -> float:
    return {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[dtype]


def as_cast(call: Call) -> dict[str, Any]:
    """The arguments after autocast, if it is on."""
    given = dict(call.arguments)
    if call.setting in AUTOCAST and CAST[call.op]:
        to = given["acts" if call.op == "active_outer" else "W"].dtype
        given |= {name: given[name].to(to) for name in CAST[call.op]}
    return given


class Wrong(Exception):
    """What is wrong with a result."""


def require(right: Any, what: str) -> None:
    if not bool(right):
        raise Wrong(what)


def near(what: str, got: Array, truth: Array, magnitude: Array, dtype: torch.dtype, D: int, loose: float = 0) -> None:
    """got of `dtype` is as near to the truth as a sum of D products; loose: a share of the magnitude more."""
    require(got.shape == truth.shape, f"{what} has shape {got.shape}, expected {truth.shape}")
    u, out = roundoff(torch.float64 if dtype == torch.float64 else torch.float32), roundoff(dtype)
    most = 6e4 if dtype == torch.float16 else MOST
    tiny = 1e-7 if dtype == torch.float16 else TINY
    with np.errstate(invalid="ignore", over="ignore"):
        known = (np.abs(magnitude) < most) & np.isfinite(truth)
        off = np.abs(got - truth) - ((32 + D) * u + loose) * magnitude - 2 * out * np.abs(truth) - tiny
        wrong = known & ~(off <= 0)
        require(not wrong.any(), f"{what} is {got[wrong][:3]}, expected {truth[wrong][:3]}")
    lost = np.isnan(truth) & np.isnan(magnitude)
    require(np.isnan(got[lost]).all(), f"{what} is a number where the truth is NaN")


# -- the products ------------------------------------------------------------------------------------------------------


def slots(given: dict[str, Any]) -> tuple[Array, Array, Array, int]:
    """Token and latent of each slot, whether it is occupied, and the tokens of the code."""
    acts, indices, offsets = array(given["acts"]), array(given["indices"]), given["offsets"]
    if offsets is None:
        n, k = acts.shape
        return np.repeat(np.arange(n), k), indices.ravel(), acts.ravel() != 0, n
    starts = array(offsets)
    owned = np.arange(acts.shape[0])
    return np.searchsorted(starts, owned, side="right") - 1, indices, owned < starts[-1], len(starts) - 1


def gathered(given: dict[str, Any], weights: Array, rows: Array, to: Array, frm: Array, used: Array, n: int) -> Array:
    """out[to] += weights · rows[frm] over the used slots."""
    out = np.zeros((n, rows.shape[1]))
    with np.errstate(invalid="ignore", over="ignore"):
        np.add.at(out, to[used], weights[used, None] * rows[frm[used]])
    return out


def decode(given: dict[str, Any], result: Tensor) -> None:
    near("the reconstruction", array(result), *_decoded(given), given["W"].dtype, _length(given))


def _length(given: dict[str, Any]) -> int:
    """Products in the longest sum over slots."""
    return given["acts"].numel()


def _decoded(given: dict[str, Any]) -> tuple[Array, Array]:
    tokens, latents, used, n = slots(given)
    weights, W = array(given["acts"]).ravel(), array(given["W"])
    used = used & (weights != 0)
    return (
        gathered(given, weights, W, tokens, latents, used, n),
        gathered(given, np.abs(weights), np.abs(W), tokens, latents, used, n),
    )


def decode_error(given: dict[str, Any], result: tuple[Tensor, Tensor]) -> None:
    recon, magnitude = _decoded(given)
    target, bias = array(given["target"]), 0.0 if given["bias"] is None else array(given["bias"])
    error, dtype = recon + bias - target, given["W"].dtype
    magnitude = magnitude + np.abs(bias) + np.abs(target)
    near("the error", array(result[0]), error, magnitude, dtype, _length(given), 3 * roundoff(dtype))
    each = ((40 + _length(given)) * roundoff(torch.float32) + 4 * roundoff(dtype)) * magnitude
    with np.errstate(invalid="ignore", over="ignore"):
        known = magnitude.max(-1, initial=0) < 1e15
        off = np.abs(array(result[1]) - (error**2).sum(-1)) - (2 * np.abs(error) * each + each**2).sum(-1)
        require(not (known & ~(off <= 1e-4 * (error**2).sum(-1) + TINY)).any(), "the squares are wrong")


def active_dot(given: dict[str, Any], result: Tensor) -> None:
    tokens, latents, used, _ = slots(given)
    x, W, got = array(given["x"]), array(given["W"]), array(result).ravel()
    with np.errstate(invalid="ignore", over="ignore"):
        truth = (x[tokens[used]] * W[latents[used]]).sum(-1)
        magnitude = np.abs(x[tokens[used]] * W[latents[used]]).sum(-1)
    near("the dots", got[used], truth, magnitude, given["acts"].dtype, x.shape[1])
    require((got[~used] == 0).all(), "an empty slot has a dot product")


def active_outer(given: dict[str, Any], result: Tensor) -> None:
    tokens, latents, used, _ = slots(given)
    weights, x, M = array(given["acts"]).ravel(), array(given["x"]), int(given["d_sae"])
    used = used & (weights != 0)
    near(
        "the sums",
        array(result),
        gathered(given, weights, x, latents, tokens, used, M),
        gathered(given, np.abs(weights), np.abs(x), latents, tokens, used, M),
        given["x"].dtype,
        _length(given),
    )


def by_latent(given: dict[str, Any], result: tuple[Tensor, Tensor, Tensor]) -> None:
    tokens, latents, used, _ = slots(given)
    M, places = int(given["d_sae"]), np.flatnonzero(used)
    order = places[np.argsort(latents[places], kind="stable")]
    offsets, of_token, of_slot = (array(t) for t in result)
    expected = np.concatenate([[0], np.cumsum(np.bincount(latents[places], minlength=M))])
    require((offsets == expected).all(), "the offsets are wrong")
    require((of_slot[: len(order)] == order).all(), "the slots are wrong")
    require((of_token[: len(order)] == tokens[order]).all(), "the tokens are wrong")


# -- the encoders ------------------------------------------------------------------------------------------------------


def _scores(given: dict[str, Any]) -> tuple[Array, Array, Array]:
    """Pre-acts (N, M), their magnitudes, and the tokens whose scores have a truth."""
    x, W, b = array(given["x"]), array(given["W"]), array(given["b"])
    with np.errstate(invalid="ignore", over="ignore"):
        pre, magnitude = x @ W.T + b, np.abs(x) @ np.abs(W).T + np.abs(b)
        if given.get("scale") is not None:
            gate = array(given["scale"])
            pre, magnitude = pre * gate, magnitude * np.abs(gate)
    largest = {torch.float16: 6e4}.get(given["x"].dtype, MOST)
    known = np.isfinite(magnitude).all(-1) & (magnitude.max(-1, initial=0) < largest)
    return pre, magnitude, known & (np.abs(x).max(-1, initial=0) < MOST)


def _loose(given: dict[str, Any]) -> float:
    """precision="screened" trusts the narrow copy: 8 bits of the largest number of a row, times a row's width."""
    return 0.1 * given["x"].shape[1] ** 0.5 if given["precision"] == "screened" else 0.0


def encode_topk(given: dict[str, Any], result: tuple[Tensor, Tensor, Tensor]) -> None:
    acts, indices = array(result[0]), array(result[1])
    pre, magnitude, known = _scores(given)
    (n, M), k, offset, dtype = pre.shape, int(given["k"]), int(given["index_offset"]), given["x"].dtype
    require(acts.shape == (n, k) and indices.shape == (n, k), f"the code has shape {acts.shape}, expected {(n, k)}")
    rows = np.arange(M) if given["rows"] is None else array(given["rows"])
    rows = rows[rows >= 0]
    latents = indices.astype(np.int64) - offset
    require(((latents >= 0) & (latents < M)).all(), "an index is outside the dictionary")
    D, loose = given["x"].shape[1], _loose(given)
    considered, reach = pre[:, rows], magnitude.max(-1, initial=0)
    for t in np.flatnonzero(known):
        used = acts[t] != 0
        require((np.diff(latents[t][used]) > 0).all(), "indices do not ascend")
        require(not used.any() or used[: used.sum()].all(), "an empty slot comes before an occupied one")
        require((latents[t][~used] == M - 1).all(), "an empty slot has another index than the last")
        require(np.isin(latents[t][used], rows).all(), "a latent is not among the rows")
        best = np.sort(np.maximum(considered[t], 0))[::-1][:k]
        best = np.concatenate([best, np.zeros(k - len(best))])
        near("the acts", np.sort(acts[t])[::-1], best, np.full(k, reach[t]), dtype, D, loose)
        chosen = latents[t][used]
        near(
            "the acts at the indices",
            acts[t][used],
            np.maximum(pre[t, chosen], 0),
            magnitude[t, chosen],
            dtype,
            D,
            loose,
        )
    odd = np.isnan(array(given["x"])).any(-1) & (len(rows) >= k) & np.isfinite(array(given["W"])).all()
    require(np.isnan(acts[odd]).all(), "a token with a NaN has acts that are numbers")


def _ragged(given: dict[str, Any], result: tuple[Tensor, ...]) -> tuple[Array, Array, Array, Array]:
    """acts, latents, the token of each entry and offsets, well-formed."""
    acts, latents, offsets = (array(t) for t in result[:3])
    n, M = given["x"].shape[0], given["W"].shape[0]
    require(offsets.shape == (n + 1,) and offsets[0] == 0 and (np.diff(offsets) >= 0).all(), "the offsets do not rise")
    require(offsets[-1] <= len(acts) and len(acts) == len(latents), "the offsets end past the code")
    nnz = int(offsets[-1])
    require(((latents[:nnz] >= 0) & (latents[:nnz] < M)).all(), "an index is outside the dictionary")
    tokens = np.repeat(np.arange(n), np.diff(offsets))
    same = tokens[1:] == tokens[:-1]
    require((np.diff(latents[:nnz].astype(np.int64))[same] > 0).all(), "indices do not ascend within a token")
    return acts[:nnz], latents[:nnz], tokens, offsets


def encode_above(given: dict[str, Any], result: tuple[Tensor, ...]) -> None:
    acts, latents, tokens, offsets = _ragged(given, result)
    pre, magnitude, known = _scores(given)
    dtype, D, capacity = given["x"].dtype, given["x"].shape[1], int(given["capacity"])
    require(result[0].shape == (capacity,), f"the code has {result[0].shape} slots, expected {capacity}")
    bar, loose = np.broadcast_to(array(given["threshold"]), pre.shape), _loose(given)
    of = known[tokens]
    near("the acts", acts[of], pre[tokens, latents][of], magnitude[tokens, latents][of], dtype, D, loose)
    with np.errstate(invalid="ignore", over="ignore"):
        error = ((32 + D) * roundoff(torch.float64 if dtype == torch.float64 else torch.float32) + loose) * magnitude
        error = error + 4 * roundoff(torch.float32) * np.abs(bar) + TINY
        surely, maybe = ~(pre <= bar + error), ~(pre <= bar - error)
    found = np.zeros(pre.shape, bool)
    found[tokens, latents] = True
    checked = known & np.isfinite(bar).all(-1)
    require(not (found & ~maybe)[checked].any(), "a latent below its threshold is there")
    if not bool(result[3]):
        require(not (surely & ~found)[checked].any(), "a latent above its threshold is not there")
        if checked.all():
            require(surely.sum() <= capacity, "the code overflowed and does not say so")
    elif checked.all():
        require(maybe.sum() > capacity and offsets[-1] == capacity, "the code says that it overflowed, and did not")


def encode_batch_topk(given: dict[str, Any], result: tuple[Tensor, ...]) -> None:
    acts, latents, tokens, _ = _ragged(given, result)
    pre, magnitude, known = _scores(given)
    dtype, D, k = given["x"].dtype, given["x"].shape[1], int(given["k"])
    n = pre.shape[0]
    require(result[0].shape == (n * k,), f"the code has {result[0].shape} slots, expected {n * k}")
    if not known.all() or not np.isfinite(pre).all():
        return
    near("the acts", acts, pre[tokens, latents], magnitude[tokens, latents], dtype, D, _loose(given))
    best = np.sort(np.maximum(pre, 0).ravel())[::-1][: n * k]
    mine = np.concatenate([np.sort(acts)[::-1], np.zeros(n * k - len(acts))])[: len(best)]
    reach = np.full(len(best), magnitude.max(initial=0))
    near("the largest acts", mine, best, reach, dtype, D, _loose(given))


# -- the update --------------------------------------------------------------------------------------------------------


def update_latents_(given: dict[str, Any], result: Tensor, after: dict[str, Any]) -> None:
    """given: as it was before the call; after: the arguments that the call wrote."""
    wide = {name: _widened(value) for name, value in given.items()} | {"screen": [], "scales": [], "seed": None}
    eight = [m.dtype == torch.float8_e4m3fn for m in given["moments"]]
    scales = iter(given["scales"])
    wide["moments"] = [
        m.double() * next(scales).double().repeat_interleave(128, 1)[:, : m.shape[1]]
        if is_eight
        else m.to(torch.float64, copy=True)
        for m, is_eight in zip(given["moments"], eight, strict=True)
    ]
    if not _meaningful(given) or given["beta1"] > 0.999 or given["beta2"] < 0.5:
        return  # a step that divides rounding errors by rounding errors
    stats = array(torch.ops.fastsae.update_latents_(**wide | {"backend": "reference"}))
    got, dtype = array(result), given["W_dec"].dtype
    skipped = given["skip"] is not None and bool(given["skip"]) and not given["norms_only"]
    if not skipped:
        off = np.abs(got - stats) - 1e-3 * stats - 1e-9
        require((off <= 0).all(), f"the norms are {got}, expected {stats}")
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        if given[name] is None:
            continue
        new, truth, old = array(after[name]), array(wide[name]), array(given[name])
        if skipped or given["norms_only"]:
            require((new == old).all(), f"{name} changed, though nothing was to change")
            continue
        # A sign may turn where a gradient or a sum is near 0.
        turned = 2.1 * abs(float(given["lr"])) if given["optimizer"] in ("lion", "signsgd") else 0.0
        if given["unit_norm"] and name == "W_dec":  # a short row turns far
            long = np.linalg.norm(old, axis=1) > 0.5
            new, truth, old = new[long], truth[long], old[long]
        near(name, new, truth, np.abs(truth) + np.abs(old) + turned * 1e3, dtype, 64, 4e-3 if turned else 1e-3)


def _meaningful(given: dict[str, Any]) -> bool:
    """Whether float32 and float64 must agree on an update: no number is huge, and no latent comes twice in a token,
    where the reference joins the acts' gradients. Slots past a code's end may hold anything."""
    numbers = [v for n, v in given.items() if n not in ("acts", "dacts") for v in (v if isinstance(v, list) else [v])]
    used_up = [array(t) for t in numbers if isinstance(t, Tensor) and t.is_floating_point()]
    used_up += [np.asarray(n) for n in numbers if isinstance(n, float)]
    for acts, dacts, indices, offsets in zip(*(given[n] for n in ("acts", "dacts", "indices", "offsets")), strict=True):
        code = {"acts": acts, "indices": indices, "offsets": offsets if offsets.numel() else None}
        tokens, latents, used, _ = slots(code)
        pairs = np.stack([tokens[used], latents[used]])
        if np.unique(pairs, axis=1).shape[1] < pairs.shape[1]:
            return False
        used_up += [array(t).ravel()[used] for t in (acts, dacts) if t.shape == acts.shape]
    return all(np.isfinite(t).all() and np.abs(t).max(initial=0) < 1e8 for t in used_up)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()
    return [_widened(v) for v in value] if isinstance(value, list) else value


JUDGES: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "encode_topk": encode_topk, "encode_above": encode_above, "encode_batch_topk": encode_batch_topk, "decode": decode,
    "decode_error": decode_error, "active_dot": active_dot, "active_outer": active_outer, "by_latent": by_latent,
}  # fmt: skip
