"""The ops within torch: opcheck, compile, autocast, batch dimensions, backends."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

import fastsae
from fastsae import SparseCodes, ops
from tests import truth
from tests.small_case import D, K, M, N, both_codes, encode, every_backend, inputs, raw, update_arguments

pytestmark = pytest.mark.usefixtures("one_thread")


# -- opcheck ----------------------------------------------------------------------------------------------------------


@pytest.mark.long_interpreted  # what is registered is the same for every backend
@every_backend
def test_opcheck_of_encoders(backend: str) -> None:
    x, W, b = inputs(grad=True)
    rows, scale = torch.tensor([1, 3, 4, 9, 12, -1], dtype=torch.int32), torch.ones(M, requires_grad=True)
    screen = ops.prepare_screen(W, b, backend=backend)
    tensors = None if screen is None else screen.tensors
    opcheck(raw.encode_topk.default, (x, W, b, K, None, None, 0, tensors, "exact", backend))
    opcheck(raw.encode_topk.default, (x, W, b, K, rows, scale, 3, None, "fp32", backend))
    opcheck(raw.encode_above.default, (x, W, b, torch.tensor(0.5), 3 * N, tensors, "exact", backend))
    opcheck(raw.encode_batch_topk.default, (x, W, b, K, tensors, "exact", backend))


@pytest.mark.long_interpreted  # what is registered is the same for every backend
@every_backend
@pytest.mark.parametrize("layout", [0, 1], ids=["fixed", "ragged"])
def test_opcheck_of_sparse_products(backend: str, layout: int) -> None:
    x, W, _ = inputs(grad=True)
    codes = both_codes()[layout]
    code = (codes.acts.requires_grad_(), codes.indices, codes.offsets)
    order = ops.by_latent(codes, backend=backend)
    opcheck(raw.decode.default, (*code, W, backend))
    opcheck(
        raw.decode_error.default,
        (codes.acts.detach(), codes.indices, codes.offsets, W.detach(), x.detach(), W[0].detach(), backend),
    )
    opcheck(raw.active_dot.default, (x, *code, W, backend))
    opcheck(raw.active_outer.default, (*code, x, M, None, backend))
    opcheck(raw.active_outer.default, (*code, x, M, [order.offsets, order.tokens, order.slots], backend))
    # Entries past offsets[M] are unspecified, and opcheck compares them; these codes have none.
    full = SparseCodes(torch.ones(N, K), torch.arange(N * K, dtype=torch.int32).view(N, K) % M, M)
    opcheck(raw.by_latent.default, (full.acts, full.indices, None, M, backend))


@every_backend
def test_opcheck_of_update_latents(backend: str) -> None:
    given = update_arguments()
    term = given["terms"][0]
    opcheck(
        raw.update_latents_.default,
        (
            *(given[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec", "moments")),
            *([], [], [term.codes.acts], [term.codes.indices], [torch.empty(0, dtype=torch.int64)], [torch.empty(0)]),
            *([term.x], [term.grad], [True], None, None, [], given["lr"], given["step"], None, None),
            *("adam", 0.9, 0.999, 1e-8, 0.0, None, True, True, False, None, 0, backend),
        ),
    )


@pytest.mark.long
@every_backend
@pytest.mark.parametrize("kind", ["adamw", "norms", "8 bit"])
def test_opcheck_of_update_latents_with_everything(kind: str, backend: str) -> None:
    given, codes = update_arguments(), both_codes()[1]
    dacts, x = torch.ones_like(codes.acts), given["terms"][0].x
    moments, scales = given["moments"], []
    if kind == "8 bit":
        moments = [m.to(torch.float8_e4m3fn) if m.ndim == 2 else m for m in moments]
        scales = [torch.zeros(M, 1) for _ in range(4)]
    opcheck(
        raw.update_latents_.default,
        (
            *(given[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")),
            *(moments, scales, [], [codes.acts], [codes.indices], [codes.offsets], [dacts], [x], [x + 1], [True]),
            *(torch.ones(M, 2), torch.ones(M), [torch.ones(M, D), torch.ones(M, D), torch.ones(M)]),
            *(given["lr"], given["step"], torch.tensor(0.5, dtype=torch.float64), torch.tensor(False)),
            *("adamw", 0.9, 0.999, 1e-8, 0.1, 1.0, True, True, kind == "norms", 7, 3, backend),
        ),
        # The other checks compare tensors with arithmetic that torch lacks in 8 bits.
        test_utils=("test_autograd_registration", "test_faketensor") if kind == "8 bit" else "ALL",
    )


# -- torch.compile ----------------------------------------------------------------------------------------------------


@every_backend
def test_compile_forward_and_backward(backend: str) -> None:
    x, W, b = inputs(grad=True)

    def loss(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
        codes = ops.encode_topk(x, W, b, K, backend=backend)
        above, _ = ops.encode_above(x, W, b, 0.5, x.shape[0] * M, backend=backend)
        batch = ops.encode_batch_topk(x, W, b, K, backend=backend)
        recon = sum(ops.decode(code, W, backend=backend) for code in (codes, above, batch))
        gate = ops.active_dot(x, codes, W, backend=backend).sum() + ops.active_outer(codes, x, backend=backend).sum()
        return (recon - x).square().sum() + gate

    eager = torch.autograd.grad(loss(x, W, b), (x, W, b))
    # Inductor would only compile the few pointwise operations between the ops; the next test covers it.
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, W, b), (x, W, b))
    for a, e in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, e)


def test_compile_with_any_number_of_tokens() -> None:
    _, W, b = inputs()
    encode = torch.compile(lambda x: ops.encode_topk(x, W, b, K), fullgraph=True, dynamic=True)
    for shape in ((5,), (7,), (2, 3)):
        x = torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))
        codes, eager = encode(x), ops.encode_topk(x, W, b, K)
        assert isinstance(codes, SparseCodes)
        assert codes.batch_shape == shape
        assert torch.equal(codes.check().acts, eager.acts)


def test_compile_update_latents() -> None:
    eager, compiled = update_arguments(), update_arguments()
    ops.update_latents_(**eager)
    torch.compile(lambda given: ops.update_latents_(**given), fullgraph=True)(compiled)
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(eager[name], compiled[name])
    assert all(torch.equal(a, b) for a, b in zip(eager["moments"], compiled["moments"], strict=True))


# -- autocast, modes --------------------------------------------------------------------------------------------------


@every_backend
def test_autocast_runs_in_the_dtype_of_the_weights(backend: str) -> None:
    x, W, b = inputs()
    plain = ops.encode_topk(x.bfloat16().float(), W, b, K, backend=backend)
    narrow = x.bfloat16().requires_grad_()
    W = W.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = ops.encode_topk(narrow, W, b, K, backend=backend)
        above, _ = ops.encode_above(narrow, W, b, 0.5, N * M, backend=backend)
        batch = ops.encode_batch_topk(narrow, W, b, K, backend=backend)
        recon = ops.decode(codes.to(torch.bfloat16), W, backend=backend)
        dots = ops.active_dot(narrow, codes, W, backend=backend)
        outer = ops.active_outer(codes, narrow, backend=backend)
    assert torch.equal(codes.acts, plain.acts), "the weights were narrowed"
    for result in (codes.acts, above.acts, batch.acts, recon, dots, outer):
        assert result.dtype == torch.float32
    (recon.sum() + codes.acts.sum()).backward()
    assert narrow.grad is not None
    assert narrow.grad.dtype == torch.bfloat16
    assert W.grad is not None
    assert W.grad.dtype == torch.float32


@every_backend
def test_deterministic_mode_changes_nothing(backend: str) -> None:
    def run() -> list[Tensor]:
        x, W, b = inputs(grad=True)
        codes = ops.encode_topk(x, W, b, K, backend=backend)
        ops.decode(codes, W, backend=backend).square().sum().backward()
        assert x.grad is not None
        assert W.grad is not None
        assert b.grad is not None
        return [codes.acts, x.grad, W.grad, b.grad]

    usual = run()
    torch.use_deterministic_algorithms(True)
    try:
        strict = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(usual, strict, strict=True))


@every_backend
def test_no_grad_keeps_no_graph(backend: str) -> None:
    x, W, b = inputs(grad=True)
    with torch.no_grad():
        codes = ops.encode_topk(x, W, b, K, backend=backend)
        assert not ops.decode(codes, W, backend=backend).requires_grad
    with torch.inference_mode():
        assert ops.decode(ops.encode_topk(x, W, b, K, backend=backend), W, backend=backend).is_inference()


@every_backend
def test_update_works_on_parameters_that_require_grad(backend: str) -> None:
    given = update_arguments()
    before = given["W_enc"].clone()
    version = given["W_enc"]._version
    given["W_enc"].requires_grad_()
    stats = ops.update_latents_(**given, backend=backend)
    assert stats.shape == (4,)
    assert given["W_enc"].requires_grad
    assert not torch.equal(given["W_enc"].detach(), before)
    assert given["W_enc"]._version > version, "autograd must notice that a saved weight has changed"


@every_backend
def test_leading_batch_dimensions_are_flattened_and_restored(backend: str) -> None:
    x, W, b = inputs()
    deep = x.view(2, 1, 3, D)
    flat, codes = ops.encode_topk(x, W, b, K, backend=backend), ops.encode_topk(deep, W, b, K, backend=backend)
    assert codes.acts.shape == codes.indices.shape == (2, 1, 3, K)
    assert torch.equal(codes.flatten().acts, flat.acts)
    assert torch.equal(ops.decode(codes, W, backend=backend), ops.decode(flat, W, backend=backend).view(deep.shape))
    assert ops.active_dot(deep, codes, W, backend=backend).shape == codes.acts.shape
    assert torch.equal(ops.active_outer(codes, deep, backend=backend), ops.active_outer(flat, x, backend=backend))
    per_token = torch.linspace(0, 1, N).view(2, 1, 3, 1)
    above, _ = ops.encode_above(deep, W, b, per_token, N * M, backend=backend)
    assert above.batch_shape == (2, 1, 3)
    assert ops.decode(above, W, backend=backend).shape == deep.shape


# -- backends ---------------------------------------------------------------------------------------------------------


def test_backends_say_why_not() -> None:
    table = fastsae.backends()
    assert list(table)[-1] == "reference"
    assert table["reference"]["available"]
    for entry in table.values():
        assert (entry["reason"] is None) == entry["available"]
        assert isinstance(entry["detail"], dict)


@pytest.mark.parametrize("backend", [name for name, e in fastsae.backends().items() if not e["available"]])
def test_an_absent_backend_fails_loudly_with_its_reason(backend: str) -> None:
    reason = fastsae.backends()[backend]["reason"]
    with pytest.raises(fastsae.BackendError) as caught:
        encode(backend=backend)
    assert reason in str(caught.value)
    assert f"no backend can serve fastsae.encode_topk here ({backend}:" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "refused", "chosen"),
    [
        ({}, (), "cuda"),
        ({}, ("cuda",), "triton"),
        ({"rows": True}, (), "triton"),
        ({"rows": True}, ("triton",), "cuda"),
        ({"scale": True}, (), "cuda"),
    ],
)
def test_cuda_goes_first_except_for_rows(
    options: dict, refused: tuple[str, ...], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def module(name: str) -> SimpleNamespace:
        reason = "it does not want to" if name in refused else None
        return SimpleNamespace(name=name, supports=lambda *_, **__: reason, available=lambda: None, by_name_only=bool)

    backends = importlib.import_module("fastsae.backends")  # fastsae.backends is its function
    monkeypatch.setattr(backends, "_REGISTRY", tuple((name, module(name)) for name in ("cuda", "triton", "cpu")))
    W = torch.zeros(M, D)
    given = {"rows": torch.zeros(3, dtype=torch.int32), "scale": torch.zeros(M)}
    tensors = [W, W, torch.zeros(M), *(t for name, t in given.items() if name in options)]
    assert backends.choose("encode_topk", None, *tensors, k=K).name == chosen


def test_the_environment_names_the_default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = [name for name, entry in fastsae.backends().items() if not entry["available"]]
    if absent:
        monkeypatch.setenv("FASTSAE_BACKEND", absent[0])
        with pytest.raises(fastsae.BackendError, match=absent[0]):
            encode()
    assert encode(backend="reference").k == K
    monkeypatch.setenv("FASTSAE_BACKEND", "reference")
    assert encode().k == K
    monkeypatch.setenv("FASTSAE_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="'nonsense', expected None or one of"):
        encode()


@pytest.mark.parametrize("backend", truth.ENGINES)
def test_a_screen_of_another_backend_is_refused(backend: str) -> None:
    screen = fastsae.Screen([torch.zeros(1)], f"{backend}/whatever")
    with pytest.raises(ValueError, match=f"the screen has format '{backend}/whatever', expected one of"):
        encode(screen=screen, backend="reference")
