"""fastsae.accelerate: loss and gradients of random configurations, sizes and weights, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fastsae
from tests.accelerate_case import CASES, inputs

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fastsae.backends.errors.BackendWarning", "ignore::UserWarning"),
]
Drawn = st.SearchStrategy[dict[str, Any]]
flags, shares = st.booleans(), st.floats(0.01, 1.0)


def widths(m: int, least: int = 1) -> st.SearchStrategy[list[int]]:
    """Increasing prefixes, the last of which is all m latents."""
    return st.lists(st.integers(least, m), max_size=3).map(lambda found: sorted({*found, m}))


def groups(m: int) -> st.SearchStrategy[list[int]]:
    return widths(m).map(lambda ends: [b - a for a, b in zip([0, *ends], ends, strict=False)])


def lens(m: int, **more: st.SearchStrategy[Any]) -> Drawn:
    norms = st.sampled_from(["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"])
    return st.fixed_dictionaries({"apply_b_dec_to_input": flags, "normalize_activations": norms, **more})


def jumprelu(m: int) -> Drawn:
    return lens(
        m, jumprelu_bandwidth=st.floats(0.02, 0.4), jumprelu_init_threshold=st.floats(0.01, 0.6),
        jumprelu_ste_to_input=flags, pre_act_loss_coefficient=st.none() | st.floats(0.01, 0.1),
        mode=st.sampled_from([("step", None), ("tanh", None), ("quadratic", 3.5)]),
    ).map(
        lambda found: {
            **{key: value for key, value in found.items() if key != "mode"},
            "jumprelu_sparsity_loss_mode": found["mode"][0], "target_l0": found["mode"][1],
        }
    )  # fmt: skip


def across() -> Drawn:
    return fixed(apply_b_dec_to_input=st.just(False))


def fixed(**drawn: st.SearchStrategy[Any]) -> Drawn:
    return st.fixed_dictionaries(drawn)


CONFIGURATIONS: dict[str, Callable[[int], Drawn]] = {
    "lens-topk-training": lambda m: lens(
        m, k=st.integers(1, m), rescale_acts_by_decoder_norm=flags, use_sparse_activations=st.just(False),
        aux_loss_coefficient=shares,
    ),
    "lens-topk": lambda m: lens(m, k=st.integers(1, m), rescale_acts_by_decoder_norm=flags),
    "lens-batchtopk-training": lambda m: lens(
        m, k=st.floats(0.5, m), rescale_acts_by_decoder_norm=flags, aux_loss_coefficient=shares
    ),
    "lens-matryoshka-training": lambda m: lens(
        m, k=st.floats(0.5, m), rescale_acts_by_decoder_norm=flags, matryoshka_widths=widths(m),
        use_matryoshka_aux_loss=flags,
    ),
    "lens-standard-training": lens,
    "lens-jumprelu-training": jumprelu,
    "lens-gated-training": lens,
    "lens-standard": lens,
    "lens-jumprelu": lens,
    "lens-gated": lens,
    "lens-transcoder": lambda m: across(),
    "lens-skip": lambda m: across(),
    "lens-jumprelu-transcoder": lambda m: across(),
    "lens-jumprelu-skip": lambda m: across(),
    "sparsify": lambda m: fixed(
        k=st.integers(1, max(1, m // 4)), transcode=flags, skip_connection=flags, multi_topk=flags,
        normalize_decoder=flags,
    ),
    "dictionary-standard": lambda m: fixed(),
    "dictionary-jumprelu": lambda m: fixed(),
    "dictionary-gated": lambda m: fixed(),
    "dictionary-topk": lambda m: fixed(arguments=st.tuples(st.integers(1, m))),
    "dictionary-batchtopk": lambda m: fixed(arguments=st.tuples(st.integers(1, m))),
    "dictionary-batchtopk-inference": lambda m: fixed(
        arguments=st.tuples(st.integers(1, m)), threshold=st.floats(-1, 2)
    ),
    "dictionary-matryoshka": lambda m: fixed(arguments=st.tuples(st.integers(1, m), groups(m))),
    "transcoder": lambda m: fixed(rule=st.sampled_from(["relu", "nn"]), skip_connection=flags, shift=st.floats(-1, 2)),
    "transcoder-jumprelu-trained": lambda m: fixed(
        rule=st.just("jumprelu"), trains=flags, skip_connection=flags, shift=st.floats(-1, 2)
    ),
    "transcoder-topk": lambda m: fixed(rule=st.just("topk"), k=st.integers(1, m), skip_connection=flags),
    "overcomplete-topk": lambda m: fixed(top_k=st.integers(1, m), tied=st.sampled_from([None, True, False])),
    "overcomplete-batchtopk": lambda m: fixed(top_k=st.integers(1, 3 * m)),
    "overcomplete-jump": lambda m: fixed(),
    "overcomplete-relu": lambda m: fixed(),
    "llama-topk": lambda m: fixed(
        act_fn=st.sampled_from(["topk", "relu", "batchtopk"]), top_k=st.integers(1, m),
        sparsity_include_decoder_norm=flags, use_decoder_bias=flags,
    ),
    "llama-jumprelu-trained": lambda m: fixed(
        act_fn=st.just("jumprelu"), trains=flags, sparsity_include_decoder_norm=flags
    ),
}  # fmt: skip
"""By the name of a case: what is drawn for m latents."""
ACROSS = [name for name in CONFIGURATIONS if name.startswith("lens") and name.endswith(("transcoder", "skip"))]


@st.composite
def configuration(draw: st.DrawFn, name: str) -> tuple[dict[str, Any], int, int, float]:
    """Settings with their sizes, tokens, a seed, and by how much biases are lowered."""
    m = draw(st.integers(4, 70))
    chosen = {"d_in": draw(st.integers(2, 20)), "d_sae": m, **draw(CONFIGURATIONS[name](m))}
    if name in ACROSS:
        chosen["d_out"] = chosen["d_in"]  # as the loss of these cases takes it
    return chosen, draw(st.integers(2, 40)), draw(st.integers(0, 99)), draw(st.floats(-1.0, 1.5))


@torch.no_grad()
def lower(module: nn.Module, by: float) -> None:
    """More or fewer latents active, on both sides of where a rule with a threshold goes sparsely."""
    named = dict(module.named_parameters())
    for one in ("b_gate", "gate_bias", "b_enc", "encoder.bias"):
        if one in named:
            named[one].sub_(by)
            return


@pytest.mark.parametrize("name", CONFIGURATIONS)
@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_loss_and_gradients_of_any_configuration(name: str, data: st.DataObject) -> None:
    chosen, n, seed, by = data.draw(configuration(name))
    case = CASES[name]
    theirs, mine = (case.make(chosen, torch.float64) for _ in range(2))
    for module in (theirs, mine):
        lower(module, by)
    fastsae.accelerate(mine)
    x = inputs(seed, n=n, width=chosen["d_in"])
    dead = torch.arange(chosen["d_sae"]) % 3 == seed % 3 if case.aux and seed % 2 else None
    given_x = [x.clone().requires_grad_() for _ in range(2)]
    try:
        losses = [case.loss(theirs, given_x[0], dead)]
    except (ValueError, AttributeError, RuntimeError) as error:  # settings that its own loss refuses, or fails with
        with pytest.raises(type(error)):
            case.loss(mine, given_x[1], dead)
        return
    losses.append(case.loss(mine, given_x[1], dead))
    if name == "sparsify":  # with fewer it gives a gradient to latents that did not fire, as torch.topk happens to pick
        assume(float(theirs.encode(x).top_acts.min()) > 0)
    close = dict(rtol=1e-9, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(losses[1], losses[0], **close)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(given_x[1].grad, given_x[0].grad, **close)
    for (key, p), q in zip(theirs.named_parameters(), mine.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), key
        if p.grad is not None:
            torch.testing.assert_close(q[1].grad, p.grad, **close, msg=lambda text, key=key: f"{key}: {text}")
