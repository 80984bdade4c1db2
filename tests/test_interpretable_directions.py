"""The `interpretable_directions` system: its data, metrics and recipe by hand, and `fastsae reproduce` to the end."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.systems import RESULTS
from fastsae.cli.main import main
from fastsae.systems import system
from fastsae.systems.interpretable_directions import metrics, toy
from fastsae.systems.interpretable_directions.toy import Features, Recipe
from fastsae.systems.results import read

NAME = "interpretable_directions"
SMALL = Recipe(d=32, features=48, d_sae=64, batch_size=256, steps=20, measured=2048, every=5)


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_mmcs_by_hand() -> None:
    A = torch.tensor([[2.0, 0], [0, 1], [-1, 0]])
    B = torch.tensor([[1.0, 1], [5, 0]])
    torch.testing.assert_close(metrics.max_cosines(A, B), torch.tensor([1, 0.5**0.5, -(0.5**0.5)]))
    torch.testing.assert_close(metrics.max_cosines(B, A), torch.tensor([0.5**0.5, 1]))
    assert metrics.max_cosines(torch.zeros(1, 2), B).tolist() == [0]


def test_matching_is_one_to_one() -> None:
    """Both rows of A are nearest to the first of B; one of them has to take another."""
    A = torch.tensor([[1.0, 0], [1, 0.1]])
    B = torch.tensor([[1.0, 0.05], [0, 1], [-1, 0]])
    found = metrics.matched_cosines(A, B)
    cosines = metrics.cosines(A, B)
    torch.testing.assert_close(found, torch.stack([cosines[0, 0], cosines[1, 1]]))
    assert found.sum() < metrics.max_cosines(A, B).sum()


@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 5), (4, 4), (5, 7)])
def test_assignment_is_the_best_of_all(n: int, m: int) -> None:
    generator = np.random.default_rng(n * m)
    for cost in (generator.normal(size=(n, m)), generator.integers(0, 3, (n, m)).astype(float)):  # the second has ties
        columns = metrics.assignment(cost)
        assert len(set(columns.tolist())) == n
        best = min(sum(cost[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(m), n))
        assert cost[range(n), columns].sum() == pytest.approx(best, abs=1e-12)


def test_assignment_finds_a_hidden_permutation() -> None:
    hidden = np.random.default_rng(0).permutation(200)
    A = F.normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    columns = metrics.assignment(-(A @ A[hidden].T).double().numpy())
    assert columns.tolist() == np.argsort(hidden).tolist()
    torch.testing.assert_close(metrics.matched_cosines(A, A[hidden]), torch.ones(200))


def test_assignment_refuses() -> None:
    with pytest.raises(ValueError, match="at most as many rows as columns"):
        metrics.assignment(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="not finite"):
        metrics.assignment(np.full((1, 2), np.nan))


# -- data -------------------------------------------------------------------------------------------------------------


def test_probabilities_are_the_coded_ones() -> None:
    coded = Features(Recipe(), 0)
    assert float(coded.p.sum()) == pytest.approx(0.97, abs=0.005)
    assert float((1 - coded.p).prod()) == pytest.approx(0.38, abs=0.005)  # empty samples
    assert float(coded.p[1] / coded.p[0]) == pytest.approx(0.99)
    five = Features(Recipe(active=5.0), 0)
    assert float(five.p.sum()) == pytest.approx(5)
    torch.testing.assert_close(five.directions, coded.directions)
    torch.testing.assert_close(coded.directions.norm(dim=1), torch.ones(512))


def test_samples_have_the_features_of_their_probabilities() -> None:
    features, n = Features(replace(SMALL, active=5.0), 1), 20_000
    sample, feature, size = features.codes(n)
    assert len(set(zip(sample.tolist(), feature.tolist(), strict=True))) == len(sample)
    counts = torch.bincount(feature, minlength=48)
    spread = (n * features.p * (1 - features.p)).sqrt()
    assert ((counts - n * features.p).abs() < 4.5 * spread).all()
    assert ((torch.bincount(sample, minlength=n).double().mean() - 5).abs()) < 0.1
    assert 0 <= size.min() < 0.001
    assert 0.999 < size.max() < 1
    assert abs(float(size.mean()) - 0.5) < 0.01
    # independent of each other: how often the two commonest are on together
    both = torch.isin(sample[feature == 0], sample[feature == 1]).sum()
    expected = n * float(features.p[0] * features.p[1])
    assert abs(float(both) - expected) < 4.5 * expected**0.5


def test_samples_are_sums_of_directions() -> None:
    one, same = (Features(replace(SMALL, active=5.0), 2) for _ in range(2))
    sample, feature, size = one.codes(100)
    dense = torch.zeros(100, 48).index_put_((sample, feature), size)
    torch.testing.assert_close(same.samples(100), dense @ one.directions)


@pytest.mark.parametrize("rule", toy.RULES)
def test_no_sae_starts_at_the_features(rule: str) -> None:
    """Features and weights are both drawn from normal numbers: with the same seed they would be the same."""
    recipe = replace(Recipe(), rule=rule, d_sae=1024)
    best = metrics.max_cosines(Features(recipe, 3).directions, toy.new_sae(recipe, 3).W_dec.detach())
    assert best.mean() < 0.25
    assert best.max() < 0.5


# -- recipe -----------------------------------------------------------------------------------------------------------


def test_the_recipe_is_the_published_one() -> None:
    """Six steps against plain torch: nn.Linear and nn.MSELoss, rows divided by their norm when they are read."""
    recipe = replace(SMALL, active=3.0, d_sae=40, coefficient=0.3, steps=6)
    sae = toy.new_sae(recipe, 5)
    assert sae.W_enc is not None
    encoder, decoder = nn.Linear(32, 40), nn.Linear(40, 32, bias=False)
    with torch.no_grad():
        encoder.weight.copy_(sae.W_enc)
        encoder.bias.copy_(sae.b_enc)
        decoder.weight.copy_(sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert 0.9 * 32**-0.5 < sae.W_enc.abs().max() <= 32**-0.5
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    features = Features(recipe, 5)
    for _ in range(6):
        x = features.samples(256)
        decoder.weight.data = F.normalize(decoder.weight.data, dim=0)
        c = F.relu(encoder(x))
        loss = F.mse_loss(decoder(c), x) + 0.3 * c.norm(1, dim=1).mean() / 40
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained, curve = toy.train(recipe, Features(recipe, 5), 5)
    assert trained.W_enc is not None
    torch.testing.assert_close(trained.W_enc.detach(), encoder.weight.detach(), atol=2e-5, rtol=0)
    torch.testing.assert_close(trained.b_enc.detach(), encoder.bias.detach(), atol=2e-5, rtol=0)
    rows = F.normalize(decoder.weight.detach(), dim=0).T
    torch.testing.assert_close(trained.W_dec.detach(), rows, atol=2e-5, rtol=0)
    assert not trained.b_dec.any()
    assert list(curve) == [5, 6]


def test_the_default_grid() -> None:
    found = toy.experiments()
    cells = [one.recipe for one in found.values() if one.cell]
    assert len(cells) == 2 * 8 * 4
    assert {r.coefficient for r in cells} == {0.01, 0.032, 0.1, 0.316, 1.0, 3.162, 10.0, 31.623}
    assert {r.d_sae for r in cells} == {256, 512, 1024, 2048}
    assert {(r.steps, r.batch_size, r.lr, r.rule, r.d, r.features) for r in cells} == {
        (1000, 4096, 1e-3, "published", 256, 512)
    }
    names = list(found)
    assert names.index("coded-a0.1-m2048") < names.index("coded-a0.1-m1024")  # the comparison needs the larger first


def test_measured_of_an_sae_that_knows_the_features() -> None:
    recipe = replace(SMALL, features=20, d_sae=30, rule="topk", coefficient=8, active=2.0)
    features = Features(recipe, 0)
    features.directions = torch.linalg.qr(torch.randn(32, 20, generator=torch.Generator().manual_seed(1)))[0].T
    sae = toy.new_sae(recipe, 0)
    assert sae.W_enc is not None
    with torch.no_grad():
        for W in (sae.W_enc, sae.W_dec):
            W[:20] = features.directions
        sae.b_enc[:20], sae.b_enc[20:] = -1e-4, -100.0  # above the rounding of what is 0
    found = toy.measure(recipe, features, sae)
    assert (found["mmcs"], found["found"], found["alive"]) == (pytest.approx(1), 1.0, 20)
    assert found["fvu"] < 1e-5
    assert found["l0"] == pytest.approx(2, abs=0.15)


# -- the command line -------------------------------------------------------------------------------------------------


def reproduce(out: Path, *more: str) -> list[str]:
    return ["reproduce", NAME, "--quick", "--seeds", "1", "--no-progress", "--out", str(out), *more]


def test_a_run_stores_every_cell_and_goes_on(tmp_path: Path, capsys) -> None:
    cells = ["coded-a0.316-m32", "coded-a0.316-m16"]
    assert main(reproduce(tmp_path, "--experiments", cells[0])) == 0
    assert "1 experiments, about" in capsys.readouterr().err
    assert main(reproduce(tmp_path, "--experiments", *reversed(cells), "steps-coded-topk")) == 0
    captured = capsys.readouterr()
    assert "1 of 3 experiments are already in" in captured.err
    stored = json.loads((tmp_path / "results.json").read_text())["experiments"]
    assert list(stored) == ["steps-coded-topk", *cells]
    assert "next_larger" not in stored[cells[0]]
    larger = stored[cells[1]]["next_larger"]
    assert 0 < larger["matched"] <= larger["mmcs"] <= 1
    assert list(stored[cells[0]]["curve"][0]) == ["5", "10", "15", "20"]
    assert captured.out.startswith((tmp_path / "table.md").read_text().strip())
    for picture in ("mmcs.png", "steps.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    # Fewer steps are other settings, and a dictionary of other settings is not compared with.
    assert main(reproduce(tmp_path, "--experiments", cells[1], "--scale", "steps=10")) == 0
    again = json.loads((tmp_path / "results.json").read_text())["experiments"][cells[1]]
    assert again["settings"]["steps"] == 10
    assert "next_larger" not in again


def test_the_same_run_has_the_same_figures(tmp_path: Path) -> None:
    for name in "ab":
        only = ["steps-five-topk", "five-a1-m16"]
        assert main(reproduce(tmp_path / name, "--experiments", *only)) == 0
    a, b = (read(tmp_path / name / "results.json", NAME)["experiments"] for name in "ab")
    for name in a:
        assert {**a[name], "seconds": 0} == {**b[name], "seconds": 0}


def test_steps_are_a_limit(tmp_path: Path, capsys) -> None:
    found = toy.experiments(steps=1000)
    assert {one.recipe.steps for one in found.values() if one.cell} == {1000}
    assert found["steps-coded-topk"].recipe.steps == 240
    assert (found["steps-coded-topk"].steps(3), found["coded-a0.1-m256"].steps(3)) == (720, 1000)
    assert main(reproduce(tmp_path, "--scale", "steps=0")) == 1
    assert "steps is 0, expected at least 1" in capsys.readouterr().err


# -- the stored results ----------------------------------------------------------------------------------------------


def test_the_stored_results_have_the_settings_of_today() -> None:
    stored = read(RESULTS / NAME / "results.json", NAME)["experiments"]
    for name, record in stored.items():
        sizes = {one: record["settings"][one] for one in system(NAME).scale if one in record["settings"]}
        changes = {one: value for one, value in sizes.items() if isinstance(value, int)}
        expected = system(NAME).experiments(**changes)[name]
        settings = {"seeds": system(NAME).seeds, **json.loads(json.dumps(expected.settings))}
        assert record["settings"] == settings, name
