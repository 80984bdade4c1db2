"""What only the CPU backend promises: bits that do not depend on threads, every instruction set, any memory layout.

tests/test_ops.py compares its results in float32 and bfloat16 with the truth. Here float64 is tested too, and the
inputs are large enough that several threads take part and a hot latent is cut into pieces.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastsae import SparseCodes, _cpu, ops, reference
from fastsae.backends import BackendError, cpu
from fastsae.backends.cpu import memory as cpu_memory
from fastsae.backends.cpu import screen as cpu_screen
from tests import truth
from tests.cases import DTYPES

N, D, M = 700, 75, 512
HOT, DEAD = 3, slice(100, 110)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def fixed(dtype: torch.dtype) -> SparseCodes:
    """K = 40, a quarter of the slots empty, HOT active for every token."""
    g = torch.Generator().manual_seed(1)
    rank = torch.rand(N, M, generator=g)
    rank[:, HOT], rank[:, DEAD] = 2, -1
    A = torch.where(rank >= rank.topk(40).values[:, -1:], torch.randn(N, M, generator=g), 0)
    A[torch.rand(N, M, generator=g) < 0.25] = 0
    A[:, HOT] = 1.5
    return SparseCodes.from_dense(A.to(dtype), 40)


def ragged(dtype: torch.dtype) -> SparseCodes:
    """Heavy-tailed: token 0 has all living latents, a quarter of the tokens none, the rest HOT; spare slots last."""
    g = torch.Generator().manual_seed(2)
    share = (0.04 / torch.rand(N, 1, generator=g)).clamp(max=1)
    share[0], share[1::4] = 1, 0
    active = torch.rand(N, M, generator=g) < share
    active[:, HOT], active[:, DEAD] = share[:, 0] > 0, False
    A = torch.where(active, torch.randn(N, M, generator=g).clamp(min=0.01), 0)
    codes = SparseCodes.from_dense(A.to(dtype))
    spare = torch.full((9,), float("nan"), dtype=dtype)
    wild = torch.full((9,), -(2**31), dtype=torch.int32)
    return SparseCodes(torch.cat([codes.acts, spare]), torch.cat([codes.indices, wild]), M, codes.offsets)


both_layouts = pytest.mark.parametrize("make", [fixed, ragged], ids=["fixed", "ragged"])


def rows(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def results(codes: SparseCodes, x: Tensor, W: Tensor) -> dict[str, Tensor]:
    order = ops.by_latent(codes, backend="cpu")
    return {
        "decode": ops.decode(codes, W, backend="cpu"),
        "active_dot": ops.active_dot(x, codes, W, backend="cpu"),
        "active_outer": ops.active_outer(codes, x, backend="cpu"),
        "active_outer of an order": ops.active_outer(codes, x, by_latent=order, backend="cpu"),
        "offsets": order.offsets,
        "tokens": order.tokens,
        "slots": order.slots,
    }


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor], why: str) -> None:
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), f"{name}: {why}"


@pytest.fixture
def restore() -> Iterator[None]:
    threads, isa = torch.get_num_threads(), _cpu.isa()
    yield
    torch.set_num_threads(threads)
    _cpu.use_isa(isa)


def test_the_codes_meet_the_conditions_of_these_tests() -> None:
    """Otherwise the tests below would pass without meeting a hot latent, a heavy tail or a second thread."""
    for codes in (fixed(torch.float32), ragged(torch.float32)):
        uses = (codes.to_dense() != 0).sum(0)
        assert int(uses[HOT]) > 512, "kPiece of active_outer.cpp: a longer latent is cut"
        assert int(uses[DEAD].sum()) == 0
        assert int(codes.nnz) * D > 2**17, "team() of ops.h: one thread does less work alone"
    assert int(ragged(torch.float32).l0.max()) > 10 * int(ragged(torch.float32).l0.median())


@every_dtype
@both_layouts
@pytest.mark.usefixtures("restore")
def test_bits_do_not_depend_on_the_number_of_threads(make, dtype: torch.dtype) -> None:
    codes, x, W = make(dtype), rows(N, dtype, 3), rows(M, dtype, 4)
    torch.set_num_threads(1)
    expected = results(codes, x, W)
    for threads in (2, 3, 2):
        torch.set_num_threads(threads)
        assert_same_bits(results(codes, x, W), expected, f"{threads} threads and 1 differ")


@pytest.mark.usefixtures("restore")
def test_a_sort_large_enough_for_threads() -> None:
    g = torch.Generator().manual_seed(6)
    acts = torch.rand(4200, 256, generator=g).sub_(0.25).clamp_(min=0)
    codes = SparseCodes(acts, torch.randint(0, M, acts.shape, generator=g).int(), M)
    assert acts.numel() > 2**20, "kParallelSlots of by_latent.cpp"
    occupied = acts.flatten().nonzero().squeeze(1)
    expected = occupied[codes.indices.flatten()[occupied].argsort(stable=True)]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        order = ops.by_latent(codes, backend="cpu")
        assert torch.equal(order.offsets.diff(), codes.indices.flatten()[occupied].bincount(minlength=M))
        assert torch.equal(order.slots[: len(expected)], expected), f"{threads} threads"
        assert torch.equal(order.tokens[: len(expected)], (expected // 256).int()), f"{threads} threads"


@every_dtype
@both_layouts
@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.usefixtures("restore")
def test_every_instruction_set_against_float64(make, dtype: torch.dtype, isa: str) -> None:
    _cpu.use_isa(isa)
    codes, x, W = make(dtype), rows(N, dtype, 3), rows(M, dtype, 4)
    got = results(codes, x, W)
    A, x64, W64 = codes.to(torch.float64).to_dense(), x.double(), W.double()
    truth.assert_within(got["decode"], A @ W64, A.abs() @ W64.abs(), "decode")
    for name in ("active_outer", "active_outer of an order"):
        truth.assert_within(got[name], A.mT @ x64, A.abs().mT @ x64.abs(), name)
        assert bool((got[name][DEAD] == 0).all()), "a latent without entries has a row of 0"
    slots = codes.occupied()
    tokens, latents = codes.token_ids().view(slots.shape)[slots], codes.indices[slots].long()
    dense, magnitude = reference.active_dot(x64, W64), reference.active_dot(x64.abs(), W64.abs())
    truth.assert_within(got["active_dot"][slots], dense[tokens, latents], magnitude[tokens, latents], "active_dot")
    assert bool((got["active_dot"][~slots] == 0).all()), "an empty slot has a dot product"


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.parametrize("width", [1, 3, 4, 15, 16, 17, 31, 64, 100, 255, 256, 257, 400, 768])
@pytest.mark.usefixtures("restore")
def test_every_width_of_a_row(isa: str, width: int) -> None:
    """Tiles, half tiles, single registers and the tail after them; small integers make every order of sums exact."""
    _cpu.use_isa(isa)
    g = torch.Generator().manual_seed(5)
    for dtype in DTYPES:
        W = torch.randint(-3, 4, (20, width), generator=g).to(dtype)
        x = torch.randint(-1, 2, (6, width), generator=g).to(dtype)
        A = torch.randint(0, 2, (6, 20), generator=g).to(dtype)
        codes = SparseCodes.from_dense(A)
        assert torch.equal(ops.decode(codes, W, backend="cpu"), A @ W)
        assert torch.equal(ops.active_outer(codes, x, backend="cpu"), A.mT @ x)
        tokens, latents = A.nonzero(as_tuple=True)
        expected = (x.double() @ W.double().mT)[tokens, latents].to(dtype)  # one rounding, also in bfloat16
        assert torch.equal(ops.active_dot(x, codes, W, backend="cpu"), expected)


def layouts(t: Tensor) -> dict[str, Tensor]:
    """The same matrix in other memory: rows apart, columns apart, transposed, at an odd address."""
    n, d = t.shape
    apart, columns, padded, odd = (
        t.new_empty(2 * n, d),
        t.new_empty(n, 2 * d),
        t.new_empty(n, d + 5),
        t.new_empty(n * d + 1),
    )
    views = {
        "rows apart": apart[::2], "columns apart": columns[:, ::2], "padded": padded[:, 2:-3],
        "transposed": t.new_empty(d, n).mT, "odd address": odd[1:].view(n, d),
    }  # fmt: skip
    for view in views.values():
        view.copy_(t)
    return views


@every_dtype
@both_layouts
def test_memory_layout_changes_nothing(make, dtype: torch.dtype) -> None:
    codes, x, W = make(dtype), rows(N, dtype, 3), rows(M, dtype, 4)
    expected = results(codes, x, W)
    for name, view in layouts(W).items():
        assert_same_bits(results(codes, layouts(x)[name], view), expected, f"{name} differs")
    if not codes.is_ragged:
        for name, view in layouts(codes.acts).items():
            other = SparseCodes(view, layouts(codes.indices)[name], M)
            assert_same_bits(results(other, x, W), expected, f"codes with {name} differ")


@every_dtype
@both_layouts
def test_rows_that_lie_apart_are_read_in_place(make, dtype: torch.dtype) -> None:
    """Calls the backend directly, since the library copies such tensors. It takes any row stride, 0 included."""
    codes, x, W = make(dtype), rows(N, dtype, 3), rows(M, dtype, 4)
    code = codes.acts, codes.indices, codes.offsets
    for name in ("rows apart", "padded"):
        far_x, far_W = layouts(x)[name], layouts(W)[name]
        assert far_W.stride(0) != D
        assert torch.equal(cpu.decode(*code, far_W), cpu.decode(*code, W))
        assert torch.equal(cpu.active_dot(far_x, *code, far_W), cpu.active_dot(x, *code, W))
        assert torch.equal(cpu.active_outer(*code, far_x, M, None), cpu.active_outer(*code, x, M, None))
    one = x[:1].expand(N, D)
    assert torch.equal(cpu.active_outer(*code, one, M, None), cpu.active_outer(*code, one.contiguous(), M, None))


@pytest.mark.parametrize("isa", _cpu.isas())
@pytest.mark.usefixtures("restore")
def test_slots_and_rows_past_2_to_the_31(isa: str) -> None:
    """Codes whose first slot has index 2^32, and a dictionary with a row stride of 2^32: both need int64 offsets.

    The memory before them does not exist; the pointers are shifted so that the first accesses land in real memory.
    """
    _cpu.use_isa(isa)
    far, f32, i32, i64 = 2**32, _cpu.Dtype.f32, _cpu.Dtype.i32, _cpu.Dtype.i64
    acts, indices = torch.tensor([2.0, 3.0, 5.0]), torch.tensor([1, 1, 1], dtype=torch.int32)
    offsets = far + torch.tensor([0, 1, 3])
    places = (
        _cpu.Numbers(acts.data_ptr() - 4 * far, far + 3, f32),
        _cpu.Numbers(indices.data_ptr() - 4 * far, far + 3, i32),
        _cpu.Numbers(offsets.data_ptr(), 3, i64),
    )
    codes = _cpu.Codes(*places, n=2, k=0, d_sae=2)
    row, x, out = torch.arange(20.0), torch.ones(2, 20), torch.empty(2, 20)
    W = _cpu.Matrix(_cpu.Numbers(row.data_ptr() - 4 * far, far + 20, f32), 2, 20, far)

    _cpu.decode(codes, W, cpu_memory.matrix("out", out), 2)
    assert torch.equal(out, torch.stack([2 * row, 8 * row]))

    dots = torch.empty(3)
    _cpu.active_dot(cpu_memory.matrix("x", x), codes, W, _cpu.Numbers(dots.data_ptr() - 4 * far, far + 3, f32), 2)
    assert dots.tolist() == [190.0] * 3

    order = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.int32), torch.empty(3, dtype=torch.int64)
    # Of as many entries as the code has slots; only the first three are written.
    sizes = ((3, i64), (far + 3, i32), (far + 3, i64))
    by_latent = _cpu.LatentOrder(
        *(_cpu.Numbers(t.data_ptr(), n, dtype) for t, (n, dtype) in zip(order, sizes, strict=True))
    )
    _cpu.by_latent(codes, by_latent, 2)
    assert [t.tolist() for t in order] == [[0, 0, 3], [0, 1, 1], [far, far + 1, far + 2]]

    _cpu.active_outer(codes, by_latent, cpu_memory.matrix("x", x), cpu_memory.matrix("out", out), 2)
    assert out.tolist() == [[0.0] * 20, [10.0] * 20]


def test_structs_keep_their_tensors_alive() -> None:
    """Each is made of temporaries, which live as long as it does, through whatever it is made of, and no longer."""
    alive: list[weakref.ref[Tensor]] = []

    def kept(t: Tensor) -> Tensor:
        alive.append(weakref.ref(t))
        return t

    def vector(n: int, dtype: torch.dtype = torch.float32) -> _cpu.Numbers:
        return cpu_memory.numbers("vector", kept(torch.zeros(n, dtype=dtype)), dtype, (n,))

    def matrix() -> _cpu.Matrix:
        return cpu_memory.matrix("matrix", kept(torch.zeros(3, 5)))

    def codes() -> _cpu.Codes:
        offsets = kept(torch.zeros(4, dtype=torch.int64))
        return cpu_memory.codes(kept(torch.zeros(6)), kept(torch.zeros(6, dtype=torch.int32)), offsets, 3)

    def narrow() -> _cpu.Screen:
        tensors = [kept(t) for t in cpu_screen.allocate(3, 5, _cpu.tight_format())]
        return cpu_screen.view(tensors, 3, 5)

    def term() -> _cpu.UpdateTerm:
        code = codes()
        order = cpu_memory.latent_order(code, kept(torch.zeros(4, dtype=torch.int64)), *map(kept, entries()))
        _cpu.by_latent(code, order, 1)
        return _cpu.UpdateTerm(code, order, matrix(), matrix(), vector(6), True)

    def entries() -> tuple[Tensor, Tensor]:
        return torch.zeros(6, dtype=torch.int32), torch.zeros(6, dtype=torch.int64)

    makers: dict[Callable[[], object], int] = {
        lambda: vector(3): 1,
        matrix: 1,
        codes: 3,
        narrow: 3,  # the format's number is read, not kept
        term: 9,
        lambda: _cpu.EncodeArgs(
            matrix(), matrix(), vector(3), vector(3), vector(3, torch.int32), 0, 1, True, True, narrow(), 1
        ): 8,
        lambda: _cpu.UpdateParts(vector(3), 1, vector(3), vector(15), vector(15), vector(3)): 5,
        lambda: _cpu.Parameter(*(vector(n) for n in (6, 6, 6, 3, 3)), 0, 0): 5,
    }
    for make, count in makers.items():
        alive.clear()
        made = make()
        assert sum(t() is not None for t in alive) == count
        del made
        assert not any(t() is not None for t in alive)


@every_dtype
def test_nothing_active(dtype: torch.dtype) -> None:
    W, x = rows(M, dtype, 4), rows(5, dtype, 3)
    none = torch.zeros(5, 3, dtype=dtype)
    for codes, n in (
        (SparseCodes(none, torch.full((5, 3), M - 1, dtype=torch.int32), M), 5),
        (SparseCodes(none[:0], torch.empty(0, 3, dtype=torch.int32), M), 0),
        (SparseCodes(none[:, 0], torch.full((5,), -7, dtype=torch.int32), M, torch.zeros(6, dtype=torch.int64)), 5),
        (SparseCodes(none[:0, 0], torch.empty(0, dtype=torch.int32), M, torch.zeros(1, dtype=torch.int64)), 0),
    ):
        assert torch.equal(ops.decode(codes, W, backend="cpu"), W.new_zeros(n, D))
        assert torch.equal(ops.active_dot(x[:n], codes, W, backend="cpu"), torch.zeros_like(codes.acts))
        assert torch.equal(ops.active_outer(codes, x[:n], backend="cpu"), W.new_zeros(M, D))
        order = ops.by_latent(codes, backend="cpu")
        assert torch.equal(order.offsets, torch.zeros(M + 1, dtype=torch.int64))
        assert bool((order.tokens == -1).all())
        assert bool((order.slots == -1).all())


@every_dtype
def test_a_nan_act_is_not_an_empty_slot_and_an_act_of_0_adds_nothing(dtype: torch.dtype) -> None:
    nan = float("nan")
    acts = torch.tensor([[1.0, nan, 0.0], [2.0, -0.0, 0.0]], dtype=dtype)
    codes = SparseCodes(acts, torch.tensor([[0, 1, 2], [0, 2, 2]], dtype=torch.int32), 3)
    W = torch.tensor([[1.0], [1.0], [nan]], dtype=dtype).repeat(1, D)  # wide enough for tiles and a tail
    x = torch.ones(2, D, dtype=dtype)
    order = ops.by_latent(codes, backend="cpu")
    assert [order.offsets.tolist(), order.tokens.tolist()] == [[0, 2, 3, 3], [0, 1, 0, -1, -1, -1]]
    recon = ops.decode(codes, W, backend="cpu")
    assert bool(recon[0].isnan().all())
    assert bool((recon[1] == 2).all()), "the NaN row of an act of 0 reached the reconstruction"
    outer = ops.active_outer(codes, x, backend="cpu")
    assert bool((outer[0] == 3).all())
    assert bool(outer[1].isnan().all())
    assert bool((outer[2] == 0).all())


@every_dtype
def test_an_act_of_0_in_a_ragged_code_is_an_entry(dtype: torch.dtype) -> None:
    """The offsets decide which slots are occupied. A gradient may be 0 by chance, and its slot has a dot product."""
    acts = torch.tensor([0.0, 2.0, 0.0], dtype=dtype)
    codes = SparseCodes(acts, torch.tensor([0, 1, 1], dtype=torch.int32), 2, torch.tensor([0, 2, 3]))
    order = ops.by_latent(codes, backend="cpu")
    assert [t.tolist() for t in (order.offsets, order.tokens, order.slots)] == [[0, 1, 3], [0, 0, 1], [0, 1, 2]]
    x, W = torch.ones(2, D, dtype=dtype), torch.ones(2, D, dtype=dtype)
    assert ops.active_dot(x, codes, W, backend="cpu").tolist() == [D] * 3


def test_unsupported_inputs_are_refused() -> None:
    codes, W = fixed(torch.float32), rows(M, torch.float32, 4)
    with pytest.raises(BackendError, match=r"cpu: .*torch\.float16"):
        torch.ops.fastsae.decode(codes.acts.half(), codes.indices, None, W.half(), "cpu")
    assert "is on meta" in (cpu.supports("decode", codes.acts.to("meta"), codes.indices, W) or "")
