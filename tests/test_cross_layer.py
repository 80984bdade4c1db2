"""CrossLayerTranscoder against the formula written out densely."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastsae import CrossLayerTranscoder

L, N, D, D_OUT, M, K = 3, 17, 6, 5, 20, 2


def transcoder(dtype: torch.dtype = torch.float64, k: int = K) -> CrossLayerTranscoder:
    """All parameters in general position; the decoders' norms differ widely, so that the choice depends on them."""
    made = CrossLayerTranscoder(L, D, M, k, d_out=D_OUT, dtype=dtype, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for bias in (*made.b_enc, made.b_dec):
            bias.copy_(0.1 * torch.randn(bias.shape, generator=generator, dtype=torch.float64))
        for W in made.W_dec:
            W.mul_(torch.rand(M, 1, generator=generator, dtype=torch.float64).mul(3).exp())
    return made


def inputs(n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(L, n, D, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(L, n, D_OUT, generator=generator, dtype=torch.float64).to(dtype)


def dense(made: CrossLayerTranscoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """A (N, L·M) and the reconstruction (L, N, d_out), by dense products and a loop over pairs of layers."""
    pre = torch.cat([torch.relu(x[i] @ made.W_enc[i].T + made.b_enc[i]) for i in range(L)], -1)
    norms = torch.cat([W.square().sum(-1).sqrt() for W in made.W_dec])
    best = (pre * norms).detach().sort(dim=-1, descending=True, stable=True).indices[:, : L * made.k]
    A = torch.zeros_like(pre).scatter(-1, best, pre.gather(-1, best))
    recon = made.b_dec.view(L, 1, D_OUT).expand(-1, x.shape[1], -1).clone()
    for source in range(L):
        for target in range(source, L):
            block = made.W_dec[source].view(M, L - source, D_OUT)[:, target - source]
            recon[target] = recon[target] + A[:, source * M : (source + 1) * M] @ block
    return A, recon


def test_by_hand() -> None:
    """Two layers of two latents, one input; the smaller act wins, as its decoder's norm is five times the other's."""
    made = CrossLayerTranscoder(2, 1, 2, 1, dtype=torch.float64)
    with torch.no_grad():
        made.W_enc[0].copy_(torch.tensor([[1.0], [-1.0]]))
        made.W_enc[1].copy_(torch.tensor([[2.0], [0.5]]))
        made.W_dec[0].copy_(torch.tensor([[3.0, 4.0], [1.0, 1.0]]))
        made.W_dec[1].copy_(torch.tensor([[1.0], [1.0]]))
        made.b_dec.copy_(torch.tensor([0.0, 10.0]))
    out = made(torch.ones(2, 1, 1, dtype=torch.float64), torch.zeros(2, 1, 1, dtype=torch.float64))
    # Scores: 1·5, -, 2·1, .5·1; layers · k = 2 are kept: act 1 of layer 0 and act 2 of layer 1.
    assert [c.to_dense().tolist() for c in out.codes] == [[[1, 0]], [[2, 0]]]
    assert out.recon.flatten().tolist() == [3, 10 + 4 + 2]
    assert out.loss.item() == 3**2 + 16**2


@pytest.mark.parametrize("k", [1, K, M])
def test_it_is_the_dense_formula(k: int) -> None:
    made, (x, target) = transcoder(k=k), inputs()
    out = made(x, target)
    A, recon = dense(made, x)
    torch.testing.assert_close(torch.cat([c.check().to_dense() for c in out.codes], -1), A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.recon, recon, rtol=1e-11, atol=1e-11)
    loss = (recon - target).square().sum((0, 2)).mean()
    torch.testing.assert_close(out.loss, loss, rtol=1e-11, atol=0)
    ours = torch.autograd.grad(out.loss, list(made.parameters()))
    theirs = torch.autograd.grad(loss, list(made.parameters()))
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_float32_on_the_cpu_backend_chooses_the_same_latents() -> None:
    made, (x, _) = transcoder(torch.float32), inputs(300, torch.float32)
    got = torch.cat([c.to_dense() for c in made.encode(x)], -1)
    expected, _ = dense(made.double(), x.double())
    same = (got != 0) == (expected != 0)
    assert float(same.all(-1).float().mean()) > 0.99  # two scores may be as close as float32 can tell
    torch.testing.assert_close(got.double()[same.all(-1)], expected[same.all(-1)], rtol=1e-4, atol=1e-5)


def test_batches_of_any_shape_and_of_no_token() -> None:
    made, (x, target) = transcoder(), inputs(12)
    out = made(x.view(L, 3, 4, D), target.view(L, 3, 4, D_OUT))
    assert out.recon.shape == (L, 3, 4, D_OUT)
    assert out.codes[0].batch_shape == (3, 4)
    torch.testing.assert_close(out.recon.view(L, 12, D_OUT), made(x, target).recon)
    torch.testing.assert_close(made.decode(out.codes), out.recon)
    empty = made(x[:, :0], target[:, :0])
    assert empty.loss.item() == 0
    assert empty.recon.shape == (L, 0, D_OUT)
    empty.loss.backward()


def test_a_token_that_is_no_number_gives_none_and_leaves_the_others() -> None:
    made, (x, target) = transcoder(), inputs()
    clean = made(x, target).recon
    x = x.clone()
    x[0, 3] = math.nan
    recon = made(x, target).recon
    assert bool(recon[:, 3].isnan().all())
    others = torch.arange(N) != 3
    torch.testing.assert_close(recon[:, others], clean[:, others])


def test_the_state_records_the_settings() -> None:
    made, again = transcoder(), CrossLayerTranscoder(L, D, M, K, d_out=D_OUT, dtype=torch.float64)
    again.load_state_dict(made.state_dict())
    x, target = inputs()
    assert torch.equal(again(x, target).recon, made(x, target).recon)
    with pytest.raises(ValueError, match=r"k \(got 2, expected 1\)"):
        CrossLayerTranscoder(L, D, M, 1, d_out=D_OUT, dtype=torch.float64).load_state_dict(made.state_dict())


@pytest.mark.parametrize(("settings", "message"), [
    ({"layers": 0}, "layers is 0, expected a whole number of at least 1"),
    ({"k": M + 1}, "k is 21, expected at most d_sae = 20"),
    ({"d_in": 2.5}, "d_in is 2.5, expected a whole number"),
    ({"seed": "x"}, "seed is 'x'"),
])  # fmt: skip
def test_settings_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossLayerTranscoder(**{"layers": L, "d_in": D, "d_sae": M, "k": K, **settings})


def test_inputs_that_do_not_fit() -> None:
    made, (x, target) = transcoder(), inputs()
    with pytest.raises(ValueError, match=r"x has shape \(17, 3, 6\), expected \(3, \*batch, 6\), layers first"):
        made.encode(x.transpose(0, 1))
    with pytest.raises(ValueError, match=r"target has shape \(3, 16, 5\), expected \(3, 17, 5\)"):
        made(x, target[:, 1:])
    with pytest.raises(ValueError, match="got the codes of 2 layers, expected 3"):
        made.decode(made.encode(x)[:2])
