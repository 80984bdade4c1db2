"""The ledger: what a backward pass leaves for a fused update instead of gradients of size (M, D).

An optimizer of fastsae opens a ledger for a pair of dictionaries. While it is open, the backward passes of the ops
append terms, each a sparse code with the encoder's input and the gradient of a reconstruction, and `update_latents_`
spends them. Where an act reaches a decoder as the encoder made it, the update computes its gradient ⟨dL/d recon, W_dec⟩
itself, with both rows in registers: the two backward passes are then one term, and no gather of W_dec runs here.

The terms represent gradients, and p.grad shows that: it is a `LedgerGradient`, which has no storage. Dropping it
(`zero_grad`) drops the terms; its norm and its scaling work, so `clip_grad_norm_` and `GradScaler` do; `to_dense()`
makes the gradient. Gradients from elsewhere (a penalty on weights, say) are added as ordinary tensors.

Everything that does not accumulate into the parameters (torch.autograd.grad, double backward, `backward(inputs=...)`,
torch.compile) uses the ordinary formulas instead and gives dense gradients.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.weak import WeakIdKeyDictionary

from fastsae.codes import Screen, SparseCodes, UpdateTerm
from fastsae.ops import gradients
from fastsae.ops.gradients import gradients_are_bounded, largest_square, latent_sums, weighted_rows

_raw = torch.ops.fastsae

NAMES = ("W_enc", "W_dec", "b_enc", "b_dec")

KEPT_WITH_PROCESSES = 2**30
"""Bytes of terms that a ledger of several processes keeps at least, where the owner sets no limit."""


# -- the gradient that stands for terms -------------------------------------------------------------------------------


class LedgerGradient(torch.Tensor):
    """p.grad of a parameter whose gradient is kept as terms: shape, dtype and device of p, and no storage."""

    parameter_name: str
    _ledger: weakref.ref[Ledger]  # weak, or a parameter would keep itself alive by way of its gradient

    @staticmethod
    def __new__(cls, ledger: Ledger, name: str) -> LedgerGradient:
        p = ledger.parameters[name]
        made = torch.Tensor._make_wrapper_subclass(cls, p.shape, dtype=p.dtype, device=p.device, requires_grad=False)
        made._ledger, made.parameter_name = weakref.ref(ledger), name
        return made

    @property
    def ledger(self) -> Ledger:
        """The ledger that keeps the terms. Raises RuntimeError if its optimizer no longer exists."""
        ledger = self._ledger()
        if ledger is None:
            raise RuntimeError(
                f"the gradient of {self.parameter_name} was kept as terms by an optimizer of fastsae.optim that no "
                "longer exists; drop it (zero_grad) and run the backward pass again"
            )
        return ledger

    def is_of(self, ledger: Ledger) -> bool:
        return self._ledger() is ledger

    def __repr__(self) -> str:  # type: ignore[override]
        ledger = self._ledger()
        what = "its optimizer is gone" if ledger is None else f"{len(ledger.terms)} terms"
        return f"LedgerGradient({self.parameter_name}, {tuple(self.shape)}, {what})"

    def to_dense(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """The gradient as an ordinary tensor."""
        return self.ledger.dense_gradients()[self.parameter_name]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten, op = torch.ops.aten, func.overloadpacket
        mine = args[0] if args and isinstance(args[0], LedgerGradient) else None
        if mine is not None:
            ledger, name = mine.ledger, mine.parameter_name
            if op in (aten.detach, aten.alias):
                return mine
            if op is aten.zero_:
                ledger.clear()
                return mine
            if op is aten.add_ and not isinstance(args[1], LedgerGradient):
                ledger.add_dense(name, ledger.turned(name, args[1]))
                return mine
            if op in (aten.mul_, aten.div_):
                ledger.scale(name, args[1] if op is aten.mul_ else 1 / args[1])
                return mine
            if op is aten.linalg_vector_norm:
                if len(args) > 1 and args[1] != 2:
                    raise RuntimeError(
                        f"the {args[1]}-norm of {name}'s gradient, which is kept as terms, is not known, only its "
                        "2-norm; clip with norm_type=2, or use .grad.to_dense()"
                    )
                return ledger.norm(name).to(mine.dtype)
        if op in (aten._amp_foreach_non_finite_check_and_unscale_, aten._foreach_mul_, aten._foreach_zero_):
            return _each(op, args)
        if op is aten._foreach_norm:
            return [torch.linalg.vector_norm(t, *args[1:2]) for t in args[0]]
        names = sorted({t.parameter_name for t in _flat(args) if isinstance(t, LedgerGradient)})
        raise RuntimeError(
            f"the gradient of {', '.join(names)} is kept as terms for an optimizer of fastsae.optim, and {func} cannot "
            "use it; give these parameters to that optimizer alone, or use .grad.to_dense()"
        )


def _flat(args: Any) -> list[Any]:
    return [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a])]


def _each(op: Any, args: Any) -> None:
    """A foreach op on a list of gradients, some of them kept as terms."""
    ordinary = [t for t in args[0] if not isinstance(t, LedgerGradient)]
    if ordinary:
        op(ordinary, *args[1:])
    for t in args[0]:
        if not isinstance(t, LedgerGradient):
            continue
        if op is torch.ops.aten._foreach_zero_:
            t.ledger.clear()
        elif op is torch.ops.aten._foreach_mul_:
            t.ledger.scale(t.parameter_name, args[1])
        else:
            found_inf, inverse_scale = args[1:3]
            found_inf.logical_or_(~t.ledger.finite())
            if t.ledger.processes is not None:  # also of the ordinary gradients, or one process would make no step
                found_inf.copy_(~t.ledger.processes.everywhere(found_inf == 0))
            t.ledger.scale(t.parameter_name, inverse_scale)


# -- the ledger -------------------------------------------------------------------------------------------------------

_owners: Any = WeakIdKeyDictionary()  # parameter -> weak reference to its ledger


class Processes(Protocol):
    """What a ledger asks of the processes that share its SAE."""

    def over_shards(self, t: Tensor) -> Tensor: ...

    def everywhere(self, good: Tensor) -> Tensor: ...

    def send_ahead(self, x: Tensor) -> Callable[[], Tensor] | None: ...


class KeepsScreen(Protocol):
    redone: Tensor | None

    def current(self, encoder_input: Tensor) -> Screen | None: ...


class Taken(NamedTuple):
    """What a step consumes: terms; dense gradients by name; decoder_pull (M, L); the terms' factor, 0-d float64."""

    terms: list[UpdateTerm]
    dense: dict[str, Tensor]
    decoder_pull: Tensor | None
    factor: Tensor | None


class Ledger:
    """The gradient of W_enc (M, D_in; None: tied), W_dec (M, D_out), b_enc (M,) and b_dec (D_out,), as terms.

    transposed  the dictionaries that are given as (D, M), each with a transpose that is contiguous: `rows_of(p, True)`
                is what the ops get, and what terms and sums are shaped like. Only a .grad is shaped like its parameter.
    pre_bias   encoders that are told of b_dec (`pre_bias=`) get x - b_dec, and the update adds b_dec's share.
    processes   those that share the SAE, if there are several: then a step joins their terms, and none become dense.
    term_bytes   set by the owner: what terms of earlier backward passes may take; see `most_bytes`.
    measure, kept   set by the owner: the squared norms (4,) of the gradients as its step would use them, None where the
                    owner is gone; and what keeps the low-precision copy of the encoder that a forward pass may use.
    """

    def __init__(
        self, W_enc: Tensor | None, W_dec: Tensor, b_enc: Tensor, b_dec: Tensor, pre_bias: bool,
        transposed: Container[str] = (),
    ):  # fmt: skip
        named = zip(NAMES, (W_enc, W_dec, b_enc, b_dec), strict=True)
        self.parameters = {name: p for name, p in named if p is not None}
        self.transposed = transposed
        self.pre_bias = pre_bias
        self.measure: Callable[[], Tensor | None] = lambda: None
        self.kept: KeepsScreen | None = None
        self.processes: Processes | None = None
        self.term_bytes: int | None = None
        self.terms: list[UpdateTerm] = []
        self._decoded: list[UpdateTerm] = []
        self._dense: dict[str, Tensor] = {}
        self._pull: Tensor | None = None
        self._factors: dict[str, list[Any]] = {}
        self._norms: Tensor | None = None
        self._versions: tuple[int, ...] | None = None
        self._stamps: list[tuple[Tensor, int]] = []
        self._nodes: dict[str, Any] = {}
        self._pass: int | None = None

    def open(self) -> None:
        """From now on backward passes write here, until the owner is deleted or a parameter gets another ledger."""
        for p in self.parameters.values():
            _owners[p] = weakref.ref(self)

    @property
    def is_open(self) -> bool:
        return all(ref is not None and ref() is self for ref in map(_owners.get, self.parameters.values()))

    def turned(self, name: str, t: Tensor) -> Tensor:
        """Converts a tensor between the shape of this parameter and that of its rows, in either direction."""
        return t.t() if name in self.transposed else t

    def rows(self, name: str) -> Tensor:
        """The parameter's memory, detached, one latent per row."""
        return gradients.rows_of(self.parameters[name], name in self.transposed).detach()

    def has(self, role: str, t: Tensor) -> bool:
        """Whether t is what the ops get of this parameter."""
        p = self.parameters.get(role, self.parameters["W_dec"])
        if role not in self.transposed:
            return t is p
        same = t._base is p and t.shape == p.shape[::-1] and t.stride() == p.stride()[::-1]
        return same and t.data_ptr() == p.data_ptr()

    def screen_for(self, x: Tensor) -> Screen | None:
        """The owner's low-precision copy of the encoder, for inputs x (N, D_in); None if it keeps none."""
        return None if self.kept is None else self.kept.current(x)

    def note_redone(self, share: Tensor) -> None:
        """Records the share of tokens that the encoder had to encode again with that copy, 0-d."""
        if self.kept is not None:
            self.kept.redone = share

    # -- what backward passes ask and say ----------------------------------------------------------------------------

    def accumulates(self, *names: str) -> bool:
        """Whether the running backward pass accumulates into the .grad of these parameters, which are in its graph, and
        only a step reads the gradients.
        """
        if torch.is_grad_enabled():  # create_graph: the gradient itself must be differentiable
            return False
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.parameters.values()):
            return False  # a hook must receive the gradient
        if not self._nodes:  # not at the start, which may be in inference mode
            self._nodes = {name: get_gradient_edge(p).node for name, p in self.parameters.items()}
        nodes = [self._nodes.get(name, self._nodes["W_dec"]) for name in names]
        try:
            return all(torch._C._will_engine_execute_node(node) for node in nodes)
        except RuntimeError:  # torch's answer inside torch.autograd.grad
            return False

    def add(self, term: UpdateTerm) -> None:
        """Adds a complete term."""
        self._begin()
        self._make_room()
        self.terms.append(term)
        self._stamp(term)

    def add_decoded(self, term: UpdateTerm) -> None:
        """The decoder's half of a term, whose acts went through other functions; the encoder's half comes later."""
        self._begin()
        self._make_room()
        self._decoded.append(term)
        self._stamp(term)

    def decoded_with(self, indices: Tensor, offsets: Tensor | None) -> UpdateTerm | None:
        """Takes out the decoder's half that has these slots, if there is one."""
        for i, term in enumerate(self._decoded):
            if _same_slots(term.codes, indices, offsets):
                return self._decoded.pop(i)
        return None

    def know(self, term: UpdateTerm, dacts: Tensor) -> None:
        """Gives a pending term its acts' gradients, which the update would have computed."""
        self.terms[self.terms.index(term)] = replace(term, dacts=dacts)

    def set_pre_bias(self, pre_bias: bool) -> None:
        """Whether encoders get x - b_dec from now on; earlier terms are used as they were made."""
        if pre_bias != self.pre_bias and self.terms:
            self._begin()
            self._fold()
        self.pre_bias = pre_bias

    def _stamp(self, term: UpdateTerm) -> None:
        """Notes the state of the tensors of a term, which may be the caller's own."""
        self._stamps += [(t, t._version) for t in _tensors(term)]

    def check(self) -> None:
        """Raises RuntimeError for anything that a step could not use: see `take`. Changes nothing."""
        if any(isinstance(p.grad, LedgerGradient) and p.grad.is_of(self) for p in self.parameters.values()):
            self._forget_discarded()
            if self._versions is not None and self._versions != self._current_versions():
                self._raise_written()
            if any(t._version != version for t, version in self._stamps):
                raise RuntimeError(
                    "a tensor of a forward or backward pass (x, the code's acts or indices, or the gradient given to "
                    "backward) was written before optimizer.step(), which still reads it; write a copy, or step first"
                )
            self._factor()

    def add_pull(self, pull: Tensor) -> None:
        """dW_dec_i gains pull[i, l] · W_dec_i in its l-th segment; pull (M, L)."""
        self._begin()
        self._pull = pull if self._pull is None else self._pull + pull

    def add_dense(self, name: str, grad: Tensor) -> None:
        """A gradient of one parameter's rows as an ordinary tensor, beside the terms."""
        self._begin()
        self._dense[name] = grad.clone() if name not in self._dense else self._dense[name].add_(grad)
        self._norms = None

    def _begin(self) -> None:
        """Handles discarded gradients, and makes every parameter's .grad represent what is kept here."""
        self._forget_discarded()
        if any(self._factors.values()):
            raise RuntimeError(
                "gradients were added after they had been scaled or clipped; call optimizer.step() first"
            )
        for name, p in self.parameters.items():
            mine = isinstance(p.grad, LedgerGradient) and p.grad.is_of(self)
            if not mine:
                if p.grad is not None and not isinstance(p.grad, LedgerGradient):
                    self._dense[name] = self.turned(name, p.grad)
                p.grad = LedgerGradient(self, name)
        self._norms = None
        versions = self._current_versions()
        if self._versions is not None and self._versions != versions:
            self._raise_written()
        self._versions = versions

    def _forget_discarded(self) -> None:
        kept = [isinstance(p.grad, LedgerGradient) and p.grad.is_of(self) for p in self.parameters.values()]
        if not any(kept):
            self.clear()
        elif not all(kept):
            missing = [name for name, k in zip(self.parameters, kept, strict=True) if not k]
            raise RuntimeError(
                f"the gradients of {', '.join(missing)} were replaced or dropped, but those of the other parameters of "
                "the same SAE were not, and all are kept together; drop all of them with optimizer.zero_grad()"
            )

    def _current_versions(self) -> tuple[int, ...]:
        return tuple(p._version for name, p in self.parameters.items() if name.startswith("W"))

    def _raise_written(self) -> None:
        raise RuntimeError(
            "W_enc or W_dec was written between backward() and optimizer.step(), which computes gradients from them; "
            "write weights before the forward pass or after the step"
        )

    # -- what owners ask ---------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drops everything that was not used."""
        self.terms, self._decoded, self._dense, self._pull = [], [], {}, None
        self._factors, self._norms, self._versions, self._stamps = {}, None, None, []

    def take(self) -> Taken | None:
        """Returns and clears everything since the last step; None if there was no gradient at all."""
        found = self.look()
        self.clear()
        return found

    def look(self) -> Taken | None:
        """What `take` would return; it stays."""
        if not any(isinstance(p.grad, LedgerGradient) and p.grad.is_of(self) for p in self.parameters.values()):
            self.clear()
        self.check()
        terms = self._all_terms()
        dense = dict(self._dense)
        for name, p in self.parameters.items():
            if p.grad is not None and not isinstance(p.grad, LedgerGradient):
                dense[name] = self.turned(name, p.grad)
        taken = Taken(terms, dense, self._pull, self._factor())
        return taken if terms or dense or taken.decoder_pull is not None else None

    def drop(self) -> None:
        """Drops every parameter's .grad."""
        for p in self.parameters.values():
            p.grad = None

    def _all_terms(self) -> list[UpdateTerm]:
        """The terms, and the decoder's halves whose encoder has no gradient."""
        return [*self.terms, *map(self._decoder_only, self._decoded)]

    def _decoder_only(self, term: UpdateTerm) -> UpdateTerm:
        d_in = self.rows("W_enc" if "W_enc" in self.parameters else "W_dec").shape[1]
        x = term.grad.new_zeros(1, 1).expand(term.grad.shape[0], d_in)
        return UpdateTerm(term.codes, x, term.grad, term.has_bias, torch.zeros_like(term.codes.acts))

    def scale(self, name: str, factor: Any) -> None:
        """Multiplies the gradient of one parameter; a step wants the same factors for all of them."""
        self._factors.setdefault(name, []).append(factor)

    def _factor(self) -> Tensor | None:
        """The product of the factors, 0-d float64. Raises RuntimeError where parameters got different ones."""
        lists = [self._factors.get(name, []) for name in self.parameters]
        if not any(lists):
            return None
        if any(len(one) != len(lists[0]) for one in lists):
            raise RuntimeError(
                f"gradients were scaled {dict(zip(self.parameters, map(len, lists), strict=True))} times, expected "
                "the same number for all of an SAE's; scale or clip all of its parameters together"
            )
        device = self.parameters["W_dec"].device
        product = torch.ones((), dtype=torch.float64, device=device)
        for factor in lists[0]:
            product = product * (factor.double() if isinstance(factor, Tensor) else factor)
        return product

    def norm(self, name: str) -> Tensor:
        """‖gradient‖ of one parameter as a step would use it (W_dec's projected, where rows keep norm 1), float64."""
        if self._norms is None:
            squares = self.measure()
            if squares is None:
                raise RuntimeError("only the optimizer can measure the norm of its gradients, and it no longer exists")
            self._norms = squares.sqrt()
        norm = self._norms[NAMES.index(name)]
        for factor in self._factors.get(name, []):
            norm = norm * factor
        return norm

    def peek(self) -> Taken:
        """What `take` would return, without the factor; nothing is cleared."""
        self.check()
        return Taken(self._all_terms(), dict(self._dense), self._pull, None)

    def finite(self) -> Tensor:
        """Whether no gradient can be infinite or NaN: 0-d bool on the device. See `gradients_are_bounded`."""
        pull = [] if self._pull is None else [self._pull]
        W = self.parameters["W_dec"]
        good = gradients_are_bounded(
            self._all_terms(), [*self._dense.values(), *pull], W, largest_square(W.dtype, narrow=False)
        )
        return good if self.processes is None else self.processes.everywhere(good)

    # -- dense gradients from terms ----------------------------------------------------------------------------------

    @property
    def most_bytes(self) -> int:
        """What terms of earlier backward passes may take; see `_make_room`. By default the size of dense gradients."""
        if self.term_bytes is not None:
            return self.term_bytes
        dense = sum(p.nbytes for p in self.parameters.values())
        return dense if self.processes is None else max(dense, KEPT_WITH_PROCESSES)

    def held_bytes(self) -> int:
        """Bytes of the tensors that the terms keep alive; of a view only its own."""
        held = {(t.data_ptr(), t.nbytes) for term in (*self.terms, *self._decoded) for t in _tensors(term)}
        return sum(nbytes for _, nbytes in held)

    def _make_room(self) -> None:
        """Called at the first term of a backward pass, so that accumulation over many passes needs bounded memory: if
        the terms of earlier passes take more than `most_bytes`, they are turned into dense gradients.

        The terms of a single pass are never turned into dense gradients: they keep alive only what its graph held.
        Raises RuntimeError instead where several processes share the SAE.
        """
        this_pass = torch._C._current_graph_task_id()
        if this_pass == self._pass:
            return
        self._pass = this_pass
        held, most = self.held_bytes(), self.most_bytes
        if held > most and self.processes is not None:
            raise RuntimeError(
                f"the backward passes since the last step left terms of {held:,} bytes, expected at most {most:,}: "
                "with several processes they are kept until the step joins them. Call optimizer.step() after fewer "
                "passes, or give the optimizer a larger term_bytes; zero_grad() drops what is there"
            )
        if held > most:
            self._fold()

    def _fold(self) -> None:
        """Turns the terms into dense gradients."""
        self.check()
        folded = self._summed(self._all_terms())
        self.terms, self._decoded, self._stamps = [], [], []
        for name, grad in folded.items():
            self.add_dense(name, grad)

    def dense_gradients(self) -> dict[str, Tensor]:
        """Every gradient as an ordinary tensor, by name; nothing is cleared. Raises RuntimeError with `processes`."""
        if self.processes is not None:
            raise RuntimeError(
                "the gradients of an SAE on several processes are joined in the step, and none of them has the whole; "
                "leave them to optimizer.step()"
            )
        self.check()
        sums = self._summed(self._all_terms())
        for name, grad in self._dense.items():
            sums[name] += grad
        if self._pull is not None:
            W = self.rows("W_dec")
            segments = W.unflatten(1, (self._pull.shape[1], -1))
            sums["W_dec"] += (self._pull[..., None] * segments).flatten(1)
        factor = self._factor()
        if factor is not None:
            sums = {name: grad * factor.to(grad.dtype) for name, grad in sums.items()}
        return {name: self.turned(name, grad) for name, grad in sums.items()}

    @torch.no_grad()
    def _summed(self, terms: list[UpdateTerm]) -> dict[str, Tensor]:
        sums = {name: torch.zeros_like(self.rows(name)) for name in self.parameters}
        W_dec = self.rows("W_dec")
        W_enc = self.rows("W_enc") if "W_enc" in self.parameters else W_dec
        encoder = sums.get("W_enc", sums["W_dec"])
        for term in terms:
            code = (term.codes.indices, term.codes.offsets)
            acts, dacts = term.codes.acts, term.dacts
            if dacts is None:
                dacts = torch.where(acts != 0, _raw.active_dot(term.grad, acts, *code, W_dec, None), 0)
            order = _raw.by_latent(acts, *code, W_dec.shape[0], None)
            sums["W_dec"] += _raw.active_outer(acts, *code, term.grad, W_dec.shape[0], order, None)
            encoder += _raw.active_outer(dacts, *code, term.x.contiguous(), W_dec.shape[0], order, None)
            db = latent_sums(dacts, *code, W_dec.shape[0], order, None)
            sums["b_enc"] += db
            if term.has_bias:
                sums["b_dec"] += term.grad.sum(0)
            if self.pre_bias:
                sums["b_dec"] -= weighted_rows(db, W_enc)
        return sums


def _tensors(term: UpdateTerm) -> list[Tensor]:
    """What a term keeps alive."""
    code = term.codes
    held = (term.x, term.grad, term.dacts, code.acts, code.indices, code.offsets)
    return [t for t in held if t is not None]


def open_ledger(**roles: Tensor) -> Ledger | None:
    """The open ledger of these parameters, each in its role (W_dec=...), if a backward pass could use it; else None."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    refs = [_owners.get(t if t._base is None else t._base) for t in roles.values()]
    ledger = refs[0]() if refs and refs[0] is not None else None
    if ledger is None or not ledger.is_open:
        return None
    if not all(ledger.has(role, t) for role, t in roles.items()):
        return None
    if torch._C._are_functorch_transforms_active() or not all(p.requires_grad for p in ledger.parameters.values()):
        return None
    return ledger


def _same_slots(codes: SparseCodes, indices: Tensor, offsets: Tensor | None) -> bool:
    """Whether a code has these very slots; a ragged one may be cut to fewer than its encoder had room for."""
    mine = codes.indices
    if mine.data_ptr() != indices.data_ptr() or (codes.offsets is None) != (offsets is None):
        return False
    if codes.offsets is None or offsets is None:
        return mine.shape == indices.shape and mine.stride() == indices.stride()
    same = codes.offsets.data_ptr() == offsets.data_ptr() and codes.offsets.shape == offsets.shape
    return same and mine.numel() <= indices.numel()
