"""Files in other libraries' formats, as those libraries would write them, with the mathematics of each by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

N, D, M, K = 33, 8, 24, 4

Case = Callable[[Path, Callable[..., Tensor]], tuple[Tensor, Tensor]]
"""Writes a checkpoint into a folder and returns the acts (N, M) and the reconstruction that it means, of `inputs()`."""


def inputs() -> Tensor:
    """Activations (N, D) with a mean and a scale, float64."""
    return 2 * torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.3


def drawer(seed: int = 0) -> Callable[..., Tensor]:
    """draw(*shape): float64 numbers, others in each call."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: 0.5 * torch.randn(*shape, dtype=torch.float64, generator=generator)


def write(folder: Path, name: str, tensors: dict[str, Any], config: Any = None, config_name: str = "") -> None:
    """A weights file of the kind that its suffix says, and a configuration beside it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({key: t.contiguous() for key, t in tensors.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{key: t.numpy() for key, t in tensors.items()})
    else:
        torch.save(tensors, path)
    if config is not None:
        (folder / config_name).write_text(json.dumps(config))


def top(pre: Tensor, k: int = K, by: Tensor | None = None) -> Tensor:
    """relu(pre) at the k largest of pre, or of `by`, of each token."""
    kept = torch.zeros_like(pre, dtype=torch.bool).scatter(-1, (pre if by is None else by).topk(k).indices, True)
    return torch.where(kept, pre, 0).relu()


# -- SAELens ----------------------------------------------------------------------------------------------------------


def lens(architecture: str, pre_bias: bool = True, **more: Any) -> dict[str, Any]:
    """cfg.json of 6.0 and later."""
    return {
        "architecture": architecture, "d_in": D, "d_sae": M, "dtype": "float64", "device": "cpu",
        "apply_b_dec_to_input": pre_bias, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12"}, **more,
    }  # fmt: skip


def lens_tensors(draw: Callable[..., Tensor], d_out: int = D) -> dict[str, Tensor]:
    return {"W_enc": draw(D, M), "b_enc": draw(M), "W_dec": draw(M, d_out), "b_dec": draw(d_out)}


def to_lens(folder: Path, t: dict[str, Tensor], config: dict[str, Any]) -> None:
    write(folder, "sae_weights.safetensors", t, config, "cfg.json")


def saelens_standard(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = lens_tensors(draw), inputs()
    to_lens(folder, t, lens("standard"))
    A = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    return A, A @ t["W_dec"] + t["b_dec"]


def saelens_before_6(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """One flat object without an architecture; a scaling factor of 1 that does nothing."""
    t, x = lens_tensors(draw), inputs()
    config = {
        "d_in": D, "d_sae": M, "dtype": "torch.float64", "hook_point": "blocks.3.hook_resid_pre",
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "apply_b_dec_to_input": False,
        "normalize_activations": False, "prepend_bos": True, "context_size": 128, "sae_lens_version": "3.2.1",
    }  # fmt: skip
    to_lens(folder, {**t, "scaling_factor": torch.ones(M, dtype=torch.float64)}, config)
    A = top(x @ t["W_enc"] + t["b_enc"])
    return A, A @ t["W_dec"] + t["b_dec"]


def saelens_topk_rescaled(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = lens_tensors(draw), inputs()
    to_lens(folder, t, lens("topk", k=K, rescale_acts_by_decoder_norm=True))
    norms = t["W_dec"].norm(dim=1)
    A = top(((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms)
    return A, (A / norms) @ t["W_dec"] + t["b_dec"]


def saelens_layer_norm(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = lens_tensors(draw), inputs()
    to_lens(folder, t, lens("topk", k=K, normalize_activations="layer_norm"))
    mean, spread = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    A = top(((x - mean) / (spread + 1e-5) - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    return A, (A @ t["W_dec"] + t["b_dec"]) * spread + mean


def saelens_jumprelu(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = {**lens_tensors(draw), "threshold": draw(M)}, inputs()  # some are below 0
    to_lens(folder, t, lens("jumprelu", pre_bias=False))
    pre = x @ t["W_enc"] + t["b_enc"]
    A = pre.relu() * (pre > t["threshold"])
    return A, A @ t["W_dec"] + t["b_dec"]


def saelens_log_threshold(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = {**lens_tensors(draw), "log_threshold": draw(M)}, inputs()
    to_lens(folder, t, lens("jumprelu"))
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    A = pre * (pre > t["log_threshold"].exp())
    return A, A @ t["W_dec"] + t["b_dec"]


def saelens_gated(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = lens_tensors(draw), inputs()
    del t["b_enc"]
    t |= {"b_gate": draw(M), "b_mag": draw(M), "r_mag": draw(M)}
    to_lens(folder, t, lens("gated"))
    seen = x - t["b_dec"]
    A = (seen @ t["W_enc"] + t["b_gate"] > 0) * (seen @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
    return A, A @ t["W_dec"] + t["b_dec"]


def saelens_batchtopk(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """The checkpoint of a training run, at inference: above its threshold, of acts times norms."""
    t, x = lens_tensors(draw), inputs()
    to_lens(
        folder, {**t, "topk_threshold": torch.tensor(0.75, dtype=torch.float64)},
        lens("batchtopk", k=K, rescale_acts_by_decoder_norm=True, topk_threshold_lr=0.01),
    )  # fmt: skip
    norms = t["W_dec"].norm(dim=1)
    pre = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
    A = pre.relu() * (pre > 0.75)
    return A, (A / norms) @ t["W_dec"] + t["b_dec"]


def saelens_matryoshka(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = lens_tensors(draw), inputs()
    to_lens(
        folder, {**t, "topk_threshold": torch.tensor(0.5, dtype=torch.float64)},
        lens("matryoshka_batchtopk", k=K, rescale_acts_by_decoder_norm=False, matryoshka_widths=[6, 12]),
    )  # fmt: skip
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    A = pre * (pre > 0.5)
    return A, A @ t["W_dec"] + t["b_dec"]


def saelens_transcoder(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = lens_tensors(draw, 5), inputs()
    to_lens(folder, t, lens("transcoder", pre_bias=False, d_out=5))
    A = (x @ t["W_enc"] + t["b_enc"]).relu()
    return A, A @ t["W_dec"] + t["b_dec"]


def saelens_skip_transcoder(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = {**lens_tensors(draw, 5), "W_skip": draw(5, D), "threshold": draw(M).abs()}, inputs()
    to_lens(folder, t, lens("jumprelu_skip_transcoder", pre_bias=False, d_out=5))
    pre = x @ t["W_enc"] + t["b_enc"]
    A = pre * (pre > t["threshold"])
    return A, A @ t["W_dec"] + t["b_dec"] + x @ t["W_skip"].T


# -- sparsify ---------------------------------------------------------------------------------------------------------


def sparsify_case(transcode: bool, activation: str, skip: bool) -> Case:
    def case(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        t, x = {"encoder.weight": draw(M, D), "encoder.bias": draw(M), "W_dec": draw(M, D), "b_dec": draw(D)}, inputs()
        if skip:
            t["W_skip"] = draw(D, D)
        config = {
            "activation": activation, "expansion_factor": 3, "normalize_decoder": True, "num_latents": 0, "k": K,
            "multi_topk": False, "skip_connection": skip, "transcode": transcode, "d_in": D,
        }  # fmt: skip
        write(folder, "sae.safetensors", t, config, "cfg.json")
        pre = (x if transcode else x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
        A = top(pre) if activation == "topk" else top(pre.unflatten(-1, (K, M // K)), 1).flatten(-2)
        recon = A @ t["W_dec"] + t["b_dec"]
        return A, recon + x @ t["W_skip"].T if skip else recon

    return case


# -- dictionary_learning ----------------------------------------------------------------------------------------------


def to_dictionary_learning(folder: Path, name: str, t: dict[str, Tensor], **trainer: Any) -> None:
    sizes = {"activation_dim": D, "dict_size": M}
    write(folder, "ae.pt", t, {"trainer": {"dict_class": name, **sizes, **trainer}, "buffer": {}}, "config.json")


def linear(draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    return {"encoder.weight": draw(M, D), "encoder.bias": draw(M), "decoder.weight": draw(D, M)}


def dictionary_learning_relu(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """Its loader gives the decoder norm 1, so that acts are those times the norms."""
    t, x = {**linear(draw), "bias": draw(D)}, inputs()
    to_dictionary_learning(folder, "AutoEncoder", t)
    A = ((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    return A * t["decoder.weight"].norm(dim=0), A @ t["decoder.weight"].T + t["bias"]


def dictionary_learning_new(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = {**linear(draw), "decoder.bias": draw(D)}, inputs()
    to_dictionary_learning(folder, "AutoEncoderNew", t)
    A = (x @ t["encoder.weight"].T + t["encoder.bias"]).relu()
    return A, A @ t["decoder.weight"].T + t["decoder.bias"]


def k_and_threshold(threshold: float) -> dict[str, Tensor]:
    return {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(threshold)}


def dictionary_learning_topk(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = {**linear(draw), "b_dec": draw(D), **k_and_threshold(0.3)}, inputs()
    to_dictionary_learning(folder, "AutoEncoderTopK", t, k=K)
    A = top((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    return A, A @ t["decoder.weight"].T + t["b_dec"]


def dictionary_learning_batchtopk(threshold: float) -> Case:
    """At -1, which is untrained, it is a dense ReLU."""

    def case(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        t, x = {**linear(draw), "b_dec": draw(D), **k_and_threshold(threshold)}, inputs()
        to_dictionary_learning(folder, "BatchTopKSAE", t, k=K)
        pre = (x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
        A = pre.relu() * (pre.relu() > threshold)
        return A, A @ t["decoder.weight"].T + t["b_dec"]

    return case


def dictionary_learning_matryoshka(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    groups, x = [4, 8, 12], inputs()
    t = {**lens_tensors(draw), **k_and_threshold(0.25), "group_sizes": torch.tensor(groups)}
    to_dictionary_learning(folder, "MatryoshkaBatchTopKSAE", t, k=K, group_sizes=groups, group_weights=[0.2, 0.3, 0.5])
    pre = (x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    A = pre * (pre > 0.25)
    return A, A @ t["W_dec"] + t["b_dec"]


def dictionary_learning_jumprelu(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = {**lens_tensors(draw), "threshold": draw(M)}, inputs()
    to_dictionary_learning(folder, "JumpReluAutoEncoder", t)
    pre = x @ t["W_enc"] + t["b_enc"]
    A = (pre * (pre > t["threshold"])).relu()
    return A, A @ t["W_dec"] + t["b_dec"]


def dictionary_learning_gated(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = linear(draw), inputs()
    del t["encoder.bias"]
    t |= {"decoder_bias": draw(D), "r_mag": draw(M), "gate_bias": draw(M), "mag_bias": draw(M)}
    to_dictionary_learning(folder, "GatedAutoEncoder", t)
    pre = (x - t["decoder_bias"]) @ t["encoder.weight"].T
    A = (pre + t["gate_bias"] > 0) * (t["r_mag"].exp() * pre + t["mag_bias"]).relu()
    return A, A @ t["decoder.weight"].T + t["decoder_bias"]


# -- Gemma Scope ------------------------------------------------------------------------------------------------------


def gemma_scope(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = {**lens_tensors(draw), "threshold": draw(M)}, inputs()
    write(folder, "params.npz", t)
    pre = x @ t["W_enc"] + t["b_enc"]
    A = pre.relu() * (pre > t["threshold"])
    return A, A @ t["W_dec"] + t["b_dec"]


def gemma_scope_2(skip: bool) -> Case:
    def case(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        x, d_out = inputs(), 6 if skip else D
        t = {
            "w_enc": draw(D, M), "w_dec": draw(M, d_out), "b_enc": draw(M), "b_dec": draw(d_out),
            "threshold": draw(M).abs(),
        }  # fmt: skip
        if skip:
            t["affine_skip_connection"] = draw(D, d_out)
        config = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "affine_connection": skip}
        write(folder, "params.safetensors", t, config, "config.json")
        pre = x @ t["w_enc"] + t["b_enc"]
        A = pre * (pre > t["threshold"])
        recon = A @ t["w_dec"] + t["b_dec"]
        return A, recon + x @ t["affine_skip_connection"] if skip else recon

    return case


CASES: dict[str, Case] = {
    "saelens-standard": saelens_standard,
    "saelens-before-6": saelens_before_6,
    "saelens-topk-rescaled": saelens_topk_rescaled,
    "saelens-layer-norm": saelens_layer_norm,
    "saelens-jumprelu": saelens_jumprelu,
    "saelens-log-threshold": saelens_log_threshold,
    "saelens-gated": saelens_gated,
    "saelens-batchtopk": saelens_batchtopk,
    "saelens-matryoshka": saelens_matryoshka,
    "saelens-transcoder": saelens_transcoder,
    "saelens-skip-transcoder": saelens_skip_transcoder,
    "sparsify-topk": sparsify_case(False, "topk", False),
    "sparsify-groupmax": sparsify_case(False, "groupmax", False),
    "sparsify-skip-transcoder": sparsify_case(True, "topk", True),
    "dictionary_learning-relu": dictionary_learning_relu,
    "dictionary_learning-new": dictionary_learning_new,
    "dictionary_learning-topk": dictionary_learning_topk,
    "dictionary_learning-batchtopk": dictionary_learning_batchtopk(0.5),
    "dictionary_learning-batchtopk-untrained": dictionary_learning_batchtopk(-1.0),
    "dictionary_learning-matryoshka": dictionary_learning_matryoshka,
    "dictionary_learning-jumprelu": dictionary_learning_jumprelu,
    "dictionary_learning-gated": dictionary_learning_gated,
    "gemma_scope-1": gemma_scope,
    "gemma_scope-2": gemma_scope_2(False),
    "gemma_scope-2-skip": gemma_scope_2(True),
}
