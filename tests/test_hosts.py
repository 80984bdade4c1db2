"""An SAE as SAELens and SAEBench know one: the same acts and reconstructions, in their tools. Needs these libraries."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsae
from fastsae import hosts
from fastsae.hosts import dense
from tests.family_case import RULES, D, M, family_sae, tokens

EXACT = {"rtol": 1e-12, "atol": 1e-12}


@pytest.mark.parametrize("name", RULES)
def test_dense_acts_and_what_is_decoded_from_them(name: str) -> None:
    sae = family_sae(RULES[name]).eval()
    x = tokens(seed=3).view(37, 1, D)
    out = sae(x)
    acts = dense.encode_dense(sae, x)
    torch.testing.assert_close(acts, out.codes.to_dense(), **EXACT)
    torch.testing.assert_close(dense.decode_dense(sae, acts), out.recon, **EXACT)
    torch.testing.assert_close(dense.acts_of_pre_acts(sae, dense.pre_acts_dense(sae, x)), acts, rtol=1e-10, atol=1e-12)
    if not isinstance(sae.activation, fastsae.BatchTopK) and "matryoshka" not in name:  # which choose over the batch
        torch.testing.assert_close(dense.encode_dense(sae, x[4, 0]), acts[4, 0], **EXACT)
    torch.testing.assert_close(dense.decode_dense(sae, acts[4, 0]), out.recon[4, 0], **EXACT)


def test_the_sae_keeps_its_mode_and_its_parameters_are_shared() -> None:
    sae = family_sae(RULES["batch_topk"]).train()
    view = dense.at_inference(sae)
    assert (sae.training, view.training) == (True, False)
    with torch.no_grad():
        sae.W_dec.mul_(2)
    assert torch.equal(view.W_dec, sae.W_dec)
    assert view.W_dec is sae.W_dec
    torch.testing.assert_close(dense.pre_acts_dense(sae, tokens()[2]), dense.pre_acts_dense(sae, tokens())[2], **EXACT)
    pre = dense.pre_acts_dense(view, tokens()[2])
    assert dense.acts_of_pre_acts(view, pre).shape == (M,)


def test_what_other_libraries_cannot_decode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the SAE is or has skip=True; SAELens decodes acts alone"):
        hosts.usable(family_sae(RULES["topk"], skip=True), "SAELens")
    with pytest.raises(ValueError, match="is or has a transcoder"):
        hosts.usable(fastsae.SparseAutoencoder(8, 16, fastsae.TopK(2), d_out=4), "SAELens")
    for mode in ("layer_norm", "standardize"):
        with pytest.raises(ValueError, match=f"normalize='{mode}'"):
            hosts.usable(fastsae.SparseAutoencoder(8, 16, fastsae.TopK(2), normalize=mode), "SAEBench")


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = family_sae(RULES["topk"])
    monkeypatch.setitem(sys.modules, "sae_lens.registry", None)
    monkeypatch.setitem(sys.modules, "sae_bench.custom_saes.custom_sae_config", None)
    with pytest.raises(ImportError, match=r"SAELens is not installed.*pip install sae-lens"):
        fastsae.as_saelens(sae)
    with pytest.raises(ImportError, match=r"SAEBench is not installed.*pip install sae-bench"):
        fastsae.as_saebench(sae, model_name="gpt2", hook_layer=1)


# -- SAELens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_saelens_runs_every_rule(name: str) -> None:
    pytest.importorskip("sae_lens")
    sae = family_sae(RULES[name]).eval()
    theirs = fastsae.as_saelens(sae, model_name="gpt2", hook_name="blocks.1.hook_resid_post")
    x = tokens(seed=3).view(37, 1, D)
    out = sae(x)
    torch.testing.assert_close(theirs.encode(x), out.codes.to_dense(), **EXACT)
    torch.testing.assert_close(theirs(x), out.recon, **EXACT)
    acts, cache = theirs.run_with_cache(x)
    torch.testing.assert_close(cache["hook_sae_acts_post"], out.codes.to_dense(), rtol=1e-10, atol=1e-12)
    assert cache["hook_sae_acts_pre"].shape == (37, 1, M)
    torch.testing.assert_close(acts, out.recon, rtol=1e-10, atol=1e-12)
    assert theirs.W_dec is sae.W_dec
    assert theirs.W_enc.shape == (D, M)


def test_saelens_saves_and_loads_it(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae = family_sae(fastsae.JumpReLU(0.1, threshold=0.3, bandwidth=0.2), dtype=torch.float32)
    theirs = fastsae.as_saelens(sae, model_name="gpt2", hook_name="blocks.1.hook_resid_post")
    theirs.save_model(tmp_path)
    x = tokens().float()
    for cls in (sae_lens.SAE, fastsae.register_saelens()):
        again = cls.load_from_disk(tmp_path)
        assert type(again) is fastsae.register_saelens()
        assert torch.equal(again(x), theirs(x))
        assert again.cfg.metadata.hook_name == "blocks.1.hook_resid_post"
    assert again.to(torch.float64).encode(x.double()).dtype == torch.float64


@pytest.mark.parametrize("name", RULES)
def test_norms_are_folded_into_acts(name: str, tmp_path: Path) -> None:
    """By SAELens' own call: the same latents and reconstructions, rows of norm 1, and acts times the norms."""
    sae_lens = pytest.importorskip("sae_lens")
    sae = family_sae(RULES[name]).eval()
    norms = sae.W_dec.detach().norm(dim=1)
    assert float((norms - 1).abs().max()) > 0.05
    theirs = fastsae.as_saelens(sae, model_name="gpt2", hook_name="blocks.1.hook_resid_post")
    assert theirs.W_dec is sae.W_dec
    theirs.save_model(tmp_path / "plain")
    x, before = tokens(seed=3).view(37, 1, D), sae.W_dec.detach().clone()
    out = sae(x)
    theirs.fold_W_dec_norm()
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "plain", fold_W_dec_norm=True, dtype="float64")
    theirs.save_model(tmp_path / "folded")
    again = sae_lens.SAE.load_from_disk(tmp_path / "folded", dtype="float64")
    again.fold_W_dec_norm()  # once more changes nothing
    for one in (theirs, loaded, again):
        torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones_like(norms), **EXACT)
        torch.testing.assert_close(one.encode(x), out.codes.to_dense() * norms, **EXACT)
        torch.testing.assert_close(one(x), out.recon, **EXACT)
        recon, cache = one.run_with_cache(x)
        torch.testing.assert_close(cache["hook_sae_acts_post"], out.codes.to_dense() * norms, rtol=1e-10, atol=1e-12)
        by_hand = (x - sae.b_dec if sae.pre_bias else x) @ one.W_enc + one.b_enc
        if sae.norm.mode == "none":
            torch.testing.assert_close(cache["hook_sae_acts_pre"], by_hand, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(recon, out.recon, rtol=1e-10, atol=1e-12)
    assert torch.equal(sae.W_dec, before)


def test_a_decoder_row_of_0_is_folded_too() -> None:
    pytest.importorskip("sae_lens")
    sae = family_sae(RULES["relu"]).eval()
    with torch.no_grad():
        sae.W_dec[4] = 0
    theirs = fastsae.as_saelens(sae, model_name="gpt2", hook_name="blocks.1.hook_resid_post")
    theirs.fold_W_dec_norm()
    torch.testing.assert_close(theirs(tokens()), sae(tokens()).recon, **EXACT)


# -- acts of either sign -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"tied": True}, {"skip": True}, {"normalize": "constant", "decoder_norm": "unit"}], ids=str
)
def test_signs_are_split(settings: dict[str, Any], tmp_path: Path) -> None:
    """Twice the latents, none negative, and the same reconstruction; it trains, and is saved as any other."""
    sae = family_sae(RULES["abs_topk"], **settings).eval()
    x = tokens(seed=3)
    acts, recon = sae.encode(x).to_dense(), sae(x).recon
    split = fastsae.split_signs(sae)
    found = split.encode(x).to_dense()
    assert bool((acts < 0).any())
    assert not split.training
    torch.testing.assert_close(found, torch.cat([acts.clamp(min=0), (-acts).clamp(min=0)], -1), **EXACT)
    torch.testing.assert_close(split(x).recon, recon, **EXACT)
    assert not {p.data_ptr() for p in split.parameters()} & {p.data_ptr() for p in sae.parameters()}
    again = fastsae.load(fastsae.save(split, tmp_path))
    torch.testing.assert_close(again(x).recon, recon, **EXACT)
    with pytest.raises(ValueError, match=r"split_signs got an SAE with TopK\(k=5.*expected AbsTopK"):
        fastsae.split_signs(split)


def test_acts_of_either_sign_are_warned_of() -> None:
    """At the call, and where SAEDashboard and Neuronpedia's exporter begin, which read an SAE from disk."""
    pytest.importorskip("sae_lens")
    sae = family_sae(RULES["abs_topk"]).eval()
    said = r"positive acts only\. fastsae\.split_signs\(sae\) gives the same SAE"
    with pytest.warns(UserWarning, match=said):
        theirs = fastsae.as_saelens(sae, model_name="gpt2", hook_name="blocks.1.hook_resid_post")
    with pytest.warns(UserWarning, match=said):
        theirs.fold_W_dec_norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastsae.as_saelens(fastsae.split_signs(sae), model_name="gpt2", hook_name="x").fold_W_dec_norm()


def test_saelens_steers_a_model_with_it() -> None:
    """In a HookedSAETransformer: spliced, cached, and one latent set by a hook, against the same by hand."""
    sae_lens = pytest.importorskip("sae_lens")
    from transformer_lens import HookedTransformerConfig

    torch.manual_seed(0)
    model = sae_lens.HookedSAETransformer(HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=8, d_head=6, d_vocab=11, act_fn="relu", seed=0, device="cpu"
    ))  # fmt: skip
    sae = family_sae(fastsae.TopK(5), dtype=torch.float32).eval()
    hook = "blocks.0.hook_resid_post"
    theirs = fastsae.as_saelens(sae, model_name="toy", hook_name=hook)
    ids = torch.arange(8)[None]
    untouched, plain = model.run_with_cache(ids)
    with model.saes(saes=[theirs]):
        logits, cache = model.run_with_cache(ids)
    expected = model.run_with_hooks(ids, fwd_hooks=[(hook, lambda x, hook: sae(x).recon)])
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(cache[f"{hook}.hook_sae_acts_post"], sae.encode(plain[hook]).to_dense())
    assert not torch.allclose(logits, untouched)

    def held(acts: torch.Tensor, hook: object) -> torch.Tensor:
        acts = acts.clone()
        acts[..., 7] = 3.0
        return acts

    steered = model.run_with_hooks_with_saes(ids, saes=[theirs], fwd_hooks=[(f"{hook}.hook_sae_acts_post", held)])

    def by_hand(x: torch.Tensor, hook: object) -> torch.Tensor:
        acts = sae.encode(x).to_dense()
        acts[..., 7] = 3.0
        return acts @ sae.W_dec + sae.b_dec

    torch.testing.assert_close(steered, model.run_with_hooks(ids, fwd_hooks=[(hook, by_hand)]))


@pytest.mark.parametrize("norm", ["unit", "free"])
@pytest.mark.parametrize("name", ["topk", "gated", "jumprelu", "relu", "abs_topk"])
def test_a_dashboard_and_neuronpedias_exporter_show_it(name: str, norm: str, tmp_path: Path) -> None:
    """Loaded from disk by SAELens; the acts that end up in Neuronpedia's JSON are those of the SAE, times its norms."""
    sae_lens = pytest.importorskip("sae_lens")
    pytest.importorskip("sae_dashboard")
    from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
    from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
    from sae_dashboard.sae_vis_data import SaeVisConfig
    from sae_dashboard.sae_vis_runner import FeatureDataGeneratorFactory, SaeVisRunner
    from transformer_lens import HookedTransformerConfig

    hook, latents, vocabulary = "blocks.0.hook_resid_post", [3, 5, 7], 11
    torch.manual_seed(0)
    model = sae_lens.HookedSAETransformer(HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=24, d_head=6, d_vocab=vocabulary, act_fn="relu", seed=0, device="cpu"
    ))  # fmt: skip
    ids = torch.randint(0, vocabulary, (40, 24))
    sae = family_sae(RULES[name], decoder_norm=norm, dtype=torch.float32).eval()
    if name == "abs_topk":
        sae = fastsae.split_signs(sae)
    fastsae.as_saelens(sae, model_name="toy", hook_name=hook).save_model(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
        acts = sae.encode(cache[hook]).to_dense() * sae.W_dec.norm(dim=1)
        if name == "abs_topk":  # the one of positive acts and the one of negative acts that fire most
            often = (acts > 0).flatten(0, -2).sum(0)
            latents = [int(often[:M].argmax()), M + int(often[M:].argmax())]
        expected = acts[..., latents]

    cfg = SaeVisConfig(hook_point=hook, features=latents, minibatch_size_tokens=16, minibatch_size_features=2)
    theirs.fold_W_dec_norm()  # as its runners begin
    acts = FeatureDataGeneratorFactory.create(cfg, model, theirs, ids).get_feature_data(latents)[0]
    torch.testing.assert_close(acts, expected)

    shown = SaeVisRunner(cfg).run(encoder=theirs, model=model, tokens=ids)
    about = NeuronpediaRunnerConfig(
        sae_set="mine", sae_path="", outputs_dir="", n_prompts_total=40, n_tokens_in_prompt=24, model_id="toy", layer=0
    )
    names = {i: f"token {i}" for i in range(vocabulary)}
    features = json.loads(NeuronpediaConverter.convert_to_np_json(model, shown, about, names))["features"]
    assert [one["feature_index"] for one in features] == latents
    for one, its in zip(features, expected.unbind(-1), strict=True):
        assert one["frac_nonzero"] == pytest.approx(float((its > 0).float().mean()), abs=1e-4)
        shown_values = torch.tensor([value for example in one["activations"] for value in example["values"]])
        assert shown_values.max() > 0  # rounded to three digits, and without each text's first and last tokens
        assert float((shown_values[:, None] - its.flatten()).abs().amin(1).max()) <= 1e-3
    assert all(torch.equal(theirs.state_dict()[key], value) for key, value in before.items())


def test_registering_twice_is_fine() -> None:
    pytest.importorskip("sae_lens")
    assert fastsae.register_saelens() is fastsae.register_saelens()


# -- SAEBench ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["unit", "free"])
def test_saebench_takes_it(norm: str) -> None:
    """Acts are those of rows of norm 1, which SAEBench asks for."""
    pytest.importorskip("sae_bench")
    from sae_bench.sae_bench_utils.activation_collection import get_sae_meaned_activations
    from sae_bench.sae_bench_utils.general_utils import check_decoder_norms

    sae = family_sae(fastsae.TopK(5), decoder_norm=norm, dtype=torch.float32)
    theirs = fastsae.as_saebench(sae, model_name="gpt2", hook_layer=3)
    x = tokens(24).float().view(4, 6, D)
    norms = sae.W_dec.detach().norm(dim=1)
    assert check_decoder_norms(theirs.W_dec.data)
    got = get_sae_meaned_activations({"a": x}, theirs, sae_batch_size=3)["a"]
    torch.testing.assert_close(got, (sae.encode(x).to_dense() * norms).mean(1))
    torch.testing.assert_close(theirs(x), sae(x).recon)
    acts = theirs.encode(x)
    torch.testing.assert_close(acts @ theirs.W_dec + theirs.b_dec, sae(x).recon)
    pre = (x - theirs.b_dec) @ theirs.W_enc + theirs.b_enc
    torch.testing.assert_close(acts, torch.where(acts > 0, pre, 0.0), rtol=1e-5, atol=1e-6)
    assert theirs.cfg.hook_name == "blocks.3.hook_resid_post"
    assert theirs.cfg.to_dict()["d_sae"] == M
    moved = theirs.to(dtype=torch.bfloat16)
    assert (moved.dtype, moved.cfg.dtype, moved.W_dec.dtype) == (torch.bfloat16, "bfloat16", torch.bfloat16)
    assert check_decoder_norms(moved.W_dec.data)


def test_importing_fastsae_imports_neither() -> None:
    code = "import sys, fastsae; fastsae.hosts; assert not {'sae_lens', 'sae_bench'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code.replace("fastsae.hosts", "import fastsae.hosts")], check=True)
