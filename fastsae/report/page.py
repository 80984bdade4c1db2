"""Puts a run's numbers, figures and texts into one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.resources
import json
import math
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fastsae.atomic import replace_file
from fastsae.data.shards import ShardSource
from fastsae.report.contexts import LatentCard, latent_cards
from fastsae.report.plots import all_plots
from fastsae.report.runlog import Record, RunLog, is_number, read_run, whole
from fastsae.report.timing import StepTiming, time_step
from fastsae.runs.checkpoint import CheckpointError
from fastsae.runs.opening import OpenedRun, open_run, rows_of_run, version


@dataclasses.dataclass(frozen=True)
class Tile:
    """One headline number."""

    label: str
    value: str
    hint: str = ""


@dataclasses.dataclass(frozen=True)
class LatentSection:
    """The latents that the page shows and how they were chosen."""

    intro: str
    cards: list[LatentCard]


@dataclasses.dataclass(frozen=True)
class SplicedSection:
    """What the language model loses: rows of name, cross-entropy, KL and recovered share over this ablation."""

    lead: str
    rows: list[tuple[str, str, str, str]]


def render(log: RunLog, latents: LatentSection | None = None, timing: StepTiming | None = None) -> str:
    """The page's HTML."""
    return fill(
        kind="fastsae report",
        title=log.folder.resolve().name,
        subtitle=_subtitle(log),
        notes=log.notes,
        tiles=_tiles(log),
        heading="Curves",
        plots=all_plots(log, timing),
        spliced=spliced_section(log),
        latents=latents,
        settings=settings_groups(log.config),
        footer=_footer(log),
    )


def fill(**parts: Any) -> str:
    """The template with these parts; a section of it whose part is not given is left out.

    Everything that comes from files or models is escaped by the template.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(read_resource("template.html"))
    sections = ("notes", "tiles", "plots", "cells", "spliced", "latents", "settings", "wide")
    return template.render(dict.fromkeys(sections) | {"css": Markup(read_resource("style.css"))} | parts)


def read_resource(name: str) -> str:
    """A file of this package."""
    return (importlib.resources.files(__package__) / name).read_text(encoding="utf-8")


def total_steps(config: Record) -> int | None:
    """The updates that the settings ask for, or None if they do not say."""
    tokens, size = (
        whole(config, "train", "tokens") or whole(config, "source", "n_tokens"),
        whole(config, "train", "batch_size"),
    )
    return whole(config, "train", "steps") or (math.ceil(tokens / size) if tokens and size else None)


def _subtitle(log: RunLog) -> str:
    parts = []
    sae, d_sae = log.config.get("sae"), whole(log.config, "sae", "d_sae")
    if isinstance(sae, dict) and d_sae is not None:
        rule = sae.get("activation")
        if isinstance(rule, dict):
            rest = ", ".join(f"{name} {value}" for name, value in rule.items() if name != "kind")
            parts.append(f"{rule.get('kind', '')} ({rest})")
        parts.append(f"{sae.get('d_in', '?')} inputs, {d_sae:,} latents")
    step, total = log.last("step"), total_steps(log.config)
    if step is not None:
        if total is None or step >= total:
            parts.append(f"{step:,.0f} steps")
        else:
            parts.append(f"step {step:,.0f} of {total:,}: not finished")
    return " · ".join(parts)


def spliced_section(log: RunLog) -> SplicedSection | None:
    """From the newest evaluation that was made with a language model; None if there is none."""
    held = next((e["spliced"] for e in reversed(log.evals) if isinstance(e.get("spliced"), dict)), None)
    if held is None:
        return None

    def shown(key: str, form: str = ".4f") -> str:
        value = held.get(key)
        return format(float(value), form) if is_number(value) else "–"

    hooks = held.get("hooks")
    names = [str(name) for name in hooks] if isinstance(hooks, list) else []
    predictions = whole(held, "n_predictions")
    lead = (
        f"Reconstructions in place of the activations at {', '.join(names) or 'an unknown hook'}, at "
        f"{shown('replaced_share', '.2%')} of the tokens. Left alone: {held.get('special', '–')}. "
        f"Mean ablation: the mean of {held.get('mean_of', '–')}. In nats, over "
        f"{'–' if predictions is None else f'{predictions:,}'} predictions."
    )
    rows = [
        ("untouched", shown("ce_untouched"), "", ""),
        ("spliced", shown("ce_spliced"), shown("kl_spliced"), ""),
        *(
            (f"{name} ablation", shown(f"ce_{name}"), shown(f"kl_{name}"), shown(f"recovered_over_{name}"))
            for name in ("zero", "mean")
        ),
    ]
    return SplicedSection(lead, rows)


def _footer(log: RunLog) -> str:
    machine = log.config.get("machine")
    return footer(machine.get("torch") if isinstance(machine, dict) else None)


def footer(torch_version: str | None) -> str:
    """Who wrote the page and when; `torch_version`: of the training."""
    now = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    made = f"Written by fastsae {version()} on {now}"
    return f"{made}; trained with torch {torch_version}." if torch_version else f"{made}."


def _tiles(log: RunLog) -> list[Tile]:
    evaluated = log.evals[-1] if log.evals else {}
    source = "held-out rows" if evaluated else "last training batches"

    def best(key: str) -> float | None:
        value = log.last(key, of="evals")
        return log.last(key) if value is None else value

    tiles = []
    for label, key, form, hint in (
        ("FVU", "fvu", "{:.4f}", source),
        ("MSE", "mse", "{:.4g}", source),
        ("L0", "l0", "{:.1f}", "active latents per token"),
        ("Cosine", "cosine", "{:.4f}", "of a row and its reconstruction"),
        ("Dead share", "dead_share", "{:.2%}", f"never active on {whole(evaluated, 'n_tokens') or 0:,} held-out rows"),
    ):
        value = best(key)
        if value is not None:
            tiles.append(Tile(label, form.format(value), hint))
    tokens, speed = log.last("tokens"), log.median("tokens_per_s")
    if tokens is not None:
        tiles.append(Tile("Tokens", f"{tokens:,.0f}", f"in {log.last('step') or 0:,.0f} steps"))
    if skipped := log.last("skipped"):
        tiles.append(Tile("Skipped", f"{skipped:,.0f}", "steps that changed nothing: numbers were not finite"))
    if speed is not None:
        tiles.append(Tile("Tokens/s", f"{speed:,.0f}", "median over the run"))
    return [*tiles, *_speed_up(log)]


def _speed_up(log: RunLog) -> list[Tile]:
    """Relative to the fastest reference timed side by side, or else to the run's dense curve."""
    ours = log.step_times.get("fastsae")
    others = {name: times["ms"] for name, times in log.step_times.items() if name != "fastsae"}
    if ours and others:
        best = min(others, key=lambda name: others[name])
        return [Tile("Speed-up", f"{others[best] / ours['ms']:.1f}×", f"of a whole step, over {best}")]
    speed, dense = log.median("tokens_per_s"), log.median("tokens_per_s", of="dense")
    if speed is None or not dense:
        return []
    return [Tile("Speed-up", f"{speed / dense:.1f}×", f"over the dense reference ({dense:,.0f} tokens/s)")]


@dataclasses.dataclass(frozen=True)
class SettingsGroup:
    """One table of settings."""

    name: str
    rows: list[tuple[str, str]]


def settings_groups(config: Record) -> list[SettingsGroup]:
    """One group for each section of the config, plain values first under "run"."""
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    groups = [SettingsGroup("run", _rows(plain))] if plain else []
    return groups + [SettingsGroup(k, _rows(v)) for k, v in config.items() if isinstance(v, dict) and v]


def _rows(section: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in section.items():
        if isinstance(value, dict) and value:
            rows += _rows(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What a report adds to the content of the run folder.

    latents: number shown with their texts; 0: none. passages: per latent. seed: of the draw. max_rows: rows searched
    for the texts at most. time_step: time the parts of an update on the run's data. backend: of the ops.
    """

    latents: int = 24
    passages: int = 8
    seed: int = 0
    max_rows: int = 131_072
    time_step: bool = True
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("latents", 0), ("passages", 1), ("max_rows", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}")


def measure(log: RunLog, options: ReportOptions) -> tuple[LatentSection | None, StepTiming | None]:
    """The latents' texts and the timing of an update, which need the weights and activations; None if not available.

    A report also serves a run that is broken or was moved: the page says what cannot be read, nothing is raised.
    """
    if not options.latents and not options.time_step:
        return None, None
    section = timing = None
    try:
        source = rows_of_run(log.config)
        if source is None:
            return None, None
        run = open_run(log.folder)
        run.sae.backend = options.backend
        if options.latents and isinstance(source, ShardSource) and source.manifest.vocabulary is not None:
            section = latent_section(run, source, options)
        train = log.config.get("train")
        size = whole(log.config, "train", "batch_size")
        if options.time_step and isinstance(train, dict) and train.get("fused") is True and size:
            timing = time_step(run.sae, source.next_batch(size), options.backend)
    except (OSError, ValueError, CheckpointError) as error:
        log.notes.append(f"Weights or activations could not be read, so latents or timings are missing: {error}")
    return section, timing


def latent_section(run: OpenedRun, source: ShardSource, options: ReportOptions) -> LatentSection | None:
    """The latents and their texts; None if none fired. Raises as `latent_cards`."""
    cards, scanned = latent_cards(
        run.sae, source, latents=options.latents, passages=options.passages, seed=options.seed,
        max_rows=options.max_rows,
    )  # fmt: skip
    if not cards:
        return None
    n = len(cards)
    intro = (
        f"{n} of the latents that fired, one drawn at random (seed {options.seed}) from each of {n} equal strata of "
        f"density rank, densest first. For each, its {options.passages} strongest passages that neither overlap nor "
        f"repeat, over {scanned:,} rows, with the activation at the strongest token. Weights of step {run.step:,}."
    )
    return LatentSection(intro, cards)


def write_report(run_dir: str | Path, *, out: str | Path | None = None, options: ReportOptions | None = None) -> Path:
    """Writes the report of a run folder, finished or not, and returns its path (`out`, or run_dir/report.html).

    The page is replaced atomically. Raises FileNotFoundError or ValueError if run_dir is not a run or `out` is not
    a possible file; OSError if the page cannot be written.
    """
    log = read_run(run_dir)
    path = log.folder / "report.html" if out is None else Path(out)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "lies in a folder that is not there"
        raise ValueError(f"the report cannot be written to {path}, which {what}; give the name of a file")
    latents, timing = measure(log, options or ReportOptions())
    html = render(log, latents, timing)
    replace_file(path, lambda partial: partial.write_text(html, encoding="utf-8"))
    return path
