"""The encoders: which latents are active for each token, and how strongly.

P = (x Wᵀ + b)·s are the pre-acts, with s = 1 except in encode_topk, and A is the dense (N, M) view of the code:

    A = P|active    dx = (dA·s) W,  dW = (dA·s)ᵀ x,  db = Σₙ dA·s,  ds = Σₙ dA·P

The selection of the active latents has no gradient, and an empty slot has none. A token with NaN or infinity in x has
acts of NaN, and changes no other token's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsae.backends import check_name, choose
from fastsae.codes import Screen, SparseCodes
from fastsae.ops import checks as check_that
from fastsae.ops import ledger as ledgers
from fastsae.ops import recorded
from fastsae.ops.gradients import encoder_gradients, latent_sums
from fastsae.ops.held import HeldScreen, plain_on_cpu
from fastsae.ops.register import define, empty_ints, no_gradients

_raw = torch.ops.fastsae

PRECISIONS = ("exact", "screened", "fp32")
MOST_SLOTS = 2**59
"""So that int64 counts their bytes."""


# -- what all encoders share ------------------------------------------------------------------------------------------


def screen_tensors(screen: Screen | None, backend: str | None) -> list[Tensor] | None:
    """A screen's tensors. Raises ValueError if another backend than the given one made it."""
    check_name(backend)
    if screen is None:
        return None
    if backend is not None and screen.format.split("/")[0] != backend:
        raise ValueError(
            f"the screen has format {screen.format!r}, expected one of backend {backend!r}; make it with "
            "prepare_screen(W, b, backend=...)"
        )
    return screen.tensors


def _encoded(
    raw: Callable[..., tuple[Tensor, ...]], x: Tensor, W: Tensor, b: Tensor, *more: Any, k: int | None,
    screen: Screen | HeldScreen | None, precision: str, backend: str | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results of a raw encoder, the last of which is how many tokens it redid. more: its own arguments."""
    if not isinstance(screen, HeldScreen):
        return raw(x, W, b, *more, screen_tensors(screen, backend), precision, backend)
    kept = screen.current(x, W, b, k, backend, precision)
    found = raw(x, W, b, *more, screen_tensors(kept, backend), precision, backend)
    if kept is not None:
        screen.served(x.shape[0], found[-1])
    return found


def _flat_input(x: Tensor, W: Tensor, check: bool) -> Tensor:
    flat = check_that.flat_rows("x", x, W.shape[-1])
    if check:
        check_that.no_nan("x", x)
    return infinite_as_nan(flat) if flat.dtype.itemsize > 1 else flat  # the op refuses 8 bits


def infinite_as_nan(x: Tensor) -> Tensor:
    """x with NaN in place of infinity: a token with either gets scores of NaN, whereas relu(-∞) would be 0.

    All other numbers keep their bits; x itself is returned if a CPU finds at once that all are finite.
    """
    if plain_on_cpu(x) and bool(torch.isfinite(x.detach().sum())):  # a sum that overflows only costs a copy
        return x
    return torch.add(x, x, alpha=0)  # x + 0 · x, in one pass


def _check_encoder(x: Tensor, W: Tensor, b: Tensor, precision: str) -> None:
    check_that.dictionary("W", W)
    check_that.rows("x", x, W)
    check_that.vector("b", b, W)
    check_that.one_of("precision", precision, PRECISIONS)


def _check_k(k: int, most: int, what: str) -> None:
    if not 1 <= k <= most:
        raise ValueError(f"k is {k}, expected 1 <= k <= {most}, the size of {what}")


def encode_by(
    run: Callable[[Tensor, Tensor, Tensor], SparseCodes],
    x: Tensor,
    W: Tensor,
    b: Tensor,
    *,
    pre_bias: Tensor | None = None,
    backend: str | None = None,
) -> SparseCodes:
    """run(x, W, b): a code whose acts are x Wᵀ + b at its slots, selected in any way by differentiable ops; x (N, D).

    pre_bias (D,): x is x₀ - pre_bias, computed without a gradient to it; the encoder's backward computes that. While a
    ledger is open for W and b, it keeps the gradient as a term, and run is called without autograd.
    """
    ledger = ledgers.open_ledger(W_enc=W, b_enc=b, **({} if pre_bias is None else {"b_dec": pre_bias}))
    if ledger is None:
        return run(_with_gradient_of(x, pre_bias), W, b)
    return recorded.encode(run, x, W, b, pre_bias, ledger, backend)


def _with_gradient_of(x: Tensor, pre_bias: Tensor | None) -> Tensor:
    """x as a function of pre_bias too: x - 0, with 0 = pre_bias - pre_bias, whose gradient is that of x₀ - pre_bias."""
    return x if pre_bias is None else x - (pre_bias - pre_bias.detach())


def prepare_screen(
    W: Tensor, b: Tensor | None = None, *, x: Tensor | None = None, k: int | None = None, backend: str | None = None
) -> Screen | None:
    """The low-precision copy of an encoder that the chosen backend screens with, or None if it needs none.

    It goes stale when W changes: only `update_latents_` maintains it. Without it an encoder makes one in each call;
    a `HeldScreen` keeps one for weights that rest, and notices changes.
    x (*batch, D) and k: a sample of what it will encode, by which a backend may choose its format and
    its basis. Speed depends on that choice; results do only with precision="screened", which trusts it.
    """
    check_that.dictionary("W", W)
    if b is not None:
        check_that.vector("b", b, W)
    flat = None if x is None else check_that.flat_rows("x", x, W.shape[1])
    if flat is not None:
        check_that.rows("x", flat, W)
    given = [W.detach()] if b is None else [W.detach(), b.detach()]
    module = choose("prepare_screen", backend, *given)
    return module.prepare_screen(given[0], None if b is None else given[1], flat, k)


# -- encode_topk ------------------------------------------------------------------------------------------------------


def encode_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    *,
    rows: Tensor | None = None,
    scale: Tensor | None = None,
    index_offset: int = 0,
    pre_bias: Tensor | None = None,
    screen: Screen | HeldScreen | None = None,
    precision: str = "exact",
    backend: str | None = None,
    check: bool = False,
) -> SparseCodes:
    """The k largest of relu((x Wᵀ + b) · scale) of each token; (N, M) is never stored.

    x (*batch, D), W (M, D), b (M,). Fixed codes, acts in x's dtype. Ties go to the lower index; NaN ranks highest, and
    with check=True raises ValueError instead. scale (M,): gates by decoder norm, acts are the scaled ones.
    rows int32 (capacity,): the latents to consider, ascending; negative entries are ignored (so their number can live
    on the device); then k <= capacity. index_offset is added to the indices returned: W is a shard that starts there,
    and d_sae of the codes is index_offset + M, at most 2³¹ - 1. Raises ValueError where k is not in 1..M (or
    1..capacity), and on the CPU IndexError for a row past M and ValueError for rows that do not ascend.
    """
    flat = _flat_input(x, W, check)
    if rows is not None and isinstance(screen, HeldScreen):
        screen = None  # a copy is of all latents
    how: dict[str, Any] = {"screen": screen, "precision": precision, "backend": backend}

    def run(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        acts, indices, redone = _encoded(_raw.encode_topk, x, W, b, k, rows, scale, index_offset, k=k, **how)
        return SparseCodes(acts, indices, index_offset + W.shape[0], redone=redone)

    # The ledger's terms cover whole dictionaries and pre-acts without a scale.
    plain = scale is not None or index_offset
    codes = (
        run(_with_gradient_of(flat, pre_bias), W, b)
        if plain
        else encode_by(run, flat, W, b, pre_bias=pre_bias, backend=backend)
    )
    return codes.with_batch(tuple(x.shape[:-1]))


def encode_topk_weighted(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    weight: Tensor,
    *,
    merge: Callable[[SparseCodes], SparseCodes] | None = None,
    pre_bias: Tensor | None = None,
    screen: Screen | HeldScreen | None = None,
    precision: str = "exact",
    backend: str | None = None,
) -> SparseCodes:
    """The pre-acts of each token at the k largest of relu(pre-act · weight); weight (M,), at least 0, is held fixed.

    x (N, D); the other arguments as in `encode_topk`, whose `scale=`, in contrast, also multiplies the acts. merge:
    drops slots of the weighted code, for a shard of a dictionary whose latents compete with those of others.
    """
    held = weight.detach().to(b.dtype)

    def run(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        codes = encode_topk(x, W, b, k, scale=held, screen=screen, precision=precision, backend=backend)
        codes = codes if merge is None else merge(codes)
        # Divided by the weight it was made with; an empty slot's may be 0.
        return replace(codes, acts=codes.acts / torch.where(codes.acts == 0, 1.0, held[codes.indices.long()]))

    return encode_by(run, x, W, b, pre_bias=pre_bias, backend=backend)


def _fake_topk(x: Tensor, W: Tensor, b: Tensor, k: int, *_: Any) -> tuple[Tensor, ...]:
    n = x.shape[0]
    return x.new_empty(n, k), empty_ints(x, n, k, dtype=torch.int32), empty_ints(x)


def _check_topk(
    x: Tensor, W: Tensor, b: Tensor, k: int, rows: Tensor | None, scale: Tensor | None, index_offset: int,
    screen: list[Tensor] | None, precision: str,
) -> None:  # fmt: skip
    _check_encoder(x, W, b, precision)
    if rows is not None:
        if rows.dtype != torch.int32 or rows.ndim != 1:
            got = f"{rows.dtype} of shape {tuple(rows.shape)}"
            raise ValueError(f"rows are {got}, expected torch.int32 of shape (capacity,)")
        check_that.same_device("rows", rows, "W", W)
    _check_k(k, *((W.shape[0], "d_sae") if rows is None else (rows.shape[0], "rows")))
    if scale is not None:
        check_that.vector("scale", scale, W)
    if index_offset < 0:
        raise ValueError(f"index_offset is {index_offset}, expected 0 or more")
    check_that.fits_int32("index_offset + M", index_offset + W.shape[0])


def _check_rows_inside(x: Tensor, W: Tensor, b: Tensor, k: int, rows: Tensor | None, *_: Any) -> None:
    """On the CPU: raises IndexError for a row past the dictionary, ValueError if those that are not negative do not
    ascend."""
    if rows is None or rows.device.type != "cpu":
        return
    present = rows[rows >= 0]
    if present.numel() and int(present.max()) >= W.shape[0]:
        raise IndexError(f"rows name latent {int(present.max())}, expected at most {W.shape[0] - 1}, the last of W")
    descends = present[1:] <= present[:-1]
    if bool(descends.any()):
        at = int(descends.nonzero()[0])
        raise ValueError(f"rows hold {int(present[at])} ahead of {int(present[at + 1])}, expected them to ascend")


def _setup_topk(ctx: Any, inputs: Any, output: Any) -> None:
    x, W, b, _, _, scale, ctx.index_offset, _, _, ctx.backend = inputs
    ctx.none = no_gradients(inputs)
    acts, indices, _ = output
    ctx.save_for_backward(x, W, b, scale, acts, indices)


def _topk_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, W, b, scale, acts, indices = ctx.saved_tensors
    local = indices - ctx.index_offset
    grad = torch.where(acts != 0, grad, 0)
    dscale = None
    if scale is not None:
        chosen = scale[local.long()]
        if ctx.needs_input_grad[5]:
            pre = _raw.active_dot(x, acts, local, None, W, ctx.backend) + b[local.long()]
            order = _raw.by_latent(acts, local, None, W.shape[0], ctx.backend)
            dscale = latent_sums(grad * pre, local, None, W.shape[0], order, ctx.backend)
        grad = grad * chosen
    dx, dW, db = encoder_gradients(ctx.needs_input_grad[:3], grad, x, W, acts, local, None, ctx.backend)
    return dx, dW, db, *ctx.none[3:5], dscale, *ctx.none[6:]


define(
    "encode_topk",
    "(Tensor x, Tensor W, Tensor b, SymInt k, Tensor? rows, Tensor? scale, SymInt index_offset, Tensor[]? screen, "
    "str precision, str? backend) -> (Tensor acts, Tensor indices, Tensor redone)",
    fake=_fake_topk,
    check=_check_topk,
    check_values=_check_rows_inside,
    setup=_setup_topk,
    backward=_topk_backward,
    cast=("x",),
)


# -- encode_above -----------------------------------------------------------------------------------------------------


def encode_above(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    threshold: Tensor | float,
    capacity: int,
    *,
    pre_bias: Tensor | None = None,
    screen: Screen | HeldScreen | None = None,
    precision: str = "exact",
    backend: str | None = None,
    check: bool = False,
) -> tuple[SparseCodes, Tensor]:
    """The raw pre-acts x Wᵀ + b, sign kept, of every latent above its threshold, and whether they overflowed.

    threshold: a number, 0-d, (M,) or (*batch, 1). Ragged codes of `capacity` slots; when more latents are above, the
    first `capacity` in token order are kept and the 0-d bool `overflow` is True, on the device. NaN counts as above.
    """
    flat, bars = _flat_input(x, W, check), _flat_threshold(threshold, x, W)
    overflows: list[Tensor] = []
    how: dict[str, Any] = {"screen": screen, "precision": precision, "backend": backend}

    def run(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        found = _encoded(_raw.encode_above, x, W, b, bars, capacity, k=None, **how)
        overflows.append(found[3])
        return SparseCodes(found[0], found[1], W.shape[0], found[2], redone=found[4])

    codes = encode_by(run, flat, W, b, pre_bias=pre_bias, backend=backend)
    return codes.with_batch(tuple(x.shape[:-1])), overflows[0]


def _flat_threshold(threshold: Tensor | float, x: Tensor, W: Tensor) -> Tensor:
    """The threshold as a tensor of shape (), (M,) or (N, 1) in the dtype that scores are computed in."""
    wide = torch.float64 if W.dtype == torch.float64 else torch.float32
    if not isinstance(threshold, Tensor):
        return torch.full((), float(threshold), dtype=wide, device=W.device)
    threshold = threshold.detach().to(wide)
    if threshold.ndim == 0 or threshold.shape == W.shape[:1]:
        return threshold
    if threshold.shape == (*x.shape[:-1], 1):
        return threshold.reshape(-1, 1)
    raise ValueError(
        f"threshold has shape {tuple(threshold.shape)}, expected a number, ({W.shape[0]},) for one per latent, or "
        f"{(*x.shape[:-1], 1)} for one per token"
    )


def _fake_above(x: Tensor, W: Tensor, b: Tensor, threshold: Tensor, capacity: int, *_: Any) -> tuple[Tensor, ...]:
    acts, indices = x.new_empty(capacity), empty_ints(x, capacity, dtype=torch.int32)
    return acts, indices, empty_ints(x, x.shape[0] + 1), empty_ints(x, dtype=torch.bool), empty_ints(x)


def _check_above(
    x: Tensor, W: Tensor, b: Tensor, threshold: Tensor, capacity: int, screen: list[Tensor] | None, precision: str
) -> None:
    _check_encoder(x, W, b, precision)
    given, latents, n = tuple(threshold.shape), W.shape[0], x.shape[0]
    if given not in ((), (latents,), (n, 1)):
        raise ValueError(f"threshold has shape {given}, expected (), ({latents},) or ({n}, 1)")
    check_that.floating("threshold", threshold)
    check_that.same_device("threshold", threshold, "W", W)
    if not 0 <= capacity <= MOST_SLOTS:
        raise ValueError(f"capacity is {capacity}, expected 0 to {MOST_SLOTS} slots")


def _setup_ragged(ctx: Any, inputs: Any, output: Any) -> None:
    x, W, ctx.backend, ctx.none = inputs[0], inputs[1], inputs[-1], no_gradients(inputs)
    ctx.save_for_backward(x, W, *output[:3])


def _ragged_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, W, acts, indices, offsets = ctx.saved_tensors
    found = encoder_gradients(ctx.needs_input_grad[:3], grad, x, W, acts, indices, offsets, ctx.backend)
    return *found, *ctx.none[3:]


define(
    "encode_above",
    "(Tensor x, Tensor W, Tensor b, Tensor threshold, SymInt capacity, Tensor[]? screen, str precision, "
    "str? backend) -> (Tensor acts, Tensor indices, Tensor offsets, Tensor overflow, Tensor redone)",
    fake=_fake_above,
    check=_check_above,
    setup=_setup_ragged,
    backward=_ragged_backward,
    cast=("x",),
)


# -- encode_batch_topk ------------------------------------------------------------------------------------------------


def encode_batch_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    *,
    pre_bias: Tensor | None = None,
    screen: Screen | HeldScreen | None = None,
    precision: str = "exact",
    backend: str | None = None,
    check: bool = False,
) -> SparseCodes:
    """The N·k largest of relu(x Wᵀ + b) over the whole batch: ragged codes of capacity N·k, zeros are never stored.

    A token with NaN or infinity in x has NaN at the first k latents; the other tokens get the same as without it.
    """
    flat = _flat_input(x, W, check)
    how: dict[str, Any] = {"screen": screen, "precision": precision, "backend": backend}

    def run(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        acts, indices, offsets, redone = _encoded(_raw.encode_batch_topk, x, W, b, k, k=k, **how)
        return SparseCodes(acts, indices, W.shape[0], offsets, redone=redone)

    codes = encode_by(run, flat, W, b, pre_bias=pre_bias, backend=backend)
    return codes.with_batch(tuple(x.shape[:-1]))


def _fake_batch_topk(x: Tensor, W: Tensor, b: Tensor, k: int, *_: Any) -> tuple[Tensor, ...]:
    n = x.shape[0]
    return x.new_empty(n * k), empty_ints(x, n * k, dtype=torch.int32), empty_ints(x, n + 1), empty_ints(x)


def _check_batch_topk(
    x: Tensor, W: Tensor, b: Tensor, k: int, screen: list[Tensor] | None, precision: str
) -> None:  # fmt: skip
    _check_encoder(x, W, b, precision)
    _check_k(k, W.shape[0], "d_sae")


define(
    "encode_batch_topk",
    "(Tensor x, Tensor W, Tensor b, SymInt k, Tensor[]? screen, str precision, str? backend) "
    "-> (Tensor acts, Tensor indices, Tensor offsets, Tensor redone)",
    fake=_fake_batch_topk,
    check=_check_batch_topk,
    setup=_setup_ragged,
    backward=_ragged_backward,
    cast=("x",),
)
