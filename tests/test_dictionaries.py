"""fastsae.optim over parameters of other modules, in either layout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae import ops
from fastsae.ops.ledger import LedgerGradient
from tests.family_case import RULES, family_sae, tokens
from tests.test_optim import adam

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("names", [("W_enc",), ("W_dec",), ("W_enc", "W_dec")])
def test_dictionaries_stored_transposed(names: tuple[str, ...], moments: str) -> None:
    """The same steps as those of (M, D) parameters, to the bit; what is seen has the parameter's own shape."""
    sae = family_sae(RULES["topk"], pre_bias=False, decoder_norm="unit")
    given = {name: getattr(sae, name).detach().float() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    kept = {name: p.clone().requires_grad_() for name, p in given.items()}
    turned = {
        name: nn.Parameter(p.t().contiguous()) if name in names else nn.Parameter(p.clone())
        for name, p in given.items()
    }
    settings = {"moments": moments, "clip_norm": 0.1}
    straight = adam(fastsae.optim.Dictionaries(**kept, decoder_norm="unit"), **settings)
    other = adam(fastsae.optim.Dictionaries(**turned, decoder_norm="unit", transposed=names), **settings)
    rows = {name: p.t() if name in names else p for name, p in turned.items()}
    for i in range(3):
        x = tokens(seed=i).float()
        if i == 2:  # other code gave a parameter other memory
            turned[names[0]].data = turned[names[0]].data.contiguous().clone()
            fastsae.optim.Dictionaries(**turned, transposed=names).rows  # noqa: B018
        for found in (kept, turned):
            W = {k: p.t() if p is turned.get(k) and k in names else p for k, p in found.items()}
            recon = ops.decode(ops.encode_topk(x, W["W_enc"], W["b_enc"], 5), W["W_dec"]) + W["b_dec"]
            loss = (recon - x).square().sum(-1).mean() + 0.01 * found["W_dec"].square().sum()
            loss.backward()
            for name, p in found.items():
                assert isinstance(p.grad, LedgerGradient), name
                assert p.grad.shape == p.shape
        for name in names:
            assert turned[name].grad is not None
            assert kept[name].grad is not None
            assert torch.equal(turned[name].grad.to_dense().t(), kept[name].grad.to_dense())
        norms = [nn.utils.clip_grad_norm_(list(found.values()), 1.0) for found in (kept, turned)]
        assert torch.equal(*norms)
        straight.step()
        other.step()
        rows = {name: p.t() if name in names else p for name, p in turned.items()}
        for name, p in kept.items():
            assert torch.equal(rows[name], p), name
    state = other.state[turned[names[0]]]
    assert state["exp_avg"].shape == turned[names[0]].shape
    other.forget_rows_(other._members[0].dictionaries, torch.tensor([2]))
    assert not state["exp_avg"].float()[:, 2].any()
    assert state["exp_avg"].float()[:, 3].any()


def test_autograd_grad_reaches_transposed_parameters() -> None:
    sae = family_sae(RULES["topk"], pre_bias=False, decoder_norm="free")
    W_enc, W_dec = (nn.Parameter(p.detach().t().contiguous()) for p in (sae.W_enc, sae.W_dec))
    for p in (W_enc, W_dec):
        p.data = p.data.t().contiguous().t()
    b_enc, b_dec = (nn.Parameter(p.detach().clone()) for p in (sae.b_enc, sae.b_dec))

    def grads() -> tuple[Tensor, ...]:
        recon = ops.decode(ops.encode_topk(tokens(), W_enc.t(), b_enc, 5), W_dec.t()) + b_dec
        return torch.autograd.grad(recon.square().sum(), (W_enc, W_dec))

    plain_ones = grads()
    optimizer = adam(fastsae.optim.Dictionaries(W_enc, W_dec, b_enc, b_dec, transposed=("W_enc", "W_dec")))
    for mine, truth in zip(grads(), plain_ones, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11)
    del optimizer
