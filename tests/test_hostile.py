"""A share of the hostile cases of bench.hostile, and that each part sees what it is meant to see.

`make test-asan` makes more of them under AddressSanitizer; `python -m bench.hostile --minutes 60` goes on for an hour.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastsae
from bench.hostile import __main__ as hostile
from bench.hostile import calls, dense, files, interruptions, page, run, spoil, truth
from bench.hostile import ops as ops_part
from bench.results import RESULTS
from fastsae import SparseAutoencoder, ops
from fastsae.data import ShardError
from fastsae.data.manifest import FileEntry
from fastsae.data.stream import ActivationStream
from fastsae.model import files as saved_files
from fastsae.model import settings as model_settings
from fastsae.training.batch import BatchTrainStep
from fastsae.training.optimizers import FusedOptimizer
from fastsae.training.skipped import say_rows
from fastsae.training.step import PlainTrainStep

ROOT = Path(__file__).resolve().parent.parent
AVAILABLE = {name for name, entry in fastsae.backends().items() if entry["available"]}
needs_cpu = pytest.mark.skipif(
    "cpu" not in AVAILABLE, reason="the C++ extension is not built: the cpu backend is missing"
)
CASES = {"calls": 80, "modules": 12, "files": 12, "interruptions": 1}
"""Of each kind."""
EMULATED = 8  # of each op, of a backend that runs its kernels on the CPU, slowly
SEED = 1


def hunted(name: str, cases: int) -> dict[str, run.Tally]:
    """The first cases of each kind of a part, none of them wrong."""
    found = run.hunt(run.Plan(SEED, {f"{name}/{kind}": (0, cases) for kind in run.part(name).KINDS}))
    assert {place: tally.cases for place, tally in found.items()} == dict.fromkeys(found, cases)
    bad = [
        f"{what}\n{run.again(place, SEED, number, None)}"
        for place, tally in found.items()
        for number, what in tally.wrong + tally.crashed
    ]
    assert not bad, "\n".join(bad)
    return found


@needs_cpu
def test_no_hostile_call_crashes_or_answers_wrongly() -> None:
    # Otherwise the calls are so harmless, or so harmful, that nothing is learnt.
    for place, tally in hunted("calls", CASES["calls"]).items():
        assert min(tally.right, tally.refused) > CASES["calls"] / 8, f"{place}: {tally.right}, {tally.refused} refused"


@pytest.mark.long
@pytest.mark.parametrize("name", ["modules", "files", "interruptions"])
def test_no_case_of_the_other_parts_is_wrong(name: str) -> None:
    found = hunted(name, CASES[name])
    assert sum(tally.right for tally in found.values()) > 0
    assert sum(tally.refused for tally in found.values()) > 0
    if name == "interruptions":
        assert sum(tally.kills for tally in found.values()) > 0


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
        found = ops_part.outcome(call)
        assert found.verdict != "wrong", f"{call}: {found.what}\n{run.again(f'calls/{op}', SEED, number, backend)}"


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
        plain = plain and call.arguments.get("capacity", 1) > 0  # a code without slots has nothing wrong in it
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


def outcome_of(monkeypatch: pytest.MonkeyPatch, answer: Any, **arguments: Any) -> run.Found:
    """Of a decode that does what `answer` does."""
    call = calls.Call("decode", valid("decode").arguments | arguments)

    class Ops:
        @staticmethod
        def decode(**given: Any) -> Any:
            return answer(given)

    monkeypatch.setattr(ops_part.torch.ops, "fastsae", Ops)
    return ops_part.outcome(call)


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
    found = outcome_of(monkeypatch, lambda given: given["W"].add_(1))
    assert (found.verdict, found.what.split(";")[0]) == ("wrong", "changed W")


@pytest.mark.long
def test_a_crash_is_named_with_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that dies at its 4th case: the cases around it are run all the same."""
    program = (
        "import os, sys\nfrom bench.hostile import ops, spoil\nreal = spoil.make\n"
        "def make(op, seed, number, backend):\n"
        "    if number == 3: os.kill(os.getpid(), 11)\n"
        "    return real(op, seed, number, backend)\n"
        "spoil.make = make\nfrom bench.hostile.__main__ import main\nmain(sys.argv[1:])\n"
    )
    real = subprocess.Popen

    def dies(command: list[str], **given: Any) -> Any:
        return real([sys.executable, "-c", program, *command[command.index("--work") :]], **given)

    monkeypatch.setattr(run.subprocess, "Popen", dies)
    found = run.hunt(run.Plan(SEED, {"calls/by_latent": (0, 6), "calls/decode": (0, 2)}, "reference"))
    assert {place: tally.cases for place, tally in found.items()} == {"calls/by_latent": 6, "calls/decode": 2}
    ((number, what),) = found["calls/by_latent"].crashed
    assert number == 3
    assert "the process ended with -11" in what


def verdicts(place: str, cases: int, seed: int = SEED) -> list[run.Found]:
    name, kind = place.split("/")
    return [run.part(name).case(kind, seed, number, "reference")[1]() for number in range(cases)]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """Breaks the product where the parameter says; gives what must be seen."""
    part, seen = request.param
    files._stored.cache_clear()
    if part in ("rows", "harvest"):
        files._stored()  # before it is broken
    if part == "forward":
        real = SparseAutoencoder.restored
        monkeypatch.setattr(SparseAutoencoder, "restored", lambda *a: real(*a) * 1.01)
    elif part == "fused":
        step = FusedOptimizer._update
        monkeypatch.setattr(FusedOptimizer, "_update", lambda self, i, given, **more: step(
            self, i, given, **more | {"lr": more["lr"] * 1.5}))  # fmt: skip
    elif part == "batch":
        moved = BatchTrainStep._update

        def faster(self: BatchTrainStep, stays: torch.Tensor | None) -> None:
            for group in self.optimizer.param_groups:
                group["lr"] *= 1.001
            moved(self, stays)

        monkeypatch.setattr(BatchTrainStep, "_update", faster)
    elif part == "unit rows":  # divided by a norm that is held fixed
        monkeypatch.setattr(
            F, "normalize", lambda t, dim: t / torch.linalg.vector_norm(t.detach(), dim=dim, keepdim=True)
        )
    elif part == "saved":
        monkeypatch.setattr(saved_files, "_digest", lambda config, tensors: "always the same")
    elif part == "rows":
        monkeypatch.setattr(FileEntry, "check_content", lambda self, folder: None)
    elif part == "harvest":
        monkeypatch.setattr(ActivationStream, "load_state_dict", lambda self, state: None)  # begins anew
    elif part == "states":
        monkeypatch.setattr(model_settings, "refuse_misfits", lambda *a: None)
    yield seen
    files._stored.cache_clear()


@pytest.mark.usefixtures("cpu_tensors", "one_thread")
@pytest.mark.parametrize(
    ("planted", "place", "cases"),
    [
        (("forward", "recon is"), "modules/forward", 12),
        (("fused", " is ["), "modules/fused", 12),
        (("batch", " is ["), "modules/batch", 12),
        (("unit rows", "W_dec is ["), "modules/batch", 24),
        (("saved", "another module"), "files/saved", 30),
        (("rows", "other rows"), "files/rows", 30),
        (("harvest", "went on to other rows"), "files/harvest", 12),
        (("states", "changed state."), "files/states", 40),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
    indirect=["planted"],
)
def test_a_planted_fault_is_found(planted: str, place: str, cases: int) -> None:
    wrong = [found.what for found in verdicts(place, cases) if found.verdict == "wrong"]
    assert any(planted in what for what in wrong), wrong


@pytest.mark.usefixtures("cpu_tensors", "one_thread")
@pytest.mark.parametrize(
    ("kind", "number"),
    [("plain", 112), ("optimizer", 69)],
    ids=["float16 under torch's Adam", "fvu of one target repeated"],
)
def test_what_a_step_cannot_make_is_no_fault(kind: str, number: int) -> None:
    found = run.part("modules").case(kind, 0, number, None)[1]()
    assert found.verdict != "wrong", found.what


@pytest.mark.usefixtures("cpu_tensors", "one_thread")
@pytest.mark.parametrize(("seed", "number"), [(21, 781), (11, 561)])
def test_a_gradient_that_is_rounding_alone_is_no_fault(seed: int, number: int) -> None:
    """A row of one number, divided by its norm, is ±1: its gradient is 0, and in float32 what g - u⟨u, g⟩ leaves."""
    found = run.part("modules").case("batch", seed, number, None)[1]()
    assert found.verdict == "right", found.what


def test_fvu_of_one_row_repeated_has_no_truth() -> None:
    rows = torch.arange(6, dtype=torch.float64).reshape(3, 2) + 0.1
    assert dense.divides("fvu", rows)
    assert not dense.divides("fvu", rows[:1].expand(7, 2))
    assert not dense.divides("fvu", torch.zeros_like(rows))
    assert dense.divides("mse", rows[:1].expand(7, 2))


def test_a_lost_kill_and_a_torn_file_are_found(tmp_path: Path) -> None:
    """An interrupted harvest that goes on elsewhere, and a run without one of its lines."""
    whole, other = tmp_path / "whole", tmp_path / "other"
    _, act, compare = interruptions._harvest(calls.Draw("planted", 0, 0))
    act(whole)
    act(other)
    assert compare(whole, other) == []
    (other / ".manifest.json.7.partial").touch()
    assert compare(whole, other) == [".manifest.json.7.partial is only in one folder"]
    shard = other / "shard_00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(ShardError, match="is damaged"):
        compare(whole, other)


def test_an_error_of_torch_or_python_is_no_refusal() -> None:
    def found(act: Any) -> str:
        try:
            act()
        except run.ERRORS as error:
            return run.judge_raised(error).verdict
        raise AssertionError

    sae = SparseAutoencoder(4, 8, fastsae.TopK(2))
    assert found(lambda: sae(torch.zeros(3, 5))) == "refused"
    assert found(lambda: sae.encode_options(surprise=1)) == "refused"  # Python's words for an argument
    assert found(lambda: torch.zeros(3) @ torch.zeros(4)) == "wrong"
    assert found(lambda: fastsae.SparseCodes.to_dense(None)) == "wrong"  # type: ignore[arg-type]


@pytest.mark.long
def test_the_result_is_stored_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--parts", "calls/by_latent", "--minutes", "0.02", "--results", str(tmp_path), "--seed", "5"]
    page_path = tmp_path / "page.md"
    page_path.write_text(f"before\n{page.BEGIN}\n{page.END}\nafter\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "renew", lambda results: None)
        with pytest.raises(SystemExit) as ended:
            hostile.main(arguments)
    assert ended.value.code == 0
    assert "| calls | " in capsys.readouterr().out
    page.renew(tmp_path, page_path)
    text = page_path.read_text()
    assert text.startswith("before")
    assert "seed 5" in text
    assert "| by_latent | " in text
    with pytest.raises(SystemExit):
        hostile.main(["--help"])
    help_text = capsys.readouterr().out
    assert "python -m bench.hostile --minutes 60              all parts for an hour" in help_text, "lines are not kept"
    assert "{'calls'" not in help_text
    with pytest.raises(SystemExit):
        hostile.main(["--parts", "nothing"])
    assert "there is no part 'nothing'; there are calls, modules, files, interruptions" in capsys.readouterr().err


def test_the_page_is_what_the_stored_results_give(tmp_path: Path) -> None:
    copy = tmp_path / "page.md"
    copy.write_text(page.PAGE.read_text())
    page.renew(RESULTS, copy)
    assert copy.read_text() == page.PAGE.read_text(), "run python -m bench.hostile --draw"


# -- what they found ---------------------------------------------------------------------------------------------------


def test_an_sae_with_a_backend_of_its_own_trains_under_an_optimizer_without_one() -> None:
    """The optimizer's copy of the encoder was another backend's, and the step was refused."""
    x = torch.randn(9, 8)
    ends = []
    for own, given in ((None, "reference"), ("reference", None), ("reference", "cpu" if "cpu" in AVAILABLE else None)):
        sae = SparseAutoencoder(8, 16, fastsae.TopK(3), seed=0)
        sae.backend = own
        optimizer = fastsae.optim.Adam(sae, lr=0.01, eps=1e-2, backend=given)
        sae(x).loss.backward()
        optimizer.step()
        ends.append(sae.W_dec.detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["fused", "plain", "batch", "module"])
def test_what_is_no_dense_tensor_is_named(kind: str) -> None:
    sae = SparseAutoencoder(4, 8, fastsae.TopK(2), seed=0)
    batch = fastsae.SAEBatch(2, 4, 8, fastsae.TopK(2))
    call: Any = {
        "fused": lambda: fastsae.FusedTrainStep(sae), "plain": lambda: PlainTrainStep(sae, lr=0.1),
        "batch": lambda: fastsae.BatchTrainStep(batch, lr=0.1), "module": lambda: sae,
    }[kind]()  # fmt: skip
    for x in ([[1.0] * 4], None, torch.zeros(3, 4).to_sparse(), torch.zeros(3, 4, dtype=torch.int64)):
        with pytest.raises(TypeError, match=r"^x (is a|is stored|has dtype)"):
            call(x)
    if kind == "batch":
        call(torch.randn(3, 4).bfloat16())
        with pytest.raises(ValueError, match="empty batch"):
            call(torch.zeros(0, 4))
        before = batch.tokens_since_fired.clone()
        with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode():
            call(torch.randn(3, 4))
        assert torch.equal(batch.tokens_since_fired, before)


def test_a_plain_step_runs_in_its_own_dtype_under_autocast() -> None:
    ends = []
    for setting in ("as it is", "autocast bfloat16"):
        sae = SparseAutoencoder(4, 8, fastsae.TopK(2), skip=True, seed=0)
        step, x = PlainTrainStep(sae, lr=0.1, clip_norm=0.1), torch.ones(5, 4)
        with spoil.under(setting):
            step(x)
            step(x)
        ends.append(sae.W_dec.detach())
    assert torch.equal(*ends)


def test_a_saved_sae_with_one_flipped_bit_is_damaged_and_equal_ones_have_equal_files(tmp_path: Path) -> None:
    sae = SparseAutoencoder(4, 8, fastsae.TopK(2), seed=0)
    paths = [fastsae.save(sae, tmp_path / name) / "sae.safetensors" for name in ("a", "b")]
    data = bytearray(paths[0].read_bytes())
    assert data == paths[1].read_bytes()
    data[-5] ^= 1
    paths[0].write_bytes(data)
    with pytest.raises(saved_files.SavedModuleError, match="is damaged: its settings and tensors have sha256"):
        fastsae.load(tmp_path / "a")


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
    spoiled = {"None": None, "sparse": W.to_sparse(), "freed": spoil.gone(W)}[what]
    with pytest.raises((TypeError, ValueError), match=r"^W "), spoil.under(setting):
        torch.ops.fastsae.encode_topk(
            torch.randn(2, 4), spoiled, torch.zeros(8), 2, None, None, 0, None, "exact", "reference"
        )


def test_written_tensors_are_not_lazily_negated() -> None:
    W, b = torch.randn(8, 4), torch._neg_view(torch.zeros(8))
    with pytest.raises(TypeError, match=r"update_latents_ is lazily negated"):
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


def test_a_penalty_starts_finite_from_a_batch_without_a_loss() -> None:
    sae = fastsae.SparseAutoencoder(1, 16, fastsae.ReLU(target_l0=4), normalize="layer_norm", loss="fvu", seed=0)
    sae.train()(torch.randn(4, 1))
    assert bool(torch.isfinite(sae.get_buffer("log_coef")))


def test_a_state_on_meta_or_with_rows_for_a_number_is_refused_and_changes_nothing() -> None:
    sae, other = (fastsae.SparseAutoencoder(8, 16, fastsae.TopK(4), seed=0) for _ in range(2))
    optimizer, plain = fastsae.optim.Adam(sae), PlainTrainStep(other, lr=1e-3)
    sae(torch.randn(4, 8)).loss.backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    meta = copy.deepcopy(before)
    meta["state"][1]["exp_avg"] = meta["state"][1]["exp_avg"].to("meta")
    with pytest.raises(ValueError, match="exp_avg of parameter 1 of the state is on the meta device and has no values"):
        optimizer.load_state_dict(meta)
    for i, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(t, before["state"][i][key]) for key, t in state.items())
    state = plain.state_dict()
    state["optimizer"]["param_groups"][0]["foreach"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"foreach of the state has shape \(3,\), expected one value"):
        plain.load_state_dict(state)
    plain(torch.randn(4, 8))
    state = plain.state_dict()
    state["optimizer"]["state"]["b_enc"]["step"] = 1.5
    with pytest.raises(ValueError, match=r"step of b_enc is 1\.5, expected a whole number"):
        plain.load_state_dict(state)


def test_the_worst_rows_of_eight_bits_are_named() -> None:
    x = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [-3.0, 0.0]])
    for target in (None, x.double()):
        assert "1 of 3 rows of x hold NaN or infinity: 1" in say_rows(x.to(torch.float8_e4m3fn), target)


def test_groups_are_encoded_in_float16_under_autocast() -> None:
    sae = fastsae.SparseAutoencoder(8, 16, fastsae.GroupMax(2), dtype=torch.float16, seed=0)
    x = torch.randn(3, 8).half()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sae.encode(x).indices, sae.encode(x.clone()).indices)
