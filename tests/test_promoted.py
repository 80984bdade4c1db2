"""The tokens that a latent promotes: by hand on tiny models, in the page, and every reason to leave them out."""

from __future__ import annotations

import dataclasses
import html
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae.cli.main import main
from fastsae.data.hooks import in_residual_stream
from fastsae.data.models import load_model
from fastsae.report.promoted import Unembedding, promoted, promoted_of_run, unembedding
from fastsae.runs.opening import open_run
from tests.cli_case import WORDS, write_text, write_tiny_model

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

D, V = 16, 40
NAMES = [f"t{i}" for i in range(V)]


def randomized(model: nn.Module) -> nn.Module:
    """Norm weights and biases too, which transformers starts at 1 and 0."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def llama() -> nn.Module:
    shape = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return randomized(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=V, **shape)))


def gpt2(width: int = D) -> nn.Module:
    return randomized(
        transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=V, n_embd=width, n_layer=1, n_head=1))
    )


def gemma() -> nn.Module:
    shape = {"hidden_size": D, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return randomized(
        transformers.GemmaForCausalLM(
            transformers.GemmaConfig(vocab_size=V, head_dim=8, num_key_value_heads=1, **shape)
        )
    )


def sae_of(width: int = D, **settings: object) -> fastsae.SparseAutoencoder:
    return fastsae.SparseAutoencoder(width, 24, fastsae.TopK(3), seed=3, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "gain", "centers"),
    [
        (llama(), lambda m: m.model.norm.weight, False),
        (gpt2(), lambda m: m.transformer.ln_f.weight, True),
        (gpt2(15), lambda m: m.transformer.ln_f.weight, True),
        (gemma(), lambda m: 1 + m.model.norm.weight, False),
        (llama().bfloat16(), lambda m: m.model.norm.weight, False),
    ],
    ids=["llama", "gpt2", "an odd width", "gemma", "bf16"],
)
def test_the_final_norm_is_found_and_its_weight_is_what_it_multiplies_by(model, gain, centers: bool) -> None:
    found = unembedding(model)
    assert found.weight is model.lm_head.weight
    assert found.centers is centers
    torch.testing.assert_close(
        found.gain, gain(model).detach().float(), rtol=1e-2 if "bf16" in str(model.dtype) else 1e-3, atol=1e-5
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("model", [llama(), gpt2()], ids=["llama", "gpt2"])
def test_the_logits_by_hand(model: nn.Module) -> None:
    sae = sae_of(normalize="constant")
    sae.norm.scale.fill_(2.5)
    W_U, centers = model.lm_head.weight.detach(), hasattr(model, "transformer")
    gain = (model.transformer.ln_f if centers else model.model.norm).weight.detach()
    for latent, found in zip([5, 2], promoted(sae, [5, 2], unembedding(model), NAMES, 4), strict=True):
        row = 2.5 * sae.W_dec[latent].detach()
        if centers:
            row = row - row.mean()
        logits = [float(W_U[t] @ (gain * row)) for t in range(V)]
        mean = sum(logits) / V
        order = sorted(range(V), key=lambda t: logits[t])
        assert [text for text, _ in found.up] == [f"t{t}" for t in order[::-1][:4]]
        assert [text for text, _ in found.down] == [f"t{t}" for t in order[:4]]
        assert [value for _, value in found.up] == pytest.approx([logits[t] - mean for t in order[::-1][:4]], rel=1e-3)
        assert [value for _, value in found.down] == pytest.approx([logits[t] - mean for t in order[:4]], rel=1e-3)


def test_a_latent_along_a_token_s_own_direction_promotes_it() -> None:
    """With one-hot unembedding rows and γ = 1, the promoted token is the coordinate of the row's largest number."""
    sae = sae_of()
    with torch.no_grad():
        sae.W_dec[0] = torch.nn.functional.one_hot(torch.tensor(6), D).float()
    read_out = Unembedding(torch.eye(D), torch.ones(D), False)
    (found,) = promoted(sae, [0], read_out, [f"{i}\n" for i in range(D)])
    assert found.up[0] == ("6⏎", pytest.approx(1 - 1 / D))
    # γ decides with: a weight of -1 there suppresses it.
    (turned,) = promoted(
        sae, [0], dataclasses.replace(read_out, gain=torch.ones(D).index_fill(0, torch.tensor(6), -1)), NAMES
    )
    assert turned.down[0][0] == "t6"


def test_padding_other_widths_and_layers() -> None:
    read_out = unembedding(llama())
    (few,) = promoted(sae_of(), [0], read_out, NAMES[:5])
    assert {text for text, _ in few.up} == set(NAMES[:5])
    with pytest.raises(ValueError, match=r"^a latent writes 8 numbers, but the residual stream has 16$"):
        promoted(sae_of(8), [0], read_out, NAMES)
    transcoder = fastsae.SparseAutoencoder(9, 24, fastsae.TopK(3), d_out=D, seed=1)
    plain = sae_of()
    with torch.no_grad():
        plain.W_dec.copy_(transcoder.W_dec)
    assert promoted(transcoder, [4], read_out, NAMES) == promoted(plain, [4], read_out, NAMES)
    crosscoder = sae_of(3 * D, layers=3)
    with torch.no_grad():
        plain.W_dec.copy_(crosscoder.W_dec[:, 2 * D :])
    assert promoted(crosscoder, [4], read_out, NAMES) == promoted(plain, [4], read_out, NAMES)
    with pytest.raises(ValueError, match="a latent writes 24 numbers"):
        promoted(sae_of(3 * D, layers=2), [0], read_out, NAMES)


class NoNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.lm_head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.lm_head(x + self.mix(x))


def test_a_model_without_a_final_norm_or_without_a_head() -> None:
    found = unembedding(NoNorm())
    assert torch.equal(found.gain, torch.ones(D))
    assert not found.centers
    with pytest.raises(ValueError, match="Linear has no linear unembedding"):
        unembedding(nn.Linear(3, 3))


def test_what_is_in_the_residual_stream() -> None:
    model = llama()
    for hook in (0, 2, "1", "mlp.0", "attn.1", "model.layers.0", "layers.1:input", "layers.1.mlp"):
        assert in_residual_stream(model, hook), hook
    for hook in (
        "mlp.0:input",
        "layers.0.self_attn.q_proj",
        "layers.0.mlp.down_proj:input",
        "layers.0.input_layernorm",
    ):
        assert not in_residual_stream(model, hook), hook


# -- in the report ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head, a text, and a run at each of two hooks."""
    folder = tmp_path_factory.mktemp("promoted")
    write_tiny_model(folder / "model", head=True)
    write_text(folder / "text.txt")
    sizes = ["--d-sae", "48", "--k", "4", "--batch-size", "100", "--steps", "4", "--no-progress", "--no-tensorboard"]
    for hook, name in (("1", "residual"), ("mlp.0:input", "read")):
        source = ["--model", str(folder / "model"), "--text", str(folder / "text.txt"), "--hook", hook]
        more = ["--window", "32", "--rows", "600", "--holdout", "100", "--model-dtype", "float32", "--no-progress"]
        assert main(["harvest", str(folder / f"acts-{name}"), *source, *more, "--dtype", "float32"]) == 0
        assert main(["train", str(folder / f"acts-{name}"), "--run-dir", str(folder / name), *sizes]) == 0
    return folder


def page_of(run: Path, *more: str) -> str:
    assert main(["report", str(run), "--latents", "3,20", "--passages", "1", "--no-time-step", *more]) == 0
    return (run / "report.html").read_text()


def test_the_page_shows_both_ends(place: Path) -> None:
    page = page_of(place / "residual")
    lists = re.findall(r"<dt>(promotes|suppresses)</dt><dd>(.*?)</dd>", page, re.S)
    assert [name for name, _ in lists] == ["promotes", "suppresses"] * 2
    run = open_run(place / "residual")
    model = load_model(str(place / "model"), dtype=torch.float32, head=True).model
    rows = run.sae.W_dec[[3, 20]].detach() * (run.sae.norm.scale if run.sae.norm.mode == "constant" else 1)
    logits = (rows * model.model.norm.weight) @ model.lm_head.weight.T
    for i, (_, tokens) in enumerate(lists):
        expected = logits[i // 2].topk(8, largest=i % 2 == 0).indices.tolist()
        shown = [html.unescape(token) for token in re.findall(r"<code [^>]*>(.*?)</code>", tokens)]
        assert shown == [WORDS[t] for t in expected]
    assert f"by the logit lens on {place / 'model'}: its decoder row" in page
    assert "Not measured yet: <code>fastsae eval" in page
    assert "promotes" not in page_of(place / "residual", "--no-promoted")


def test_every_reason_to_leave_them_out(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(place / "read")
    assert "left out: the output at mlp.0:input is not added to the residual stream that the head reads." in page
    assert page.count("<b>Latent") == 2
    kept = (place / "model").rename(place / "away")
    try:
        assert "left out: no model at" in page_of(place / "residual")
        write_tiny_model(place / "model", head=True, seed=1)
        assert re.search(
            r"left out: the model \S+ has digest \w+, but the run(&#39;|')s activations", page_of(place / "residual")
        )
    finally:
        shutil.rmtree(place / "model")
        kept.rename(place / "model")
    run = open_run(place / "residual")
    harvest = run.config["notes"]["data"]["harvest"]
    harvest["model"] = "no-such-owner/no-such-model"
    found, why = promoted_of_run(run, [1], WORDS)
    assert not found
    assert "cannot load the model 'no-such-owner/no-such-model'" in why
    assert promoted_of_run(dataclasses.replace(run, config={}), [1], WORDS) == ({}, "")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "left out: loading a language model needs transformers: pip install" in page_of(place / "residual")
