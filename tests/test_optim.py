"""fastsae.optim in anybody's loop: the gradients are torch's, whatever the loss; the optimizers behave as torch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastsae
from fastsae import ops
from fastsae.ops.ledger import LedgerGradient
from tests.family_case import RULES, D, N, family_sae, tokens

pytestmark = pytest.mark.usefixtures("one_thread")


def both(rule: str, **settings: Any) -> tuple[fastsae.SparseAutoencoder, fastsae.SparseAutoencoder]:
    """An SAE for a fastsae optimizer and its copy for torch's."""
    sae = family_sae(RULES[rule], **settings)
    return sae, copy.deepcopy(sae)


def torch_step(sae: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None) -> None:
    """What a torch loop does with an SAE after backward()."""
    saes = [m for m in sae.modules() if isinstance(m, fastsae.SparseAutoencoder)]
    for one in saes:
        one.project_gradients_()
    if clip is not None:
        nn.utils.clip_grad_norm_(sae.parameters(), clip)
    optimizer.step()
    for one in saes:
        one.normalize_decoder_()
    optimizer.zero_grad()


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(
            ours.state_dict()[name], value, rtol=1e-9, atol=1e-11, msg=lambda text, n=name: f"{n}: {text}"
        )


def adam(sae: Any, **settings: Any) -> fastsae.optim.Adam:
    return fastsae.optim.Adam(sae, lr=1e-2, eps=1e-4, **settings)


def torch_adam(sae: nn.Module) -> torch.optim.Adam:
    return torch.optim.Adam(sae.parameters(), lr=1e-2, eps=1e-4)


# -- the gradients are torch's ----------------------------------------------------------------------------------------


def plain(sae: fastsae.SparseAutoencoder, x: Tensor) -> Tensor:
    return sae(x).loss


def behind(sae: fastsae.SparseAutoencoder, x: Tensor) -> Tensor:
    """A loss of the reconstruction alone."""
    return sae(x).recon.sin().square().sum()


def penalised(sae: fastsae.SparseAutoencoder, x: Tensor) -> Tensor:
    out = sae(x)
    return out.loss + 0.1 * out.codes.acts.abs().sum() + 0.2 * out.recon.cos().sum()


def acts_alone(sae: fastsae.SparseAutoencoder, x: Tensor) -> Tensor:
    return sae.encode(x).acts.square().sum()


def by_hand(sae: fastsae.SparseAutoencoder, x: Tensor) -> Tensor:
    """Encode and decode by the methods, a loss of one's own."""
    return (sae.decode(sae.encode(x), like=x) - x).abs().sum()


def of_weights(sae: fastsae.SparseAutoencoder, x: Tensor) -> Tensor:
    return sae(x).loss + sae.W_dec.pow(3).sum() + sae.b_enc.sin().sum() + sae.b_dec.pow(2).sum()


def ops_alone(sae: fastsae.SparseAutoencoder, x: Tensor) -> Tensor:
    """Inputs with and without the pre-bias, in one graph, and a decoder of a code that no encoder made."""
    codes = ops.encode_topk(x, sae.encoder_weight, sae.b_enc, 3)
    centred = ops.encode_topk(x - sae.b_dec, sae.encoder_weight, sae.b_enc, 3)
    fixed = ops.decode(centred.detach(), sae.W_dec)
    return ((ops.decode(codes, sae.W_dec) - x).square() + ops.decode(centred, sae.W_dec).sin() + fixed.cos()).sum()


LOSSES: list[Callable[..., Tensor]] = [plain, behind, penalised, acts_alone, by_hand, of_weights, ops_alone]


# Every rule with every loss, and each of both with every setting; the other halves of the pairs are long.
SETTINGS: list[dict[str, Any]] = [{}, {"decoder_norm": "unit", "tied": True, "skip": True}]
TRIPLES = [
    pytest.param(rule, settings, loss, marks=[pytest.mark.long] if (i + j + n) % 2 else [],
                 id=f"{rule}-{settings}-{loss.__name__}")
    for i, rule in enumerate(RULES) for j, settings in enumerate(SETTINGS) for n, loss in enumerate(LOSSES)
]  # fmt: skip


@pytest.mark.parametrize(("rule", "settings", "loss"), TRIPLES)
def test_any_loss_trains_as_with_torchs_adam(rule: str, settings: dict, loss: Callable[..., Tensor]) -> None:
    """Two steps: the second one's moments come from the first one's gradients."""
    ours, theirs = both(rule, aux_k=3, **settings)
    optimizer, truth = adam(ours), torch_adam(theirs)
    for i in range(2):
        for sae in (ours, theirs):
            loss(sae, tokens(seed=i)).backward()
        assert all(isinstance(p.grad, LedgerGradient) for name, p in ours.named_parameters() if name == "W_dec")
        for name, p in theirs.named_parameters():
            mine = ours.get_parameter(name).grad
            if p.grad is not None and isinstance(mine, LedgerGradient):
                torch.testing.assert_close(mine.to_dense(), p.grad, rtol=1e-9, atol=1e-11)
        optimizer.step()
        assert all(p.grad is None for p in ours.parameters())
        for p in theirs.parameters():  # torch leaves a parameter without a gradient alone, and here it has one of 0
            p.grad = torch.zeros_like(p) if p.grad is None and p is not theirs.W_skip else p.grad
        torch_step(theirs, truth)
        assert_same(ours, theirs)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("rule", ["topk", "batch_topk", "jumprelu", "matryoshka", "gated"])
def test_an_sae_inside_a_model_passes_its_gradient_on(rule: str, backend: str | None) -> None:
    """Two SAEs and a layer in one graph; x's gradient flows through both."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = family_sae(RULES[rule]), family_sae(RULES[rule], decoder_norm="unit")
            self.layer = nn.Linear(D, D).double()
            self.first.backend = self.second.backend = backend

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            second = self.second(self.layer(first.recon).tanh())
            return first.loss + second.loss + second.recon.square().sum()

    torch.manual_seed(0)
    ours = Model()
    theirs = copy.deepcopy(ours)
    optimizers = [adam([ours.first, {"params": ours.second, "lr": 2e-2}]), torch_adam(ours.layer)]
    truth = torch.optim.Adam(
        [
            {"params": [*theirs.first.parameters(), *theirs.layer.parameters()]},
            {"params": theirs.second.parameters(), "lr": 2e-2},
        ],
        lr=1e-2,
        eps=1e-4,
    )
    for i in range(3):
        inputs = [tokens(seed=i).requires_grad_() for _ in range(2)]
        for model, x in zip((ours, theirs), inputs, strict=True):
            model(x).backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        torch_step(theirs, truth)
        assert_same(ours, theirs)


@pytest.mark.parametrize("rule", RULES)
def test_the_loop_gives_the_bits_of_the_fused_step(rule: str) -> None:
    """dense_above=1: the sparse way, which a loop always goes."""
    one = family_sae(RULES[rule], dtype=torch.float32, aux_k=3)
    other = copy.deepcopy(one)
    step = fastsae.FusedTrainStep(one, lr=1e-2, dense_above=1.0)
    optimizer = fastsae.optim.Adam(other, lr=1e-2)
    for i in range(4):
        x = tokens(seed=i).float()
        metrics, out = step(x), other(x)
        out.loss.backward()
        optimizer.step()
        assert float(metrics["loss"]) == pytest.approx(float(out.loss.detach()), rel=1e-6)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(one.fired, other.fired)


# -- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["topk", "relu", "matryoshka-sampled", "jumprelu-tanh"])
@pytest.mark.parametrize("limit", [2**30, 1])
def test_microbatches_add_up(rule: str, limit: int, monkeypatch) -> None:
    """limit: bytes of terms from which on those of earlier passes are turned into dense gradients."""
    monkeypatch.setattr(fastsae.ops.ledger.Ledger, "most_bytes", limit)
    ours, theirs = both(rule, aux_k=3)
    optimizer, truth = adam(ours), torch_adam(theirs)
    for i in range(2):
        for part in range(4):
            x = tokens(n=9, seed=10 * i + part)
            for sae in (ours, theirs):
                (sae(x).loss / 4).backward()
            if part == 2:
                earlier = list(optimizer._members[0].ledger.terms)
        ledger = optimizer._members[0].ledger
        kept = [term for term in earlier if any(term is other for other in ledger.terms)]
        assert earlier
        assert ledger.terms
        assert kept == ([] if limit == 1 else earlier)
        optimizer.step()
        torch_step(theirs, truth)
        assert_same(ours, theirs)


def test_decoders_alone_are_within_the_limit_of_memory(monkeypatch) -> None:
    monkeypatch.setattr(fastsae.ops.ledger.Ledger, "most_bytes", 1)
    ours, theirs = both("topk")
    optimizer, truth = adam(ours), torch_adam(theirs)
    for seed in range(3):
        for sae in (ours, theirs):
            codes = sae.encode(tokens(seed=seed)).detach()
            sae.decode(codes).square().sum().backward()
        assert len(optimizer._members[0].ledger._decoded) == 1
    optimizer.step()
    torch_step(theirs, truth)
    assert_same(ours, theirs)


def test_one_batch_of_many_tokens_keeps_the_fused_step() -> None:
    """More tokens than latents: the terms take more than dense gradients would, and yet cost nothing to keep."""
    sae = fastsae.SparseAutoencoder(D, 32, fastsae.TopK(4), dtype=torch.float64, seed=0)
    optimizer = adam(sae)
    sae(torch.randn(100, D, dtype=torch.float64)).loss.backward()
    ledger = optimizer._members[0].ledger
    assert ledger.held_bytes() > ledger.most_bytes
    assert len(ledger.terms) == 1
    assert not ledger._dense


def test_going_through_a_graph_twice_adds_twice() -> None:
    ours, theirs = both("matryoshka")
    optimizer, truth = adam(ours), torch_adam(theirs)
    for sae in (ours, theirs):
        loss = sae(tokens()).loss
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="a second time"):
            loss.backward()
    optimizer.step()
    torch_step(theirs, truth)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-9, atol=1e-11)
    assert int(ours.fired_over) == N  # and yet the tokens were the same


@pytest.mark.parametrize("rule", ["topk", "relu", "gated", "matryoshka"])
def test_the_fused_steps_objective_can_be_gone_through_twice(rule: str) -> None:
    """There the error is overwritten, and a dense pass hands its gradients on: both are computed again."""
    ours, theirs = both(rule, aux_k=3)
    ours.dense_above = 0.0
    optimizer, truth = adam(ours), torch_adam(theirs)
    loss = ours.objective(tokens(), for_step=True).loss
    loss.backward(retain_graph=True)
    loss.backward()
    (2 * theirs(tokens()).loss).backward()
    optimizer.step()
    torch_step(theirs, truth)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("drop", ["optimizer", "module", "zeros", "none"])
def test_zero_grad_drops_the_terms(drop: str) -> None:
    ours, theirs = both("topk")
    optimizer, truth = adam(ours), torch_adam(theirs)
    (ours(tokens(seed=9)).loss + ours.W_enc.sum()).backward()
    if drop == "optimizer":
        optimizer.zero_grad()
    elif drop == "module":
        ours.zero_grad()
    elif drop == "zeros":
        optimizer.zero_grad(set_to_none=False)
    else:
        for p in ours.parameters():
            p.grad = None
    for sae in (ours, theirs):
        sae(tokens()).loss.backward()
    optimizer.step()
    torch_step(theirs, truth)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-9, atol=1e-11)


def test_a_step_without_a_backward_does_nothing() -> None:
    sae = family_sae(RULES["topk"])
    optimizer, before = adam(sae), copy.deepcopy(sae.state_dict())
    optimizer.step()
    sae(tokens()).loss.backward()
    optimizer.step()
    once = copy.deepcopy(sae.state_dict())
    optimizer.step()
    for name, value in sae.state_dict().items():
        assert torch.equal(value, once[name])
    assert not torch.equal(once["W_enc"], before["W_enc"])


# -- what does not accumulate into .grad goes the ordinary way --------------------------------------------------------


@pytest.mark.parametrize("rule", [
    "topk", "batch_topk", "matryoshka", "jumprelu", "gated-weighted", "group_max", "abs_topk",
])  # fmt: skip
def test_autograd_grad_gives_dense_gradients_beside_an_open_ledger(rule: str) -> None:
    ours, theirs = both(rule, aux_k=3)
    optimizer = adam(ours)
    for loss in (plain, penalised, behind):
        found = []
        for sae in (ours, theirs):
            x = tokens().requires_grad_()
            wanted = [x, *sae.parameters()]
            found.append(torch.autograd.grad(loss(sae, x), wanted, allow_unused=True))
        for mine, truth in zip(*found, strict=True):
            assert (mine is None) == (truth is None)
            if truth is not None:
                torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11)
    assert not optimizer._members[0].ledger.terms
    assert ours.W_dec.grad is None


@pytest.mark.parametrize("rule", ["topk", "matryoshka"])
def test_second_derivatives_are_those_without_a_ledger(rule: str) -> None:
    ours, theirs = both(rule)
    keep = adam(ours)
    found = []
    for sae in (ours, theirs):
        x = tokens().requires_grad_()
        (dx,) = torch.autograd.grad(penalised(sae, x), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, sae.W_dec, sae.W_enc]))
    for mine, truth in zip(*found, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-8, atol=1e-10)
    assert keep is not None


def test_backward_into_some_inputs_leaves_the_others_alone() -> None:
    ours, theirs = both("topk")
    optimizer = adam(ours)
    for sae in (ours, theirs):
        sae(tokens()).loss.backward(inputs=[sae.W_dec, sae.b_dec])
    torch.testing.assert_close(ours.W_dec.grad, theirs.W_dec.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ours.b_dec.grad, theirs.b_dec.grad, rtol=1e-9, atol=1e-11)
    assert ours.W_enc.grad is None
    optimizer.zero_grad()
    for sae in (ours, theirs):
        x = tokens().requires_grad_()
        sae(x).loss.backward(inputs=[x])
        assert sae.W_enc.grad is None or sae is theirs


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("rule", ["topk", "batch_topk", "matryoshka-sampled", "jumprelu"])
def test_activation_checkpointing_counts_and_draws_once(rule: str, reentrant: bool) -> None:
    results = []
    for make in (adam, torch_adam):
        for again in (True, False):
            sae = family_sae(RULES[rule], aux_k=3, dead_after=50)
            optimizer = make(sae)
            for i in range(3):
                x = tokens(seed=i).requires_grad_()
                out = checkpoint(lambda t, s=sae: s(t).loss, x, use_reentrant=reentrant) if again else sae(x).loss
                out.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert int(sae.fired_over) == 3 * N
            results.append(sae.state_dict())
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-8, atol=1e-10)


def test_a_forward_pass_alone_counts_nothing() -> None:
    for make in (adam, torch_adam):
        sae = family_sae(RULES["batch_topk"])
        optimizer, before = make(sae), copy.deepcopy(sae.state_dict())
        sae(tokens())
        with torch.no_grad():
            sae(tokens())
        for name, value in sae.state_dict().items():
            assert torch.equal(value, before[name]), name
        sae(tokens()).loss.backward()
        optimizer.step()
        assert int(sae.fired_over) == N
        assert float(sae.threshold) > 0


# -- torch's ways of using an optimizer -------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["topk", "jumprelu", "gated"])
@pytest.mark.parametrize("settings", [{"decoder_norm": "unit", "skip": True}, {"tied": True}], ids=str)
def test_clip_grad_norm_is_torchs(rule: str, settings: dict) -> None:
    ours, theirs = both(rule, aux_k=3, **settings)
    optimizer, truth = adam(ours), torch_adam(theirs)
    for i in range(3):
        for sae in (ours, theirs):
            sae(tokens(seed=i)).loss.backward()
        theirs.project_gradients_()
        norms = [nn.utils.clip_grad_norm_(sae.parameters(), 0.05) for sae in (ours, theirs)]
        torch.testing.assert_close(*norms, rtol=1e-9, atol=0)
        optimizer.step()
        torch_step(theirs, truth)
        assert_same(ours, theirs)


def test_the_optimizers_own_clipping_is_the_same() -> None:
    ours, theirs = both("topk", decoder_norm="unit")
    optimizer, truth = adam(ours, clip_norm=0.05), torch_adam(theirs)
    for i in range(3):
        for sae in (ours, theirs):
            sae(tokens(seed=i)).loss.backward()
        optimizer.step()
        torch_step(theirs, truth, clip=0.05)
        assert_same(ours, theirs)


def test_a_grad_scaler_scales_and_unscales() -> None:
    ours, theirs = both("topk")
    optimizer, truth = adam(ours), torch_adam(theirs)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(3):
        scaler.scale(ours(tokens(seed=i)).loss).backward()
        if i == 1:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(ours.parameters(), 1e9)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        theirs(tokens(seed=i)).loss.backward()
        torch_step(theirs, truth)
        assert_same(ours, theirs)
    scaler.scale(ours(torch.full_like(tokens(), torch.inf)).loss).backward()
    before = copy.deepcopy(ours.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 1024
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_schedulers_closures_and_hooks() -> None:
    ours, theirs = both("jumprelu")
    optimizer, truth = adam(ours), torch_adam(theirs)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=5) for o in (optimizer, truth)]
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure(sae: fastsae.SparseAutoencoder, i: int) -> Tensor:
        loss = sae(tokens(seed=i)).loss
        loss.backward()
        return loss.detach()

    for i in range(4):
        loss = optimizer.step(lambda i=i: closure(ours, i))
        torch.testing.assert_close(loss, closure(theirs, i))
        torch_step(theirs, truth)
        for scheduler in schedulers:
            scheduler.step()
        assert {g["lr"] for g in optimizer.param_groups} == {truth.param_groups[0]["lr"]}
        assert_same(ours, theirs)
    assert seen == ["before", "after"] * 4


def test_groups_are_added_and_have_settings_of_their_own() -> None:
    first, second = (family_sae(RULES["jumprelu"]) for _ in range(2))
    optimizer = fastsae.optim.AdamW(first, lr=1e-3, weight_decay=0.1)
    optimizer.add_param_group({"params": second, "lr": 0.0})
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0, 0.1, 0.0]  # a threshold does not decay
    before = copy.deepcopy(second.state_dict())
    (first(tokens()).loss + second(tokens()).loss).backward()
    optimizer.step()
    for name, p in second.named_parameters():
        assert torch.equal(p, before[name]), name
    optimizer.param_groups[3]["lr"] = 1e-2
    (first(tokens()).loss + second(tokens()).loss).backward()
    optimizer.step()
    assert not torch.equal(second.log_threshold, before["log_threshold"])
    assert torch.equal(second.W_dec, before["W_dec"])


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
@pytest.mark.parametrize("rule", ["topk", "gated"])
def test_state_goes_into_a_file_and_comes_back(rule: str, moments: str, tmp_path) -> None:
    sae = family_sae(RULES[rule], dtype=torch.float32)

    def run(optimizer: fastsae.optim.Adam, model: fastsae.SparseAutoencoder, steps: range) -> None:
        for i in steps:
            model(tokens(seed=i).float()).loss.backward()
            optimizer.step()

    optimizer = fastsae.optim.AdamW(sae, lr=1e-3, moments=moments, seed=5)
    run(optimizer, sae, range(3))
    torch.save({"sae": sae.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    run(optimizer, sae, range(3, 6))
    other = family_sae(RULES[rule], dtype=torch.float32)
    again = fastsae.optim.AdamW(other, lr=7.0, weight_decay=3.0, moments=moments, seed=5)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(saved["sae"])
    again.load_state_dict(saved["optimizer"])
    run(again, other, range(3, 6))
    for name, value in sae.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("rule", ["topk", "jumprelu"])
def test_state_is_exchanged_with_torchs_adam(rule: str) -> None:
    ours, theirs = both(rule, skip=True)
    optimizer, truth = adam(ours), torch_adam(theirs)
    for i in range(6):
        for sae in (ours, theirs):
            sae(tokens(seed=i)).loss.backward()
        optimizer.step()
        torch_step(theirs, truth)
        assert_same(ours, theirs)
        if i % 2:
            mine, other = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(truth.state_dict())
            optimizer, truth = adam(ours), torch_adam(theirs)
            optimizer.load_state_dict(other)
            groups = [{**mine["param_groups"][0], "params": [i for g in mine["param_groups"] for i in g["params"]]}]
            truth.load_state_dict({"state": mine["state"], "param_groups": groups})
            assert int(optimizer.state[ours.W_dec]["step"]) == i + 1


@pytest.mark.long
def test_a_compiled_module_trains_the_same() -> None:
    """Its backward pass is a compiled function, which keeps no terms: dense gradients, and a fused step."""
    ours, theirs = both("topk", dtype=torch.float32)
    optimizer, truth = adam(ours), adam(theirs)
    compiled = torch.compile(ours)
    for i in range(3):
        compiled(tokens(seed=i).float()).loss.backward()
        assert not isinstance(ours.W_dec.grad, LedgerGradient)
        optimizer.step()
        theirs(tokens(seed=i).float()).loss.backward()
        truth.step()
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-4, atol=1e-5)


def test_dictionaries_of_ones_own() -> None:
    """No SparseAutoencoder: the ops, four tensors, and the optimizer."""
    sae = family_sae(RULES["topk"], pre_bias=False, decoder_norm="unit")
    W_enc, W_dec, b_enc, b_dec = (
        p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec)
    )
    optimizer = adam(fastsae.optim.Dictionaries(W_enc, W_dec, b_enc, b_dec, decoder_norm="unit"))
    truth = adam(sae)
    for i in range(3):
        x = tokens(seed=i)
        recon = ops.decode(ops.encode_topk(x, W_enc, b_enc, 5), W_dec) + b_dec
        (recon - x).square().sum(-1).mean().backward()
        optimizer.step()
        sae(x).loss.backward()
        truth.step()
    for mine, p in zip((W_enc, W_dec, b_enc, b_dec), (sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec), strict=True):
        torch.testing.assert_close(mine, p, rtol=1e-9, atol=1e-11)


# -- a model around it ------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A map, an SAE, a readout of its reconstruction."""

    def __init__(self, sae: fastsae.SparseAutoencoder):
        super().__init__()
        self.before = nn.Linear(D, D, dtype=torch.float64)
        self.sae = sae
        self.after = nn.Linear(D, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        out = self.sae(self.before(x))
        return out.loss + self.after(out.recon).square().mean()


@pytest.mark.parametrize("kind", ["adam", "adamw"])
@pytest.mark.parametrize("how", ["model", "groups"])
def test_an_optimizer_over_a_model_steps_the_rest_of_it_too(kind: str, how: str) -> None:
    torch.manual_seed(0)
    ours = Model(family_sae(RULES["topk"], decoder_norm="free"))
    theirs = copy.deepcopy(ours)
    make, make_theirs = {
        "adam": (fastsae.optim.Adam, torch.optim.Adam), "adamw": (fastsae.optim.AdamW, torch.optim.AdamW),
    }[kind]  # fmt: skip
    given: Any = ours
    if how == "groups":
        given = [{"params": ours.sae}, {"params": [*ours.before.parameters(), *ours.after.parameters()]}]
    optimizer, truth = make(given, lr=1e-2), make_theirs(theirs.parameters(), lr=1e-2)
    assert len(optimizer.param_groups) == 2
    for seed in range(3):
        for model in (ours, theirs):
            model(tokens(seed=seed)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        assert all(p.grad is None for p in ours.parameters())
        truth.step()
        truth.zero_grad()
        for name, p in theirs.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), p, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: n + m)

    twin = copy.deepcopy(ours)
    other = make(twin, lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, one in ((ours, optimizer), (twin, other)):
        model(tokens(seed=9)).backward()
        one.step()
    for name, p in ours.named_parameters():
        assert torch.equal(twin.get_parameter(name), p), name
    with pytest.raises(ValueError, match="1 parameter groups, expected 2"):
        optimizer.load_state_dict(truth.state_dict())


def test_gradients_of_the_model_that_are_not_finite_change_nothing() -> None:
    model = Model(family_sae(RULES["topk"]))
    optimizer = adam(model, clip_norm=1.0)
    before = copy.deepcopy(model.state_dict())
    (model(tokens()) * torch.nan).backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert int(optimizer.skipped) == 2  # the SAE's step and that of the rest
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    model(tokens()).backward()
    optimizer.step()
    assert bool(optimizer.made)
    assert not torch.equal(model.before.weight, before["before.weight"])


def test_a_model_without_an_sae_is_refused() -> None:
    for given in (nn.Linear(2, 2), [{"params": list(nn.Linear(2, 2).parameters())}], nn.Linear(2, 2).parameters()):
        with pytest.raises(TypeError, match="SparseAutoencoder"):
            fastsae.optim.Adam(given)


def test_parameters_without_a_gradient_in_some_steps_count_their_own() -> None:
    """Adam's bias correction is of the steps that a parameter made."""
    ours = Model(family_sae(RULES["topk"]))
    theirs = copy.deepcopy(ours)
    optimizer, truth = fastsae.optim.Adam(ours, lr=1e-2), torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for i in range(6):
        for model in (ours, theirs):
            (model.sae(model.before(tokens())).loss if i < 4 else model(tokens())).backward()
        optimizer.step()
        truth.step()
        truth.zero_grad()
    torch.testing.assert_close(ours.after.weight, theirs.after.weight, rtol=1e-8, atol=1e-10)


def test_an_optimizer_that_cannot_be_made_takes_nothing_from_another() -> None:
    sae, frozen = family_sae(RULES["topk"]), family_sae(RULES["topk"])
    optimizer = adam(sae)
    frozen.b_dec.requires_grad_(False)
    with pytest.raises(ValueError, match="b_dec do not require a gradient"):
        fastsae.optim.Adam([sae, frozen])
    before = sae.W_dec.detach().clone()
    sae(tokens()).loss.backward()
    optimizer.step()
    assert not torch.equal(sae.W_dec, before)


@pytest.mark.parametrize("kind", ["sparse", "of another SAE"])
def test_gradients_beside_the_sae_that_do_not_fit_are_refused_before_a_step(kind: str) -> None:
    sae, other = family_sae(RULES["topk"]), family_sae(RULES["topk"])
    table = nn.Embedding(10, D, sparse=True, dtype=torch.float64)
    held = adam(other)
    beside = [table.weight] if kind == "sparse" else [other.b_dec]
    optimizer = fastsae.optim.Adam([{"params": sae}, {"params": beside}])
    before = sae.W_dec.detach().clone()
    loss = sae(table(torch.arange(10)) if kind == "sparse" else tokens()).loss
    (loss + (0 if kind == "sparse" else other(tokens()).loss)).backward()
    with pytest.raises(RuntimeError, match=r"parameter 0 of group 1 is .*leave that parameter to another optimizer"):
        optimizer.step()
    assert torch.equal(sae.W_dec, before)
    held.zero_grad()
