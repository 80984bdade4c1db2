"""A share of the hostile calls of bench.hostile, and that it sees what it is meant to see.

`make test-asan` makes more of them under AddressSanitizer; `python -m bench.hostile --minutes 60` goes on for an hour.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastsae
from bench.hostile import calls, run, spoil, truth
from fastsae import ops

ROOT = Path(__file__).resolve().parent.parent
AVAILABLE = {name for name, entry in fastsae.backends().items() if entry["available"]}
needs_cpu = pytest.mark.skipif(
    "cpu" not in AVAILABLE, reason="the C++ extension is not built: the cpu backend is missing"
)
CALLS = 150
EMULATED = 8  # of each op, of a backend that runs its kernels on the CPU, slowly
SEED = 1


@needs_cpu
def test_no_hostile_call_crashes_or_answers_wrongly() -> None:
    found = run.hunt(run.Plan(SEED, {op: (0, CALLS) for op in (*calls.RAW_OPS, run.STRUCTS)}))
    assert {op: tally.calls for op, tally in found.items()} == dict.fromkeys(found, CALLS)
    wrong = [f"{what}\n{run.again(op, SEED, n, None)}" for op, tally in found.items() for n, what in tally.wrong]
    assert not wrong, "\n".join(wrong)
    # Otherwise the calls are so harmless, or so harmful, that nothing is learnt.
    for op, tally in found.items():
        assert min(tally.right, tally.refused) > CALLS / 8, f"{op}: {tally.right} right, {tally.refused} refused"


@pytest.fixture
def cpu_tensors() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("op", calls.RAW_OPS)
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.usefixtures("cpu_tensors", "one_thread")
def test_the_kernels_of_a_gpu_on_the_cpu(backend: str, op: str) -> None:
    if backend not in AVAILABLE or torch.cuda.is_available():
        pytest.skip(f"the {backend} backend does not run on the CPU here: this needs its emulation or interpreter")
    for number in range(EMULATED):
        call = spoil.make(op, SEED, number, backend)
        if call.arguments["backend"] != backend:
            continue  # a spoiled one
        kind, what = run.outcome(call)
        assert kind != "wrong", f"{call}: {what}\n{run.again(op, SEED, number, backend)}"


# -- that faults are seen ----------------------------------------------------------------------------------------------


def test_a_call_depends_on_its_seed_and_number_alone() -> None:
    made = [spoil.make("decode", 3, 5) for _ in range(2)]
    other = spoil.make("decode", 3, 6)
    assert str(made[0]) == str(made[1])
    shapes = [{n: getattr(v, "shape", v) for n, v in call.arguments.items()} for call in (*made, other)]
    assert shapes[0] == shapes[1]
    assert shapes[0] != shapes[2]


def valid(op: str) -> calls.Call:
    """The first call of an op with enough tokens that nothing spoils."""
    for number in range(1000):
        call = spoil.make(op, SEED, number, "reference")
        rows = call.arguments.get("x", call.arguments.get("W"))
        plain = not call.spoiled and call.setting == "as it is" and call.arguments.get("rows") is None
        if plain and rows is not None and min(rows.shape) > 2:
            return call
    raise AssertionError("no call is left as it is")


WRONG = {
    "encode_topk": lambda result: (result[0] * 1.5, *result[1:]),
    "encode_above": lambda result: (result[0] + 1, *result[1:]),
    "encode_batch_topk": lambda result: (result[0] * 1.5, *result[1:]),
    "decode": lambda result: result + 1,
    "decode_error": lambda result: (result[0], result[1] * 1.5 + 1),
    "active_dot": lambda result: result + 1,
    "active_outer": lambda result: result + 1,
}


@pytest.mark.parametrize("op", WRONG)
def test_a_wrong_result_is_seen(op: str) -> None:
    call = valid(op)
    result = getattr(torch.ops.fastsae, op)(**call.arguments)
    truth.JUDGES[op](call.arguments, result)
    with pytest.raises(truth.Wrong):
        truth.JUDGES[op](call.arguments, WRONG[op](result))


def outcome_of(monkeypatch: pytest.MonkeyPatch, answer: Any, **arguments: Any) -> tuple[str, str]:
    """Of a decode that does what `answer` does."""
    call = calls.Call("decode", valid("decode").arguments | arguments)

    class Ops:
        @staticmethod
        def decode(**given: Any) -> Any:
            return answer(given)

    monkeypatch.setattr(run.torch.ops, "fastsae", Ops)
    return run.outcome(call)


def test_what_an_op_may_not_do_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Any:
        def raise_it(given: Any) -> None:
            raise error

        return raise_it

    assert outcome_of(monkeypatch, fails(ValueError("W has shape (3,), expected (M, D)")))[0] == "refused"
    monkeypatch.undo()
    for answer in (fails(KeyError("W")), fails(RuntimeError("unknown")), fails(ValueError(""))):
        assert outcome_of(monkeypatch, answer)[0] == "wrong"
        monkeypatch.undo()
    kind, what = outcome_of(monkeypatch, lambda given: given["W"].add_(1))
    assert (kind, what.split(";")[0]) == ("wrong", "changed W")


@needs_cpu
def test_a_crash_is_named_with_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies at its 4th call: the calls around it are made all the same."""
    program = (
        "import os, sys\nfrom bench.hostile import run, spoil\nreal = spoil.make\n"
        "def make(op, seed, number, backend):\n"
        "    if number == 3: os.kill(os.getpid(), 11)\n"
        "    return real(op, seed, number, backend)\n"
        "spoil.make = make\nfrom bench.hostile.__main__ import main\nmain()\n"
    )
    real = subprocess.run

    def dies(command: list[str], **given: Any) -> Any:
        return real([sys.executable, "-c", program, *command[command.index("--work") :]], **given)

    monkeypatch.setattr(run.subprocess, "run", dies)
    found = run.hunt(run.Plan(SEED, {"by_latent": (0, 6), "decode": (0, 2)}))
    assert {op: tally.calls for op, tally in found.items()} == {"by_latent": 6, "decode": 2}
    ((number, what),) = found["by_latent"].wrong
    assert number == 3
    assert "the process ended with -11" in what


# -- what they found ---------------------------------------------------------------------------------------------------


def test_written_memory_is_not_shared() -> None:
    """An update whose tensors share memory read a latent's new row as an old one, and said nothing."""
    W, b = torch.randn(8, 4), torch.zeros(8)
    codes = fastsae.SparseCodes(torch.ones(3, 2), torch.tensor([[0, 1]] * 3, dtype=torch.int32), 8)
    given: dict[str, Any] = {
        "W_enc": W.clone(), "W_dec": W.clone(), "b_enc": b, "b_dec": torch.zeros(4),
        "moments": [torch.zeros_like(t) for t in (W, W, W, W, b, b, W[0], W[0])],
        "lr": torch.tensor(0.1, dtype=torch.float64), "step": torch.tensor(1), "backend": "reference",
    }  # fmt: skip
    shared = {
        "W_enc and W_dec": {"W_enc": given["W_dec"]},
        "moments\\[0\\] and moments\\[1\\]": {"moments": [given["moments"][1], *given["moments"][1:]]},
        "W_dec and grads\\[0\\]": {"W_dec": W, "grad": W[2:5]},
    }
    for names, change in shared.items():
        grad = change.pop("grad", torch.randn(3, 4))
        with pytest.raises(ValueError, match=f"({names}|{' and '.join(names.split(' and ')[::-1])}) share memory"):
            ops.update_latents_(**given | change, terms=[fastsae.UpdateTerm(codes, torch.randn(3, 4), grad)])


@needs_cpu
def test_screened_precision_does_not_trust_a_row_whose_norm_is_past_fp32() -> None:
    """Such rows have no screened score. All of them tied, and the first k were taken."""
    g = torch.Generator().manual_seed(0)
    W, x = torch.randn(17, 16, generator=g) * 1e25, torch.randn(1, 16, generator=g)
    found = ops.encode_topk(x, W, torch.zeros(17), 3, precision="screened", backend="cpu")
    expected = (x.double() @ W.double().mT).topk(3).indices.sort().values
    assert found.indices.tolist() == expected.tolist()


@pytest.mark.parametrize("backend", sorted(AVAILABLE))
def test_a_decode_error_of_no_columns(backend: str) -> None:
    if torch.cuda.is_available() and backend in ("cuda", "triton"):
        pytest.skip("the tensors here are the CPU's")
    acts, indices = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int32)
    error, squares = torch.ops.fastsae.decode_error(
        acts, indices, None, torch.zeros(4, 0), torch.zeros(3, 0), None, backend
    )
    assert (tuple(error.shape), squares.tolist()) == ((3, 0), [0.0] * 3)


@pytest.mark.parametrize("what", ["None", "sparse", "freed"])
@pytest.mark.parametrize("setting", ["as it is", "autocast bfloat16"])
def test_a_tensor_that_is_none_is_named(what: str, setting: str) -> None:
    W = torch.randn(8, 4)
    spoiled = {"None": None, "sparse": W.to_sparse(), "freed": spoil._gone(W)}[what]
    with pytest.raises((TypeError, ValueError), match=r"^W "), spoil.under(setting):
        torch.ops.fastsae.encode_topk(
            torch.randn(2, 4), spoiled, torch.zeros(8), 2, None, None, 0, None, "exact", "reference"
        )


def test_written_tensors_are_not_lazily_negated() -> None:
    W, b = torch.randn(8, 4), torch._neg_view(torch.zeros(8))
    with pytest.raises(TypeError, match=r"update_latents_ is negated when it is read"):
        ops.update_latents_(
            W.clone(), W.clone(), b, torch.zeros(4), [], [], lr=torch.tensor(0.1, dtype=torch.float64),
            step=torch.tensor(1), optimizer="signsgd", backend="reference",
        )  # fmt: skip


def test_eight_bits_are_no_dtype_of_weights() -> None:
    W = torch.randn(8, 4).to(torch.float8_e4m3fn)
    with pytest.raises(TypeError, match=r"W has dtype torch\.float8_e4m3fn, expected a floating dtype"):
        ops.encode_topk(W[:2], W, W[:, 0], 2)


def test_the_judge_does_not_depend_on_torchs_defaults() -> None:
    with spoil.under("default dtype bfloat16"):
        assert truth.array(torch.from_numpy(np.ones(2, np.float32))).dtype == np.float64
    assert os.environ.get("FASTSAE_BACKEND") is None
