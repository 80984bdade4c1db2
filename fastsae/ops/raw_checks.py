"""What keeps a backend from touching memory that is not there, whoever calls torch.ops.fastsae.*.

Shapes, dtypes and names everywhere; the values that are used as indices on the CPU only, because to look at one on a
GPU is a host sync.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.ops import checks as check_that


def check_call(op: str, given: dict[str, Any]) -> None:
    """The arguments of a raw op by name, before a backend gets them. Raises ValueError, TypeError or IndexError."""
    if op == "update_latents_":
        _check_update(given)
        return
    _check_shapes(given)
    if op.startswith("encode"):
        _check_encoder(given)
    if "indices" in given:
        d_sae = given["d_sae"] if "d_sae" in given else given["W"].shape[0]
        _check_cpu_indices(given["indices"], given["offsets"], d_sae)


def _check_shapes(given: dict[str, Any]) -> None:
    like = {n: given[n] for n in ("x", "W", "b", "scale", "acts", "target", "bias") if given.get(n) is not None}
    if len({t.dtype for t in like.values()}) > 1:
        raise TypeError(f"got {', '.join(f'{n} {t.dtype}' for n, t in like.items())}, expected one dtype for all")
    x, W, acts, indices = (given.get(n) for n in ("x", "W", "acts", "indices"))
    offsets, latents = given.get("offsets"), None if W is None else W.shape[:1]
    expected = {
        "x": None if x is None or W is None else (x.shape[0], W.shape[1]),
        "b": latents,
        "scale": latents,
        "indices": None if acts is None else acts.shape,
        "target": None if W is None or acts is None else (_tokens(acts, offsets), W.shape[1]),
        "bias": None if W is None else W.shape[1:],
    }
    for name, shape in expected.items():
        t = given.get(name)
        if t is not None and shape is not None and tuple(t.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {tuple(shape)}")
    if acts is not None and indices is not None:
        _check_code(acts, indices, offsets, x, "x")


def _tokens(acts: Tensor, offsets: Tensor | None) -> int:
    return acts.shape[0] if offsets is None else offsets.shape[0] - 1


def _check_code(acts: Tensor, indices: Tensor, offsets: Tensor | None, x: Tensor | None, name: str) -> None:
    tokens = _tokens(acts, offsets)
    if indices.dtype != torch.int32 or (offsets is not None and offsets.dtype != torch.int64):
        raise TypeError(f"indices are {indices.dtype}, expected torch.int32; offsets, if any, torch.int64")
    if x is not None and x.shape[0] != tokens:
        raise ValueError(f"{name} has {x.shape[0]} rows and the code {tokens} tokens, expected as many")


def _check_encoder(given: dict[str, Any]) -> None:
    x, W, rows = given["x"], given["W"], given.get("rows")
    check_that.one_of("precision", given["precision"], check_that.PRECISIONS)
    if "k" in given:
        check_that.k_fits(given["k"], *((W.shape[0], "d_sae") if rows is None else (rows.shape[0], "rows")))
    if "index_offset" in given:
        check_that.offset(given["index_offset"], W)
    if rows is not None:
        check_that.latent_rows(rows, W)
        if rows.device.type == "cpu":
            check_rows(rows, W.shape[0])
    if "threshold" in given:
        shape = tuple(given["threshold"].shape)
        if shape not in ((), (W.shape[0],), (x.shape[0], 1)):
            raise ValueError(f"threshold has shape {shape}, expected (), ({W.shape[0]},) or ({x.shape[0]}, 1)")
        if given["capacity"] < 0:
            raise ValueError(f"capacity is {given['capacity']}, expected 0 or more slots")


def check_rows(rows: Tensor, latents: int) -> None:
    """Raises IndexError for a row past the dictionary, ValueError where those that are not negative do not ascend."""
    present = rows[rows >= 0]
    if present.numel() and int(present.max()) >= latents:
        raise IndexError(f"rows name latent {int(present.max())}, expected at most {latents - 1}, the last of W")
    descends = present[1:] <= present[:-1]
    if bool(descends.any()):
        at = int(descends.nonzero()[0])
        raise ValueError(f"rows hold {int(present[at])} ahead of {int(present[at + 1])}, expected them to ascend")


def check_indices(indices: Tensor, offsets: Tensor | None, d_sae: int) -> None:
    """Raises IndexError for a code that points outside the dictionary, ValueError for offsets past its end."""
    if offsets is not None and offsets.numel():
        end = int(offsets[-1])
        if int(offsets[0]) != 0 or end > indices.numel() or bool((offsets.diff() < 0).any()):
            raise ValueError(f"offsets must rise from 0 to at most the capacity {indices.numel()}, got an end of {end}")
        indices = indices[:end]
    if indices.numel():
        low, high = (int(v) for v in torch.aminmax(indices))
        if low < 0 or high >= d_sae:
            raise IndexError(f"codes point at latents {low} to {high}, expected 0 to {d_sae - 1}, their dictionary")


def _check_cpu_indices(indices: Tensor, offsets: Tensor | None, d_sae: int) -> None:
    if indices.device.type == "cpu":
        check_indices(indices, offsets, d_sae)


def _check_update(given: dict[str, Any]) -> None:
    check_that.optimizer(
        given["optimizer"], (given["beta1"], given["beta2"]), given["eps"], given["weight_decay"]
    )  # fmt: skip
    names = ("W_enc", "W_dec", "b_enc", "b_dec", "moments", "lr", "step", "pre_bias", "seed", "optimizer", "scales")
    check_that.update(**{name: given[name] for name in names})
    parts = ("W_enc", "W_dec", "decoder_pull", "db_enc", "added", "clip_rows", "grad_scale")
    check_that.update_parts(**{name: given[name] for name in parts})
    step = given["step"]
    if step.device.type == "cpu" and int(step) < 1:
        raise ValueError(f"step is {int(step)}: step counts this one, expected >= 1")
    _check_terms(given)


def _check_terms(given: dict[str, Any]) -> None:
    W_dec = given["W_dec"]
    d_out, d_in = W_dec.shape[1], (W_dec if given["W_enc"] is None else given["W_enc"]).shape[1]
    parts = {name: given[name] for name in ("acts", "indices", "offsets", "dacts", "xs", "grads", "has_bias")}
    if len({len(part) for part in parts.values()}) > 1:
        raise ValueError(f"got {', '.join(f'{len(p)} {name}' for name, p in parts.items())}, expected as many of each")
    for i, (acts, indices, offsets, dacts, x, grad, _) in enumerate(zip(*parts.values(), strict=True)):
        rows = offsets if offsets.numel() else None
        if indices.shape != acts.shape or acts.ndim != (2 if rows is None else 1):
            raise ValueError(
                f"acts[{i}] has shape {tuple(acts.shape)} and indices[{i}] {tuple(indices.shape)}, expected the same: "
                "(N, K), or (capacity,) where there are offsets"
            )
        if dacts.numel() and dacts.shape != acts.shape:
            raise ValueError(
                f"dacts[{i}] has shape {tuple(dacts.shape)}, expected {tuple(acts.shape)}, that of acts[{i}], or none"
            )
        for name, t, width in ((f"xs[{i}]", x, d_in), (f"grads[{i}]", grad, d_out)):
            _check_code(acts, indices, rows, t, name)
            if t.ndim != 2 or t.shape[1] != width:
                raise ValueError(f"{name} has shape {tuple(t.shape)}, expected (N, {width})")
        for name, t in (("acts", acts), ("xs", x), ("grads", grad), ("dacts", dacts)):
            check_that.same_device(f"{name}[{i}]", t, "W_dec", W_dec)
            # Narrower ones are widened before they are read, those of autocast for instance.
            if torch.promote_types(t.dtype, torch.float32) != torch.promote_types(W_dec.dtype, torch.float32):
                raise TypeError(f"{name}[{i}] are {t.dtype} but W_dec has {W_dec.dtype}; cast with .to({W_dec.dtype})")
        check_that.same_device(f"indices[{i}]", indices, "W_dec", W_dec)
        _check_cpu_indices(indices, rows, W_dec.shape[0])
