"""The language models whose residual streams are taken apart, and the sizes of everything that is done with them.

SmolLM2-135M, or another model and text that the user names, and a small one that is trained here on the frames of
prompts.py and knows nothing else: "frames". The small one needs no package, and its later layers take a hundredth of
the time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fastsae.data.models import LanguageModel
from fastsae.data.specials import special_tokens
from fastsae.data.stream import StreamConfig
from fastsae.systems import one_layer
from fastsae.systems.interpretable_directions import prompts
from fastsae.systems.material import MODEL, TEXT, Material, stream_settings

FRAMES = "frames"
"""The name of the small model, in the place of a spec."""
SMALL = one_layer.Recipe(blocks=4, d=64, mlp=256, window=32, batch=32, steps=2000)
"""The small model's recipe."""


@dataclass(frozen=True)
class Scale:
    """A model, a layer of it, and how much is done there; the first eight can be given as `--scale rows=200000`.

    model, text  specs, see `fastsae harvest`; or FRAMES, which has its own text.
    layer        the residual stream after so many layers.
    rows         of it to train on.
    passes       over them. Published: 5 to 50 million rows, one to three passes.
    tokens       of held-out text on which the cross-entropy with an SAE in the model is measured.
    prompts      that are patched. Published: 50; here the time is that of the prompts, and of the model's later half.
    taus         thresholds of the selection, from 10⁻⁵ to 1. Published: 50.
    holdout      rows held out; SAEs are chosen on the first half and reported on the second.
    ratios       latents per dimension, of the published recipe; `ratio`: of what is compared with it and patched.
    l0s          active latents that recipes are matched at; `patched`: of those that are patched.
    small        the small model.
    """

    model: str = MODEL
    text: str = TEXT
    layer: int = 15
    rows: int = 400_000
    passes: int = 2
    tokens: int = 4096
    prompts: int = 12
    taus: int = 16
    holdout: int = 16_384
    ratios: tuple[int, ...] = (1, 2, 4)
    ratio: int = 2
    l0s: tuple[int, ...] = (10, 20, 40, 80)
    patched: tuple[int, ...] = (20,)
    small: one_layer.Recipe = SMALL

    def __post_init__(self) -> None:
        for name in ("rows", "passes", "tokens", "prompts", "taus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def width(self) -> int:
        """Numbers of a row, for estimates of time: SmolLM2's, where it is not the small model."""
        return self.small.d if self.model == FRAMES else 576

    @property
    def later(self) -> int:
        """Multiplications of a token in the layers that patching runs, for estimates: half of SmolLM2's otherwise."""
        small = self.small
        each = 4 * small.d**2 + 2 * small.d * small.mlp
        return (small.blocks - self.layer) * each if self.model == FRAMES else 60_000_000

    @property
    def thresholds(self) -> list[float]:
        """The selection's, from 10⁻⁵ to 1 in equal factors."""
        return torch.logspace(-5, 0, self.taus, dtype=torch.float64).tolist()

    @property
    def stream(self) -> StreamConfig:
        window = self.small.window if self.model == FRAMES else StreamConfig.window
        return StreamConfig(hook=self.layer, window=window, holdout=self.holdout, special_tokens="keep")

    @property
    def settings(self) -> dict[str, Any]:
        """What the rows depend on, JSON-able."""
        if self.model != FRAMES:
            return self._material.settings
        return {"model": asdict(self.small), "stream": stream_settings(self.stream), "rows": self.rows}

    def lacking(self) -> str | None:
        return None if self.model == FRAMES else self._material.lacking()

    def material(self, folder: Path, advance: Callable[[], object] = lambda: None) -> Material:
        """The rows and the model; the small one is trained if it is not in the folder's cache, with `advance()`."""
        if self.model != FRAMES:
            return self._material
        text = prompts.sentences(int(1.2 * self.rows) + 2 * self.holdout)
        model, _ = one_layer.trained(self.small, text, folder / "cache", advance)
        return Material(model, text, self.stream, self.rows)

    @property
    def _material(self) -> Material:
        return Material(self.model, self.text, self.stream, self.rows)


def in_full(material: Material) -> LanguageModel:
    """The material's model in float32 with its head: bfloat16 hides changes of a divergence below some 10⁻³."""
    return material.language_model(torch.float32)


def prompts_of(model: LanguageModel, n: int, seed: int = 0) -> prompts.Prompts:
    """n prompts in the model's tokens; without a tokenizer it is the small one."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        return prompts.prompts(n, prompts.encode, known=prompts.FEW, seed=seed)
    prefix, _ = special_tokens(tokenizer)
    return prompts.prompts(n, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], prefix, seed=seed)
