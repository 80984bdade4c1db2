"""A copy of an encoder held between calls: made once it pays, anew when a weight changes, never seen in a result."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae import ops

if not fastsae.backends()["cpu"]["available"]:
    pytest.skip("the C++ extension is not built: the cpu backend is missing", allow_module_level=True)

from fastsae import _cpu
from fastsae.backends.cpu import screen as narrow_copies
from fastsae.backends.cpu.memory import matrix


def equal_bits(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


N, D, M, K = 40, 32, 500, 6
narrow_only = pytest.mark.skipif(
    _cpu.fastest_format(D) == _cpu.Format.f32, reason="this processor screens in fp32, which no copy makes faster"
)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each narrow copy that is made; two calls of N tokens do without one."""
    monkeypatch.setattr(narrow_copies, "FEW", 2 * N)
    monkeypatch.setattr(narrow_copies, "FEW_KEPT", 4)
    copies: list[int] = []
    fill = narrow_copies.fill

    def counted(*given: Any) -> Any:
        copies.append(1)
        return fill(*given)

    monkeypatch.setattr(narrow_copies, "fill", counted)
    return copies


def sae_of(rule: Any, **settings: Any) -> fastsae.SparseAutoencoder:
    torch.manual_seed(0)
    sae = fastsae.SparseAutoencoder(D, M, rule, seed=1, normalize="none", **settings)
    if "log_threshold" in dict(sae.named_parameters()):
        with torch.no_grad():
            sae.log_threshold.fill_(-0.5)
    if isinstance(rule, fastsae.BatchTopK):
        sae.threshold.fill_(0.7)
    return sae.eval()


RULES = {
    "topk": fastsae.TopK(K),
    "weighted": fastsae.TopK(K, weighted=True),
    "batch_topk": fastsae.BatchTopK(K),
    "relu": fastsae.ReLU(),
    "jumprelu": fastsae.JumpReLU(),
    "gated": fastsae.Gated(),
}


@narrow_only
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_module_in_eval_mode_makes_one_copy_and_finds_what_it_finds_without(
    rule: Any, made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = sae_of(rule, decoder_norm="free")
    xs = torch.randn(6, N, D)
    found = [sae.encode(x) for x in xs]
    # Two calls whose tokens would not repay a copy; the third makes it; a format that was tried and left counts too.
    once = len(made)
    assert 1 <= once <= 2
    sae(xs[0])
    assert len(made) == once
    monkeypatch.setattr(type(sae), "resting_screen", None)
    for codes, x in zip(found, xs, strict=True):
        without = sae.encode(x)
        equal_bits((codes.acts, codes.indices), (without.acts, without.indices))


@narrow_only
def test_few_tokens_neither_make_a_copy_nor_look_at_one(made: list[int]) -> None:
    sae = sae_of(fastsae.TopK(K))
    for _ in range(100):
        sae.encode(torch.randn(4, D))
    assert not made
    sae.encode(torch.randn(3 * N, D))
    assert made
    with mock.patch.object(_cpu, "digest", side_effect=AssertionError("W was looked at")):
        sae.encode(torch.randn(4, D))


WRITES: dict[str, Callable[[nn.Parameter], object]] = {
    "in place": lambda W: W.add_(0.25),
    "one weight, past autograd": lambda W: W.data[3].__setitem__(7, 9.0),
    "rows that trade places": lambda W: W.data.copy_(W.data.roll(1, 0)),
    "through NumPy": lambda W: W.detach().numpy().__setitem__((5, slice(None)), 4.0),
    "other memory": lambda W: setattr(W, "data", W.data * 2),
    "through bits": lambda W: W.data.view(torch.int32)[-1, -1:].bitwise_xor_(1 << 30),
}


@narrow_only
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_write_is_noticed(write: Callable[[nn.Parameter], object], made: list[int]) -> None:
    sae = sae_of(fastsae.TopK(K))
    x = torch.randn(3 * N, D)
    sae.encode(x)
    before = len(made)
    with torch.no_grad():
        write(sae.W_enc)
    codes = sae.encode(x)
    assert len(made) > before
    expected = ops.encode_topk(x - sae.b_dec, sae.W_enc, sae.b_enc, K, precision="fp32")
    equal_bits((codes.acts, codes.indices), (expected.acts, expected.indices))


@narrow_only
def test_a_copy_that_serves_badly_is_dropped(made: list[int]) -> None:
    """It was chosen by inputs of another kind: whose bounds are tight in 8 bits."""
    held = ops.HeldScreen()
    W, b = torch.randn(M, D), torch.zeros(M)
    ops.encode_topk(torch.randn(3 * N, D), W, b, K, screen=held)
    first = held.held
    assert first is not None
    assert first.screen is not None
    held.served(2000, torch.tensor(10))
    assert held.held is first
    held.served(2000, torch.tensor(100))
    assert held.held is None
    ops.encode_topk(torch.randn(3 * N, D), W, b, K, screen=held)
    assert held.tokens == 3 * N
    assert held.redone <= N


@narrow_only
def test_nothing_is_held_in_training_mode_in_copies_or_in_files() -> None:
    sae = sae_of(fastsae.TopK(K))
    x = torch.randn(3 * narrow_copies.FEW + 200, D)
    state = {name: t.clone() for name, t in sae.state_dict().items()}
    sae.encode(x)
    assert sae._resting.held is not None
    for other in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert other._resting.held is None
        equal_bits((other.encode(x).acts,), (sae.encode(x).acts,))
    assert state.keys() == sae.state_dict().keys()
    sae.train()
    assert sae._resting.held is None
    assert sae.resting_screen is None


@narrow_only
def test_some_latents_do_not_push_the_copy_of_all_out(made: list[int]) -> None:
    sae = sae_of(fastsae.JumpReLU())
    x = torch.randn(3 * N, D)
    whole = sae.encode(x)
    held = sae._resting.held
    some = sae.encode(x, latents=[3, 99, 7])
    assert sae._resting.held is held
    equal_bits((some.to_dense(),), (whole.to_dense()[:, [3, 99, 7]],))


DICTIONARIES: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda W: W.T.contiguous().T,
    "every other column": lambda W: torch.stack([W, W], -1).flatten(1)[:, ::2],
    "one row many times": lambda W: W[:1].expand(M, D),
    "negated lazily": lambda W: torch._neg_view(-W),
    "other numbers of the same bits": lambda W: W.view(torch.bfloat16),
}


@narrow_only
@pytest.mark.parametrize("dictionary", DICTIONARIES.values(), ids=DICTIONARIES)
def test_any_dictionary_is_encoded_as_without(dictionary: Callable[[Tensor], Tensor], made: list[int]) -> None:
    held, W = ops.HeldScreen(), torch.randn(M, D)
    W.copy_(W.abs().clamp(min=0.1))  # so that its halves are numbers too
    ops.encode_topk(torch.randn(3 * N, D), W, torch.zeros(M), K, screen=held)
    assert held.held is not None
    other = dictionary(W)
    x, b = torch.randn(3 * N, other.shape[1], dtype=other.dtype), torch.zeros(M, dtype=other.dtype)
    for _ in range(2):
        codes, expected = (ops.encode_topk(x, other, b, K, screen=screen) for screen in (held, None))
        equal_bits((codes.acts, codes.indices), (expected.acts, expected.indices))


@narrow_only
def test_a_traced_encoder_keeps_no_copy() -> None:
    held, b = ops.HeldScreen(), torch.zeros(M)
    W, other, x = torch.randn(M, D), torch.randn(M, D), torch.randn(300, D)
    for _ in range(2):  # without a copy, and with one
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(
                lambda x, W: ops.encode_topk(x, W, b, K, screen=held).indices, (x, W), check_trace=False
            )
        equal_bits((traced(x, other),), (ops.encode_topk(x, other, b, K).indices,))
        ops.encode_topk(x, W, b, K, screen=held)


@pytest.mark.parametrize("k", [0, -1, 10**12])
def test_the_op_says_what_is_wrong_with_k(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k is {k}, expected 1 <= k <= {M}"):
        ops.encode_topk(torch.randn(300, D), torch.randn(M, D), torch.zeros(M), k, screen=ops.HeldScreen())


@pytest.mark.parametrize("precision", ["screened", "fp32"])
def test_only_an_exact_encoder_holds_one(precision: str) -> None:
    held = ops.HeldScreen()
    for _ in range(2):
        ops.encode_topk(torch.randn(300, D), torch.randn(M, D), torch.zeros(M), K, screen=held, precision=precision)
    assert held.held is None


def test_where_no_copy_is_used_none_is_held() -> None:
    held = ops.HeldScreen()
    x, W = torch.randn(300, D, dtype=torch.float64), torch.randn(M, D, dtype=torch.float64)
    ops.encode_topk(x, W, torch.zeros(M, dtype=torch.float64), K, screen=held)
    ops.encode_topk(x.float(), W.float(), torch.zeros(M), K, screen=held, backend="reference")
    torch.func.vmap(lambda one: ops.encode_topk(one, W.float(), torch.zeros(M), K, screen=held).acts)(x.float()[None])
    assert held.held is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 7), (17, 33), (300, 640)], ids=str)
def test_a_digest_is_of_the_bits_and_their_places(shape: tuple[int, int], dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=g, dtype=torch.float32).to(dtype)

    def digest(t: Tensor, threads: int = 1) -> tuple[int, int]:
        return _cpu.digest(matrix("W", t), threads)  # type: ignore[no-any-return]

    whole = digest(W)
    assert all(digest(W, threads) == whole for threads in (2, 3))
    wider = torch.full((shape[0], shape[1] + 3), 8.0, dtype=dtype)
    wider[:, : shape[1]] = W
    assert digest(wider[:, : shape[1]]) == whole  # rows that do not touch
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    seen = {whole}
    for place in range(0, W.numel(), max(1, W.numel() // 50)):
        for bit in (0, 5, 8 * dtype.itemsize - 1):
            other = W.clone()
            flat = other.view(bits).view(-1)
            flat[place] ^= torch.tensor(1, dtype=bits) << bit
            seen.add(digest(other))
    places = len(range(0, W.numel(), max(1, W.numel() // 50)))
    assert len(seen) == 1 + 3 * places
    if shape[0] > 1:
        assert digest(W.flip(0)) not in seen


def test_digests_of_other_shapes_differ() -> None:
    zeros = [torch.zeros(shape) for shape in ((2, 6), (3, 4), (4, 3), (0, 3), (0, 4), (12, 1))]
    assert len({_cpu.digest(matrix("W", t), 1) for t in zeros}) == len(zeros)
