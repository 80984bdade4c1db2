"""Text that a model writes while one latent is held at a multiple of its largest activation.

x = x̂ + e, the latent clamped inside x̂ at every token, e kept: `fastsae.steer`. The unit is the latent's largest
activation on the data; 5 and 10 are the published examples. Source: Templeton et al. 2024, feature steering.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsae.data.hooks import run
from fastsae.data.models import LanguageModel
from fastsae.data.splice import steer
from fastsae.model.sae import SparseAutoencoder
from fastsae.systems.material import InModel

LEVELS = (0.0, 5.0, 10.0)
WORDS = 24
"""Tokens that are written."""
SHOWN = 8
"""Tokens that a latent raises most, as shown."""


def text_of(model: LanguageModel, ids: Tensor) -> str:
    """The text of token ids (n,); of a model without a tokenizer its bytes."""
    if model.tokenizer is None:
        return bytes(ids.tolist()).decode("latin-1")
    return model.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


@torch.no_grad()
def next_odds(place: InModel, sae: SparseAutoencoder, ids: Tensor, latents: dict[int, float]) -> Tensor:
    """Log-probabilities (vocabulary,) of the token after ids (n,), with these latents held."""
    with steer(place.model, place.hook, sae, latents, where=place.ordinary):
        output = run(place.model.model, ids[None])
    return getattr(output, "logits", output)[0, -1].float().log_softmax(-1)


def written(place: InModel, sae: SparseAutoencoder, ids: Tensor, latents: dict[int, float]) -> Tensor:
    """The WORDS tokens that greedily follow the prompt ids (n,), with these latents held; {}: the model's own."""
    for _ in range(WORDS):
        ids = torch.cat([ids, next_odds(place, sae, ids, latents).argmax()[None]])
    return ids[-WORDS:]


def sample(
    place: InModel, sae: SparseAutoencoder, ids: Tensor, latent: int, largest: float, about: list[str]
) -> dict[str, Any]:
    """A latent's record: what it fires on, the tokens whose log-probability it raises most, the text at each level."""
    rise = next_odds(place, sae, ids, {latent: LEVELS[1] * largest}) - next_odds(place, sae, ids, {})
    texts = {"untouched": written(place, sae, ids, {})}
    texts |= {f"{level:g}": written(place, sae, ids, {latent: level * largest}) for level in LEVELS}
    return {
        "latent": latent,
        "largest": round(largest, 3),
        "fires_on": about,
        "raises": [text_of(place.model, token[None]) for token in rise.topk(SHOWN).indices],
        "prompt": text_of(place.model, ids),
        "texts": {level: text_of(place.model, ids) for level, ids in texts.items()},
    }
