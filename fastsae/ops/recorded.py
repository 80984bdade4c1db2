"""The encoders and decoders while a ledger is open: their backward passes write terms into it.

An encoder's backward pass comes after the decoders' that its code went through, and completes their halves of terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fastsae import reference
from fastsae.codes import SparseCodes, UpdateTerm
from fastsae.ops.gradients import encoder_gradients, latent_sums, weighted_rows
from fastsae.ops.ledger import Ledger
from fastsae.reference import wide

_raw = torch.ops.fastsae


@dataclass(eq=False)
class Encoded:
    """The record of an encoder call: its ledger, and the decoders' halves of terms, pending its own backward pass.

    defers: the update may compute the acts' gradients, since nothing else (x's gradient, say) needs them here.
    """

    ledger: Ledger
    defers: bool
    names: tuple[str, ...]
    """The parameters that its backward pass gives a gradient."""
    waiting: list[tuple[int, UpdateTerm]] = field(default_factory=list)
    """With the backward pass that they belong to: those of a failed one are not used."""


def encode(
    run: Callable[[Tensor, Tensor, Tensor], SparseCodes],
    x: Tensor,
    W: Tensor,
    b: Tensor,
    pre_bias: Tensor | None,
    ledger: Ledger,
    backend: str | None,
) -> SparseCodes:
    """run(x, W, b), a code with acts x Wᵀ + b at its slots, with a backward pass that writes into the ledger.

    x (N, D). pre_bias (D,): x is x₀ - pre_bias without a gradient to it; that is computed here.
    """
    made: list[SparseCodes] = []
    acts = _Encode.apply(x, W, b, pre_bias, run, ledger, made, backend)
    centred = pre_bias is not None
    names = ("W_enc", "b_enc", "b_dec") if centred else ("W_enc", "b_enc")
    record = Encoded(ledger, defers=not x.requires_grad and centred == ledger.pre_bias, names=names)
    acts.grad_fn.record = record
    codes = replace(made[0], acts=acts)
    codes.note_made_by(record)
    return codes


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor, pre_bias: Tensor | None, run: Any, ledger: Ledger,
        made: list[SparseCodes], backend: str | None,
    ) -> Tensor:  # fmt: skip
        ctx.ahead = None if ledger.processes is None else ledger.processes.send_ahead(x)
        codes = run(x.detach(), W.detach(), b.detach())
        made.append(codes)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, W, codes.acts, codes.indices, codes.offsets)
        ctx.ledger, ctx.centred, ctx.backend = ledger, pre_bias is not None, backend
        return codes.acts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        grad, ledger, rest = grads[0], ctx.ledger, (None,) * 4
        x, W, acts, indices, offsets = ctx.saved_tensors
        if grad is not None and offsets is None:
            grad = torch.where(acts != 0, grad, 0)
        if not ledger.accumulates(*ctx.record.names):
            if grad is None:
                return (None,) * 8
            needs = (ctx.needs_input_grad[0], True, True)
            dx, dW, db = encoder_gradients(needs, grad, x, W, acts, indices, offsets, ctx.backend)
            assert db is not None
            return dx, dW, db, -_over_shards(ledger, weighted_rows(db, W, ctx.backend)) if ctx.centred else None, *rest
        this_pass = torch._C._current_graph_task_id()
        for of_pass, term in ctx.record.waiting:
            if of_pass == this_pass:
                ledger.add(replace(term, x=x, ahead=ctx.ahead))
        ctx.record.waiting.clear()
        if grad is None:
            return (None,) * 8
        if ledger.pre_bias and not ctx.centred:
            # The update assumes x - b_dec for every x; here the gradient to b_dec goes through autograd, or is absent.
            db = latent_sums(grad, indices, offsets, W.shape[0], None, ctx.backend)
            ledger.add_dense("b_dec", _over_shards(ledger, weighted_rows(db, W, ctx.backend)))
        other = ledger.decoded_with(indices, offsets)
        if other is None:
            other = _encoder_only(ledger, x, grad, indices, offsets)
        else:
            other = replace(other, x=x, dacts=grad[: other.codes.acts.shape[0]])
        ledger.add(replace(other, ahead=ctx.ahead))
        dx = _raw.decode(grad, indices, offsets, W, ctx.backend) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, *rest


def _over_shards(ledger: Ledger, t: Tensor) -> Tensor:
    """The sum of what the processes that share a dictionary have each computed of its gradient."""
    return t if ledger.processes is None else ledger.processes.over_shards(t)


def _encoder_only(ledger: Ledger, x: Tensor, grad: Tensor, indices: Tensor, offsets: Tensor | None) -> UpdateTerm:
    """A term without a reconstruction: in a ragged code, where a slot may hold an act of 0 and yet a gradient."""
    latents, d_out = ledger.rows("W_dec").shape
    slots = SparseCodes(grad, indices, latents, offsets)
    if offsets is None:
        slots = slots.keep(grad != 0)
    nothing = replace(slots, acts=torch.zeros_like(slots.acts))
    return UpdateTerm(nothing, x, x.new_zeros(x.shape[0], d_out), has_bias=False, dacts=slots.acts)


def decode(codes: SparseCodes, W: Tensor, ledger: Ledger, backend: str | None) -> Tensor:
    """A W (N, D) of a flat code, with a backward pass that writes into the ledger."""
    return _Decode.apply(codes.acts, W, codes.detach(), codes.encoded, ledger, backend)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, acts: Tensor, W: Tensor, codes: SparseCodes, encoded: Any, ledger: Ledger, backend: Any
    ) -> Tensor:
        ctx.save_for_backward(acts, W)
        ctx.codes, ctx.encoded, ctx.ledger, ctx.backend = codes, encoded, ledger, backend
        return _raw.decode(codes.acts, codes.indices, codes.offsets, W.detach(), backend)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        acts, W = ctx.saved_tensors
        codes, kept = replace(ctx.codes, acts=acts), keeps(ctx.ledger, [ctx.encoded], has_bias=False)
        dacts = decoded_backward(codes, grads[0], W, ctx.ledger if kept else None, ctx.encoded, False, ctx.backend)
        dW = None
        if not kept and ctx.needs_input_grad[1]:
            dW = _raw.active_outer(acts, codes.indices, codes.offsets, grads[0], W.shape[0], None, ctx.backend)
        return dacts if ctx.needs_input_grad[0] else None, dW, None, None, None, None


def keeps(ledger: Ledger | None, encoded: Iterable[Encoded | None], has_bias: bool) -> bool:
    """Whether a decoder's backward pass keeps its half of a term, of codes that these encoders made."""
    if ledger is None:
        return False
    names = ["W_dec", "b_dec"] if has_bias else ["W_dec"]
    for one in encoded:
        if one is not None and one.ledger is ledger:
            names += one.names
    return ledger.accumulates(*names)


def decoded_backward(
    codes: SparseCodes,
    grad: Tensor,
    W: Tensor,
    ledger: Ledger | None,
    encoded: Encoded | None,
    has_bias: bool,
    backend: str | None,
) -> Tensor | None:
    """The acts' gradient ⟨grad, W⟩ of a decoder; its half of a term goes to the ledger, if there is one.

    None where the update will compute the acts' gradient: then the term waits for the encoder's backward pass, which
    always comes later.
    """
    # The encoder supplies x.
    half = UpdateTerm(codes.detach(), grad, grad, has_bias)
    if ledger is not None and encoded is not None and encoded.ledger is ledger and encoded.defers:
        encoded.waiting.append((torch._C._current_graph_task_id(), half))
        return None
    if ledger is not None:
        ledger.add_decoded(half)
    return _raw.active_dot(grad, codes.acts, codes.indices, codes.offsets, W, backend)


def decoder_norms(W_dec: Tensor, layers: int, ledger: Ledger) -> Tensor:
    """reference.decoder_norms, float32 at least; the ledger keeps its gradient as a pull on each row."""
    return _DecoderNorms.apply(W_dec, layers, ledger)


class _DecoderNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, layers: int, ledger: Ledger) -> Tensor:
        ctx.save_for_backward(W)
        ctx.layers, ctx.ledger = layers, ledger
        return reference.decoder_norms(wide(W.detach()), layers)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (W,) = ctx.saved_tensors
        segments = wide(W).unflatten(1, (ctx.layers, -1))
        each = torch.linalg.vector_norm(segments, dim=-1)
        pull = grads[0][:, None] / torch.where(each > 0, each, torch.inf)
        if ctx.ledger.accumulates("W_dec"):
            ctx.ledger.add_pull(pull)
            return None, None, None
        return (pull[..., None] * segments).flatten(1).to(W.dtype), None, None
