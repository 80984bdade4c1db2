"""The `dictionary_comparison` system: its recipes by hand, and `fastsae reproduce dictionary_comparison` to the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsae.cli.main import main
from fastsae.data.tensor import TensorSource
from fastsae.model.parameters import normalize_rows_
from fastsae.model.sae import SparseAutoencoder
from fastsae.systems.dictionary_comparison import recipes, system
from fastsae.systems.dictionary_comparison.recipes import (
    BETTER,
    BRICKEN,
    CANDIDATES,
    CUNNINGHAM,
    SWAPS,
    Recipe,
    new_sae,
)
from fastsae.systems.results import read
from fastsae.training.step import FusedTrainStep

NAME = "dictionary_comparison"
ROOT = Path(__file__).resolve().parent.parent
D, M, ROWS = 24, 40, 512


def rows(n: int = ROWS, seed: int = 0) -> Tensor:
    """Like an MLP after its ReLU: at least 0, and off centre."""
    return torch.relu(torch.randn(n, D, generator=torch.Generator().manual_seed(seed)) + 0.5)


def made(recipe: Recipe, d_sae: int = M, l0: int = 5, seed: int = 3) -> SparseAutoencoder:
    return new_sae(recipe, rows(), d_sae, l0, ROWS, seed)


# -- the recipes by hand ----------------------------------------------------------------------------------------------


def published_cunningham(raw: Tensor, b: Tensor, x: Tensor, alpha: float) -> Tensor:
    """FunctionalTiedSAE.loss of the public code, without the bias decay, which is 0 there."""
    M_hat = raw / raw.norm(dim=-1, keepdim=True)
    c = torch.clamp(x @ M_hat.T + b, min=0.0)
    return (c @ M_hat - x).pow(2).mean() + alpha * c.norm(1, dim=-1).mean()


def published_bricken(sae: SparseAutoencoder, x: Tensor, weight: float) -> Tensor:
    """Mean squared error plus the L1 norm, f = ReLU(W_e (x - b_d) + b_e)."""
    assert sae.W_enc is not None
    f = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)
    return (f @ sae.W_dec + sae.b_dec - x).pow(2).mean() + weight * f.abs().sum(-1).mean()


def test_the_losses_are_the_published_ones_times_d() -> None:
    x = rows(64, 1)
    tied, untied = made(CUNNINGHAM), made(BRICKEN)
    for sae in (tied, untied):
        with torch.no_grad():
            sae.b_enc.uniform_(-0.2, 0.2, generator=torch.Generator().manual_seed(0))
    alpha = CUNNINGHAM.own_weight(tied)
    assert alpha is not None
    expected = published_cunningham(tied.W_dec * torch.linspace(0.5, 2, M)[:, None], tied.b_enc, x, alpha)
    torch.testing.assert_close(tied(x).loss / D, expected)
    weight = BRICKEN.own_weight(untied)
    assert weight is not None
    torch.testing.assert_close(untied(x).loss / D, published_bricken(untied, x, weight))
    assert Recipe(rule="topk").own_weight(made(Recipe(rule="topk", start="engine"))) is None


def test_steps_are_those_of_the_published_code() -> None:
    """Torch's Adam on M before its rows are normalized, where these have norm 1 at first; its gradient is orthogonal.

    The penalty's weight is driven; the published code gets each step's."""
    sae = made(CUNNINGHAM)
    raw, b = sae.W_dec.detach().clone().requires_grad_(), sae.b_enc.detach().clone().requires_grad_()
    step = FusedTrainStep(sae, 1e-3, eps=1e-8 * D)
    adam = torch.optim.Adam([raw, b], lr=1e-3)
    for i in range(6):
        x = rows(64, 10 + i)
        alpha = CUNNINGHAM.own_weight(sae)
        assert alpha is not None
        step(x)
        adam.zero_grad()
        published_cunningham(raw, b, x, alpha).backward()
        assert raw.grad is not None
        along = ((raw.grad * raw).sum(-1) / (raw.grad.norm(dim=-1) * raw.norm(dim=-1)).clamp_min(1e-12)).detach()
        assert float(along.abs().max()) < 1e-4
        adam.step()
    torch.testing.assert_close(sae.W_dec.detach(), F.normalize(raw.detach(), dim=-1), atol=5e-5, rtol=0)
    torch.testing.assert_close(sae.b_enc.detach(), b.detach(), atol=5e-5, rtol=0)
    assert float((sae.W_dec.detach() - made(CUNNINGHAM).W_dec.detach()).abs().max()) > 3e-3


def test_initial_weights() -> None:
    x, xavier, kaiming = rows(), made(replace(CUNNINGHAM, tied=False)), made(BRICKEN)
    assert xavier.W_enc is not None
    assert kaiming.W_enc is not None
    for W, bound in ((xavier.W_enc, (6 / (D + M)) ** 0.5), (kaiming.W_enc, D**-0.5)):
        assert 0.97 * bound < float(W.detach().abs().max()) <= bound
        assert float(W.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
    for sae in (xavier, kaiming, made(CUNNINGHAM)):
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(M))
        assert not sae.b_enc.any()
        # The penalty starts at a tenth of the loss of reconstructing the mean.
        mse = float((x - x.mean(0)).square().sum(1).mean())
        acts = float(sae.encode(x).to_dense().sum(1).mean())
        assert float(sae.penalty_weight) * acts == pytest.approx(0.1 * mse, rel=1e-4)
    assert made(CUNNINGHAM).W_enc is None
    assert not xavier.b_dec.any()
    assert not xavier.pre_bias
    distance = (x - kaiming.b_dec).norm(dim=1).sum()
    for other in (x.mean(0), x.median(0).values, kaiming.b_dec + 0.01):
        assert distance < (x - other).norm(dim=1).sum()
    assert kaiming.pre_bias


def test_resampling_keeps_the_published_shares_of_the_run() -> None:
    million = 1_000_000 * 8192
    config = recipes.train_config(BRICKEN, 512, million, 8192, 0)
    assert (config.steps, config.resample_at) == (1_000_000, (25_000, 50_000, 75_000, 100_000))
    assert config.resample_rows == 819_200
    assert new_sae(BRICKEN, rows(), M, 5, million, 0).dead_after == 12_500 * 8192
    assert (config.lr, config.eps, config.decay) == (1e-3, 512e-8, "constant")
    assert recipes.train_config(BRICKEN, 512, 400_000, 1000, 0).resample_at == (10, 20, 30, 40)
    assert recipes.train_config(BRICKEN, 512, 3000, 1000, 0).resample_at == (1,)
    assert recipes.train_config(CUNNINGHAM, 512, 400_000, 1000, 0).resample_at == ()


def trained(recipe: Recipe, folder: Path, **changes: object) -> SparseAutoencoder:
    sae = made(recipe)
    config = replace(recipes.train_config(recipe, D, ROWS, 32, 0), **changes)  # type: ignore[arg-type]
    system._Trainer(sae, TensorSource(rows(), holdout=0), config, folder).run()
    return sae


def test_resampled_latents_have_no_bias(tmp_path: Path, monkeypatch) -> None:
    seen = []
    resample = system._Trainer._resample

    def look(trainer: system._Trainer) -> None:
        with torch.no_grad():
            trainer.sae.b_enc -= 0.1
        trainer.sae.tokens_since_fired[:7] = 10**6
        resample(trainer)
        seen.append(trainer.sae)

    monkeypatch.setattr(system._Trainer, "_resample", look)
    trained(BRICKEN, tmp_path, resample_at=(16,))
    (sae,) = seen
    # 16 is the last step: nothing moved since.
    assert not sae.b_enc[:7].any()
    assert sae.b_enc[7:].all()


def test_what_a_recipe_keeps(tmp_path: Path) -> None:
    sae = trained(CUNNINGHAM, tmp_path / "a")
    assert sae.b_dec.any()  # of the last step, and no forward pass reads it
    reference = F.relu(rows() @ sae.W_dec.T + sae.b_enc) @ sae.W_dec
    torch.testing.assert_close(sae(rows()).recon, reference)
    assert not sae.b_dec.any()
    loose = trained(replace(BRICKEN, projected=False), tmp_path / "b")
    assert float((loose.W_dec.norm(dim=1) - 1).abs().max()) > 1e-4
    loose(rows())
    torch.testing.assert_close(loose.W_dec.norm(dim=1), torch.ones(M))


def test_a_step_without_projection_is_adam_on_the_whole_gradient() -> None:
    sae = made(replace(BRICKEN, projected=False))
    x, W = rows(64, 5), sae.W_dec.detach().clone().requires_grad_()
    f = torch.relu((x - sae.b_dec.detach()) @ sae.W_enc.detach().T)  # type: ignore[union-attr]
    (f @ W + sae.b_dec.detach() - x).pow(2).mean().backward()
    torch.optim.Adam([W], lr=1e-3).step()
    FusedTrainStep(sae, 1e-3, eps=1e-8 * D)(x)
    sae(x)
    with torch.no_grad():
        normalize_rows_(W)
    torch.testing.assert_close(sae.W_dec.detach(), W.detach(), atol=1e-5, rtol=0)


def test_the_path_ends_where_it_should() -> None:
    """Every step of the path changes one thing, and it begins and ends at the two recipes."""
    steps = [recipe for _, recipe in SWAPS.values()]
    path = list(SWAPS)[: list(SWAPS).index("bricken") + 1]
    assert path == ["cunningham", "untied", "kaiming", "centred", "bricken"]
    for one, two in ((steps[i], steps[i + 1]) for i in range(len(path) - 1)):
        assert sum(getattr(one, name) != getattr(two, name) for name in Recipe.__dataclass_fields__) == 1
    for key, base in (("unprojected", BRICKEN), ("late", BRICKEN), ("resampled", CUNNINGHAM)):
        other = SWAPS[key][1]
        assert sum(getattr(base, name) != getattr(other, name) for name in Recipe.__dataclass_fields__) == 1


@pytest.mark.parametrize("key", CANDIDATES)
def test_candidates_train_at_the_l0_they_are_asked_for(key: str) -> None:
    sae = made(CANDIDATES[key])
    step = FusedTrainStep(sae, 1e-3)
    for i in range(30):
        metrics = step(rows(64, i))
    assert float(metrics["l0"]) == pytest.approx(5, rel=0.35)
    assert CANDIDATES[key].activation(7).asked_l0 in (7, None)


# -- comparing dictionaries -------------------------------------------------------------------------------------------


def test_masked_cosines_by_hand() -> None:
    small, large = made(BRICKEN, 12).eval(), made(BRICKEN, 20, seed=4).eval()
    with torch.no_grad():
        small.b_enc[0] = -100
    x = rows(90)
    a, b = (sae.encode(x).to_dense().double() for sae in (small, large))
    found, alive = system.masked_cosines(small, large, x)
    assert alive.tolist() == [False] + 11 * [True]
    for i, j in ((0, 3), (1, 2), (5, 19), (11, 0)):
        best = 0.0
        for mask in (a[:, i] > 0, b[:, j] > 0):
            p, q = a[mask, i], b[mask, j]
            best = max(best, float(p @ q / (p.norm() * q.norm()).clamp_min(1e-30)))
        assert float(found[i, j]) == pytest.approx(best, abs=1e-5)
    same, _ = system.masked_cosines(large, large, x)
    torch.testing.assert_close(same.diagonal(), torch.ones(20))


def test_mmcs_both_ways() -> None:
    A, B = torch.tensor([[2.0, 0], [0, 1]]), torch.tensor([[1.0, 1]])
    assert system.mmcs(A, B) == pytest.approx(0.5**0.5, abs=1e-4)
    assert system.mmcs(B, A) == pytest.approx(0.5**0.5, abs=1e-4)
    assert system.mmcs(torch.cat([A, B]), A) == pytest.approx((2 + 0.5**0.5) / 3, abs=1e-4)
    assert system.mmcs(A[:0], B) == system.mmcs(A, B[:0]) == 0


# -- `fastsae reproduce dictionary_comparison` ------------------------------------------------------------------------


def reproduce(out: Path, *more: str) -> list[str]:
    return ["reproduce", NAME, "--quick", "--seeds", "2", "--no-progress", "--out", str(out), *more]


SOME = [
    "model", "cunningham-m64-l20", "bricken-m64-l20", "better-m64-l20", "compare-m64-l20", "swap-untied",
    f"try-{BETTER}", "bricken-m48-l20", "split-48-64",
]  # fmt: skip


def records(out: Path) -> dict:
    stored = read(out / "results.json", NAME)["experiments"]
    return {name: {**record, "seconds": 0} for name, record in stored.items()}


def test_a_run_to_the_end_and_one_that_was_killed(tmp_path: Path, capsys, monkeypatch) -> None:
    whole, killed = tmp_path / "a" / NAME, tmp_path / "b" / NAME
    assert main(reproduce(whole, "--experiments", *SOME)) == 0
    captured = capsys.readouterr()
    assert "9 experiments, about" in captured.err
    assert "Scale: a model of one layer, d = 16, MLP 32, 30 steps on bytes; 4,096 rows in 16 steps" in captured.out
    assert "Bricken et al., A/1, as published" in captured.out
    for name in ("fvu.png", "densities.png", "swaps.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in whole.parent.iterdir()) == ["activations", NAME]
    assert not list((whole / "cache").glob("run-*"))

    # Killed in the second SAE, after 9 of its 16 steps; the newest checkpoint is after the 8th.
    done: list[int] = []
    trainer = system._Trainer

    def dies(*arguments: object, after_step: object, **more: object) -> system.Trainer:
        def after() -> None:
            done.append(1)
            if len(done) == 25:
                raise KeyboardInterrupt

        return trainer(*arguments, after_step=after, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(system, "_Trainer", dies)
    monkeypatch.setattr(recipes, "SAVE_EVERY", 4)
    assert main(reproduce(killed, "--experiments", *SOME)) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert list(records(killed)) == ["model"]
    assert len(list((killed / "cache").glob("sae-*"))) == len(list((killed / "cache").glob("run-*"))) == 1
    assert main(reproduce(killed, "--experiments", *SOME)) == 0
    assert len(done) == 25 + 8 + (2 + 2 + 2 + 1 + 1) * 16
    assert records(killed) == records(whole)

    # The same seeds again are read from the cache; the settings of another scale are another record.
    assert main(reproduce(whole, "--experiments", SOME[1], "--seeds", "1")) == 0
    one, two = records(whole)[SOME[1]], records(killed)[SOME[1]]
    assert one["fvu"] == two["fvu"][:1]
    assert main(reproduce(whole, "--experiments", *SOME)) == 0
    assert "8 of 9 experiments are already in" in capsys.readouterr().err
    assert records(whole) == records(killed)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (["rooms=3"], "dictionary_comparison has no size 'rooms'; expected model, text, steps, rows"),
        (["rows=0"], "rows is 0, expected at least 1"),
        (["d_sae=30"], "d_sae is 30 latents, expected more than the largest L0, 40"),
        (["tokens=2000", "held=1000"], "tokens is 2000, expected at most half of held, which is 1000"),
        (["text=nothing/*.txt"], "no text: 'nothing/*.txt' matches no file"),
        (["text=package:no_such_words/*.txt"], "the package 'no_such_words' is not installed"),
        (["held=4000000", "tokens=100"], "the text is too short: 4,000,000 held-out rows take"),
        (["text=SHORT"], "the text has 0 bytes to train on, a window takes 65; give more"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(scale: list[str], message: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "short.txt").write_text("too short")
    scale = [one.replace("SHORT", str(tmp_path / "short.txt")) for one in scale]
    assert main([*reproduce(tmp_path / "out", "--experiments", "model"), "--scale", "steps=2", *scale]) == 1
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert [line for line in error if "experiments, about" not in line] == error[-1:]


def test_the_grid_and_its_expected_time() -> None:
    found = system.experiments()
    assert {one.d_sae for one in found.values() if one.kind == "sae"} == {512, 4096, 16_384}
    assert len(found) == 1 + 3 * (3 + 1) + 6 + len(CANDIDATES) + 2 * 3 * 2 + 2
    assert sum(one.seconds(3) for one in found.values()) > 3600
    assert sum(one.seconds(3) for one in system.experiments(True).values()) < 60
    without = system.experiments(large=0)
    assert set(found) - set(without) == {f"{key}-m16384-l{l0}" for key in ("cunningham", "bricken") for l0 in (10, 20, 40)} | {"split-4096-16384"}  # fmt: skip  # noqa: E501


def test_the_quick_text_is_there_without_any_package() -> None:
    folder = Path(system.QUICK.text).parent
    files = sorted(path.name for path in folder.glob(Path(system.QUICK.text).name))
    assert {"argparse.py", "ast.py"} <= set(files)
    assert sum((folder / name).stat().st_size for name in ("argparse.py", "ast.py")) > 100_000


def test_a_language_model_has_other_rows_and_settings() -> None:
    bricken = system.experiments(model="package:some_model")["bricken-m4096-l20"]
    assert bricken.settings["model"] == "package:some_model"
    assert "one_layer" not in bricken.settings
    assert bricken.steps(3) == 3 * (1_000_000 // 1024)
    with pytest.raises(ValueError, match="the package 'no_model_of_ours' is not installed"):
        system.ground(replace(system.QUICK, model="package:no_model_of_ours"), system.TINY, Path("out")).held_out()
