"""What losses are divided by, and AuxK, against hand-computed numbers and dense arithmetic."""

from __future__ import annotations

import pytest
import torch

from fastsae import reference
from fastsae.model import losses
from fastsae.model.dense import _column_counts
from fastsae.ops.sums import fixed_sum
from tests.dense_sae import DenseSAE, sae_for_test, tokens

TARGET = torch.tensor([[0.0, 2.0], [3.0, 1.0]])


def test_denominators_by_hand():
    # The mean target is (1.5, 1.5): deviations 2.25 + .25 + 2.25 + .25.
    assert losses.loss_denominator("mse", TARGET) == 2
    assert float(losses.loss_denominator("fvu", TARGET)) == 5.0


def test_leading_dimensions_are_tokens():
    x = tokens(24, 6, 1)
    for loss in losses.LOSSES:
        in_four, flat = losses.loss_denominator(loss, x.view(2, 3, 4, 6)), losses.loss_denominator(loss, x)
        torch.testing.assert_close(in_four, flat)


def test_variance_far_from_the_origin_is_not_lost():
    x = tokens(3000, 8, 3)
    shifted = (x + 1000.0).float()
    expected = (shifted.double() - shifted.double().mean(0)).square().sum()
    torch.testing.assert_close(losses.total_variance(shifted).double(), expected, rtol=1e-4, atol=0)


def test_narrow_dtypes_are_summed_in_float32():
    x = torch.ones(4096, 64, dtype=torch.bfloat16)
    x[::2] = -1
    total = losses.total_variance(x)
    assert total.dtype == torch.float32
    assert float(total) == 4096 * 64


@pytest.mark.parametrize("sum_of", [losses.sum_of_squares, losses.total_variance])
def test_sums_do_not_depend_on_the_number_of_threads(sum_of):
    x = tokens(50_000, 3, 4) * torch.logspace(-4, 4, 50_000, dtype=torch.float64)[:, None]
    threads = torch.get_num_threads()
    try:
        for t in (x, x.float()):
            sums = []
            for n in (1, 2, 3):
                torch.set_num_threads(n)
                sums.append(float(sum_of(t)))
            assert len(set(sums)) == 1, sums
    finally:
        torch.set_num_threads(threads)


def test_batches_of_no_token_and_of_one():
    assert losses.loss_denominator("mse", torch.zeros(0, 3)) == 1
    for n in (0, 1):
        with pytest.raises(ValueError, match=f"got {n} tokens, expected at least 2"):
            losses.loss_denominator("fvu", torch.zeros(n, 3))
    with pytest.raises(ValueError, match="loss is 'l1', expected one of mse, fvu"):
        losses.loss_denominator("l1", TARGET)


@pytest.mark.parametrize("dead", [[], [0], [6], [1, 2, 5], list(range(7))])
def test_dead_rows_list_the_dead_then_minus_one(dead):
    mask = torch.zeros(7, dtype=torch.bool)
    mask[dead] = True
    rows = losses.dead_rows(mask)
    assert rows.dtype == torch.int32
    assert rows.tolist() == dead + [-1] * (7 - len(dead))


def test_aux_weight_grows_with_the_number_of_dead_latents():
    mask = torch.zeros(10, dtype=torch.bool)
    seen = []
    for n in range(6):
        mask[:n] = True
        seen.append(float(losses.aux_weight(mask.sum(), 4)))
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("n_dead", [1, 3, 15])
def test_encode_dead_is_a_dense_top_k_of_the_dead(n_dead):
    sae = sae_for_test()
    x = tokens(20, 10)
    dead = torch.zeros(30, dtype=torch.bool)
    dead[torch.randperm(30, generator=torch.Generator().manual_seed(4))[:n_dead]] = True
    codes = losses.encode_dead(x, sae.W_enc, sae.b_enc, dead, 5)
    pre = reference.pre_acts(x, sae.W_enc, sae.b_enc)
    torch.testing.assert_close(codes.to_dense(), reference.keep_top_k(torch.where(dead, pre, 0), 5))
    codes.check()


def test_encode_dead_returns_none_without_dead_latents_on_a_cpu():
    sae = sae_for_test()
    assert losses.encode_dead(tokens(4, 10), sae.W_enc, sae.b_enc, torch.zeros(30, dtype=torch.bool), 5) is None


@pytest.mark.parametrize("loss", ["mse", "fvu"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pre_bias", [False, True])
def test_aux_k_trains_every_parameter_as_dense_autograd_does(loss, tied, pre_bias):
    """AuxK also trains the encoder and, through the pre-bias, b_dec. The error is held constant."""
    sae = sae_for_test(aux_k=6, aux_coef=0.7, dead_after=1000, loss=loss, tied=tied, pre_bias=pre_bias, d_sae=60, k=3)
    sae.tokens_since_fired[::2] = 1000
    dense = DenseSAE(sae)
    x = tokens(16, 10)
    out, truth = sae(x), dense.losses(x)
    assert float(truth["aux"].detach()) > 0
    torch.testing.assert_close(out.losses["aux"], truth["aux"], rtol=1e-10, atol=0)
    out.losses["aux"].backward()
    truth["aux"].backward()
    for name, p in sae.named_parameters():
        expected = dense.params[name].grad
        expected = torch.zeros_like(p) if expected is None else expected
        got = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13, msg=lambda text, name=name: f"{name}: {text}")
    encoder = sae.W_dec if tied else sae.W_enc
    assert float(encoder.grad[::2].abs().max()) > 0
    assert (float(sae.b_dec.grad.abs().max()) > 0) if pre_bias else sae.b_dec.grad is None


def test_aux_k_formula_is_the_reference():
    """More latents are dead than AuxK has slots, so its weight is 1. The truth is written with fastsae.reference."""
    sae = sae_for_test(pre_bias=True)
    x = tokens(20, 10)
    dead = torch.arange(30) % 3 == 0
    params = {name: p.detach() for name, p in sae.named_parameters()}
    pre = reference.pre_acts(x - params["b_dec"], params["W_enc"], params["b_enc"])
    A = reference.keep_top_k(torch.where(dead, pre, 0), 5)
    missed = x - reference.forward(params, x, sae.activation).recon
    truth = (reference.decode(A, params["W_dec"]) - missed).square().sum() / 20
    codes = losses.encode_dead(x - sae.b_dec, sae.W_enc, sae.b_enc, dead, 5)
    error = sae(x).recon - x
    got = losses.aux_k(codes, sae.W_dec, error, losses.aux_weight(dead.sum(), 5), 20)
    torch.testing.assert_close(got.detach(), truth, rtol=1e-10, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (1, 5), (1, 70_000), (3, 7), (400, 301)], ids=str)
def test_a_fixed_sum_has_the_same_bits_for_any_number_of_threads(shape: tuple[int, int]) -> None:
    t = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).requires_grad_()
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            found.append(fixed_sum(t))
    finally:
        torch.set_num_threads(threads)
    assert len({float(one) for one in found}) == 1
    exact = t.detach().double()
    assert abs(float(found[0]) - float(exact.sum())) <= 1e-6 * float(exact.abs().sum())
    found[0].backward()
    assert t.grad is not None
    assert torch.equal(t.grad, torch.ones_like(t))


@pytest.mark.parametrize("rows", [0, 1, 255, 256, 600])
def test_columns_are_counted_beyond_what_a_byte_holds(rows: int) -> None:
    mask = torch.rand(rows, 5, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[:, 0] = True
    mask[:, 1] = False
    assert torch.equal(_column_counts(mask), mask.long().sum(0))
