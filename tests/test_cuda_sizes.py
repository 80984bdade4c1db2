"""The host checks the size and dtype of every tensor that a CUDA launch is given, whoever calls it.

The launches that the ops make are recorded, and each is made again with one of its tensors of another size or dtype.
Nothing of another size is launched: the emulation refuses every launch, and so says what the host lets pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import ops
from tests import truth
from tests.cases import BY_NAME
from tests.update_case import make_problem

pytestmark = pytest.mark.skipif(
    "cuda" not in truth.BACKENDS, reason="no CUDA kernels here: no GPU, and no emulation (make test-cuda)"
)
if "cuda" in truth.BACKENDS:
    from fastsae.backends.cuda.library import EMULATED, library
else:
    EMULATED = False

Launch = tuple[str, list[Any]]
NO_LAUNCHES = {"Where", "Error", "emulate", "status", "decode_tiles", "rows_are_staged"}
FREE = {
    # As many latents or tokens as there are: a kernel leaves out indices past them.
    ("active_dot", 5), ("decode", 4), ("decode_error", 4), ("active_outer", 5), ("list_slots", 3), ("histogram", 1),
    ("every_latent", 4), ("select", 7), ("update_bias", 4), ("update_bias", 5),
    # How much of them is used stands on the device: pieces, survivors' places, slots of scratch.
    ("active_outer", 9), ("decode", 8), ("decode_error", 11), ("append", 1), ("append", 3), ("select", 4),
    ("exhaustive_top_k", 13), ("update_rows", 11),
    # Room that may be larger, keys of which the first are used, and columns that are padded.
    ("piece_starts", 3), ("sort_slots", 8), ("step_numbers", 11), ("update_bias", 10), ("narrow_rows", 1),
}  # fmt: skip
"""Functions and their arguments that may be of other sizes."""


@pytest.fixture(scope="module")
def launches() -> list[Launch]:
    """Of every function one launch for each set of arguments that are there; the tensors are kept alive."""
    found: dict[tuple[Any, ...], Launch] = {}

    def recorded(name: str, function: Any) -> Any:
        def launch(*args: Any) -> Any:
            form = tuple(len(a) if isinstance(a, list) else a is None for a in args)
            found.setdefault((name, *form), (name, list(args)))
            return function(*args)

        return launch

    with pytest.MonkeyPatch.context() as patch:
        for name in dir(library):
            if name[0] != "_" and name not in NO_LAUNCHES and callable(getattr(library, name)):
                patch.setattr(library, name, recorded(name, getattr(library, name)))
        _every_op()
    return list(found.values())


def _every_op() -> None:
    case = BY_NAME["random"]
    x, W, b = case.inputs(torch.float32)
    screen = ops.prepare_screen(W, b, backend="cuda")
    rows = torch.arange(0, W.shape[0], 2, dtype=torch.int32, device=W.device)
    codes = ops.encode_topk(x, W, b, case.K, screen=screen, backend="cuda")
    ops.encode_topk(x, W, b, case.K, rows=rows, backend="cuda")
    ops.encode_topk(x, W, b, case.K, precision="fp32", backend="cuda")
    for threshold in (torch.tensor(0.5), torch.full((W.shape[0],), 0.5), torch.full((x.shape[0], 1), 0.5)):
        ragged, _ = ops.encode_above(x, W, b, threshold.to(W.device), 20_000, backend="cuda")
    ops.encode_batch_topk(x, W, b, case.K, backend="cuda")
    for code in (codes, ragged):
        ops.decode(code, W, backend="cuda")
        torch.ops.fastsae.decode_error(code.acts, code.indices, code.offsets, W, x, W[0], "cuda")
        ops.active_dot(x, code, W, backend="cuda")
        ops.active_outer(code, x, backend="cuda")
    for name in ("random", "odd"):
        make_problem(BY_NAME[name], torch.float32).run("cuda")


def _changed(value: Any, change: Any) -> Iterator[Any]:
    """The argument with one of its tensors changed, in each way."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from ([*value[:i], changed, *value[i + 1 :]] for changed in _changed(item, change))
    elif isinstance(value, Tensor) and value.numel() and value.ndim:
        yield from change(value)


def _sizes(t: Tensor) -> Iterator[Tensor]:
    yield t[:-1].clone()
    yield torch.cat([t, t[-1:]])
    if t.ndim == 2:
        yield t[:, :-1].clone()


def _other_dtype(t: Tensor) -> Iterator[Tensor]:
    yield t.to(torch.complex64 if t.dtype == torch.float64 else torch.float64)


def _taken(launches: list[Launch], change: Any) -> set[tuple[str, int]]:
    """Functions and arguments where a change is not refused by the host."""
    taken = set()
    for name, args in launches:
        for i, value in enumerate(args):
            for changed in _changed(value, change):
                try:
                    getattr(library, name)(*args[:i], changed, *args[i + 1 :])
                except (ValueError, TypeError):
                    continue
                except library.Error:
                    pass
                taken.add((name, i))
    return taken


def test_every_function_is_tried(launches: list[Launch]) -> None:
    names = {name for name in dir(library) if name[0] != "_" and callable(getattr(library, name))}
    assert names - NO_LAUNCHES - {name for name, _ in launches} == set()


@pytest.mark.skipif(not EMULATED, reason="only the emulation can refuse a launch on demand")
def test_no_tensor_of_another_size_is_launched(launches: list[Launch]) -> None:
    library.emulate(refuse="*")
    try:
        assert _taken(launches, _sizes) == FREE
    finally:
        library.emulate()


def test_no_tensor_of_another_dtype_is_launched(launches: list[Launch]) -> None:
    # Workspaces are bytes.
    assert _taken(launches, _other_dtype) == {("piece_starts", 3), ("sort_slots", 8)}
