"""Every rule as a module: against the dense reference in float64, against hand-computed examples, and its refusals."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import reference
from fastsae.model.files import load, save
from fastsae.model.rules import ACTIVATIONS, activation_from_config
from tests.family_case import RULES, SHAPED, D, M, N, family_sae, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def dense(sae: fastsae.SparseAutoencoder, x: Tensor, target: Tensor | None = None, **more) -> tuple:
    """The dense forward of a copy of sae's parameters, and the copy."""
    params = {name: p.detach().clone().requires_grad_() for name, p in sae.named_parameters()}
    rule_state = {name: params.get(name, t.detach().clone()) for name, t in sae.rule_state.items()}
    settings = {"pre_bias": sae.pre_bias, "loss": sae.loss, "layers": sae.layers, "training": sae.training}
    return reference.forward(params, x, sae.activation, rule_state, target=target, **settings, **more), params


@pytest.mark.parametrize("settings", [
    {}, {"tied": True}, {"skip": True}, {"layers": 3}, {"loss": "fvu", "pre_bias": False},
    {"d_out": 9, "pre_bias": False, "skip": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", RULES)
def test_a_module_is_the_dense_reference(name: str, settings: dict) -> None:
    sae = family_sae(RULES[name], dead=False, **settings)
    x = tokens().requires_grad_()
    target = tokens(seed=5, width=sae.d_out) if sae.d_out != sae.d_in else None
    truth, params = dense(sae, copy := x.detach().clone().requires_grad_(), target)
    out = sae(x, target)
    assert set(out.losses) == set(truth.losses) - {"loss"}
    for part, value in out.losses.items():
        torch.testing.assert_close(value, truth.losses[part], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out.loss, truth.losses["loss"], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(out.recon, truth.recon, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.codes.to_dense(), truth.A, rtol=1e-12, atol=1e-12)
    out.codes.check()
    names = ["x", *params]
    got = torch.autograd.grad(out.loss, [x, *sae.parameters()], allow_unused=True)
    expected = torch.autograd.grad(truth.losses["loss"], [copy, *params.values()], allow_unused=True)
    for what, mine, theirs in zip(names, got, expected, strict=True):
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, what=what: f"{what}: {m}")


@pytest.mark.parametrize("weight", [0.4, 0.0, -0.4])
def test_a_driven_weight_of_either_sign_is_the_dense_reference(weight: float) -> None:
    """Its gradient reaches the encoder too; of a reward it has the other sign."""
    sae = family_sae(fastsae.JumpReLU(target_l0=20.0), dead=False, normalize="none").start_(tokens())
    sae.log_start.fill_(math.log(0.5))
    sae.log_coef.copy_(sae.log_start - math.log(2 - weight / 0.5))
    assert float(sae.penalty_weight) == pytest.approx(weight, abs=1e-12)
    truth, params = dense(sae, tokens())
    expected = torch.autograd.grad(truth.losses["loss"], list(params.values()))
    got = torch.autograd.grad(sae(tokens()).loss, list(sae.parameters()))
    for name, mine, theirs in zip(params, got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("name", RULES)
def test_inference_is_the_dense_reference_too(name: str) -> None:
    sae = family_sae(RULES[name], dead=False)
    for seed in range(3):
        sae(tokens(seed=seed))  # fills the running state of the rule
    sae.eval()
    truth, _ = dense(sae, tokens(seed=9))
    torch.testing.assert_close(sae.encode(tokens(seed=9)).to_dense(), truth.A, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae(tokens(seed=9)).recon, truth.recon, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_sizes_at_the_edge(name: str) -> None:
    sae = family_sae(RULES[name], dead=False)
    for n in (0, 1):
        out = sae(tokens(n))
        assert out.recon.shape == (n, D)
        assert math.isfinite(float(out.loss.detach()))
        out.loss.backward()
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    out = sae(tokens())
    if name == "abs_topk":  # for which the most negative are as good
        assert int(out.codes.nnz) == 5 * N
    else:
        assert int(out.codes.nnz) == 0
        torch.testing.assert_close(out.recon, sae.b_dec.detach().expand(N, D))
    with torch.no_grad():
        sae.b_enc.fill_(1e3)  # every latent fires: threshold rules need more capacity than they start with
    out = sae(tokens(3))
    truth, _ = dense(sae, tokens(3))
    torch.testing.assert_close(out.codes.to_dense(), truth.A)


@pytest.mark.parametrize("name", RULES)
def test_settings_and_state_come_back(tmp_path, name: str) -> None:
    rule = RULES[name]
    assert activation_from_config(rule.config()) == rule
    sae = family_sae(rule, dtype=torch.float32)
    sae(tokens().float())
    again = load(save(sae, tmp_path / "sae"))
    assert again.activation == rule
    assert again.config == sae.config
    for key, value in sae.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    assert torch.equal(again.eval().encode(tokens().float()).acts, sae.eval().encode(tokens().float()).acts)


def test_what_a_rule_learns_and_remembers_stays_float32() -> None:
    for rule in (RULES["jumprelu"], RULES["gated"], RULES["batch_topk"]):
        sae = fastsae.SparseAutoencoder(D, M, rule, dtype=torch.bfloat16, seed=0)
        sae(tokens().bfloat16()).loss.backward()
        names = [*rule.new_parameters(M), *rule.new_buffers()]
        before = {name: getattr(sae, name).detach().clone() for name in names}
        for moved in (sae, fastsae.SparseAutoencoder(D, M, rule, seed=0).to(torch.bfloat16), sae.half()):
            for name in names:
                assert getattr(moved, name).dtype == torch.float32, name
        for name, value in before.items():
            assert torch.equal(getattr(sae, name), value), f"{name} was rounded on the way"
    with pytest.raises(
        ValueError,
        match=r"rule_dtype is torch.bfloat16, expected torch.float32.*the small steps of JumpReLU's parameters",
    ):
        fastsae.SparseAutoencoder(D, M, RULES["jumprelu"], rule_dtype=torch.bfloat16)


# -- by hand ----------------------------------------------------------------------------------------------------------


def test_jump_relu_by_hand() -> None:
    """θ = 1, bandwidth .5: the band is (.75, 1.25)."""
    pre = torch.tensor([0.7, 0.9, 1.1, 3.0, -1.0], dtype=torch.float64, requires_grad=True)
    theta = torch.ones(5, dtype=torch.float64, requires_grad=True)
    acts = reference.jump_relu(pre, theta, 0.5)
    assert acts.tolist() == [0, 0, 1.1, 3.0, 0]
    dpre, dtheta = torch.autograd.grad(acts, (pre, theta), torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double())
    assert dpre.tolist() == [0, 0, 3, 4, 0]
    assert dtheta.tolist() == [0, -4, -6, 0, 0]  # -θ/ε · g = -2 g in the band
    count = reference.heaviside(pre, theta, 0.5)
    assert count.tolist() == [0, 0, 1, 1, 0]
    dpre, dtheta = torch.autograd.grad(count.sum(), (pre, theta), allow_unused=True)
    assert dpre is None
    assert dtheta.tolist() == [0, -2, -2, 0, 0]  # -1/ε


def test_gated_by_hand() -> None:
    gate = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)
    r_mag = torch.full((3,), math.log(2), dtype=torch.float64)
    acts = reference.gated(gate, torch.full_like(gate, 0.5), r_mag, torch.ones_like(gate))
    assert acts.tolist() == pytest.approx([0, 1, 4])  # 2·(gate - .5) + 1 where the gate is open


def test_group_max_by_hand() -> None:
    pre = torch.tensor([[1.0, 3.0, 2.0, 2.0, -1.0, -2.0]])
    assert reference.keep_group_max(pre, 3).tolist() == [[0, 3, 2, 0, 0, 0]]


def test_abs_top_k_by_hand() -> None:
    pre = torch.tensor([[1.0, -3.0, 2.0, -2.0, -1.0, 3.0], [0.0, 0.0, -1.0, 0.0, 0.0, 0.0]])
    kept = [[0, -3, 2, 0, 0, 3], [0, 0, -1, 0, 0, 0]]  # of 2 and -2 the lower index
    assert reference.keep_abs_top_k(pre, 3).tolist() == kept
    codes = fastsae.SparseAutoencoder(1, 6, fastsae.AbsTopK(3), pre_bias=False)
    with torch.no_grad():
        codes.encoder_weight.zero_()
        codes.b_enc.copy_(pre[0])
        assert codes.encode(torch.zeros(1, 1)).check().to_dense().tolist() == kept[:1]
        codes.b_enc.copy_(pre[1])
        assert codes.encode(torch.zeros(1, 1)).check().to_dense().tolist() == kept[1:]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_abs_top_k_with_ties_and_with_latents_that_are_no_number(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (33, 6), generator=generator).float()  # whole numbers: many magnitudes are equal
    sae = fastsae.SparseAutoencoder(6, 50, fastsae.AbsTopK(7), pre_bias=False)
    sae.backend = backend
    with torch.no_grad():
        sae.encoder_weight.copy_(torch.randint(-1, 2, (50, 6), generator=generator).float())
        sae.encoder_weight[[3, 20]] = math.nan
        x[5] = math.nan
        pre = x @ sae.encoder_weight.T
        got = sae.encode(x).check()
    torch.testing.assert_close(got.to_dense(), reference.keep_abs_top_k(pre, 7), rtol=0, atol=0, equal_nan=True)
    assert bool((got.acts < 0).any())
    assert bool((got.acts > 0).any())


def test_the_weighted_penalty_of_a_crosscoder_sums_the_layers_norms() -> None:
    """Two layers with rows of norm 3 and 4: weight 7, not 5."""
    W = torch.tensor([[3.0, 0.0, 0.0, 4.0]])
    assert reference.decoder_norms(W, 2).tolist() == [7]
    assert reference.decoder_norms(W).tolist() == [5]


def test_batch_topk_keeps_a_running_threshold() -> None:
    rule = fastsae.BatchTopK(1, decay=0.75)
    sae = fastsae.SparseAutoencoder(2, 2, rule, pre_bias=False)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
    assert float(sae.threshold) == -1
    sae(torch.tensor([[1.0, 3.0], [2.0, 0.0]])).loss.backward()  # the two largest: 3 and 2
    assert float(sae.threshold) == 2
    sae(torch.tensor([[4.0, 5.0], [2.0, 0.0]])).loss.backward()  # 5 and 4
    assert float(sae.threshold) == pytest.approx((0.75 * 2 + 4) / 1.75, rel=1e-6)
    assert sae.eval().encode(torch.tensor([[3.2, 3.1]])).to_dense().tolist() == [[pytest.approx(3.2), 0]]


def test_sampled_prefixes_change_with_the_batch_and_repeat_with_the_count() -> None:
    rule = RULES["matryoshka-sampled"]
    sae = family_sae(rule)
    ends = []
    for _ in range(20):
        ends.append(tuple(rule.ends(M, sae.rule_state, torch.device("cpu")).tolist()))
        sae(tokens()).loss.backward()
    assert all(end[-1] == M and list(end) == sorted(end) and end[0] >= 3 for end in ends)
    assert len(set(ends)) > 10
    sae.batches.fill_(4)
    assert tuple(rule.ends(M, sae.rule_state, torch.device("cpu")).tolist()) == ends[4]


COMPILED = ("batch_topk", "matryoshka", "hierarchical_topk")
LONGER = [pytest.param(name, "inductor", marks=pytest.mark.long) for name in COMPILED]


@pytest.mark.parametrize(("name", "backend"), [("batch_topk", "aot_eager"), *LONGER])
def test_compiles_without_a_break_where_sizes_are_fixed(name: str, backend: str) -> None:
    """The code that inductor makes takes seconds; for TopK test_trainers.py makes it."""
    sae = family_sae(RULES[name], dtype=torch.float32)
    x = tokens().float()
    expected = sae(x).loss
    run = torch.compile(sae, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(x).loss, expected, rtol=1e-5, atol=1e-6)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "message"), [
    (lambda: fastsae.BatchTopK(0), "BatchTopK has k = 0, expected a whole number of at least 1"),
    (lambda: fastsae.BatchTopK(3, decay=1.0), "decay = 1.0, expected less than 1"),
    (lambda: fastsae.ReLU(-1.0), "ReLU has l1 = -1.0, expected a number of at least 0"),
    (lambda: fastsae.ReLU(float("nan")), "ReLU has l1 = nan"),
    (lambda: fastsae.JumpReLU(threshold=0.0), "JumpReLU has threshold = 0.0, expected a number above 0"),
    (lambda: fastsae.JumpReLU(bandwidth=-1.0), "JumpReLU has bandwidth = -1.0"),
    (lambda: fastsae.JumpReLU(penalty_kind="l2"), "penalty_kind = 'l2', expected 'l0', 'tanh' or 'target'"),
    (lambda: fastsae.JumpReLU(penalty_kind="target"), "'target' needs a target_l0"),
    (lambda: fastsae.Gated(float("inf")), "Gated has l1 = inf"),
    (lambda: fastsae.Matryoshka(fastsae.ReLU(), groups=(M,)), "expected TopK or BatchTopK"),
    (lambda: fastsae.Matryoshka(fastsae.TopK(2)), "has neither groups nor sampled; give groups"),
    (lambda: fastsae.Matryoshka(fastsae.TopK(2), groups=(3, 37), sampled=2), "has both groups"),
    (lambda: fastsae.Matryoshka(fastsae.TopK(2), groups=(3, 0)), "groups = 0"),
    (lambda: fastsae.Matryoshka(fastsae.TopK(2), groups=(3, 37), weights=(1.0,)), "has 1 weights, expected one for"),
    (lambda: fastsae.HierarchicalTopK((4, 2)), r"ks = \(4, 2\), expected at least one, ascending"),
    (lambda: fastsae.HierarchicalTopK(()), "expected at least one, ascending"),
])  # fmt: skip
def test_bad_rules_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(("rule", "settings", "message"), [
    (fastsae.BatchTopK(M + 1), {}, f"k = {M + 1}, expected at most d_sae = {M}"),
    (fastsae.GroupMax(7), {}, f"k = 7 groups, expected a divisor of d_sae = {M}"),
    (fastsae.Matryoshka(fastsae.TopK(2), groups=(3, 4)), {}, f"groups that sum to 7, expected d_sae = {M}"),
    (fastsae.Matryoshka(fastsae.TopK(M + 1), groups=(M,)), {}, f"k = {M + 1}"),
    (fastsae.Matryoshka(fastsae.TopK(2), sampled=2, shortest=M + 1), {}, f"shortest = {M + 1}, expected at most d_sae"),
    (fastsae.HierarchicalTopK((2, M + 1)), {}, f"ks = {M + 1}, expected at most"),
    (fastsae.JumpReLU(penalty_kind="target", target_l0=M + 1.0), {}, f"target_l0 = {M + 1}"),
    (fastsae.TopK(2), {"tied": True, "d_out": D + 1, "pre_bias": False}, "tied weights need one width"),
    (fastsae.TopK(2), {"layers": 5}, "layers is 5, expected a divisor of d_in = 12"),
    (fastsae.TopK(2), {"init_norm": 0.0}, "init_norm is 0.0, expected a number above 0"),
    (fastsae.TopK(2), {"init_norm": 0.1, "tied": True}, "tied unit rows start at 1"),
    (fastsae.TopK(2), {"ghost": "scary"}, "ghost is 'scary', expected one of None, residual, pull"),
    (fastsae.TopK(2), {"ghost": "pull", "aux_k": 2}, "both revive dead latents"),
    (fastsae.TopK(2), {"ghost": "pull", "d_out": 5, "pre_bias": False}, "ghost='pull' turns encoder and decoder"),
    (fastsae.TopK(2), {"ghost_coef": -1.0}, "ghost_coef is -1.0"),
    (fastsae.TopK(2), {"skip": 1}, "skip is 1, expected True or False"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_settings_that_do_not_fit_are_refused_at_construction(rule, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastsae.SparseAutoencoder(D, M, rule, **settings)


def test_every_rule_is_tested_here() -> None:
    assert {rule.kind for rule in RULES.values()} == set(ACTIVATIONS)
    assert SHAPED


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("training", [False, True])
def test_some_latents_alone_have_the_acts_that_they_have_among_all(name: str, training: bool) -> None:
    sae = family_sae(RULES[name], dead=False).train(training)
    if isinstance(sae.activation, fastsae.BatchTopK) and not training:
        sae.calibrate_threshold_(tokens(100, seed=5))
    x = tokens().view(1, N, D)
    latents = torch.tensor([31, 0, M - 1, 7, 8, 12])
    whole = sae.encode(x).to_dense()
    some = sae.encode(x, latents=latents)
    assert some.check().d_sae == 6
    torch.testing.assert_close(some.to_dense(), whole[..., latents], rtol=1e-12, atol=1e-12)
    assert bool(some.acts.any())
    for dtype in (torch.uint8, torch.int16):
        torch.testing.assert_close(sae.encode(x, latents=latents.to(dtype)).to_dense(), some.to_dense(), rtol=0, atol=0)
    assert sae.encode(x, latents=[]).to_dense().shape == (1, N, 0)
    assert sae.encode(x[:, :0], latents=[3]).to_dense().shape == (1, 0, 1)

    weights = torch.randn(whole.shape, dtype=torch.float64)
    ours = torch.autograd.grad((some.to_dense() * weights[..., latents]).sum(), sae.encoder_weight)[0]
    theirs = torch.autograd.grad((whole[..., latents] * weights[..., latents]).sum(), sae.encoder_weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", ["relu", "topk"])
@pytest.mark.parametrize(("latents", "error", "message"), [
    ([0, M], ValueError, r"latents lie in \[0, 40\], expected \[0, 40\)"),
    ([-1], ValueError, r"latents lie in \[-1, -1\]"),
    ([3, 5, 3], ValueError, "latent 3 is given more than once"),
    ([0.5], TypeError, "latents have dtype torch.float64, expected integers"),
    ([True] * M, TypeError, "expected integers; for a mask,"),
    ([[1, 2]], ValueError, r"latents have shape \(1, 2\), expected \(n,\)"),
])  # fmt: skip
def test_latents_that_there_are_not(rule: str, latents: list, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        family_sae(RULES[rule]).encode(tokens(), latents=latents)
