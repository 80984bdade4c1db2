"""Checkpoints made by the libraries themselves, where these are installed: loaded and written ones agree in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from tests.interop_case import D, K, M, drawer, inputs

pytestmark = pytest.mark.filterwarnings("ignore")
NEAR: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def stir(module: torch.nn.Module) -> Any:
    """Puts every floating parameter in general position, in float64."""
    module, draw = module.double(), drawer(5)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.add_(draw(*p.shape) if "threshold" not in name else draw(*p.shape).abs())
    return module.eval()


def agrees(sae: fastsae.SparseAutoencoder, A: Tensor, recon: Tensor) -> None:
    codes = sae.encode(inputs())
    assert bool((A != 0).any())
    torch.testing.assert_close(codes.to_dense(), A.detach(), **NEAR)
    torch.testing.assert_close(sae.decode(codes, like=inputs()), recon.detach(), **NEAR)


# -- SAELens ----------------------------------------------------------------------------------------------------------

LENS = {
    "StandardSAE": {},
    "StandardSAE of inputs as they are": {"apply_b_dec_to_input": False},
    "TopKSAE": {"k": K},
    "TopKSAE by norm": {"k": K, "rescale_acts_by_decoder_norm": True},
    "AbsTopKSAE by norm": {"k": K, "rescale_acts_by_decoder_norm": True},
    "TopKSAE of standardized inputs": {"k": K, "normalize_activations": "layer_norm"},
    "JumpReLUSAE": {},
    "GatedSAE": {},
    "Transcoder": {"d_out": 5},
    "SkipTranscoder": {"d_out": 5},
    "JumpReLUTranscoder": {"d_out": 5},
    "JumpReLUSkipTranscoder": {"d_out": 5},
}  # fmt: skip


def lens_sae(name: str) -> Any:
    sae_lens = pytest.importorskip("sae_lens")
    kind = name.split()[0]
    settings = {"d_in": D, "d_sae": M, "dtype": "float64", **LENS[name]}
    if "Transcoder" in kind:
        settings["apply_b_dec_to_input"] = False
    return stir(getattr(sae_lens, kind)(getattr(sae_lens, f"{kind}Config")(**settings)))


@pytest.mark.parametrize("name", LENS)
def test_saelens_both_ways(name: str, tmp_path: Path) -> None:
    theirs = lens_sae(name)
    theirs.save_model(tmp_path / "theirs")
    A, recon = theirs.encode(inputs()), theirs(inputs())
    sae = fastsae.load(tmp_path / "theirs")
    agrees(sae, A, recon)
    fastsae.save(sae, tmp_path / "ours", format="saelens")
    back = type(theirs).load_from_disk(tmp_path / "ours")
    torch.testing.assert_close(back.encode(inputs()), A, **NEAR)
    torch.testing.assert_close(back(inputs()), recon, **NEAR)


@pytest.mark.parametrize("kind", ["BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE"])
@pytest.mark.parametrize("by_norm", [False, True])
def test_saelens_training_checkpoints(kind: str, by_norm: bool, tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    more = {"matryoshka_widths": [6, 12, M]} if "Matryoshka" in kind else {}
    config = getattr(sae_lens, f"{kind}Config")(
        d_in=D, d_sae=M, dtype="float64", k=K, rescale_acts_by_decoder_norm=by_norm, **more
    )
    theirs = stir(getattr(sae_lens, kind)(config))
    theirs.topk_threshold = torch.tensor(0.75, dtype=torch.float64)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    training, inference = fastsae.load(tmp_path / "training"), fastsae.load(tmp_path / "inference")
    at_inference = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    A, recon = at_inference.encode(inputs()), at_inference(inputs())
    agrees(inference, A, recon)
    agrees(training, A, recon)
    A = theirs.encode(inputs())
    torch.testing.assert_close(training.train().encode(inputs()).to_dense(), A.detach(), **NEAR)
    recon = theirs.decode(A).detach()
    torch.testing.assert_close(training.decode(training.encode(inputs())), recon, **NEAR)


@pytest.mark.parametrize("by_norm", [False, True])
def test_saelens_checkpoints_of_scaled_inputs(by_norm: bool, tmp_path: Path) -> None:
    """What is folded here is what SAELens folds at the end of training."""
    sae_lens = pytest.importorskip("sae_lens")
    config = sae_lens.BatchTopKTrainingSAEConfig(
        d_in=D, d_sae=M, dtype="float64", k=K, rescale_acts_by_decoder_norm=by_norm,
        normalize_activations="expected_average_only_in",
    )  # fmt: skip
    theirs = stir(sae_lens.BatchTopKTrainingSAE(config))
    theirs.topk_threshold = torch.tensor(0.25, dtype=torch.float64)
    theirs.save_model(tmp_path / "training")
    (tmp_path / "training" / "activation_scaler.json").write_text('{"scaling_factor": 0.25, "has_whitening": false}')
    theirs.fold_activation_norm_scaling_factor(0.25)
    theirs.save_inference_model(tmp_path / "inference")
    at_inference = sae_lens.SAE.load_from_disk(tmp_path / "inference")
    A, recon = at_inference.encode(inputs()), at_inference(inputs())
    agrees(fastsae.load(tmp_path / "inference"), A, recon)
    agrees(fastsae.load(tmp_path / "training"), A, recon)


def test_saelens_jumprelu_of_training(tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    theirs = stir(sae_lens.JumpReLUTrainingSAE(sae_lens.JumpReLUTrainingSAEConfig(d_in=D, d_sae=M, dtype="float64")))
    theirs.save_model(tmp_path)
    agrees(fastsae.load(tmp_path), theirs.encode(inputs()), theirs(inputs()))


# -- sparsify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize(("transcode", "skip"), [(False, False), (True, False), (True, True)])
def test_sparsify_both_ways(activation: str, transcode: bool, skip: bool, tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    from sparsify.utils import eager_decode

    config = sparsify.SparseCoderConfig(
        activation=activation, expansion_factor=3, k=K, transcode=transcode, skip_connection=skip
    )
    theirs = stir(sparsify.SparseCoder(D, config))
    theirs.save_to_disk(tmp_path / "theirs")

    def forward(coder: Any) -> tuple[Tensor, Tensor]:
        acts, indices, _ = coder.encode(inputs())
        A = torch.zeros(len(inputs()), M, dtype=torch.float64).scatter(-1, indices, acts)
        # Its forward casts under autocast, and where there is Triton its decoder sums in float32.
        recon = eager_decode(indices, acts, coder.W_dec.mT) + coder.b_dec
        return A.detach(), (recon + inputs() @ coder.W_skip.mT if skip else recon).detach()

    A, recon = forward(theirs)
    sae = fastsae.load(tmp_path / "theirs")
    agrees(sae, A, recon)
    fastsae.save(sae, tmp_path / "ours", format="sparsify")
    again = forward(sparsify.SparseCoder.load_from_disk(tmp_path / "ours"))
    torch.testing.assert_close(again, (A, recon), **NEAR)


# -- dictionary_learning ----------------------------------------------------------------------------------------------


def dictionaries() -> dict[str, tuple[str, tuple[Any, ...]]]:
    trainers = "dictionary_learning.trainers"
    return {
        "AutoEncoder": ("dictionary_learning.dictionary", ()),
        "AutoEncoderNew": ("dictionary_learning.dictionary", ()),
        "GatedAutoEncoder": ("dictionary_learning.dictionary", ()),
        "JumpReluAutoEncoder": ("dictionary_learning.dictionary", ()),
        "AutoEncoderTopK": (f"{trainers}.top_k", (K,)),
        "BatchTopKSAE": (f"{trainers}.batch_top_k", (K,)),
        "MatryoshkaBatchTopKSAE": (f"{trainers}.matryoshka_batch_top_k", (K, [4, 8, 12])),
    }


@pytest.mark.parametrize("name", dictionaries())
def test_dictionary_learning_both_ways(name: str, tmp_path: Path) -> None:
    pytest.importorskip("dictionary_learning")
    import importlib

    from dictionary_learning.utils import load_dictionary

    module, arguments = dictionaries()[name]
    theirs = getattr(importlib.import_module(module), name)(D, M, *arguments).double()
    draw = drawer(6)
    with torch.no_grad():
        for key, p in theirs.named_parameters():
            noise = draw(*p.shape)
            p.add_(noise if key != "threshold" else noise.abs())
    trainer: dict[str, Any] = {"dict_class": name, "activation_dim": D, "dict_size": M}
    if arguments:
        theirs.threshold.fill_(0.375)
        trainer |= {"k": K}
    (tmp_path / "theirs").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "ae.pt")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"trainer": trainer}))
    sae = fastsae.load(tmp_path / "theirs")
    A, recon = theirs.encode(inputs()), theirs(inputs())
    if name == "AutoEncoder":  # its loader rescales them
        A = A * theirs.decoder.weight.norm(dim=0)
    agrees(sae, A, recon)
    fastsae.save(sae, tmp_path / "ours", format="dictionary_learning")
    back, _ = load_dictionary(str(tmp_path / "ours"), "cpu")  # in float32
    torch.testing.assert_close(back.double()(inputs()).detach(), recon.detach(), rtol=1e-4, atol=1e-4)
    state = torch.load(tmp_path / "ours" / "ae.pt")
    assert state.keys() == theirs.state_dict().keys()
    theirs.load_state_dict(state)
    torch.testing.assert_close(theirs.encode(inputs()).detach(), A.detach(), **NEAR)


# -- circuit-tracer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule", [fastsae.ReLU(0.1), fastsae.JumpReLU(0.1, threshold=0.6), fastsae.BatchTopK(K)], ids=str
)
@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_reads_what_is_written(rule: Any, skip: bool, tmp_path: Path) -> None:
    """By its loader of single layers; and without a skip connection by that of Gemma Scope's archives."""
    pytest.importorskip("circuit_tracer")
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_transcoder, load_relu_transcoder

    wide: dict[str, Any] = {"dtype": torch.float64, "rule_dtype": torch.float64}
    sae = fastsae.SparseAutoencoder(D, M, rule, pre_bias=False, skip=skip, decoder_norm="free", seed=0, **wide)
    stir(sae)
    if isinstance(rule, fastsae.BatchTopK):
        sae.calibrate_threshold_(inputs())
    A, recon = sae.encode(inputs()).to_dense(), sae(inputs()).recon
    agrees(fastsae.load(fastsae.save(sae, tmp_path / "tracer", format="circuit_tracer")), A, recon)
    path = str(tmp_path / "tracer" / "transcoder.safetensors")
    for lazy in (False, True):
        how = {"device": torch.device("cpu"), "dtype": torch.float64, "lazy_encoder": lazy, "lazy_decoder": lazy}
        theirs = load_relu_transcoder(path, 0, **how)
        with torch.no_grad():
            torch.testing.assert_close(theirs.encode(inputs()), A, **NEAR)
            torch.testing.assert_close(theirs(inputs()), recon, **NEAR)
    if not skip:
        agrees(fastsae.load(fastsae.save(sae, tmp_path / "scope", format="gemma_scope")), A, recon)
        theirs = load_gemma_scope_transcoder(
            str(tmp_path / "scope" / "params.npz"), 0, device=torch.device("cpu"), dtype=torch.float64
        )
        with torch.no_grad():
            torch.testing.assert_close(theirs.encode(inputs()), A, **NEAR)
            torch.testing.assert_close(theirs(inputs()), recon, **NEAR)
