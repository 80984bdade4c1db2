"""The functional face of the engine: validation once, then torch.ops.fastsae.*.

Every function takes leading batch dimensions, which are flattened on the way in and restored on the way out, and
`backend=None|"reference"|"cpu"|...`: None takes the fastest backend that has nothing against the call, a name fails
loudly with the reason. All of them are deterministic, work for N = 0, and are differentiable where that makes sense
(fastsae.ops.backward). precision="exact" returns the fp32 answer even if a backend screens in a narrower format first;
"screened" trusts the screen, so its selection depends on the screen's format; "fp32" does not screen.

Errors: ValueError for shapes, sizes and names, TypeError for dtypes, IndexError for codes that point outside the
dictionary, fastsae.BackendError for a backend that cannot serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsae.backends import check_name, choose
from fastsae.codes import LatentOrder, Screen, SparseCodes, UpdateTerm
from fastsae.ops import checks as check_that
from fastsae.ops import ledger as ledgers
from fastsae.ops import register as library

_raw = torch.ops.fastsae


def _encoder_input(
    x: Tensor, W: Tensor, b: Tensor, screen: Screen | None, precision: str, backend: str | None, check: bool
) -> Tensor:
    """Validates what every encoder takes; returns x flattened to (N, D)."""
    check_that.dictionary("W", W)
    check_that.rows("x", x, "W", W)
    check_that.vector("b", b, W)
    check_that.one_of("precision", precision, check_that.PRECISIONS)
    _check_backend(backend, screen)
    if check:
        check_that.no_nan("x", x)
    return x.reshape(-1, x.shape[-1])


def _check_backend(backend: str | None, screen: Screen | None) -> None:
    check_name(backend)
    if screen is not None and backend is not None and screen.format.split("/")[0] != backend:
        raise ValueError(
            f"the screen has format {screen.format!r}, expected one of backend {backend!r}; make it with "
            "prepare_screen(W, b, backend=...)"
        )


def encode_by(
    run: Callable[[Tensor, Tensor, Tensor], SparseCodes],
    x: Tensor,
    W: Tensor,
    b: Tensor,
    *,
    pre_bias: Tensor | None = None,
    backend: str | None = None,
) -> SparseCodes:
    """run(x, W, b): a code whose acts are x Wᵀ + b at its slots, chosen in any way by differentiable ops; x (N, D).

    While a ledger is open for W and b, its gradient is kept as a term, and run is called without autograd.
    """
    return _encoded(run, x, W, b, pre_bias, backend)


def _encoded(
    run: Callable[[Tensor, Tensor, Tensor], SparseCodes],
    x: Tensor,
    W: Tensor,
    b: Tensor,
    pre_bias: Tensor | None,
    backend: str | None,
) -> SparseCodes:
    """run(x, W, b), on the ledger where one is open for W and b."""
    ledger = ledgers.open_ledger(W, b)
    return run(x, W, b) if ledger is None else ledgers.encode(run, x, W, b, pre_bias, ledger, backend)


def _tensors(screen: Screen | None) -> list[Tensor] | None:
    return None if screen is None else screen.tensors


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
    screen: Screen | None = None,
    precision: str = "exact",
    backend: str | None = None,
    check: bool = False,
) -> SparseCodes:
    """The k largest of relu((x Wᵀ + b) · scale) of each token; (N, M) is never stored.

    x (*batch, D), W (M, D), b (M,). Fixed codes, acts in x's dtype. Ties go to the lower index; NaN ranks highest, and
    with check=True raises ValueError instead. scale (M,): gates by decoder norm, acts are the scaled ones.
    rows int32 (capacity,): the latents to consider, ascending, negative entries absent (so the number of them can live
    on the device); k <= capacity then. index_offset is added to the indices returned: W is a shard that starts there,
    and d_sae of the codes is index_offset + M, at most 2³¹ - 1. Raises ValueError where k is not in 1..M (or
    1..capacity), and on the CPU IndexError for a row past M and ValueError for rows that do not ascend.
    """
    flat = _encoder_input(x, W, b, screen, precision, backend, check)
    if rows is not None:
        check_that.latent_rows(rows, W)
    check_that.k_fits(k, W.shape[0] if rows is None else rows.shape[0], "d_sae" if rows is None else "rows")
    if scale is not None:
        check_that.vector("scale", scale, W)
    check_that.offset(index_offset, W)

    def run(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        found = _raw.encode_topk(x, W, b, k, rows, scale, index_offset, _tensors(screen), precision, backend)
        return SparseCodes(found[0], found[1], index_offset + W.shape[0], redone=found[2])

    plain = scale is not None or index_offset
    codes = run(flat, W, b) if plain else _encoded(run, flat, W, b, pre_bias, backend)
    return codes.with_batch(tuple(x.shape[:-1]))


def encode_above(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    threshold: Tensor | float,
    capacity: int,
    *,
    pre_bias: Tensor | None = None,
    screen: Screen | None = None,
    precision: str = "exact",
    backend: str | None = None,
    check: bool = False,
) -> tuple[SparseCodes, Tensor]:
    """The raw pre-acts x Wᵀ + b, sign kept, of every latent above its threshold, and whether they overflowed.

    threshold: a number, 0-d, (M,) or (*batch, 1). Ragged codes of `capacity` slots; when more latents are above, the
    first `capacity` in token order are kept and the 0-d bool `overflow` is True, on the device. NaN counts as above.
    """
    flat = _encoder_input(x, W, b, screen, precision, backend, check)
    if capacity < 0:
        raise ValueError(f"capacity is {capacity}, expected 0 or more slots")
    threshold = check_that.threshold(threshold, x, W)
    overflows: list[Tensor] = []

    def run(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        found = _raw.encode_above(x, W, b, threshold, capacity, _tensors(screen), precision, backend)
        overflows.append(found[3])
        return SparseCodes(found[0], found[1], W.shape[0], found[2], redone=found[4])

    codes = _encoded(run, flat, W, b, pre_bias, backend)
    return codes.with_batch(tuple(x.shape[:-1])), overflows[0]


def encode_batch_topk(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    *,
    pre_bias: Tensor | None = None,
    screen: Screen | None = None,
    precision: str = "exact",
    backend: str | None = None,
    check: bool = False,
) -> SparseCodes:
    """The N·k largest of relu(x Wᵀ + b) over the whole batch: ragged codes of capacity N·k, zeros are never stored."""
    flat = _encoder_input(x, W, b, screen, precision, backend, check)
    check_that.k_fits(k, W.shape[0], "d_sae")

    def run(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
        found = _raw.encode_batch_topk(x, W, b, k, _tensors(screen), precision, backend)
        return SparseCodes(found[0], found[1], W.shape[0], found[2], redone=found[3])

    return _encoded(run, flat, W, b, pre_bias, backend).with_batch(tuple(x.shape[:-1]))


def decode(codes: SparseCodes, W: Tensor, *, backend: str | None = None) -> Tensor:
    """A W: (*batch, D), in W's dtype. An act of 0 adds nothing and receives no gradient."""
    check_name(backend)
    check_that.codes(codes, W)
    flat, ledger = codes.flatten(), ledgers.open_ledger(W)
    if ledger is None:
        out = _raw.decode(flat.acts, flat.indices, flat.offsets, W, backend)
    else:
        out = ledgers.decode(flat, W, ledger, backend)
    return out.view(*codes.batch_shape, W.shape[1])


def decode_error(
    codes: SparseCodes, W: Tensor, target: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """A W (+ bias) - target: (*batch, D) in W's dtype, and Σ_d of its squares: float64 (*batch).

    target (*batch, D), bias (D,). What a loss needs of a decode, in one pass where a backend can; not differentiable.
    """
    check_name(backend)
    check_that.codes(codes, W)
    check_that.rows("target", target, "W", W)
    check_that.tokens("target", target, codes)
    flat = codes.flatten()
    goal = target.reshape(-1, target.shape[-1])
    with torch.no_grad():
        error, squares = _raw.decode_error(flat.acts, flat.indices, flat.offsets, W, goal, bias, backend)
    return error.view(*codes.batch_shape, W.shape[1]), squares.view(codes.batch_shape)


def active_dot(x: Tensor, codes: SparseCodes, W: Tensor, *, backend: str | None = None) -> Tensor:
    """⟨xₙ, Wᵢ⟩ at the active latents only, 0 in empty slots: shape and dtype of codes.acts. x (*batch, D), W (M, D)."""
    check_name(backend)
    check_that.rows("x", x, "W", W)
    check_that.tokens("x", x, codes)
    check_that.codes(codes, W)
    flat = codes.flatten()
    out = _raw.active_dot(x.reshape(-1, x.shape[-1]), flat.acts, flat.indices, flat.offsets, W, backend)
    return out.view(codes.acts.shape)


def active_outer(
    codes: SparseCodes,
    x: Tensor,
    d_sae: int | None = None,
    *,
    by_latent: LatentOrder | None = None,
    backend: str | None = None,
) -> Tensor:
    """Aᵀ x: (d_sae, D), in x's dtype. x (*batch, D); by_latent: the regrouped code, where it is at hand already."""
    check_name(backend)
    check_that.tokens("x", x, codes)
    d_sae = codes.d_sae if d_sae is None else d_sae
    check_that.codes(codes, x, d_sae=d_sae, name="x")
    flat = codes.flatten()
    order = None if by_latent is None else [by_latent.offsets, by_latent.tokens, by_latent.slots]
    return _raw.active_outer(flat.acts, flat.indices, flat.offsets, x.reshape(-1, x.shape[-1]), d_sae, order, backend)


def by_latent(codes: SparseCodes, *, backend: str | None = None) -> LatentOrder:
    """The code regrouped latent by latent: a counting sort, computed once and handed to both dictionary gradients.

    Tokens ascend within a latent; empty slots of a fixed code are left out.
    """
    check_name(backend)
    check_that.fits_int32("the number of tokens of the codes", codes.n_tokens)
    flat = codes.flatten()
    return LatentOrder(*_raw.by_latent(flat.acts.detach(), flat.indices, flat.offsets, codes.d_sae, backend))


def prepare_screen(
    W: Tensor, b: Tensor | None = None, *, x: Tensor | None = None, k: int | None = None, backend: str | None = None
) -> Screen | None:
    """The low-precision copy of an encoder that the chosen backend screens with, or None where it needs none.

    It goes stale when W changes: only `update_latents_` maintains it. Without it an encoder makes its own, every call.
    x (*batch, D) and k: what it will encode, for a backend that chooses its format by how well that is told apart;
    speed depends on the choice, and results do with precision="screened" only, which trusts that format.
    """
    check_that.dictionary("W", W)
    given = [W.detach()] if b is None else [W.detach(), b.detach()]
    module = choose("prepare_screen", backend, *given)
    return module.prepare_screen(
        given[0], None if b is None else given[1], None if x is None else x.reshape(-1, x.shape[-1]), k
    )


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
    scales: Sequence[Tensor] = (),
    screen: Screen | None = None,
    backend: str | None = None,
) -> Tensor:
    """The fused backward and optimizer step of an SAE, in place: no backend that can do without stores a gradient.

    W_enc (M, D), or None where it is tied to W_dec (M, D_out); b_enc (M,), b_dec (D_out,). lr: 0-d float64, step: 0-d
    int64, the count including this step, both on the device. pre_bias: the encoder's input had b_dec subtracted.
    Order: accumulate terms and parts, norms, project (unit_norm), clip_rows, grad_scale, optimizer, renormalize
    (unit_norm), refresh the screen. Formulas: fastsae.reference.gradients, .optimizers and .update.

    optimizer, weight_decay: "adam" as in torch.optim.Adam, without decay; "adamw" as torch.optim.AdamW; "lion"
    (arXiv:2302.06675) and "signsgd" (p -= lr · sign(g)) with decay like AdamW's, on all parameters alike.
    moments: [mW_enc, vW_enc, mW_dec, vW_dec, mb_enc, vb_enc, mb_dec, vb_dec], without W_enc's when tied, without every
    v for lion, none for signsgd; shaped like their parameter. All in the weights' dtype (float32 at least); or all
    bfloat16; or, of adam and adamw, the dictionaries' in float8_e4m3fn, each with its own of `scales` in the same
    order, float32 (M, ceil(D / 128)), and the biases' wide. bfloat16 and 8 bits need a seed for their stochastic
    rounding: to nearest v would never move, since a step changes it by less than half a unit (reference.rounding).

    What adds to the gradients of the terms:
    decoder_pull (M, L), L dividing D_out: dW_dec_i gains decoder_pull[i, l] · W_dec_i in the l-th of L equal segments.
    db_enc (M,): added to b_enc's gradient alone, not to what pre_bias hands on to b_dec.
    added: [dW_enc (M, D), dW_dec (M, D_out), dpre (M,)] of a dense path, dpre being Σ_n of the pre-acts' gradient;
    tied: [dW_dec, dpre], dW_dec the sum of both dictionaries'. Only read.

    clip_rows: each latent's row of each dictionary's gradient is scaled by min(1, clip_rows / its norm).
    grad_scale: 0-d float64 on the device, multiplies all gradients; with norms_only, which changes nothing and returns
    the squared norms after projection and clip_rows (grad_scale is not in them), it makes a global clip in two calls.
    skip: 0-d bool on the device: where True nothing is changed, and the squared norms may be NaN.

    Returns float64 (4,): [Σ dW_enc², Σ dW_dec², Σ db_enc², Σ db_dec²] before projection; tied: the first is 0, the
    second that of the summed gradient.
    """
    _check_backend(backend, screen)
    check_that.optimizer(optimizer, betas, eps, weight_decay)
    check_that.update(W_enc, W_dec, b_enc, b_dec, moments, lr, step, pre_bias, seed, optimizer, scales)
    check_that.update_parts(W_enc, W_dec, decoder_pull, db_enc, added, clip_rows, grad_scale)
    for i, term in enumerate(terms):
        check_that.update_term(f"terms[{i}]", term, W_dec if W_enc is None else W_enc, W_dec)
    codes = [term.codes.flatten() for term in terms]
    fixed, computed = lr.new_empty(0, dtype=torch.int64), W_dec.new_empty(0)
    given: Any = (
        W_enc,
        W_dec,
        b_enc,
        b_dec,
        list(moments),
        list(scales),
        [] if screen is None else list(screen.tensors),
        [code.acts.detach() for code in codes],
        [code.indices for code in codes],
        [fixed if code.offsets is None else code.offsets for code in codes],
        [
            computed if term.dacts is None else term.dacts.detach().reshape(code.acts.shape)
            for term, code in zip(terms, codes, strict=True)
        ],
        [term.x.detach() for term in terms],
        [term.grad.detach() for term in terms],
        [term.has_bias for term in terms],
        decoder_pull,
        db_enc,
        list(added),
    )
    numbers: Any = (lr, step, grad_scale, skip, optimizer, *betas, eps, weight_decay, clip_rows)
    with torch.no_grad():
        return _raw.update_latents_(*given, *numbers, unit_norm, pre_bias, norms_only, seed, backend)


__all__ = [
    "active_dot",
    "active_outer",
    "by_latent",
    "decode",
    "decode_error",
    "encode_above",
    "encode_batch_topk",
    "encode_by",
    "encode_topk",
    "library",
    "prepare_screen",
    "update_latents_",
]
