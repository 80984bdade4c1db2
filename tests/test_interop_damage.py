"""Checkpoints of every format whose tensors are missing, unknown, of another dtype or shape, cut off, or no tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastsae
from fastsae.model.files import SavedModuleError
from tests.interop_case import CASES, RULE, drawer, write

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]
BESIDE = ("sparsity.safetensors", "trainer_state.pt")
UNREAD = ("scaling_factor", "num_batches_tracked", "stats_last_nonzero", "dataset_average_activation_norm")
"""Tensors, by a part of their names, that mean nothing in some or all of the cases: any values will do."""
MAY_LACK = {
    "dictionary_learning": ("k", "threshold", "group_sizes"),
    "openai": ("activation",),
    "overcomplete": ("dictionary.multiplier",),
    "circuit_tracer": ("W_skip", "activation_function.threshold"),
}
"""What a checkpoint of a format may be without: another class, or a configuration, says the same."""
EITHER_WAY = {"circuit_tracer": ("W_dec",)}
"""Matrices that a format has in both orders."""


def weights_of(folder: Path) -> Path:
    (path,) = (
        p for p in folder.rglob("*") if p.suffix in (".safetensors", ".npz", ".pt") and p.name not in BESIDE
    )  # fmt: skip
    return path


def read(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return {name: t.clone() for name, t in load_file(path).items()}  # not the file that is written over
    if path.suffix == ".npz":
        return {name: torch.from_numpy(t) for name, t in np.load(path).items()}
    found: dict[str, Any] = torch.load(path)
    return found


def faults(name: str, good: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what, tensors) for each fault of each tensor that has to be refused."""
    family = name.split("-")[0]
    yield "an extra tensor", {**good, "surprise": torch.zeros(3)}
    for key, t in good.items():
        if any(part in key for part in UNREAD):
            continue
        if key not in MAY_LACK.get(family, ()):
            yield f"{key} missing", {other: value for other, value in good.items() if other != key}
        if not isinstance(t, Tensor):
            continue
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        if t.is_floating_point():
            changes |= {"int32": lambda t: t.int(), "bool": lambda t: t.bool()}
        else:
            changes["float"] = lambda t: t + 0.5
        if t.ndim == 2 and t.shape[0] != t.shape[1] and key not in EITHER_WAY.get(family, ()):
            changes["transposed"] = lambda t: t.T.contiguous()
        changes |= (
            {"empty": lambda t: t[:0].clone(), "one more axis": lambda t: t[None].clone()}
            if t.ndim
            else {"a vector": lambda t: t.expand(3).clone()}
        )
        for what, change in changes.items():
            yield f"{key} {what}", {**good, key: change(t)}


def complaint(folder: Path, name: str) -> str | None:
    """What load says; None where it gives an SAE."""
    try:
        fastsae.load(folder, activation=RULE.get(name))
    except SavedModuleError as error:
        return str(error)
    return None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "sae_L0_4"
    found.mkdir()
    return found


@pytest.mark.parametrize("name", CASES)
def test_tensors_that_do_not_fit(name: str, folder: Path) -> None:
    """One line that names the file; and never a module."""
    CASES[name](folder, drawer())
    path = weights_of(folder)
    for what, tensors in faults(name, read(path)):
        write(folder, str(path.relative_to(folder)), tensors)
        said = complaint(folder, name)
        assert said is not None, f"{what}: loaded"
        assert "\n" not in said, what
        assert path.name in said, f"{what}: {said}"


@pytest.mark.parametrize("name", CASES)
def test_files_that_are_cut_off(name: str, folder: Path) -> None:
    CASES[name](folder, drawer())
    path = weights_of(folder)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 9, 3, 0):
        path.write_bytes(whole[:size])
        said = complaint(folder, name)
        assert said is not None, f"{size} bytes: loaded"
        assert "\n" not in said
        assert path.name in said, said


class Bomb:
    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "boom"))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(("saelens", "sparsify", "llama"))])
def test_pickled_objects_are_not_made(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a torch file, a numpy archive, and under the name of a safetensors file."""
    monkeypatch.chdir(folder)
    CASES[name](folder, drawer())
    path = weights_of(folder)
    good = read(path)
    last = list(good)[-1]
    if path.suffix == ".npz":
        np.savez(path, **{**good, last: np.array([Bomb()], dtype=object)})
    else:
        torch.save({**good, last: Bomb()}, path)
    said = complaint(folder, name)
    assert said is not None
    assert path.name in said
    assert "\n" not in said
    assert not (folder / "exploded").exists()


def test_a_rule_that_is_missing_is_not_taken_for_relu_silently(tmp_path: Path) -> None:
    """openai's and circuit-tracer's own loaders read such files as ReLU."""
    CASES["circuit_tracer-relu"](tmp_path / "tracer", drawer())
    with pytest.warns(UserWarning, match="layer_3.safetensors does not say which latents are active: it is read as Re"):
        assert isinstance(fastsae.load(tmp_path / "tracer").activation, fastsae.ReLU)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastsae.load(tmp_path / "tracer", activation=fastsae.TopK(3)).activation == fastsae.TopK(3)
    CASES["openai-topk"](tmp_path, drawer())
    tensors = torch.load(tmp_path / "7.pt")
    del tensors["activation"]
    torch.save(tensors, tmp_path / "7.pt")
    with pytest.raises(SavedModuleError, match=r"7\.pt has an activation_state_dict, but lacks activation"):
        fastsae.load(tmp_path)
    del tensors["activation_state_dict"]
    torch.save(tensors, tmp_path / "7.pt")
    with pytest.warns(UserWarning, match=r"7\.pt lacks activation: it is read as ReLU"):
        assert isinstance(fastsae.load(tmp_path).activation, fastsae.ReLU)


def test_average_norms_are_numbers(tmp_path: Path) -> None:
    CASES["llamascopium-topk-scaled"](tmp_path, drawer())
    path = tmp_path / "sae_weights.safetensors"
    good = read(path)
    key = "dataset_average_activation_norm.blocks.3.in"
    for wrong in (torch.ones(3), torch.tensor(True), torch.tensor(5), torch.tensor(-1.0), torch.tensor(torch.nan)):
        save_file({**good, key: wrong}, path)
        said = complaint(tmp_path, "llamascopium-topk-scaled")
        assert said is not None
        assert "sae_weights.safetensors" in said
        assert "has no average norm of 'blocks.3.in'" in said


def test_tensors_that_share_memory_in_a_file_do_not_in_the_sae(tmp_path: Path) -> None:
    CASES["openai-topk"](tmp_path, drawer())
    tensors = torch.load(tmp_path / "7.pt")
    bias = torch.zeros(32, dtype=torch.float64)
    tensors |= {"decoder.weight": tensors["encoder.weight"].T, "latent_bias": bias[:24], "pre_bias": bias[24:]}
    torch.save(tensors, tmp_path / "7.pt")
    sae = fastsae.load(tmp_path).train()
    held = [t for t in sae.state_dict().values() if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in held}) == len(held)
    fastsae.FusedTrainStep(sae.float(), lr=1e-3)(torch.randn(16, 8))
