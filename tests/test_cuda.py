"""What the CUDA backend refuses and how, and that no thread order changes a bit. The shared tests cover its ops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import ops, reference
from tests import truth
from tests.cases import BY_NAME
from tests.test_optimizers import set_optimizer
from tests.test_update_parts import with_parts
from tests.update_case import check, gradient_truth, make_problem

pytestmark = pytest.mark.skipif(
    "cuda" not in truth.BACKENDS, reason="no CUDA kernels here: no GPU, and no emulation (make test-cuda)"
)
if "cuda" in truth.BACKENDS:
    from fastsae.backends.cuda import stages
    from fastsae.backends.cuda.library import EMULATED, library, where
else:
    EMULATED = False
only_emulated = pytest.mark.skipif(not EMULATED, reason="only the emulation can refuse a launch on demand")


def _decode_arguments() -> tuple[Tensor, ...]:
    codes, _, W = truth.fixed_codes(BY_NAME["odd"], torch.float32)
    return codes.acts, codes.indices, W


# -- refused before anything is launched ------------------------------------------------------------------------------


def test_a_strided_tensor_is_refused() -> None:
    acts, indices, W = _decode_arguments()
    out = torch.empty(2 * acts.shape[0], W.shape[1])[::2]
    with pytest.raises(ValueError, match=r"got a \(37, 65\) tensor that is not contiguous; pass t.contiguous\(\)"):
        library.decode(where(W), acts, indices, None, W, out, None, 0, None)


def test_memory_that_begins_inside_an_element_is_refused() -> None:
    acts, indices, W = _decode_arguments()
    odd = torch.frombuffer(bytearray(W.numel() * 4 + 2), dtype=torch.float32, count=W.numel(), offset=2).view(W.shape)
    out = torch.empty(acts.shape[0], W.shape[1])
    with pytest.raises(ValueError, match="float32 whose memory does not begin at a multiple of its element size"):
        library.decode(where(W), acts, indices, None, odd, out, None, 0, None)


def test_another_device_is_refused() -> None:
    acts, indices, W = _decode_arguments()
    out = torch.empty(acts.shape[0], W.shape[1])
    with pytest.raises(ValueError, match=r"decode got a \(37, 5\) tensor on cpu, expected all of them on cuda:7"):
        library.decode(library.Where(7, 0), acts, indices, None, W, out, None, 0, None)


def test_a_dtype_without_kernels_is_refused() -> None:
    acts, indices, W = _decode_arguments()
    with pytest.raises(fastsae.BackendError, match=r"cuda: decode has no kernel for torch\.float64"):
        torch.ops.fastsae.decode(acts.double(), indices, None, W.double(), "cuda")
    with pytest.raises(TypeError, match=r"got a tensor of torch\.complex64, and no kernel takes one"):
        library.decode(where(W), acts.to(torch.complex64), indices, None, W, W, None, 0, None)


# -- refused by the device --------------------------------------------------------------------------------------------


@only_emulated
def test_a_failed_launch_names_op_device_and_shapes() -> None:
    acts, indices, W = _decode_arguments()
    library.emulate(refuse="decode")
    with pytest.raises(fastsae.BackendError) as caught:
        torch.ops.fastsae.decode(acts, indices, None, W, "cuda")
    for part in ("fastsae.decode failed in decode on cpu", "float32 (37, 5)", "int32 (37, 5)", "float32 (259, 65)"):
        assert part in str(caught.value)
    library.emulate()
    torch.ops.fastsae.decode(acts, indices, None, W, "cuda")


@only_emulated
@pytest.mark.parametrize(
    ("name", "kernel"),
    [(name, kernel) for name, rows in (("random", "update_rows"), ("odd", "update_wide"))
     for kernel in ("list_slots", rows, "column_sums", "update_bias")],
)  # fmt: skip
def test_a_refused_launch_changes_no_parameter(name: str, kernel: str) -> None:
    ours, untouched = make_problem(BY_NAME[name], torch.float32), make_problem(BY_NAME[name], torch.float32)
    library.emulate(refuse=kernel)
    with pytest.raises(fastsae.BackendError, match=kernel):
        ours.run("cuda")
    for name, p in untouched.params.items():
        assert torch.equal(ours.params[name], p), f"{name} changed"
    assert all(map(torch.equal, ours.moments, untouched.moments))


@only_emulated
def test_a_screen_that_could_not_be_refilled_is_not_trusted() -> None:
    case = BY_NAME["random"]
    problem = make_problem(case, torch.float32)
    W, b = problem.params["W_enc"], problem.params["b_enc"]
    screen = ops.prepare_screen(W, b, backend="cuda")
    assert screen is not None
    library.emulate(refuse="narrow_rows")
    with pytest.raises(fastsae.BackendError, match="narrow_rows"):
        problem.run("cuda", screen=screen)
    library.emulate()
    W.mul_(-1)  # the old copy is certainly wrong for these weights
    x = case.inputs(torch.float32)[0][:8]
    codes = ops.encode_topk(x, W, b, case.K, screen=screen, backend="cuda")
    assert int(codes.redone) == 8
    pre, magnitude = truth.scores(x, W, b)
    truth.assert_top_k(codes, pre, magnitude, case.K, exact=False)


def test_more_latents_than_a_token_can_choose_are_refused() -> None:
    x, W, b = torch.ones(1, 4), torch.ones(9000, 4), torch.zeros(9000)
    with pytest.raises(fastsae.BackendError, match="k is 8193, and it chooses at most 8192 latents of a token"):
        ops.encode_topk(x, W, b, 8193, backend="cuda")
    assert ops.encode_topk(x, W, b, 8193, backend=None).k == 8193


# -- one result -------------------------------------------------------------------------------------------------------


@only_emulated
def test_no_order_of_threads_changes_a_bit() -> None:
    case = BY_NAME["random"]
    x, W, b = case.inputs(torch.float32)

    def results(seed: int) -> list[Tensor]:
        library.emulate(seed=seed)
        codes = ops.encode_topk(x, W, b, case.K, backend="cuda")
        above, _ = ops.encode_above(x, W, b, torch.tensor(0.5), 20_000, backend="cuda")
        problem = make_problem(BY_NAME["odd"], torch.float32)
        stats = problem.run("cuda")
        return [
            codes.acts, codes.indices, above.acts, above.indices, ops.decode(codes, W, backend="cuda"),
            ops.decode(above, W, backend="cuda"), ops.active_dot(x, above, W, backend="cuda"),
            ops.active_outer(codes, x, backend="cuda"), *problem.params.values(), *problem.moments, stats,
        ]  # fmt: skip

    first = results(0)
    for seed in (1, 2, 3):
        assert all(map(torch.equal, first, results(seed)))


# -- codes with a heavy tail ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_that_are_cut_into_pieces(dtype: torch.dtype) -> None:
    """One token has most of the entries, so its sum, its error and its squares are computed in pieces."""
    g = torch.Generator().manual_seed(0)
    N, D, M = 40, 70, 900
    dense = torch.where(torch.rand(N, M, generator=g) < 4 / M, torch.randn(N, M, generator=g), 0)
    dense[7] = torch.randn(M, generator=g)
    codes = fastsae.SparseCodes.from_dense(dense.to(dtype))
    W, x, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((M, D), (N, D), (D,)))
    A, W64 = codes.to(torch.float64).to_dense(), W.double()
    truth.assert_within(ops.decode(codes, W, backend="cuda"), A @ W64, A.abs() @ W64.abs())
    error, squares = ops.decode_error(codes, W, x, bias, backend="cuda")
    expected = A @ W64 + bias.double() - x.double()
    truth.assert_within(error, expected, A.abs() @ W64.abs() + bias.double().abs() + x.double().abs())
    torch.testing.assert_close(squares, expected.square().sum(1), rtol=1e-5, atol=0)


# -- rows that a whole number of steps fills: kernels without a bound -------------------------------------------------


@pytest.mark.parametrize("D", [384, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"tied": True, "aux": True}], ids=["plain", "tied-aux"])
def test_an_update_of_rows_that_are_filled(D: int, dtype: torch.dtype, options: dict[str, bool]) -> None:
    """Latents of no, one, two, three, four and more entries, and one that is cut into pieces."""
    case = replace(BY_NAME["hot-latent"], D=D, N=90, M=70, K=3)
    problem = make_problem(case, dtype, **options)
    used = torch.bincount(problem.terms[0].codes.indices.flatten().long(), minlength=case.M)
    assert {0, 1, 2, 3, 4, 5} <= set(used.tolist())
    assert int(used.max()) > 64
    check(problem, "cuda")


@only_emulated
@pytest.mark.parametrize("D", [48, 384, 512])
@pytest.mark.parametrize("kind", list(reference.MOMENTS_OF))
@pytest.mark.parametrize("options", [{}, {"tied": True, "unit_norm": False}], ids=["plain", "tied"])
def test_every_rule_with_all_parts_in_shared_memory(D: int, kind: str, options: dict[str, bool]) -> None:
    """Rows of other kernels than in test_update_parts.py, whose rows are not of whole 16 bytes."""
    problem = make_problem(replace(BY_NAME["hot-latent"], D=D, N=90, M=40, K=3), torch.float32, ragged=True, **options)
    with_parts(
        set_optimizer(problem, kind, 0.0 if kind == "adam" else 0.2),
        "dacts",
        "pull",
        "db_enc",
        "added",
        "scale",
        "clip",
    )
    library.emulate(refuse="update_wide")
    norms = problem.run("cuda", norms_only=True)
    grads, _ = gradient_truth(problem)
    unscaled = reference.squared_norms(grads) / float(problem.settings["grad_scale"]) ** 2
    torch.testing.assert_close(norms, unscaled, rtol=1e-4, atol=1e-10)
    check(problem, "cuda")


@only_emulated
@pytest.mark.parametrize("kind", ["adam", "lion"])
@pytest.mark.parametrize("part", ["none", "dacts", "db_enc", "pull", "added"])
def test_which_kernel_steps_bf16_moments(part: str, kind: str) -> None:
    """Lion, and what adds parts of rows, take more registers beside bf16 moments than rows in registers leave."""
    problem, twin = (
        with_parts(
            set_optimizer(make_problem(replace(BY_NAME["random"], D=384, N=40, M=70, K=3), torch.float32), kind, 0.0),
            part,
        )
        for _ in range(2)
    )
    for p in (problem, twin):
        p.moments = [m.bfloat16() for m in p.moments]
    is_wide = kind == "lion" or part in ("pull", "added")
    library.emulate(refuse="update_rows" if is_wide else "update_wide")
    problem.run("cuda", seed=5)
    twin.run("reference", seed=5)
    for name, p in twin.params.items():
        torch.testing.assert_close(problem.params[name], p, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(problem.moments, twin.moments, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=1e-6)
    library.emulate(refuse="update_wide" if is_wide else "update_rows")
    with pytest.raises(fastsae.BackendError):
        problem.run("cuda", seed=5)


def test_an_infinite_row_spoils_no_other_latent() -> None:
    """Past its end a latent's last entry is read again: times an infinite weight it must not count."""
    problem = make_problem(replace(BY_NAME["random"], D=384, N=40, M=70, K=3), torch.float32)
    used = torch.bincount(problem.terms[0].codes.indices.flatten().long(), minlength=70)
    one = int((used == 1).nonzero()[0])
    problem.params["W_dec"][one, 5] = float("inf")
    problem.run("cuda")
    others = torch.arange(70) != one
    for name in ("W_enc", "W_dec", "b_enc"):
        assert bool(problem.params[name][others].isfinite().all())


# -- tokens without a certificate -------------------------------------------------------------------------------------


@pytest.mark.parametrize("listed", [3, 4, 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_without_a_certificate_in_batches(
    listed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinite residuals leave no token certified: a first batch, others tile by tile, with the bits of active_dot."""
    g = torch.Generator().manual_seed(0)
    N, D, M, K = listed, 40, 203, 5
    x, W = torch.randn(N, D, generator=g).to(dtype), torch.randn(M, D, generator=g).to(dtype)
    b = (0.1 * torch.randn(M, generator=g)).to(dtype)
    screen = ops.prepare_screen(W, b, backend="cuda")
    assert screen is not None
    screen.tensors[3].fill_(float("inf"))
    monkeypatch.setattr(stages, "SLOTS", 3)
    counts: list[Tensor] = []
    launch = library.exhaustive_top_k
    monkeypatch.setattr(library, "exhaustive_top_k", lambda *a: (counts.append(a[-1]), launch(*a))[1])
    codes = ops.encode_topk(x, W, b, K, screen=screen, backend="cuda").check()
    assert int(codes.redone) == listed
    batches, tiles = -(-listed // 3), -(-M // 24)
    taken, scored, selected = counts[0].tolist()
    assert (scored, selected) == ((batches - 1) * tiles, listed - 3)
    assert taken >= (batches - 1) * (tiles + 3)
    if dtype == torch.float32:
        every = fastsae.SparseCodes(torch.ones(N, M), torch.arange(M).int().repeat(N, 1), M)
        scores = ops.active_dot(x, every, W, backend="cuda") + b
        assert torch.equal(codes.to_dense(), reference.keep_top_k(scores, K))
    pre, magnitude = truth.scores(x, W, b)
    truth.assert_top_k(codes, pre, magnitude, K, exact=False)
