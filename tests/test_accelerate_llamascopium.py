"""llamascopium's SparseAutoEncoder, accelerated: its trainer, files and hooks, and what is refused."""

from __future__ import annotations

import importlib
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import fastsae
from fastsae.swapped import Unsupported
from fastsae.swapped.base import Swapped
from fastsae.swapped.lazy import LazyActs
from tests.accelerate_case import K, inputs, library, llama, llama_loss, make

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fastsae.backends.errors.BackendWarning", "ignore::UserWarning"),
]
KINDS = ("llama-topk", "llama-batchtopk", "llama-relu", "llama-jumprelu-trained")


@pytest.fixture(autouse=True)
def _library() -> None:
    library("llamascopium")


def close(mine: Any, truth: Any) -> None:
    torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", KINDS)
def test_its_trainer(name: str, tmp_path: Path) -> None:
    """With its loss, metrics, warm-up of k and checkpoints; its Adam, whose groups separate thresholds."""
    if "nnsight" in sys.modules:
        pytest.skip("nnsight, which dictionary_learning imports, replaced torch's autocast: run this file alone")
    trainer = importlib.import_module("llamascopium.trainer")
    made = [make(name, 0), fastsae.accelerate(make(name, 0))]
    for i, module in enumerate(made):
        config = trainer.TrainerConfig(
            lr=3e-3, l1_coefficient=0.01, initial_k=8, k_warmup_steps=10, total_training_tokens=24 * 50,
            amp_dtype=torch.float32, auxk_coefficient=0.05 if "topk" in name else None, dead_threshold=60, k_aux=3,
            sparsity_loss_type="power", clip_grad_norm=1.0, log_frequency=10, n_checkpoints=1, lr_warm_up_steps=5,
            exp_result_path=str(tmp_path / str(i)), lr_scheduler_name="constantwithwarmup",
        )  # fmt: skip
        tokens = torch.arange(24, dtype=torch.int64)
        known = {"tokens": tokens, "mask": torch.ones(24, dtype=torch.float64)}
        stream = ({"in": inputs(j), "out": inputs(j).flip(0), **known} for j in range(60))
        trainer.Trainer(config).fit(module, stream)
    for p, q in zip(made[0].parameters(), made[1].parameters(), strict=True):
        close(q, p)
    assert made[0].current_k == made[1].current_k == K
    theirs = made[0]
    if name == "llama-batchtopk":  # by act x norm, which fastsae.load has for equal norms alone
        theirs.transform_to_unit_decoder_norm()
    theirs.save_pretrained(tmp_path / "trained")
    theirs.cfg.save_hyperparameters(tmp_path / "trained")
    sae = fastsae.load(tmp_path / "trained")
    with torch.no_grad():
        close(sae.train()(inputs(99)).recon, theirs(inputs(99)))  # in training: over the batch, as its BatchTopK has it


@pytest.mark.parametrize("name", [*KINDS, "llama-without-bias"])
def test_its_files(name: str, tmp_path: Path) -> None:
    theirs, mine = make(name, 0), fastsae.accelerate(make(name, 0))
    mine.save_pretrained(tmp_path)
    mine.cfg.save_hyperparameters(tmp_path)
    loaded = type(theirs).from_pretrained(str(tmp_path), dtype=torch.float64)
    assert type(loaded) is type(theirs)
    close(loaded(inputs(1)), theirs(inputs(1)))
    close(fastsae.accelerate(loaded)(inputs(1)), theirs(inputs(1)))


def test_norms_are_folded_and_set_in_place() -> None:
    theirs, mine = make("llama-topk", 0), fastsae.accelerate(make("llama-topk", 0))
    for module in (theirs, mine):
        module.cfg.norm_activation = "dataset-wise"
        module.set_dataset_average_activation_norm({"in": 2.0, "out": 5.0})
        module.standardize_parameters_of_dataset_norm()
        module.set_encoder_to_fixed_norm(0.7)
        module.set_decoder_to_fixed_norm(0.4, force_exact=True)
        module.init_encoder_with_decoder_transpose(1.3)
    assert mine.rows("W_enc").is_contiguous()
    close(mine(inputs(1)), theirs(inputs(1)))


def test_hooks_on_dense_acts_get_them_and_it_is_said_once() -> None:
    theirs, mine = make("llama-topk", 0), fastsae.accelerate(make("llama-topk", 0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for point in ("hook_hidden_pre", "hook_feature_acts"):
            outs = [m.run_with_hooks(inputs(1), fwd_hooks=[(point, lambda t, hook: t * 0.5)]) for m in (theirs, mine)]
            close(outs[1], outs[0])
    assert len([one for one in said if "dense path answers" in str(one.message)]) == 1
    outs = [
        m.run_with_hooks(inputs(1), fwd_hooks=[("hook_reconstructed", lambda t, hook: t + 1)]) for m in (theirs, mine)
    ]
    close(outs[1], outs[0])
    assert isinstance(mine.encode(inputs(1)), LazyActs)


def test_a_threshold_that_is_not_trained_goes_sparsely() -> None:
    mine = fastsae.accelerate(make("llama-jumprelu-trained", 0))
    assert not isinstance(mine.encode(inputs(1)), LazyActs)
    with torch.no_grad():
        assert isinstance(mine.encode(inputs(1)), LazyActs)


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk", "batchtopk"])
def test_float32_and_bfloat16(act_fn: str) -> None:
    """To rounding: in bfloat16 the library rounds pre-acts, their products with norms and the quotients, each."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        theirs, mine = llama({"act_fn": act_fn}, dtype), fastsae.accelerate(llama({"act_fn": act_fn}, dtype))
        with torch.no_grad():
            x = inputs(1, n=200)  # cast by the module
            a, b = theirs(x), mine(x)
            assert a.dtype == b.dtype == dtype
            close_tokens = (a.float() - b.float()).abs().amax(-1) <= tolerance
            assert close_tokens.double().mean() > (0.999 if dtype == torch.float32 else 0.9)


def test_no_tokens() -> None:
    mine = fastsae.accelerate(make("llama-topk", 0))
    assert mine(inputs(1, n=0)).shape == inputs(1, n=0).shape  # the library's own decode refuses it


def test_what_is_not_supported_is_named() -> None:
    for settings, said in (
        ({"act_fn": "topk", "use_glu_encoder": True}, "use_glu_encoder of the SparseAutoEncoder is True"),
        ({"act_fn": "layertopk"}, None),
    ):
        if said is None:  # the library's own word
            with pytest.raises(AssertionError, match="Not implemented activation function"):
                llama(settings, torch.float64)
            continue
        module = llama(settings, torch.float64)
        with pytest.raises(Unsupported, match=said):
            fastsae.accelerate(module)
        assert not isinstance(module, Swapped)
        assert llama_loss(module, inputs(1), None).isfinite()
