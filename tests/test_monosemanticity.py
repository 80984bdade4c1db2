"""The `monosemanticity` system: its recipe, measures and single latents by hand, and `fastsae reproduce` to the end."""

from __future__ import annotations

import json
import logging
import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastsae import SparseAutoencoder, TopK
from fastsae.cli.main import main
from fastsae.data.models import LanguageModel
from fastsae.systems import system
from fastsae.systems.material import FOLDER
from fastsae.systems.monosemanticity import causes, figures, meaning, recipe, steering
from fastsae.systems.monosemanticity import system as experiments
from fastsae.systems.monosemanticity.recipe import Recipe
from fastsae.systems.results import read

NAME = "monosemanticity"


def hand_made() -> SparseAutoencoder:
    """Two inputs, three latents: acts are ReLU(x₁), ReLU(x₂), 0; decoder rows of norm 2, 1 and 5."""
    sae = SparseAutoencoder(2, 3, TopK(2), pre_bias=False, decoder_norm="free", seed=0)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, -1]]))
        sae.W_dec.copy_(torch.tensor([[2.0, 0], [0, 1], [3, 4]]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae.eval()


def test_the_published_sae_starts_as_it_is_said_to() -> None:
    sae = recipe.new_sae(Recipe(d_sae=8, weight=5.0), 4, 1000, seed=0)
    torch.testing.assert_close(sae.W_enc, sae.W_dec)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((8,), 0.1))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    assert (sae.pre_bias, sae.decoder_norm, sae.dead_after) == (False, "free", 500)
    # λ Σ f ‖W‖ at a mean of the squared error's sum: the loss as it is written.
    x = torch.randn(16, 4)
    sae.calibrate_(x)
    out = sae.train()(x)
    scaled = x / (x.square().sum(1).mean() / 4).sqrt()
    acts = torch.relu(scaled @ sae.W_enc.T)
    loss = (acts @ sae.W_dec - scaled).square().sum(1).mean() + 5 * (acts * sae.W_dec.norm(dim=1)).sum(1).mean()
    torch.testing.assert_close(out.loss.float(), loss)


def test_measures_by_hand() -> None:
    """Of x = (1, 2): acts 1, 2, so L1 = 1·2 + 2·1, and x̂ = (2, 2): the error is 1 of a square of 5."""
    held = torch.tensor([[9.0, 9], [9, 9], [1, 2], [1, 2]])
    found = recipe.measure(hand_made(), held, weight=0.5)
    assert found["l0"] == 2
    assert found["l1"] == pytest.approx(4)
    assert found["nmse"] == pytest.approx(1 / 5)
    assert found["never"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["loss"] == pytest.approx(1 / 5 * 2 + 0.5 * 4)


class Toy(nn.Module):
    """Ids to logits through one linear layer: every effect is linear, so that attribution is ablation."""

    def __init__(self, square: bool = False):
        super().__init__()
        parts = {"embed": nn.Embedding(12, 6), "middle": nn.Linear(6, 6)}
        self.parts, self.head, self.square = nn.Sequential(OrderedDict(parts)), nn.Linear(6, 12), square

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.parts(input_ids).cumsum(1)
        return self.head(x.square() if self.square else x)


@pytest.mark.parametrize("square", [False, True])
def test_attribution_is_ablation_where_the_model_is_linear(square: bool) -> None:
    torch.manual_seed(0)
    model = Toy(square).requires_grad_(False)
    sae = SparseAutoencoder(6, 40, TopK(8), seed=0).eval()
    ids = torch.randint(12, (9,))
    found = causes.of_prompt(model, "parts", sae, ids, 2)
    assert len(found.latent) == 16
    assert set(found.token.tolist()) == {6, 7}
    if not square:
        torch.testing.assert_close(found.attribution, found.ablation, atol=1e-5, rtol=1e-4)
        numbers = causes.compare(found)
        assert numbers["attribution_correlation"] == pytest.approx(1, abs=1e-5)
        assert numbers["attribution_top"] == 10
        assert numbers["activation_correlation"] < 0.9
    else:  # a + b·δ + c·δ²: the second-order part is what attribution leaves out
        assert not torch.allclose(found.attribution, found.ablation, atol=1e-3)
    # By hand, one latent: the model's own activations without its part of the reconstruction.
    x = model.parts(ids[None, :-1])
    codes = sae.encode(x[0])
    token, latent = int(found.token[3]), int(found.latent[3])
    slot = (codes.indices[token] == latent).nonzero()[0, 0]
    x[0, token] -= codes.acts[token, slot] * sae.W_dec[latent]
    odds, whole = (
        model.head(y.cumsum(1) ** 2 if square else y.cumsum(1))[0, -1] for y in (x, model.parts(ids[None, :-1]))
    )
    truth = int(ids[-1])
    other = int(whole.index_fill(0, torch.tensor([truth]), -torch.inf).argmax())
    effect = (whole[truth] - whole[other]) - (odds[truth] - odds[other])
    torch.testing.assert_close(found.ablation[3], effect, atol=1e-4, rtol=1e-3)


def test_levels_of_one_latent_by_hand() -> None:
    """Twenty activations in each half; token 3 is the only one of the first half, so it alone is a top token."""
    tokens = torch.cat([torch.full((20,), 3), torch.full((10,), 3), torch.full((10,), 4)])
    row, act = torch.arange(40), torch.cat([torch.full((20,), 10.0), torch.full((10,), 9.5), torch.full((10,), 0.5)])
    counted, right = meaning.by_level(row, act, tokens)
    assert counted.tolist() == [10, 0, 0, 0, 0, 0, 0, 0, 0, 10]
    assert right.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 0, 10]
    assert meaning.by_level(row[:30], act[:30], tokens) is None  # ten activations in the second half are too few


def test_best_f1_by_hand() -> None:
    """Latent 0 fires on rows 0 and 1, latent 1 on row 2; the concept is at rows 0 and 2."""
    rows = torch.tensor([[1.0, -1], [1, -1], [-1, 1]])
    tokens = torch.tensor([7, 5, 7])
    assert meaning.best_f1(hand_made(), rows, tokens, [7]).tolist() == pytest.approx([2 / 3])


def test_names_are_words_with_a_capital_that_are_rare_without() -> None:
    strings = [" Romeo", " The", " the", "Romeo", " Ro", " ROME", " Juliet", " juliet"]
    counts = torch.tensor([30, 500, 9000, 40, 90, 90, 50, 1])
    assert meaning.names(strings, counts) == [0, 6]


def test_a_sigmoid_is_found_again() -> None:
    torch.manual_seed(0)
    frequency = torch.logspace(-6, -2, 4000, dtype=torch.float64)
    p = (1.5 * (frequency.log() - math.log(1e-4))).sigmoid()
    half, slope = meaning.sigmoid_fit(frequency, torch.rand(4000, dtype=torch.float64) < p)
    assert math.log10(half) == pytest.approx(-4, abs=0.1)
    assert slope == pytest.approx(1.5, rel=0.15)
    assert meaning.sigmoid_fit(frequency, torch.ones(4000, dtype=torch.bool)) is None


def test_steering_holds_the_latent_and_nothing_else() -> None:
    torch.manual_seed(0)
    model = Toy()
    place = SimpleNamespace(model=LanguageModel(model, None, "toy"), hook="parts.middle", ordinary=None)
    sae, ids = SparseAutoencoder(6, 20, TopK(3), seed=0).eval(), torch.randint(12, (5,))
    own = torch.cat([ids, torch.empty(0, dtype=torch.int64)])
    for _ in range(steering.WORDS):
        own = torch.cat([own, model(own[None])[0, -1].argmax()[None]])
    assert torch.equal(steering.written(place, sae, ids, {}), own[-steering.WORDS :])
    latent = int(sae.encode(model.parts(ids[None])[0]).indices[0, 0])
    change = steering.next_odds(place, sae, ids, {latent: 50.0}) - steering.next_odds(place, sae, ids, {})
    assert change.abs().max() > 1


def test_the_law_finds_an_exact_power() -> None:
    records = {}
    for share in (0.25, 0.5, 1.0):
        for size in (100, 200, 400):
            steps = int(share * 4096) // 4
            of = {"share": share, "rows": 4096, "batch": 4}
            records[f"size-{size}-{share:g}"] = {"settings": of, "latents": size, "loss": [7 * (size * steps) ** -0.25]}
    points, fit = figures.law(records)
    assert len(points) == 9
    assert fit == pytest.approx((7, 0.25))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("systems") / "quick"
    assert main(["reproduce", NAME, "--quick", "--seeds", "1", "--out", str(out), "--no-progress"]) == 0
    return out


def test_quick_runs_to_the_end(finished: Path, capsys: pytest.CaptureFixture) -> None:
    records = read(finished / "results.json", NAME)["experiments"]
    assert set(records) == set(system(NAME).experiments(True))
    for rule in ("topk", "batch_topk"):  # asked for the L0 of the published SAE
        assert records[f"{rule}-5"]["l0"][0] == pytest.approx(records["lambda-5"]["l0"][0], rel=0.35, abs=1.5)
    assert len(records["lambda-5"]["ce_spliced"]) == 1
    for name in ("frontier.png", "scaling.png", "meaning.png", "table.md"):
        assert (finished / name).stat().st_size > 100
    text = (finished / "table.md").read_text()
    assert f"{records['lambda-5']['fvu'][0]:.3f}" in text
    assert "33.2 / 19.1" in text
    before = (finished / "results.json").read_text()
    assert main(["reproduce", NAME, "--quick", "--seeds", "1", "--out", str(finished), "--no-progress"]) == 0
    assert json.loads(before)["experiments"] == read(finished / "results.json", NAME)["experiments"]


def test_systems_side_by_side_share_their_activations(finished: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second folder beside the first harvests nothing; more rows change none of the first; other settings have a
    folder of their own."""
    of = experiments.material(experiments.QUICK, finished)
    folders = list((finished.parent / FOLDER).iterdir())
    assert len(folders) == 1
    before = {path.name: path.stat().st_mtime_ns for path in folders[0].iterdir() if path.suffix == ".safetensors"}
    other = finished.parent / "other"
    assert torch.equal(of.source(other).held_out(), of.source(finished).held_out())
    assert len(of.source(other).held_out()) == 1024
    assert before == {name: (folders[0] / name).stat().st_mtime_ns for name in before}
    source = of.source(finished, seed=3)
    first, place = source.next_batch(512), source.state_dict()
    more = replace(of, rows=10**9)
    with caplog.at_level(logging.WARNING, "fastsae"):
        rows = more.source(other).n_tokens
    assert f"holds {rows} rows, 1000000000 were asked for: the text ended" in caplog.text
    assert rows > of.rows
    again = of.source(finished, seed=3)
    assert torch.equal(again.next_batch(512), first)
    again.load_state_dict(place)
    narrow = replace(of, stream=replace(of.stream, window=32), rows=256)
    narrow.source(other)
    assert len(list((finished.parent / FOLDER).iterdir())) == 2


def test_the_splice_leaves_the_first_position_alone(finished: Path) -> None:
    of = experiments.material(experiments.QUICK, finished)
    loss = of.in_model(finished, 256).loss(SparseAutoencoder(32, 16, TopK(2), seed=0).eval())
    assert (loss.n_windows, loss.window, loss.n_predictions) == (4, 64, 4 * 63)
    assert loss.replaced_share <= 63 / 64
    assert loss.ce_zero != loss.ce_untouched


def test_trained_saes_are_not_trained_again(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its record is lost an experiment finds its run's checkpoint, and measures the same."""
    data = json.loads((finished / "results.json").read_text())
    kept = data["experiments"].pop("topk-10")
    (finished / "results.json").write_text(json.dumps(data))
    steps = []
    monkeypatch.setattr("fastsae.training.step.FusedTrainStep.__call__", lambda *_: steps.append(1))
    assert main(["reproduce", NAME, "--quick", "--seeds", "1", "--out", str(finished), "--no-progress"]) == 0
    again = read(finished / "results.json", NAME)["experiments"]["topk-10"]
    assert not steps
    assert {**again, "seconds": 0} == {**kept, "seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--experiments", "topk-5"], "takes its L0 from the experiment lambda-5"),
        (["--scale", "model=package:no_such_model", "--experiments", "lambda-5"], "'no_such_model' is not installed"),
        (["--scale", "rows=100"], "rows is 100, expected at least one batch of 2048"),
        (["--scale", "text=0"], "text is 0, expected a name, such as 'package:"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["reproduce", NAME, *arguments, "--out", str(tmp_path / "a" / "out"), "--no-progress"]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1].startswith("fastsae reproduce: error:")
