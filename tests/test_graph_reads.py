"""No step that a CUDA graph may capture reads a value back, or copies from the host: every rule, on the meta device.

On the meta device a read raises, and so do shapes that depend on values; copies from the host are refused by the modes
here, as a capture refuses them. Backends' own ops have fakes there: that those read nothing is shown in the last test.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastsae.ops import register
from fastsae.runs.schedules import Schedule
from fastsae.training.step import FusedTrainStep
from tests.family_case import RULES, D, N, family_sae, tokens
from tests.truth import BACKENDS

pytestmark = pytest.mark.usefixtures("one_thread")
FROM_THE_HOST = {"tensor", "as_tensor", "new_tensor", "from_numpy", "asarray"}
READS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere", "masked_select",
    "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "bincount",
}  # fmt: skip
"""Under the names that they have inside of an op too."""
SETTINGS: list[dict[str, Any]] = [
    {},
    {"aux_k": 3},
    {"tied": True, "skip": True, "loss": "fvu", "normalize": "layer_norm"},
    {"layers": 2, "decoder_norm": "unit", "normalize": "constant", "aux_k": 2},
    {"d_out": 9, "pre_bias": False, "normalize": "standardize"},
]
OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "adamw", "weight_decay": 0.1, "clip_norm": 0.5, "schedule": Schedule(total=20, warmup=3)},
    {"optimizer": "lion", "moments": "bf16"},
    {"optimizer": "signsgd", "clip_rows": 0.01},
    {"moments": "8bit", "penalty_schedule": lambda count: (count / 10).clamp(max=1)},
]


class Refused(Exception):
    """A capture would fail here."""


class _NoCopies(TorchFunctionMode):
    """anywhere: also onto the CPU, where kernels are emulated."""

    def __init__(self, anywhere: bool) -> None:
        super().__init__()
        self.anywhere = anywhere

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in FROM_THE_HOST and (self.anywhere or out.device.type != "cpu"):
            raise Refused(f"{func.__name__} copies from the host")
        return out


class _NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.name().removeprefix("aten::").split(".")[0]
        if name in READS or (name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])):
            raise Refused(f"{name} reads values")
        devices = {t.device for t in args if isinstance(t, Tensor) and t.ndim}
        if name in ("copy_", "_to_copy") and len(devices | {kwargs.get("device") or next(iter(devices), None)}) > 1:
            raise Refused(f"{name} copies between devices")
        return func(*args, **kwargs)


@contextmanager
def capture(anywhere: bool = False) -> Iterator[None]:
    with _NoCopies(anywhere), _NoReads():
        yield


def take_steps(name: str, settings: dict[str, Any], **more: Any) -> None:
    sae = family_sae(RULES[name], dtype=torch.float32, **settings).to("meta")
    step = FusedTrainStep(sae, lr=1e-3, **more)
    sae.room = 5 * N  # as in a graph
    target = None if sae.d_out == sae.d_in else torch.empty(N, sae.d_out, device="meta")
    x = torch.empty(N, D, device="meta")
    with capture():
        for _ in range(2):
            metrics = step._step(x, target)
    assert all(t.device.type == "meta" and t.ndim == 0 for t in metrics.values())
    assert ("taken" in metrics) == RULES[name].shaped


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", RULES)
def test_a_step_of_every_rule_reads_nothing(name: str, settings: dict[str, Any]) -> None:
    take_steps(name, settings)


@pytest.mark.parametrize("settings", OPTIMIZERS, ids="-".join)
@pytest.mark.parametrize("name", ["topk", "jumprelu"])
def test_a_step_of_every_optimizer_reads_nothing(name: str, settings: dict[str, Any]) -> None:
    take_steps(name, {}, **settings)


@pytest.mark.parametrize("ghost", ["residual", "pull"])
def test_ghost_gradients_read_how_many_latents_are_dead(ghost: str) -> None:
    """Which is why they are refused."""
    with pytest.raises(Refused, match="nonzero reads values"):
        take_steps("topk", {"ghost": ghost})


def test_a_threshold_rule_without_a_room_reads() -> None:
    sae = family_sae(RULES["relu"], dtype=torch.float32).to("meta")
    step = FusedTrainStep(sae, lr=1e-3)
    with pytest.raises(Refused, match=r"(_local_scalar_dense|item) reads values"), capture():
        step(torch.empty(N, D, device="meta"))


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name in ("cuda", "triton")])
@pytest.mark.parametrize("name", ["topk", "topk-weighted", "batch_topk", "jumprelu", "group_max"])
def test_the_ops_of_a_gpu_read_nothing(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between launches of kernels, which are emulated or interpreted here."""
    ran: set[str] = set()
    choose = register.choose

    def watched(op: str, *args: Any, **info: Any) -> SimpleNamespace:
        run = getattr(choose(op, *args, **info), op)

        def inside(*given: Any) -> Any:
            ran.add(op)
            with capture(anywhere=True):
                return run(*given)

        return SimpleNamespace(**{op: inside})

    monkeypatch.setattr(register, "choose", watched)
    sae = family_sae(RULES[name], dtype=torch.float32, aux_k=3)
    step = FusedTrainStep(sae, lr=1e-3, backend=backend, dense_above=1.0, clip_norm=1.0)
    for i in range(2):
        step(tokens(seed=i).float())
    assert {"decode_error", "update_latents_"} < ran
    assert any(op.startswith("encode") for op in ran)
