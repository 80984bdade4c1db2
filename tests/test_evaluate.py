"""evaluate against dense arithmetic, in blocks, and on bad rows."""

import json
import math

import pytest
import torch

from fastsae.codes import SparseCodes
from fastsae.model.rules import TopK
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.evaluate import active_entries, density_histogram, evaluate

D, M, K, N = 12, 40, 4, 101


@pytest.fixture
def sae() -> SparseAutoencoder:
    return SparseAutoencoder(D, M, TopK(K), seed=0)


def rows(n: int = N, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    # A mean far larger than the spread in one dimension: the variance must not be lost by cancellation.
    return torch.randn(n, D, generator=generator) + torch.tensor([3000.0] + [1.0] * (D - 1))


def test_every_number_against_dense_arithmetic(sae):
    x = rows()
    result = evaluate(sae, x, batch_size=17)
    with torch.no_grad():
        recon = sae(x).recon.double()
        dense = sae.encode(x).to_dense()
    truth = x.double()
    sse = (recon - truth).square().sum()
    assert result.n_tokens == N
    assert result.mse == pytest.approx(float(sse / N), rel=1e-6)
    assert result.fvu == pytest.approx(float(sse / (truth - truth.mean(0)).square().sum()), rel=1e-6)
    assert result.cosine == pytest.approx(float(torch.cosine_similarity(recon, truth).mean()), rel=1e-6)
    assert result.norm_ratio == pytest.approx(float((recon.norm(dim=1) / truth.norm(dim=1)).mean()), rel=1e-6)
    assert result.explained_variance == pytest.approx(1 - result.fvu)
    apart = (truth - truth.mean(0)).square().sum(1)
    per_token = ((recon - truth).square().sum(1) / apart).mean()
    assert result.fvu_per_token == pytest.approx(float(per_token), rel=1e-6)
    assert result.explained_variance_per_token == pytest.approx(1 - float(per_token), rel=1e-6)
    density = (dense != 0).double().mean(0)
    torch.testing.assert_close(result.density, density)
    assert result.l0 == pytest.approx(float(density.sum()))
    assert result.dead_share == pytest.approx(float((density == 0).double().mean()))
    assert sum(result.density_histogram.counts) + result.density_histogram.never == M


@pytest.mark.parametrize("batch_size", [1, 7, 4096])
def test_batches_and_blocks_do_not_change_the_result(sae, batch_size):
    x = rows()
    whole = evaluate(sae, x, batch_size=N)
    blocks = evaluate(sae, iter([x[:13], x[13:13], x[13:].reshape(8, 11, D)]), batch_size=batch_size)
    assert blocks.n_tokens == whole.n_tokens
    assert blocks.mse == pytest.approx(whole.mse, rel=1e-6)
    assert blocks.fvu == pytest.approx(whole.fvu, rel=1e-6)
    assert torch.equal(blocks.density, whole.density)
    assert math.isnan(blocks.fvu_per_token), "an iterator cannot be read for the mean first"
    assert blocks.to_json()["fvu_per_token"] is None
    listed = evaluate(sae, [x[:13], x[13:]], batch_size=batch_size)
    assert listed.fvu_per_token == pytest.approx(whole.fvu_per_token, rel=1e-6)


def test_the_module_is_left_as_it_was(sae):
    fired = sae.tokens_since_fired.clone()
    for training in (True, False):
        sae.train(training)
        evaluate(sae, rows())
        assert sae.training is training
    assert torch.equal(sae.tokens_since_fired, fired)
    assert sae.W_dec.grad is None


def test_bf16_rows_and_layer_norm():
    sae = SparseAutoencoder(D, M, TopK(K), normalize="layer_norm", seed=0)
    x = rows().bfloat16()
    result = evaluate(sae, x)
    with torch.no_grad():
        error = (sae(x.float()).recon.double() - x.double()).square().sum()
    assert result.mse == pytest.approx(float(error / N), rel=1e-6)


def test_transcoder_targets():
    sae = SparseAutoencoder(D, M, TopK(K), d_out=5, pre_bias=False, seed=0)
    x, y = rows(), torch.randn(N, 5, generator=torch.Generator().manual_seed(3))
    result = evaluate(sae, x, targets=y, batch_size=20)
    with torch.no_grad():
        error = (sae(x, y).recon.double() - y.double()).square().sum()
    assert result.mse == pytest.approx(float(error / N), rel=1e-6)
    with torch.no_grad():
        squares = (sae(x, y).recon.double() - y.double()).square().sum(1)
    per_token = (squares / (y - y.mean(0)).double().square().sum(1)).mean()
    assert result.fvu_per_token == pytest.approx(float(per_token), rel=1e-5)
    with pytest.raises(ValueError, match="expected a target for every row"):
        evaluate(sae, x, targets=y[:50], batch_size=20)


def test_edge_rows(sae):
    same = evaluate(sae, torch.ones(3, D))
    assert math.isnan(same.fvu)
    assert same.to_json()["fvu"] is None
    zero = evaluate(sae, torch.zeros(2, D))
    assert math.isnan(zero.norm_ratio)
    assert zero.cosine == 0
    for empty in (torch.empty(0, D), []):
        with pytest.raises(ValueError, match="no rows"):
            evaluate(sae, empty)
    for one in (torch.ones(D), [torch.ones(2, D), torch.ones(D)]):
        with pytest.raises(ValueError, match=r"rows have shape \(12,\), expected \(\.\.\., D\)"):
            evaluate(sae, one)


def test_empty_blocks_change_nothing(sae):
    x, y = rows(), rows().flip(0)
    blocks = [x[:5], x[:0], x[5:]]
    expected = evaluate(sae, x, targets=y)
    got = evaluate(sae, blocks, targets=[y[:0], y[:5], y[5:]], batch_size=5)
    assert (got.n_tokens, got.mse, got.l0) == pytest.approx((expected.n_tokens, expected.mse, expected.l0), rel=1e-9)
    assert evaluate(sae, blocks).fvu_per_token == pytest.approx(evaluate(sae, x).fvu_per_token, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_named(sae, bad):
    x = rows()
    x[37, 2] = bad
    with pytest.raises(ValueError, match="row 37"):
        evaluate(sae, x, batch_size=10)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(sae, x, batch_size=0)


def test_json_round_trip(sae, tmp_path):
    result = evaluate(sae, rows())
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert record["fvu"] == result.fvu
    assert "density" not in record
    assert result.to_json(with_density=True)["density"] == result.density.tolist()
    result.write(tmp_path / "eval.json", step=7)
    assert json.loads((tmp_path / "eval.json").read_text())["step"] == 7


def test_histogram_bins_exact_powers_and_the_ends():
    density = torch.tensor([0.0, 1e-3, 1e-2, 1e-1, 1.0, 0.5, 0.002], dtype=torch.float64)
    histogram = density_histogram(density, n_tokens=1000, bins_per_decade=1)
    assert histogram.edges == (-3.0, -2.0, -1.0, 0.0)
    assert histogram.counts == (2, 1, 3)
    assert histogram.never == 1
    one = density_histogram(torch.tensor([0.0, 1.0]), n_tokens=1)
    assert (sum(one.counts), one.never) == (1, 1)


def test_active_entries_of_both_layouts():
    dense = torch.tensor([[0.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, math.nan]])
    for k in (2, None):
        token, latent, act = active_entries(SparseCodes.from_dense(dense, k))
        assert token.tolist() == [0, 0, 2, 2]
        assert latent.tolist() == [1, 3, 0, 3]
        torch.testing.assert_close(act, torch.tensor([2.0, 1.0, 3.0, math.nan]), equal_nan=True)
