"""Windows that hold less text than fits: PAD stands at their end, and the model gets an attention mask."""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

PAD = -1
"""In the place of a token id: there is no token. Only at the end of a window."""


def is_text(token_ids: Tensor) -> Tensor:
    """Bool (windows, window): where there is a token."""
    return token_ids >= 0


def trimmed(token_ids: Tensor) -> Tensor:
    """The windows (windows, width) without the last positions that hold no token in any of them."""
    used = int(is_text(token_ids).sum(dim=1).max()) if len(token_ids) else 0
    return token_ids[:, : max(used, 1)]


_locks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
_making = threading.Lock()


def lock_of(model: nn.Module) -> Any:
    """A lock held while hooks are on a model, since another thread's pass would run into them. It is reentrant."""
    with _making:
        return _locks.setdefault(model, threading.RLock())


@contextlib.contextmanager
def masked(model: nn.Module, token_ids: Tensor) -> Iterator[Tensor]:
    """Token ids (windows, window) with valid ids in the place of PAD; in the block the model gets an attention mask.

    Every forward pass of the model in the block gets the mask, and must be of these windows. Windows without PAD need
    none, so that the model's bits stay those of full windows. A model whose forward takes no `attention_mask` gets none
    either: if it is causal, padding at the end changes nothing before it. Other threads that hook the model wait.
    """
    mask = is_text(token_ids)
    if bool(mask.all()):
        yield token_ids
        return

    def give(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        device = next((p.device for p in module.parameters()), mask.device)
        return args, {**kwargs, "attention_mask": mask.to(device, torch.int64)}

    takes_mask = "attention_mask" in inspect.signature(model.forward).parameters
    with lock_of(model), contextlib.ExitStack() as stack:
        if takes_mask:
            stack.enter_context(model.register_forward_pre_hook(give, with_kwargs=True))
        yield token_ids.where(mask, 0)
