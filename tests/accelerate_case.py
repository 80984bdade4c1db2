"""Modules of SAELens, sparsify and dictionary_learning with random settings, and one loss of each: theirs."""

from __future__ import annotations

import contextlib
import importlib
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

D, M, K, N = 12, 48, 4, 24


def library(name: str) -> Any:
    """The library, or a skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pytest.importorskip(name, exc_type=ImportError)
        if name == "sparsify":  # its Triton decoder is for GPUs
            importlib.import_module("sparsify.sparse_coder").decoder_impl = importlib.import_module(
                "sparsify.utils"
            ).eager_decode
    return found


@dataclass(frozen=True)
class Case:
    """make(settings, dtype): a module; loss(module, x, dead): what its trainer minimizes; settings: all that differ."""

    make: Callable[[dict[str, Any], torch.dtype], Any]
    loss: Callable[[Any, Tensor, Tensor | None], Tensor]
    settings: tuple[dict[str, Any], ...] = ({},)
    aux: bool = True
    trains: bool = True


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@torch.no_grad()
def shaken(module: nn.Module) -> nn.Module:
    """The module with no parameter at a special value."""
    generator = torch.Generator().manual_seed(7)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if name == "threshold":
            p.add_(noise.abs() * 0.05)
        else:
            p.add_(noise * (0.1 if p.ndim == 1 else 0.05))
    return module


# -- SAELens ----------------------------------------------------------------------------------------------------------


def lens(kind: str) -> Callable[[dict[str, Any], torch.dtype], Any]:
    def make(settings: dict[str, Any], dtype: torch.dtype) -> Any:
        module = library("sae_lens")
        torch.manual_seed(0)
        given = {"d_in": D, "d_sae": M, "dtype": str(dtype).removeprefix("torch."), **settings}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(module, kind)(getattr(module, f"{kind}Config")(**given))
        if isinstance(getattr(made, "threshold", None), nn.Parameter):  # in training it is float32 whatever the dtype
            made.threshold.data = made.threshold.data.to(dtype)
        return shaken(made)

    return make


def lens_step(module: Any, x: Tensor, dead: Tensor | None) -> Any:
    from sae_lens.saes.sae import TrainStepInput

    coefficients = dict.fromkeys(("l0", "l1"), 0.02)
    return module.training_forward_pass(TrainStepInput(x, coefficients, dead, 0, False))


def lens_loss(module: Any, x: Tensor, dead: Tensor | None) -> Tensor:
    return lens_step(module, x, dead).loss


def call_loss(module: Any, x: Tensor, dead: Tensor | None) -> Tensor:
    """The squared error of what the module gives for each token, to the token before it."""
    return (module(x) - x.detach().roll(1, 0)).square().sum(-1).mean()


# -- sparsify ---------------------------------------------------------------------------------------------------------


def coder(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    sparsify = library("sparsify")
    torch.manual_seed(0)
    return shaken(sparsify.SparseCoder(D, sparsify.SparseCoderConfig(num_latents=M, k=K, **settings), dtype=dtype))


def coder_loss(module: Any, x: Tensor, dead: Tensor | None) -> Tensor:
    out = module(x, x.flip(0) if module.cfg.transcode else None, dead_mask=dead)
    return out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8


# -- dictionary_learning ----------------------------------------------------------------------------------------------


def dictionary(kind: str, *more: Any) -> Callable[[dict[str, Any], torch.dtype], Any]:
    def make(settings: dict[str, Any], dtype: torch.dtype) -> Any:
        library("dictionary_learning")
        base = "dictionary_learning"
        names = ("dictionary", "trainers.top_k", "trainers.batch_top_k", "trainers.matryoshka_batch_top_k")
        places = [f"{base}.{one}" for one in names]
        found = next(getattr(m, kind) for m in map(importlib.import_module, places) if hasattr(m, kind))
        torch.manual_seed(0)
        with default_dtype(dtype):
            module = shaken(found(D, M, *more))
        for name, value in settings.items():
            module.get_buffer(name).fill_(value)
        return module

    return make


def dictionary_topk_loss(module: Any, x: Tensor, dead: Tensor | None) -> Tensor:
    f, top, indices, post = module.encode(x, return_topk=True)
    assert top.shape == indices.shape == (len(x), K)
    loss = (module.decode(f) - x).square().sum(-1).mean()
    if dead is not None:  # a dense loss on what encode gives
        loss = loss + 0.01 * torch.where(dead, post, 0).square().sum() + 0.01 * f.abs().sum()
    return loss


def with_encode(**flags: Any) -> Callable[[Any, Tensor, Tensor | None], Tensor]:
    def loss(module: Any, x: Tensor, dead: Tensor | None) -> Tensor:
        f, active, post = module.encode(x, return_active=True, **flags)
        assert active.shape == (M,)
        found = (module.decode(f) - x).square().sum(-1).mean()
        if dead is not None:
            found = found + 0.01 * torch.where(dead, post, 0).square().sum() + 0.01 * f.abs().sum()
        return found

    return loss


def dictionary_gate_loss(module: Any, x: Tensor, dead: Tensor | None) -> Tensor:
    f, gate = module.encode(x, return_gate=True)
    return (module.decode(f) - x).square().sum(-1).mean() + 0.01 * gate.sum() + 0.01 * gate.square().sum()


def above(
    make: Callable[[dict[str, Any], torch.dtype], Any], by: float = 1.0
) -> Callable[[dict[str, Any], torch.dtype], Any]:
    """The module with biases so low, by this, that few latents are active."""

    def made(settings: dict[str, Any], dtype: torch.dtype) -> Any:
        module = make(settings, dtype)
        with torch.no_grad():
            named = dict(module.named_parameters())
            next(named[one] for one in ("b_gate", "gate_bias", "b_enc", "encoder.bias") if one in named).sub_(by)
        return module

    return made


TRANSCODER = {"d_out": D, "apply_b_dec_to_input": False}


# -- all --------------------------------------------------------------------------------------------------------------

CASES: dict[str, Case] = {
    "lens-topk-training": Case(
        lens("TopKTrainingSAE"), lens_loss,
        ({"k": K}, {"k": K, "rescale_acts_by_decoder_norm": False}, {"k": K, "apply_b_dec_to_input": False},
         {"k": K, "aux_loss_coefficient": 0.3, "use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}),
    ),
    "lens-topk": Case(
        lens("TopKSAE"), call_loss,
        ({"k": K}, {"k": K, "rescale_acts_by_decoder_norm": True}, {"k": K, "normalize_activations": "layer_norm"},
         {"k": K, "normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": False}),
        aux=False,
    ),
    "sparsify": Case(
        coder, coder_loss,
        ({}, {"transcode": True, "skip_connection": True}, {"multi_topk": True}, {"normalize_decoder": False}),
    ),
    "lens-batchtopk-training": Case(
        lens("BatchTopKTrainingSAE"), lens_loss,
        ({"k": float(K)}, {"k": 3.3}, {"k": 2.7, "rescale_acts_by_decoder_norm": False}),
    ),
    "lens-matryoshka-training": Case(
        lens("MatryoshkaBatchTopKTrainingSAE"), lens_loss,
        ({"k": float(K), "matryoshka_widths": [9, 20, M]},
         {"k": 3.4, "matryoshka_widths": [12, M], "use_matryoshka_aux_loss": True},
         {"k": 3.0, "matryoshka_widths": [5, 6, M], "use_matryoshka_aux_loss": True,
          "rescale_acts_by_decoder_norm": False}),
    ),
    "lens-standard-training": Case(
        above(lens("StandardTrainingSAE"), 0.3), lens_loss,
        ({}, {"apply_b_dec_to_input": False}, {"lp_norm": 0.7}),
    ),
    "lens-jumprelu-training": Case(
        above(lens("JumpReLUTrainingSAE"), 0.15), lens_loss,
        ({"jumprelu_bandwidth": 0.2, "jumprelu_init_threshold": 0.1, "pre_act_loss_coefficient": 0.05},
         {"jumprelu_bandwidth": 0.2, "jumprelu_init_threshold": 0.1, "jumprelu_ste_to_input": True,
          "jumprelu_sparsity_loss_mode": "quadratic", "target_l0": 3.5, "apply_b_dec_to_input": False},
         {"jumprelu_bandwidth": 0.15, "jumprelu_init_threshold": 0.2, "jumprelu_ste_to_input": True,
          "jumprelu_sparsity_loss_mode": "tanh", "pre_act_loss_coefficient": 0.05, "apply_b_dec_to_input": False}),
    ),
    "lens-gated-training": Case(
        above(lens("GatedTrainingSAE"), 0.3), lens_loss, ({}, {"apply_b_dec_to_input": False})
    ),
    "lens-dense-training": Case(
        lens("JumpReLUTrainingSAE"), lens_loss, ({"pre_act_loss_coefficient": 0.05},)
    ),
    "lens-standard": Case(above(lens("StandardSAE")), call_loss, ({}, {"apply_b_dec_to_input": False}), aux=False),
    "lens-jumprelu": Case(
        above(lens("JumpReLUSAE")), call_loss, ({}, {"normalize_activations": "layer_norm"}), aux=False
    ),
    "lens-gated": Case(above(lens("GatedSAE")), call_loss, aux=False),
    "lens-dense": Case(lens("StandardSAE"), call_loss, aux=False),
    "lens-transcoder": Case(above(lens("Transcoder")), call_loss, (TRANSCODER,), aux=False),
    "lens-skip": Case(above(lens("SkipTranscoder")), call_loss, (TRANSCODER,), aux=False),
    "lens-jumprelu-transcoder": Case(above(lens("JumpReLUTranscoder")), call_loss, (TRANSCODER,), aux=False),
    "lens-jumprelu-skip": Case(above(lens("JumpReLUSkipTranscoder")), call_loss, (TRANSCODER,), aux=False),
    "dictionary-standard": Case(above(dictionary("AutoEncoder"), 0.3), call_loss, aux=False),
    "dictionary-standard-dense": Case(dictionary("AutoEncoder"), call_loss, aux=False),
    "dictionary-jumprelu": Case(above(dictionary("JumpReluAutoEncoder")), call_loss, aux=False),
    "dictionary-gated": Case(above(dictionary("GatedAutoEncoder")), dictionary_gate_loss, aux=False),
    "dictionary-gated-alone": Case(above(dictionary("GatedAutoEncoder")), call_loss, aux=False),
    "dictionary-topk": Case(dictionary("AutoEncoderTopK", K), dictionary_topk_loss),
    "dictionary-batchtopk": Case(
        dictionary("BatchTopKSAE", K), with_encode(use_threshold=False), ({}, {"threshold": 0.4})
    ),
    "dictionary-batchtopk-inference": Case(
        dictionary("BatchTopKSAE", K), with_encode(), ({"threshold": 1.0}, {"threshold": -1.0}, {"threshold": 0.0})
    ),
    "dictionary-matryoshka": Case(
        dictionary("MatryoshkaBatchTopKSAE", K, [9, 20, 19]), with_encode(use_threshold=False)
    ),
}  # fmt: skip
"""By name. The last word in a test's id picks the settings."""

ALL = [(name, i) for name, case in CASES.items() for i in range(len(case.settings))]
FIRST = [(name, 0) for name in CASES]


def make(name: str, number: int, dtype: torch.dtype = torch.float64) -> Any:
    case = CASES[name]
    return case.make(case.settings[number], dtype)


def inputs(seed: int, dtype: torch.dtype = torch.float64, n: int = N) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator, dtype=torch.float64).to(dtype)


def dead_latents(name: str, seed: int) -> Tensor | None:
    """A random part of the latents, or none of them."""
    if not CASES[name].aux or seed % 3 == 0:
        return None
    share = random.Random(seed).choice((0.05, 0.4, 0.9))
    found = torch.rand(M, generator=torch.Generator().manual_seed(seed)) < share
    found[seed % M] = True
    return found
