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

import fastsae

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


def saelens_abstopk(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = lens_tensors(draw), inputs()
    to_lens(folder, t, lens("abstopk", k=K, rescale_acts_by_decoder_norm=True))
    norms = t["W_dec"].norm(dim=1)
    pre = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) * norms
    A = torch.zeros_like(pre).scatter(-1, pre.abs().topk(K).indices, 1.0) * pre
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


def saelens_scaled(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """A checkpoint of training on scaled inputs, with the files that lie beside it."""
    t, x, factor = lens_tensors(draw), inputs(), 0.25
    config = {"k": K, "rescale_acts_by_decoder_norm": True, "normalize_activations": "expected_average_only_in"}
    to_lens(folder, {**t, "topk_threshold": torch.tensor(0.5, dtype=torch.float64)}, lens("batchtopk", **config))
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": factor, "has_whitening": False}))
    write(folder, "sparsity.safetensors", {"sparsity": torch.zeros(M)})
    (folder / "trainer_state.pt").write_bytes(b"anything")
    norms = t["W_dec"].norm(dim=1)
    acts = ((x * factor - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu() * norms
    A = acts * (acts > 0.5)
    return A / factor, ((A / norms) @ t["W_dec"] + t["b_dec"]) / factor


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


# -- openai -----------------------------------------------------------------------------------------------------------


def openai(kind: str, tied: bool) -> Case:
    def case(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        x, W_enc = inputs(), draw(M, D)
        t: dict[str, Any] = {"pre_bias": draw(D), "latent_bias": draw(M), "encoder.weight": W_enc}
        t |= {"decoder.linear.weight": W_enc} if tied else {"decoder.weight": draw(D, M)}
        t |= {"stats_last_nonzero": torch.zeros(M, dtype=torch.int64), "activation": kind}
        if kind == "TopK":
            t["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"}
        write(folder, "7.pt", t)
        W_dec = W_enc if tied else t["decoder.weight"].T
        mean, spread = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        seen = (x - mean) / (spread + 1e-5) if kind == "TopK" else x
        pre = (seen - t["pre_bias"]) @ W_enc.T + t["latent_bias"]
        A = top(pre) if kind == "TopK" else pre.relu()
        recon = A @ W_dec + t["pre_bias"]
        return A, recon * spread + mean if kind == "TopK" else recon

    return case


# -- OpenMOSS ---------------------------------------------------------------------------------------------------------


def llama_scope(act_fn: str, of_output: float) -> Case:
    """Acts are those of inputs scaled to √D, over the same scale, times the norms that then remain."""

    def case(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        x, norms = inputs(), {"in": 5.0, "out": of_output}
        t = {
            "encoder.weight": draw(M, D), "encoder.bias": draw(M), "decoder.weight": draw(D, M), "decoder.bias": draw(D)
        }  # fmt: skip
        config = {
            "d_model": D, "d_sae": M, "expansion_factor": 3, "norm_activation": "dataset-wise", "act_fn": act_fn,
            "dataset_average_activation_norm": norms, "jump_relu_threshold": 0.5 if act_fn == "jumprelu" else 0.0,
            "top_k": K, "sparsity_include_decoder_norm": True, "use_decoder_bias": True,
            "apply_decoder_bias_to_pre_encoder": False, "use_glu_encoder": False,
        }  # fmt: skip
        write(folder, "checkpoints/final.safetensors", t)
        (folder / "hyperparams.json").write_text(json.dumps(config))
        of_in, of_out = D**0.5 / norms["in"], D**0.5 / norms["out"]
        pre = (x * of_in) @ t["encoder.weight"].T + t["encoder.bias"]
        rows = t["decoder.weight"].T / of_out  # in the units of the output
        acts = pre.relu() * rows.norm(dim=1)
        A = top(acts) if act_fn == "topk" else acts * (acts > 0.5)
        return A, A @ (rows / rows.norm(dim=1, keepdim=True)) + t["decoder.bias"] / of_out

    return case


def llamascopium(act_fn: str, mode: str) -> Case:
    """It selects by act x decoder norm, and returns the acts."""

    def case(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        x, scale = inputs(), D**0.5 / 5.0 if mode == "dataset-wise" else 1.0
        t = {"W_E": draw(D, M), "b_E": draw(M), "W_D": draw(M, D), "b_D": draw(D)}
        if act_fn == "jumprelu":
            t["activation_function.log_jumprelu_threshold"] = draw(M)
        for hook in ("blocks.3.in", "blocks.3.out"):
            t[f"dataset_average_activation_norm.{hook}"] = torch.tensor(5.0, dtype=torch.float64)
        config = {
            "sae_type": "sae", "d_model": D, "expansion_factor": 3.0, "use_decoder_bias": True, "act_fn": act_fn,
            "norm_activation": mode, "sparsity_include_decoder_norm": True, "top_k": K, "use_glu_encoder": False,
            "hook_point_in": "blocks.3.in", "hook_point_out": "blocks.3.out",
        }  # fmt: skip
        write(folder, "sae_weights.safetensors", t, config, "config.json")
        pre = (x * scale) @ t["W_E"] + t["b_E"]
        gated = pre * t["W_D"].norm(dim=1)
        if act_fn == "topk":
            A = top(pre, K, by=gated)
        elif act_fn == "jumprelu":
            A = pre * (gated > t["activation_function.log_jumprelu_threshold"].exp())
        else:
            A = pre.relu()
        return A / scale, (A @ t["W_D"] + t["b_D"]) / scale

    return case


def llama_scope_r1(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """llamascopium's first names."""
    x = inputs()
    t = {
        "encoder.weight": draw(M, D), "encoder.bias": draw(M), "decoder.weight": draw(D, M), "decoder.bias": draw(D),
        "log_jumprelu_threshold": draw(M),
    }  # fmt: skip
    config = {
        "d_model": D, "expansion_factor": 3, "act_fn": "jumprelu", "norm_activation": "inference",
        "sparsity_include_decoder_norm": False, "hook_point_in": "a", "hook_point_out": "a",
    }  # fmt: skip
    write(folder, "sae_weights.safetensors", t, config, "config.json")
    pre = x @ t["encoder.weight"].T + t["encoder.bias"]
    A = pre * (pre > t["log_jumprelu_threshold"].exp())
    return A, A @ t["decoder.weight"].T + t["decoder.bias"]


# -- tensors alone ----------------------------------------------------------------------------------------------------


def qwen_scope(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    t, x = {"W_enc": draw(M, D), "W_dec": draw(D, M), "b_enc": draw(M), "b_dec": draw(D)}, inputs()
    write(folder, "layer7.sae.pt", t)
    A = top(x @ t["W_enc"].T + t["b_enc"])
    return A, A @ t["W_dec"].T + t["b_dec"]


def overcomplete(jump: bool, batch_norm: bool, suffix: str) -> Case:
    def case(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        x, first = inputs(), "encoder.final_block"
        t = {
            f"{first}.0.weight": draw(M, D), f"{first}.0.bias": draw(M), "dictionary._weights": draw(M, D),
            "dictionary.multiplier": torch.tensor(0.4, dtype=torch.float64),
        }  # fmt: skip
        pre = x @ t[f"{first}.0.weight"].T + t[f"{first}.0.bias"]
        if batch_norm:
            t |= {f"{first}.1.{part}": draw(M) for part in ("weight", "bias", "running_mean")}
            t |= {f"{first}.1.running_var": draw(M).square(), f"{first}.1.num_batches_tracked": torch.tensor(3)}
            pre = torch.nn.functional.batch_norm(
                pre, *(t[f"{first}.1.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
            )
        if jump:
            t["thresholds"] = draw(M)
        write(folder, f"sae{suffix}", t)
        A = pre.relu() * (pre.relu() >= t["thresholds"].exp()) if jump else top(pre)
        rows = t["dictionary._weights"]
        return A, A @ (rows / (rows.norm(dim=1, keepdim=True) + 1e-8) * t["dictionary.multiplier"].exp())

    return case


def circuit_tracer(jump: bool, skip: bool, turned: bool) -> Case:
    def case(folder: Path, draw: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        x = inputs()
        t = {"W_enc": draw(M, D), "W_dec": draw(M, D), "b_enc": draw(M), "b_dec": draw(D)}
        theta = torch.tensor(0.4, dtype=torch.float64)
        more = {"activation_function.threshold": theta} if jump else {}
        if skip:
            more["W_skip"] = draw(D, D)
        write(folder, "layer_3.safetensors", {**t, **more} | ({"W_dec": t["W_dec"].T} if turned else {}))
        pre = x @ t["W_enc"].T + t["b_enc"]
        A = pre * (pre > theta) if jump else pre.relu()
        recon = A @ t["W_dec"] + t["b_dec"]
        return A, recon + x @ more["W_skip"].T if skip else recon

    return case


CASES: dict[str, Case] = {
    "saelens-standard": saelens_standard,
    "saelens-before-6": saelens_before_6,
    "saelens-topk-rescaled": saelens_topk_rescaled,
    "saelens-abstopk": saelens_abstopk,
    "saelens-layer-norm": saelens_layer_norm,
    "saelens-jumprelu": saelens_jumprelu,
    "saelens-log-threshold": saelens_log_threshold,
    "saelens-gated": saelens_gated,
    "saelens-batchtopk": saelens_batchtopk,
    "saelens-scaled": saelens_scaled,
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
    "openai-topk": openai("TopK", tied=False),
    "openai-relu-tied": openai("ReLU", tied=True),
    "llama_scope-jumprelu": llama_scope("jumprelu", 5.0),
    "llama_scope-topk-other-output": llama_scope("topk", 3.0),
    "llamascopium-topk": llamascopium("topk", "inference"),
    "llamascopium-topk-scaled": llamascopium("topk", "dataset-wise"),
    "llamascopium-jumprelu": llamascopium("jumprelu", "inference"),
    "llamascopium-jumprelu-scaled": llamascopium("jumprelu", "dataset-wise"),
    "llamascopium-relu-scaled": llamascopium("relu", "dataset-wise"),
    "llamascopium-first-names": llama_scope_r1,
    "qwen_scope": qwen_scope,
    "overcomplete-topk": overcomplete(False, False, ".safetensors"),
    "overcomplete-jump": overcomplete(True, False, ".pt"),
    "overcomplete-jump-batch-norm": overcomplete(True, True, ".pt"),
    "circuit_tracer-relu": circuit_tracer(False, False, True),
    "circuit_tracer-jumprelu": circuit_tracer(True, True, False),
}
RULE: dict[str, Any] = {
    "qwen_scope": fastsae.TopK(K), "overcomplete-topk": fastsae.TopK(K), "circuit_tracer-relu": fastsae.ReLU(l1=0.0),
}  # fmt: skip
"""The rules that files do not say."""
