"""Puts an SAE's reconstruction in the place of a model's activations, or sets latents in them.

    splice                   x -> x̂
    splice with error_term   x -> x̂ + e,  e = x - x̂ held fixed
    steer                    x -> x̂' + e = x + (x̂' - x̂),  x̂' the decoding of the code with the given latents set

Both install one forward hook for the `with` block, and remove it however the block ends. They nest, and several may be
at one place: each sees the result of the one before. Gradients flow through the reconstruction to the
SAE and to the layers below. e is a constant in the backward pass of `splice`, as in Marks et al. (2024, "Sparse Feature
Circuits"): with e = x - x̂ differentiated, the gradient of every latent would be 0. `steer` has its true derivative.
Source of steering with the error kept: Templeton et al. (2024, "Scaling Monosemanticity"), feature steering.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from fastsae.codes import SparseCodes
from fastsae.data.hooks import Hook, Place, find, input_of, with_input
from fastsae.data.models import LanguageModel

if TYPE_CHECKING:
    from fastsae.model.sae import SparseAutoencoder

Site: TypeAlias = Hook | tuple[Hook, Hook]
"""A hook (`fastsae.data.hooks.find`), or for a transcoder two: where it reads and what it replaces, such as
("mlp.14:input", "mlp.14")."""
Where: TypeAlias = Callable[[Tensor], Tensor]
"""Activations (*batch, d_in) -> bool (*batch): the tokens at which the activation is replaced."""
Edit: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(rows read (n, d_in), rows to replace (n, d_out)) -> rows (n, d_out), any floating dtype."""


@contextlib.contextmanager
def splice(
    model: nn.Module | LanguageModel,
    hook: Site | Mapping[Site, SparseAutoencoder],
    sae: SparseAutoencoder | None = None,
    *,
    error_term: bool = False,
    where: Where | Mapping[Site, Where] | None = None,
) -> Iterator[None]:
    """While the block runs, the model computes with the reconstruction of its activations at a hook.

    hook        a place of the model, see `Site`; or {hook: sae, ...} for several at once.
    error_term  add the reconstruction error: the model's output is unchanged, to the last bit, and the gradients pass
                through the latents.
    where       the tokens at which the activation is replaced, see `fastsae.data.Ordinary`, for all hooks or by hook;
                elsewhere it stays the model's own, to the last bit. None: every token. An SAE that was trained without
                the first positions must not replace them: in many models they hold an attention sink.
    The SAE's dtype and device may differ from the model's, and its mode is not changed: after `sae.eval()` rules with a
    running threshold use it. The hooked module may return a tensor or a tuple that begins with one.
    Raises ValueError for a hook that the model does not have and, within the block, for activations of another width.
    """
    if isinstance(hook, Mapping):
        if sae is not None:
            raise ValueError("splice: got a mapping of hooks to SAEs and another SAE; give only one of them")
        pairs = dict(hook)
    elif sae is None:
        raise ValueError(f"splice: no SAE for the hook {hook!r}; pass splice(model, hook, sae) or {{hook: sae}}")
    else:
        pairs = {hook: sae}
    check_apart(model, pairs)
    with contextlib.ExitStack() as stack:
        for site, module in pairs.items():
            edit = _splicing(module, _label(site), error_term)
            stack.enter_context(edited(model, site, edit, where_of(where, site)))
        yield


@contextlib.contextmanager
def steer(
    model: nn.Module | LanguageModel,
    hook: Site,
    sae: SparseAutoencoder,
    latents: Mapping[int, float | Tensor],
    *,
    where: Where | None = None,
) -> Iterator[None]:
    """While the block runs, the given latents have the given activations at every token, and nothing else changes.

    latents  {latent: activation}, in the units of `sae.encode(x).acts`; a 0-d tensor may require a gradient. 0 ablates.
    where    the tokens, as in `splice`; None: every token.
    The reconstruction error is kept: x becomes x + (x̂' - x̂). Setting a latent to its current value changes no bit.
    Raises ValueError for a latent that the SAE does not have or a value that is not finite; else as `splice`.
    """
    for latent, value in latents.items():
        if isinstance(latent, bool) or not isinstance(latent, int) or not 0 <= latent < sae.d_sae:
            raise ValueError(f"steer: no latent {latent!r}: the SAE has latents 0 to {sae.d_sae - 1}")
        number = float(value.detach() if isinstance(value, Tensor) else value)
        if not math.isfinite(number):
            raise ValueError(f"steer: latent {latent} is set to {number}, expected a finite activation")
    with edited(model, hook, _steering(sae, _label(hook), latents), where):
        yield


@contextlib.contextmanager
def edited(model: nn.Module | LanguageModel, site: Site, edit: Edit, where: Where | None = None) -> Iterator[None]:
    """While the block runs, the activations at a site are edit(rows read, rows to replace), at the tokens of `where`.

    Tokens that `where` leaves out keep their bits. Raises as `splice`.
    """
    module = model.model if isinstance(model, LanguageModel) else model
    reads, writes = site if isinstance(site, tuple) else (site, site)
    source, goal = find(module, reads), find(module, writes)
    same = (source.module, source.takes_input) == (goal.module, goal.takes_input)
    read: list[Tensor] = []  # what a transcoder has read in this pass and not yet used

    def replace(found: Any) -> Tensor:
        y = _checked(found, goal)
        if not same and not read:
            raise ValueError(f"{goal.name} comes before {source.name} in the model's forward pass; swap the two hooks")
        return _edited(y if same else read.pop(), y, edit, where, goal.name)

    def keep(found: Any) -> None:
        read[:] = [_checked(found, source)]

    with contextlib.ExitStack() as stack:
        if not same:
            stack.enter_context(_watch(source, keep))
        stack.enter_context(_watch(goal, replace))
        yield


def check_apart(model: nn.Module | LanguageModel, sites: Iterable[Site]) -> None:
    """Raises ValueError if two sites, under any names, replace the same activations."""
    module = model.model if isinstance(model, LanguageModel) else model
    seen: dict[tuple[nn.Module, bool], Site] = {}
    for site in sites:
        place = find(module, site[1] if isinstance(site, tuple) else site)
        other = seen.setdefault((place.module, place.takes_input), site)
        if other != site:
            raise ValueError(f"the hooks {other!r} and {site!r} are the same place, {place.name}; splice in one SAE")


def where_of(where: Where | Mapping[Site, Where] | None, site: Site) -> Where | None:
    """The choice of tokens for one of several sites."""
    return where.get(site) if isinstance(where, Mapping) else where


def reconstruct(sae: SparseAutoencoder, rows: Tensor) -> Tensor:
    """x̂ (n, d_out) of rows (n, d_in) of any dtype and device; in the SAE's dtype, on the rows' device."""
    x = rows.to(sae.W_dec.device, sae.W_dec.dtype)
    return sae.decode(sae.encode(x), like=x).to(rows.device)


def acts_of(codes: SparseCodes, latents: Sequence[int]) -> Tensor:
    """The acts (N, len(latents)) of some latents at every token, 0 where not active."""
    flat = codes.flatten()
    acts, tokens = flat.acts.flatten(), flat.token_ids()
    held, indices = flat.occupied().flatten(), flat.indices.flatten()
    columns = []
    for latent in latents:
        mine = held & (indices == latent)
        columns.append(acts.new_zeros(flat.n_tokens).index_add(0, tokens[mine], acts[mine]))
    return torch.stack(columns, dim=1) if columns else acts.new_zeros(flat.n_tokens, 0)


def _splicing(sae: SparseAutoencoder, name: str, error_term: bool) -> Edit:
    def edit(x: Tensor, y: Tensor) -> Tensor:
        _check_widths(sae, x, y, name)
        recon = reconstruct(sae, x)
        # y + (x̂ - x̂) is x̂ + (y - x̂) without its rounding: the value is y to the last bit, the gradient is x̂'s.
        return y.detach() + (recon - recon.detach()) if error_term else recon

    return edit


def _steering(sae: SparseAutoencoder, name: str, latents: Mapping[int, float | Tensor]) -> Edit:
    def edit(x: Tensor, y: Tensor) -> Tensor:
        _check_widths(sae, x, y, name)
        rows = x.to(sae.W_dec.device, sae.W_dec.dtype)
        chosen = list(latents)
        given = [torch.as_tensor(v, dtype=rows.dtype, device=rows.device) for v in latents.values()]
        values = torch.stack(given) if given else rows[:0, 0]
        # Only the latents that are set: x̂' - x̂ is exactly 0 where they have their values already.
        change = (values - acts_of(sae.encode(rows), chosen)) @ sae.W_dec[chosen]
        # A token with NaN has acts of NaN at other latents than the chosen ones too.
        change = torch.where(torch.isfinite(rows).all(-1, keepdim=True), change, torch.nan)
        stats = sae.norm.statistics(rows)
        return y + (change if stats is None else change * stats.unit).to(y.device)

    return edit


def _edited(x: Tensor, y: Tensor, edit: Edit, where: Where | None, name: str) -> Tensor:
    """y (*batch, d_out) with the chosen tokens edited; x (*batch, d_in) is what was read."""
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"{name} has shape {tuple(y.shape)}, the hook read {tuple(x.shape)}: not the same tokens")
    if where is None:
        return edit(x.flatten(0, -2), y.flatten(0, -2)).to(y.dtype).reshape(y.shape)
    chosen = where(x)
    if chosen.dtype != torch.bool or chosen.shape != x.shape[:-1]:
        got, wanted = f"{chosen.dtype} {tuple(chosen.shape)}", tuple(x.shape[:-1])
        raise ValueError(f"where: expected bool {wanted} for activations {tuple(x.shape)}, got {got}")
    chosen = chosen.to(y.device)
    if not chosen.any():
        return y
    out = y.clone()
    out[chosen] = edit(x[chosen], y[chosen]).to(y.dtype)
    return out


@contextlib.contextmanager
def _watch(place: Place, see: Callable[[Any], Tensor | None]) -> Iterator[None]:
    """Calls see(activations) in every pass; a tensor that it returns takes their place."""

    def at_input(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        new = see(input_of(args, kwargs))
        return None if new is None else with_input(args, kwargs, new)

    def at_output(module: nn.Module, args: tuple, output: Any) -> Any:
        if not isinstance(output, tuple):
            return see(output)
        new = see(output[0])
        if new is None:
            return None
        rest = (new, *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else rest

    if place.takes_input:
        handle = place.module.register_forward_pre_hook(at_input, with_kwargs=True)
    else:
        handle = place.module.register_forward_hook(at_output)
    with handle:
        yield


def _checked(found: Any, place: Place) -> Tensor:
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.ndim < 2:
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"expected floating activations (*batch, d_in) at {place.name}, got {got}; hook another module"
        )
    return found


def _check_widths(sae: SparseAutoencoder, x: Tensor, y: Tensor, name: str) -> None:
    for tensor, width, what in ((x, sae.d_in, "d_in"), (y, sae.d_out, "d_out")):
        if tensor.shape[-1] != width:
            raise ValueError(
                f"the activations at {name} have {tensor.shape[-1]} numbers, but the SAE expects {what} = {width}: was "
                "it trained on another model or hook? A transcoder needs two hooks, (where it reads, what it replaces)"
            )


def _label(site: Site) -> str:
    return " -> ".join(map(str, site)) if isinstance(site, tuple) else str(site)
