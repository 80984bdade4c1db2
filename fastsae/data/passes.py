"""Passes of a language model over windows of text: run when their rows are needed, or begun earlier, elsewhere."""

from __future__ import annotations

import dataclasses
import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, Protocol

from torch import Tensor

from fastsae.data.hooks import HookedModel, Hooks
from fastsae.data.models import LanguageModel
from fastsae.data.padding import masked, trimmed
from fastsae.data.windows import WindowStream

log = logging.getLogger(__name__)

Activations = tuple[Tensor, ...]
"""(windows, width, d_in) at each hook of a pass; positions from `width` on are padding in every window."""


class Passes(Protocol):
    """A language model as a stream of its activations needs it."""

    @property
    def tokenizer(self) -> Any:
        """The model's; None if its text is token ids."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the places that are read, see HookedModel."""

    @property
    def digest(self) -> str:
        """Tells models apart, see LanguageModel.describe."""

    def begin(self, token_ids: Tensor) -> Callable[[], Activations]:
        """Begins a pass over windows (windows, window) int64; calling the result waits for its activations."""

    def room(self, wanted: int) -> int:
        """How many passes to begin before their activations are needed, where `wanted` would be of use."""


class ModelPasses:
    """Passes of a model in this process, each when its activations are needed.

    Raises ValueError for a hook that the model does not have, and for windows that are longer than it takes.
    """

    def __init__(self, language_model: LanguageModel, hook: Hooks, window: int):
        self.language_model = language_model
        self.tokenizer = language_model.tokenizer
        self.hooked = HookedModel(language_model.model, hook)
        self.names = self.hooked.names
        check_window(language_model, window)
        if note := self.hooked.note():
            log.info("%s", note)

    @cached_property
    def digest(self) -> str:
        return self.language_model.describe()["digest"]

    def begin(self, token_ids: Tensor) -> Callable[[], Activations]:
        return lambda: self.run(token_ids)

    def run(self, token_ids: Tensor) -> Activations:
        with masked(self.hooked.model, trimmed(token_ids)) as ids:
            return self.hooked.parts(ids)

    def room(self, wanted: int) -> int:
        return 0


def check_window(language_model: LanguageModel, window: int) -> None:
    """Raises ValueError for windows that are longer than the model takes."""
    settings: Any = getattr(language_model.model, "config", None)
    text = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None and window > longest:
        raise ValueError(f"window is {window} tokens, but the model takes at most {longest}")


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A pass that has begun, and the place in the text before it."""

    token_ids: Tensor
    result: Callable[[], Activations]
    before: dict[str, int]
    where: str


class PassStream:
    """Batches of `n` windows of a text in turn, each with its activations.

    `ahead` passes begin before their activations are needed. The position is that of the batches that `next` has
    returned, whatever has begun after them.
    """

    def __init__(self, windows: WindowStream, passes: Passes, n: int):
        self.windows, self.passes, self.n = windows, passes, n
        self.ahead = 0
        self._begun: deque[_Begun] = deque()

    def next(self) -> tuple[Tensor, Activations] | None:
        """Token ids (windows, window) and activations; None at the end of a text that does not repeat."""
        self._begin(max(self.ahead, 1))
        if not self._begun:
            return None
        activations = self._begun[0].result()
        token_ids = self._begun.popleft().token_ids
        self._begin(self.ahead)
        return token_ids, activations

    @property
    def epoch(self) -> int:
        return self.state_dict()["epoch"]

    def where(self) -> str:
        """The place in the text from which `next` reads on, in words."""
        return self._begun[0].where if self._begun else self.windows.where()

    def state_dict(self) -> dict[str, int]:
        return dict(self._begun[0].before) if self._begun else self.windows.state_dict()

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._begun.clear()
        self.windows.load_state_dict(state)

    def _begin(self, count: int) -> None:
        """Until so many passes have begun, or the text ends."""
        while len(self._begun) < count:
            before, where = self.windows.state_dict(), self.windows.where()
            token_ids = self.windows.next(self.n)
            if not len(token_ids):
                return
            self._begun.append(_Begun(token_ids, self.passes.begin(token_ids), before, where))
