"""Where a model's activations are taken, or replaced: hooks by number, by short name and by the module's own name."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import threading
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

Hook: TypeAlias = int | str

SHORT = {
    "mlp": ("mlp", "feed_forward", "ffn", "feedforward", "block_sparse_moe"),
    "attn": ("self_attn", "attn", "self_attention", "attention", "self_attn_layer"),
}
"""Short names of a layer's parts, and what models call the module directly inside the layer."""


class _Reached(Exception):
    """Ends a forward pass once the hook has its tensor; never leaves this file."""


class Place(NamedTuple):
    """A module's input or output: its name for messages, the module, and which of the two."""

    name: str
    module: nn.Module
    takes_input: bool


class HookedModel:
    """Token ids (windows, window) -> activations (windows, window, d_in) at a hook, in the model's dtype and device.

    hook: see `find`. The hook ends the forward pass by an exception: the layers after it cost nothing, the model stays
    unchanged, and it works for any module of any architecture. The hook exists only during a call. The model is put
    into eval mode, because dropout would change the activations.
    Raises: ValueError for a name or number that the model does not have, naming similar ones.
    """

    def __init__(self, model: nn.Module, hook: Hook):
        self.model = model.eval()
        self._place = find(model, hook)
        self.name = self._place.name
        self._lock = threading.Lock()  # a second thread's pass would run into this one's hook

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def __call__(self, token_ids: Tensor) -> Tensor:
        seen: list[Any] = []

        def take_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append(input_of(args, kwargs))
            raise _Reached

        def take_output(module: nn.Module, args: tuple, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        with self._lock, torch.no_grad():
            if self._place.takes_input:
                handle = self._place.module.register_forward_pre_hook(take_input, with_kwargs=True)
            else:
                handle = self._place.module.register_forward_hook(take_output)
            with handle, contextlib.suppress(_Reached):
                run(self.model, token_ids)
        if not seen:
            raise ValueError(f"the model's forward pass never reaches {self.name}; hook another module")
        found = seen[0]
        if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != token_ids.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            wanted = ", ".join(map(str, token_ids.shape))
            raise ValueError(f"expected a tensor ({wanted}, d_in) at {self.name}, got {got}")
        return found.detach()


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def run(model: nn.Module, token_ids: Tensor) -> Any:
    """The model's own output for token ids (windows, window), without a cache of keys and values.

    A model whose forward has no argument `input_ids` gets the ids as its first one.
    """
    parameters = inspect.signature(model.forward).parameters
    ids = token_ids.to(device_of(model))
    arguments = {"use_cache": False} if "use_cache" in parameters else {}
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
    - "mlp.L" or "attn.L": the output of that part of layer L, counted from 0, as the model numbers its modules
    - a module's name, with or without the model's own prefix, for its output, as "model.layers.14"
    - any of the names with ":input": the module's input, as "mlp.14:input"

    Raises: ValueError for a hook that the model does not have, saying what it has.
    """
    if isinstance(hook, str) and hook.isdigit():
        hook = int(hook)  # from a command line
    if isinstance(hook, int):
        layers_name, layers = _layers(model)
        if not 0 <= hook <= len(layers):
            raise ValueError(f"the model has {len(layers)} layers: hook must be 0 to {len(layers)}, got {hook}")
        index = max(hook - 1, 0)
        return Place(f"{layers_name}.{index}{'' if hook else ':input'}", layers[index], hook == 0)
    name, colon, place = hook.partition(":")
    if colon and place not in ("input", "output"):
        raise ValueError(f"after the colon of a hook comes 'input' or 'output', got {hook!r}")
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "")
    full = next((n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n and n in modules), None)
    part, dot, index_text = name.partition(".")
    if full is None and part in SHORT and dot and index_text.isdigit():
        full = _part_of_layer(model, part, int(index_text))
    if full is None:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
        raise ValueError(
            f"the model has no module {name!r}; near names: {', '.join(near) or 'none'}; a hook is a number of layers, "
            f"{', '.join(f'{short}.L' for short in SHORT)} or a module's name"
        )
    return Place(full + (":input" if place == "input" else ""), modules[full], place == "input")


def in_residual_stream(model: nn.Module, hook: Hook) -> bool:
    """Whether what is at a hook is the residual stream (before or after a layer) or is added to it (a layer's mlp or
    attn). Raises ValueError as `find`, and for a model without a stack of layers.
    """
    place, (_, layers) = find(model, hook), _layers(model)
    names = [name for short in SHORT.values() for name in short]
    parts = [part for layer in layers for name, part in layer.named_children() if name in names]
    return place.module in list(layers) or (place.module in parts and not place.takes_input)


def _part_of_layer(model: nn.Module, part: str, index: int) -> str:
    layers_name, layers = _layers(model)
    if index >= len(layers):
        raise ValueError(
            f"the model has {len(layers)} layers: {part}.L takes L from 0 to {len(layers) - 1}, got {part}.{index}"
        )
    children = [name for name, _ in layers[index].named_children()]
    for name in SHORT[part]:
        if name in children:
            return f"{layers_name}.{index}.{name}"
    raise ValueError(
        f"no module of layer {index} is known as its {part}; {layers_name}.{index}: {', '.join(children) or 'none'}; "
        "give the hook as a module's name"
    )


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's stack of layers: the outermost ModuleList of the length that its configuration says.

    A model without a configuration must have one ModuleList alone that lies in no other.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    if count is None:
        found = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
        found = found if len(found) == 1 else []
    else:
        found = [(name, m) for name, m in lists if len(m) == count]
    if not found:
        raise ValueError(
            f"cannot find the stack of layers of {type(model).__name__} (config.num_hidden_layers: {count}); "
            "give the hook as a module's name"
        )
    name, layers = min(found, key=lambda item: item[0].count("."))
    return name, layers
