"""A nested state as JSON plus named tensors, and back: how training state is stored without pickle."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

_TENSOR, _FLOAT = "$tensor", "$float"


def split_state(tree: Any, path: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """(JSON-able tree, {name: tensor}) of nested dicts, lists and tuples; `join_state` is the inverse.

    Tensors become {"$tensor": name} and are returned contiguous, on the CPU, with no memory shared within the result.
    They may be the live tensors themselves: write them before anything changes them.
    Integers of any size and all floats (NaN and infinities included) are restored exactly; tuples become lists.
    Raises TypeError naming the entry for anything else: a NumPy array, an object, a key that is not a string.
    """
    tensors: dict[str, Tensor] = {}
    return _split(tree, path, tensors), tensors


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while path in tensors:  # {"a.b": x, "a": {"b": y}}
            path += "'"
        tensors[path] = _alone(value.detach().cpu(), tensors)
        return {_TENSOR: path}
    # bool is an int. Exact types are compared, so that a NumPy scalar (a float subclass) is not accepted silently.
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_FLOAT: repr(value)}
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str) or key in (_TENSOR, _FLOAT):
                raise TypeError(f"{path} has the key {key!r}; expected a string other than {_TENSOR} and {_FLOAT}")
        return {key: _split(item, f"{path}.{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, f"{path}.{i}", tensors) for i, item in enumerate(value)]
    raise TypeError(
        f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint cannot hold; "
        "expected tensors, numbers, strings, None, and dicts, lists and tuples of them"
    )


def _alone(tensor: Tensor, others: dict[str, Tensor]) -> Tensor:
    """The tensor, or a copy if safetensors would refuse it: a view, or one whose memory is already in `others`.

    Moments are as large as the model, so this avoids copying all of them.
    """
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    seen = any(tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in others.values())
    return tensor if whole and not seen else tensor.contiguous().clone()


def join_state(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The state that `split_state` split. Raises KeyError for a missing tensor."""
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        if set(tree) == {_FLOAT}:
            return float(tree[_FLOAT])
        return {key: join_state(item, tensors) for key, item in tree.items()}
    if isinstance(tree, list):
        return [join_state(item, tensors) for item in tree]
    return tree
