"""The one-layer model of bytes: what it computes, and that its training resumes, is cached and learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastsae.data.hooks import HookedModel
from fastsae.data.text import TokenCorpus
from fastsae.systems import one_layer, small_gpt
from fastsae.systems.one_layer import HOOK, Recipe, bytes_of, trained

SMALL = Recipe(d=16, mlp=32, heads=2, window=32, batch=4, steps=8, warmup=2)
LINE = b"the same few words, over and over. "


def corpus(pieces: int = 4) -> TokenCorpus:
    text = np.frombuffer(LINE * (4096 * pieces // len(LINE) + 1), dtype=np.uint8)
    return TokenCorpus(text[: 4096 * pieces])


def new(recipe: Recipe = SMALL) -> one_layer.OneLayer:
    return one_layer._new(recipe).eval()


def ids(n: int = 3) -> torch.Tensor:
    return torch.randint(256, (n, SMALL.window), generator=torch.Generator().manual_seed(0))


def test_the_shape_is_that_of_bricken_et_al() -> None:
    sizes = {name: tuple(p.shape) for name, p in new(Recipe()).named_parameters()}
    assert sizes["layers.0.up.weight"] == (512, 128)
    assert sizes["layers.0.down.weight"] == (128, 512)
    assert sizes["embed.weight"] == sizes["unembed.weight"] == (256, 128)


def test_a_byte_sees_only_those_before_it() -> None:
    model, given = new(), ids()
    other = given.clone()
    other[:, 20:] = 7
    assert torch.allclose(model(given)[:, :20], model(other)[:, :20], atol=1e-6)
    assert not torch.allclose(model(given)[:, 20:], model(other)[:, 20:], atol=1e-3)


@torch.no_grad()
def test_the_hook_gives_the_mlp_after_its_relu() -> None:
    """Against attention written out position by position."""
    model, given = new(), ids(1)
    block = model.layers[0]
    x = model.embed(given) + model.place.weight
    q, k, v = block.qkv(block.norm_1(x))[0].view(SMALL.window, 3, SMALL.heads, -1).permute(1, 2, 0, 3)
    mixed = torch.zeros(SMALL.heads, SMALL.window, SMALL.d // SMALL.heads)
    for head in range(SMALL.heads):
        for t in range(SMALL.window):
            weights = torch.softmax(k[head, : t + 1] @ q[head, t] / (SMALL.d / SMALL.heads) ** 0.5, 0)
            mixed[head, t] = weights @ v[head, : t + 1]
    x = x + block.out(mixed.permute(1, 0, 2).reshape(1, SMALL.window, SMALL.d))
    acts = F.relu(block.up(block.norm_2(x)))
    found = HookedModel(model, HOOK)(given)
    torch.testing.assert_close(found, acts, atol=1e-6, rtol=1e-5)
    assert 0.2 < float((found > 0).float().mean()) < 0.8
    torch.testing.assert_close(model(given), model.unembed(model.norm(x + block.down(acts))), atol=1e-6, rtol=1e-5)


def test_training_that_was_stopped_goes_on_with_the_same_result(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(small_gpt, "SAVE_EVERY", 3)
    whole, losses = trained(SMALL, corpus(), tmp_path / "a")
    steps = []

    def stop_at_the_fifth() -> None:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(SMALL, corpus(), tmp_path / "b", stop_at_the_fifth)
    assert [path.suffix for path in (tmp_path / "b").iterdir()] == [".checkpoint"]
    more: list[int] = []
    again, losses_again = trained(SMALL, corpus(), tmp_path / "b", lambda: more.append(1))
    assert (losses_again, len(more)) == (losses, SMALL.steps - 3)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    assert [path.suffix for path in (tmp_path / "b").iterdir()] == [".safetensors"]


def test_a_trained_model_is_read_from_the_cache(tmp_path: Path) -> None:
    first, losses = trained(SMALL, corpus(), tmp_path)
    stored, losses_stored = trained(SMALL, corpus(), tmp_path, lambda: pytest.fail("trained again"))
    assert (losses_stored, stored.name) == (losses, first.name)
    assert first.describe() == stored.describe()
    assert not any(parameter.requires_grad for parameter in stored.model.parameters())
    # Another text or another recipe is another model.
    for recipe, text in ((SMALL, corpus(5)), (replace(SMALL, seed=1), corpus())):
        other, _ = trained(recipe, text, tmp_path)
        assert other.name != first.name
        assert other.describe()["digest"] != first.describe()["digest"]
    assert len(list(tmp_path.iterdir())) == 3


def test_it_learns_a_text_that_repeats(tmp_path: Path) -> None:
    recipe = replace(SMALL, steps=100, warmup=10, lr=1e-2)
    model, losses = trained(recipe, corpus(), tmp_path)
    assert len(losses) == 10
    assert losses[0] > 2
    assert losses[-1] < 0.6
    # The held-out part of the text is the same.
    piece = torch.from_numpy(corpus().tokens(3, None))[: SMALL.window + 1]
    logits = model.model(piece[None, :-1])[0]
    assert float(F.cross_entropy(logits[8:], piece[9:])) < 0.6


def test_the_last_tenth_of_the_text_is_not_trained_on(tmp_path: Path) -> None:
    text = corpus(10)
    text._pieces[9] = np.zeros(4096, dtype=np.uint8)
    seen, _ = trained(SMALL, text, tmp_path / "a")
    text._pieces[9] = np.ones(4096, dtype=np.uint8)
    same, _ = trained(SMALL, text, tmp_path / "b")
    assert torch.equal(seen.model.unembed.weight, same.model.unembed.weight)


def test_bytes_of_files(tmp_path: Path) -> None:
    for name, text in (("a", "héllo".encode()), ("b", b"x" * 4096)):
        (tmp_path / name).write_bytes(text)
    found = bytes_of([tmp_path / "a", tmp_path / "b"])
    assert len(found) == 2
    joined = np.concatenate([found.tokens(i, None) for i in range(2)])
    assert bytes(joined.astype(np.uint8)) == "héllo".encode() + b"\n" + b"x" * 4096


@pytest.mark.parametrize("size", [10, 5000])
def test_a_text_that_is_too_short_is_refused(size: int, tmp_path: Path) -> None:
    """One piece is held out as a whole; two have one to train on."""
    text = TokenCorpus(np.zeros(size, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"the text has \d+ bytes to train on, a window takes 8001; give more"):
        trained(replace(SMALL, window=8000), text, tmp_path)
