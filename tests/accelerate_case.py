"""Modules of the libraries that `accelerate` takes, with random settings, and one loss of each: theirs."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
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
        if name == "overcomplete":  # its __init__ asks for image models and plots, which its SAEs do not use
            spec = importlib.util.find_spec(name)
            if spec is None:
                pytest.skip("overcomplete is not installed")
            sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
            return importlib.import_module("overcomplete.sae")
        found = pytest.importorskip(name, exc_type=ImportError)
        if name == "sparsify":  # its Triton decoder is for GPUs
            importlib.import_module("sparsify.sparse_coder").decoder_impl = importlib.import_module(
                "sparsify.utils"
            ).eager_decode
    return found


@dataclass(frozen=True)
class Case:
    """make(settings, dtype): a module; loss(module, x, dead): what its trainer minimizes; settings: all that differ.

    encode, decode: of acts; any_shape: whether x may have further dimensions; fused: whether fastsae.optim steps it;
    pickles: whether the library's module does.
    """

    make: Callable[[dict[str, Any], torch.dtype], Any]
    loss: Callable[[Any, Tensor, Tensor | None], Tensor]
    settings: tuple[dict[str, Any], ...] = ({},)
    aux: bool = True
    trains: bool = True
    encode: Callable[[Any, Tensor], Any] = lambda module, x: module.encode(x)
    decode: Callable[[Any, Tensor, Tensor], Tensor] = lambda module, acts, x: module.decode(acts)
    call: Callable[[Any, Tensor], Tensor] = lambda module, x: module(x)
    any_shape: bool = True
    fused: bool = True
    pickles: bool = True


def sized(settings: dict[str, Any]) -> tuple[int, int, dict[str, Any]]:
    """Width of x and number of latents, (D, M) where the settings have no d_in and d_sae, and the other settings."""
    rest = dict(settings)
    return rest.pop("d_in", D), rest.pop("d_sae", M), rest


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
    d, m, rest = sized(settings)
    torch.manual_seed(0)
    config = sparsify.SparseCoderConfig(num_latents=m, **{"k": K, **rest})
    return shaken(sparsify.SparseCoder(d, config, dtype=dtype))


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
        d, m, rest = sized(settings)
        torch.manual_seed(0)
        with default_dtype(dtype):
            module = shaken(found(d, m, *rest.pop("arguments", more)))
        for name, value in rest.items():
            module.get_buffer(name).fill_(value)
        return module

    return make


def dictionary_topk_loss(module: Any, x: Tensor, dead: Tensor | None) -> Tensor:
    f, top, indices, post = module.encode(x, return_topk=True)
    assert top.shape == indices.shape == (len(x), int(module.k))
    loss = (module.decode(f) - x).square().sum(-1).mean()
    if dead is not None:  # a dense loss on what encode gives
        loss = loss + 0.01 * torch.where(dead, post, 0).square().sum() + 0.01 * f.abs().sum()
    return loss


def with_encode(**flags: Any) -> Callable[[Any, Tensor, Tensor | None], Tensor]:
    def loss(module: Any, x: Tensor, dead: Tensor | None) -> Tensor:
        f, active, post = module.encode(x, return_active=True, **flags)
        assert active.shape == (module.dict_size,)
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


# -- circuit-tracer ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def filled(module: nn.Module, bias: str, shift: float) -> nn.Module:
    """The module with random parameters, thresholds aside; biases `bias` shifted, so that fewer latents are active."""
    generator = torch.Generator().manual_seed(7)
    for name, p in module.named_parameters():
        if "threshold" not in name:
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    module.get_parameter(bias).sub_(shift)
    return module


def transcoder(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """rule: its activation function; a threshold is trained only with trains=True."""
    library("circuit_tracer")
    rules = importlib.import_module("circuit_tracer.transcoder.activation_functions")
    kind = importlib.import_module("circuit_tracer.transcoder.single_layer_transcoder").SingleLayerTranscoder
    d, m, given = sized(settings)
    rule, trains, shift = given.pop("rule", "relu"), given.pop("trains", False), given.pop("shift", 1.0)
    if rule == "topk":
        function, shift = rules.TopK(given.pop("k", K)), 0.0
    elif rule == "jumprelu":
        threshold = torch.linspace(-0.1, 0.9, m, dtype=torch.float64).to(dtype)
        function = rules.JumpReLU(threshold, 0.5)
        function.threshold.requires_grad_(trains)
    else:
        function = nn.functional.relu if rule == "relu" else nn.ReLU()
    return filled(kind(d, m, function, 0, dtype=dtype, **given), "b_enc", shift)


def transcoder_decode(module: Any, acts: Tensor, x: Tensor) -> Tensor:
    return module.decode(acts, x)


# -- overcomplete -----------------------------------------------------------------------------------------------------


def overcomplete(kind: str) -> Callable[[dict[str, Any], torch.dtype], Any]:
    """tied, untied: with the library's TieableEncoder, with a bias or without."""

    def make(settings: dict[str, Any], dtype: torch.dtype) -> Any:
        sae = library("overcomplete")
        d, m, given = sized(settings)
        tied, bias, threshold = given.pop("tied", None), given.pop("bias", False), given.pop("threshold", None)
        torch.manual_seed(0)
        with default_dtype(dtype):
            module = getattr(sae, kind)(d, m, **given)
            if tied is not None:
                module = module.tied(bias) if tied else module.untied(bias, copy_from_dictionary=False)
        shaken(module)
        if threshold is not None:
            module.running_threshold = torch.tensor(threshold, dtype=dtype)
            with torch.no_grad():
                module.eval()
        with torch.no_grad():
            if hasattr(module, "thresholds"):
                module.thresholds.fill_(-0.5).add_(torch.linspace(-1, 1, m, dtype=torch.float64))
                module.thresholds.requires_grad_(False)
            elif kind == "SAE":
                module.encoder.final_block[0].bias.sub_(1.0)
        return module

    return make


def overcomplete_loss(module: Any, x: Tensor, dead: Tensor | None) -> Tensor:
    pre_codes, codes, x_hat = module(x)
    dictionary = module.get_dictionary().square().mean() if module.training else 0.0
    loss = (x_hat - x.detach().roll(1, 0)).square().mean() + 0.01 * codes.abs().mean() + 0.1 * dictionary
    return loss + 0.01 * pre_codes.square().mean()


OVERCOMPLETE: dict[str, Any] = {
    "aux": False, "fused": False, "any_shape": False,
    "encode": lambda module, x: module.encode(x)[1], "call": lambda module, x: module(x)[2],
}  # fmt: skip


# -- llamascopium -----------------------------------------------------------------------------------------------------


def llama(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    library("llamascopium")
    models = importlib.import_module("llamascopium.models.sae")
    d, m, rest = sized(settings)
    given = {"hook_point_in": "in", "hook_point_out": "out", "norm_activation": "inference", "top_k": K, **rest}
    trains = given.pop("trains", False)
    config = models.SAEConfig(d_model=d, expansion_factor=m / d, device="cpu", dtype=dtype, **given)
    module = filled(models.SparseAutoEncoder(config), "b_E", 1.0 if "relu" in config.act_fn else 0.0)
    if config.act_fn == "jumprelu":
        threshold = module.activation_function.log_jumprelu_threshold.requires_grad_(trains)
        with torch.no_grad():
            threshold.copy_(torch.linspace(0.05, 0.9, m, dtype=torch.float64).log())
    return module


def llama_loss(module: Any, x: Tensor, dead: Tensor | None) -> Tensor:
    batch = {"in": x, "out": x.detach().roll(1, 0), "tokens": torch.arange(len(x), dtype=torch.int64)}
    how: dict[str, Any] = {"sparsity_loss_type": "power", "l1_coefficient": 0.05}
    if dead is not None:
        how |= {"auxk_coefficient": 0.1, "k_aux": 5, "update_dead_statistics": lambda *_: dead}
    return module.compute_loss(batch, **how)["loss"].mean()


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
    "transcoder": Case(
        transcoder, call_loss, ({}, {"rule": "nn"}, {"skip_connection": True}, {"shift": -1.0}), aux=False,
        decode=transcoder_decode,
    ),
    "transcoder-jumprelu": Case(
        transcoder, call_loss,
        ({"rule": "jumprelu"}, {"rule": "jumprelu", "skip_connection": True}),
        aux=False, trains=False, decode=transcoder_decode,
    ),
    "transcoder-jumprelu-trained": Case(
        transcoder, call_loss, ({"rule": "jumprelu", "trains": True},), aux=False, decode=transcoder_decode
    ),
    "transcoder-topk": Case(
        transcoder, call_loss, ({"rule": "topk"}, {"rule": "topk", "skip_connection": True}), aux=False,
        decode=transcoder_decode,
    ),
    "overcomplete-topk": Case(
        overcomplete("TopKSAE"), overcomplete_loss,
        ({"top_k": K}, {"top_k": K, "tied": True}, {"top_k": K, "tied": False, "bias": True},
         {"top_k": K, "dictionary_params": {"normalization": "max_l2", "use_multiplier": True}}),
        **OVERCOMPLETE,
    ),
    "overcomplete-batchtopk": Case(
        overcomplete("BatchTopKSAE"), overcomplete_loss,
        ({"top_k": 101}, {"top_k": 1}, {"top_k": 1100}, {"top_k": 50, "tied": True, "bias": True}), **OVERCOMPLETE,
    ),
    "overcomplete-batchtopk-inference": Case(
        overcomplete("BatchTopKSAE"), overcomplete_loss, ({"threshold": 0.9}, {"threshold": 0.0}), trains=False,
        **OVERCOMPLETE,
    ),
    "overcomplete-jump": Case(overcomplete("JumpSAE"), overcomplete_loss, **OVERCOMPLETE),
    "overcomplete-relu": Case(overcomplete("SAE"), overcomplete_loss, **OVERCOMPLETE),
    "llama-topk": Case(
        llama, llama_loss, ({"act_fn": "topk"}, {"act_fn": "topk", "sparsity_include_decoder_norm": False}),
        pickles=False,
    ),
    "llama-batchtopk": Case(
        llama, llama_loss, ({"act_fn": "batchtopk"}, {"act_fn": "batchtopk", "sparsity_include_decoder_norm": False}),
        aux=False, pickles=False,
    ),
    "llama-relu": Case(llama, llama_loss, ({"act_fn": "relu"},), aux=False, pickles=False),
    "llama-jumprelu": Case(
        llama, llama_loss,
        ({"act_fn": "jumprelu"}, {"act_fn": "jumprelu", "sparsity_include_decoder_norm": False}),
        aux=False, trains=False,
    ),
    "llama-jumprelu-trained": Case(llama, llama_loss, ({"act_fn": "jumprelu", "trains": True},), aux=False),
    "llama-without-bias": Case(
        llama, llama_loss, ({"act_fn": "topk", "use_decoder_bias": False},), aux=False, fused=False, pickles=False
    ),
}  # fmt: skip
"""By name. The last word in a test's id picks the settings."""

LIBRARIES = {
    "lens": "sae_lens", "sparsify": "sparsify", "dictionary": "dictionary_learning", "transcoder": "circuit_tracer",
    "overcomplete": "overcomplete", "llama": "llamascopium",
}  # fmt: skip
"""By the first word of a case's name."""


def collected(pairs: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """The pairs, but of a library that is not installed only the first, whose skipped test says so."""
    found: dict[Any, tuple[str, int]] = {}
    for pair in pairs:
        name = LIBRARIES[pair[0].partition("-")[0]]
        found.setdefault(pair if importlib.util.find_spec(name) else name, pair)
    return list(found.values())


ALL = collected((name, i) for name, case in CASES.items() for i in range(len(case.settings)))
FIRST = collected((name, 0) for name in CASES)


def make(name: str, number: int, dtype: torch.dtype = torch.float64) -> Any:
    case = CASES[name]
    return case.make(case.settings[number], dtype)


def inputs(seed: int, dtype: torch.dtype = torch.float64, n: int = N, width: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)


def dead_latents(name: str, seed: int) -> Tensor | None:
    """A random part of the latents, or none of them."""
    if not CASES[name].aux or seed % 3 == 0:
        return None
    share = random.Random(seed).choice((0.05, 0.4, 0.9))
    found = torch.rand(M, generator=torch.Generator().manual_seed(seed)) < share
    found[seed % M] = True
    return found
