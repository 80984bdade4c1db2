"""Swapped: what a class that stands in for another library's has in common with all others.

An accelerated module is the same object with the same Parameters. Only its class is another one, a subclass of its own,
and the memory of a dictionary that the library stores as (D, M) has another order: one latent per contiguous row.
"""

from __future__ import annotations

import copy
import copyreg
import weakref
from abc import ABC
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastsae import ops
from fastsae.codes import Screen, SparseCodes
from fastsae.model.losses import dead_rows
from fastsae.model.parameters import DENSE_ABOVE
from fastsae.ops import ledger as ledgers
from fastsae.ops import recorded
from fastsae.ops.encode import encode_by, encode_topk_weighted
from fastsae.ops.gradients import latent_sums, rows_of
from fastsae.ops.products import per_latent
from fastsae.ops.sums import fixed_sum
from fastsae.training.dictionaries import Dictionaries
from fastsae.warn import warn

_raw = torch.ops.fastsae
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_were_many: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
"""Of each module with a threshold: whether its last latents above were too many to go sparsely."""
_resting: weakref.WeakKeyDictionary[Any, ops.HeldScreen] = weakref.WeakKeyDictionary()
"""The encoder's low-precision copy of each module in eval mode. Not in the module, whose files are the library's."""

HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
ROOM = 16
"""Active latents per token that always go sparsely."""
LOOK = 64
"""Tokens at most, and one in LOOK_SHARE, on which a module looks whether there are as many again."""
LOOK_SHARE = 16
DEAD_PIECE = 2**24
"""Entries of (N, dead) that a selection among dead latents computes at a time."""


class Unsupported(ValueError):
    """A module, or a setting of one, that `accelerate` has no sparse path for; the message names it."""


@dataclass(eq=False)
class EncoderInputs:
    """An encoder's arguments, made ready for the ops. x (N, D), W (M, D), b (M,); pre_bias: as of `ops.encode_topk`."""

    x: Tensor
    W: Tensor
    b: Tensor
    pre_bias: Tensor | None
    screen: Screen | ops.HeldScreen | None
    ledger: ledgers.Ledger | None

    def noted(self, codes: SparseCodes) -> SparseCodes:
        """codes, after the ledger was told how well its screen served."""
        if isinstance(self.screen, Screen) and self.ledger is not None and codes.redone is not None and codes.n_tokens:
            self.ledger.note_redone(codes.redone / codes.n_tokens)
        return codes

    def topk(self, k: int, scale: Tensor | None = None) -> SparseCodes:
        """The raw pre-acts of the k latents of each token with the largest relu(pre-act · scale); scale (M,) >= 0."""
        how: dict[str, Any] = {"pre_bias": self.pre_bias, "screen": self.screen}
        if scale is None:
            return self.noted(ops.encode_topk(self.x, self.W, self.b, k, **how))
        return self.noted(encode_topk_weighted(self.x, self.W, self.b, k, scale, **how))

    def batch_topk(self, total: int, scale: Tensor | None = None) -> SparseCodes:
        """The raw pre-acts of the `total` largest relu(pre-act · scale) of the batch: a ragged code; scale (M,) > 0.

        A scale makes a scaled copy of the encoder, and the op then prepares its own screen for it.
        """
        n = max(self.x.shape[0], 1)
        k = max(1, -(-total // n))  # the op takes no k of 0, which an empty batch or a k below 1 asks for

        def run(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
            held = None if scale is None else scale.detach()
            if held is None:
                codes = ops.encode_batch_topk(x, W, b, k, screen=self.screen)
            else:
                codes = ops.encode_batch_topk(x, W * held[:, None], b * held, k)
            if total < n * k:
                found = torch.where(codes.occupied(), codes.acts.detach(), 0)
                largest = torch.zeros_like(found, dtype=torch.bool)
                largest[found.topk(total, sorted=False).indices] = True
                codes = codes.keep(largest)
            return codes if held is None else replace(codes, acts=codes.acts / held[codes.indices.long()])

        return self.noted(encode_by(run, self.x, self.W, self.b, pre_bias=self.pre_bias))

    def above(self, bar: Tensor | float) -> SparseCodes | None:
        """The pre-acts above a bar, a number or (M,): a ragged code; None where they are too many to go sparsely.

        Reads back whether they were. Where a module is asked again and again, its own `above` costs less.
        """
        pairs = self.x.shape[0] * self.W.shape[0]
        room = min(pairs, max(int(DENSE_ABOVE * pairs), ROOM * self.x.shape[0]))
        held = torch.as_tensor(bar, device=self.W.device).detach()
        codes, overflow = ops.encode_above(
            self.x, self.W, self.b, held, room, pre_bias=self.pre_bias, screen=self.screen
        )  # fmt: skip
        if bool(overflow):
            return None
        return self.noted(codes.trimmed() if codes.acts.device.type == "cpu" else codes)

    def passing(self, threshold: Tensor, compare: Callable[[Tensor, Tensor], Tensor] = torch.gt) -> SparseCodes | None:
        """The pre-acts that pass a threshold, 0-d or (M,), as `above`; compared as a library does: after they were
        rounded to x's dtype, which in a narrow one can carry them over it. compare: torch.gt or torch.ge."""
        held = threshold.detach()
        below = held.to(self.x.dtype)
        codes = self.above(torch.nextafter(below, torch.full_like(below, -torch.inf)))
        if codes is None:
            return None
        acts = codes.acts.detach()
        bars = per_latent(held, codes) if held.ndim else held  # 0-d: compared in the acts' dtype, not in its own
        return codes.keep(compare(acts, bars) | acts.isnan())

    def largest_dead(self, dead: Tensor, k: int) -> SparseCodes:
        """The k largest relu(pre-act) of each token among `dead`, (M,) bool, of at least k."""
        return ops.encode_topk(
            self.x, self.W, self.b, k, rows=dead_rows(dead), pre_bias=self.pre_bias, screen=self.screen
        )

    def among(self, dead: Tensor, k: int, scale: Tensor | None = None) -> SparseCodes:
        """The raw pre-acts, sign kept, of the k latents of each token with the largest pre-act · scale among `dead`.

        dead (M,) bool, of at least k. A ragged code, since an act may be 0. Dense in (N, dead), in pieces of tokens.
        """
        rows = dead.nonzero().squeeze(1)

        def run(x: Tensor, W: Tensor, b: Tensor) -> SparseCodes:
            n, latents = x.shape[0], W.shape[0]
            with torch.no_grad():
                few, bias = W[rows], b[rows]
                factor = None if scale is None else scale.detach()[rows]
                found = []
                for piece in x.split(max(1, DEAD_PIECE // max(rows.numel(), 1))):
                    pre = torch.addmm(bias, piece, few.t())
                    pre = pre if factor is None else pre * factor
                    found.append(pre.topk(k, dim=-1, sorted=False).indices.sort(-1).values)
                indices = rows[torch.cat(found)].int().flatten()
            offsets = torch.arange(n + 1, dtype=torch.int64, device=x.device) * k
            slots = SparseCodes(torch.ones_like(indices, dtype=x.dtype), indices, latents, offsets)
            return replace(slots, acts=ops.active_dot(x, slots, W) + per_latent(b, slots))

        return encode_by(run, self.x, self.W, self.b, pre_bias=self.pre_bias)


class OverModule:
    """The first base of a swapped class: Python takes the memory layout from it, which must be that of the library's
    class, here of one that begins with nn.Module. Hence the __slots__ of all mixins."""


class OverABC(ABC):  # noqa: B024
    """The same for a class that begins with ABC."""


class Swapped:
    """The mixin that comes next in the bases of every swapped class.

    roles: where each of W_enc, W_dec, b_enc, b_dec is, as a dotted path. transposed: which of them are (D, M).
    """

    __slots__ = ()
    roles: ClassVar[dict[str, str]] = {}
    transposed: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def original(cls) -> type:
        """The library's class, which this one is put in place of."""
        return next(base for base in cls.__mro__ if issubclass(base, nn.Module) and not issubclass(base, Swapped))

    @classmethod
    def check(cls, module: nn.Module) -> None:
        """Raises Unsupported for a setting of the library's module that has no sparse path."""

    def was_changed(self) -> bool:
        """Whether a setting is one by now that `check` refuses, so that the library's own path has to answer; says so
        once."""
        module: Any = self
        try:
            self.check(module)
        except Unsupported as error:
            warn_once(module, f"{error}; while it is so, the library's dense path answers, not fastsae's")
            return True
        return False

    # -- its parameters -----------------------------------------------------------------------------------------------

    def lacks(self) -> tuple[str, ...]:
        """The roles of which the module has no parameter of its own: without them there is no fused update."""
        return ()

    def parameter(self, role: str) -> Tensor:
        found: Any = self
        for part in self.roles[role].split("."):
            found = getattr(found, part)
        return found

    def rows(self, role: str) -> Tensor:
        """A parameter as the ops take it: one latent per contiguous row."""
        return rows_of(self.parameter(role), role in self.transposed)

    def takes_pre_bias(self) -> bool:
        """Whether the encoder subtracts b_dec from its input."""
        return True

    def latents_per_token(self) -> int | None:
        """About how many latents are active, for a screen; None: not known."""
        return None

    def dictionaries(self) -> Dictionaries:
        """What a fused update needs to know: `fastsae.optim` asks for it. Raises Unsupported where something lacks."""
        if self.lacks():
            raise Unsupported(
                f"{self.original().__name__} has no parameter of its own for {', '.join(self.lacks())}, which "
                "fastsae.optim steps; use a torch optimizer"
            )
        main: dict[str, Any] = {role: self.parameter(role) for role in self.roles}
        held = {id(p) for p in main.values()}
        assert isinstance(self, nn.Module)
        others: dict[str, Any] = {name: p for name, p in self.named_parameters() if id(p) not in held}
        return Dictionaries(
            **main, pre_bias=self.takes_pre_bias(), k=weak_call(self, "latents_per_token"), others=others,
            transposed=self.transposed,
        )  # fmt: skip

    def ledger(self) -> ledgers.Ledger | None:
        return None if self.lacks() else ledgers.open_ledger(**{role: self.rows(role) for role in self.roles})

    def encoder_inputs(self, x: Tensor) -> EncoderInputs:
        """The encoder's arguments for x (N, D), from which nothing has been subtracted yet."""
        ledger = self.ledger()
        pre_bias = None
        if self.takes_pre_bias():
            b_dec = self.parameter("b_dec")
            pre_bias = None if ledger is None else b_dec
            x = x - (b_dec if ledger is None else b_dec.detach())
        screen: Screen | ops.HeldScreen | None = None
        if isinstance(self, nn.Module) and self.training:
            _resting.pop(self, None)
            screen = None if ledger is None else ledger.screen_for(x)
        elif isinstance(self, nn.Module):
            screen = _resting.setdefault(self, ops.HeldScreen())
        return EncoderInputs(x, self.rows("W_enc"), self.rows_of_bias(), pre_bias, screen, ledger)

    def rows_of_bias(self) -> Tensor:
        return self.parameter("b_enc")

    def above(self, x: Tensor, bar: Tensor | float, *, biased: bool = True) -> SparseCodes | None:
        """The pre-acts of x (N, D) above a bar, a number or (M,): a ragged code; None where they are too many to go
        sparsely, as early in training.

        At first, and where they were too many before, a few tokens are looked at before all are encoded. biased:
        whether the acts have b_enc in them; what is compared with the bar has.
        """
        if _were_many.get(self, True) and self._are_many(x, bar):
            return None
        encoder = self.encoder_inputs(x)
        if not biased:
            bar = bar - encoder.b.detach()
            encoder = replace(encoder, b=torch.zeros_like(encoder.b), screen=None)
        codes = encoder.above(bar)
        _were_many[self] = codes is None
        return codes

    @torch.no_grad()
    def _are_many(self, x: Tensor, bar: Tensor | float) -> bool:
        """Whether more pre-acts of a few tokens of x (N, D) are above a bar than go sparsely. Reads that back."""
        n = min(LOOK, -(-x.shape[0] // LOOK_SHARE))
        if n == 0:
            return False
        W = self.rows("W_enc")
        pre = torch.addmm(self.rows_of_bias(), self.centred(x[:: x.shape[0] // n][:n]), W.t())
        return bool((pre > bar).double().mean() > max(DENSE_ABOVE, ROOM / W.shape[0]))

    def decoder_norms(self) -> Tensor:
        """‖W_dec_i‖: (M,), whose gradient an open ledger keeps as a pull on each row."""
        W = self.rows("W_dec")
        ledger = ledgers.open_ledger(W_dec=W)
        return W.norm(dim=-1) if ledger is None else recorded.decoder_norms(W, 1, ledger).to(W.dtype)

    def centred(self, x: Tensor) -> Tensor:
        """x (N, D) as the encoder reads it, differentiable in b_dec too."""
        return x - self.parameter("b_dec") if self.takes_pre_bias() else x

    # -- copies and files ---------------------------------------------------------------------------------------------

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __copy__(self) -> Any:
        made = self.__class__.__new__(self.__class__)
        made.__dict__.update(self.__dict__)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the library's own class, so that no file needs fastsae. The Parameters go as they are, transposed memory
        included: an optimizer in the same pickle has to find them again."""
        state = super().__reduce_ex__(protocol)[2]  # type: ignore[misc]
        # Not copyreg.__newobj__, for which pickle wants the object's own class.
        return copyreg._reconstructor, (self.original(), object, None), state  # type: ignore[attr-defined]


def check_sae(module: Any, swaps: dict[type, type]) -> type[Any] | None:
    """The class that takes the place of a module's own; None: it is swapped already. Raises Unsupported."""
    if isinstance(module, Swapped):
        return None
    swap: type[Any] | None = swaps.get(type(module))
    if swap is None:
        names = ", ".join(sorted(one.__name__ for one, its in swaps.items() if issubclass(its, Swapped)))
        kind = f"{type(module).__module__}.{type(module).__name__}"
        raise Unsupported(f"{kind} has no sparse path; expected one of {names}")
    swap.check(module)
    return swap


def accelerate_sae(module: Any, swaps: dict[type, type]) -> None:
    """Puts the swapped class in the place of a module's own, and its dictionaries in the ops' order."""
    swap = check_sae(module, swaps)
    if swap is not None:
        module.__class__ = swap
        for role in set(swap.roles) - set(module.lacks()):
            module.rows(role)


def give_back(module: Swapped) -> None:
    """Undoes `accelerate_sae`."""
    for role in module.transposed:
        p = module.parameter(role)
        p.data = p.data.contiguous()
    module.__class__ = module.original()


def traced() -> bool:
    """Whether torch.compile traces, or a transform of torch.func runs: the library's own operations have rules for
    those, fastsae's have none."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def weak_call(holder: Any, name: str) -> Callable[[], Any]:
    """holder.name() without keeping holder alive; None once it is gone."""
    ref = weakref.ref(holder)

    def call() -> Any:
        found = ref()
        return None if found is None else getattr(found, name)()

    return call


def warn_once(module: nn.Module, message: str) -> None:
    if module not in _warned:
        _warned.add(module)
        warn(message, UserWarning)


def has_hooks(parts: Iterable[Any]) -> bool:
    """Whether there are hooks on any of these; a function, or None, has none."""
    return any(getattr(part, kind, None) for part in parts for kind in HOOKS)


def hooked(module: nn.Module, points: Iterable[Any], names: str) -> bool:
    """Whether hooks on these points want dense acts, so that the library's own path has to answer; says so once."""
    if not has_hooks(points):
        return False
    warn_once(
        module,
        f"a hook on {names} of {type(module).__name__} wants dense acts: while it is there, the library's dense path "
        "answers, not fastsae's",
    )
    return True


def coo(codes: SparseCodes, shape: tuple[int, ...], *, coalesced: bool = False) -> Tensor:
    """A flat code as a torch.sparse_coo tensor of this shape, without empty slots and zeros.

    Unless it has to be coalesced, nothing is read back from a GPU, where such slots hold a 0 instead.
    """
    tokens, acts, latents = codes.token_ids(), codes.acts.flatten(), codes.indices.flatten().long()
    occupied = (codes.occupied() & (codes.acts != 0)).flatten()
    coalesced = coalesced or acts.device.type == "cpu"
    if coalesced:
        tokens, acts, latents = tokens[occupied], acts[occupied], latents[occupied]
    else:
        tokens = tokens.clamp(max=max(codes.n_tokens - 1, 0))
        acts, latents = torch.where(occupied, acts, 0), torch.where(occupied, latents, 0)
    where = torch.stack([*torch.unravel_index(tokens, shape[:-1]), latents])
    return torch.sparse_coo_tensor(where, acts, shape, is_coalesced=coalesced or None, check_invariants=False)


def decoded(codes: SparseCodes, W: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The reconstruction (*batch, D) by W (M, D) of a flat code, whose dense acts have this shape, (*batch, M)."""
    return ops.decode(codes, W).view(*shape[:-1], W.shape[1])


def scaled(codes: SparseCodes, scale: Tensor) -> SparseCodes:
    """Each act times scale (M,) at its latent; differentiable in both."""
    return replace(codes, acts=codes.acts * per_latent(scale, codes), made_by=None)


def token_sums(codes: SparseCodes) -> Tensor:
    """The sum of each token's acts, (N,) of a flat code: a decoder of width 1."""
    ones = torch.ones((codes.d_sae, 1), dtype=codes.acts.dtype, device=codes.acts.device)
    return ops.decode(codes, ones).flatten()


def token_mean(codes: SparseCodes) -> Tensor:
    """The sum of all acts over the number of tokens: 0-d, NaN without tokens."""
    return fixed_sum(codes.acts) / codes.acts.new_tensor(codes.n_tokens)


def values(codes: SparseCodes) -> Tensor:
    """The acts of the occupied slots, as one row without a graph. Reads back how many."""
    return codes.acts.detach()[codes.occupied()]


def filled_indices(codes: SparseCodes) -> Tensor:
    """The indices (N, K) int64 of a fixed code, an empty slot holding its token's first latent: nothing that did not
    fire is named, except where a token has no active latent."""
    indices = codes.indices.long()
    return torch.where(codes.acts.detach() != 0, indices, indices[..., :1])


def remove_along_rows_(ledger: ledgers.Ledger, factor: Tensor) -> None:
    """dW_dec_i -= factor_i ⟨dW_dec_i, W_dec_i⟩ W_dec_i, of gradients that are kept as terms. factor (M,).

    Gathers W_dec once for each term that the update would have gathered it for.
    """
    with torch.no_grad():
        taken, W = ledger.peek(), ledger.rows("W_dec")
        along = torch.zeros_like(factor)
        dense = taken.dense.get("W_dec")
        if dense is not None:
            along += (dense * W).sum(-1)
        if taken.decoder_pull is not None:
            segments = W.unflatten(1, (taken.decoder_pull.shape[1], -1)).square().sum(-1)
            along += (taken.decoder_pull * segments).sum(-1)
        for term in taken.terms:
            code = (term.codes.indices, term.codes.offsets)
            if not term.codes.acts.numel():
                continue
            slopes = _raw.active_dot(term.grad, term.codes.acts, *code, W, None)
            slopes = torch.where(term.codes.acts != 0, slopes, 0)
            along += latent_sums(term.codes.acts * slopes, *code, W.shape[0], None, None)
            if term.dacts is None:
                ledger.know(term, slopes)
        ledger.add_pull(-(factor * along)[:, None])
