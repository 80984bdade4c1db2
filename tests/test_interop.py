"""Checkpoints of other libraries: what they mean, by hand; what is refused, in one line; and what is written back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastsae
from fastsae.cli.main import main
from fastsae.hosts.dense import acts_of_pre_acts
from fastsae.interop import hub
from fastsae.interop.parts import jump_relu
from fastsae.interop.registry import FORMATS, WRITTEN
from fastsae.model.files import SavedModuleError
from tests.interop_case import CASES, RULE, K, M, drawer, inputs, k_and_threshold, lens, lens_tensors, to_lens

pytestmark = pytest.mark.filterwarnings("ignore::fastsae.backends.BackendWarning")


def agrees(sae: fastsae.SparseAutoencoder, A: Tensor, recon: Tensor) -> None:
    x = inputs()
    codes = sae.encode(x)
    torch.testing.assert_close(codes.to_dense(), A, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sae.decode(codes, like=x), recon, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_gives_what_its_library_would(name: str, tmp_path: Path) -> None:
    A, recon = CASES[name](tmp_path, drawer())
    assert 0.01 < float((A != 0).double().mean()) < 0.95
    sae = fastsae.load(tmp_path, activation=RULE.get(name))
    assert not sae.training
    assert sae.W_dec.dtype == torch.float64
    agrees(sae, A, recon)
    again = fastsae.load(fastsae.save(sae, tmp_path / "own"))
    assert again.config == sae.config
    agrees(again, A, recon)


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_from_a_checkpoint(name: str, tmp_path: Path) -> None:
    _, recon = CASES[name](tmp_path, drawer())
    sae = fastsae.load(tmp_path, activation=RULE.get(name)).float().train()
    step = fastsae.FusedTrainStep(sae, lr=1e-3)
    x, target = inputs().float(), None if recon.shape[1] == sae.d_in else 1.5 * recon.float() + 0.3
    first = float(step(x, target)["loss"])
    for _ in range(20):
        last = float(step(x, target)["loss"])
    assert last < first


def holds(format: str, sae: fastsae.SparseAutoencoder) -> bool:
    """Whether an SAE fits a format, by the formats' own rules."""
    rule, square = getattr(sae.activation, "inner", sae.activation), sae.d_in == sae.d_out and not sae.skip
    kind = type(rule).__name__
    if rule.selects_by_norm:
        return False
    if format == "saelens":
        plain = square or (kind in ("ReLU", "JumpReLU", "BatchTopK") and not sae.pre_bias)
        return kind != "GroupMax" and plain
    if format in ("gemma_scope", "circuit_tracer"):
        shaped = not sae.skip if format == "gemma_scope" else sae.d_in == sae.d_out
        return kind in ("ReLU", "JumpReLU", "BatchTopK") and not sae.pre_bias and sae.norm.mode == "none" and shaped
    if format == "sparsify":
        return kind in ("TopK", "GroupMax") and sae.d_in == sae.d_out and sae.norm.mode == "none"
    if kind == "ReLU":
        return square and (sae.decoder_norm == "unit" or not sae.pre_bias)
    return (
        kind not in ("GroupMax", "AbsTopK")
        and square
        and sae.norm.mode == "none"
        and sae.pre_bias == (kind != "JumpReLU")
    )


@pytest.mark.parametrize("format", [name for name in WRITTEN if name != "fastsae"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_written_in_a_format_means_the_same(name: str, format: str, tmp_path: Path) -> None:
    A, recon = CASES[name](tmp_path, drawer())
    sae = fastsae.load(tmp_path, activation=RULE.get(name))
    if not holds(format, sae):
        with pytest.raises(SavedModuleError, match=f"the {format} format has no "):
            fastsae.save(sae, tmp_path / "out", format=format)
        assert not (tmp_path / "out").exists()
        return
    folder = fastsae.save(sae, tmp_path / "out", format=format)
    agrees(fastsae.load(folder, format=format), A, recon)
    agrees(fastsae.load(folder), A, recon)


def test_a_factor_of_the_inputs_is_folded_into_what_is_written(tmp_path: Path) -> None:
    sae = fastsae.SparseAutoencoder(8, M, fastsae.TopK(K), normalize="constant", dtype=torch.float64, seed=0)
    with pytest.raises(SavedModuleError, match="no normalize='constant' without its scale"):
        fastsae.save(sae, tmp_path / "early", format="saelens")
    sae.calibrate_(inputs()).init_from_(inputs()).eval()
    out = sae(inputs())
    agrees(fastsae.load(fastsae.save(sae, tmp_path / "out", format="sparsify")), out.codes.to_dense(), out.recon)


REFUSED = {
    "saelens": [
        (fastsae.GroupMax(K), {}, "no GroupMax"),
        (fastsae.TopK(K), {"normalize": "layer_norm"}, "no normalize='layer_norm'"),
        (fastsae.TopK(K, weighted=True), {"decoder_norm": "free", "init_norm": 2.0}, "no selection by decoder norm"),
        (fastsae.BatchTopK(K), {}, "no BatchTopK without a threshold"),
        (fastsae.TopK(K), {"d_out": 5}, "no skip connection or d_out with topk"),
        (fastsae.ReLU(0.1), {"skip": True}, "no skip connection or d_out with standard, a pre-bias"),
    ],
    "sparsify": [
        (fastsae.ReLU(0.1), {}, "no ReLU; it has TopK and GroupMax"),
        (fastsae.TopK(K), {"d_out": 5}, "no d_out = 5 beside d_in = 8"),
        (fastsae.TopK(K), {"normalize": "standardize"}, "no normalize='standardize'"),
    ],
    "dictionary_learning": [
        (fastsae.TopK(K), {"pre_bias": False}, "no AutoEncoderTopK with pre_bias = False"),
        (fastsae.JumpReLU(0.1, threshold=0.1), {}, "no JumpReluAutoEncoder with pre_bias = True"),
        (fastsae.TopK(K), {"skip": True}, "no skip connection"),
        (fastsae.HierarchicalTopK((2, 4)), {}, r"no HierarchicalTopK\(ks=\(2, 4\)"),
    ],
    "gemma_scope": [
        (fastsae.TopK(K), {"pre_bias": False}, "no TopK; it has thresholds: JumpReLU, ReLU, and BatchTopK by its own"),
        (fastsae.ReLU(0.1), {}, "no pre_bias=True"),
        (fastsae.ReLU(0.1), {"pre_bias": False, "skip": True}, "no skip connection; circuit_tracer's format has one"),
        (fastsae.BatchTopK(K), {"pre_bias": False}, "no BatchTopK without a threshold"),
    ],
    "circuit_tracer": [
        (fastsae.TopK(K), {"pre_bias": False}, "no TopK; it has thresholds"),
        (fastsae.ReLU(0.1), {"pre_bias": False, "normalize": "layer_norm"}, "no normalize='layer_norm'"),
        (fastsae.ReLU(0.1), {"d_out": 5}, "no d_out = 5 beside d_in = 8"),
        (fastsae.ReLU(0.1), {"d_in": M, "d_out": M, "pre_bias": False}, "no d_sae = d_out, of which nobody could say"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("format", "rule", "settings", "said"), [(f, *c) for f, cases in REFUSED.items() for c in cases]
)
def test_what_a_format_cannot_hold_is_refused(format, rule, settings, said, tmp_path: Path) -> None:
    sae = fastsae.SparseAutoencoder(**{"d_in": 8, "d_sae": M, "activation": rule, "seed": 0, **settings})
    with pytest.raises(SavedModuleError, match=said):
        fastsae.save(sae, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


def test_a_folder_never_gets_two_checkpoints(tmp_path: Path) -> None:
    sae = fastsae.SparseAutoencoder(8, M, fastsae.TopK(K), seed=0)
    fastsae.save(sae, tmp_path)
    with pytest.raises(SavedModuleError, match="has a checkpoint in the fastsae format; give another folder"):
        fastsae.save(sae, tmp_path, format="sparsify")
    fastsae.load(tmp_path)
    fastsae.save(sae, tmp_path / "lens", format="saelens")
    fastsae.save(sae, tmp_path / "lens", format="saelens")
    with pytest.raises(SavedModuleError, match="has a checkpoint in the saelens format"):
        fastsae.save(sae, tmp_path / "lens", format="dictionary_learning")
    with pytest.raises(ValueError, match="format is 'onnx', expected one of fastsae, saelens, sparsify"):
        fastsae.save(sae, tmp_path / "x", format="onnx")
    with pytest.raises(ValueError, match="format is 'qwen_scope', expected one of"):
        fastsae.save(sae, tmp_path / "x", format="qwen_scope")


# -- what is refused on the way in ------------------------------------------------------------------------------------


def refused(path: Path | str, said: str, **how: object) -> None:
    """load(path) raises SavedModuleError, in one line that matches."""
    with pytest.raises(SavedModuleError, match=said) as caught:
        fastsae.load(path, **how)
    assert "\n" not in str(caught.value)


def change(folder: Path, **settings: object) -> None:
    path = folder / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


CONTRADICTIONS = {
    "an architecture of the future": ({"architecture": "quantum"}, "cfg.json has architecture 'quantum', expected one"),
    "a version of the future": ({"metadata": {"sae_lens_version": "7.1.0"}}, "is of sae_lens 7.1.0, expected 6 or old"),
    "a setting of the future": ({"twist": 0.5}, "cfg.json has twist = 0.5, which this fastsae does"),
    "another width": ({"d_in": 9}, r"W_enc is \(8, 24\), expected .*\(9, 24\) \(d_in: cfg.json says 9|b_dec is \(8,\)"),
    "another architecture": ({"architecture": "jumprelu"}, "lacks threshold"),
    "no k": ({"architecture": "topk"}, "cfg.json has k = None, expected a int"),
    "a norm of each token": ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale', which"),
    "a shape of the future": ({"reshape_activations": "spiral"}, "reshape_activations = 'spiral', expected 'none' or"),
    "a text for a switch": ({"apply_b_dec_to_input": "yes"}, "apply_b_dec_to_input = 'yes', expected a bool"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_configuration_that_contradicts_its_tensors_is_refused(name: str, tmp_path: Path) -> None:
    CASES["saelens-standard"](tmp_path, drawer())
    settings, said = CONTRADICTIONS[name]
    change(tmp_path, **settings)
    refused(tmp_path, said)


def test_tensors_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    CASES["saelens-standard"](tmp_path, drawer())
    path = tmp_path / "sae_weights.safetensors"
    good = load_file(path)
    for more, said in (
        ({"W_enc": good["W_enc"].T.contiguous()}, r"W_enc is \(24, 8\), expected .* which is its transpose"),
        ({"W_enc": good["W_enc"].int()}, "W_enc is torch.int32, expected float64, float32"),
        ({"W_enc": good["W_enc"].float().to(torch.float8_e4m3fn)}, "W_enc is torch.float8_e4m3fn, expected"),
        ({"W_enc": good["W_enc"][None]}, r"W_enc is \(1, 8, 24\), expected"),
        ({"surprise": good["b_dec"].clone()}, "also holds surprise, which is unknown"),
    ):
        save_file({**good, **more}, path)
        refused(tmp_path, said)
    save_file({name: t for name, t in good.items() if name != "b_enc"}, path)
    refused(tmp_path, "sae_weights.safetensors lacks b_enc; expected W_dec, W_enc, b_dec, b_enc")
    save_file(good, path)
    whole = path.read_bytes()
    for cut in (len(whole) // 2, 100, 3, 0):
        path.write_bytes(whole[:cut])
        refused(tmp_path, "sae_weights.safetensors is truncated or no safetensors file")
    path.write_bytes(whole)
    (tmp_path / "cfg.json").write_text("{")
    refused(tmp_path, "cfg.json is not a JSON file")
    (tmp_path / "cfg.json").write_text("[]")
    refused(tmp_path, "cfg.json holds a list, expected a JSON object")


class Bomb:
    def __reduce__(self):
        return (Path.write_text, (Path("exploded"), "boom"))


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"encoder.weight": Bomb()}, tmp_path / "ae.pt")
    refused(tmp_path, "ae.pt holds pickled objects other than tensors")
    (tmp_path / "ae.pt").unlink()
    import numpy as np

    np.savez(tmp_path / "params.npz", W_enc=np.array([Bomb()], dtype=object))
    refused(tmp_path, "params.npz is truncated or no numpy file")
    assert not (tmp_path / "exploded").exists()


def test_damaged_torch_and_numpy_files_are_named(tmp_path: Path) -> None:
    for name, file in (("dictionary_learning-topk", "ae.pt"), ("gemma_scope-1", "params.npz")):
        folder = tmp_path / name
        CASES[name](folder, drawer())
        whole = (folder / file).read_bytes()
        for cut in (len(whole) // 2, 10, 0):
            (folder / file).write_bytes(whole[:cut])
            refused(folder, f"{file} (is truncated|holds pickled objects other than tensors, or is damaged)")


def test_the_class_of_a_dictionary_is_never_guessed(tmp_path: Path) -> None:
    CASES["dictionary_learning-topk"](tmp_path, drawer())
    cfg = tmp_path / "config.json"
    text = cfg.read_text()
    cfg.write_text(text.replace("AutoEncoderTopK", "BatchTopKSAE"))
    assert isinstance(fastsae.load(tmp_path).activation, fastsae.BatchTopK)  # these tensors serve both classes
    cfg.unlink()
    refused(tmp_path, "ae.pt could be AutoEncoderTopK or BatchTopKSAE, and there is no config.json beside it")
    cfg.write_text(text.replace("AutoEncoderTopK", "AutoEncoder"))
    refused(tmp_path, "says dict_class AutoEncoder, but ae.pt has the tensors of AutoEncoderTopK or BatchTopKSAE")
    cfg.write_text(text.replace("AutoEncoderTopK", "Transformer"))
    refused(tmp_path, "dict_class 'Transformer', expected one of AutoEncoder")
    cfg.write_text(text.replace(f'"k": {K}', '"k": 5'))
    refused(tmp_path, f"config.json says k = 5, but ae.pt has {K}")


def test_a_folder_of_two_formats_is_refused_unless_one_is_named(tmp_path: Path) -> None:
    lens_A, lens_recon = CASES["saelens-standard"](tmp_path, drawer())
    A, recon = CASES["gemma_scope-1"](tmp_path, drawer(3))
    refused(tmp_path, r"could be saelens \(sae_weights.safetensors with cfg.json\) and gemma_scope \(params.npz\)")
    agrees(fastsae.load(tmp_path, format="gemma_scope"), A, recon)
    agrees(fastsae.load(tmp_path / "params.npz"), A, recon)
    agrees(fastsae.load(tmp_path / "sae_weights.safetensors"), lens_A, lens_recon)
    with pytest.raises(ValueError, match="format is 'onnx', expected one of fastsae, saelens"):
        fastsae.load(tmp_path, format="onnx")


def test_what_is_of_no_format_is_refused_by_name(tmp_path: Path) -> None:
    refused(tmp_path, "sae.safetensors is missing; expected a directory written by fastsae.save, or a checkpoint in")
    refused(tmp_path / "nowhere", "is not there; expected a directory written by fastsae.save")
    CASES["saelens-standard"](tmp_path / "layer_3", drawer())
    refused(tmp_path, "holds no weights itself, only the folders layer_3")
    fastsae.load(tmp_path, subfolder="layer_3")
    (tmp_path / "layer_3" / "cfg.json").unlink()
    refused(tmp_path / "layer_3", "holds sae_weights.safetensors, expected files of a format fastsae, saelens")
    assert len(FORMATS) == len({f.match for f in FORMATS.values()})


def test_a_rule_that_the_files_say_is_not_to_be_given(tmp_path: Path) -> None:
    CASES["saelens-standard"](tmp_path, drawer())
    refused(tmp_path, "says which latents are active; leave activation=", activation=fastsae.TopK(3))
    fastsae.save(fastsae.load(tmp_path), tmp_path / "own")
    refused(tmp_path / "own", "says which latents are active; leave activation=", activation=fastsae.TopK(3))


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_thresholds_in_float32_come_back_to_the_last_bit() -> None:
    theta = torch.cat([torch.logspace(-38, 38, 4001), torch.tensor([0.0, -1.0, torch.inf, 1e-45])])
    _, state = jump_relu(theta, len(theta), dtype=torch.float32)
    assert torch.equal(state["log_threshold"].exp().float(), theta.clamp_min(0))
    at_least = jump_relu(theta, len(theta), inclusive=True, dtype=torch.float32)[1]["log_threshold"]
    below = at_least.exp().float()
    positive = theta > 0
    assert torch.equal(torch.nextafter(below, torch.full_like(below, torch.inf))[positive], theta[positive])


def test_weights_stay_in_their_dtype_and_mixed_ones_are_widened(tmp_path: Path) -> None:
    t = {name: value.to(torch.bfloat16) for name, value in lens_tensors(drawer()).items()}
    to_lens(tmp_path, t, lens("standard"))
    assert fastsae.load(tmp_path).W_dec.dtype == torch.bfloat16
    to_lens(tmp_path, {**t, "b_enc": t["b_enc"].float()}, lens("standard"))
    sae = fastsae.load(tmp_path)
    assert sae.W_dec.dtype == sae.b_enc.dtype == torch.float32
    assert torch.equal(sae.W_dec, t["W_dec"].float())


def test_rows_of_norm_1_stay_so_in_training(tmp_path: Path) -> None:
    t = lens_tensors(drawer())
    to_lens(tmp_path, t, lens("standard"))
    assert fastsae.load(tmp_path).decoder_norm == "free"
    to_lens(tmp_path, {**t, "W_dec": torch.nn.functional.normalize(t["W_dec"], dim=1)}, lens("standard"))
    assert fastsae.load(tmp_path).decoder_norm == "unit"
    t["W_dec"][3] = 0
    to_lens(tmp_path, t, lens("topk", k=K, rescale_acts_by_decoder_norm=True))
    assert fastsae.load(tmp_path).encode(inputs()).to_dense().isfinite().all()


@pytest.mark.parametrize("name", ["qwen_scope", "overcomplete-topk"])
def test_a_rule_that_the_files_do_not_say_has_to_be_given(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "plain"
    A, recon = CASES[name](folder, drawer())
    refused(folder, "does not say .*pass activation=TopK")
    if name == "qwen_scope":
        named = tmp_path / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}"
        folder.rename(named)
        agrees(fastsae.load(named), A, recon)
        agrees(fastsae.load(named / "layer7.sae.pt"), A, recon)
    else:
        refused(folder, "got GroupMax", activation=fastsae.GroupMax(K))


def test_what_other_formats_have_and_fastsae_has_not_is_refused(tmp_path: Path) -> None:
    def changed(name: str, config: str, said: str, **settings: object) -> None:
        folder = tmp_path / said[:20]
        CASES[name](folder, drawer())
        path = folder / config
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        refused(folder, said)

    changed("llamascopium-topk", "config.json", "has use_glu_encoder = True", use_glu_encoder=True)
    changed("llamascopium-topk", "config.json", "has sae_type 'crosscoder', expected 'sae'", sae_type="crosscoder")
    changed("llamascopium-topk", "config.json", "has norm_activation 'token-wise'", norm_activation="token-wise")
    changed("llamascopium-topk", "config.json", "has batchtopk by act x decoder norm", act_fn="batchtopk")
    changed("llamascopium-topk", "config.json", "has act_fn 'layertopk'", act_fn="layertopk")
    changed(
        "llama_scope-topk-other-output",
        "hyperparams.json",
        "subtracts the bias",
        apply_decoder_bias_to_pre_encoder=True,
    )
    changed(
        "llama_scope-jumprelu",
        "hyperparams.json",
        "says d_sae = 24, and expansion_factor = 4 of d_model = 8",
        expansion_factor=4,
    )
    changed("sparsify-topk", "cfg.json", "has signed = True", signed=True)
    changed("sparsify-topk", "cfg.json", "has sideways = 1, which this fastsae does not know", sideways=1)
    changed(
        "gemma_scope-2",
        "config.json",
        "says affine_connection = True, but params.safetensors lacks",
        affine_connection=True,
    )
    changed("gemma_scope-2", "config.json", "has architecture 'topk', expected 'jump_relu'", architecture="topk")
    for kind, state, said in (
        ("Identity", {}, "has the activation 'Identity', expected TopK or ReLU"),
        ("TopK", {"k": 3, "postact_fn": "Identity"}, "has TopK with k = 3 and postact_fn = 'Identity'"),
    ):
        folder = tmp_path / kind
        CASES["openai-topk"](folder, drawer())
        tensors = torch.load(folder / "7.pt")
        torch.save(tensors | {"activation": kind, "activation_state_dict": state}, folder / "7.pt")
        refused(folder, said)
    folder = tmp_path / "negative"
    CASES["circuit_tracer-jumprelu"](folder, drawer())
    tensors = load_file(folder / "layer_3.safetensors")
    save_file(tensors | {"activation_function.threshold": torch.tensor(-0.1)}, folder / "layer_3.safetensors")
    refused(folder, "has values below 0, but fastsae's acts are never negative")


def test_a_file_of_a_newer_llamascopium_is_refused(tmp_path: Path) -> None:
    A, recon = CASES["llamascopium-topk"](tmp_path, drawer())
    path = tmp_path / "sae_weights.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    save_file(tensors, path, metadata={"version": "2.0.0b34"})
    agrees(fastsae.load(tmp_path), A, recon)
    save_file(tensors, path, metadata={"version": "3.0.0"})
    refused(tmp_path, r"sae_weights\.safetensors is of llamascopium 3\.0\.0, expected 2 or older; a newer fastsae may")


def test_at_least_a_threshold_is_exact_in_float32(tmp_path: Path) -> None:
    """A pre-act that equals overcomplete's threshold is active there."""
    first = "encoder.final_block.0"
    bias = torch.tensor([0.5, 0.5, 0.5])
    below = torch.nextafter(bias, torch.zeros(3))
    tensors = {f"{first}.weight": torch.zeros(3, 2), "dictionary._weights": torch.ones(3, 2)}
    save_file({**tensors, f"{first}.bias": bias, "thresholds": bias.log()}, tmp_path / "a.safetensors")
    assert float(bias.log().exp()[0]) == 0.5
    assert fastsae.load(tmp_path).encode(torch.zeros(1, 2)).to_dense().tolist() == [[0.5] * 3]
    save_file({**tensors, f"{first}.bias": below, "thresholds": bias.log()}, tmp_path / "a.safetensors")
    assert fastsae.load(tmp_path).encode(torch.zeros(1, 2)).to_dense().tolist() == [[0.0] * 3]


def test_every_way_to_encode_selects_by_norm(tmp_path: Path) -> None:
    A, _ = CASES["llamascopium-topk"](tmp_path, drawer())
    sae = fastsae.load(tmp_path)
    torch.testing.assert_close(sae(inputs()).codes.to_dense(), A)
    torch.testing.assert_close(sae.encode(inputs(), latents=[7, 2]).to_dense(), A[:, [7, 2]])
    pre = inputs() @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(acts_of_pre_acts(sae, pre), A)


def test_a_batch_refuses_selection_by_norm() -> None:
    with pytest.raises(ValueError, match=r"selects by acts alone, got TopK\(k=4, weighted=True\); leave weighted out"):
        fastsae.SAEBatch(2, 8, M, fastsae.TopK(K, weighted=True))


def test_a_factor_of_the_inputs_that_no_file_has_is_warned_of(tmp_path: Path) -> None:
    A, _ = CASES["saelens-standard"](tmp_path, drawer())
    change(tmp_path, normalize_activations="expected_average_only_in")
    with pytest.warns(UserWarning, match="there is no activation_scaler.json with the factor"):
        sae = fastsae.load(tmp_path)
    torch.testing.assert_close(sae.encode(inputs()).to_dense(), A)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": null}')
    refused(tmp_path, "activation_scaler.json has scaling_factor = None, expected a float")
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 2, "has_whitening": true}')
    refused(tmp_path, "activation_scaler.json has has_whitening = True: whitening that was not folded")
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": -1}')
    refused(tmp_path, "activation_scaler.json has scaling_factor = -1, expected a positive number")


def test_the_command_line_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    A, recon = CASES["qwen_scope"](tmp_path / "in", drawer())
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "sparsify"]) == 1
    assert "pass activation=TopK" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--format", "sparsify", "--k", str(K)]) == 0
    assert f"TopK(k={K}" in capsys.readouterr().out
    agrees(fastsae.load(tmp_path / "out", format="sparsify"), A, recon)
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "own")]) == 0
    agrees(fastsae.load(tmp_path / "own"), A, recon)
    assert main(["convert", str(tmp_path / "out"), str(tmp_path / "dl"), "--format", "dictionary_learning"]) == 1
    assert "no AutoEncoderTopK with pre_bias = False" in capsys.readouterr().err


# -- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in the hub's layout, with a repository of two folders, of a client that is offline."""
    constants = pytest.importorskip("huggingface_hub.constants")
    cache, commit = tmp_path / "cache", "0123456789abcdef0123456789abcdef01234567"
    repository = cache / "models--org--saes"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    CASES["saelens-standard"](snapshot / "blocks.3" / "width_24", drawer())
    CASES["gemma_scope-1"](snapshot / "layer_5", drawer(3))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return snapshot


def test_repositories_are_read_from_the_cache_where_the_hub_does_not_answer(hub_cache: Path, tmp_path: Path) -> None:
    A, recon = CASES["saelens-standard"](tmp_path / "again", drawer())
    agrees(fastsae.load("org/saes/blocks.3/width_24"), A, recon)
    agrees(fastsae.load("org/saes", subfolder="blocks.3/width_24"), A, recon)
    A, recon = CASES["gemma_scope-1"](tmp_path / "other", drawer(3))
    agrees(fastsae.load("org/saes/layer_5"), A, recon)
    agrees(fastsae.load("org/saes/layer_5/params.npz"), A, recon)
    refused("org/saes", "org/saes holds no weights itself, only the folders")
    refused(
        "org/saes/layer_9", r"layer_9 of org/saes is not in the cache of the hub, which does not answer \(HF_HUB_OFF"
    )
    refused("org/nothing", "org/nothing is neither a local path nor in the cache of the hub, which does not answer")


def test_a_name_cannot_lead_out_of_its_repository(hub_cache: Path) -> None:
    for name, subfolder in (("org/saes/../../x", None), ("org/saes", "../../x"), ("org/saes", "a/./b")):
        with pytest.raises(SavedModuleError, match="leads out of the repository"):
            fastsae.load(name, subfolder=subfolder)


def test_a_path_here_is_never_looked_for_on_the_hub(hub_cache: Path, tmp_path: Path) -> None:
    A, recon = CASES["sparsify-topk"](tmp_path / "org" / "saes", drawer())
    agrees(fastsae.load("org/saes"), A, recon)
    refused("./org/none", "is not there; expected a directory written by fastsae.save")


class Hub:
    """The calls of huggingface_hub.HfApi that an upload makes, over a folder."""

    def __init__(self, root: Path):
        self.root = root
        self.private: dict[str, bool | None] = {}

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        (self.root / repo).mkdir(parents=True, exist_ok=True)
        self.private.setdefault(repo, private)

    def list_repo_files(self, repo: str) -> list[str]:
        root = self.root / repo
        return [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]

    def upload_file(self, *, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> None:
        (self.root / repo_id / path_in_repo).write_bytes(path_or_fileobj)

    def upload_folder(self, *, folder_path: str, repo_id: str, path_in_repo: str | None) -> None:
        shutil.copytree(folder_path, self.root / repo_id / (path_in_repo or "."), dirs_exist_ok=True)


def test_an_sae_is_sent_to_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there as `load` wants it, beside others, and the card says how to load the first one."""
    client = pytest.importorskip("huggingface_hub")
    there = Hub(tmp_path)
    monkeypatch.setattr(client, "HfApi", lambda: there)
    sae = fastsae.SparseAutoencoder(6, 24, fastsae.TopK(3), seed=0).eval()
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    assert fastsae.push_to_hub(sae, "me/saes", subfolder="layer_3/", private=True) == "me/saes/layer_3"
    assert fastsae.push_to_hub(sae, "me/saes", subfolder="for/saelens", format="saelens") == "me/saes/for/saelens"
    assert fastsae.push_to_hub(sae, "me/one") == "me/one"
    monkeypatch.chdir(tmp_path)
    for name in ("me/saes/layer_3", "me/saes/for/saelens", "me/one"):
        assert torch.equal(fastsae.load(name).encode(x).to_dense(), sae.encode(x).to_dense()), name
    assert 'fastsae.load("me/saes/layer_3")' in (tmp_path / "me" / "saes" / "README.md").read_text()
    assert there.private == {"me/saes": True, "me/one": None}
    for repo, subfolder in (("me", None), ("me/saes/deep", None), ("me/saes", "../x")):
        with pytest.raises(SavedModuleError, match="expected org/name, and a folder inside it"):
            fastsae.push_to_hub(sae, repo, subfolder=subfolder)


def test_an_sae_is_not_sent_beside_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two `load` takes would be a matter of their names. The same names are written again."""
    client = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(client, "HfApi", lambda: Hub(tmp_path))
    old, new = (fastsae.SparseAutoencoder(6, 24, fastsae.TopK(3), seed=seed).eval() for seed in (0, 1))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    fastsae.push_to_hub(old, "me/saes", subfolder="a", format="saelens")
    fastsae.push_to_hub(new, "me/saes", subfolder="b")
    with pytest.raises(SavedModuleError, match=r"^me/saes/a already holds sae_weights\.safetensors; give another"):
        fastsae.push_to_hub(new, "me/saes", subfolder="a")
    fastsae.push_to_hub(new, "me/saes", subfolder="a", format="saelens")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(fastsae.load("me/saes/a").encode(x).to_dense(), new.encode(x).to_dense())


def test_a_hub_that_does_not_answer_takes_nothing(hub_cache: Path) -> None:
    sae = fastsae.SparseAutoencoder(6, 24, fastsae.TopK(3), seed=0)
    with pytest.raises(SavedModuleError, match=r"^the hub refused to upload to me/saes: "):
        fastsae.push_to_hub(sae, "me/saes")


@pytest.mark.parametrize(
    ("inside", "wanted"),
    [
        ("blocks.3", ["blocks.3/cfg.json", "blocks.3/sae_weights.safetensors"]),
        ("many/layer0.sae.pt", ["many/layer0.sae.pt"]),
        ("scope", ["scope/hyperparams.json", "scope/checkpoints/final.safetensors"]),
        ("many", "org/r/many holds 2 files of weights; name one of layer0.sae.pt, layer1.sae.pt"),
        ("", "org/r holds 0 files of weights; name one of blocks.3, many, scope"),
        ("none", "org/r/none holds 0 files of weights"),
    ],
)  # fmt: skip
def test_only_one_checkpoint_of_a_repository_is_fetched(inside: str, wanted: list[str] | str) -> None:
    names = [
        "README.md", "blocks.3/cfg.json", "blocks.3/sae_weights.safetensors", "blocks.3/sparsity.safetensors",
        "many/layer0.sae.pt", "many/layer1.sae.pt", "scope/hyperparams.json", "scope/checkpoints/final.safetensors",
    ]  # fmt: skip
    if isinstance(wanted, list):
        assert hub._wanted(names, inside, "org/r") == wanted
        return
    with pytest.raises(SavedModuleError, match=wanted):
        hub._wanted(names, inside, "org/r")


def test_a_threshold_is_a_buffer_in_float32(tmp_path: Path) -> None:
    CASES["dictionary_learning-batchtopk"](tmp_path, drawer())
    sae = fastsae.load(tmp_path)
    assert float(sae.threshold) == float(k_and_threshold(0.5)["threshold"])
    assert float(sae.threshold_weight) == 1.0
