"""What the public functions and the raw ops refuse before a backend runs, and with which message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsae import SparseCodes, UpdateTerm, ops
from tests.small_case import D, K, M, N, both_codes, encode, every_backend, inputs, raw, update_arguments

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(D)}, ValueError, r"x has shape \(8,\), expected \(\*batch, 8\).*x\[None\]"),
        ({"x": torch.ones(N, D + 1)}, ValueError, r"x has shape \(6, 9\) and W \(16, 8\).*9 != 8"),
        ({"x": torch.ones(N, D).double()}, TypeError, "x has dtype torch.float64 but W has torch.float32.*autocast"),
        ({"x": torch.ones(N, D, device="meta")}, ValueError, "x is on meta but W is on cpu"),
        ({"W": torch.ones(D)}, ValueError, r"W has shape \(8,\), expected \(M, D\)"),
        ({"W": torch.ones(M, D).int()}, TypeError, "W has dtype torch.int32, expected a floating dtype"),
        ({"b": torch.ones(M - 1)}, ValueError, r"b has shape \(15,\), expected \(16,\)"),
        ({"scale": torch.ones(3)}, ValueError, r"scale has shape \(3,\), expected \(16,\)"),
        ({"k": 0}, ValueError, "k is 0, expected 1 <= k <= 16, the size of d_sae"),
        ({"k": M + 1}, ValueError, "k is 17, expected 1 <= k <= 16"),
        ({"rows": torch.tensor([1, 2, 3], dtype=torch.int32)}, ValueError, "k is 4, expected 1 <= k <= 3.*rows"),
        ({"rows": torch.arange(5)}, ValueError, "rows are torch.int64 .*, expected torch.int32"),
        ({"index_offset": -1}, ValueError, "index_offset is -1, expected 0 or more"),
        ({"index_offset": 2**31 - M}, ValueError, r"index_offset \+ M is 2147483648, expected at most 2147483647"),
        ({"W": torch.ones(1, 1).expand(2**31, D)}, ValueError, "rows of W is 2147483648, expected at most 2147483647"),
        ({"x": torch.ones(1, 1).expand(2**31, D)}, ValueError, "tokens of x is 2147483648, expected at most"),
        ({"precision": "fast"}, ValueError, "precision is 'fast', expected one of"),
        ({"backend": "gpu"}, ValueError, "backend is 'gpu', expected None or one of"),
        ({"x": torch.full((N, D), float("nan")), "check": True}, ValueError, r"48 values that are NaN .* at \(0, 0\)"),
        ({"x": torch.full((N, D), float("inf")), "check": True}, ValueError, "NaN or infinite"),
    ],
)
def test_encode_refuses(changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        encode(**changes)


def test_thresholds_and_capacities_are_refused() -> None:
    x, W, b = inputs()
    with pytest.raises(ValueError, match=r"threshold has shape \(3,\), expected a number, \(16,\).*\(6, 1\)"):
        ops.encode_above(x, W, b, torch.ones(3), 10)
    with pytest.raises(ValueError, match="capacity is -1"):
        ops.encode_above(x, W, b, 0.0, -1)
    with pytest.raises(ValueError, match="k is 17"):
        ops.encode_batch_topk(x, W, b, M + 1)


def test_codes_of_another_dictionary_are_refused() -> None:
    x, W, _ = inputs()
    codes = encode()
    with pytest.raises(ValueError, match="codes have d_sae = 16, expected 15"):
        ops.decode(codes, W[1:])
    with pytest.raises(ValueError, match="codes have d_sae = 16, expected 9"):
        ops.active_outer(codes, x, 9)
    with pytest.raises(ValueError, match=r"x has shape \(5, 8\), expected \(\*batch, D\) with the codes' batch \(6,\)"):
        ops.active_outer(codes, x[1:])
    with pytest.raises(TypeError, match=r"acts has dtype torch.float64 but W has torch.float32"):
        ops.decode(codes.to(torch.float64), W)
    long = SparseCodes(codes.acts, codes.indices.long(), M)
    with pytest.raises(TypeError, match=r"indices have dtype torch.int64, expected torch.int32; use .int\(\)"):
        ops.decode(long, W)


@every_backend
def test_indices_outside_the_dictionary_never_reach_a_backend(backend: str) -> None:
    x, W, _ = inputs()
    codes = encode()
    for wrong in (-1, M):
        indices = codes.indices.clone()
        indices[2, 1] = wrong
        bad = SparseCodes(codes.acts, indices, M)
        for call in (
            lambda bad=bad: ops.decode(bad, W, backend=backend),
            lambda bad=bad: ops.active_dot(x, bad, W, backend=backend),
            lambda bad=bad: ops.active_outer(bad, x, backend=backend),
            lambda bad=bad: ops.by_latent(bad, backend=backend),
        ):
            with pytest.raises(IndexError, match=r"codes have latents .*, expected 0 to 15"):
                call()
    ragged = both_codes()[1]
    assert ragged.offsets is not None
    past = SparseCodes(ragged.acts, ragged.indices, M, ragged.offsets + 1000)
    with pytest.raises(ValueError, match="offsets must rise from 0 to at most the capacity"):
        ops.decode(past, W, backend=backend)


@every_backend
def test_the_raw_ops_check_shapes_and_dtypes(backend: str) -> None:
    x, W, b = inputs()
    acts, indices = encode().acts, encode().indices

    def topk(x: Tensor, W: Tensor, b: Tensor) -> Any:
        return raw.encode_topk(x, W, b, K, None, None, 0, None, "exact", backend)

    with pytest.raises(TypeError, match=r"x has dtype torch.bfloat16 but W has torch.float32; cast with x.to\("):
        topk(x.bfloat16(), W, b)
    with pytest.raises(ValueError, match=r"x has shape \(6, 7\) and W \(16, 8\), expected .* \(7 != 8\)"):
        topk(x[:, 1:], W, b)
    with pytest.raises(ValueError, match=r"b has shape \(15,\), expected \(16,\)"):
        topk(x, W, b[1:])
    with pytest.raises(ValueError, match="x has 5 rows and the code 6 tokens"):
        raw.active_outer(acts, indices, None, x[1:], M, None, backend)
    with pytest.raises(TypeError, match=r"indices have dtype torch.int64, expected torch.int32"):
        raw.decode(acts, indices.long(), None, W, backend)
    with pytest.raises(ValueError, match=r"acts has shape \(6, 4\) and indices has shape \(5, 4\), expected the same"):
        raw.decode(acts, indices[1:], None, W, backend)


@every_backend
def test_a_code_and_its_dictionary_fit_together(backend: str) -> None:
    x, W, _ = inputs()
    acts, indices = encode().acts, encode().indices
    ragged = both_codes()[1]
    assert ragged.offsets is not None
    with pytest.raises(ValueError, match=r"acts has shape \(24,\) and indices has shape \(24,\), expected .* \(N, K\)"):
        raw.decode(acts.flatten(), indices.flatten(), None, W, backend)
    with pytest.raises(TypeError, match=r"offsets are torch.int32 of shape \(7,\), expected torch.int64 of shape"):
        raw.decode(ragged.acts, ragged.indices, ragged.offsets.int(), W, backend)
    with pytest.raises(ValueError, match="indices is on meta but acts is on cpu"):
        raw.by_latent(acts, indices.to("meta"), None, M, backend)
    with pytest.raises(ValueError, match=r"bias has shape \(7,\), expected \(8,\), the width of W"):
        raw.decode_error(acts, indices, None, W, x, W[0, 1:], backend)
    with pytest.raises(ValueError, match="target has 5 rows and the code 6 tokens"):
        raw.decode_error(acts, indices, None, W, x[1:], None, backend)


@every_backend
def test_an_order_of_another_code_is_refused(backend: str) -> None:
    x, codes = inputs()[0], encode()
    order = ops.by_latent(codes, backend=backend)
    few = SparseCodes(codes.acts[:5], codes.indices[:5], M)
    with pytest.raises(
        ValueError, match=r"torch.int32 of shape \(24,\), .* expected .*\(20,\).* made from another code"
    ):
        ops.active_outer(few, x[:5], by_latent=order, backend=backend)
    wider = SparseCodes(codes.acts, codes.indices, M + 1)
    with pytest.raises(ValueError, match=r"by_latent is torch.int64 of shape \(17,\), .* expected .*\(18,\)"):
        ops.active_outer(wider, x, by_latent=order, backend=backend)
    # The same number of slots for half the tokens: the order names tokens that do not exist.
    wide = SparseCodes(codes.acts.view(N // 2, -1), codes.indices.view(N // 2, -1), M)
    with pytest.raises(ValueError, match="by_latent points outside the code"):
        ops.active_outer(wide, x[: N // 2], by_latent=order, backend=backend)


def test_a_wrong_shape_is_refused_while_tracing() -> None:
    x, W, b = inputs()
    short = W[1:]
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (x, short, b)]
        with pytest.raises(ValueError, match=r"b has shape \(16,\), expected \(15,\)"):
            ops.encode_topk(*fakes, K)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": torch.tensor(1e-3)}, "lr is torch.float32 of shape .*, expected a 0-d torch.float64"),
        ({"step": torch.tensor([1])}, r"step is torch.int64 of shape \(1,\)"),
        ({"moments": []}, "got 0 moments, expected 8: m and v of W_enc, W_dec, b_enc, b_dec"),
        ({"W_enc": None}, "got 8 moments, expected 6: m and v of W_dec, b_enc, b_dec"),
        ({"b_dec": torch.zeros(D + 1)}, r"b_dec has shape \(9,\), expected \(8,\)"),
        ({"b_enc": torch.zeros(2 * M)[::2]}, "b_enc is not contiguous, but is updated in place"),
        ({"moments": [torch.zeros(1)] * 8}, r"moment m of W_enc has shape \(1,\), expected \(16, 8\)"),
        ({"moments": "bf16"}, "moment m of W_enc is bfloat16, which needs a seed"),
        ({"terms": "short"}, r"terms\[0\].grad has shape \(5, 8\), expected \(6, 8\)"),
        ({"step": torch.tensor(0)}, "step is 0, expected >= 1: the count includes this step"),
        ({"step": torch.tensor(-1)}, "step is -1, expected >= 1: the count includes this step"),
        ({"betas": (1.0, 0.999)}, r"betas \(1.0, 0.999\), eps 1e-08: expected 0 <= beta < 1"),
        ({"eps": -1.0}, r"eps is -1.0, expected a number >= 0"),
    ],
    ids=str,
)
def test_update_latents_refuses(changes: dict, message: str) -> None:
    given = update_arguments()
    if changes.get("moments") == "bf16":
        changes = {"moments": [m.bfloat16() for m in given["moments"]]}
    if changes.get("terms") == "short":
        term = given["terms"][0]
        changes = {"terms": [UpdateTerm(term.codes, term.x, term.grad[1:])]}
    with pytest.raises(ValueError, match=message):
        ops.update_latents_(**{**given, **changes})


@every_backend
def test_moments_are_of_one_dtype_wide_or_bf16(backend: str) -> None:
    given = update_arguments()
    mixed = [m.bfloat16() if i == 3 else m for i, m in enumerate(given["moments"])]
    with pytest.raises(TypeError, match=r"moments are torch.bfloat16, torch.float32, expected all torch.float32 or"):
        ops.update_latents_(**{**given, "moments": mixed, "seed": 1}, backend=backend)
    with pytest.raises(TypeError, match=r"moments are torch.float64, expected all torch.float32 or all torch.bfloat16"):
        ops.update_latents_(**{**given, "moments": [m.double() for m in given["moments"]]}, backend=backend)
    double = {name: given[name].double() for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    term = given["terms"][0]
    terms = [UpdateTerm(term.codes.to(torch.float64), term.x.double(), term.grad.double())]
    with pytest.raises(
        TypeError, match=r"moments are torch.float32, expected all torch.float64 or .* torch.float64 weights"
    ):
        ops.update_latents_(**{**given, **double, "terms": terms}, backend=backend)


@every_backend
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (lambda: {"moments": [torch.zeros(1)] * 8}, ValueError, r"moment m of W_enc has shape \(1,\)"),
        (lambda: {"step": torch.tensor(0)}, ValueError, "expected >= 1: the count includes this step"),
        (lambda: {"W_dec": torch.ones(D, M).mT}, ValueError, "W_dec is not contiguous"),
        (lambda: {"xs": [torch.ones(N, D - 1)]}, ValueError, r"terms\[0\].x has shape \(6, 7\), expected \(6, 8\)"),
        (
            lambda: {"grads": [torch.ones(N - 1, D)]},
            ValueError,
            r"terms\[0\].grad has shape \(5, 8\), expected \(6, 8\)",
        ),
        (lambda: {"grads": []}, ValueError, "0 grads, 1 has_bias, expected equal numbers of each"),
        (lambda: {"xs": [torch.ones(N, D).double()]}, TypeError, r"terms\[0\].x has dtype torch.float64 but terms"),
        (
            lambda: {"acts": [torch.ones(N, 1)]},
            ValueError,
            r"codes.acts has shape \(6, 1\) and .*indices has shape \(6, 4\)",
        ),
        (
            lambda: {"indices": [torch.zeros(N, K).long()]},
            TypeError,
            r"terms\[0\].codes.indices have dtype torch.int64",
        ),
        (lambda: {"indices": [torch.full((N, K), M).int()]}, IndexError, "codes have latents 16 to 16"),
    ],
    ids=lambda value: next(iter(value())) if callable(value) and not isinstance(value, type) else "",
)
def test_the_raw_update_checks_its_arguments(
    changes: Callable[[], dict], error: type[Exception], message: str, backend: str
) -> None:
    given = update_arguments()
    term = given.pop("terms")[0]
    arguments = {
        **{name: given[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "moments")},
        **{"scales": [], "screen": [], "acts": [term.codes.acts], "indices": [term.codes.indices]},
        **{"offsets": [torch.empty(0, dtype=torch.int64)], "dacts": [torch.empty(0)]},
        **{"xs": [term.x], "grads": [term.grad], "has_bias": [True], "decoder_pull": None, "db_enc": None, "added": []},
        **{"lr": given["lr"], "step": given["step"], "grad_scale": None, "skip": None, "optimizer": "adam"},
    }
    with pytest.raises(error, match=message):
        raw.update_latents_(
            *{**arguments, **changes()}.values(), 0.9, 0.999, 1e-8, 0.0, None, True, True, False, None, 0, backend
        )


@every_backend
@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ([100_000_000], IndexError, "rows name latent 100000000, expected at most 15, the last of W"),
        ([0, -1, M], IndexError, "rows name latent 16, expected at most 15"),
        ([3, -1, 2], ValueError, "rows hold 3 ahead of 2, expected them to ascend"),
        ([3, 3, -1], ValueError, "rows hold 3 ahead of 3, expected them to ascend"),
    ],
)
def test_rows_outside_the_dictionary_never_reach_a_backend(
    rows: list[int], error: type[Exception], message: str, backend: str
) -> None:
    x, W, b = inputs()
    chosen = torch.tensor(rows, dtype=torch.int32)
    with pytest.raises(error, match=message):
        ops.encode_topk(x, W, b, 1, rows=chosen, backend=backend)
    with pytest.raises(ValueError, match=r"rows are torch.int64 .*, expected torch.int32"):
        raw.encode_topk(x, W, b, 1, chosen.long(), None, 0, None, "exact", backend)


@every_backend
def test_the_raw_encoders_check_their_names_and_numbers(backend: str) -> None:
    x, W, b = inputs()
    for call in (
        lambda: raw.encode_topk(x, W, b, K, None, None, 0, None, "fast", backend),
        lambda: raw.encode_above(x, W, b, torch.tensor(0.5), 9, None, "fast", backend),
        lambda: raw.encode_batch_topk(x, W, b, K, None, "fast", backend),
    ):
        with pytest.raises(ValueError, match="precision is 'fast', expected one of"):
            call()
    with pytest.raises(ValueError, match="k is 17, expected 1 <= k <= 16"):
        raw.encode_topk(x, W, b, M + 1, None, None, 0, None, "exact", backend)
    with pytest.raises(ValueError, match=r"index_offset \+ M is 2147483648"):
        raw.encode_topk(x, W, b, K, None, None, 2**31 - M, None, "exact", backend)
    with pytest.raises(ValueError, match=r"threshold has shape \(3,\), expected \(\), \(16,\) or \(6, 1\)"):
        raw.encode_above(x, W, b, torch.ones(3), 9, None, "exact", backend)
    with pytest.raises(ValueError, match="capacity is -1"):
        raw.encode_above(x, W, b, torch.tensor(0.5), -1, None, "exact", backend)
