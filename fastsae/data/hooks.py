"""The activations at one hook of a model, without running the layers after it."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn


class _Reached(Exception):
    """Ends a forward pass once the hook has its tensor; never leaves this file."""


class HookedModel:
    """Token ids (windows, window) -> activations (windows, window, d_in) at a hook, in the model's dtype and device.

    hook: a number L is the residual stream after L layers (0: the embeddings); a string is a module's name, for its
    output, as "model.layers.14", or for its input, as "model.layers.14.mlp:input". Names may be given with or without
    the model's own prefix.

    The hook ends the forward pass by an exception: the layers after it cost nothing, the model stays unchanged, and it
    works for any module of any architecture. The hook exists only during a call. The model is put into eval mode,
    because dropout would change the activations.
    Raises: ValueError for a name or number that the model does not have, naming similar ones.
    """

    def __init__(self, model: nn.Module, hook: int | str):
        self.model = model.eval()
        self.name, self._module, self._takes_input = _resolve(model, hook)
        parameters = inspect.signature(model.forward).parameters
        self._arguments = {"use_cache": False} if "use_cache" in parameters else {}
        self._lock = threading.Lock()  # a second thread's pass would run into this one's hook

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def __call__(self, token_ids: Tensor) -> Tensor:
        seen: list[Any] = []

        def take_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append(args[0] if args else next(iter(kwargs.values()), None))
            raise _Reached

        def take_output(module: nn.Module, args: tuple, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        with self._lock, torch.no_grad():
            if self._takes_input:
                handle = self._module.register_forward_pre_hook(take_input, with_kwargs=True)
            else:
                handle = self._module.register_forward_hook(take_output)
            with handle, contextlib.suppress(_Reached):
                self.model(input_ids=token_ids.to(self.device), **self._arguments)
        if not seen:
            raise ValueError(f"the model's forward pass never reaches {self.name}; hook another module")
        found = seen[0]
        if not isinstance(found, Tensor) or found.ndim != 3 or found.shape[:2] != token_ids.shape:
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            wanted = ", ".join(map(str, token_ids.shape))
            raise ValueError(f"expected a tensor ({wanted}, d_in) at {self.name}, got {got}")
        return found.detach()


def _resolve(model: nn.Module, hook: int | str) -> tuple[str, nn.Module, bool]:
    """(name for messages, module, whether to take its input)."""
    if isinstance(hook, str) and hook.isdigit():
        hook = int(hook)  # from a command line
    if isinstance(hook, int):
        layers_name, layers = _layers(model)
        if not 0 <= hook <= len(layers):
            raise ValueError(f"the model has {len(layers)} layers: hook must be 0 to {len(layers)}, got {hook}")
        index = max(hook - 1, 0)
        return f"{layers_name}.{index}{'' if hook else ':input'}", layers[index], hook == 0
    name, colon, place = hook.partition(":")
    if colon and place not in ("input", "output"):
        raise ValueError(f"after the colon of a hook comes 'input' or 'output', got {hook!r}")
    modules = dict(model.named_modules())
    prefix = getattr(model, "base_model_prefix", "")
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate and candidate in modules:
            return candidate + (":input" if place == "input" else ""), modules[candidate], place == "input"
    near = difflib.get_close_matches(name, modules, n=3, cutoff=0.3)
    raise ValueError(f"the model has no module {name!r}; near names: {', '.join(near) or 'none'}")


def _layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The model's stack of layers: the outermost ModuleList of the length that its configuration says."""
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    found = [(name, m) for name, m in lists if len(m) == count]
    if not found:
        raise ValueError(
            f"cannot find the stack of layers of {type(model).__name__} (config.num_hidden_layers: {count}); "
            "give the hook as a module's name"
        )
    name, layers = min(found, key=lambda item: item[0].count("."))
    return name, layers
