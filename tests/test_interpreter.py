"""The mended interpreter against torch: a tiny kernel for each thing that the stock one gets wrong or lets pass."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from fastsae import env

triton = pytest.importorskip("triton", reason="triton is not installed")
if torch.cuda.is_available():
    pytest.skip("on a GPU kernels run compiled: nothing is mended", allow_module_level=True)
if not env.triton_is_interpreted():
    pytest.skip("the mended interpreter does not know this Triton", allow_module_level=True)

import triton.language as tl  # noqa: E402

from tests.interpreter import OutOfBounds  # noqa: E402

N = 64


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    if OP == "add":
        out = x + y
    elif OP == "mul":
        out = x * y
    elif OP == "sub":
        out = x - y
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "less":
        out = x < y
    elif OP == "where":
        out = tl.where(x < y, x, y)
    elif OP == "abs":
        out = tl.abs(x)
    elif OP == "negative":
        out = -x
    else:
        out = x + 0.3
    tl.store(out_ptr + i, out)


def arithmetic(op: str, x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(N, dtype=dtype)
    _arithmetic_kernel[(1,)](x, y, out, OP=op, N=N)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("op", "truth"),
    [
        ("add", torch.add), ("mul", torch.mul), ("sub", torch.sub), ("maximum", torch.maximum), ("less", torch.lt),
        ("where", torch.minimum), ("abs", lambda x, y: x.abs()), ("negative", lambda x, y: -x),
        ("constant", lambda x, y: x + torch.tensor(0.3, dtype=x.dtype)),
    ],
)  # fmt: skip
def test_arithmetic_gives_torchs_bits(op, truth, dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(N, generator=generator).mul(3).to(dtype) for _ in range(2))
    expected = truth(x, y)
    assert torch.equal(arithmetic(op, x, y, expected.dtype), expected)


def test_maximum_drops_nan() -> None:
    x = torch.full((N,), float("nan"))
    assert torch.equal(arithmetic("maximum", x, torch.ones(N), torch.float32), torch.ones(N))


@triton.jit
def _copy_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(out_ptr.dtype.element_ty))


AWKWARD = [
    1.0, 1.00390625, 1.01171875, 1.004, -1.00390625, 65504.0, 65520.0, 3.38e38, 3.4e38, 1e-40, 6e-8, 1e-8, 0.0, -0.0,
    float("inf"), float("-inf"),
]  # fmt: skip
"""Halfway cases next to an even and an odd neighbour, the limits of fp16 and bf16, subnormals."""


@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_round_to_nearest_even(source, target) -> None:
    values = torch.cat([torch.tensor(AWKWARD, dtype=torch.float64), torch.randn(N - len(AWKWARD), dtype=torch.float64)])
    x, out = values.to(source), torch.empty(N, dtype=target)
    _copy_kernel[(1,)](x, out, N=N)
    # Like Triton, hardware converts float64 to a narrow float through float32.
    assert torch.equal(out, x.to(torch.float32).to(target) if source == torch.float64 else x.to(target))


def test_nan_stays_nan_in_bf16() -> None:
    out = torch.zeros(N, dtype=torch.bfloat16)
    _copy_kernel[(1,)](torch.full((N,), float("nan")), out, N=N)
    assert out.isnan().all()


@triton.jit
def _toward_zero_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


def test_a_cast_can_truncate() -> None:
    x, out = torch.randn(N), torch.empty(N, dtype=torch.bfloat16)
    _toward_zero_kernel[(1,)](x, out, N=N)
    assert torch.equal(out.float().view(torch.int32), x.view(torch.int32) & -0x10000)


@triton.jit
def _dot_kernel(x_ptr, w_ptr, out_ptr, PRECISION: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out_ptr + at, tl.dot(tl.load(x_ptr + at), tl.load(w_ptr + at), input_precision=PRECISION))


def dot(x: torch.Tensor, w: torch.Tensor, precision: str = "ieee") -> torch.Tensor:
    out = torch.empty(N, N)
    _dot_kernel[(1,)](x, w, out, PRECISION=precision, N=N)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_accumulates_in_float32(dtype) -> None:
    torch.manual_seed(2)
    x, w = torch.randn(N, N).to(dtype), torch.randn(N, N).to(dtype)
    bound = 2**-23 * N * (x.double().abs() @ w.double().abs())  # a narrow accumulator is 2⁸ times coarser
    assert ((dot(x, w).double() - x.double() @ w.double()).abs() <= bound).all()


def test_tf32_rounding_shows() -> None:
    """On a GPU a float32 dot is TF32 unless input_precision says otherwise. A kernel without it has to fail here."""
    x = torch.full((N, N), 1 + 2**-12)
    assert torch.equal(dot(x, torch.eye(N)), x)
    assert torch.equal(dot(x, torch.eye(N), "tf32"), torch.ones(N, N))


@triton.jit
def _window_kernel(x_ptr, out_ptr, start, end, MASKED: tl.constexpr, N: tl.constexpr):
    i = start + tl.arange(0, N)
    if MASKED:
        tl.store(out_ptr + i, tl.load(x_ptr + i, mask=i < end, other=0.0), mask=i < end)
    else:
        tl.store(out_ptr + i, tl.load(x_ptr + i))


def test_an_unmasked_lane_out_of_bounds_raises() -> None:
    large, out = torch.randn(4 * N), torch.zeros(4 * N)
    view = large[N : 2 * N - 3]  # in the middle of valid memory: only the bounds can tell
    with pytest.raises(
        OutOfBounds, match=r"load of 3 of 64 live lanes out of bounds: element 61 of x_ptr, which has 61"
    ):
        _window_kernel[(1,)](view, out, 0, N, MASKED=False, N=N)
    with pytest.raises(OutOfBounds, match="element -1 of x_ptr"):
        _window_kernel[(1,)](view, out, -1, N, MASKED=False, N=N)
    _window_kernel[(1,)](view, out, 0, N - 3, MASKED=True, N=N)
    assert torch.equal(out[: N - 3], view)
    assert out[N - 3 :].eq(0).all()


def test_a_store_out_of_bounds_raises_and_writes_nothing() -> None:
    memory = torch.zeros(2 * N)
    with pytest.raises(OutOfBounds, match=r"store of 1 of 64 .*of out_ptr"):
        _window_kernel[(1,)](torch.ones(N), memory[: N - 1], 0, N, MASKED=False, N=N)
    assert memory.eq(0).all()


def test_the_memory_of_another_argument_is_out_of_bounds() -> None:
    memory = torch.zeros(2 * N)
    with pytest.raises(OutOfBounds, match="load of 64 of 64"):
        _window_kernel[(1,)](memory[:N], memory[N:], N, 0, MASKED=False, N=N)


def test_nothing_can_be_read_from_an_empty_tensor() -> None:
    with pytest.raises(OutOfBounds):
        _window_kernel[(1,)](torch.empty(0), torch.empty(N), 0, N, MASKED=False, N=N)


@triton.jit
def _assert_kernel(x_ptr, limit, N: tl.constexpr):
    tl.device_assert(tl.load(x_ptr + tl.arange(0, N)) < limit, "too large")


def test_device_assert_raises() -> None:
    x = torch.arange(N, dtype=torch.int32)
    _assert_kernel[(1,)](x, N, N=N)
    with pytest.raises(AssertionError, match="too large"):
        _assert_kernel[(1,)](x, N - 1, N=N)


@triton.jit
def _large_offset_kernel(x_ptr, out_ptr, row, stride, WIDE: tl.constexpr):
    row = row.to(tl.int64) if WIDE else row
    tl.store(out_ptr, tl.load(x_ptr + row * stride - row * stride))


def test_int32_overflow_raises_and_int64_does_not() -> None:
    x, out = torch.ones(1), torch.zeros(1)
    with pytest.raises(AssertionError, match="int32 overflow in mul"):
        _large_offset_kernel[(1,)](x, out, 70_000, 131_072, WIDE=False)
    _large_offset_kernel[(1,)](x, out, 70_000, 131_072, WIDE=True)
    assert out == 1


@triton.jit
def _far_kernel(x_ptr, out_ptr, far, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + far.to(tl.int64) * 4 + (i - far * 4)))


def test_pointers_move_by_elements_back_and_forth() -> None:
    x = torch.randn(N)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.int8):
        out = torch.empty(N, dtype=dtype)
        _far_kernel[(1,)](x.to(dtype), out, 400_000_000, N=N)
        assert torch.equal(out, x.to(dtype))


@triton.jit
def _later(latest_a, value_a, latest_b, value_b):
    """Not commutative: the right value, if it is set."""
    says = latest_b > 0
    return tl.where(says, latest_b, latest_a), tl.where(says, value_b, value_a)


@triton.jit
def _larger(value_a, index_a, value_b, index_b):
    first = value_a > value_b or (value_a == value_b and index_a < index_b)
    return tl.where(first, value_a, value_b), tl.where(first, index_a, index_b)


@triton.jit
def _reduce_kernel(x_ptr, out_ptr, index_ptr, OP: tl.constexpr, ROWS: tl.constexpr, N: tl.constexpr):
    row, i = tl.arange(0, ROWS), tl.arange(0, N)
    at = row[:, None] * N + i[None, :]
    x = tl.load(x_ptr + at)
    if OP == "sum":
        tl.store(out_ptr + row, tl.sum(x, axis=1))
    elif OP == "sum of all":
        tl.store(out_ptr, tl.sum(x))
    elif OP == "max":
        tl.store(out_ptr + row, tl.max(x, axis=1))
    elif OP == "argmax":
        tl.store(index_ptr + row, tl.argmax(x, axis=1))
    elif OP == "largest":
        value, index = tl.reduce((x, tl.broadcast_to(i[None, :], (ROWS, N))), 1, _larger)
        tl.store(out_ptr + row, value)
        tl.store(index_ptr + row, index)
    elif OP == "cumsum":
        tl.store(out_ptr + at, tl.cumsum(x, axis=1))
    elif OP == "reverse cumsum":
        tl.store(out_ptr + at, tl.cumsum(x, axis=1, reverse=True))
    elif OP == "sort":
        tl.store(out_ptr + at, tl.sort(x, descending=True))
    elif OP == "top 8":
        tl.store(out_ptr + row[:, None] * 8 + tl.arange(0, 8)[None, :], tl.topk(x, 8))
    elif OP == "fill":
        latest, value = tl.associative_scan(((x > 0).to(tl.int32), x), 1, _later)
        tl.store(out_ptr + at, tl.where(latest > 0, value, 0.0))


def filled(x: torch.Tensor) -> torch.Tensor:
    """Each number replaced by the last positive one up to it, 0 before the first."""
    place = torch.where(x > 0, torch.arange(x.shape[1]), -1).cummax(1).values
    return torch.where(place >= 0, x.gather(1, place.clamp_min(0)), 0)


REDUCTIONS = {
    "sum": lambda x: x.sum(1),
    "sum of all": lambda x: x.sum().reshape(1),
    "max": lambda x: x.amax(1),
    "cumsum": lambda x: x.cumsum(1),
    "reverse cumsum": lambda x: x.flip(1).cumsum(1).flip(1),
    "sort": lambda x: x.sort(1, descending=True).values,
    "top 8": lambda x: x.topk(8).values,
    "fill": filled,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
@pytest.mark.parametrize("op", REDUCTIONS)
def test_reductions_scans_and_sorts(op, dtype) -> None:
    x = torch.randn(8, N, generator=torch.Generator().manual_seed(3)).mul(100).to(dtype)
    expected = REDUCTIONS[op](x).to(dtype)
    out = torch.empty_like(expected)
    _reduce_kernel[(1,)](x, out, None, OP=op, ROWS=8, N=N)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("op", ["argmax", "largest"])
def test_ties_go_to_the_lower_index(op) -> None:
    x = torch.randint(0, 5, (8, N), generator=torch.Generator().manual_seed(4)).float()
    values, indices = torch.empty(8), torch.empty(8, dtype=torch.int32)
    _reduce_kernel[(1,)](x, values, indices, OP=op, ROWS=8, N=N)
    assert torch.equal(indices.long(), (x == x.amax(1, keepdim=True)).int().argmax(1))


def test_a_bf16_sum_adds_numbers_not_bits() -> None:
    x, out = torch.ones(8, N, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)
    _reduce_kernel[(1,)](x, out, None, OP="sum", ROWS=8, N=N)
    assert out.eq(N).all()


def test_a_generic_reduction_is_fast() -> None:
    """The stock interpreter works element by element and takes 1.5 s for this reduction."""
    x, values, indices = torch.randn(64, 256), torch.empty(64), torch.empty(64, dtype=torch.int32)
    start = time.perf_counter()
    _reduce_kernel[(1,)](x, values, indices, OP="largest", ROWS=64, N=256)
    assert time.perf_counter() - start < 0.5


@triton.jit
def _atomic_kernel(x_ptr, indices_ptr, out_ptr, count_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    index = tl.load(indices_ptr + i)
    tl.atomic_add(out_ptr + index, tl.load(x_ptr + i), mask=index >= 0)
    tl.atomic_add(count_ptr, 1)
    tl.atomic_max(count_ptr + 1, tl.program_id(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_atomics(dtype) -> None:
    indices = torch.arange(N, dtype=torch.int32) % 4 - 1
    out, count = torch.zeros(3, dtype=dtype), torch.zeros(2, dtype=torch.int32)
    _atomic_kernel[(5,)](torch.ones(N, dtype=dtype), indices, out, count, N=N)
    assert out.tolist() == [5 * N / 4] * 3
    assert count.tolist() == [5, 4]
    with pytest.raises(OutOfBounds, match="atomic of 16 of 48"):
        _atomic_kernel[(1,)](torch.ones(N, dtype=dtype), indices, out[:2], count, N=N)


@triton.jit
def _argument_kernel(x_ptr, out_ptr, scale, flag, N: tl.constexpr):
    i = tl.arange(0, N)
    out = tl.load(x_ptr + i) * scale  # a float argument is a float32 tensor, so the product is float32 too
    tl.store(out_ptr + i, tl.where(flag and not (i < 2), out, 0.0))


def test_arguments_and_boolean_operators_work_as_when_compiled() -> None:
    x, out = torch.randn(N).to(torch.bfloat16), torch.empty(N)
    _argument_kernel[(1,)](x, out, 0.1, True, N=N, num_warps=2)
    expected = x.float() * torch.tensor(0.1)
    expected[:2] = 0
    assert torch.equal(out, expected)
    with pytest.raises(KeyError, match="num_wraps"):
        _argument_kernel[(1,)](x, out, 0.1, True, N=N, num_wraps=2)


@triton.jit
def _loop_kernel(out_ptr, count):
    total = tl.full((), 0, tl.int32)
    for i in tl.range(0, count):
        total += i
    tl.store(out_ptr + tl.program_id(0), total)


def test_programs_are_cheap() -> None:
    """A thousand programs, each with a loop to a bound from the device (numpy 2.4 breaks these in Triton 3.6)."""
    out = torch.empty(1000, dtype=torch.int32)
    start = time.perf_counter()
    _loop_kernel[(1000,)](out, 4)
    assert out.eq(6).all()
    assert time.perf_counter() - start < 2.0


def test_other_versions_and_late_switches_are_refused() -> None:
    code = "import triton; triton.__version__ = '3.99.0'; from tests.interpreter import mend; mend()"
    late = "from tests.interpreter import mend; mend()"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for source, message in ((code, "Triton 3.6 to 3.9, found 3.99.0"), (late, "before TRITON_INTERPRET=1 was set")):
        run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=environment, cwd=root)
        assert run.returncode == 1
        assert message in run.stderr
