"""splice, steer and spliced_loss on a transformer small enough to write out: what changes, what stays, what it costs.

The SAEs here are known: `perfect` reconstructs exactly (a latent for +x_d and one for -x_d of every dimension),
`nothing` reconstructs 0.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae.data import LanguageModel, Ordinary
from fastsae.data.filters import RowFilter
from fastsae.data.hooks import HookedModel, find
from fastsae.data.splice import acts_of, edited, reconstruct, splice, steer
from fastsae.runs.evaluate import evaluate
from fastsae.runs.spliced import _costs_nothing, activations_at, spliced_loss

D, VOCABULARY, WINDOWS, WINDOW = 6, 11, 5, 7


class Attention(nn.Module):
    """The mean of the tokens so far, mixed; a tuple, as transformers gives."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(D, D)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        count = torch.arange(1, hidden_states.shape[1] + 1).to(hidden_states)
        return self.mix(hidden_states.cumsum(1) / count[:, None]), None


class Named(NamedTuple):
    hidden: Tensor
    more: str


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.Tanh(), nn.Linear(2 * D, D))

    def forward(self, hidden: Tensor) -> Named:
        hidden = hidden + self.self_attn(hidden_states=hidden)[0]
        return Named(hidden + self.mlp(hidden), "kept")


class Tiny(nn.Module):
    """Three layers; position 0 is an attention sink of enormous norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, D)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(D, VOCABULARY)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embed(ids)
        hidden = torch.cat([hidden[:, :1] * 50, hidden[:, 1:]], dim=1)
        for layer in self.layers:
            output = layer(hidden)
            assert output.more == "kept", "the rest of a tuple is left as it is"
            hidden = output.hidden
        return self.head(self.dropout(hidden))


@pytest.fixture
def model() -> Tiny:
    return Tiny().eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(VOCABULARY, (WINDOWS, WINDOW), generator=torch.Generator().manual_seed(1))


def written(model: nn.Module, likely: bool) -> Tensor:
    """Windows whose every next token is the model's most likely one, or its least likely one."""
    ids = torch.arange(WINDOWS)[:, None]
    with torch.no_grad():
        while ids.shape[1] < WINDOW:
            logits = model(ids)[:, -1]
            ids = torch.cat([ids, (logits if likely else -logits).argmax(-1, keepdim=True)], dim=1)
    return ids


def perfect(dtype: torch.dtype = torch.float32, width: int = D) -> fastsae.SparseAutoencoder:
    sae = fastsae.SparseAutoencoder(width, 2 * width, fastsae.TopK(2 * width), seed=0, dtype=dtype)
    with torch.no_grad():
        both = torch.cat([torch.eye(width), -torch.eye(width)])
        sae.W_enc.copy_(both)
        sae.W_dec.copy_(both)
    return sae.eval()


def nothing() -> fastsae.SparseAutoencoder:
    sae = perfect()
    with torch.no_grad():
        sae.W_dec.zero_()
    return sae


def rough(activation: Any = None, **settings: Any) -> fastsae.SparseAutoencoder:
    sae = fastsae.SparseAutoencoder(D, 24, activation or fastsae.TopK(3), seed=3, **settings)
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-0.5, 0.5, D))
    return sae.eval()


def passed_with(model: nn.Module, ids: Tensor, *arguments: Any, **settings: Any) -> Tensor:
    with splice(model, *arguments, **settings):
        return model(ids)


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# -- splice -----------------------------------------------------------------------------------------------------------


def test_a_splice_replaces_the_activation_by_the_reconstruction(model: Tiny, ids: Tensor) -> None:
    sae = rough()
    with torch.no_grad():
        untouched = model(ids)
        hidden = HookedModel(model, 2)(ids)
        expected = model.head(model.layers[2](sae(hidden).recon).hidden)
        for hook in (2, "2", "layers.1", "layers.1:output", "layers.2:input"):
            with splice(model, hook, sae):
                torch.testing.assert_close(model(ids), expected)
            assert torch.equal(model(ids), untouched)
            assert hooks_of(model) == 0
        with splice(LanguageModel(model, None, "tiny"), {2: sae}):
            torch.testing.assert_close(model(ids), expected)


@pytest.mark.parametrize("hook", [0, 1, 3, "mlp.1", "mlp.1:input", "attn.0", "attn.2:input", "layers.1.mlp.0"])
def test_an_exact_reconstruction_changes_nothing_and_an_error_term_no_bit(model: Tiny, ids: Tensor, hook: Any) -> None:
    width = 2 * D if hook == "layers.1.mlp.0" else D
    with torch.no_grad():
        untouched = model(ids)
        with splice(model, hook, perfect(width=width)):
            torch.testing.assert_close(model(ids), untouched, rtol=1e-5, atol=1e-5)
        if width == D:
            with splice(model, hook, rough()):
                assert not torch.allclose(model(ids), untouched, atol=1e-3)
            with splice(model, hook, rough(), error_term=True):
                assert torch.equal(model(ids), untouched)


@pytest.mark.parametrize(
    "activation",
    [
        fastsae.BatchTopK(3),
        fastsae.ReLU(1.0),
        fastsae.JumpReLU(1e-3, 0.05, 0.05),
        fastsae.Matryoshka(fastsae.TopK(3), (8, 16)),
    ],
    ids=lambda rule: type(rule).__name__,
)
@pytest.mark.parametrize("settings", [{}, {"normalize": "layer_norm"}, {"skip": True}], ids=str)
def test_the_reconstruction_is_that_of_the_module(activation: Any, settings: dict[str, Any]) -> None:
    sae = rough(activation, **settings)
    if sae.W_skip is not None:
        nn.init.normal_(sae.W_skip, std=0.1)
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(reconstruct(sae, x), sae(x).recon, rtol=1e-5, atol=1e-5)
    assert reconstruct(sae, x[:0]).shape == (0, D)


def test_special_tokens_keep_their_bits(model: Tiny, ids: Tensor) -> None:
    hidden = HookedModel(model, 1)(ids)
    limit = float(hidden[:, 1:].norm(dim=-1).flatten().quantile(0.8))
    where = Ordinary(first=1, last=1, max_norm=limit)
    chosen = where(hidden)
    assert not chosen[:, [0, -1]].any()
    assert 0 < chosen.sum() < WINDOWS * (WINDOW - 2)
    seen: list[Tensor] = []
    handle = model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), handle, splice(model, 1, rough(), where=where):
        model(ids)
    assert torch.equal(seen[0][~chosen], hidden[~chosen])
    torch.testing.assert_close(seen[0][chosen], rough()(hidden[chosen]).recon)
    for wrong in (lambda x: chosen[:, :3], lambda x: chosen.float()):
        with pytest.raises(ValueError, match=r"where: expected bool \(5, 7\) for activations \(5, 7, 6\), got torch"):
            passed_with(model, ids, 1, rough(), where=wrong)
    with torch.no_grad():
        untouched = model(ids)
        with splice(model, 1, rough(), where=lambda x: torch.zeros(x.shape[:-1], dtype=torch.bool)):
            assert torch.equal(model(ids), untouched)


def test_ordinary_tokens_are_the_rows_that_the_filter_keeps() -> None:
    x = torch.randn(4, 10, 3, generator=torch.Generator().manual_seed(0))
    x[:, 0] = 1e4
    x[1, 5] *= 100
    x[2, 3, 1] = math.inf
    x[3, 4, 0] = math.nan
    ids = torch.arange(40).view(4, 10)
    for settings in ({"norm_factor": 3.0}, {"norm_factor": None}, {"norm_factor": 3.0, "n_suffix": 2, "n_prefix": 2}):
        full = {"n_prefix": 0, "n_suffix": 0, "drop_first": True, "nonfinite": "drop", **settings}
        row_filter = RowFilter("here", **full)
        row_filter.calibrate(x, ids)
        rows = row_filter(x, ids)
        assert torch.equal(x[row_filter.ordinary(x)], rows.activations)
        assert row_filter.ordinary(x).nonzero().tolist() == [
            [int(w), int(p)] for w, p in zip(rows.window, rows.position, strict=True)
        ]


def test_gradients_flow_through_the_reconstruction(model: Tiny, ids: Tensor) -> None:
    sae = rough()
    with splice(model, 1, sae):
        model(ids).square().mean().backward()
    grads = {name: p.grad.clone() for name, p in [*model.named_parameters(), *sae.named_parameters()]}
    assert all(g.abs().max() > 0 for g in grads.values())
    model.zero_grad()
    sae.zero_grad()

    hidden = model.layers[0](torch.cat([model.embed(ids)[:, :1] * 50, model.embed(ids)[:, 1:]], dim=1)).hidden
    model.head(
        model.layers[2](model.layers[1](sae.decode(sae.encode(hidden))).hidden).hidden
    ).square().mean().backward()
    for name, p in [*model.named_parameters(), *sae.named_parameters()]:
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-4 * float(grads[name].abs().max()))


def test_with_the_error_term_gradients_reach_the_latents_and_the_error_is_constant(model: Tiny, ids: Tensor) -> None:
    sae = rough()
    with splice(model, 1, sae, error_term=True):
        model(ids).square().mean().backward()
    grad = sae.W_dec.grad.clone()
    sae.zero_grad()
    hidden = HookedModel(model, 1)(ids)
    recon = sae.decode(sae.encode(hidden))
    out = recon + (hidden - recon).detach()
    model.head(model.layers[2](model.layers[1](out).hidden).hidden).square().mean().backward()
    torch.testing.assert_close(sae.W_dec.grad, grad, rtol=1e-4, atol=1e-4 * float(grad.abs().max()))
    assert grad.abs().max() > 0


def test_several_hooks_at_once_and_nested(model: Tiny, ids: Tensor) -> None:
    one, two = rough(), rough(fastsae.TopK(2))
    with torch.no_grad():
        x = one(HookedModel(model, 1)(ids)).recon
        middle = model.layers[1](x).hidden
        expected = model.head(model.layers[2](two(middle).recon).hidden)
        with splice(model, {1: one, 2: two}):
            torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
        with splice(model, 2, two), splice(model, 1, one):
            torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
        with splice(model, 2, two):
            second = model(ids)
        with splice(model, {1: one, 2: two}, where={1: lambda x: torch.zeros(x.shape[:2], dtype=torch.bool)}):
            assert torch.equal(model(ids), second), "each hook has its own choice of tokens, or none"
        # Two at one place: the second sees what the first left.
        with splice(model, 1, one), splice(model, 1, two):
            torch.testing.assert_close(
                model(ids),
                model.head(model.layers[2](model.layers[1](two(x).recon).hidden).hidden),
                rtol=1e-4,
                atol=1e-4,
            )
    assert hooks_of(model) == 0


def test_a_transcoder_reads_one_place_and_replaces_another(model: Tiny, ids: Tensor) -> None:
    transcoder = fastsae.SparseAutoencoder(D, 24, fastsae.TopK(4), d_out=2 * D, pre_bias=False, seed=0).eval()
    site = ("mlp.1:input", "layers.1.mlp.0")
    seen: list[Tensor] = []
    with torch.no_grad():
        handle = model.layers[1].mlp[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        read = HookedModel(model, "mlp.1:input")(ids)
        with handle, splice(model, site, transcoder):
            model(ids)
        torch.testing.assert_close(seen[0], transcoder.decode(transcoder.encode(read)))
        untouched = model(ids)
        with splice(model, site, transcoder, error_term=True):
            assert torch.equal(model(ids), untouched)
        with (
            pytest.raises(
                ValueError, match=r"layers.1.mlp:input comes before layers.1.mlp.0 in .*; swap the two hooks"
            ),
            splice(model, (site[1], site[0]), fastsae.SparseAutoencoder(2 * D, 24, fastsae.TopK(4), d_out=D)),
        ):
            model(ids)
        rows, targets = activations_at(model, site, ids)
        assert torch.equal(rows, read.flatten(0, 1))
        torch.testing.assert_close(targets, model.layers[1].mlp[0](rows))


def test_hooks_are_removed_whatever_happens(model: Tiny, ids: Tensor) -> None:
    with torch.no_grad():
        untouched = model(ids)
        for error in (KeyError, KeyboardInterrupt):
            two, one = splice(model, {1: rough(), 2: rough()}), steer(model, 3, rough(), {0: 1.0})
            with pytest.raises(error), two, one:
                raise error
            assert hooks_of(model) == 0
        with pytest.raises(ValueError, match=r"no module 'layers\.9'"):
            passed_with(model, ids, {1: rough(), "layers.9": rough()})
        assert hooks_of(model) == 0
        with pytest.raises(IndexError), splice(model, 1, rough()):
            model(ids + VOCABULARY)
        assert hooks_of(model) == 0
        assert torch.equal(model(ids), untouched)


def test_a_bf16_model_with_a_float32_sae(model: Tiny, ids: Tensor) -> None:
    model.bfloat16()
    with torch.no_grad():
        untouched = model(ids)
        with splice(model, 1, perfect()):
            assert model(ids).dtype == torch.bfloat16
            assert torch.equal(model(ids), untouched)  # what bf16 holds, float32 reconstructs
        with splice(model, 1, rough(), error_term=True):
            assert torch.equal(model(ids), untouched)
        untouched = model.float()(ids)
        with splice(model, 1, perfect(torch.bfloat16), error_term=True):
            assert torch.equal(model(ids), untouched)


@pytest.mark.parametrize(
    ("hook", "sae", "message"),
    [
        (4, None, "the model has 3 layers: hook must be 0 to 3, got 4"),
        ("mlp.3", None, "the model has 3 layers: mlp.L takes L from 0 to 2, got mlp.3"),
        ("mpl.1", None, r"no module 'mpl.1'; similar names: .*; a hook is .*, mlp.L, attn.L, cross.L or a module"),
        ("mlp.1:middle", None, "hook is 'mlp.1:middle', expected 'input' or 'output'"),
        (
            "layers.1.mlp.0",
            None,
            "at layers.1.mlp.0 have 12 numbers, but the SAE expects d_in = 6: was it trained on another",
        ),
        (
            "mlp.1",
            "transcoder",
            "at mlp.1 have 6 numbers, but the SAE expects d_out = 12: .* A transcoder needs two hooks",
        ),
        (
            "embed:input",
            None,
            r"expected floating activations .* at embed:input, got torch.int64 \(5, 7\); hook another",
        ),
    ],
)
def test_a_wrong_hook_is_one_clear_line(model: Tiny, ids: Tensor, hook: Any, sae: Any, message: str) -> None:
    other = fastsae.SparseAutoencoder(D, 24, fastsae.TopK(4), d_out=2 * D, pre_bias=False)
    with pytest.raises(ValueError, match=message) as caught, splice(model, hook, other if sae else rough()):
        model(ids)
    assert "\n" not in str(caught.value)
    assert hooks_of(model) == 0


def test_short_names_follow_the_structure_of_the_model(model: Tiny) -> None:
    assert find(model, "mlp.2").name == "layers.2.mlp"
    assert find(model, "attn.0:input").name == "layers.0.self_attn:input"
    model.layers[1].feeding = model.layers[1].mlp
    del model.layers[1].mlp
    with pytest.raises(ValueError, match=r"is its mlp; layers.1 has: self_attn, feeding; give the hook as a module"):
        find(model, "mlp.1")
    with pytest.raises(ValueError, match="no SAE for the hook 1"), splice(model, 1):
        pass
    with pytest.raises(ValueError, match="a mapping of hooks to SAEs and another SAE"):
        passed_with(model, torch.zeros(1, 2).long(), {1: rough()}, rough())


# -- steer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"normalize": "layer_norm"}, {"skip": True}], ids=str)
@pytest.mark.parametrize("ragged", [False, True])
def test_steering_sets_latents_and_keeps_the_error(
    model: Tiny, ids: Tensor, settings: dict[str, Any], ragged: bool
) -> None:
    sae = rough(fastsae.BatchTopK(3) if ragged else None, **settings)
    with torch.no_grad():
        hidden = HookedModel(model, 1)(ids)
        codes = sae.encode(hidden)
        dense = codes.to_dense()
        latents = dense.flatten(0, 1).sum(0).topk(2).indices.tolist()
        never = int((dense.flatten(0, 1) == 0).all(0).nonzero()[0])
        torch.testing.assert_close(acts_of(codes, [*latents, never]), dense.flatten(0, 1)[:, [*latents, never]])
        changed = dense.clone()
        changed[..., latents[0]], changed[..., never] = 4.0, 2.5
        recon, new = (sae.decode(type(codes).from_dense(a), like=hidden) for a in (dense, changed))
        seen: list[Tensor] = []
        handle = model.layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with handle, steer(model, 1, sae, {latents[0]: 4.0, never: torch.tensor(2.5)}):
            model(ids)
        torch.testing.assert_close(seen[0], new + (hidden - recon), rtol=1e-4, atol=1e-4)
        untouched = model(ids)
        with steer(model, 1, sae, {never: 0.0}), steer(model, 2, sae, {}):
            assert torch.equal(model(ids), untouched), "ablating what is not active changes no bit"
        with steer(model, 1, sae, {latents[0]: 9.0}, where=lambda x: torch.zeros(x.shape[:2], dtype=torch.bool)):
            assert torch.equal(model(ids), untouched)


def test_steering_by_the_current_value_changes_no_bit(model: Tiny, ids: Tensor) -> None:
    sae = rough()
    with torch.no_grad():
        one = ids[:1, :1]
        hidden = HookedModel(model, 1)(one)
        codes = sae.encode(hidden)
        now = {int(i): float(a) for i, a in zip(codes.indices.flatten(), codes.acts.flatten(), strict=True)}
        untouched = model(one)
        with steer(model, 1, sae, now):
            assert torch.equal(model(one), untouched)
        with steer(model, 1, sae, dict.fromkeys(now, 0.0)):
            assert not torch.equal(model(one), untouched)


def test_steering_is_differentiable_in_its_value(model: Tiny, ids: Tensor) -> None:
    sae, value = rough(), torch.tensor(2.0, requires_grad=True)

    def loss(at: Any) -> Tensor:
        with steer(model, 1, sae, {5: at}):
            return model(ids).square().mean()

    loss(value).backward()
    with torch.no_grad():
        slope = (loss(2.0 + 1e-2) - loss(2.0 - 1e-2)) / 2e-2
    assert float(value.grad) == pytest.approx(float(slope), rel=1e-2)


def test_wrong_latents_are_named(model: Tiny) -> None:
    for latents, message in [
        ({24: 1.0}, "no latent 24: the SAE has latents 0 to 23"),
        ({-1: 1.0}, "no latent -1"),
        ({1.5: 1.0}, "no latent 1.5"),
        ({1: math.nan}, "latent 1 is set to nan, expected a finite activation"),
    ]:
        with pytest.raises(ValueError, match=message), steer(model, 1, rough(), latents):  # type: ignore[arg-type]
            pass


# -- spliced_loss -----------------------------------------------------------------------------------------------------


def dense_losses(clean: Tensor, changed: Tensor, ids: Tensor) -> tuple[float, float]:
    """(CE, KL) written out."""
    p, q = (
        logits[:, :-1].double() - logits[:, :-1].double().logsumexp(-1, keepdim=True) for logits in (clean, changed)
    )
    ce = -q.gather(-1, ids[:, 1:, None]).mean()
    return float(ce), float((p.exp() * (p - q)).sum(-1).mean())


@contextlib.contextmanager
def constant(model: nn.Module, hook: Any, value: Tensor, where: Any) -> Iterator[None]:
    with edited(model, hook, lambda x, y: value.to(y).expand_as(y), where):
        yield


@pytest.mark.parametrize("windows_per_batch", [None, 1, 2])
def test_every_number_against_the_direct_computation(model: Tiny, windows_per_batch: int | None) -> None:
    where, sae, ids = Ordinary(first=1), rough(), written(model, likely=True)
    result = spliced_loss(model, {1: sae}, ids, where=where, windows_per_batch=windows_per_batch)
    with torch.no_grad():
        hidden = HookedModel(model, 1)(ids)
        rest = lambda x: model.head(model.layers[2](model.layers[1](x).hidden).hidden)  # noqa: E731
        mean = hidden[:, 1:].flatten(0, 1).mean(0)
        clean = model(ids)
        for name, value in {
            "spliced": sae(hidden).recon[:, 1:],
            "zero": torch.zeros(D),
            "mean": mean,
        }.items():
            changed = hidden.clone()
            changed[:, 1:] = value
            ce, kl = dense_losses(clean, rest(changed), ids)
            assert getattr(result, f"ce_{name}") == pytest.approx(ce, rel=1e-6, abs=1e-7)
            assert getattr(result, f"kl_{name}") == pytest.approx(kl, rel=1e-5, abs=1e-7)
    assert result.ce_untouched == pytest.approx(dense_losses(clean, clean, ids)[0], rel=1e-6, abs=1e-7)
    assert result.undefined == {}
    for name in ("zero", "mean"):
        ablated = getattr(result, f"ce_{name}")
        expected = (ablated - result.ce_spliced) / (ablated - result.ce_untouched)
        assert getattr(result, f"recovered_over_{name}") == pytest.approx(expected)
    assert result.n_predictions == WINDOWS * (WINDOW - 1)
    assert result.replaced_share == pytest.approx((WINDOW - 1) / WINDOW)
    assert result.hooks == ("layers.0",)
    assert json.loads(json.dumps(result.to_json(), allow_nan=False))["hooks"] == ["layers.0"]


def test_the_two_ends_of_the_scale(model: Tiny) -> None:
    ids = written(model, likely=True)
    best = spliced_loss(model, {1: perfect()}, ids)
    assert best.ce_spliced == pytest.approx(best.ce_untouched, abs=1e-6)
    assert best.kl_spliced == pytest.approx(0, abs=1e-9)
    assert best.recovered_over_zero == pytest.approx(1, abs=1e-5)
    assert best.recovered_over_mean == pytest.approx(1, abs=1e-5)
    worst = spliced_loss(model, {1: nothing()}, ids)
    assert worst.ce_spliced == worst.ce_zero
    assert worst.kl_spliced == worst.kl_zero > 0
    assert worst.recovered_over_zero == 0
    mean = nothing()
    rows, _ = activations_at(model, 1, ids, where=Ordinary())
    with torch.no_grad():
        mean.b_dec.copy_(rows.mean(0))
    middle = spliced_loss(model, {1: mean}, ids, where=Ordinary())
    assert middle.recovered_over_mean == pytest.approx(0, abs=1e-5)
    given = spliced_loss(model, {1: mean}, ids, where=Ordinary(), means={1: torch.zeros(D)}, mean_of="nothing")
    assert given.ce_mean == given.ce_zero
    assert given.mean_of == "nothing"


def test_nothing_is_recovered_over_an_ablation_that_costs_nothing(model: Tiny, ids: Tensor) -> None:
    """Where it lowers the cross-entropy, changes nothing, or by less than these predictions can show."""
    unlikely = written(model, likely=False)
    lower = spliced_loss(model, {1: rough()}, unlikely)
    costs = []
    with torch.no_grad():
        for context in (contextlib.nullcontext(), constant(model, 1, torch.zeros(D), None)):
            with context:
                costs.append(
                    -model(unlikely)[:, :-1].double().log_softmax(-1).gather(-1, unlikely[:, 1:, None]).flatten()
                )
    cost = costs[1] - costs[0]
    error = float(cost.std() / len(cost) ** 0.5)
    assert cost.mean() < -2 * error
    assert math.isnan(lower.recovered_over_zero)
    assert lower.undefined["recovered_over_zero"] == (
        f"zero ablation lowers the cross-entropy by {float(-cost.mean()):.3g} nats (standard error {error:.2g}), so "
        "there is nothing to recover"
    )
    assert lower.undefined.keys() == {"recovered_over_zero", "recovered_over_mean"}
    record = json.loads(json.dumps(lower.to_json(), allow_nan=False))
    assert record["recovered_over_zero"] is record["recovered_over_mean"] is None
    assert record["undefined"] == lower.undefined
    with torch.no_grad():
        model.layers[1].mlp[2].weight.zero_()
        model.layers[1].mlp[2].bias.fill_(0.25)
    same = spliced_loss(model, {"mlp.1": rough()}, written(model, likely=True))
    assert math.isnan(same.recovered_over_mean)
    assert "mean ablation raises the cross-entropy by only 0 nats" in same.undefined["recovered_over_mean"]
    assert same.kl_mean == 0


@pytest.mark.parametrize("costs", [
    [0.3, -0.1, 0.2, 0.1], [0.3, 0.1, 0.2, 0.1], [0.5, 0.5], [-0.3, -0.2], [4.0, -3.9], [0.0, 0.0], [0.27, 0.07],
])  # fmt: skip
def test_an_ablation_costs_something_if_its_mean_is_above_twice_its_standard_error(costs: list[float]) -> None:
    mean = statistics.fmean(costs)
    square = statistics.fmean(c * c for c in costs)
    why = _costs_nothing({"zero": 2 + mean, "untouched": 2.0}, "zero", square, len(costs))
    clear = mean > 2 * statistics.stdev(costs) / len(costs) ** 0.5
    assert (why is None) == clear


def test_a_cross_entropy_that_is_not_finite_gives_no_share() -> None:
    why = _costs_nothing({"mean": math.inf, "untouched": 2.0}, "mean", math.inf, 9)
    assert why == "the cross-entropy under mean ablation is not finite"


def test_several_hooks_and_a_transcoder_in_the_loss(model: Tiny, ids: Tensor) -> None:
    site = ("mlp.1:input", "mlp.1")
    transcoder = fastsae.SparseAutoencoder(D, 24, fastsae.TopK(4), pre_bias=False, seed=0).eval()
    result = spliced_loss(model, {1: rough(), site: transcoder}, ids, where={1: Ordinary()})
    with torch.no_grad(), splice(model, {1: rough(), site: transcoder}, where={1: Ordinary()}):
        ce, kl = dense_losses(Tiny().eval()(ids), model(ids), ids)
    assert (result.ce_spliced, result.kl_spliced) == (pytest.approx(ce, rel=1e-6), pytest.approx(kl, rel=1e-5))
    assert result.hooks == ("layers.0", "layers.1.mlp:input -> layers.1.mlp")
    assert result.replaced_share == pytest.approx((WINDOW - 1 + WINDOW) / (2 * WINDOW))
    alone = spliced_loss(model, {site: transcoder}, ids)
    with torch.no_grad(), constant(model, "mlp.1", torch.zeros(D), None):
        assert alone.ce_zero == pytest.approx(dense_losses(model(ids), model(ids), ids)[0], rel=1e-6)


def test_the_tokens_are_chosen_once_by_the_untouched_model(model: Tiny, ids: Tensor) -> None:
    """An earlier hook's zeros or reconstructions change the norms at a later one, but not which tokens are replaced."""
    middle = HookedModel(model, 2)(ids)
    limit = float(middle[:, 1:].norm(dim=-1).flatten().quantile(0.6))
    chosen = Ordinary(max_norm=limit)(middle)
    result = spliced_loss(model, {1: nothing(), 2: nothing()}, ids, where={2: Ordinary(max_norm=limit)})
    assert result.replaced_share == pytest.approx((ids.numel() + int(chosen.sum())) / (2 * ids.numel()))
    with torch.no_grad(), splice(model, {1: nothing(), 2: nothing()}, where={2: lambda x: chosen}):
        ce, _ = dense_losses(model(ids), model(ids), ids)
    assert result.ce_zero == result.ce_spliced == pytest.approx(ce, rel=1e-6)


def test_modes_come_back_and_the_model_is_whole(model: Tiny, ids: Tensor) -> None:
    model.train()
    model.dropout.eval()
    sae = rough().train()
    fired = sae.tokens_since_fired.clone()
    first = spliced_loss(model, {1: sae}, ids)
    assert model.training
    assert not model.dropout.training
    assert sae.training
    assert torch.equal(sae.tokens_since_fired, fired)
    assert hooks_of(model) == 0
    assert all(p.grad is None for p in model.parameters())
    assert repr(spliced_loss(model, {1: sae}, ids)) == repr(first)  # NaN is not equal to itself


def test_what_the_loss_refuses(model: Tiny, ids: Tensor) -> None:
    for bad, message in [
        (ids[:0], r"expected token ids \(windows, window >= 2\), got torch.int64 \(0, 7\)"),
        (ids[:, :1], r"got torch.int64 \(5, 1\)"),
        (ids.float(), "got torch.float32"),
        (ids[0], r"got torch.int64 \(7,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            spliced_loss(model, {1: rough()}, bad)
    with pytest.raises(ValueError, match="got no hooks"):
        spliced_loss(model, {}, ids)
    with pytest.raises(ValueError, match="leaves out every token at 1; there is nothing to replace"):
        spliced_loss(model, {1: rough()}, ids, where=Ordinary(max_norm=0.0))
    headless = nn.Sequential(model.embed, nn.Flatten(0, 1))
    with pytest.raises(
        ValueError, match=r"expected logits \(5, 7, vocabulary\) from Sequential, got .*; load the model"
    ):
        spliced_loss(headless, {"1:input": rough()}, ids, means={"1:input": torch.zeros(D)})


def test_ablations_are_taken_over_from_a_result_of_other_saes(model: Tiny) -> None:
    """The same numbers in half of the passes; what is visibly of something else is refused."""
    site, rest, ids = "layers.1", Ordinary(first=1), written(model, likely=True)
    first, second = (fastsae.SparseAutoencoder(D, 24, fastsae.TopK(4), seed=seed).eval() for seed in (0, 1))
    earlier = spliced_loss(model, {site: first}, ids, where=rest)
    alone = spliced_loss(model, {site: second}, ids, where=rest)
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    assert spliced_loss(model, {site: second}, ids, where=rest, ablations=earlier) == alone
    assert len(passes) == 2
    assert alone.ce_spliced != earlier.ce_spliced
    for hook, tokens, where in (("layers.0", ids, rest), (site, ids[1:], rest), (site, ids, None)):
        with pytest.raises(ValueError, match=r"the ablations are of \(hooks, windows, window, share replaced\)"):
            spliced_loss(model, {hook: second}, tokens, where=where, ablations=earlier)


def test_a_token_that_the_model_rules_out_adds_nothing(model: Tiny, ids: Tensor) -> None:
    with torch.no_grad():
        model.head.bias[10] = -math.inf
    ids = ids.clamp(max=9)
    result = spliced_loss(model, {1: rough()}, ids)
    assert math.isfinite(result.kl_spliced)
    assert math.isfinite(result.ce_spliced)


def test_the_names_of_the_public_face() -> None:
    assert fastsae.splice is splice
    assert fastsae.steer is steer
    assert fastsae.evaluate is evaluate
    assert fastsae.spliced_loss is spliced_loss
    assert {"splice", "steer", "evaluate", "spliced_loss"} <= set(fastsae.__all__)
