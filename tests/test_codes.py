"""SparseCodes: the invariant, conversions, slicing, pytrees and torch.compile."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils import _pytree as pytree

from fastsae import SparseCodes

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = float("nan")


def fixed() -> SparseCodes:
    """Three tokens, K = 3, d_sae = 5; the last token is empty."""
    acts = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0], [0.0, 0.0, 0.0]])
    indices = torch.tensor([[0, 3, 4], [1, 2, 4], [4, 4, 4]], dtype=torch.int32)
    return SparseCodes(acts, indices, 5)


def ragged() -> SparseCodes:
    """The same tokens, with two spare slots that hold invalid values."""
    acts = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, NAN, 7.0])
    indices = torch.tensor([0, 3, 1, 2, 4, 99, -1], dtype=torch.int32)
    return SparseCodes(acts, indices, 5, torch.tensor([0, 2, 5, 5]))


DENSE = torch.tensor([[1.0, 0, 0, 2, 0], [0, 3, 4, 0, 5], [0, 0, 0, 0, 0]])
both = pytest.mark.parametrize("make", [fixed, ragged])


@both
def test_sizes(make) -> None:
    codes = make().check()
    assert (codes.batch_shape, codes.n_tokens, codes.d_sae) == ((3,), 3, 5)
    assert codes.is_ragged == (make is ragged)
    assert codes.l0.tolist() == [2, 3, 0]
    assert codes.nnz.shape == ()
    assert int(codes.nnz) == 5


def test_only_fixed_codes_have_k() -> None:
    assert fixed().k == 3
    with pytest.raises(ValueError, match="a ragged code has no k"):
        _ = ragged().k


@both
def test_conversion_to_dense_and_back(make) -> None:
    codes = make()
    assert torch.equal(codes.to_dense(), DENSE)
    assert torch.equal(codes.to_torch_sparse_csr().to_dense(), DENSE)
    again = SparseCodes.from_dense(DENSE, None if codes.is_ragged else 3).check()
    assert torch.equal(again.to_dense(), DENSE)
    assert torch.equal(again.l0, codes.l0)
    if not codes.is_ragged:
        assert torch.equal(again.acts, codes.acts)
        assert torch.equal(again.indices, codes.indices)


def test_from_dense_refuses_more_non_zeros_than_k() -> None:
    with pytest.raises(ValueError, match="a token of A has 3 non-zeros, expected at most k = 2"):
        SparseCodes.from_dense(DENSE, 2)
    with pytest.raises(ValueError, match="k is 6, expected 1 <= k <= 5"):
        SparseCodes.from_dense(DENSE, 6)


def test_nan_is_occupied() -> None:
    A = torch.tensor([[0.0, NAN, 0.0]])
    codes = SparseCodes.from_dense(A, 2).check()
    assert codes.l0.tolist() == [1]
    assert codes.indices.tolist() == [[1, 2]]
    assert torch.equal(codes.to_dense().isnan(), A.isnan())


def test_dense_gradient_reaches_occupied_slots_only() -> None:
    for make in (fixed, ragged):
        codes = make()
        acts = codes.acts.clone().requires_grad_()
        code = SparseCodes(acts, codes.indices, 5, codes.offsets)
        (code.to_dense() * torch.arange(15.0).view(3, 5)).sum().backward()
        expected = torch.where(codes.occupied(), codes.token_ids().view(acts.shape) * 5.0 + codes.indices, 0)
        assert torch.equal(acts.grad, expected)


@pytest.mark.parametrize(
    "key", [slice(1, 3), slice(0, 0), torch.tensor([True, False, True]), torch.tensor([2, 0, 0]), 1, -1], ids=str
)
@both
def test_slicing_by_token(make, key) -> None:
    part = make()[key].check()
    expected = DENSE[key] if not isinstance(key, int) else DENSE[key][None]
    assert part.batch_shape == tuple(expected.shape[:-1])
    assert torch.equal(part.to_dense(), expected)


@both
def test_slicing_a_batch_of_sequences(make) -> None:
    codes = make().with_batch((1, 3))
    assert torch.equal(codes[0].to_dense(), DENSE)
    assert codes[0].batch_shape == (3,)
    assert torch.equal(codes[:, 1:].check().to_dense(), DENSE[None, 1:])
    with pytest.raises(IndexError):
        codes[0, 0, 0]


@both
def test_batches_flatten_and_come_back(make) -> None:
    codes = make()
    deep = codes.with_batch((1, 3, 1))
    assert deep.to_dense().shape == (1, 3, 1, 5)
    assert deep.l0.shape == (1, 3, 1)
    flat = deep.flatten().check()
    assert flat.batch_shape == (3,)
    assert torch.equal(flat.to_dense(), DENSE)


def test_one_token_needs_a_batch_dimension() -> None:
    with pytest.raises(ValueError, match=r"acts has shape \(3,\), expected \(\*batch, K\)"):
        SparseCodes(torch.ones(3), torch.arange(3, dtype=torch.int32), 5)


@both
def test_to_changes_the_acts_dtype_alone(make) -> None:
    codes = make().to(torch.float64)
    assert codes.acts.dtype == torch.float64
    assert codes.indices.dtype == torch.int32
    assert make().to(device="meta").acts.device.type == "meta"
    assert make().to("meta", dtype=torch.bfloat16).indices.device.type == "meta"


def test_rank_order() -> None:
    codes = SparseCodes.from_dense(torch.tensor([[2.0, 0, 5, 2]]), 4)
    assert codes.rank_order().tolist() == [[1, 0, 2, 3]]
    with pytest.raises(ValueError, match="ragged"):
        ragged().rank_order()


def broken(**changes) -> SparseCodes:
    base = ragged() if "offsets" in changes else fixed()
    values = {"acts": base.acts, "indices": base.indices, "d_sae": 5, "offsets": base.offsets, "batch_shape": (3,)}
    return SparseCodes(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"indices": fixed().indices.long()}, "indices have dtype torch.int64, expected torch.int32"),
        ({"indices": fixed().indices[:2]}, r"indices have shape \(2, 3\), expected that of acts, \(3, 3\)"),
        ({"d_sae": 3}, r"indices lie in \[0, 4\], expected \[0, 3\)"),
        ({"acts": fixed().acts.flip(1)}, "an empty slot .* comes before an occupied one"),
        ({"indices": fixed().indices.clamp(max=3)}, "has an index other than d_sae - 1 = 4"),
        ({"indices": fixed().indices.flip(1).contiguous(), "acts": torch.ones(3, 3)}, "are not strictly ascending"),
        ({"offsets": torch.tensor([0, 2, 1, 5])}, "offsets must rise from 0 to at most the capacity 7"),
        ({"offsets": torch.tensor([0, 2, 5, 8])}, "offsets must rise from 0 to at most the capacity 7"),
        ({"offsets": torch.tensor([0, 2, 5])}, r"offsets are torch.int64 of shape \(3,\), expected .* \(4,\)"),
        ({"offsets": torch.tensor([0, 3, 5, 5])}, "are not strictly ascending"),
    ],
)
def test_check_names_what_is_broken(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        broken(**changes).check()


@both
def test_pytree_pickle_and_deepcopy(make) -> None:
    codes = make()
    doubled = pytree.tree_map(lambda t: t * 2 if t.is_floating_point() else t, codes)
    assert isinstance(doubled, SparseCodes)
    assert torch.equal(doubled.to_dense(), 2 * DENSE)
    for other in (copy.deepcopy(codes), pickle.loads(pickle.dumps(codes))):  # the bytes are our own
        assert torch.equal(other.to_dense(), DENSE)
        assert other.batch_shape == codes.batch_shape


@both
@pytest.mark.long
def test_compile_takes_and_returns_codes(make) -> None:
    @torch.compile(fullgraph=True)
    def double(codes: SparseCodes) -> SparseCodes:
        return SparseCodes(codes.acts * 2, codes.indices, codes.d_sae, codes.offsets, codes.batch_shape)

    out = double(make())
    assert isinstance(out, SparseCodes)
    assert torch.equal(out.to_dense(), 2 * DENSE)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=st.integers(0, 6), m=st.integers(1, 9), density=st.floats(0, 1), seed=st.integers(0, 99))
def test_any_matrix_survives_the_round_trip(n: int, m: int, density: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(n, m, generator=g) * (torch.rand(n, m, generator=g) < density)
    for codes in (SparseCodes.from_dense(A), SparseCodes.from_dense(A, m)):
        assert torch.equal(codes.check().to_dense(), A)
        assert torch.equal(codes.to_torch_sparse_csr().to_dense(), A)
        assert torch.equal(codes[: n // 2].to_dense(), A[: n // 2])
        assert torch.equal(codes.l0, (A != 0).sum(1))
