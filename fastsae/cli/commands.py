"""Runs each subcommand: opens the inputs that the options name, calls the library, prints the result."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from fastsae.backends import backends
from fastsae.cli.language import asks_for_language, measure_in_model, open_text, spliced_in
from fastsae.cli.options import (
    LIVE,
    Convert,
    Eval,
    Harvest,
    Info,
    LiveOptions,
    Report,
    Reproduce,
    Sweep,
    Train,
    checked_device,
    latent_indices,
    selection,
    torch_dtype,
)
from fastsae.cli.processes import joined, local_device
from fastsae.data.harvest import harvest
from fastsae.data.hooks import Hooks
from fastsae.data.live import LiveSource
from fastsae.data.manifest import MANIFEST, Manifest
from fastsae.data.shards import ShardSource
from fastsae.data.shared import SharedSource
from fastsae.data.source import ActivationSource, held_out_targets, target_width
from fastsae.data.text import load_text
from fastsae.interop.registry import load, save
from fastsae.model.rules import TopK
from fastsae.runs import sweep
from fastsae.runs.checkpoint import list_checkpoints
from fastsae.runs.evaluate import EvalResult, evaluate
from fastsae.runs.feeders import Feeders, Line, fed, feed
from fastsae.runs.opening import (
    EVALUATION,
    SPLICED_EVALUATION,
    OpenedRun,
    Selection,
    language_of_run,
    open_rows,
    open_run,
    open_with_notes,
    rows_of_run,
    selection_of,
    version,
)
from fastsae.runs.stopping import TrainingInterrupted
from fastsae.runs.together import FromFirst, Team
from fastsae.runs.trainer import CHECKPOINTS, Trainer, TrainResult, run_together


def run_harvest(options: Harvest) -> int:
    """fastsae harvest"""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    # Pass the model's name: `harvest` loads it only if rows are missing, so a second run is instant.
    manifest = harvest(
        options.model,
        load_text(options.text, field=options.text_field, token_type=options.token_type),
        options.out,
        options.stream,
        rows=options.rows,
        rows_per_shard=options.rows_per_shard,
        dtype=torch_dtype(options.dtype),
        progress=options.progress,
        model_dtype=None if options.model_dtype is None else torch_dtype(options.model_dtype),
        device=str(checked_device(options.device)),
    )
    held = manifest.held_out.rows if manifest.held_out else 0
    print_table(
        {
            "rows": f"{manifest.rows:,} in {len(manifest.shards)} shards"
            + (f" ({options.rows:,} asked for, and batches are stored whole)" if manifest.rows > options.rows else ""),
            "held-out rows": f"{held:,}",
            "d_in": manifest.d_in,
            **({"hooks": ", ".join(f"{h.hook} ({h.d_in})" for h in manifest.hooks())} if manifest.others else {}),
            **{name.replace("_", " "): _shown(value) for name, value in manifest.stats.items() if name != "rows"},
            "folder": options.out,
        }
    )
    return 0


def open_source(options: Train, feeders: Feeders | None = None) -> tuple[ActivationSource, dict[str, Any]]:
    """The data of `fastsae train`, and its description for the run's notes."""
    if options.data == LIVE:
        for name in ("hook", "tensor", "target_tensor"):
            if getattr(options, name):
                raise ValueError(f"--{name.replace('_', '-')} is for stored rows; training live has --live.hook")
        target = {"target": list(options.target_hook)} if options.target_hook else {}
        return options.live.open(options.target_hook, feeders), {LIVE: options.live.notes(), **target}
    return open_with_notes(options.data, selection(options), holdout=options.holdout, seed=options.data_seed)


def open_together(
    options: Train, team: Team, feeders: Feeders | None = None
) -> tuple[ActivationSource, dict[str, Any]]:
    """`open_source` in each of several processes; the first has the rows of a live model and sends the others theirs.

    feeders: in the first process, those that run the model, if it does not itself.
    """
    source: ActivationSource | None = None
    notes: dict[str, Any] = {}
    with team.agreed():
        if team.writes or options.data != LIVE:
            source, notes = open_source(options, feeders)
    return (FromFirst(source, team) if source is None or options.data == LIVE else source), notes


def separate_hooks(options: Train) -> tuple[int | str, ...]:
    """The hooks that get an autoencoder each; empty if there is only one autoencoder.

    Raises ValueError if --layers is neither 1 nor the number of hooks.
    """
    hooks = options.live.config.hooks if options.data == LIVE else options.hook
    layers = options.sae.layers
    if len(hooks) < 2 or layers == len(hooks):
        return ()
    if layers != 1:
        raise ValueError(
            f"--layers is {layers} with {len(hooks)} hooks: give --layers {len(hooks)} for one crosscoder of all, or "
            "leave it out for an autoencoder per hook"
        )
    return hooks


def run_train(options: Train) -> int:
    """fastsae train"""
    options = dataclasses.replace(
        options, sae=dataclasses.replace(options.sae, device=local_device(options.sae.device))
    )
    separate = separate_hooks(options)
    if options.feeders:
        check_feeders(options, separate)
    with joined(options.sae.device, options.latent_shards, options.wait, options.feeders) as mesh:
        if options.feeders:
            assert mesh is not None
            return train_fed(options, mesh)
        if not separate:
            return train_one(options, mesh)
        if options.data == LIVE:
            return train_live(options, separate, mesh)
        for hook in separate:
            one = dataclasses.replace(options, hook=(hook,), run_dir=options.run_dir / folder_of(hook))
            if speaks(mesh):
                print(f"hook {hook}: {one.run_dir}")
            train_one(one, mesh)
    return 0


def check_feeders(options: Train, separate: Sequence[int | str]) -> None:
    """Raises ValueError for options that leave feeders nothing to do."""
    if options.feeders < 0:
        raise ValueError(f"--feeders is {options.feeders}, expected a number of processes")
    if options.data != LIVE:
        raise ValueError(
            f"--feeders {options.feeders} is for DATA live; stored activations are read by each process for itself"
        )
    if separate:
        raise _several_live(separate)
    if options.live.prefetch:
        raise ValueError("--live.prefetch is for a model in the first process; feeders always compute ahead")
    options.live.check()


def train_fed(options: Train, mesh: DeviceMesh) -> int:
    """One autoencoder, on the processes of the mesh; the others run its language model."""
    line = Line(mesh, timedelta(seconds=options.wait))
    if line.feeds:
        live = dataclasses.replace(options.live, model_device=local_device(options.live.model_device))
        feed(line, lambda: live.load(options.target_hook))
        return 0
    with fed(line, Team(mesh)) as feeders:
        return train_one(options, mesh, feeders)


def _several_live(hooks: Sequence[int | str]) -> ValueError:
    return ValueError(f"several processes train one SAE, and there are {len(hooks)} live hooks; name one --live.hook")


def speaks(mesh: DeviceMesh | None) -> bool:
    """Whether this process prints the command's results: of several, only the first does."""
    return mesh is None or mesh.get_rank() == 0


def train_live(options: Train, hooks: Sequence[int | str], mesh: DeviceMesh | None) -> int:
    """An autoencoder of each hook of one live stream, trained in step."""
    if mesh is not None:
        raise _several_live(hooks)
    if options.target_hook:
        raise ValueError(f"--target-hook with {len(hooks)} live hooks: train transcoders one by one, or on stored rows")
    source, notes = open_source(options)
    assert isinstance(source, LiveSource)
    trainers = []
    for hook, reader in zip(hooks, SharedSource(source).readers, strict=True):
        run_dir = options.run_dir / folder_of(hook)
        say_if_new(options, run_dir)
        its = {"data": {**notes, "hook": hook}, "fastsae": version()}
        sae = options.sae.build(reader.d_in)
        trainers.append(Trainer(sae, reader, options.train, run_dir, resume=options.resume, notes=its))
    check_held_out(options, source)
    with saying_resume():
        results = run_together(trainers)
    for trainer, result in zip(trainers, results, strict=True):
        print_training(trainer.run_dir, result)
    return 0


def check_held_out(options: Train, source: ActivationSource) -> None:
    """Raises ValueError where the run is to be evaluated and no rows are held out."""
    if options.train.eval_every and len(source.held_out()) == 0:
        raise ValueError("no rows are held out to evaluate on; set --holdout, or --eval-every 0 for no evaluation")


def say_if_new(options: Train, run_dir: Path) -> None:
    """Says that --resume found nothing to continue."""
    if options.resume and not list_checkpoints(run_dir / CHECKPOINTS):
        print(f"fastsae: --resume: {run_dir} holds no checkpoint, so a new run starts there", file=sys.stderr)


@contextmanager
def saying_resume() -> Iterator[None]:
    """Adds "--resume" to the message of a stopped run that can be continued."""
    try:
        yield
    except TrainingInterrupted as stop:
        if not stop.goes_on:
            raise
        raise TrainingInterrupted(f"{stop}, with --resume", stop.signal, goes_on=True) from None


def folder_of(hook: int | str) -> str:
    """A folder's name for a hook: mlp.6:input becomes mlp.6-input."""
    return str(hook).replace(":", "-").replace("/", "-")


def train_one(options: Train, mesh: DeviceMesh | None, feeders: Feeders | None = None) -> int:
    """One autoencoder of `fastsae train`."""
    if speaks(mesh):
        say_if_new(options, options.run_dir)
    if mesh is None:
        source, notes = open_source(options)
        check_held_out(options, source)
    else:
        team = Team(mesh)
        source, notes = open_together(options, team, feeders)
        with team.agreed():
            check_held_out(options, source)
    sae = options.sae.build(source.d_in, target_width(source), mesh)
    trainer = Trainer(
        sae, source, options.train, options.run_dir, resume=options.resume, notes={"data": notes, "fastsae": version()},
        mesh=mesh,
    )  # fmt: skip
    with saying_resume():
        result = trainer.run()
    if speaks(mesh):
        print_training(options.run_dir, result)
    return 0


def print_training(run_dir: Path, result: TrainResult) -> None:
    """The table of `fastsae train`."""
    evaluation = result.evaluation or {}
    where = "held out" if evaluation else "last batch"
    numbers = evaluation or result.metrics
    print_table(
        {
            "steps": f"{result.step:,} ({result.tokens:,} tokens)",
            **{
                f"{name} ({where})": f"{numbers[name]:.4g}"
                for name in ("fvu", "mse", "l0")
                if numbers.get(name) is not None
            },
            "tokens/s": f"{result.metrics.get('tokens_per_s') or 0:,.0f} (last logged steps)",
            "checkpoint": result.checkpoint,
            "next": f"fastsae report {run_dir}",
        }
    )


def rows_of_options(options: Eval, run: OpenedRun) -> Selection:
    """Which rows of --data: those that the options name, else the hooks that the run records."""
    assert options.data is not None
    if not options.data.is_dir():
        return Selection(tensor=options.tensor, target_tensor=options.target_tensor)
    data = (run.config.get("notes") or {}).get("data") or {}
    recorded = selection_of(data if isinstance(data, dict) else {})
    hook: Hooks | None = options.language.hook
    return Selection(hook or recorded.hook, options.language.target_hook or recorded.target)


def held_out_rows(options: Eval, run: OpenedRun) -> tuple[torch.Tensor, torch.Tensor | None, str]:
    """The rows that `fastsae eval` measures on, their targets and their description."""
    if options.data is not None:
        # A folder's held-out rows are files of their own, which holdout=0 would leave out.
        every = 0 if options.all_rows and not options.data.is_dir() else None
        source = open_rows(options.data, rows_of_options(options, run), holdout=every)
        if not options.all_rows:
            return source.held_out(), held_out_targets(source), f"held-out rows of {options.data}"
        if isinstance(source, ShardSource):
            ids = range((source.n_tokens or 0) + len(source.held_out_ids()))
            targets = None if source.d_target is None else source.targets(ids)
            return source.rows(ids), targets, f"all rows of {options.data}"
        return source.x, source.target, f"all rows of {options.data}"
    if options.all_rows:
        raise ValueError("--all-rows needs --data: without it a run is measured on its held-out rows")
    rule_state = rows_of_run(run.config)
    if rule_state is not None:
        where = f"held-out rows of {run.config['notes']['data']['path']}"
        return rule_state.held_out(), held_out_targets(rule_state), where
    data = (run.config.get("notes") or {}).get("data") or {}
    live = data.get(LIVE)
    if live:
        stream, own = LiveOptions.from_notes(live).open(tuple(data.get("target") or ())), data.get("hook")
        where = "held-out text of the run's live stream"
        if own is not None:  # one of several SAEs on this stream
            readers = zip(stream.config.hooks, SharedSource(stream).readers, strict=True)
            return next(reader.held_out() for hook, reader in readers if hook == own), None, where
        return stream.held_out(), held_out_targets(stream), where
    raise ValueError(f"{run.path} does not record its training data; name activations with --data")


def run_eval(options: Eval) -> int:
    """fastsae eval"""
    run = open_run(options.run, device=str(checked_device(options.device)))
    run.sae.backend = options.backend
    if asks_for_language(options):
        return run_language_eval(options, run)
    rows, targets, where = held_out_rows(options, run)
    if len(rows) == 0:
        raise ValueError("no rows are held out; name other rows with --data, and add --all-rows to measure on all")
    if rows.shape[1] != run.sae.d_in:
        raise ValueError(f"the rows have {rows.shape[1]} numbers, the autoencoder expects d_in = {run.sae.d_in}")
    width = run.sae.d_in if targets is None else targets.shape[1]
    if width != run.sae.d_out:
        raise ValueError(
            f"{run.path} is a transcoder to d_out = {run.sae.d_out}, but the targets have {width} numbers; name its "
            "targets with --target-hook or --target-tensor"
        )
    result = evaluate(run.sae, rows, targets=targets, batch_size=options.batch_size)
    out = options.out or evaluation_file(options.run, EVALUATION)
    extra = {"step": run.step, "weights": str(run.path), "rows": where}
    result.write(out, with_density=options.density, **extra)
    print_evaluation(result, where, out)
    return 0


def evaluation_file(run: Path, name: str) -> Path:
    """Where the JSON goes: a file of this name in the folder of the run or autoencoder. A checkpoint is complete and
    gets no further file: that of one in a run goes into the run's folder, named after it.
    """
    weights = run.resolve()
    if weights.parent.name != CHECKPOINTS or weights not in list_checkpoints(weights.parent):
        return run / name
    return weights.parents[1] / f"{Path(name).stem}_{weights.name}.json"


def run_language_eval(options: Eval, run: OpenedRun) -> int:
    """fastsae eval with a language model"""
    found = measure_in_model(options, run)
    out = options.out or evaluation_file(options.run, SPLICED_EVALUATION)
    extra = {"step": run.step, "weights": str(run.path), "rows": found.where, **found.record(options.density)}
    found.result.write(out, with_density=options.density, **extra)
    print_evaluation(found.result, found.where, out, found.table())
    return 0


def print_evaluation(result: EvalResult, where: str, out: Path, more: dict[str, Any] | None = None) -> None:
    """The table of `fastsae eval`."""
    print_table(
        {
            "rows": f"{result.n_tokens:,} {where}",
            "fvu": f"{result.fvu:.5f}",
            "explained variance": f"{result.explained_variance:.5f}",
            "per token": f"{result.fvu_per_token:.5f} fvu, {result.explained_variance_per_token:.5f} explained",
            "mse": f"{result.mse:.6g}",
            "cosine": f"{result.cosine:.5f}",
            "norm ratio": f"{result.norm_ratio:.5f}",
            "l0": f"{result.l0:.2f}",
            "dead share": f"{result.dead_share:.2%} of {len(result.density):,} latents never active on these rows",
            "median density": f"{float(result.density.median()):.3g}",
            **(more or {}),
            "written to": out,
        }
    )


def run_report(options: Report) -> int:
    """fastsae report"""
    # Imported here: drawing costs a second that no other command should pay.
    from fastsae.report import ReportOptions, write_report

    given = {field.name: getattr(options, field.name) for field in dataclasses.fields(ReportOptions)}
    if options.latents is not None:
        given["latents"] = latent_indices(options.latents)
    print(write_report(options.run, out=options.out, options=ReportOptions(**given)))
    return 0


def run_sweep(options: Sweep) -> int:
    """fastsae sweep"""
    # Imported here: drawing costs a second that no other command should pay.
    from fastsae.report.sweep import write_sweep

    select, language = selection(options), options.language
    if not _records_hooks(Path(options.data)):  # then --hook and --target-hook say where in a model the rows are from
        hook, target = (one[0] if len(one) == 1 else None for one in (options.hook, options.target_hook))
        if hook is not None:
            select, language = dataclasses.replace(select, hook=None), dataclasses.replace(language, hook=str(hook))
        if target is not None:
            select = dataclasses.replace(select, target=None)
            language = dataclasses.replace(language, target_hook=str(target))
    source, notes = open_with_notes(options.data, select, holdout=options.holdout, seed=options.data_seed)
    cells = sweep.grid(
        options.rules, options.l0s, options.d_sae, options.seeds, options.train, options.sae.arguments(),
        options.sae.precision,
    )  # fmt: skip
    further = None
    if options.spliced or language.given():
        record = language_of_run({"notes": {"data": notes}})
        if target_width(source) is not None and not (language.target_hook or (record and record.targets)):
            raise ValueError(f"{options.data} has targets of a transcoder; name their place with --target-hook")
        further = sweep.Further(
            "spliced", {name: getattr(language, name) for name in language.given()},
            lambda: spliced_in(open_text(language, record, options.data, source.d_in, options.sae.device), record),
        )  # fmt: skip
    records = sweep.run_sweep(
        cells, source, options.out, notes={"data": notes, "fastsae": version()}, further=further,
        progress=options.train.progress, after=lambda: write_sweep(options.out),
    )  # fmt: skip
    print(write_sweep(options.out))
    print(f"\nwritten to {options.out}: sweep.json, table.md, pareto.svg, sweep.html")
    return 1 if any("failed" in records[cell.name] for cell in cells) else 0


def _records_hooks(data: Path) -> bool:
    """Whether a folder records the hooks of its rows; a file does not, nor do rows that a program saved."""
    return (data / MANIFEST).is_file() and Manifest.read(data).hooks()[0].hook is not None


def run_reproduce(options: Reproduce) -> int:
    """fastsae reproduce"""
    # Imported here: drawing costs a second that no other command should pay.
    from fastsae.systems import system
    from fastsae.systems.page import PAGE
    from fastsae.systems.runner import reproduce

    found = system(options.system)
    out = options.out or Path("runs") / (options.system + ("-quick" if options.quick else ""))
    print(
        reproduce(
            options.system, found, out, seeds=options.seeds, quick=options.quick, only=options.experiments,
            scale=sizes(options.scale), progress=options.progress, threads=options.threads,
        )
    )  # fmt: skip
    print(f"\nwritten to {out / PAGE}")
    return 0


def sizes(given: Sequence[str]) -> dict[str, int | str]:
    """{"games": 40000, "text": "a.txt"} from ["games=40000", "text=a.txt"]. Raises ValueError for anything else."""
    found: dict[str, int | str] = {}
    for one in given:
        name, _, value = one.partition("=")
        if not (name and value):
            raise ValueError(f"scale is {one!r}, expected NAME=VALUE, such as games=40000")
        found[name] = int(value) if value.isdecimal() else value
    return found


def info() -> dict[str, Any]:
    """The facts that `fastsae info` prints, JSON-able."""
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fastsae": version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        "threads": torch.get_num_threads(),
        "gpus": cuda,
        "backends": backends(),
    }


def run_convert(options: Convert) -> int:
    """fastsae convert"""
    rule = None if options.k is None else TopK(options.k)
    sae = load(options.source, subfolder=options.subfolder, format=options.source_format, activation=rule)
    save(sae, options.out, format=options.format)
    sizes = {
        name: value for name, value in sae.config.items() if name in ("d_in", "d_sae", "d_out", "pre_bias", "skip")
    }
    print_table({"activation": repr(sae.activation), **sizes, "format": options.format, "folder": options.out})
    return 0


def run_info(options: Info) -> int:
    """fastsae info"""
    facts = info()
    if options.json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    table = facts.pop("backends")
    facts["gpus"] = ", ".join(facts["gpus"]) or "none that torch sees"
    print_table(facts)
    print("backends, fastest first:")
    for name, entry in table.items():
        print(f"  {name:<10} {'available' if entry['available'] else 'not available: ' + str(entry['reason'])}")
        for key, value in entry["detail"].items():
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"  {'':<10}   {key.replace('_', ' ')}: {shown}")
    return 0


def bench(arguments: Sequence[str]) -> int:
    """fastsae bench: `python -m bench` in the repository that this package is installed from."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "__main__.py").is_file():
        raise FileNotFoundError(
            "the benchmarks are in the source repository, not in the installed package; clone it, "
            "`pip install -e .` there, and run `fastsae bench` again"
        )
    return subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=root, check=False).returncode


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{number:,} {name}" for name, number in value.items()) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def print_table(rows: dict[str, Any]) -> None:
    """Names and values in two columns on stdout."""
    width = max(len(name) for name in rows)
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


OPTIONS: dict[str, type] = {
    "harvest": Harvest, "train": Train, "sweep": Sweep, "eval": Eval, "report": Report, "reproduce": Reproduce,
    "convert": Convert, "info": Info,
}  # fmt: skip
RUN: dict[str, Callable[[Any], int]] = {
    "harvest": run_harvest,
    "train": run_train,
    "sweep": run_sweep,
    "eval": run_eval,
    "report": run_report,
    "reproduce": run_reproduce,
    "convert": run_convert,
    "info": run_info,
}
