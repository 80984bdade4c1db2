"""The `othello` system: its engine against plain Python, its metrics by hand, and `fastsae reproduce` to the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.systems import RESULTS
from fastsae.cli.main import main
from fastsae.runs.logs import duration
from fastsae.systems import small_gpt
from fastsae.systems.othello import figures, game, language, metrics, probes, saes, system
from fastsae.systems.results import read
from tests.othello_rules import compare

# -- the game ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_games_are_those_of_plain_python() -> None:
    """`python -m tests.othello_rules 10000` compares 10,000, in minutes."""
    lengths = compare(1000, seed=0)
    assert max(lengths) == game.MOST_MOVES
    assert 58 < sum(lengths) / len(lengths) < 60


def test_first_moves_are_uniform_and_games_follow_their_seed() -> None:
    tokens = game.random_games(1000, torch.Generator().manual_seed(0))
    assert tokens.shape == (1000, 65)
    squares, n = tokens[:, 0].unique(return_counts=True)
    assert squares.tolist() == [19, 26, 37, 44]
    assert (n / 250 - 1).abs().max() < 0.25
    assert torch.equal(tokens, game.random_games(1000, torch.Generator().manual_seed(0)))
    parts = list(game.stream(200, 0, 16))
    assert [len(part) for part in parts[:-1]] == [16] * 12
    assert len(parts[-1]) == 8


def test_edges_and_the_sign_bit() -> None:
    """A line does not wrap round an edge, and the last square, the sign of an int64, is one like any other."""
    own, enemy = torch.tensor([1 << 5, 1 << 61]), torch.tensor([1 << 6 | 1 << 7 | 1 << 8, 1 << 62])
    assert game.bits(game.legal(own, enemy)).nonzero().tolist() == [[1, 63]]
    played = game.play(own[1:], enemy[1:], torch.tensor([1]) << 63)
    assert game.bits(played[1]).nonzero()[:, 1].tolist() == [61, 62, 63]
    assert played[0].tolist() == [0]


def test_labels_are_of_the_next_mover_and_stop_with_the_game() -> None:
    tokens = game.random_games(2000, torch.Generator().manual_seed(1))
    tokens = tokens[(tokens < 64).sum(1).argsort()[:3]]  # the shortest
    labels, running = game.labels(tokens)
    assert (labels.shape, labels.dtype) == ((3, 52, 64), torch.uint8)
    lengths = (tokens < 64).sum(1)
    assert running.sum(1).tolist() == [min(int(n), 56) - 4 for n in lengths]
    # The square just played is the enemy's, as the next mover sees it.
    for row, column in running.nonzero().tolist():
        assert labels[row, column, int(tokens[row, column + 4])] == game.ENEMY


# -- the model --------------------------------------------------------------------------------------------------------


def small(**changes: int) -> language.Recipe:
    return replace(language.Recipe(blocks=2, d=16, heads=2, games=96), **changes)


def test_the_model_looks_back_only_and_its_layers_are_the_stream_after_blocks() -> None:
    model, _ = language.train(small(games=16))
    tokens = game.random_games(3, torch.Generator().manual_seed(2))[:, :64]
    other = tokens.clone()
    other[:, 40:] = 7
    assert torch.allclose(model(tokens)[:, :40], model(other)[:, :40], atol=1e-6)
    layers = language.activations(model, tokens)
    assert [layer.shape for layer in layers] == [(3, 52, 16)] * 2
    with torch.no_grad():
        expected = model.blocks[0](model.embed(tokens.long()) + model.place.weight)[:, 4:56]
    assert torch.allclose(layers[0].float(), expected, atol=2e-3)


def test_training_that_was_stopped_goes_on_with_the_same_result(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(small_gpt, "SAVE_EVERY", 2)
    whole, losses = language.trained(small(), tmp_path / "a")
    steps = []

    def stop_at_the_fourth() -> None:
        steps.append(1)
        if len(steps) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        language.trained(small(), tmp_path / "b", stop_at_the_fourth)
    again, losses_again = language.trained(small(), tmp_path / "b")
    assert losses == losses_again
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert [path.suffix for path in (tmp_path / "b").iterdir()] == [".safetensors"]
    stored, _ = language.trained(small(), tmp_path / "b", lambda: pytest.fail("trained again"))
    assert torch.equal(stored.unembed.weight, whole.unembed.weight)


def test_the_legal_rate_of_a_model_that_knows_the_rules() -> None:
    class Knows(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            own, enemy = game.replay(tokens)
            allowed = torch.nn.functional.pad(game.bits(game.legal(own, enemy)), (0, 2))
            return torch.where(allowed, 0.0, -1e9)

    tokens = game.random_games(20, torch.Generator().manual_seed(3))
    rate = language.legal_rate(Knows(), tokens)  # type: ignore[arg-type]
    assert (rate["top_1"], rate["mass"]) == (1.0, 1.0)
    assert rate["positions"] == int((tokens < 64).sum()) - 20
    assert 0.2 < rate["chance"] < 0.6


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_areas_are_those_of_counting_pairs_ties_included() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 211
    scores = torch.randn(n, 70, generator=generator).relu()  # half of them tied at 0
    scores[:, 1] = torch.randint(0, 4, (n,), generator=generator).float()
    scores[:, 2] = 0.0
    positive = torch.rand(n, 5, generator=generator) < torch.tensor([0.5, 0.02, 0.9, 0.0, 1.0])
    found = metrics.auroc(scores, positive)
    assert found.shape == (70, 5)
    for column in range(3):
        above, below = scores[positive[:, column]], scores[~positive[:, column]]
        wins = (above[:, None] > below).double() + 0.5 * (above[:, None] == below).double()
        assert torch.allclose(found[:, column], wins.mean((0, 1)), atol=1e-12)
    assert found[2, :3].tolist() == [0.5] * 3
    assert bool(found[:, 3:].isnan().all())


def test_ranks_of_ties_are_their_mean() -> None:
    assert metrics.ranks(torch.tensor([[3.0, 1.0, 3.0, 0.0, 3.0]])).tolist() == [[4, 2, 4, 1, 4]]


def planted(seed: int) -> metrics.Half:
    """400 boards of random labels; latent 0 is on for an own stone on square 9, 1 mostly for an enemy's on square 2."""
    generator = torch.Generator().manual_seed(seed)
    positive = metrics.positives(torch.randint(0, 3, (400, 64), generator=generator))
    scores = 0.1 * torch.rand(400, 6, generator=generator)
    scores[:, 0] += positive[:, 64 + 9]
    scores[:, 1] += positive[:, 128 + 2] & (torch.rand(400, generator=generator) < 0.7)
    return metrics.Half(scores, positive)


def test_what_is_chosen_on_one_half_is_measured_on_the_other() -> None:
    selection, held_out = planted(0), planted(1)
    latent, selected, area = metrics.areas(selection, held_out)
    assert latent[64 + 9] == 0
    assert latent[128 + 2] == 1
    assert area[64 + 9] == selected[64 + 9] == 1
    assert torch.equal(area[130], metrics.auroc(held_out.scores[:, [1]], held_out.positive[:, [130]]).squeeze())
    assert metrics.found(area).nonzero().flatten().tolist() == [64 + 9]
    # Of noise the best of six is above a half where it was chosen, and nowhere else.
    noise = [i for i in range(192) if i not in (64 + 9, 128 + 2)]
    assert selected[noise].mean() > 0.53
    assert (area[noise].mean() - 0.5).abs() < 0.01
    assert torch.equal(metrics.own_areas(replace(held_out, scores=held_out.positive.float())), torch.ones(192).double())


def test_coverage_and_reconstruction_of_planted_latents() -> None:
    found = metrics.board_scores(planted(0), planted(1))
    coverage, reconstruction = found["coverage"], found["reconstruction"]
    assert coverage["above"] == 1
    # Two latents of precision 1, of recall 1 and .7, for 2 of 128 pairs.
    n = planted(1).positive[:, 64:].sum()
    hits = planted(1).positive[:, 73].sum() + (planted(1).scores[:, 1] > 0.5).sum()
    assert reconstruction["held_out"] == pytest.approx(float(2 * hits / (hits + n)), abs=1e-3)
    assert reconstruction["threshold"] > 0


# -- probes and SAEs --------------------------------------------------------------------------------------------------


def readable(games: int, seed: int) -> system.Boards:
    """Activations that are a linear map of the board, and noise."""
    generator = torch.Generator().manual_seed(seed)
    labels, running = game.labels(game.random_games(games, generator))
    one_hot = torch.nn.functional.one_hot(labels.long(), 3).flatten(2).float()
    mix = torch.randn(192, 48, generator=torch.Generator().manual_seed(0)) / 8
    mix[:9] *= 4
    return system.Boards((one_hot @ mix).half(), labels, running)


def test_a_probe_reads_what_is_linear() -> None:
    read_from, scored = readable(40, 1), readable(20, 2)
    probe = probes.train(probes.Recipe(batch=4, epochs=8, lr=1e-2), read_from.x, read_from.labels, read_from.running)
    half = scored.half(True, probe.scores)
    assert half.scores.shape == half.positive.shape == (int(scored.running[10:].sum()), 192)
    assert torch.allclose(half.scores.view(-1, 3, 64).sum(1), torch.ones(1))
    areas = metrics.own_areas(half)
    assert areas[:9].nanmean() > 0.9
    assert bool(areas[[27, 28, 35, 36]].isnan().all())  # the middle squares are never empty


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", ["inputs", "latents"])
def test_the_published_recipe_is_its_formula(tied: bool, norm: str) -> None:
    boards, recipe = readable(6, 3), saes.Recipe(tied=tied, norm=norm, ratio=2, batch=2, epochs=1)
    order = list(probes.batches(boards.x, boards.running, 2, 1, 5))
    assert len(order) == 3
    trained = saes.train(recipe, boards.x, boards.running, 5)
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.empty(*shape).normal_(generator=generator) for shape in ([(96, 48)] * (1 if tied else 2) + [(96,)])]
    parameters = [torch.nn.Parameter(t.mT.contiguous() if t.ndim == 2 else t) for t in drawn]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for x, _ in order:  # with E (D, M) as published
        E, D = (p / p.norm(dim=1 if norm == "inputs" else 0, keepdim=True) for p in (parameters[0], parameters[-2]))
        h = torch.relu(x @ E + parameters[-1])
        loss = (x - h @ D.mT).norm(dim=1).sum() / x.numel() + 0.077 * h.sum() / h.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.allclose(trained.sae.encoder_weight, parameters[0].detach().mT, atol=1e-5)
    assert torch.allclose(trained.sae.W_dec, parameters[-2].detach().mT, atol=1e-5)
    assert torch.allclose(trained.sae.b_enc, parameters[-1].detach(), atol=1e-5)
    assert not trained.sae.b_dec.any()
    assert torch.allclose(trained.acts(order[0][0]), torch.relu(
        order[0][0] @ torch.nn.functional.normalize(parameters[0].detach(), dim=1 if norm == "inputs" else 0)
        + parameters[-1].detach()), atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("rule", ["l1", "topk", "batch_topk", "jumprelu"])
def test_rules_of_the_engine_learn_and_are_measured_in_units_of_x(rule: str) -> None:
    boards = readable(30, 4)
    recipe = saes.Recipe(rule=rule, tied=False, ratio=2, alpha=0.3, k=16, batch=2, epochs=3, whiten=True, decay=True)
    trained = saes.train(recipe, boards.x, boards.running, 0)
    x = boards.x[boards.running].float()
    acts = trained.acts(x)
    assert acts.shape == (len(x), 96)
    found = trained.measures(x, acts)
    assert found["fvu"] < 0.7
    if rule == "topk":
        assert found["l0"] <= 16
    codes = trained.sae.encode((x - trained.whitening.mean) @ trained.whitening.forth)
    recon = trained.sae.decode(codes).detach() @ trained.whitening.back + trained.whitening.mean
    assert found["fvu"] == pytest.approx(float((x - recon).square().sum() / (x - x.mean(0)).square().sum()), abs=1e-3)


def test_whitening_makes_the_covariance_one_and_goes_back() -> None:
    x = torch.randn(3000, 5, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.tensor([1.0, 2, 3, 4, 9]))
    found = saes.Whitening.of(x + 3)
    y = (x + 3 - found.mean) @ found.forth
    assert torch.allclose(torch.cov(y.T), torch.eye(5), atol=5e-3)
    assert torch.allclose(y @ found.back + found.mean, x + 3, atol=1e-3)


@pytest.mark.parametrize("rule", ["published", "l1"])
def test_a_centred_sae_does_not_see_a_shift(rule: str) -> None:
    boards = readable(20, 4)
    recipe = saes.Recipe(rule=rule, tied=False, ratio=2, alpha=0.3, batch=4, epochs=1, centre=True)
    x, shifted = boards.x.float(), boards.x.float() + 3
    plain, moved = (saes.train(recipe, rows, boards.running, 0) for rows in (x, shifted))
    acts = plain.acts(x[boards.running])
    assert torch.allclose(moved.acts(shifted[boards.running]), acts, atol=1e-3)
    assert not torch.allclose(plain.acts(shifted[boards.running]), acts, atol=0.1)


# -- `fastsae reproduce othello` --------------------------------------------------------------------------------------

SIZES = ("--scale", "games=64", "read=8", "scored=6", "epochs=1", "blocks=1", "d=16")


def test_a_run_to_the_end_and_again(tmp_path: Path, capsys) -> None:
    arguments = ["reproduce", "othello", "--quick", "--no-progress", "--out", str(tmp_path), *SIZES]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert "13 experiments, about" in captured.err
    assert "Scale: 1 blocks, d = 16" in captured.out
    assert "180 (layer 6 of 8)" in captured.out
    for name in ("shares.png", "areas.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    stored = read(tmp_path / "results.json", "othello")["experiments"]
    assert list(stored) == list(system.experiments(True, blocks=1))
    assert len(stored["faithful-1"]["areas"]) == len(stored["candidate-1"]["selected"]) == 3
    assert len(stored["topk-tied-1"]["areas"]) == 1
    text = json.dumps(stored)
    assert main(arguments) == 0
    assert "13 of 13 experiments are already in" in capsys.readouterr().err
    assert json.dumps(read(tmp_path / "results.json", "othello")["experiments"]) == text
    # The same model in the cache, another SAE: that experiment alone is done again, with the same figures as before.
    assert main([*arguments, "--seeds", "2", "--experiments", "candidate-1"]) == 0
    again = read(tmp_path / "results.json", "othello")["experiments"]["candidate-1"]
    assert again["areas"] == stored["candidate-1"]["areas"][:2]


@pytest.mark.parametrize(
    ("scale", "message"),
    [("rooms=3", "othello has no size 'rooms'; expected blocks, d, games"), ("scored=1", "expected at least 2")],
)
def test_a_wrong_size_is_refused_in_one_line(scale: str, message: str, tmp_path: Path, capsys) -> None:
    assert main(["reproduce", "othello", "--scale", scale, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_full_grid_and_its_expected_time() -> None:
    found = system.experiments()
    assert len(found) == 1 + 6 * (1 + 3 + 8)
    assert sum(experiment.seconds(3) for experiment in found.values()) > 1800
    assert [duration(s) for s in (7.0, 300.0, 9000.0)] == ["7 seconds", "5 minutes", "2 hours"]


def test_shares_are_of_the_pairs_that_the_probe_finds() -> None:
    def record(kind: str, *found: list[int]) -> dict:
        areas = torch.full((len(found), 192), 0.6)
        for row, pairs in zip(areas, found, strict=True):
            row[pairs] = 0.95
        return {"kind": kind, "layer": 1, "areas": [system._numbers(row) for row in areas]}

    probe, sae = record("probe", [1, 2, 3, 70]), record("sae", [1, 5], [70, 3, 2, 9])
    assert figures.counts(sae) == [2, 4]
    assert figures.shares(sae, probe) == [0.25, 0.75]
    assert torch.allclose(
        system.numbers(system._numbers(torch.linspace(0, 1, 192))), torch.linspace(0, 1, 192), atol=1e-4
    )


# -- the stored results -----------------------------------------------------------------------------------------------


def test_the_stored_results_have_the_settings_of_today() -> None:
    stored = read(RESULTS / "othello" / "results.json", "othello")["experiments"]
    today = system.experiments()
    for name, record in stored.items():
        assert record["settings"] == {"seeds": 3, **json.loads(json.dumps(today[name].settings))}, name
    told = figures.result(stored)
    assert f"legal in {stored['model']['legal']['top_1']:.1%} of positions" in told
    assert f"At layer 4 a linear probe finds {figures.counts(stored['probe-4'])[0]} of 192 pairs" in told
