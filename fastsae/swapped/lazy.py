"""LazyActs: a dense (*batch, M) tensor that is computed when something reads it, and carries its sparse code till then.

Libraries hand dense acts from their encoder to their decoder. An accelerated decoder takes the code; anything else sees
an ordinary tensor, with its gradient, at the cost of making it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from fastsae.codes import SparseCodes


class LazyActs(torch.Tensor):
    """Shape, dtype, device and gradient of a dense tensor; its numbers when an op, a hook or numpy() asks for them.

    kept: what an accelerated module wants to know of where it came from, as long as nobody can have written the
    numbers: an op in place, a view and numpy() end it, in inference mode too, where tensors count no versions.
    """

    _make: Callable[[], Tensor]
    _dense: Tensor | None
    _kept: Any
    _made_at: int | None
    _codes: SparseCodes | None = None
    owner: tuple[Any, ...] | None = None

    @staticmethod
    def __new__(cls, make: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor) -> LazyActs:
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made._make, made._dense, made._kept, made._made_at = make, None, None, None
        return made

    def keep(self, kept: Any, owner: tuple[Any, ...] | None = None) -> LazyActs:
        """owner: of whom `kept` is true alone; None: of everybody."""
        self._kept, self._made_at, self.owner = kept, _version(self), owner
        return self

    @property
    def kept(self) -> Any:
        """What `keep` was given; None where the numbers were written since, or were made a leaf of the graph."""
        found = self._kept if self._made_at == _version(self) else None
        leaf = self.requires_grad and self.is_leaf
        return None if leaf or isinstance(found, Fired) else found

    @property
    def codes(self) -> SparseCodes | None:
        """The code of these numbers, without a graph, where it is known."""
        return self._codes if self.kept is not None else None

    @property
    def fired(self) -> SparseCodes | None:
        """Of a mask of what fired: its code of ones, and zeros for what did not."""
        found = self._kept if self._made_at == _version(self) else None
        return found.ones if isinstance(found, Fired) else None

    @property
    def is_made(self) -> bool:
        """Whether something has read the numbers."""
        return self._dense is not None

    def plain(self) -> Tensor:
        """The numbers, as an ordinary tensor without a graph."""
        if self._dense is None:
            with torch.no_grad():
                self._dense = self._make()
        return self._dense

    def numpy(self, *, force: bool = False) -> Any:
        if self.requires_grad and not force:
            raise RuntimeError("Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead.")
        return self._shared().numpy(force=force)

    def tolist(self) -> Any:
        return self.plain().tolist()

    # Who asks for the gradient of these numbers gets it from a decoder that reads them, not their code.

    def retain_grad(self) -> None:
        super().retain_grad()
        self._kept = None

    def register_hook(self, hook: Any) -> Any:
        found = super().register_hook(hook)  # type: ignore[no-untyped-call]
        self._kept = None
        return found

    # What reads memory rather than calling an op finds none in this tensor: numbers of nobody, or a crash.

    def _shared(self) -> Tensor:
        """The numbers, for somebody who may write them unseen."""
        self._kept = None
        return self.plain()

    def data_ptr(self) -> int:
        return self._shared().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._shared().untyped_storage()

    def __dlpack__(self, **how: Any) -> Any:
        if self.requires_grad:
            raise BufferError("Can't export tensors that require gradient, use tensor.detach()")
        return self._shared().__dlpack__(**how)

    def share_memory_(self) -> LazyActs:
        self._shared().share_memory_()
        return self

    def is_shared(self) -> bool:
        return self.is_made and self.plain().is_shared()

    @property
    def data(self) -> Tensor:
        with torch.no_grad():
            return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise RuntimeError(
                f"acts.data is given {tuple(value.shape)} of {value.dtype}, expected {tuple(self.shape)} of "
                f"{self.dtype}; for other acts, make a tensor of your own"
            )
        self._kept, self._dense = None, value.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.plain(), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.plain().detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)

    def __repr__(self, **how: Any) -> str:  # type: ignore[override]
        return self.plain().__repr__(**how)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        counted = _counted(func, args, kwargs or {})
        if counted is not None:
            return counted
        plain_args, plain_kwargs = pytree.tree_map_only(LazyActs, LazyActs.plain, (args, kwargs or {}))
        schema = func._schema
        if schema.is_mutable or any(one.alias_info is not None for one in schema.returns):
            for one in pytree.tree_leaves((args, kwargs or {})):
                if isinstance(one, LazyActs):
                    one._kept = None
        found = func(*plain_args, **plain_kwargs)
        # An op in place gives back what it was given.
        first = args[0] if args and isinstance(args[0], LazyActs) else None
        return first if first is not None and found is plain_args[0] else found


LazyActs.__torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


@dataclass(frozen=True, eq=False)
class Fired:
    ones: SparseCodes


def _counted(func: Any, args: Any, settings: dict[str, Any]) -> Tensor | None:
    """acts.bool(), the mask's .float(), and that one's sum over tokens or over latents: how trainers count what fires.

    Lazy, or from the code: sums of ones are exact in any order. None for anything else.
    """
    given = args[0] if args and isinstance(args[0], LazyActs) else None
    if given is None or given.is_made or given.ndim != 2 or not given.numel():
        return None
    if func is torch.ops.aten._to_copy.default:
        asked = {name: value for name, value in settings.items() if value}
        if len(args) == 1 and asked == {"dtype": torch.bool} and (codes := given.codes) is not None:
            fires = (codes.occupied() & (codes.acts != 0)).float()
            return _mask(replace(codes, acts=fires, made_by=None), given, torch.bool)
        if len(args) == 1 and asked == {"dtype": torch.float32} and (ones := given.fired) is not None:
            return _mask(ones, given, torch.float32)
    elif func is torch.ops.aten.sum.dim_IntList and not settings and len(args) == 2 and len(args[1] or ()) == 1:
        ones, over = given.fired, args[1][0]
        if ones is not None and given.dtype is torch.float32 and -2 <= over < 2:
            where = ones.token_ids() if over % 2 else ones.indices.flatten().long()
            counts = ones.acts.new_zeros(given.shape[1 - over % 2])
            # Slots that no token owns add 0, wherever that is.
            return counts.index_add_(0, where.clamp(0, len(counts) - 1), ones.acts.flatten())
    return None


def _mask(ones: SparseCodes, like: LazyActs, dtype: torch.dtype) -> LazyActs:
    found = LazyActs(lambda: ones.to_dense().view(like.shape).to(dtype), tuple(like.shape), ones.acts.to(dtype))
    return found.keep(Fired(ones))


def kept_of(given: Any) -> Any:
    """What lazy acts keep; None for other tensors, and where the numbers were written since."""
    return given.kept if isinstance(given, LazyActs) else None


def spread(codes: SparseCodes, shape: tuple[int, ...], kept: Any, owner: tuple[Any, ...] | None = None) -> Tensor:
    """The dense tensor (*batch, M) of a flat code, lazily; differentiable in its acts. owner: as of `keep`."""
    found = _Spread.apply(codes.acts, codes.detach(), shape)
    found._codes = codes.detach()
    return found.keep(kept, owner)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, acts: Tensor, codes: SparseCodes, shape: tuple[int, ...]) -> Tensor:
        ctx.codes = codes
        return LazyActs(lambda: codes.to_dense().view(shape), shape, acts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        codes = ctx.codes
        flat = grads[0].reshape(codes.n_tokens, codes.d_sae)
        indices = torch.where(codes.occupied(), codes.indices, 0).long()
        if codes.offsets is None:
            found = flat.gather(1, indices)
        else:
            found = flat[codes.token_ids().clamp(max=max(codes.n_tokens - 1, 0)), indices]
        return torch.where(codes.occupied(), found, 0), None, None


@dataclass(eq=False)
class Source:
    """What the pre-acts were made of: x (N, D) before any bias is subtracted, scale (M,) or None.

    codes: the pre-acts that a threshold rule considers, with their graph, or None.
    """

    x: Tensor
    scale: Tensor | None = None
    codes: SparseCodes | None = None


def lazy_pre_acts(
    x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None, relu: bool, shape: tuple[int, ...], kept: Any
) -> Tensor:
    """(x Wᵀ + b) · scale as (*batch, M), or relu of it, lazily; differentiable. x (N, D), W (M, D), b, scale (M,)."""
    found = _PreActs.apply(x, W, b, scale, relu, shape)
    return found.keep(kept)


class _PreActs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None, relu: bool, shape: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(x, W, b, scale)
        ctx.relu = relu

        def make() -> Tensor:
            pre = torch.addmm(b.detach(), x.detach(), W.detach().t())
            pre = pre if scale is None else pre * scale.detach()
            return (pre.relu_() if relu else pre).view(shape)

        return LazyActs(make, shape, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, W, b, scale = ctx.saved_tensors
        grad = grads[0].reshape(x.shape[0], W.shape[0])
        of_scale = None
        if ctx.relu or (scale is not None and ctx.needs_input_grad[3]):
            pre = torch.addmm(b, x, W.t())
            if ctx.relu:  # a scale is a norm, and keeps the sign
                grad = torch.where(pre > 0, grad, 0)
            if scale is not None and ctx.needs_input_grad[3]:
                of_scale = (grad * pre).sum(0)
        grad = grad if scale is None else grad * scale
        return grad @ W, grad.t() @ x, grad.sum(0), of_scale, None, None
