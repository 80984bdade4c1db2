"""The checks of arguments that several ops share. A message says what was got, what was expected, what to do.

A public function checks what its raw op cannot see: leading batch dimensions, and the dictionary of its codes and
screen. The raw op checks the rest, for every caller, before a backend uses a size or an index as an address. No check
costs a host sync unless its docstring says so.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from fastsae.codes import SparseCodes
from fastsae.reference import MOMENTS_OF

FLOATING = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
"""Eight bits are for moments: torch neither multiplies nor promotes them."""
MOST = 2**31 - 1
"""Tokens and latents are counted in int32."""
LEAST_EPS = 1.2e-38
"""Smallest eps of Adam: the smallest normal float32, rounded up, in which its kernels add it."""


# -- memory, sizes, dtypes, devices -----------------------------------------------------------------------------------


def given(name: str, value: Any) -> None:
    """Raises TypeError if a required argument is None, which torch passes to an op in place of a tensor."""
    if value is None:
        raise TypeError(f"{name} is None, expected a value")


def has_memory(name: str, value: Any) -> None:
    """Checks that each tensor in an argument of a raw op is dense, and that its storage holds all of its numbers.

    torch keeps the shape of a tensor whose storage was freed; reading it raises an error that does not name it.
    """
    if isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            given(f"{name}[{i}]", item)
            has_memory(f"{name}[{i}]", item)
    if not isinstance(value, Tensor):
        return
    if value.layout != torch.strided:
        raise TypeError(f"{name} is a {value.layout} tensor, expected a dense one; pass {name}.to_dense()")
    if not value.numel():
        return
    last = sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
    needed = (value.storage_offset() + last + 1) * value.itemsize
    if (there := value.untyped_storage().nbytes()) < needed:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} has a storage of {there} bytes, expected {needed}; was its memory "
            "freed, or is it a tensor without memory of its own?"
        )


def fits_int32(name: str, n: int) -> None:
    if n > MOST:
        raise ValueError(f"{name} is {n}, expected at most {MOST}: tokens and latents are counted in int32")


def shape(name: str, t: Tensor, expected: Sequence[int], what: str = "") -> None:
    if tuple(t.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(t.shape)}, expected {tuple(expected)}{what}")


def same_device(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    if t.device != other.device:
        raise ValueError(f"{name} is on {t.device} but {other_name} is on {other.device}; move one with .to(...)")


def one_device(named: dict[str, Any]) -> None:
    """Checks that all tensors of a call are on one device, including empty ones and those in lists: with one on meta,
    torch would dispatch the whole call there, and compute nothing."""
    seen: dict[torch.device, str] = {}
    for name, value in named.items():
        for t in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(t, Tensor):
                seen.setdefault(t.device, name)
    if len(seen) > 1:
        said = ", ".join(f"{name} is on {device}" for device, name in seen.items())
        raise ValueError(f"{said}, expected all tensors on one device; move them with .to(...)")


def same_kind(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """Checks for the same dtype and device. Autocast, if it is on, has already cast."""
    if t.dtype != other.dtype:
        raise TypeError(
            f"{name} has dtype {t.dtype} but {other_name} has {other.dtype}; cast with {name}.to({other.dtype}), or "
            "run under autocast, which casts inputs to the weights' dtype"
        )
    same_device(name, t, other_name, other)


def floating(name: str, t: Tensor) -> None:
    if t.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {t.dtype}, expected a floating dtype: float32, bfloat16, float64, float16")


def dictionary(name: str, W: Tensor) -> None:
    if W.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(W.shape)}, expected (M, D): one latent per row")
    fits_int32(f"the number of rows of {name}", W.shape[0])
    floating(name, W)


def rows(name: str, x: Tensor, W: Tensor) -> None:
    """x (N, D) against W (M, D)."""
    if x.ndim != 2 or x.shape[1] != W.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and W {tuple(W.shape)}, expected two dimensions and the same last one "
            f"({x.shape[-1] if x.ndim else 'none'} != {W.shape[1]}); dictionaries are stored (M, D), one latent per row"
        )
    fits_int32(f"the number of tokens of {name}", x.shape[0])
    same_kind(name, x, "W", W)


def vector(name: str, v: Tensor, W: Tensor) -> None:
    """One number per latent."""
    shape(name, v, W.shape[:1], ": one number per latent of W")
    same_kind(name, v, "W", W)


# -- leading batch dimensions -----------------------------------------------------------------------------------------


def flat_rows(name: str, x: Tensor, width: int) -> Tensor:
    """x (*batch, D) as (N, D). Raises ValueError for a single token without a batch dimension."""
    if x.ndim < 2:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected (*batch, {width}); for one token pass {name}[None]"
        )
    return x.reshape(-1, x.shape[-1])


def tokens(name: str, x: Tensor, codes: SparseCodes) -> None:
    """x (*batch, D) and codes have the same leading dimensions."""
    if tuple(x.shape[:-1]) != tuple(codes.batch_shape):
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}, expected (*batch, D) with the codes' batch "
            f"{tuple(codes.batch_shape)}; use codes.with_batch(...) or reshape"
        )


# -- codes ------------------------------------------------------------------------------------------------------------


def latents_of(codes: SparseCodes, d_sae: int) -> None:
    if codes.d_sae != d_sae:
        raise ValueError(f"codes have d_sae = {codes.d_sae}, expected {d_sae}, the size of their dictionary")


def code_tokens(acts: Tensor, offsets: Tensor | None) -> int:
    """The tokens N of a flat code."""
    return acts.shape[0] if offsets is None else offsets.shape[0] - 1


def code(acts: Tensor, indices: Tensor, offsets: Tensor | None, of: str = "") -> None:
    """A flat code: acts (N, K), or (capacity,) with offsets (N+1,). of: a prefix of the names, as "terms[0].codes."."""
    if acts.ndim != (2 if offsets is None else 1) or indices.shape != acts.shape:
        raise ValueError(
            f"{of}acts has shape {tuple(acts.shape)} and {of}indices has shape {tuple(indices.shape)}, expected the "
            "same: (N, K), or (capacity,) with offsets"
        )
    if indices.dtype != torch.int32:
        raise TypeError(f"{of}indices have dtype {indices.dtype}, expected torch.int32; use .int()")
    same_device(f"{of}indices", indices, f"{of}acts", acts)
    if offsets is not None:
        if offsets.dtype != torch.int64 or offsets.ndim != 1 or not offsets.numel():
            got = f"{offsets.dtype} of shape {tuple(offsets.shape)}"
            raise TypeError(f"{of}offsets are {got}, expected torch.int64 of shape (N + 1,)")
        same_device(f"{of}offsets", offsets, f"{of}acts", acts)
    fits_int32("the number of tokens of the codes", code_tokens(acts, offsets))


def code_of(acts: Tensor, indices: Tensor, offsets: Tensor | None, W: Tensor) -> None:
    """A flat code and its dictionary W (M, D)."""
    dictionary("W", W)
    code(acts, indices, offsets)
    same_kind("acts", acts, "W", W)


def rows_of_code(name: str, x: Tensor, acts: Tensor, offsets: Tensor | None) -> None:
    n = code_tokens(acts, offsets)
    if x.shape[0] != n:
        raise ValueError(f"{name} has {x.shape[0]} rows and the code {n} tokens, expected equal numbers")


def code_inside(indices: Tensor, offsets: Tensor | None, d_sae: int) -> None:
    """On the CPU, where reading values is free: raises IndexError for a code that points outside the dictionary,
    ValueError for offsets past its end."""
    if indices.device.type != "cpu":
        return
    if offsets is not None:
        if not rises(offsets, indices.numel()):
            end = int(offsets[-1])
            raise ValueError(f"offsets must rise from 0 to at most the capacity {indices.numel()}, got an end of {end}")
        indices = indices[: int(offsets[-1])]
    if indices.numel():
        low, high = (int(v) for v in torch.aminmax(indices))
        if low < 0 or high >= d_sae:
            raise IndexError(f"codes have latents {low} to {high}, expected 0 to {d_sae - 1}, their dictionary's")


def rises(offsets: Tensor, capacity: int) -> bool:
    """Whether offsets go from 0 to at most the capacity. Reads them."""
    return int(offsets[0]) == 0 and int(offsets[-1]) <= capacity and not bool((offsets.diff() < 0).any())


# -- names and numbers ------------------------------------------------------------------------------------------------


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, expected one of {list(allowed)}")


@contextmanager
def reading_a_state(what: str) -> Iterator[None]:
    """In the block, errors from a state that is not structured like one of `what` become a ValueError."""
    try:
        yield
    except (AttributeError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise ValueError(f"this is not a state of {what}: {type(error).__name__}: {error}") from error


def at_least_0(name: str, value: Any) -> None:
    """Raises ValueError for anything but a finite number of 0 or more, or a 0-d tensor of one, which is read."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < math.inf:
        raise ValueError(f"{name} is {value!r}, expected a number >= 0")


def limit(name: str, value: Any) -> None:
    """Raises ValueError for anything but a number above 0, or None, which limits nothing."""
    if value is not None and not value > 0:
        raise ValueError(f"{name} is {value}, expected a number above 0, or None")


def optimizer(kind: str, betas: tuple[float, float], eps: float, weight_decay: float = 0.0, lr: float = 0.0) -> None:
    """An optimizer's settings. Raises ValueError."""
    one_of("optimizer", kind, tuple(MOMENTS_OF))
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas is {betas!r}, expected two numbers")
    for name, value in (
        ("betas[0]", betas[0]),
        ("betas[1]", betas[1]),
        ("eps", eps),
        ("weight_decay", weight_decay),
        ("lr", lr),
    ):
        at_least_0(name, value)
    if not all(beta < 1 for beta in betas):
        raise ValueError(f"betas {betas}, eps {eps}: expected 0 <= beta < 1 and eps >= 0")
    if "v" in MOMENTS_OF[kind] and eps < LEAST_EPS:
        raise ValueError(
            f"eps is {eps}, expected at least {LEAST_EPS}: a latent that never had a gradient would divide 0 by 0; "
            "pass 1e-8, for instance"
        )
    if kind == "adam" and weight_decay:
        raise ValueError(
            f"weight_decay is {weight_decay}, but optimizer 'adam' has none; pass optimizer='adamw' for decoupled decay"
        )


def group(kind: str, settings: Mapping[str, Any]) -> None:
    """A parameter group's settings, at a step. Raises ValueError, but not for a rate of NaN, which skips the step."""
    lr = settings["lr"]
    if lr.ndim if isinstance(lr, Tensor) else not isinstance(lr, numbers.Real):
        raise ValueError(f"lr is {lr!r}, expected a number or a 0-d tensor")
    optimizer(kind, settings["betas"], settings["eps"], settings["weight_decay"])


def no_nan(name: str, x: Tensor) -> None:
    """Costs a host sync."""
    bad = ~x.isfinite()
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name} holds {int(bad.sum())} values that are NaN or infinite, the first at {where}; expected finite "
            "activations; drop those rows, or pass check=False to let them propagate"
        )


def dense(name: str, x: Any, device: torch.device) -> None:
    """Raises ValueError or TypeError for anything but a dense floating-point tensor on this device."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}, expected a tensor: torch.as_tensor({name})")
    if x.layout != torch.strided:
        raise TypeError(f"{name} is stored as {x.layout}, expected a dense tensor: {name}.to_dense()")
    if not x.is_floating_point():
        raise TypeError(f"{name} has dtype {x.dtype}, expected a floating-point one")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device}, the SAE on {device}; move one of them")


def gradients_possible() -> None:
    """Raises RuntimeError under torch.inference_mode(), which, unlike no_grad(), torch.enable_grad() does not undo."""
    if torch.is_inference_mode_enabled():
        raise RuntimeError("a step needs gradients, and torch.inference_mode() is on; leave it for the step")


def not_fully_sharded(parameters: Mapping[str, Tensor]) -> None:
    """Raises TypeError for parameters that torch's fully_shard (FSDP2) or another of its parallel plans has cut."""
    if cut := [name for name, p in parameters.items() if hasattr(p, "device_mesh")]:
        raise TypeError(
            f"{', '.join(cut)} are DTensors, as fully_shard makes them; use a torch optimizer on them, or cut an "
            "ordinary SAE with fastsae.parallel.parallelize"
        )


def one_process(independent: bool) -> None:
    """Raises RuntimeError in one of several processes, unless each trains an SAE of its own."""
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    size = torch.distributed.get_world_size() if running and not independent else 1
    if size > 1:
        raise RuntimeError(
            f"this is one of {size} processes, and this step does not sum gradients over them, so their weights would "
            "drift apart; use a torch optimizer with DistributedDataParallel, or pass independent=True if each process "
            "trains an SAE of its own"
        )
