"""bench.synth: samples, digests, what the metrics are given, both trainers' states, table and plot.

What needs SAELens (`make bench` installs it) is skipped without it. The metrics' definitions are written out here, held
against hand-computed cases without it, and against its own functions with it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from bench import peers
from bench.family.store import Store, read
from bench.synth import draw, run, trainers, world
from bench.synth.__main__ import main
from bench.synth.world import Digest, Replay, Settings, quick
from fastsae.codes import SparseCodes
from fastsae.systems.interpretable_directions.metrics import assignment, cosines

pytestmark = pytest.mark.usefixtures("one_thread")
needs_sae_lens = pytest.mark.skipif(importlib.util.find_spec("sae_lens") is None, reason="sae_lens is not installed")
SMALL = quick(Settings())


# -- the metrics -------------------------------------------------------------------------------------------------------

FEATURES = torch.eye(4)
TRUE = torch.tensor([[1.0, 0, 0, 0], [1, 2, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0]])
"""True acts of four samples; the samples themselves, since features are unit vectors and there is no bias."""


def known_sae() -> fastsae.SparseAutoencoder:
    """Latent 0 is feature 0, in half its size; 1 is feature 1, and fires on feature 2 too; 2 lies between those two."""
    sae = fastsae.SparseAutoencoder(4, 3, fastsae.JumpReLU(1.0, threshold=0.5, bandwidth=0.1), decoder_norm="free")
    with torch.no_grad():
        sae.encoder_weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0], [0, 0.5, 0, 0]]))
        sae.W_dec.copy_(torch.tensor([[0.5, 0, 0, 0], [0, 0.6, 0, 0.0], [0, 0.8, 0.6, 0]]))
    return sae


def defined(sae: Any, features: Tensor, true: Tensor, x: Tensor) -> dict[str, float]:
    """The published definitions, written out. features (F, D), true (N, F), x (N, D).

    A latent stands for the feature of the largest absolute cosine. Source: docs/synth_sae_bench.md of SAELens.
    """
    sae.eval()
    fires = sae.encode(x) > 0
    recon = sae.decode(sae.encode(x))
    alike = cosines(sae.W_dec, features).abs()
    best = alike.argmax(-1).tolist()
    f1 = []
    for latent, feature in enumerate(best):
        both = sum(bool(fires[n, latent]) and bool(true[n, feature] > 0) for n in range(len(x)))
        either = int(fires[:, latent].sum()) + int((true[:, feature] > 0).sum())
        f1.append(2 * both / either if either else 0.0)
    matched = assignment(-alike.double().numpy()).tolist()
    return {
        "f1_score": sum(f1) / len(f1),
        "mcc": float(alike[range(len(matched)), matched].mean()),
        "uniqueness": len(set(best)) / len(best),
        "explained_variance": float(1 - (x - recon).square().sum() / (x - x.mean(0)).square().sum()),
        "sae_l0": float(fires.sum(-1).float().mean()),
    }


BY_HAND = {
    # Latent 0 fires on samples 0 and 1, as feature 0 does: F1 1. Latent 1 on 1, 2 and 3, feature 1 on 1 and 2:
    # precision 2/3, recall 1. Latent 2 on 1 and 2, as feature 1: 1.
    "f1_score": (1 + 0.8 + 1) / 3,
    # 0 and 1 are features; 1 is taken, and the best that is left for (0, .8, .6, 0) is feature 2, at .6.
    "mcc": (1 + 1 + 0.6) / 3,
    "uniqueness": 2 / 3,
    # Acts: (1, 0, 0), (1, 2, 1), (0, 2, 1), (0, 3, 0). Errors: (.5), (.5, 0, -.6), (0, 0, -.6), (0, -1.8, 3), their
    # squares .25, .61, .36, 12.24. The samples' mean is (.5, 1, .75, 0): spread 4·.25 + 4 + 3·.5625 + 5.0625.
    "explained_variance": 1 - 13.46 / 11.75,
    "sae_l0": (1 + 3 + 2 + 1) / 4,
}


def test_metrics_of_a_known_sae_are_those_computed_by_hand() -> None:
    found = defined(trainers.Judged(known_sae()), FEATURES, TRUE, TRUE)
    assert found == pytest.approx(BY_HAND, abs=1e-6)


@needs_sae_lens
def test_the_library_measures_what_is_defined() -> None:
    from sae_lens import synthetic

    features = synthetic.FeatureDictionary(4, 4, bias=False, initializer=None)
    features.feature_vectors.data = FEATURES.clone()
    known = object.__new__(world.World)  # without the generator
    known.settings = Settings(eval_samples=4, batch=3)
    known.model = SimpleNamespace(feature_dict=features)
    found = known.scores(
        trainers.Judged(known_sae()), Replay([SparseCodes.from_dense(t) for t in (TRUE[:3], TRUE[3:])])
    )
    assert {name: found[name] for name in BY_HAND} == pytest.approx(BY_HAND, abs=1e-6)
    assert found["dead_latents"] == 0
    assert found["true_l0"] == 5 / 4


def test_batch_topk_is_judged_by_batch() -> None:
    """As SAELens's is: by its threshold every latent here would be off."""
    sae = fastsae.SparseAutoencoder(8, 16, fastsae.BatchTopK(2), seed=0)
    sae.get_buffer("threshold").fill_(1e6)
    judged = trainers.Judged(sae)
    judged.eval()
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    acts = judged.encode(x)
    assert acts.shape == (32, 16)
    assert int((acts > 0).sum()) == 64
    torch.testing.assert_close(judged.decode(acts), acts @ sae.W_dec + sae.b_dec)


def test_held_out_acts_come_again() -> None:
    drawn = [SparseCodes.from_dense(t) for t in (TRUE[:3], TRUE[3:])]
    replay = Replay(drawn)
    for _ in range(2):
        assert torch.equal(torch.cat([replay.sample(3), replay.sample(1)]), TRUE)
        replay.rewind()
    with pytest.raises(ValueError, match="2 samples asked for, 3 were drawn"):
        replay.sample(2)


# -- the samples -------------------------------------------------------------------------------------------------------


def digest(*batches: Tensor) -> int:
    made = Digest()
    for x in batches:
        made.add(x)
    return int(made)


def test_a_digest_sees_every_bit_and_the_order() -> None:
    one, two = 0x3F800000, 0x40000000  # 1.0 and 2.0 as float32
    assert digest(torch.tensor([[1.0, 2.0]])) == one + 3 * two
    assert digest(torch.tensor([[1.0]]), torch.tensor([[2.0]])) == one * Digest.FACTOR + two
    x, y = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    assert digest(x, y) == digest(x.clone(), y.clone())
    changed = x.clone()
    changed[3, 2] = torch.nextafter(changed[3, 2], torch.tensor(9.0))
    assert len({digest(x, y), digest(y, x), digest(x.flip(0), y), digest(changed, y), digest(x)}) == 5
    begun = Digest(digest(x))
    begun.add(y)
    assert int(begun) == digest(x, y)


def test_different_samples_are_not_timed() -> None:
    class Nothing:
        def step(self, x: Tensor) -> None:
            pass

    lanes = {"TopK": {name: run.Lane(Nothing()) for name in ("fastsae", "sae-lens")}}  # type: ignore[arg-type]
    x = torch.ones(2, 3)
    for lane in lanes["TopK"].values():
        lane.step(x)
    assert run.check_digests(lanes) == digest(x)
    lanes["TopK"]["fastsae"].step(x)
    with pytest.raises(RuntimeError, match="not given the same samples, nothing is timed: TopK fastsae"):
        run.check_digests(lanes)


def test_orthogonalized_features_minimize_the_sum_over_all_pairs() -> None:
    start = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.nn.functional.normalize(start, dim=-1).requires_grad_()
    optimizer = torch.optim.Adam([rows], lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        loss = sum((rows[i] @ rows[j] - float(i == j)) ** 2 * (8 if i == j else 1) for i in range(8) for j in range(8))
        loss.backward()
        optimizer.step()
    found = world.orthogonalized(start, 10, 1e-2)
    torch.testing.assert_close(found, torch.nn.functional.normalize(rows.detach(), dim=-1), rtol=0, atol=1e-9)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(8, dtype=torch.float64))


@needs_sae_lens
def test_features_are_those_that_the_library_makes() -> None:
    from sae_lens.synthetic import orthogonalize_embeddings

    start = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    theirs = orthogonalize_embeddings(start, num_steps=100, lr=3e-4, chunk_size=128)
    torch.testing.assert_close(world.orthogonalized(start, 100, 3e-4), theirs, rtol=0, atol=2e-4)
    assert (theirs - torch.nn.functional.normalize(start, dim=-1)).abs().max() > 5e-3  # they moved


# -- the trainers ------------------------------------------------------------------------------------------------------


def start() -> SimpleNamespace:
    rows = 0.1 * torch.nn.functional.normalize(
        torch.randn(SMALL.M, SMALL.D, generator=torch.Generator().manual_seed(1))
    )
    return SimpleNamespace(W_enc=rows.T.clone(), W_dec=rows)


def test_prefixes_are_the_published_ones() -> None:
    assert trainers.prefixes(4096) == [128, 512, 2048, 4096]
    rule = trainers.rule_of("Matryoshka", Settings())
    assert isinstance(rule, fastsae.Matryoshka)
    assert rule.groups == (128, 384, 1536, 2048)


@pytest.mark.parametrize("rule", trainers.RULES)
def test_ours_goes_on_from_its_state(rule: str) -> None:
    batches = torch.randn(6, SMALL.batch, SMALL.D, generator=torch.Generator().manual_seed(0))
    whole, first, second = (trainers.Ours(rule, SMALL, start()) for _ in range(3))
    assert torch.equal(whole.sae.encoder_weight, start().W_dec)
    for x in batches:
        whole.step(x)
    for x in batches[:3]:
        first.step(x)
    second.load(first.state())
    for x in batches[3:]:
        second.step(x)
    for name, value in whole.sae.state_dict().items():
        assert torch.equal(value, second.sae.state_dict()[name]), name


@needs_sae_lens
def test_a_run_goes_on_and_is_the_same(tmp_path: Path) -> None:
    generator = world.World(SMALL)
    whole = run.Pass(trainers.RULES, SMALL, generator, tmp_path / "whole")
    whole.train(progress=False)
    part = run.Pass(trainers.RULES, SMALL, generator, tmp_path / "part")
    for _ in range(7):
        part._step()
    part.save()
    rest = run.Pass(("JumpReLU", "BatchTopK"), SMALL, generator, tmp_path / "part")
    assert rest.restore()
    assert rest.steps == 7
    rest.train(progress=False)
    assert run.check_digests(rest.lanes) == run.check_digests(whole.lanes)
    for rule, pair in rest.lanes.items():
        for name, lane in pair.items():
            assert len(lane.seconds) == SMALL.steps
            expected = whole.lanes[rule][name].trainer.sae.state_dict()
            for key, value in lane.trainer.sae.state_dict().items():
                assert torch.equal(value, expected[key]), (rule, name, key)
    other = run.Pass(("TopK",), quick(Settings(seed=1)), generator, tmp_path / "part")
    assert not other.restore()


@needs_sae_lens
def test_the_script_runs_keeps_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--quick", "--threads", "1", "--out", str(tmp_path)]
    assert main([*command, "--only", "TopK"]) == 0
    first = read(tmp_path / "synth.json")["entries"]
    assert main([*command, "--only", "TopK", "BatchTopK"]) == 0
    entries = read(tmp_path / "synth.json")["entries"]
    assert list(entries) == [f"{rule}-{SMALL.samples}" for rule in ("TopK", "BatchTopK")]
    assert entries[f"TopK-{SMALL.samples}"] == first[f"TopK-{SMALL.samples}"]
    ours, theirs = (entries[f"BatchTopK-{SMALL.samples}"]["trainers"][name] for name in ("fastsae", "sae-lens"))
    assert ours["sae_l0"] == theirs["sae_l0"] == SMALL.k
    assert ours["true_l0"] == theirs["true_l0"]
    assert entries[f"BatchTopK-{SMALL.samples}"]["digest"] == first[f"TopK-{SMALL.samples}"]["digest"]
    assert {path.name for path in tmp_path.iterdir()} == {"synth.json", "synth.md", "synth.svg", "synth.png"}
    assert "BatchTopK, sae-lens: F1" in capsys.readouterr().out


# -- table, plot and command line --------------------------------------------------------------------------------------


def entry(rule: str, samples: int = 200_000, l0: float = 25.0) -> dict[str, Any]:
    times = {"ms": 50.0, "p20": 40.0, "p80": 60.0, "runs": 9}
    found = {
        "f1_score": 0.1234, "mcc": 0.25, "uniqueness": 0.5, "explained_variance": 0.375, "sae_l0": l0,
        "dead_latents": 1234, "seconds": 10.0, "cpu_seconds": 5.0, "step": times, "cpu_step": times,
    }  # fmt: skip
    slower = {**found, "sae_l0": 25.0, "seconds": 35.0, "step": {**times, "ms": 175.0}}
    return {
        "settings": run.kept(rule, Settings(samples=samples)), "trainers": {"fastsae": found, "sae-lens": slower},
        "device": "a processor", "threads": 1, "versions": {"sae-lens": "6.54.12", "torch": "2.13.0"}, "others": 0.25,
        "generator_seconds": 321.0, "digest": "0123", "commit": "abc", "date": "2026-11-26T00:00:00",
    }  # fmt: skip


def test_the_table_puts_published_figures_beside_and_says_how_short_a_run_is() -> None:
    entries = {"a": entry("JumpReLU", l0=40.0), "b": entry("TopK"), "c": entry("BatchTopK", samples=10**6)}
    text = draw.text(entries)
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows if row[1] == "**fastsae**"] == ["BatchTopK", "TopK", "JumpReLU"]
    assert "| BatchTopK | *published, 200M samples* | *0.732* | *0.757* | *0.984* | *0.792* | *25* |" in text
    assert (
        "| TopK | sae-lens 6.54.12 | 0.123 | 0.250 | 0.500 | 0.375 | 25.0 | 1,234 | 175 | 40.0 – 60.0 | 3.5× |" in text
    )
    assert "40.0 †" in text
    assert text.count(" † |") == 1
    assert "**199,680 samples are 0.10% of the 200M behind the published rows" in text
    assert "Other programs took 25% of all cores meanwhile." in text


def test_drawing_needs_results_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--draw", "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    store = Store(tmp_path, "synth")
    for rule in trainers.RULES:
        made = entry(rule)
        store.put(rule, made.pop("settings"), made)
    assert main(["--draw", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"synth.json", "synth.md", "synth.svg", "synth.png"}
    assert "synth.svg" in capsys.readouterr().out


def test_without_sae_lens_the_script_says_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers.SAELens, "module", "a_module_that_is_not_there")
    assert main(["--quick", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "sae-lens does not import" in said
    assert "`make bench` installs the peers into .venv-peers" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "name another folder: --out"),
        (["--samples", "0"], "got 0 samples"),
        (["--device", "cuda"], "torch sees no CUDA device"),
        (["--only", "ReLU"], "invalid choice: 'ReLU'"),
    ],
)
def test_bad_options_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_a_run_shorter_than_its_warm_up_is_refused(tmp_path: Path) -> None:
    settings = Settings(samples=5000)
    with pytest.raises(ValueError, match="5000 samples are 4 batches of 1024, expected more than the 5 that warm up"):
        run.run(Store(tmp_path, "synth"), settings, "a processor")
    assert asdict(settings)["samples"] == 5000
