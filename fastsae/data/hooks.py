"""Where a model's activations are taken or replaced: hooks by number, by short name and by module name."""

from __future__ import annotations

import contextlib
import difflib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastsae.data.padding import lock_of

Hook: TypeAlias = int | str

Hooks: TypeAlias = Hook | tuple[Hook, ...]
"""One hook, or several that one forward pass reads."""

SHORT = {
    "mlp": (
        "mlp", "feed_forward", "ffn", "feedforward", "ff", "block_sparse_moe", "moe", "DenseReluDense", ("fc1", "fc2")
    ),
    "attn": ("self_attn", "attn", "self_attention", "attention", "self_attn_layer", "SelfAttention"),
    "cross": ("encoder_attn", "cross_attn", "crossattention", "EncDecAttention"),
}  # fmt: skip
"""Short names of a layer's parts, and the names that models give these modules; a pair is an MLP whose first and last
module are children of the layer itself."""
SIDES = ("encoder", "decoder")
"""The stacks of an encoder-decoder model, by the names that hooks use."""


class _Reached(Exception):
    """Ends a forward pass once the hook has its tensor; never leaves this file."""


class Place(NamedTuple):
    """A module's input or output: its name for messages, the module, and which of the two."""

    name: str
    module: nn.Module
    takes_input: bool


class Stack(NamedTuple):
    """A model's layers: the name of their ModuleList, and the list."""

    name: str
    layers: nn.ModuleList


class HookedModel:
    """Token ids (windows, window) -> activations (windows, window, d_in) at a hook, in the model's dtype and device.

    hook: see `find`; or several, whose activations stand side by side in the order given: one pass reads them all, and
    `parts` returns them separately. When the last hook is reached, an exception ends the forward pass: the layers after
    it cost nothing, the model stays unchanged, and this works for any module of any architecture. The hooks exist only
    during a call. The model is put into eval mode, because dropout would change the activations.
    Raises: ValueError for a name or number that the model does not have, naming similar ones, and for two hooks at the
    same place.
    """

    def __init__(self, model: nn.Module, hook: Hooks):
        self.model = model.eval()
        self.hooks = hooks_of(hook)
        self._places = [find(model, one) for one in self.hooks]
        self.names = tuple(place.name for place in self._places)
        self.name = ", ".join(self.names)
        seen: dict[tuple[nn.Module, bool], Hook] = {}
        for one, place in zip(self.hooks, self._places, strict=True):
            other = seen.setdefault((place.module, place.takes_input), one)
            if other is not one:
                raise ValueError(f"the hooks {other!r} and {one!r} are the same place, {place.name}; give it once")

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def __call__(self, token_ids: Tensor) -> Tensor:
        parts = self.parts(token_ids)
        return parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].device) for part in parts], dim=-1)

    def parts(self, token_ids: Tensor) -> tuple[Tensor, ...]:
        """The activations (windows, window, width) at each hook, from one pass."""
        seen: dict[int, Any] = {}

        def take(number: int, found: Any) -> None:
            if number in seen:  # a module that the pass calls again
                return
            seen[number] = found
            if len(seen) == len(self._places):
                raise _Reached
            if isinstance(found, Tensor):
                seen[number] = found.clone()  # the pass continues and may write into it

        with lock_of(self.model), torch.no_grad(), contextlib.ExitStack() as stack:
            for number, place in enumerate(self._places):
                stack.enter_context(_watching(place, number, take))
            with contextlib.suppress(_Reached):
                run(self.model, token_ids)
        for number, name in enumerate(self.names):
            if number not in seen:
                raise ValueError(f"the model's forward pass never reaches {name}; hook another module")
            found = seen[number]
            if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != token_ids.shape:
                got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
                wanted = ", ".join(map(str, token_ids.shape))
                raise ValueError(f"expected a tensor ({wanted}, d_in) at {name}, got {got}")
        return tuple(seen[number].detach() for number in range(len(self.names)))

    def note(self) -> str | None:
        """A sentence naming the stack of layers that numbers and short names refer to, if the model has several."""
        stacks = stacks_of(self.model)
        counted = [one for one in self.hooks if _counts(self.model, one)]
        if len(stacks) < 2 or not counted:
            return None
        chosen, others = next(iter(stacks.items())), list(stacks.items())[1:]
        say = "; ".join(f"{stack.name}, named {name}.L" for name, stack in others if name in SIDES)
        return (
            f"{type(self.model).__name__} has {len(stacks)} stacks of layers; "
            f"{', '.join(map(str, counted))} counts those of the {chosen[0]}, {chosen[1].name}"
            + (f" (the other is {say})" if say else "")
        )


def hooks_of(hook: Hooks | list[Hook]) -> tuple[Hook, ...]:
    """One hook or several as a tuple. Raises ValueError for none."""
    found = tuple(hook) if isinstance(hook, list | tuple) else (hook,)
    if not found:
        raise ValueError("got no hook, expected one or several: a number of layers, mlp.L, attn.L or a module's name")
    return found


@contextlib.contextmanager
def _watching(place: Place, number: int, take: Any) -> Iterator[None]:
    def at_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        take(number, input_of(args, kwargs))

    def at_output(module: nn.Module, args: tuple, output: Any) -> None:
        take(number, output[0] if isinstance(output, tuple) else output)

    if place.takes_input:
        handle = place.module.register_forward_pre_hook(at_input, with_kwargs=True)
    else:
        handle = place.module.register_forward_hook(at_output)
    with handle:
        yield


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def run(model: nn.Module, token_ids: Tensor) -> Any:
    """The model's own output for token ids (windows, window), without a cache of keys and values.

    A model whose forward has no argument `input_ids` gets the ids as its first one. The decoder of an encoder-decoder
    model reads the same ids as its encoder, not shifted, so its row of a token has seen that token, as in other models.
    """
    parameters = inspect.signature(model.forward).parameters
    ids = token_ids.to(device_of(model))
    arguments: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
    if _has_two_sides(model) and "decoder_input_ids" in parameters:
        arguments["decoder_input_ids"] = ids
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    if "input_ids" in parameters or takes_any:
        return model(input_ids=ids, **arguments)
    return model(ids, **arguments)


def input_of(args: tuple, kwargs: dict) -> Any:
    """The activations among a module's arguments: the first positional one, else hidden_states, else the first."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def with_input(args: tuple, kwargs: dict, value: Tensor) -> tuple[tuple, dict]:
    """The arguments with `value` in the place that `input_of` reads."""
    if args:
        return (value, *args[1:]), kwargs
    name = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, name: value}


def find(model: nn.Module, hook: Hook) -> Place:
    """The place that a hook names.

    - a number L: the residual stream after L layers (0: the embeddings)
    - "mlp.L", "attn.L" or "cross.L": the output of that part of layer L, counted from 0, as the model numbers its
      modules; "cross" is a decoder's attention to its encoder
    - in an encoder-decoder model these are the encoder's; "decoder.L", "decoder.mlp.L" and so on are the decoder's. In
      a model of images and text they are those of the text model
    - a module's name, with or without the model's own prefix, for its output, as "model.layers.14"
    - any of the names with ":input": the module's input, as "mlp.14:input"

    Raises: ValueError for a hook that the model does not have, saying what it has.
    """
    if isinstance(hook, int):
        return _after_layers(model, None, hook)
    name, colon, place = hook.partition(":")
    if colon and place not in ("input", "output"):
        raise ValueError(f"hook is {hook!r}, expected 'input' or 'output' after the colon")
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "")
    full = next((n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n and n in modules), None)
    if full is None and (counted := _counted(model, name)):
        side, part, index = counted
        if part is None and not colon:
            return _after_layers(model, side, index)
        if part is not None:
            full = _part_of_layer(model, side, part, index, place == "input")
    if full is None:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
        raise ValueError(
            f"the model has no module {name!r}; similar names: {', '.join(near) or 'none'}; a hook is a number of "
            f"layers, {', '.join(f'{short}.L' for short in SHORT)} or a module's name"
        )
    return Place(full + (":input" if place == "input" else ""), modules[full], place == "input")


def in_residual_stream(model: nn.Module, hook: Hook) -> bool:
    """Whether a hook's activation is the residual stream that the model's head reads (before or after a layer) or is
    added to it (a layer's mlp or attn). Raises ValueError as `find`, and for a model without a stack of layers.
    """
    place, layers = find(model, hook), _stack(model, "decoder" if _has_two_sides(model) else None).layers
    if place.module in list(layers):
        return True
    parts = [_part_name(layer, part, takes_input=False) for layer in layers for part in SHORT]
    owners = [layer for layer in layers for _ in SHORT]
    added = [owner.get_submodule(name) for owner, name in zip(owners, parts, strict=True) if name is not None]
    return place.module in added and not place.takes_input


def stacks_of(model: nn.Module) -> dict[str, Stack]:
    """A model's stacks of layers by name; the first is the one that layer numbers refer to.

    "encoder" and "decoder"; "text" and, if there are others of any kind, "other"; a plain model's is "text".
    Raises ValueError if the stack that layer numbers refer to cannot be found.
    """
    names = {module: name for name, module in model.named_modules()}
    if _has_two_sides(model):
        found = {}
        for side in SIDES:
            owner = getattr(model, f"get_{side}", lambda: None)()
            lists = _outermost(owner) if isinstance(owner, nn.Module) and owner in names else []
            if len(lists) != 1:
                raise ValueError(
                    f"cannot find the {side}'s stack of layers of {type(model).__name__}; give the hook as a module's "
                    "name"
                )
            found[side] = Stack(names[lists[0]], lists[0])
        return found
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    owner = model
    if text is not config and isinstance(inner := getattr(model, "get_decoder", lambda: None)(), nn.Module):
        owner = inner
    count = getattr(text, "num_hidden_layers", None)
    if count is None:
        lists = _outermost(owner)
        lists = lists if len(lists) == 1 else []
    else:
        lists = [m for m in owner.modules() if isinstance(m, nn.ModuleList) and len(m) == count and m in names]
    if not lists:
        raise ValueError(
            f"cannot find the stack of layers of {type(model).__name__} (config.num_hidden_layers: {count}); "
            "give the hook as a module's name"
        )
    chosen = min(lists, key=lambda item: names[item].count("."))
    others = [m for m in _outermost(model) if owner is not model and m is not chosen and len(m) > 1]
    found = {"text": Stack(names[chosen], chosen)}
    if others:
        found["other"] = Stack(names[others[0]], others[0])
    return found


def _has_two_sides(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _outermost(model: nn.Module) -> list[nn.ModuleList]:
    """The ModuleLists that are not inside another one."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    return [m for name, m in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]


def _counts(model: nn.Module, hook: Hook) -> bool:
    """Whether a hook refers to layers of the default stack."""
    if isinstance(hook, int):
        return True
    name = hook.partition(":")[0]
    counted = _counted(model, name)
    return counted is not None and counted[0] is None and name not in dict(model.named_modules())


def _counted(model: nn.Module, name: str) -> tuple[str | None, str | None, int] | None:
    """(side, part, L) of "L", "mlp.L", "decoder.L" and "decoder.mlp.L"; None for any other name."""
    *before, last = name.split(".")
    if not last.isdigit():
        return None
    side = before.pop(0) if before and before[0] in SIDES and _has_two_sides(model) else None
    part = before.pop(0) if before and before[0] in SHORT else None
    return None if before else (side, part, int(last))


def _stack(model: nn.Module, side: str | None) -> Stack:
    stacks = stacks_of(model)
    return next(iter(stacks.values())) if side is None else stacks[side]


def _after_layers(model: nn.Module, side: str | None, count: int) -> Place:
    name, layers = _stack(model, side)
    if not 0 <= count <= len(layers):
        what = "model" if side is None else side
        raise ValueError(f"the {what} has {len(layers)} layers: hook must be 0 to {len(layers)}, got {count}")
    index = max(count - 1, 0)
    return Place(f"{name}.{index}{'' if count else ':input'}", layers[index], count == 0)


def _part_of_layer(model: nn.Module, side: str | None, part: str, index: int, takes_input: bool) -> str:
    name, layers = _stack(model, side)
    if index >= len(layers):
        raise ValueError(
            f"the model has {len(layers)} layers: {part}.L takes L from 0 to {len(layers) - 1}, got {part}.{index}"
        )
    found = _part_name(layers[index], part, takes_input)
    if found is not None:
        return f"{name}.{index}.{found}"
    children = [child for child, _ in layers[index].named_children()]
    raise ValueError(
        f"cannot tell which module of layer {index} is its {part}; {name}.{index} has: "
        f"{', '.join(children) or 'none'}; give the hook as a module's name"
    )


def _part_name(layer: nn.Module, part: str, takes_input: bool) -> str | None:
    """The name inside a layer of one of its parts: a module of the layer itself, or of a list in it (as in T5)."""
    inside = {name for name, _ in layer.named_children()}
    listed = [name for name, _ in layer.named_modules() if name.count(".") == 2]
    for known in SHORT[part]:
        if isinstance(known, tuple):
            if inside >= set(known):
                return known[0 if takes_input else -1]
        elif known in inside:
            return known
        elif deep := [n for n in listed if n.endswith(f".{known}") and n.split(".")[1].isdigit()]:
            return deep[0]
    return None
