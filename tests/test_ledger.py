"""The ledger against torch's own gradients, in graphs that are easy to get wrong; a copy of a module has no ledger."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae import ops
from fastsae.ops.ledger import LedgerGradient
from tests.family_case import RULES, M, family_sae, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

FIXED = ["topk", "batch_topk", "matryoshka", "hierarchical_topk"]
"""Of group_max every latent of a group may be its largest, so none is sure to be dead."""


def really_dead(sae: fastsae.SparseAutoencoder) -> fastsae.SparseAutoencoder:
    """Every third latent so weak that it does not fire in `tokens()`, and long dead."""
    with torch.no_grad():
        sae.encoder_weight[::3] *= 0.05
        sae.b_enc[::3] *= 0.05
    sae.tokens_since_fired[::3] = 10**6
    return sae


def gradients(sae: fastsae.SparseAutoencoder) -> dict[str, Tensor]:
    return {
        name: p.grad.to_dense() if isinstance(p.grad, LedgerGradient) else p.grad
        for name, p in sae.named_parameters()
        if p.grad is not None
    }


def assert_as_torch(run: Callable[[fastsae.SparseAutoencoder], Any], rule: str = "topk", **settings: Any) -> None:
    """run, which goes backward, leaves the same gradients with an open ledger as without."""
    dead = settings.pop("dead", False)
    sae = family_sae(RULES[rule], **settings)
    if dead:
        really_dead(sae)
    plain = copy.deepcopy(sae)
    optimizer = fastsae.optim.Adam(sae, lr=1e-2)
    run(sae)
    run(plain)
    got, expected = gradients(sae), gradients(plain)
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    for name in got.keys() - expected.keys():
        assert not got[name].any(), name
    assert optimizer is not None


@pytest.mark.parametrize("rule", FIXED)
@pytest.mark.parametrize("settings", [{}, {"loss": "fvu", "skip": True}], ids=str)
def test_latents_that_are_really_dead_learn_by_aux_k(rule: str, settings: dict) -> None:
    sae = really_dead(family_sae(RULES[rule], aux_k=3, **settings))
    assert bool(sae.objective(tokens()).dead.any())
    assert float(sae(tokens()).losses["aux"]) > 0

    def run(m: fastsae.SparseAutoencoder) -> None:
        for i in range(2):
            loss = m(tokens(seed=i)).loss
            loss.backward(retain_graph=True)
            loss.backward()

    assert_as_torch(run, rule, aux_k=3, dead=True, **settings)


@pytest.mark.parametrize("rule", FIXED)
def test_backward_into_all_but_b_dec_loses_nothing(rule: str) -> None:
    def run(m: fastsae.SparseAutoencoder) -> None:
        m(tokens()).loss.backward(inputs=[m.W_enc, m.W_dec, m.b_enc])

    assert_as_torch(run, rule, aux_k=3, dead=True)


def test_a_gradient_given_to_backward_may_be_written_afterwards() -> None:
    def run(m: fastsae.SparseAutoencoder) -> None:
        g = tokens(seed=3)
        m(tokens()).recon.backward(g)
        g.zero_()

    assert_as_torch(run)


def of_x(m: fastsae.SparseAutoencoder) -> None:
    x = tokens()
    m(x).loss.backward()
    x.zero_()


def of_acts(m: fastsae.SparseAutoencoder) -> None:
    out = m(tokens())
    out.loss.backward()
    with torch.no_grad():
        out.codes.acts.zero_()


@pytest.mark.parametrize("write", [of_x, of_acts], ids=lambda f: f.__name__)
def test_what_a_step_still_reads_and_was_written_is_refused(write: Callable[..., None]) -> None:
    sae = family_sae(RULES["topk"], pre_bias=False)
    optimizer = fastsae.optim.Adam(sae)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    write(sae)
    for call in (optimizer.step, sae.W_dec.grad.to_dense):
        with pytest.raises(RuntimeError, match=r"was written before optimizer\.step"):
            call()
    for name, p in sae.named_parameters():
        assert torch.equal(p, before[name]), name
    optimizer.zero_grad()
    sae(tokens()).loss.backward()
    optimizer.step()


def test_an_input_may_be_written_where_the_encoder_has_its_own() -> None:
    assert_as_torch(of_x, pre_bias=True)


def permuted(codes: fastsae.SparseCodes) -> fastsae.SparseCodes:
    order = torch.arange(M - 1, -1, -1, dtype=torch.int32)
    return replace(codes, indices=order[codes.indices.long()])


def tripled(codes: fastsae.SparseCodes) -> fastsae.SparseCodes:
    codes = codes.keep(codes.acts > 0.5)
    codes.acts.mul_(3.0)
    return codes


@pytest.mark.parametrize("change", [permuted, tripled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("pre_bias", [True, False])
def test_codes_that_changed_are_not_taken_for_their_encoders(change: Callable[..., Any], pre_bias: bool) -> None:
    """pre_bias=False is where the update would compute the acts' gradients itself."""

    def run(m: fastsae.SparseAutoencoder) -> None:
        m.decode(change(m.encode(tokens()))).square().sum().backward()

    assert_as_torch(run, pre_bias=pre_bias)


def decoders(m: fastsae.SparseAutoencoder) -> None:
    codes = m.encode(tokens())
    (ops.decode(codes, m.W_enc).square().sum() + ops.decode(codes, m.W_dec).sin().sum()).backward()


def encoders(m: fastsae.SparseAutoencoder) -> None:
    other = ops.encode_topk(tokens(), m.W_dec, m.b_enc, 3)
    (other.acts.square().sum() + m.decode(m.encode(tokens())).sin().sum()).backward()


def biases(m: fastsae.SparseAutoencoder) -> None:
    m.centre = nn.Parameter(tokens(1)[0])
    codes = ops.encode_topk(tokens() - m.centre.detach(), m.W_enc, m.b_enc, 3, pre_bias=m.centre)
    codes.acts.square().sum().backward()


@pytest.mark.parametrize("run", [decoders, encoders, biases], ids=lambda f: f.__name__)
def test_a_parameter_in_another_role_gets_an_ordinary_gradient(run: Callable[..., None]) -> None:
    assert_as_torch(run)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_pre_bias_has_its_gradient_with_a_ledger_and_without(scaled: bool) -> None:
    """Against x - b_dec in the graph."""
    scale = torch.linspace(0.5, 1.5, M, dtype=torch.float64) if scaled else None
    found, alive = [], []
    for owned, given in ((True, True), (False, True), (False, False)):
        sae = family_sae(RULES["topk"])
        alive.append(fastsae.optim.Adam(sae) if owned else None)
        b = sae.b_dec
        x, more = (tokens() - b.detach(), {"pre_bias": b}) if given else (tokens() - b, {})
        ops.encode_topk(x, sae.W_enc, sae.b_enc, 3, scale=scale, **more).acts.square().sum().backward()
        found.append(gradients(sae))
    for other in found[:2]:
        for name in ("b_dec", "b_enc", "W_enc"):
            torch.testing.assert_close(other[name], found[2][name], rtol=1e-9, atol=1e-11)


def test_terms_from_before_a_switch_of_the_pre_bias_are_spent_as_they_were_made() -> None:
    def run(m: fastsae.SparseAutoencoder) -> None:
        m(tokens()).loss.backward()
        m.pre_bias = False
        m(tokens(seed=1)).loss.backward()

    assert_as_torch(run)


@pytest.mark.parametrize("part", [slice(3), slice(3, 7)], ids=str)
def test_some_tokens_of_a_code_may_be_decoded(part: slice) -> None:
    def run(m: fastsae.SparseAutoencoder) -> None:
        codes = m.encode(tokens())
        (m.decode(codes[part]).square().sum() + codes.acts.square().sum()).backward()

    assert_as_torch(run)


class Fails(torch.autograd.Function):
    fail = True

    @staticmethod
    def forward(ctx: Any, acts: Tensor) -> Tensor:
        return acts.view_as(acts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if Fails.fail:
            raise ArithmeticError("on purpose")
        return grads[0]


def test_a_backward_pass_that_failed_leaves_no_half_behind() -> None:
    def run(m: fastsae.SparseAutoencoder) -> None:
        Fails.fail = True
        codes = ops.encode_topk(tokens(), m.W_enc, m.b_enc, 3)
        # What was made last goes backward first: the decoder's half is there when the other one fails.
        failing = Fails.apply(codes.acts).sum()
        loss = ops.decode(codes, m.W_dec).square().sum() + failing
        with pytest.raises(ArithmeticError):
            loss.backward(retain_graph=True)
        m.zero_grad()
        Fails.fail = False
        loss.backward()

    assert_as_torch(run, pre_bias=False)


def test_nothing_keeps_a_module_whose_gradient_was_not_spent() -> None:
    sae = family_sae(RULES["topk"])
    optimizer = fastsae.optim.Adam(sae)
    sae(tokens()).loss.backward()
    seen, grad = weakref.ref(sae), sae.W_dec.grad
    del optimizer
    gc.collect()
    with pytest.raises(RuntimeError, match="that no longer exists; drop it"):
        grad.to_dense()
    assert "its optimizer is gone" in repr(grad)
    del sae
    gc.collect()
    assert seen() is None


def test_a_new_optimizer_starts_without_what_the_old_one_left() -> None:
    alive = []

    def run(m: fastsae.SparseAutoencoder) -> None:
        m(tokens(seed=5)).loss.backward()
        if isinstance(m.W_dec.grad, LedgerGradient):
            alive.append(fastsae.optim.Adam(m))
        else:
            m.zero_grad()
        m(tokens()).loss.backward()

    assert_as_torch(run)
    alive[0].step()
    assert int(alive[0].state[alive[0].param_groups[0]["params"][0]]["step"]) == 1


def doubled(other: fastsae.SparseAutoencoder, _: Any) -> None:
    with torch.no_grad():
        other.W_dec.mul_(2.0)


def setting(**settings: Any) -> Callable[..., None]:
    return lambda _, group: group.update(settings)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (doubled, "was written between backward"),
        (setting(lr="0.1"), "lr is '0.1', expected a number or a 0-d tensor"),
        (setting(lr=torch.ones(2)), "expected a number or a 0-d tensor"),
        (setting(betas=(0.9, 2.0)), "betas"),
        (setting(eps=-1), "eps is -1"),
        (setting(weight_decay="much"), "weight_decay is 'much'"),
    ],
)
def test_a_step_over_two_saes_is_whole_or_not_at_all(spoil: Callable[..., None], message: str) -> None:
    one, other = family_sae(RULES["topk"]), family_sae(RULES["topk"])
    optimizer = fastsae.optim.AdamW([one, other])
    (one(tokens()).loss + other(tokens()).loss).backward()
    spoil(other, optimizer.param_groups[1])
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    with pytest.raises((RuntimeError, ValueError), match=message):
        optimizer.step()
    for name, p in one.named_parameters():
        assert torch.equal(p, before[name]), name


def test_states_whose_settings_mean_something_else_are_refused() -> None:
    sae = family_sae(RULES["topk"])
    optimizer = fastsae.optim.Adam(sae)
    for other, message in (
        (torch.optim.Adam(sae.parameters(), weight_decay=0.1), "weight_decay"),
        (torch.optim.Adam(sae.parameters(), maximize=True), "maximize"),
        (torch.optim.Adam([{"params": [p]} for p in sae.parameters()]), "parameter groups"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(other.state_dict())
    assert "maximize" not in optimizer.param_groups[0]


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_on_parameters_see_the_gradient_and_may_change_it(register: str) -> None:
    seen = []

    def on_gradient(grad: Tensor) -> Tensor:
        seen.append(grad.clone())
        return grad / 2

    def after_it(p: Tensor) -> None:
        assert p.grad is not None
        seen.append(p.grad.clone())
        p.grad /= 2

    def run(m: fastsae.SparseAutoencoder) -> None:
        getattr(m.W_dec, register)(on_gradient if register == "register_hook" else after_it)
        m(tokens()).loss.backward()

    assert_as_torch(run)
    assert float(seen[0].norm()) > 0
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-9, atol=1e-11)


def test_a_dropped_optimizer_lets_go_at_once() -> None:
    """Without the garbage collector: a torch optimizer made right after it finds ordinary gradients."""
    sae = family_sae(RULES["topk"])
    optimizer = fastsae.optim.Adam(sae)
    sae(tokens()).loss.backward()
    optimizer.step()
    gone = weakref.ref(optimizer)
    gc.disable()
    try:
        del optimizer
        assert gone() is None
        sae(tokens()).loss.backward()
        assert all(type(p.grad) is Tensor for p in sae.parameters())
    finally:
        gc.enable()


def test_zero_grad_frees_the_inputs() -> None:
    sae = family_sae(RULES["topk"])
    optimizer = fastsae.optim.Adam(sae)
    x = tokens().clone()
    kept = weakref.ref(x)
    sae(x).loss.backward()
    optimizer.zero_grad()
    del x
    assert kept() is None


def test_an_sae_that_is_refused_keeps_its_optimizer() -> None:
    one, other = family_sae(RULES["topk"]), family_sae(RULES["relu"])
    optimizer = fastsae.optim.Adam([one, other])
    with pytest.raises(ValueError, match="W_enc, W_dec, b_enc, b_dec of params are already in this optimizer"):
        optimizer.add_param_group({"params": other})
    assert len(optimizer.param_groups) == 2
    before = other.W_dec.detach().clone()
    (one(tokens()).loss + other(tokens()).loss).backward()
    optimizer.step()
    assert not torch.equal(other.W_dec, before)


def test_a_module_with_gradients_that_wait_is_neither_moved_nor_cast() -> None:
    sae = family_sae(RULES["topk"])
    optimizer = fastsae.optim.Adam(sae)
    sae(tokens()).loss.backward()
    with pytest.raises(RuntimeError, match=r"step\(\) or zero_grad\(\) first"):
        sae.float()
    assert all(p.dtype == torch.float64 for p in sae.parameters())
    optimizer.zero_grad()
    assert sae.float().W_dec.dtype == torch.float32


def test_only_the_2_norm_of_terms_is_known() -> None:
    sae = family_sae(RULES["topk"])
    optimizer = fastsae.optim.Adam(sae)
    sae(tokens()).loss.backward()
    with pytest.raises(RuntimeError, match=r"the inf-norm of W_dec's gradient.*norm_type=2"):
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0, norm_type=torch.inf)
    optimizer.step()


def test_a_step_over_two_saes_reports_both() -> None:
    alone, together = [], []
    for rules in (["topk"], ["relu"], ["topk", "relu"]):
        saes = [family_sae(RULES[rule]) for rule in rules]
        optimizer = fastsae.optim.Adam(saes)
        torch.stack([sae(tokens()).loss for sae in saes]).sum().backward()
        optimizer.step()
        (together if len(saes) == 2 else alone).append(optimizer.grad_norm)
    torch.testing.assert_close(together[0], torch.stack(alone).square().sum().sqrt())

    one, other = (family_sae(RULES["topk"]) for _ in range(2))
    optimizer = fastsae.optim.Adam([one, other])
    before = [sae.W_dec.detach().clone() for sae in (one, other)]
    (one(tokens()).loss + other(tokens()).loss * torch.inf).backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    assert not bool(optimizer.made)
    assert int(optimizer.skipped) == 1
    assert not torch.equal(one.W_dec, before[0])
    assert torch.equal(other.W_dec, before[1])


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 4000])
@pytest.mark.parametrize("rule", ["topk", "relu", "gated", "matryoshka"])
def test_many_backward_passes_need_bounded_memory_and_add_up(rule: str, limit: int | None) -> None:
    """limit: term_bytes; None stands for as much as dense gradients take."""

    def run(sae: fastsae.SparseAutoencoder, check: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
        for seed in range(40):
            sae(tokens(seed=seed)).loss.backward()
            check()
        return gradients(sae)

    sae = family_sae(RULES[rule])
    expected = run(copy.deepcopy(sae))
    optimizer = fastsae.optim.Adam(sae, term_bytes=limit)
    ledger = optimizer._members[0].ledger
    dense = sum(p.nbytes for p in ledger.parameters.values())
    assert ledger.most_bytes == (limit or dense)
    held = [0]

    def check() -> None:
        held.append(ledger.held_bytes())
        assert held[-1] <= ledger.most_bytes + 1.5 * held[1]  # and the pass that has just run
        assert sum(t.nbytes for t in ledger._dense.values()) <= dense

    got = run(sae, check)
    assert any(after <= before for before, after in itertools.pairwise(held))
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_every_tensor_of_a_term_counts_in_its_memory() -> None:
    """The codes too, and each view of a batch by itself, as microbatches often are."""
    sae = fastsae.SparseAutoencoder(12, 64, fastsae.TopK(16), pre_bias=False, seed=0)
    optimizer, x = fastsae.optim.Adam(sae, term_bytes=2**20), torch.randn(64, 12)
    for part in x.chunk(4):
        sae(part).loss.backward()
    codes = 64 * 16 * (4 + 4)  # acts and indices of int32
    assert optimizer._members[0].ledger.held_bytes() == codes + 2 * x.nbytes


def test_a_limit_of_memory_is_a_number_above_0() -> None:
    with pytest.raises(ValueError, match="term_bytes is 0, expected a number above 0"):
        fastsae.optim.Adam(family_sae(RULES["topk"]), term_bytes=0)
