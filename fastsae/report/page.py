"""Puts a run's numbers, figures and texts into one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import datetime
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsae.atomic import replace_file
from fastsae.data.shards import ShardSource
from fastsae.data.source import next_pair
from fastsae.report import html
from fastsae.report.contexts import LatentCard, check_latents, latent_cards
from fastsae.report.plots import all_plots
from fastsae.report.promoted import promoted_of_run
from fastsae.report.runlog import Record, RunLog, hooks_of, is_number, read_run, whole
from fastsae.report.timing import StepTiming, time_step
from fastsae.runs.checkpoint import CheckpointError
from fastsae.runs.opening import OpenedRun, language_of_run, open_run, rows_of_run, version

HOOK_COLUMNS = {
    "rows": ("n_tokens", ",.0f"),
    "FVU": ("fvu", ".4f"),
    "FVU per token": ("fvu_per_token", ".4f"),
    "L0": ("l0", ".1f"),
    "dead share": ("dead_share", ".2%"),
    "‖x̂‖ / ‖x‖": ("norm_ratio", ".4f"),
    "cosine": ("cosine", ".4f"),
}
"""Columns of the table of autoencoders: the entry of evaluation_spliced.json and its format."""
SAMPLE = 24
"""Latents that are drawn, unless another number is asked for."""


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
    open: int
    """How many cards are unfolded."""
    lens: str = ""
    """How the promoted tokens were found, or why there are none."""


@dataclasses.dataclass(frozen=True)
class SplicedSection:
    """What the language model loses: rows of name, cross-entropy, KL and recovered share over this ablation."""

    lead: str
    rows: list[tuple[str, str, str, str]]
    undefined: list[str]
    """Why a recovered share is not defined."""
    hooks: list[tuple[str, ...]]
    """Of every autoencoder: the hook and the columns of HOOK_COLUMNS."""


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
        splice_with=_splice_with(log),
        hook_columns=list(HOOK_COLUMNS),
        latents=latents,
        settings=settings_groups(log.config),
        footer=_footer(log),
    )


def fill(**parts: Any) -> str:
    """The template with these parts; a section of it whose part is not given is left out.

    Everything that comes from files or models is escaped by the template.
    """
    sections = (
        "notes",
        "tiles",
        "plots",
        "cells",
        "spliced",
        "splice_with",
        "hook_columns",
        "latents",
        "settings",
        "wide",
    )
    return html.render("fastsae.report", "run.html", **(dict.fromkeys(sections) | parts))


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
            rest = ", ".join(f"{name} {value}" for name, value in rule.items() if name != "kind" and value is not False)
            parts.append(f"{rule.get('kind', '')} ({rest})")
        d_in, d_out = sae.get("d_in", "?"), sae.get("d_out")
        target = whole(log.config, "source", "d_target") is not None
        parts.append(f"{d_in} inputs, {d_sae:,} latents" + (f", {d_out} outputs" if target else ""))
    parts += hooks_read(log.config)
    step, total = log.last("step"), total_steps(log.config)
    if step is not None:
        if total is None or step >= total:
            parts.append(f"{step:,.0f} steps")
        else:
            parts.append(f"step {step:,.0f} of {total:,}: not finished")
    return " · ".join(parts)


def hooks_read(config: Record) -> list[str]:
    """Where the run reads, and what a transcoder gives; nothing where the run does not say."""
    try:
        record = language_of_run(config)
    except (OSError, ValueError):
        return []
    if record is None:
        return []
    read = ", ".join(map(str, record.stream.hooks))
    if len(record.stream.hooks) > 1:
        read = f"crosscoder of {read}"
    given = ", ".join(map(str, record.targets))
    return [f"transcoder of {read} to {given}" if given else f"hook {read}"]


def spliced_section(log: RunLog) -> SplicedSection | None:
    """From the newest evaluation that was made with a language model; None if there is none."""
    evaluation = next((e for e in reversed(log.evals) if isinstance(e.get("spliced"), dict)), None)
    if evaluation is None:
        return None
    held = evaluation["spliced"]

    def shown(key: str, form: str = ".4f", of: Record = held) -> str:
        value = of.get(key)
        return format(float(value), form) if value is not None and is_number(value) else "–"

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
    undefined = held.get("undefined")
    reasons = [str(why) for why in undefined.values()] if isinstance(undefined, dict) else []
    each = [
        (str(one.get("hook", "–")), *(shown(key, form, of=one) for key, form in HOOK_COLUMNS.values()))
        for one in hooks_of(evaluation)
    ]
    return SplicedSection(lead, rows, reasons, each)


def _splice_with(log: RunLog) -> str | None:
    """The command that measures the spliced loss; None where the run records no language model."""
    try:
        record = language_of_run(log.config)
    except (OSError, ValueError):
        return None
    return None if record is None else f"fastsae eval {shlex.quote(str(log.folder))} --spliced"


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


def settings_groups(config: Record) -> list[html.SettingsGroup]:
    """One group for each section of the config, plain values first under "run"."""
    plain = {key: value for key, value in config.items() if not isinstance(value, dict)}
    groups = [html.SettingsGroup("run", html.flat(plain))] if plain else []
    return groups + [html.SettingsGroup(k, html.flat(v)) for k, v in config.items() if isinstance(v, dict) and v]


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """What a report adds to the content of the run folder.

    latents: those to show with their texts, in this order; None: `sample` of them (None: 24; 0: none), drawn by `seed`.
    passages: per latent. max_rows: rows searched for the texts at most. promoted: load the run's language model, where
    it is on this disk, for the tokens that each latent promotes. time_step: time the parts of an update on the run's
    data. backend: of the ops.
    """

    latents: Sequence[int] | None = None
    sample: int | None = None
    passages: int = 8
    seed: int = 0
    max_rows: int = 131_072
    promoted: bool = True
    time_step: bool = True
    backend: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("sample", 0), ("passages", 1), ("max_rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}, expected at least {least}")
        if self.latents is not None and self.sample is not None:
            raise ValueError(f"latents names those to show and sample = {self.sample} draws some; give one of them")
        if isinstance(self.latents, int):
            raise ValueError(f"latents is {self.latents}, expected indices; sample={self.latents} draws as many")

    @property
    def shows_latents(self) -> bool:
        return self.sample != 0 if self.latents is None else bool(self.latents)


def measure(log: RunLog, options: ReportOptions) -> tuple[LatentSection | None, StepTiming | None]:
    """The latents' texts and the timing of an update, which need the weights and activations; None if not available.

    A report also serves a run that is broken or was moved: the page says what cannot be read, nothing is raised.
    """
    if not options.shows_latents and not options.time_step:
        return None, None
    section = timing = None
    try:
        source = rows_of_run(log.config)
        with_text = isinstance(source, ShardSource) and source.manifest.vocabulary is not None
        if options.latents and not with_text:
            log.notes.append("The requested latents are not shown: the run's data is not stored with its text.")
        if source is None:
            return None, None
        run = open_run(log.folder)
        run.sae.backend = options.backend
        if options.shows_latents and isinstance(source, ShardSource) and with_text:
            section = latent_section(run, source, options)
        train = log.config.get("train")
        size = whole(log.config, "train", "batch_size")
        if options.time_step and isinstance(train, dict) and train.get("fused") is True and size:
            x, target = next_pair(source, size)
            timing = time_step(run.sae, x, options.backend, target)
    except (OSError, ValueError, CheckpointError) as error:
        log.notes.append(f"Weights or activations could not be read, so latents or timings are missing: {error}")
    return section, timing


def latent_section(run: OpenedRun, source: ShardSource, options: ReportOptions) -> LatentSection | None:
    """The latents and their texts; None if none is to be shown. Raises as `latent_cards`."""
    cards, scanned = latent_cards(
        run.sae, source, latents=options.latents, sample=SAMPLE if options.sample is None else options.sample,
        passages=options.passages, seed=options.seed, max_rows=options.max_rows,
    )  # fmt: skip
    if not cards:
        return None
    n, lens = len(cards), ""
    if options.promoted:
        found, lens = promoted_of_run(run, [card.index for card in cards], source.vocabulary() or [])
        cards = [dataclasses.replace(card, promoted=found.get(card.index)) for card in cards]
    chosen = (
        f"{n} of the latents that fired, one drawn at random (seed {options.seed}) from each of {n} equal strata of "
        "density rank, densest first."
        if options.latents is None
        else "The requested latents."
    )
    intro = (
        f"{chosen} For each, its {options.passages} strongest passages that neither overlap nor repeat, over "
        f"{scanned:,} rows, with the activation at the strongest token. Weights of step {run.step:,}."
    )
    return LatentSection(intro, cards, 2 if options.latents is None else n, lens)


def write_report(run_dir: str | Path, *, out: str | Path | None = None, options: ReportOptions | None = None) -> Path:
    """Writes the report of a run folder, finished or not, and returns its path (`out`, or run_dir/report.html).

    The page is replaced atomically. Raises FileNotFoundError or ValueError if run_dir is not a run, `out` is not
    a possible file or the SAE does not have a latent that is named; OSError if the page cannot be written.
    """
    log, options = read_run(run_dir), options or ReportOptions()
    if (d_sae := whole(log.config, "sae", "d_sae")) is not None:
        check_latents(options.latents or (), d_sae)
    path = log.folder / "report.html" if out is None else Path(out)
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "lies in a folder that does not exist"
        raise ValueError(f"the report cannot be written to {path}, which {what}; give the name of a file")
    latents, timing = measure(log, options)
    text = render(log, latents, timing)
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path
