"""Warnings point at the user's line."""

from __future__ import annotations

import ast
import importlib
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsae
from fastsae import ops
from fastsae.data.tensor import TensorSource
from fastsae.runs.trainer import TrainConfig, Trainer
from fastsae.training.step import PlainTrainStep

PACKAGE = Path(fastsae.__file__).parent
D, M = 8, 16
backends: Any = importlib.import_module("fastsae.backends")  # fastsae.backends is the function


def sae(**settings: Any) -> fastsae.SparseAutoencoder:
    return fastsae.SparseAutoencoder(D, M, fastsae.TopK(3), seed=0, **settings)


def bad() -> torch.Tensor:
    return torch.full((4, D), torch.nan)


def slower_backend(_: Path) -> None:
    ops.encode_topk(torch.ones(2, 4), torch.ones(8, 4), torch.ones(8), 2)


def first_target(_: Path) -> None:
    sae()(torch.ones(4, D), target=torch.zeros(4, D))


def fused(_: Path) -> None:
    fastsae.FusedTrainStep(sae(), lr=1e-3)(bad())


def plain(_: Path) -> None:
    PlainTrainStep(sae(), lr=1e-3)(bad())


def batch(_: Path) -> None:
    fastsae.BatchTrainStep(fastsae.SAEBatch(2, D, M, fastsae.TopK(3)), lr=1e-3)(bad())


def optimizer(_: Path) -> None:
    module = sae()
    made = fastsae.optim.Adam(module)
    module(bad()).loss.backward()
    made.step()  # which torch wraps


def older_threshold(_: Path) -> None:
    module = fastsae.SparseAutoencoder(D, M, fastsae.BatchTopK(3), seed=0)
    state = {name: t for name, t in module.state_dict().items() if "threshold_weight" not in name}
    module.load_state_dict({**state, "threshold": torch.tensor(0.5)})


def run(folder: Path) -> None:
    x = torch.randn(64, D)
    source = TensorSource(x, holdout=0)
    source.x = torch.where(torch.arange(64) == 5, torch.nan, source.x.mT).mT
    config = TrainConfig(steps=8, batch_size=8, progress=False, eval_every=0, init_b_dec="zero")
    Trainer(sae(), source, config, folder / "run").run()


CALLS: tuple[Callable[[Path], None], ...] = (
    slower_backend, first_target, fused, plain, batch, optimizer, older_threshold, run,
)  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_warning_names_the_line_of_the_call(
    call: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if call is slower_backend:  # passed over for the reference
        monkeypatch.setattr(backends, "_said", set())
        gone = [(name, m if name == "reference" else "it is gone") for name, m in backends._REGISTRY]
        monkeypatch.setattr(backends, "_REGISTRY", tuple(gone))
        monkeypatch.delenv("FASTSAE_BACKEND", raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", backends.BackendWarning if call is not slower_backend else ImportWarning)
        call(tmp_path)
    (warning,) = caught
    source, first = inspect.getsourcelines(call)
    assert warning.filename == __file__
    assert first <= warning.lineno < first + len(source)


def test_all_of_the_package_warns_by_one_function() -> None:
    """Which finds the user's line; a fixed stacklevel counts frames of torch and of decorators."""
    found = [
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("warn", "warn_explicit")
    ]
    assert found == ["warn.py"]
