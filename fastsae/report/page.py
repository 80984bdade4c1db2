"""Puts a run's numbers, figures and texts into one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import os
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .contexts import LatentCard
from .plots import all_plots
from .runlog import Record, RunLog, read_run


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


def render(log: RunLog, latents: LatentSection | None = None) -> str:
    """The page's HTML. Everything that comes from files or models is escaped by the template."""
    here = importlib.resources.files(__package__)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((here / "template.html").read_text(encoding="utf-8"))
    css = (here / "style.css").read_text(encoding="utf-8")
    return template.render(
        css=Markup(css),
        title=log.folder.resolve().name,
        subtitle=_subtitle(log),
        notes=log.notes,
        tiles=_tiles(log),
        plots=all_plots(log),
        latents=latents,
        settings=_settings(log.config),
        footer=_footer(log),
    )


def _subtitle(log: RunLog) -> str:
    return ""


def _footer(log: RunLog) -> str:
    return ""


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
        ("Dead", "dead_share", "{:.2%}", f"never active on {evaluated.get('n_tokens', 0):,} held-out rows"),
    ):
        value = best(key)
        if value is not None:
            tiles.append(Tile(label, form.format(value), hint))
    tokens, speed, dense = log.last("tokens"), log.median("tokens_per_s"), log.median("tokens_per_s", of="dense")
    if tokens is not None:
        tiles.append(Tile("Tokens", f"{tokens:,.0f}", f"in {log.last('step') or 0:,.0f} steps"))
    if speed is not None:
        tiles.append(Tile("Tokens/s", f"{speed:,.0f}", "median over the run"))
    if speed is not None and dense:
        tiles.append(Tile("Speed-up", f"{speed / dense:.1f}×", f"over the dense reference ({dense:,.0f} tokens/s)"))
    return tiles


@dataclasses.dataclass(frozen=True)
class SettingsGroup:
    """One table of settings."""

    name: str
    rows: list[tuple[str, str]]


def _settings(config: Record) -> list[SettingsGroup]:
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


def write_report(run_dir: str | Path) -> Path:
    log = read_run(run_dir)
    path = log.folder / "report.html"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(render(log), encoding="utf-8")
    os.replace(partial, path)
    return path
