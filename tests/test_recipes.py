"""docs/recipes.md: every recipe runs, with its library, or is skipped where that is not installed."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import fastsae
from fastsae.swapped.base import Swapped
from tests.accelerate_case import library

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
RECIPES = dict(re.findall(r"^## (.+?)\n.*?```python\n(.*?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL))
LIBRARIES = {
    "SAELens": "sae_lens", "sparsify": "sparsify", "dictionary_learning": "dictionary_learning",
    "circuit-tracer": "circuit_tracer", "overcomplete": "overcomplete", "llamascopium": "llamascopium",
}  # fmt: skip


def test_each_library_has_a_recipe() -> None:
    assert set(LIBRARIES) <= set(RECIPES)
    assert RECIPES.keys() - LIBRARIES.keys() == {
        "openai/sparse_autoencoder", "Checkpoints of Gemma Scope, Llama Scope, Qwen-Scope"
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe_runs(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SAE that it ends with does what the accelerated module does, where the recipe made one."""
    if title in LIBRARIES:
        library(LIBRARIES[title])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "recipe"}
    exec(compile(RECIPES[title], f"docs/recipes.md, {title}", "exec"), names)
    sae = names["sae"]
    assert isinstance(sae, fastsae.SparseAutoencoder)
    assert all(math.isfinite(float(p.detach().sum())) for p in sae.parameters())
    made = [v for v in names.values() if isinstance(v, Swapped)]
    trainer = names.get("trainer")
    made += [trainer.sae] if trainer is not None else []  # type: ignore[attr-defined]
    assert bool(made) == (title in LIBRARIES and title != "dictionary_learning"), "what was to be accelerated was not"
    x = torch.randn(9, 64)
    for module in made:
        with torch.no_grad():
            found = module.eval()(x)
        found = found[2] if title == "overcomplete" else getattr(found, "sae_out", found)
        torch.testing.assert_close(found, sae(x).recon, rtol=1e-4, atol=1e-5)
