"""bench/: the references compute the same step, wrong results are caught, and every script runs at toy size."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastsae
from bench import cases, check, contestants, demo, machine, memory, peers, plot, real, results
from bench.cases import Case, Inputs
from bench.dense import Dense, SparseEager
from bench.ours import Fused, FusedByPart
from bench.run import main
from bench.timing import Mark, Sample, Stopwatch, interleaved, unmarked
from fastsae import Screen, SparseCodes, env, ops
from fastsae.data import save_rows

ROOT = Path(__file__).resolve().parent.parent
TINY = Case("tiny", N=48, D=20, M=96, K=5)


@pytest.fixture(autouse=True)
def same_threads() -> object:
    """The scripts set torch's thread count; the rest of the suite keeps its own."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny(**changes: object) -> Inputs:
    return cases.build(replace(TINY, **changes), real.rows, real.trained)  # type: ignore[arg-type]


# -- the references ----------------------------------------------------------------------------------------------------


def test_sparse_eager_is_the_dense_step() -> None:
    inputs = tiny()
    inputs = replace(inputs, b_dec=torch.linspace(-1, 1, TINY.D))
    dense, sparse = Dense(inputs, TINY.K, lr=1e-3), SparseEager(inputs, TINY.K, lr=1e-3)
    for x in inputs.batches:
        torch.testing.assert_close(sparse.step(x), dense.step(x), rtol=1e-5, atol=0)
    for ours, theirs in zip(sparse.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("distribution", ["random", "zipf", "hot"])
def test_fused_is_the_dense_step(distribution: str) -> None:
    inputs = tiny(distribution=distribution)
    check.check_fused(inputs, TINY.K)
    fused, parts = Fused(inputs, TINY.K), FusedByPart(inputs, TINY.K)
    for x in inputs.batches:
        torch.testing.assert_close(parts.step(x), fused.step(x).to(torch.float32), rtol=1e-6, atol=0)
    torch.testing.assert_close(parts.W_dec, fused.sae.W_dec.detach(), rtol=0, atol=1e-7)


def test_autocast_reference_computes_in_bf16() -> None:
    inputs = tiny()
    half = Dense(inputs, TINY.K, autocast=True)
    sparse = SparseEager(inputs, TINY.K, autocast=True)
    assert (half.name, sparse.name) == ("dense bf16", "sparse eager bf16")
    torch.testing.assert_close(sparse.step(inputs.x), half.step(inputs.x), rtol=0.02, atol=0)
    assert half.encode(inputs.x)[0].dtype == torch.bfloat16
    assert half.W_enc.dtype == torch.float32
    full = Dense(inputs, TINY.K)
    assert 0 < check.relative(half.reconstruct(inputs.x), full.reconstruct(inputs.x)) < 0.2


# -- a wrong result is not timed ---------------------------------------------------------------------------------------


class Broken(Fused):
    """fastsae with one fault, so that the check can be seen to fail."""

    def __init__(self, inputs: Inputs, k: int, fault: str) -> None:
        super().__init__(inputs, k, lr=check.STEP_LR)
        self.fault = fault

    def reconstruct(self, x: torch.Tensor) -> torch.Tensor:
        return super().reconstruct(x) * (1.001 if self.fault == "scale" else 1)

    def encode(self, x: torch.Tensor) -> SparseCodes:
        codes = super().encode(x)
        if self.fault == "selection":
            codes = replace(codes, acts=codes.acts * torch.tensor([1] * (TINY.K - 1) + [0.999]))
        return codes

    def step(self, x: torch.Tensor, mark: Mark = unmarked) -> torch.Tensor:
        loss = super().step(x)
        if self.fault == "update":
            self.sae.W_enc.data[0] += check.STEP_LR
        return loss * 1.001 if self.fault == "loss" else loss


@pytest.mark.parametrize("fault", ["none", "scale", "selection", "loss", "update"])
def test_checks_catch_a_wrong_contestant(fault: str) -> None:
    inputs = tiny()
    acts, recon = check.truth(inputs, TINY.K)
    broken = Broken(inputs, TINY.K, fault)

    def everything() -> None:
        check.check_forward(broken, inputs, recon)
        check.check_selection(broken, inputs, acts)
        check.check_step(broken, Dense(inputs, TINY.K, lr=check.STEP_LR), inputs)

    if fault == "none":
        everything()
    else:
        with pytest.raises(check.WrongResult, match="fastsae"):
            everything()


# -- cases -------------------------------------------------------------------------------------------------------------


def test_zipf_uses_few_latents_often_and_hot_one_always() -> None:
    case = replace(TINY, N=256, M=512, D=64, K=8)
    used = {}
    for distribution in ("random", "zipf", "hot"):
        inputs = cases.build(replace(case, distribution=distribution), real.rows, real.trained)
        _, indices = Dense(inputs, case.K).encode(inputs.x)
        used[distribution] = torch.bincount(indices.flatten(), minlength=case.M).sort(descending=True).values
    assert used["hot"][0] == case.N
    assert used["random"][0] < case.N / 4 < used["zipf"][0]
    assert used["zipf"][:16].sum() > 2 * used["random"][:16].sum()


def test_cases_are_reproducible_and_named_once() -> None:
    one, two = tiny(), tiny()
    assert torch.equal(one.batches[3], two.batches[3])
    assert not torch.equal(one.batches[0], one.batches[1])
    assert len(cases.BY_NAME) == len(cases.CASES) + len(cases.SWEEP)
    assert (cases.PRIMARY.N, cases.PRIMARY.D, cases.PRIMARY.M, cases.PRIMARY.K) == (4096, 768, 24576, 32)
    assert cases.of_shape("2048,768,12_288,32") == Case("shape-2048-768-12288-32", 2048, 768, 12288, 32)
    for case in (cases.PRIMARY, cases.SWEEP[3], cases.of_shape("9,8,7,6")):
        assert cases.named(case.name) == case
    for text in ("2048,768,12288", "a,b,c,d", "", "1,2,3,4,5"):
        with pytest.raises(ValueError, match="expected four whole numbers N,D,M,K"):
            cases.of_shape(text)
    with pytest.raises(ValueError, match="expected 1 <= K <= M"):
        cases.of_shape("4,4,4,5")
    with pytest.raises(ValueError, match="trained weights go with real inputs"):
        Case("x", weights="trained")
    with pytest.raises(ValueError, match="expected 1 <= K <= M"):
        Case("x", K=0)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_sample_is_median_and_percentiles() -> None:
    sample = Sample.of([0.001 * i for i in range(1, 12)])
    assert sample.in_ms() == pytest.approx({"ms": 6, "p20": 3, "p80": 9, "runs": 11})
    assert Sample.of([2.0]) == Sample(2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="no run was timed"):
        Sample.of([])


def test_contestants_take_turns() -> None:
    calls: list[str] = []
    times = interleaved({n: (lambda n=n: calls.append(n)) for n in "ab"}, rounds=3, min_seconds=0, warmup=2)
    assert calls == ["a", "a", "b", "b", "a", "b", "a", "b", "a", "b"]
    assert times["a"].n == 3
    with pytest.raises(ValueError, match="rounds: got 0"):
        interleaved({}, rounds=0, min_seconds=0)


def test_stopwatch_names_the_parts_of_a_step() -> None:
    inputs = tiny()
    for contestant in (Dense(inputs, TINY.K), SparseEager(inputs, TINY.K), FusedByPart(inputs, TINY.K)):
        watch = Stopwatch()
        for _ in range(2):
            watch.start()
            contestant.step(inputs.x, watch.mark)
        assert set(watch.samples()) == {"encode", "decode", "loss", "update"}
        assert watch.samples()["update"].n == 2


def test_step_floor_is_the_arithmetic_it_says() -> None:
    floors = machine.Floors(50, read_gbs=40, l3_gbs=80, l2_gbs=200, fp32_tflops=0.1, bf16_tflops=1, int8_tops=0.5)
    floor = machine.step_floor(Case("x", N=1000, D=500, M=10_000, K=10), floors)
    assert floor.decode == pytest.approx(1000 * 10 * 500 * 4 / 80e9)
    assert floor.encode == pytest.approx(2 * 1000 * 500 * 10_000 / 1e12 + floor.decode)
    assert floor.update == pytest.approx(2 * floor.decode + 10_000 * 500 * 50 / 50e9)
    assert machine.Floors(1, 1, 1, 1, 0.1, int8_tops=3, amx_bf16_tflops=5).best_product == 5e12


@pytest.mark.parametrize("widest", ["base", "avx2", None])
def test_the_rates_of_this_machine_are_those_of_its_units(widest: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, "cpu_isa", lambda: widest)
    found, flags = machine.measure_floors(seconds=0.01), machine.cpu_flags()
    assert min(found.copy_gbs, found.read_gbs, found.l3_gbs, found.l2_gbs, found.fp32_tflops) > 0
    units = {"avx512_bf16": found.bf16_tflops, "amx_bf16": found.amx_bf16_tflops, "amx_int8": found.amx_int8_tops}
    for flag, rate in units.items():
        assert (rate > 0) == (flag in flags and widest is None), (flag, rate)
    by_vnni = "avx512_vnni" in flags and widest is None
    assert (found.int8_tops > 0) == (by_vnni or ("avx_vnni" in flags and widest != "base"))


def test_peak_memory_sees_what_a_step_allocates(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hungry(Dense):
        def step(self, x: torch.Tensor, mark: Mark = unmarked) -> torch.Tensor:
            return torch.ones((100 if len(x) > 64 else 1) * 2**20 // 4).sum()  # 100 MiB on a whole batch

    monkeypatch.setitem(contestants.OWN, "hungry", Hungry)
    measured = memory.extra_peak("random", "hungry", is_quick=True)
    assert 95 * 2**20 < measured["extra_peak_bytes"] < 115 * 2**20


def test_memory_is_measured_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = memory.measure("random", "fastsae", threads=2, is_quick=True)
    weights_and_moments = 3 * (2 * 1024 * 64 + 1024 + 64) * 4
    assert measured["state_bytes"] == weights_and_moments
    assert 0 <= measured["extra_peak_bytes"] < 200e6
    monkeypatch.setattr(memory.sys, "executable", "/bin/false")
    with pytest.raises(memory.CannotMeasure, match="fastsae: no message"):
        memory.measure("random", "fastsae", threads=2)


def test_a_peer_that_is_missing_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.Sparsify, "module", "a_module_that_is_not_there")
    reason = contestants.unavailable("sparsify")
    assert reason is not None
    assert "eai-sparsify does not import" in reason
    assert contestants.unavailable("dense fp32") is None


# -- the scripts -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_shapes_of_ones_own_are_measured_and_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With their memory, which a process of its own measures: it has to know the shape as well."""
    given = ["--quick", "--size", "64,24,300,5", "33,16,64,1", "--contestants", "fastsae", "dense fp32"]
    assert main([*given, "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "shape-64-24-300-5.json").read_text())
    assert {key: result["case"][key] for key in "NDMK"} == {"N": 64, "D": 24, "M": 300, "K": 5}
    assert set(result["contestants"]) == {"fastsae", "dense fp32"}
    assert {"extra_peak_bytes", "memory_not_measured"} & set(result["contestants"]["fastsae"])
    assert not (folder / "random.json").exists()
    assert "2 cases in" in capsys.readouterr().out
    (folder / "few.json").write_text('{"format": 1, "rows": []}')  # another benchmark's
    text = plot.section(folder, tmp_path / "page.md")
    for result, sizes in zip(results.read(folder), ("N=33, D=16, M=64, K=1", "N=64, D=24, M=300, K=5"), strict=True):
        assert f"{plot.times(result, 'dense fp32')} at {sizes}" in text
    with pytest.raises(SystemExit):
        main(["--size", "1,2,3"])
    assert "the shape is '1,2,3', expected four whole numbers N,D,M,K" in capsys.readouterr().err


SCRIPTS = sorted(
    {"bench" if p.name == "__main__.py" and p.parent == ROOT / "bench"
     else ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
     for p in (ROOT / "bench").rglob("*.py") if "ArgumentParser" in p.read_text() or p.name == "__main__.py"}
    - {"bench.run"}
)  # fmt: skip


@pytest.mark.long
def test_every_script_has_help_without_triton_pytest_and_the_peers() -> None:
    """One process for all: a child of it, forked, for each."""
    hidden = ("triton", "pytest", "pytest_benchmark", "sae_lens", "transformers", "sparsify", "dictionary_learning")
    code = f"""
import os, runpy, sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {hidden!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Hidden())
import fastsae
for name in sys.argv[1:]:
    print("##", name, flush=True)
    child = os.fork()
    if not child:
        sys.argv[:] = [name, "--help"]
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert os.waitpid(child, 0)[1] == 0, name
"""
    assert {"bench", "bench.compiled", "bench.ptxas", "bench.gpu", "bench.family", "bench.plot"} <= set(SCRIPTS)
    run = subprocess.run([sys.executable, "-c", code, *SCRIPTS], capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-1500:]
    for name, said in zip(SCRIPTS, run.stdout.split("## ")[1:], strict=True):
        assert said.startswith(f"{name}\nusage: "), said
        assert len(said.splitlines()) > 3


def test_bench_writes_results_plots_and_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.check.TOKENS", 16)  # the truth of more is most of the time, and has its own tests
    names = ["fastsae", "dense fp32", "dense bf16", "sparse eager"]
    code = main(["--quick", "--threads", "1", "--no-memory", "--cases", "random", "trained", "--contestants", *names,
                 "--out", str(tmp_path)])  # fmt: skip
    assert code == 0
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "random.json").read_text())
    assert set(result["contestants"]) == set(names)
    assert set(result["contestants"]["fastsae"]["parts"]) == {"step", "encode alone", *plot.PARTS}
    assert {"device", "torch", "commit", "date", "threads", "backends", "torch_isa"} <= set(result["machine"])
    csv = (folder / "steps.csv").read_text().splitlines()
    assert csv[0].split(",") == list(results.COLUMNS)
    assert len(csv) == 1 + 2 * 4 * 6
    assert "x fastsae" in capsys.readouterr().out

    page, readme = tmp_path / "benchmarks.md", tmp_path / "README.md"
    page.write_text(f"before\n{plot.BEGIN}\nold\n{plot.END}\nafter\n")
    readme.write_text("\n".join(plot.HEADLINE))
    plot.renew(tmp_path, page, readme)
    text = page.read_text()
    assert f"![tokens per second]({folder.name}/contestants.svg)" in readme.read_text()
    assert re.search(r"\*\*[\d.]+× as fast as dense PyTorch in fp32", readme.read_text())
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| **fastsae** |" in text
    assert {"contestants.svg", "contestants.png", "parts.svg"} <= {p.name for p in folder.iterdir()}
    said = readme.read_text()
    plot.renew(tmp_path, page, readme)
    assert (page.read_text(), readme.read_text()) == (text, said), "the same results should give the same pages"


def test_pages_have_the_numbers_of_the_results() -> None:
    for path, text in plot.texts(results.RESULTS, plot.PAGE, plot.README).items():
        assert path.read_text() == text, "run python -m bench.plot"


def test_readme_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold the lines"):
        plot.with_numbers("no markers", "numbers")


def test_demo_trains_compares_and_reuses_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(32, 24, generator=generator)
    save_rows(tmp_path / "rows", torch.rand(1200, 32, generator=generator).pow(4) @ basis, holdout=200)
    settings = demo.Settings(
        activations=tmp_path / "rows", run_dir=tmp_path / "run", rows=1000, d_sae=64, k=4, batch=128, steps=12,
        dense_steps=6, timing_rounds=1, log_every=2, progress=False,
    )  # fmt: skip
    stages = {"harvest": lambda settings: None}
    assert demo.run(settings, **stages)
    first = capsys.readouterr().out
    assert "over 3 logged steps the FVU is at most 0.0" in first
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000

    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "run").iterdir()}
    assert demo.run(settings, **stages)
    for name in ("dense_metrics.jsonl", "step_times.json", "metrics.jsonl", "report.html"):
        assert (tmp_path / "run" / name).stat().st_mtime_ns == kept[name], f"{name} was written again"
    assert first.split("whole training step")[1] == capsys.readouterr().out.split("whole training step")[1]


def test_demo_leaves_no_half_file_and_compares_numbers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = demo.Settings(activations=tmp_path / "rows", run_dir=tmp_path, d_sae=64, k=4, batch=32, timing_rounds=1)
    save_rows(tmp_path / "rows", torch.randn(120, 32, generator=torch.Generator().manual_seed(0)), holdout=20)
    checkpoint = fastsae.save(settings.sae(32), tmp_path / "sae")

    def cut(self: Path, text: str, *args: object, **kwargs: object) -> int:
        with open(self, "w") as file:
            file.write(text[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(OSError, match="No space left"):
        demo.step_times(settings, checkpoint)
    monkeypatch.undo()
    assert not (tmp_path / "step_times.json").exists()
    found = demo.step_times(settings, checkpoint)
    assert json.loads((tmp_path / "step_times.json").read_text()) == json.loads(json.dumps(found))

    fine, null = {"step": 5, "fvu": 0.5}, {"step": 5, "fvu": None}
    with pytest.raises(ValueError, match="the fused run's FVU at step 5 is not a number"):
        demo.worst_gap([null], [fine])
    with pytest.raises(ValueError, match="the dense run's FVU at step 5 is not a number"):
        demo.worst_gap([fine], [{"step": 5, "fvu": float("nan")}])


def test_parts_choose_the_screen_again_as_the_step_does(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[Tensor | None] = []
    prepare = ops.prepare_screen

    def counted(*args: object, x: Tensor | None = None, **kwargs: object) -> Screen | None:
        prepared.append(x)
        return prepare(*args, x=x, **kwargs)  # type: ignore[arg-type]

    inputs = tiny()
    monkeypatch.setattr(ops, "prepare_screen", counted)
    parts = FusedByPart(inputs, TINY.K)
    for _ in range(65):
        parts.step(inputs.x)
    assert len(prepared) == 2


def test_redone_covers_all_steps() -> None:
    inputs = tiny()
    fused = Fused(inputs, TINY.K)
    assert fused.redone() is None
    shares = iter((6, 0, 12))
    step = fused.train_step
    fused.train_step = lambda x: step(x) | {"redone": torch.tensor(next(shares))}  # type: ignore[assignment]
    for _ in range(3):
        fused.step(inputs.x)
    assert fused.redone() == pytest.approx((18 / 3 / len(inputs.x), 12 / len(inputs.x)))


def test_demo_says_what_to_do_when_a_stage_fails(tmp_path: Path) -> None:
    settings = demo.Settings(activations=tmp_path / "none", run_dir=tmp_path / "run", progress=False)
    with pytest.raises(demo.StageFailed, match=r"stage 2 .* failed[\s\S]*make demo"):
        demo.run(settings, harvest=lambda settings: None)
