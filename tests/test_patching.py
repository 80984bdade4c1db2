"""Residual streams in `interpretable_directions`: prompts, patching and selection by hand, the published SAE's loss."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae import ReLU, SparseAutoencoder
from fastsae.cli.main import main
from fastsae.data import LanguageModel, ShardSource, save_rows
from fastsae.systems import one_layer
from fastsae.systems.interpretable_directions import patching, prompts, saes, system
from fastsae.systems.interpretable_directions.figures import tables
from fastsae.systems.interpretable_directions.metrics import likeness
from fastsae.systems.interpretable_directions.models import FRAMES, Scale, prompts_of
from fastsae.systems.interpretable_directions.patching import Code, Patched
from fastsae.systems.interpretable_directions.saes import Recipe

NAME = "interpretable_directions"
D = 16
pytestmark = pytest.mark.usefixtures("one_thread")


def tiny() -> LanguageModel:
    """Three random blocks, and weights large enough that its predictions differ."""
    model = one_layer._new(one_layer.Recipe(blocks=3, d=D, mlp=32, heads=2, window=32, seed=1))
    for parameter in model.parameters():
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return LanguageModel(model.eval().requires_grad_(False), None, "tiny")


def patched(n: int = 3, layer: int = 2) -> Patched:
    model = tiny()
    return Patched(model, layer, prompts_of(model, n))


def identity() -> Code:
    """x = relu(x) - relu(-x): an SAE that loses nothing."""
    sae = SparseAutoencoder(D, 2 * D, ReLU(l1=0.0), pre_bias=False).eval()
    assert sae.W_enc is not None
    with torch.no_grad():
        for W in (sae.W_enc, sae.W_dec):
            W.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
    return patching.of_sae(sae)


# -- prompts ----------------------------------------------------------------------------------------------------------


def words(ids: Tensor) -> str:
    return " ".join(prompts.VOCABULARY[i] for i in ids.tolist())


def test_prompts_are_of_both_orders_and_differ_in_the_receiver() -> None:
    made = prompts.prompts(60, prompts.encode, known=prompts.FEW)
    assert len(prompts.VOCABULARY) <= 256
    first, second = ([], [])  # of ABBA and BABA
    for i in range(60):
        base, target = (ids[i, : made.last[i] + 1] for ids in (made.base, made.target))
        receiver, giver, other = made.names[i].tolist()
        assert words(base).endswith(f"{prompts.VOCABULARY[giver]} gave a {words(base[-2:-1])} to")
        assert [j for j, (a, b) in enumerate(zip(base, target, strict=True)) if a != b] == [made.start[i]]
        assert (base[made.start[i]], target[made.start[i]]) == (receiver, other)
        places = [base.tolist().index(name) for name in (receiver, giver)]
        (first if places[0] < places[1] else second).append(words(base))
        assert base.tolist().count(giver) == 2
        assert made.real[i].sum() == len(base)
    assert len(first) == len(second) == 30
    frames = {(i, prompts._filled(i, "Ann", "Bob", "park", "hat")) for i in range(60)}
    assert len({text for _, text in frames}) == 30


def test_prompts_need_names_of_one_token() -> None:
    with pytest.raises(ValueError, match="names are one token each, expected at least 3"):
        prompts.prompts(2, lambda text: list(text.encode()))


def test_prefixes_and_padding() -> None:
    made = prompts.prompts(30, prompts.encode, [255], prompts.FEW)
    assert made.base[:, 0].tolist() == [255] * 30
    assert made.last.min() < made.last.max() == made.base.shape[1] - 1
    assert torch.equal(made.start, prompts.prompts(30, prompts.encode, known=prompts.FEW).start + 1)


def test_the_small_model_reads_whole_sentences() -> None:
    """Every "gave a ... to" is followed by the one of the two names that is not the giver's, and a full stop."""
    text = prompts.sentences(5000)
    ids = torch.cat([torch.from_numpy(text.tokens(i, None)) for i in range(len(text))])
    assert len(ids) >= 5000
    read = words(ids)
    found = re.findall(r"(\w+) and (\w+) .*?(\w+) gave a \w+ to (\w+) \.", read)
    assert read.count(" gave a ") == len(found) > 200
    for one, other, giver, receiver in found:
        assert {giver, receiver} == {one, other}


# -- patching ---------------------------------------------------------------------------------------------------------


def predictions(model: LanguageModel, x: Tensor, layer: int) -> Tensor:
    """Probabilities (256,) in float64 after one prompt without padding, x (T, D) given after `layer` blocks."""
    net = model.model
    x = x[None]
    for block in list(net.layers)[layer:]:
        x = block(x)
    return net.unembed(net.norm(x))[0, -1].double().softmax(-1)


@pytest.mark.parametrize("layer", [0, 1, 3])
def test_kl_by_hand(layer: int) -> None:
    """Prompt by prompt without padding, and no layer before the one that is patched runs."""
    found = patched(5, layer)
    made, model = found.prompts, tiny()
    noise = torch.randn(found.x.shape, generator=torch.Generator().manual_seed(0))
    expected = []
    for i in range(5):
        n = int(made.last[i]) + 1
        q = model.model(made.target[i : i + 1, :n])[0, -1].double().softmax(-1)
        p = predictions(model, (found.x + noise)[i, :n], layer)
        expected.append(float((p * (p / q).log()).sum()))
    assert found.kl(found.x + noise) == pytest.approx(sum(expected) / 5, rel=1e-4)
    assert found.kl(found.goal) == pytest.approx(0, abs=1e-6)
    assert found.kl(found.x) > 1e-3
    assert all("forward" not in vars(block) for block in found.model.layers)


def test_a_model_that_has_no_layers_to_leave_out_is_refused() -> None:
    class Odd(one_layer.OneLayer):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids) + self.unembed(self.layers[0](self.embed(input_ids)))

    odd = LanguageModel(Odd(one_layer.Recipe(blocks=2, d=D, mlp=32, heads=2, window=32)), None, "odd")
    made = prompts_of(odd, 2)
    with pytest.raises(ValueError, match="odd cannot be run from layer 2 on"):
        Patched(odd, 2, made)


@pytest.mark.parametrize("kind", ["sae", "pca", "pca-signed"])
def test_all_latents_of_an_exact_code_give_the_target(kind: str, tmp_path: Path) -> None:
    found = patched(4)
    code = identity()
    if kind != "sae":
        save_rows(tmp_path / "rows", torch.randn(300, D, generator=torch.Generator().manual_seed(0)) * 3 + 1, holdout=0)
        code = patching.principal(ShardSource(tmp_path / "rows"), signed=kind == "pca-signed")
    changes = found.changes(code)
    real = found.prompts.real
    torch.testing.assert_close((found.x + changes @ code.directions)[real], found.goal[real], atol=1e-4, rtol=0)
    points = patching.select(found, code, [1e-3], 0)
    assert points[0]["kl"] == pytest.approx(0, abs=1e-5)
    size = (found.goal - found.x)[real].norm(dim=-1).mean()
    assert points[0]["edit"] == pytest.approx(float(size), rel=1e-3)
    assert points[0]["latents"] == (changes != 0).flatten(0, 1).any(0).sum()


def test_principal_components_by_svd(tmp_path: Path) -> None:
    x = torch.randn(5000, D, generator=torch.Generator().manual_seed(0)) * torch.arange(1, D + 1) + 2
    save_rows(tmp_path, x, holdout=0)
    code = patching.principal(ShardSource(tmp_path), signed=True)
    _, _, V = torch.linalg.svd(x.double() - x.double().mean(0), full_matrices=False)
    cosines = (code.directions[:D].double() @ V.T).abs()
    torch.testing.assert_close(cosines.flip(0), torch.eye(D).double(), atol=1e-3, rtol=0)
    codes = code.encode(x)
    assert codes.min() == 0
    torch.testing.assert_close(codes @ code.directions + x.mean(0), x, atol=1e-3, rtol=0)


def test_only_places_that_can_differ_change() -> None:
    found = patched(6)
    changes = found.changes(identity())
    for i in range(6):
        places = changes[i].abs().sum(-1).nonzero()[:, 0]
        assert (places.min(), places.max()) == (found.prompts.start[i], found.prompts.last[i])


def slowly(found: Patched, code: Code, taus: list[float], seed: int) -> list[tuple[set[int], float]]:
    """The published selection with sets, every edit summed latent by latent."""
    c, goal = code.encode(found.x), code.encode(found.goal)
    real, start = found.prompts.real, found.prompts.start

    def kl(latents: set[int]) -> float:
        x = found.x.clone()
        for i in range(len(x)):
            for t in range(x.shape[1]):
                if real[i, t] and t >= start[i]:
                    for latent in sorted(latents):
                        x[i, t] += (goal[i, t, latent] - c[i, t, latent]) * code.directions[latent]
        return found.kl(x)

    kept = set(range(c.shape[-1]))
    last = kl(kept)
    steps = [(set(kept), last)]
    generator = torch.Generator().manual_seed(seed)
    for tau in taus:
        order = sorted(kept)
        for at in torch.randperm(len(order), generator=generator).tolist():
            fewer = kept - {order[at]}
            if (now := kl(fewer)) - last < tau:
                kept, last = fewer, now
        steps.append((set(kept), last))
    return steps


def test_selection_against_a_slow_version() -> None:
    found, taus = patched(2), [1e-3, 0.05, 0.3]
    code = Code(lambda x: x.clone(), torch.eye(D))
    ticks = []
    points = patching.select(found, code, taus, 3, lambda: ticks.append(1))
    expected = slowly(found, code, taus, 3)
    assert [point["latents"] for point in points] == [len(latents) for latents, _ in expected]
    assert [point["kl"] for point in points] == pytest.approx([kl for _, kl in expected], abs=1e-5)
    assert points[0]["latents"] >= points[1]["latents"] > points[-1]["latents"]
    assert [point["tau"] for point in points] == [0, *taus]
    assert len(ticks) == len(taus) * D
    assert patching.fewest(points, points[1]["kl"] + 1e-9)["latents"] <= points[1]["latents"]  # type: ignore[index]
    assert patching.fewest(points, -1.0) is None


# -- SAEs -------------------------------------------------------------------------------------------------------------


def test_dictionaries_of_two_sizes_start_apart() -> None:
    small, large = (saes.new_sae(Recipe("published", ratio, 6), 64, 0).W_dec.detach() for ratio in (1, 2))
    assert likeness(small, large)["mmcs"] < 0.5


def test_the_published_loss() -> None:
    """With α = l1·s/d: nn functions on x as it is, unit rows by division, against the module's loss on x/s."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, D, generator=g) * 7 + 1
    sae = saes.new_sae(Recipe("published", 2, 6), D, seed=4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(2 * D))
    assert 1.5 < float(sae.W_dec.abs().max() / sae.W_dec.square().mean().sqrt()) < 2.6  # uniform, not normal: Xavier
    sae.calibrate_(x).start_(x)
    assert sae.W_enc is None
    s = float(sae.norm.scale)
    with torch.no_grad():
        sae.b_enc.add_(0.1)
    alpha = saes.alpha(sae)
    M = (1.0 * sae.W_dec.detach()).requires_grad_()
    b = (s * sae.b_enc.detach()).requires_grad_()
    rows = F.normalize(M, dim=1)
    c = F.relu(x @ rows.T + b)
    loss = F.mse_loss(c @ rows, x) + alpha * c.norm(1, dim=1).mean()
    loss.backward()
    ours = sae(x).loss
    ours.backward()
    sae.project_gradients_()
    factor = s * s / D
    assert float(ours.detach()) * factor == pytest.approx(float(loss.detach()), rel=1e-5)
    for mine, theirs in ((sae.W_dec.grad, M.grad), (sae.b_enc.grad, b.grad)):
        assert mine is not None
        assert theirs is not None
        torch.testing.assert_close(mine * factor, theirs * (1 if theirs is M.grad else s), atol=1e-5, rtol=1e-4)


def test_published_saes_have_no_decoder_bias_and_are_kept(tmp_path: Path) -> None:
    save_rows(tmp_path / "rows", torch.randn(2000, D, generator=torch.Generator().manual_seed(0)) + 3, holdout=0)
    scale = replace(system.QUICK, rows=2000)
    source, recipe = ShardSource(tmp_path / "rows"), Recipe("published", 2, 4, batch=200)
    done: list[int] = []
    sae = saes.trained(recipe, scale, source, 0, tmp_path, lambda: done.append(1))
    assert not sae.b_dec.any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(2 * D))
    assert (len(done), sae.training) == (10, False)
    again = saes.trained(recipe, scale, source, 0, tmp_path, lambda: done.append(2))
    assert done == [1] * 10 + [2] * 10
    torch.testing.assert_close(again.W_dec, sae.W_dec, rtol=0, atol=0)
    assert torch.equal(saes.firings(sae, source), sae(source.rows(range(2000))).codes.to_dense().gt(0).sum(0))
    assert not list((tmp_path / "cache").glob("run-*"))


# -- the command line -------------------------------------------------------------------------------------------------


def reproduce(out: Path, *more: str) -> list[str]:
    return ["reproduce", NAME, "--quick", "--seeds", "1", "--no-progress", "--out", str(out), *more]


def test_quick_runs_of_the_language_model(tmp_path: Path, capsys) -> None:
    everything = list(system.on_stream(system.QUICK, ""))
    assert main(reproduce(tmp_path / "out", "--experiments", *everything)) == 0
    table = capsys.readouterr().out
    for text in ("FVU: published recipe, 2 latents per dimension", "PCA, ± directions", "MMCS to twice", "chosen"):
        assert text in table
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["experiments"]
    assert list(stored) == everything
    assert 0 < stored["frontier-published-r1-l4"]["next_larger"]["matched"] <= 1
    assert stored["ioi-pca"]["kl"] == stored["ioi-topk-l4"]["kl"] == stored["model"]["kl"]
    for picture in ("frontier.png", "ioi.png"):
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    # Again from nothing: the same figures.
    some = ["model", "frontier-topk-r2-l4", "ioi-topk-l4"]
    assert main(reproduce(tmp_path / "b" / "out", "--experiments", *some)) == 0
    again = json.loads((tmp_path / "b" / "out" / "results.json").read_text())["experiments"]
    for name in some:
        assert {**again[name], "seconds": 0} == {**stored[name], "seconds": 0}


def test_without_the_packages_the_toy_runs(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Scale, "lacking", lambda self: None if self.model == FRAMES else "the package 'x' is not there")
    monkeypatch.setattr(system, "QUICK", replace(system.QUICK, model="package:x", text="package:x/y"))
    chosen = ["coded-a0.316-m16", "model", "ioi-pca"]
    assert main(reproduce(tmp_path, "--experiments", *chosen)) == 1
    captured = capsys.readouterr().err
    assert "2 of 3 experiments are left out: the package 'x' is not there" in captured
    assert captured.strip().splitlines()[-1].startswith("fastsae reproduce: error: 2 of 3")
    assert list(json.loads((tmp_path / "results.json").read_text())["experiments"]) == chosen[:1]
    assert main(reproduce(tmp_path / "none", "--experiments", "model")) == 1
    assert capsys.readouterr().err.strip() == "fastsae reproduce: error: the package 'x' is not there"


def test_a_missing_package_is_named(tmp_path: Path, capsys) -> None:
    arguments = ["--scale", "model=package:no_such_package", "--experiments", "model"]
    assert main(reproduce(tmp_path, *arguments)) == 1
    assert "the package 'no_such_package' is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["rows=0", "layer=x", "model=3"])
def test_bad_sizes(given: str, tmp_path: Path, capsys) -> None:
    assert main(reproduce(tmp_path, "--scale", given)) == 1
    assert "expected" in capsys.readouterr().err


def test_the_default_experiments() -> None:
    found = system.experiments()
    names = [name for name in found if name.startswith("frontier-published")]
    assert len(names) == 12
    assert names.index("frontier-published-r4-l20") < names.index("frontier-published-r2-l20")
    assert {one.scale.model for name, one in found.items() if name.startswith("frames-")} == {FRAMES}  # type: ignore[attr-defined]
    assert found["frames-ioi-dense"].settings["taus"] == 50
    assert found["ioi-topk-l20"].steps(3) == found["ioi-topk-l20"].steps(1), "the language model's patching: one seed"
    assert found["frames-ioi-topk-l4"].steps(3) == 3 * found["frames-ioi-topk-l4"].steps(1)
    assert tables({}) == []
