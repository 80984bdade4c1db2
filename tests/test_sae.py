"""SparseAutoencoder: against a dense module, its bookkeeping, its behaviour as an nn.Module, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import fastsae
from fastsae import reference
from fastsae.codes import SparseCodes
from fastsae.model import initial
from fastsae.model.initial import geometric_median
from fastsae.model.rules import TopK, activation_from_config
from fastsae.model.sae import SparseAutoencoder
from tests.dense_sae import DenseSAE, sae_for_test, tokens

BACKENDS = [name for name, info in fastsae.backends().items() if info["available"]]

# -- forward and gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["none", "constant", "layer_norm", "standardize"])
@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("pre_bias", [True, False])
@pytest.mark.parametrize("tied", [False, True])
def test_forward_and_gradients_equal_a_dense_module(tied, pre_bias, loss, normalize):
    sae = sae_for_test(tied=tied, pre_bias=pre_bias, loss=loss, normalize=normalize)
    x = tokens(24, 10)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, truth = sae(mine), DenseSAE(sae)
    dense = truth.losses(theirs)
    torch.testing.assert_close(out.recon, dense["recon"])
    torch.testing.assert_close(out.codes.to_dense(), dense["A"])
    torch.testing.assert_close(out.loss, dense["loss"])
    assert set(out.losses) == {loss}
    out.loss.backward()
    dense["loss"].backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, truth.params[name].grad, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(mine.grad, theirs.grad)
    like = x if normalize in ("layer_norm", "standardize") else None
    torch.testing.assert_close(sae.decode(sae.encode(x), like=like), out.recon)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_serves_the_module(backend):
    sae = sae_for_test(d_in=32, d_sae=192, k=8, dtype=torch.float32)
    sae.backend = backend
    x = tokens(64, 32, dtype=torch.float32)
    truth = DenseSAE(sae)
    dense = truth.losses(x)
    out = sae(x)
    torch.testing.assert_close(out.loss, dense["loss"], rtol=1e-5, atol=0)
    out.loss.backward()
    dense["loss"].backward()
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.grad, truth.params[name].grad, rtol=1e-4, atol=1e-4)


def test_a_transcoder_predicts_its_target():
    sae = sae_for_test(d_out=7, pre_bias=False, normalize="layer_norm")
    x, y = tokens(24, 10, 1), tokens(24, 7, 2)
    out, dense = sae(x, target=y), DenseSAE(sae).losses(x, y)
    torch.testing.assert_close(out.recon, dense["recon"])
    torch.testing.assert_close(out.loss, dense["loss"])
    assert out.recon.shape == (24, 7)


def test_leading_dimensions_come_back():
    sae = sae_for_test()
    x = tokens(24, 10)
    flat, shaped = sae(x), sae(x.view(2, 3, 4, 10))
    assert shaped.recon.shape == (2, 3, 4, 10)
    assert shaped.codes.acts.shape == (2, 3, 4, 4)
    assert torch.equal(shaped.recon.view(24, 10), flat.recon)
    assert torch.equal(shaped.loss, flat.loss)
    assert sae.encode(x.view(4, 6, 10)).batch_shape == (4, 6)


@pytest.mark.parametrize("n", [0, 1])
def test_batches_of_no_token_and_of_one(n):
    sae = sae_for_test(aux_k=3, dead_after=1)
    out = sae(tokens(n, 10))
    assert out.recon.shape == (n, 10)
    assert torch.isfinite(out.loss)
    out.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters() if p.grad is not None)


def test_narrow_inputs_meet_wide_weights():
    sae = sae_for_test(dtype=torch.float32)
    x = tokens(16, 10, dtype=torch.bfloat16)
    assert sae(x).recon.dtype == torch.float32
    assert torch.equal(sae(x).recon, sae(x.float()).recon)


def test_autocast_leaves_the_weights_alone():
    sae = sae_for_test(dtype=torch.float32)
    x = tokens(16, 10, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = sae(x)
    assert torch.equal(out.loss, sae(x).loss)


def test_eval_mode_has_no_aux_and_counts_nothing():
    sae = sae_for_test(aux_k=5, dead_after=1).eval()
    before = sae.tokens_since_fired.clone()
    assert set(sae(tokens(16, 10)).losses) == {"mse"}
    assert torch.equal(sae.tokens_since_fired, before)


# -- bookkeeping ------------------------------------------------------------------------------------------------------


def test_dead_latents_are_counted_in_tokens_by_hand():
    sae = sae_for_test(d_sae=6, k=2, dead_after=5)
    fires = SparseCodes(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[1, 3], [3, 5]], dtype=torch.int32), 6)
    sae.count_fired_(sae.counts_of(fires), 2)  # latent 5 only fills an empty slot
    assert sae.tokens_since_fired.tolist() == [2, 0, 2, 0, 2, 2]
    again = SparseCodes(torch.tensor([[0.5, 0.0]] * 3), torch.tensor([[0, 5]] * 3, dtype=torch.int32), 6)
    sae.count_fired_(sae.counts_of(again), 3)
    assert sae.tokens_since_fired.tolist() == [0, 3, 5, 3, 5, 5]
    assert sae.dead.tolist() == [False, False, True, False, True, True]


# -- norms of the decoder and the input, initial values --------------------------------------------------------------


def test_initial_weights():
    sae = SparseAutoencoder(12, 40, TopK(4), seed=3)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.W_enc, sae.W_dec)
    assert not sae.b_enc.any()
    assert torch.equal(sae.W_dec, SparseAutoencoder(12, 40, TopK(4), seed=3).W_dec)
    assert not torch.equal(sae.W_dec, SparseAutoencoder(12, 40, TopK(4), seed=4).W_dec)
    torch.manual_seed(3)
    first = SparseAutoencoder(12, 40, TopK(4)).W_dec
    assert not torch.equal(first, SparseAutoencoder(12, 40, TopK(4)).W_dec)
    wide = SparseAutoencoder(12, 40, TopK(4), d_out=5, pre_bias=False, seed=3)
    assert wide.W_enc.shape == (40, 12)
    torch.testing.assert_close(wide.W_enc.norm(dim=1), torch.ones(40))


def test_projection_and_renormalization():
    sae = sae_for_test()
    with torch.no_grad():
        sae.W_dec[0] = 0.0
        sae.W_dec[1] *= 3.0
    sae.W_dec.grad = tokens(30, 10)
    expected = reference.project(sae.W_dec.grad, sae.W_dec.detach())
    sae.project_gradients_()
    torch.testing.assert_close(sae.W_dec.grad, expected)
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(30, dtype=torch.float64))
    sae.normalize_decoder_()
    norms = sae.W_dec.detach().norm(dim=1)
    assert float(norms[0]) == 0.0
    torch.testing.assert_close(norms[1:], torch.ones(29, dtype=torch.float64))

    free = sae_for_test(decoder_norm="free")
    free.W_dec.grad = tokens(30, 10)
    before = free.W_dec.detach().clone()
    free.project_gradients_()
    free.normalize_decoder_()
    assert torch.equal(free.W_dec.grad, tokens(30, 10))
    assert torch.equal(free.W_dec, before)


def test_constant_normalization_makes_the_mean_squared_norm_d():
    sae = SparseAutoencoder(10, 30, TopK(4), normalize="constant", dtype=torch.float64, seed=0)
    x = 37 * tokens(500, 10)
    with pytest.raises(RuntimeError, match="calibrate_"):
        sae(x)
    sae.calibrate_(x)
    seen = sae.inputs(x).target
    assert float(seen.square().sum(-1).mean()) == pytest.approx(10.0)
    torch.testing.assert_close(sae.norm.restore(seen, sae.norm.statistics(x)), x)
    for bad in (torch.zeros(4, 10), torch.full((4, 10), float("nan"))):
        with pytest.raises(ValueError, match="expected a positive number"):
            sae.calibrate_(bad)


def test_layer_norm_matches_torch_and_is_undone():
    sae = sae_for_test(normalize="layer_norm")
    x = 5 * tokens(20, 10) + 3
    seen = sae.inputs(x).target
    torch.testing.assert_close(seen, torch.nn.functional.layer_norm(x, (10,)))
    torch.testing.assert_close(sae.norm.restore(seen, sae.norm.statistics(x)), x)
    with pytest.raises(ValueError, match="like=x"):
        sae.decode(sae.encode(x))


def test_standardize_is_torchs_standard_deviation_and_is_undone_by_it_alone():
    sae = sae_for_test(normalize="standardize")
    x = 5 * tokens(20, 10) + 3
    stats, spread = sae.norm.statistics(x), x.std(-1, keepdim=True)
    seen = (x - x.mean(-1, keepdim=True)) / (spread + 1e-5)
    torch.testing.assert_close(sae.inputs(x).target, seen)
    torch.testing.assert_close(sae.norm.restore(seen, stats), seen * spread + x.mean(-1, keepdim=True))
    assert sae.norm.statistics(torch.full((1, 10), 1e300, dtype=torch.float64) * torch.arange(10)).scale.isnan().all()
    with pytest.raises(ValueError, match="normalize='standardize' needs the encoded input"):
        sae.decode(sae.encode(x))


def test_the_state_carries_the_calibration():
    sae = sae_for_test(normalize="constant")
    fresh = SparseAutoencoder(10, 30, TopK(4), normalize="constant", dtype=torch.float64)
    fresh.load_state_dict(sae.state_dict())
    x = tokens(16, 10)
    for other in (fresh, copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert torch.equal(other(x).recon, sae(x).recon)
    uncalibrated = SparseAutoencoder(10, 30, TopK(4), normalize="constant", dtype=torch.float64)
    fresh.load_state_dict(uncalibrated.state_dict())
    with pytest.raises(RuntimeError, match="calibrate_"):
        fresh(x)


def test_b_dec_starts_at_the_centre():
    x = tokens(400, 10)
    sae = sae_for_test()
    torch.testing.assert_close(sae.init_from_(x).b_dec.detach(), x.mean(0))
    # A cross around 2 and one point far away: the mean follows the outlier, the geometric median hardly moves.
    cross = torch.cat([2 + torch.eye(10), 2 - torch.eye(10)]).double().repeat(20, 1)
    outlier = torch.cat([cross, torch.full((1, 10), 1e6, dtype=torch.float64)])
    median = sae.init_from_(outlier, how="geometric_median").b_dec.detach()
    assert float((median - 2).abs().max()) < 0.05
    assert float((outlier.mean(0) - 2).abs().max()) > 1000
    # It is a minimum: moving away in any direction costs more.
    cost = [float((x - (geometric_median(x) + shift)).norm(dim=1).sum()) for shift in (0.0, 0.01, -0.01)]
    assert cost[0] < min(cost[1:])
    y = tokens(400, 7, 5)
    transcoder = sae_for_test(d_out=7, pre_bias=False)
    torch.testing.assert_close(transcoder.init_from_(x, target=y).b_dec.detach(), y.mean(0))


# -- an ordinary module -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_state_dict_deepcopy_and_pickle(tied):
    sae = sae_for_test(tied=tied, aux_k=3, dead_after=50)
    sae(tokens(40, 10))
    names = {"W_dec", "b_enc", "b_dec", "tokens_since_fired", "_extra_state"} | (set() if tied else {"W_enc"})
    assert set(sae.state_dict()) == names
    fresh = SparseAutoencoder.from_config(sae.config, dtype=torch.float64, seed=9)
    assert fresh.config == sae.config
    fresh.load_state_dict(sae.state_dict())
    x = tokens(16, 10, 2)
    for other in (fresh, copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert torch.equal(other.tokens_since_fired, sae.tokens_since_fired)
        assert torch.equal(other(x).loss, copy.deepcopy(sae)(x).loss)
        assert other.encoder_weight is (other.W_dec if tied else other.W_enc)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_another_dtype(dtype):
    sae = sae_for_test(dtype=torch.float32, normalize="constant").to(dtype)
    assert {p.dtype for p in sae.parameters()} == {dtype}
    assert sae.tokens_since_fired.dtype == torch.int64
    out = sae(tokens(16, 10, dtype=torch.float32))
    assert out.recon.dtype == dtype
    assert torch.isfinite(out.loss)


def test_double_is_to_float64():
    sae = sae_for_test(dtype=torch.float32)
    assert torch.equal(copy.deepcopy(sae).double().W_enc, sae.to(torch.float64).W_enc)


def test_to_another_device():
    sae = sae_for_test().to("meta")
    assert sae(torch.empty(4, 10, device="meta")).recon.device.type == "meta"
    with pytest.raises(ValueError, match="x is on cpu, the SAE on meta"):
        sae(tokens(4, 10))


def test_repr_names_the_settings():
    text = repr(sae_for_test(tied=True))
    assert "d_sae=30" in text
    assert "tied=True" in text
    assert "TopK(k=4, weighted=False)" in text


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": TopK(31)}, "k = 31, expected at most d_sae = 30"),
        ({"activation": 4}, "expected a rule such as"),
        ({"d_in": 0}, "d_in is 0"),
        ({"d_sae": 2.5}, "d_sae is 2.5"),
        ({"d_out": 7, "pre_bias": True}, "leave pre_bias out, or pass False"),
        ({"pre_bias": 1}, "pre_bias is 1, expected True or False"),
        ({"d_out": 7, "tied": True}, "tied weights need one width"),
        ({"tied": 1}, "tied is 1, expected True or False"),
        ({"decoder_norm": "l1"}, "decoder_norm is 'l1', expected one of unit, free"),
        ({"normalize": "batch"}, "normalize is 'batch', expected one of none, constant, layer_norm, standardize"),
        ({"loss": "l1"}, "loss is 'l1', expected one of mse, fvu"),
        ({"aux_k": 0}, "aux_k is 0"),
        ({"aux_k": 31}, "aux_k is 31"),
        ({"aux_coef": -1.0}, "aux_coef is -1.0"),
        ({"aux_coef": float("nan")}, "aux_coef is nan"),
        ({"dead_after": 0}, "dead_after is 0"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings, message):
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(**{"d_in": 10, "d_sae": 30, "activation": TopK(4), **settings})


@pytest.mark.parametrize("k", [0, -1, 2.0, True, "4"])
def test_top_k_refuses_an_invalid_count(k):
    with pytest.raises(ValueError, match="expected a whole number of at least 1"):
        TopK(k)


def test_an_activation_is_read_back_from_its_config():
    assert activation_from_config(TopK(7).config()) == TopK(7)
    for bad in ({"kind": "jump"}, {"k": 4}, "topk", {"kind": "topk", "k": 4, "j": 1}):
        with pytest.raises(ValueError, match="activation"):
            activation_from_config(bad)


def test_bad_inputs_are_refused_by_name():
    sae = sae_for_test()
    cases = [
        (tokens(4, 9), ValueError, r"x has shape \(4, 9\), expected \(\*batch, 10\)"),
        (tokens(4, 10)[0], ValueError, r"pass its row as a batch, x\[None\]"),
        (torch.ones(4, 10, dtype=torch.int64), TypeError, "x has dtype torch.int64, expected a floating-point one"),
        (torch.ones(4, 10).numpy(), TypeError, r"x is a ndarray, expected a tensor: torch.as_tensor\(x\)"),
    ]
    for x, error, message in cases:
        for call in (sae, sae.encode):
            with pytest.raises(error, match=message):
                call(x)
    with pytest.raises(ValueError, match=r"target has shape \(5, 10\), expected \(4, 10\)"):
        sae(tokens(4, 10), target=tokens(5, 10))
    with pytest.raises(ValueError, match=r"target has shape \(4, 9\), expected \(\*batch, 10\)"):
        sae(tokens(4, 10), target=tokens(4, 9))
    with pytest.raises(ValueError, match="pass target="):
        sae_for_test(d_out=7, pre_bias=False)(tokens(4, 10))
    with pytest.raises(ValueError, match="how is 'mode'"):
        sae.init_from_(tokens(4, 10), how="mode")
    with pytest.raises(ValueError, match="is not finite"):
        sae.init_from_(tokens(0, 10))


@pytest.mark.parametrize("width", [1, 3, 12, 40, 768])
@pytest.mark.parametrize("rows", [1, 5, 16, 41, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_drawn_in_blocks_are_those_drawn_at_once(
    rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the generator ends where it would: what is drawn next is the same too."""
    monkeypatch.setattr(initial, "DRAWN", 64)
    at_once, in_blocks = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    drawn = torch.randn(rows, width, dtype=torch.promote_types(dtype, torch.float32), generator=at_once)
    whole = (drawn / torch.linalg.vector_norm(drawn, dim=1, keepdim=True)).to(dtype)
    assert torch.equal(initial.unit_rows(rows, width, dtype, in_blocks), whole)
    assert torch.equal(at_once.get_state(), in_blocks.get_state())
    first, own = rows // 3, rows - rows // 2
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(initial.unit_rows(rows, width, dtype, generator, first, own), whole[first : first + own])
