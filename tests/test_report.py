"""The report: whole and partial runs, hostile text, no external resources, the right latents and passages."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from fastsae.data import ShardSource, ShardWriter
from fastsae.data.contexts import Context, vocabulary_bytes
from fastsae.model.files import save
from fastsae.model.rules import TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.report import ReportOptions, write_report
from fastsae.report.contexts import LatentCard, distinct, latent_cards, passage, pick_spread, spread_rows, visible
from fastsae.report.drawing import thinned
from fastsae.report.page import _subtitle, spliced_section
from fastsae.report.plots import all_plots, loop_parts
from fastsae.report.runlog import histogram, read_jsonl, read_run
from fastsae.report.timing import time_step
from fastsae.runs.checkpoint import list_checkpoints
from fastsae.runs.config import TrainConfig
from fastsae.runs.opening import describe_rows, open_run
from fastsae.runs.trainer import Trainer
from tests.html_case import HOSTILE, Page

D, M, K, WINDOW = 8, 32, 3, 16
WORDS = [HOSTILE, " <b>", '" style="', "\n", "&amp;", *(f" w{i}" for i in range(15))]


def checked(path: Path) -> Page:
    """The page, after the checks that hold for every report."""
    source = path.read_text()
    page = Page(source)
    assert not page.wrong
    assert not page.open
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "img", "iframe", "object", "base", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            # Nothing is fetched: references are to the page itself.
            if name in ("href", "src", "xlink:href", "action"):
                assert (value or "").startswith("#"), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import", source)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    references = set(re.findall(r"url\(#([^)]*)\)", source)) | {a["href"][1:] for _, a in page.tags if a.get("href")}
    assert references <= set(ids)
    for tag, attributes in page.tags:
        if tag == "svg":
            assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)
    return page


def make_harvest(folder: Path, *, text: bool = True) -> Path:
    """Each row is the embedding of its token. The first position of a window and every eleventh row are not stored."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(len(WORDS), D, generator=generator)
    with ShardWriter(folder, D, torch.float32, {}) as writer:
        if text:
            writer.write_vocabulary(vocabulary_bytes(WORDS))
        for shard in range(3):
            ids = torch.randint(0, len(WORDS), (12, WINDOW), generator=generator)
            window = torch.arange(12).repeat_interleave(WINDOW - 1)
            position = torch.arange(1, WINDOW).repeat(12)
            stored = torch.arange(len(window)) % 11 != 5
            window, position = window[stored], position[stored]
            rows = embedding[ids[window, position]]
            context = {"token_ids": ids.int(), "window": window.int(), "position": position.int()} if text else None
            writer.write_held_out(rows, context) if shard == 2 else writer.append(rows, context)
        writer.manifest.complete = True
        writer.manifest.write(folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    source = ShardSource(make_harvest(folder / "acts"), progress=False)
    config = TrainConfig(steps=12, batch_size=64, lr=1e-2, log_every=2, eval_every=6, tensorboard=False, progress=False)
    notes = {"data": describe_rows(folder / "acts", holdout=None, seed=0), "by": HOSTILE}
    sae = SparseAutoencoder(D, M, TopK(K), seed=0)
    Trainer(sae, source, config, folder / "run", notes=notes).run()
    return folder / "run"


def copy_of(run: Path, target: Path, *names: str) -> Path:
    target.mkdir(exist_ok=True)
    for name in names:
        (target / name).write_bytes((run / name).read_bytes())
    return target


def test_a_run_on_text(run):
    dense = [json.dumps({"step": s, "fvu": 0.5 / s, "time_s": s, "tokens_per_s": 9.0}) for s in (2, 4, 6)]
    (run / "dense_metrics.jsonl").write_text("\n".join(dense))
    times = {"fastsae": {"ms": 2.0}, f"dense {HOSTILE} $": {"ms": 50.0}, "slower": {"ms": 90.0}, "bad": {"ms": "x"}}
    (run / "step_times.json").write_text(json.dumps(times))
    path = write_report(run, options=ReportOptions(sample=6, passages=3))
    assert path == run / "report.html"
    page = checked(path)
    text = "".join(page.text)
    for title in ("Loss", "Fraction of variance unexplained", "FVU against the clock", "L0",
                  "Difference to the dense reference", "Dead latents", "Latent density",
                  "Learning rate", "Throughput", "Inside one update",
                  "Time of the training loop by part", "A whole step, side by side"):  # fmt: skip
        assert title in text
    assert "25.0×" in text  # relative to the faster of the two references
    assert page.count("details", "latent") == 6
    assert page.count("svg") == len([a for t, a in page.tags if t == "svg" and a.get("role") == "img"]) >= 12
    assert HOSTILE in text  # shown as text in the settings and the passages; checked() found no such tag
    assert not list(run.glob("*.partial"))


def test_the_words_of_a_run_are_those_of_its_settings(run):
    log = read_run(run)
    log.config["sae"]["activation"] = {"kind": "topk", "k": 7, "weighted": False}
    log.config["sae"]["dead_after"] = 12_345
    assert "topk (k 7)" in _subtitle(log)
    captions = {plot.title: plot.caption for plot in all_plots(log, None)}
    assert "not been active for 12,345 tokens" in captions["Dead latents"]
    del log.config["sae"]["dead_after"]
    captions = {plot.title: plot.caption for plot in all_plots(log, None)}
    assert "not been active for a set number of tokens" in captions["Dead latents"]


def test_partial_runs(run, tmp_path):
    options = ReportOptions(sample=0, time_step=False)
    started = copy_of(run, tmp_path / "started", "config.json")
    text = "".join(checked(write_report(started, options=options)).text)
    assert "metrics.jsonl is missing: no training metrics yet." in text
    assert "eval.jsonl is missing: no evaluation on held-out rows yet" in text

    going = copy_of(run, tmp_path / "going", "config.json")
    first = (run / "metrics.jsonl").read_text().splitlines()[0]
    (going / "metrics.jsonl").write_text(first + '\n{"step": 4, "lo')  # killed in the middle of a line
    text = "".join(checked(write_report(going, options=options)).text)
    assert "step 2 of 12: not finished" in text
    assert "metrics.jsonl: 1 unreadable line left out." in text

    bare = tmp_path / "bare"
    bare.mkdir()
    lines = [{"step": i, "loss": v, "fvu": None} for i, v in enumerate([1.0, math.nan, 3.0])]
    (bare / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    text = "".join(checked(write_report(bare, options=options)).text)
    assert "config.json is missing" in text
    assert "Loss" in text
    assert "Fraction of variance" not in text


def test_missing_weights_or_rows_are_reported_and_do_not_stop_the_page(run, tmp_path):
    no_weights = copy_of(run, tmp_path / "a", "config.json", "metrics.jsonl", "eval.jsonl")
    assert "holds no checkpoint that can be used" in "".join(checked(write_report(no_weights)).text)
    moved = copy_of(run, tmp_path / "b", "config.json", "metrics.jsonl", "eval.jsonl")
    config = json.loads((moved / "config.json").read_text())
    config["notes"]["data"]["path"] = "/nowhere/acts"
    (moved / "config.json").write_text(json.dumps(config))
    assert "/nowhere/acts does not exist" in "".join(checked(write_report(moved)).text)


def test_a_run_without_text_has_timings_but_no_latents(run, tmp_path):
    folder = copy_of(run, tmp_path / "c", "config.json", "metrics.jsonl", "eval.jsonl")
    config = json.loads((folder / "config.json").read_text())
    config["notes"]["data"]["path"] = str(make_harvest(tmp_path / "acts", text=False))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checkpoints").symlink_to(run / "checkpoints")
    page = checked(write_report(folder))
    assert page.count("details", "latent") == 0
    assert "Inside one update" in "".join(page.text)
    assert page.count("ul", "notes") == 0


def test_what_the_language_model_loses_is_a_table(run, tmp_path):
    folder = copy_of(run, tmp_path / "spliced", "config.json", "metrics.jsonl", "eval.jsonl")
    assert spliced_section(read_run(folder)) is None
    spliced = {
        "hooks": ["layers.1", HOSTILE], "n_predictions": 4080, "replaced_share": 0.996, "special": HOSTILE,
        "mean_of": "these",
        "ce_untouched": 3.25, "ce_spliced": 3.5, "ce_zero": 9.125, "ce_mean": 6.0, "kl_spliced": 0.125,
        "kl_zero": 5.5, "kl_mean": None, "recovered_over_zero": 0.957, "recovered_over_mean": None,
        "undefined": {"recovered_over_mean": f"mean ablation {HOSTILE}"},
    }  # fmt: skip
    histogram_of = {"edges": [-2, -1, 0], "counts": [3, 20], "never": 9}
    one = {"hook": "layers.1", "n_tokens": 4000, "fvu": 0.1, "fvu_per_token": None, "l0": 3, "dead_share": 0.28125,
           "norm_ratio": 0.96875, "cosine": 0.9, "density_histogram": histogram_of}  # fmt: skip
    hooks = [one, {"hook": HOSTILE, "density_histogram": histogram_of | {"counts": [0, 0], "never": 32}}]
    evaluation = {"step": 12, "fvu": 0.1, "spliced": spliced, "hooks": hooks}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    section = spliced_section(read_run(folder))
    assert section.hooks == [
        ("layers.1", "4,000", "0.1000", "–", "3.0", "28.12%", "0.9688", "0.9000"),
        (HOSTILE, "–", "–", "–", "–", "–", "–", "–"),
    ]
    assert section.undefined == [f"mean ablation {HOSTILE}"]
    assert section.rows == [
        ("untouched", "3.2500", "", ""),
        ("spliced", "3.5000", "0.1250", ""),
        ("zero ablation", "9.1250", "5.5000", "0.9570"),
        ("mean ablation", "6.0000", "–", "–"),
    ]
    text = "".join(checked(write_report(folder, options=ReportOptions(sample=0, time_step=False))).text)
    assert "In the language model" in text
    assert "99.60% of the tokens" in text
    assert HOSTILE in text
    assert f"–: mean ablation {HOSTILE}." in text
    assert "Latent density at layers.1" in text
    assert "32 latents on the held-out rows; 32 of them were active on none." in text
    assert "Not measured yet" not in text
    for odd in ({}, {"hooks": HOSTILE, "ce_zero": [1], "special": [HOSTILE], "undefined": [HOSTILE]}):
        wrong = {"step": 12, "spliced": odd, "hooks": [HOSTILE, {}, {"density_histogram": HOSTILE}]}
        (folder / "evaluation.json").write_text(json.dumps(wrong))
        checked(write_report(folder, options=ReportOptions(sample=0, time_step=False)))
    (folder / "evaluation.json").write_text(json.dumps({"step": 12, "spliced": HOSTILE}))
    assert spliced_section(read_run(folder)) is None


def test_evaluation_by_hand_takes_the_place_of_an_older_one(run, tmp_path):
    folder = copy_of(run, tmp_path / "d", "config.json", "metrics.jsonl", "eval.jsonl")
    (folder / "evaluation.json").write_text(json.dumps({"step": 12, "fvu": 0.123}))
    assert [e["step"] for e in read_run(folder).evals] == [6, 12]
    assert read_run(folder).last("fvu", of="evals") == 0.123
    (folder / "evaluation.json").write_text(json.dumps({"step": 1, "fvu": 9}))
    assert read_run(folder).last("fvu", of="evals") != 9
    (folder / "evaluation.json").write_text(json.dumps({"step": 12, "fvu": 0.123}))
    (folder / "evaluation_spliced.json").write_text(json.dumps({"step": 12, "fvu": 0.5, "spliced": {}}))
    assert [(e["step"], e["fvu"]) for e in read_run(folder).evals][1:] == [(12, 0.123), (12, 0.5)]
    (folder / "evaluation.json").write_text("{")
    assert "evaluation.json is unreadable and left out." in read_run(folder).notes


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no run folder at"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="holds a list, expected a JSON object"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="passages is 0, expected at least 1"):
        ReportOptions(passages=0)


def test_an_unusable_output_path_is_refused_first(run, tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}, which is a folder"):
        write_report(run, out=tmp_path)
    with pytest.raises(ValueError, match=r"nowhere/page\.html, which lies in a folder that does not exist"):
        write_report(run, out=tmp_path / "nowhere" / "page.html")


def test_cards_against_the_dense_code(run):
    source = ShardSource(run.parent / "acts", progress=False)
    sae = SparseAutoencoder(D, M, TopK(K), seed=3)
    x = source.rows(range(source.n_tokens + len(source.held_out_ids())))
    with torch.no_grad():
        dense = sae.encode(x).to_dense()
    cards, scanned = latent_cards(sae, source, sample=8, passages=2, width=5, seed=1)
    assert scanned == len(x)
    assert [c.density for c in cards] == sorted((c.density for c in cards), reverse=True)
    for card in cards:
        column = dense[:, card.index]
        assert card.density == pytest.approx(float((column > 0).double().mean()))
        assert card.max_act == pytest.approx(float(column.max()), rel=1e-5)
        assert card.passages[0].peak == pytest.approx(card.max_act, rel=1e-5)
        assert len(card.passages) <= 2
        for shown in card.passages:
            acts = [span.act for span in shown.spans]
            assert shown.peak in acts
            shaded = [span for span in shown.spans if span.share > 0]
            assert all(span.share == pytest.approx(max(0.01, span.act / card.max_act)) for span in shaded)
            assert max(act or 0 for act in acts) >= shown.peak
    assert any(span.act is None for card in cards for shown in card.passages for span in shown.spans)
    again, _ = latent_cards(sae, source, sample=8, passages=2, width=5, seed=1)
    assert again == cards


def test_named_latents_come_in_their_order_and_one_that_never_fired_with_that_said(run, monkeypatch, tmp_path):
    source = ShardSource(run.parent / "acts", progress=False)
    opened = open_run(run)
    with torch.no_grad():
        opened.sae.b_enc[7] = -1e3
    drawn = {card.index: card for card in latent_cards(opened.sae, source, sample=M, passages=2)[0]}
    assert 7 not in drawn
    other, _, _, one, *_ = drawn
    cards, scanned = latent_cards(opened.sae, source, latents=[one, 7, other, one], passages=2)
    assert [card.index for card in cards] == [one, 7, other]
    assert (cards[0], cards[2]) == (drawn[one], drawn[other])
    assert cards[1] == LatentCard(7, 0.0, 0.0, [], [])
    assert latent_cards(opened.sae, source, latents=[7]) == ([cards[1]], scanned)

    monkeypatch.setattr("fastsae.report.page.open_run", lambda folder: opened)
    options = ReportOptions(latents=(7, one), time_step=False)
    page = checked(write_report(run, out=tmp_path / "page.html", options=options))
    text = "".join(page.text)
    assert [a for t, a in page.tags if t == "details" and "latent" in (a.get("class") or "")] == [
        {"class": "latent", "open": None}, {"class": "latent", "open": None}
    ]  # fmt: skip
    assert text.index("Latent 7") < text.index("never fired on the rows searched") < text.index(f"Latent {one}")
    assert text.count("never fired") == 1
    assert "The requested latents. For each" in text
    assert "drawn at random" not in text


def test_latents_that_are_not_there_or_have_no_text(run, tmp_path):
    with pytest.raises(ValueError, match=r"^no latent 32: the autoencoder has latents 0 to 31$"):
        write_report(run, options=ReportOptions(latents=(3, M)))
    with pytest.raises(ValueError, match="no latent -1"):
        write_report(run, options=ReportOptions(latents=(-1,)))
    source = ShardSource(run.parent / "acts", progress=False)
    with pytest.raises(ValueError, match="no latent 32: the autoencoder has latents 0 to 31"):
        latent_cards(open_run(run).sae, source, latents=[M])
    with pytest.raises(ValueError, match="latents names those to show and sample = 3 draws some; give one of them"):
        ReportOptions(latents=(1,), sample=3)
    with pytest.raises(ValueError, match=r"latents is 6, expected indices; sample=6 draws as many"):
        ReportOptions(latents=6)
    folder = copy_of(run, tmp_path / "textless", "config.json", "metrics.jsonl", "eval.jsonl")
    config = json.loads((folder / "config.json").read_text())
    config["notes"]["data"]["path"] = str(make_harvest(tmp_path / "acts", text=False))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "checkpoints").symlink_to(run / "checkpoints")
    text = "".join(checked(write_report(folder, options=ReportOptions(latents=(3,), time_step=False))).text)
    assert "The requested latents are not shown: the run's data is not stored with its text." in text


def test_passages_outside_the_scanned_rows_are_shaded_too(run):
    source = ShardSource(run.parent / "acts", progress=False)
    sae = SparseAutoencoder(D, M, TopK(K), seed=3)
    cards, scanned = latent_cards(sae, source, sample=4, passages=1, width=10, max_rows=7)
    assert scanned == 7
    assert any(span.share > 0 for card in cards for span in card.passages[0].spans)


def test_latents_are_spread_over_densities_and_seeded():
    density = torch.zeros(1000, dtype=torch.float64)
    fired = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:600]
    density[fired] = torch.rand(600, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 1e-6
    picks = pick_spread(density, 12, seed=0)
    assert picks == pick_spread(density, 12, seed=0) != pick_spread(density, 12, seed=1)
    order = torch.argsort(density, descending=True)
    ranks = [int((order == p).nonzero()) for p in picks]
    assert [rank // 50 for rank in ranks] == list(range(12))  # one in each stratum of 50, densest first
    assert set(pick_spread(density, 5000)) == set(fired.tolist())
    assert pick_spread(torch.zeros(5), 3) == []


@pytest.mark.parametrize(("n", "most"), [(0, 10), (10, 10), (11, 10), (100_000, 9000), (5000, 4096), (100_000, 4097)])
def test_rows_are_spread_within_bounds(n, most):
    runs = spread_rows(n, most)
    ids = [i for run in runs for i in run]
    assert ids == sorted(set(ids))
    assert len(ids) <= most
    assert all(0 <= i < n for i in ids)
    assert len(ids) == n or len(ids) > most - 4096


def test_a_passage_joins_what_has_no_act_and_keeps_what_has():
    context = Context(
        row=5, center=2, tokens=[" a", "b\n", " c", "\x00d", "e"], token_ids=[0] * 5, rows=[-1, 4, 5, 6, 7]
    )
    made = passage(context, [None, 0.0, 4.0, 0.0, 0.0], strongest=8.0)
    assert [(s.text, s.act, s.share) for s in made.spans] == [
        ("a", None, 0.0), ("b⏎", 0.0, 0.0), (" c", 4.0, 0.5), ("·de", 0.0, 0.0)
    ]  # fmt: skip
    assert made.peak == 4.0
    assert visible("tab\tcr\r\nzero\u200bwidth") == "tab⇥cr⏎zero·width"


def test_passages_neither_overlap_nor_repeat():
    def context(row: int, ids: list[int], rows: list[int]) -> Context:
        return Context(row=row, center=1, tokens=["x"] * len(ids), token_ids=ids, rows=rows)

    first = context(5, [1, 2, 3], [4, 5, 6])
    inside = context(6, [1, 7, 3], [5, 6, 7])
    again = context(50, [1, 2, 3], [49, 50, 51])
    other = context(80, [3, 2, 1], [79, 80, 81])
    silent = context(90, [9, 9, 9], [89, 90, 91])
    assert distinct([first, inside, again, other, silent], [4.0, 3.0, 2.0, 1.0, 0.0], most=9) == [first, other]
    assert distinct([first, other], [4.0, 3.0], most=1) == [first]


def test_timing_leaves_the_weights_and_adds_up():
    sae = SparseAutoencoder(D, M, TopK(K), seed=0)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    timing = time_step(sae, torch.randn(50, D, generator=torch.Generator().manual_seed(0)))
    for name, p in sae.named_parameters():  # the decoder's rows are normalized again, to the last bit or two
        torch.testing.assert_close(p, before[name], rtol=1e-6, atol=1e-7)
    assert {"encode topk", "decode error", "update latents", "other"} <= set(timing.parts)
    assert all(ms >= 0 for ms in timing.parts.values())
    assert timing.tokens_per_s == pytest.approx(50e3 / sum(timing.parts.values()))


def test_long_curves_are_thinned_by_means():
    x, y = thinned(range(1000), [float(i % 2) for i in range(1000)], most=100)
    assert len(x) == len(y) == 100
    assert set(y) == {0.5}
    assert thinned([1, 2], [3, 4]) == ([1, 2], [3, 4])


def test_repeated_steps_keep_what_was_written_last(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 2, "a": 1}\n[3]\n\n{"step": 1, "a": 5}\n{"step": 2, "a": 7}\n')
    notes: list[str] = []
    assert read_jsonl(path, notes) == [{"step": 1, "a": 5}, {"step": 2, "a": 7}]
    assert notes == ["m.jsonl: 1 unreadable line left out."]


def test_a_saved_module_or_a_checkpoint_is_no_run_and_stays_as_it_is(run, tmp_path):
    saved = save(SparseAutoencoder(D, M, TopK(K)), tmp_path / "sae")
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    for folder, message in (
        (saved, r"sae holds an SAE \(sae\.safetensors\), not a run: .*; `fastsae eval` measures a saved SAE"),
        (checkpoint, f"step_00000012 holds an SAE .*; give the run's folder, {run}$"),
    ):
        before = sorted(path.name for path in folder.iterdir())
        with pytest.raises(ValueError, match=message):
            write_report(folder)
        assert sorted(path.name for path in folder.iterdir()) == before
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"config\.json was not written by `fastsae train`"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_what_other_programs_wrote_is_text_or_left_out(run, tmp_path):
    """Known names with values of other types, unknown names, numbers too large for a float, JSON that never ends."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = json.loads((run / "config.json").read_text())
    config["train"] |= {"steps": HOSTILE, "tokens": [1], "batch_size": "many"}
    config["sae"] |= {"d_sae": HOSTILE, "activation": HOSTILE}
    config |= {"source": 3, "machine": [HOSTILE], HOSTILE: {HOSTILE: HOSTILE}}
    config["notes"]["data"] |= {"holdout": HOSTILE, "seed": [1]}
    (folder / "config.json").write_text(json.dumps(config))
    huge = "9" * 400
    (folder / "metrics.jsonl").write_text("\n".join([
        json.dumps({"step": 2, "loss": HOSTILE, "fvu": [0.5], "l0": 3, "ms_step": 1.5, f"ms_{HOSTILE}": 7.0}),
        f'{{"step": {huge}, "loss": {huge}, "tokens_per_s": 1e999}}', "[" * 100_000, "9" * 5000,
    ]))  # fmt: skip
    held = {"edges": [0, HOSTILE], "counts": [1], "never": 0}
    evaluation = {"step": HOSTILE, "fvu": 0.25, "n_tokens": HOSTILE, "dead_share": 0.5, "density_histogram": held}
    (folder / "eval.jsonl").write_text(json.dumps(evaluation))
    (folder / "evaluation.json").write_text(json.dumps({"step": [2], "fvu": 0.125}))
    page = checked(write_report(folder))
    text = "".join(page.text)
    assert "metrics.jsonl: 2 unreadable lines left out." in text
    assert "holdout = " in text  # the page says that the record of the data is unusable
    assert "0.2500" in text
    assert "Time of the training loop by part" in text
    assert loop_parts(read_run(folder)).keys() == {"step"}
    assert "Latent density" not in text


@pytest.mark.parametrize("held", [
    None, [], {}, {"edges": [0, 1], "counts": [1, 2], "never": 0}, {"edges": [1, 0], "counts": [1], "never": 0},
    {"edges": [0, 1], "counts": [True], "never": 0}, {"edges": [0, 1], "counts": [1]},
])  # fmt: skip
def test_a_malformed_histogram_is_left_out(held):
    assert histogram({"density_histogram": held}) is None
    assert histogram({"density_histogram": {"edges": [0, 1], "counts": [3], "never": 2}}) == ([0, 1], [3], 2)


@pytest.mark.parametrize("weights", [[0.5, 0.05, 0.01], [0.5, 0.05, -0.02], []])
def test_a_driven_weight_is_drawn_on_either_side_of_zero(weights, tmp_path):
    lines = [json.dumps({"step": i + 1, "loss": 1.0, "penalty_weight": weight}) for i, weight in enumerate(weights)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines or ['{"step": 1, "loss": 1.0}']))
    drawn = {plot.title: plot for plot in all_plots(read_run(tmp_path), None)}
    assert ("Penalty weight" in drawn) == bool(weights)
    if weights:
        assert f"from 0.5 to {weights[-1]} over 3 points" in drawn["Penalty weight"].svg
