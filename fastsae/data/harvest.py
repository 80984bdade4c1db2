"""Harvest: stores a language model's activations over a text in a folder of shards; it can stop at any time."""

from __future__ import annotations

import importlib.metadata
import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastsae.data.contexts import token_strings, vocabulary_bytes
from fastsae.data.filters import Rows
from fastsae.data.manifest import MANIFEST, HookFiles, Manifest
from fastsae.data.models import LanguageModel
from fastsae.data.stream import ActivationStream, StreamConfig, join_rows, load_for
from fastsae.data.text import Corpus, load_text
from fastsae.data.writer import ShardWriter, check_settings
from fastsae.progress import bar

log = logging.getLogger(__name__)


def harvest(
    model: str | LanguageModel,
    text: str | Corpus,
    folder: str | os.PathLike,
    config: StreamConfig,
    *,
    rows: int,
    rows_per_shard: int = 65_536,
    dtype: torch.dtype = torch.bfloat16,
    model_dtype: torch.dtype | None = None,
    device: str = "cpu",
    progress: bool = True,
) -> Manifest:
    """Store at least `rows` training rows (whole batches) and config.holdout held-out ones in `folder`.

    model, text: spec strings (see `load_model`, `load_text`) or the objects themselves. A model given by its spec is
    loaded in model_dtype on `device` (None: as in an earlier call for this folder, else the fastest there), only if
    rows are missing, and only after hooks and text have been checked without it. A model object runs in its own dtype
    on its own device. dtype: of the stored rows. With several hooks (config.hook), each has its own files, with the
    same rows in the same order, all from one pass. The folder also stores the windows of token ids, each row's position
    in them and the tokenizer's strings, so that a row's text can be shown without the model. The text is read once: if
    it ends early, there are fewer rows and a warning.

    After Ctrl-C, kill -9, an error or a full disk, call it again with the same arguments: it continues after the last
    finished shard. `rows` may then be larger than before.
    Raises: ValueError for a folder made with other settings (naming them) or for NaN and inf (naming the place);
    OSError if a shard cannot be written; BlockingIOError if another process is writing to the folder.
    """
    if rows < 1 or rows_per_shard < 1:
        raise ValueError(f"rows and rows_per_shard must be at least 1, got {rows} and {rows_per_shard}")
    corpus = load_text(text) if isinstance(text, str) else text
    settings = {
        "model": model if isinstance(model, str) else model.name,
        "text": corpus.describe(),
        "stream": config.to_record(),
        "rows_per_shard": rows_per_shard,
    }
    done = _finished(Path(folder), settings, rows)
    if done is not None:
        log.info("%s already holds %d rows", folder, done.rows)
        return done
    if isinstance(model, str):
        dtype_here = _recorded_dtype(Path(folder)) if model_dtype is None else model_dtype
        language_model = load_for(model, corpus, config, dtype=dtype_here, device=device)
    else:
        language_model = model
    stream = ActivationStream(language_model, corpus, config, repeat=False)
    with ShardWriter(folder, stream.widths[0], dtype, settings, _others(stream)) as writer:
        _describe_or_compare(writer, language_model, stream)
        if writer.manifest.position is not None:
            stream.load_state_dict(writer.manifest.position)
        if language_model.tokenizer is not None and writer.manifest.vocabulary is None:
            writer.write_vocabulary(vocabulary_bytes(token_strings(language_model.tokenizer)))
        if config.holdout and writer.manifest.held_out is None:
            held = stream.held_out()
            writer.write_held_out(held.activations, _context(held))
        have = writer.manifest.rows
        with bar(rows, "tok", progress, what="harvest", done=have) as shown:
            while have < rows:
                wanted = min(rows_per_shard, rows - have)
                shard = _read(stream, wanted, shown)
                if len(shard):
                    writer.manifest.position = stream.state_dict()
                    writer.manifest.stats = stream.stats
                    for one, its in zip(writer.manifest.others, stream.filters[1:], strict=True):
                        one.norm_median = its.median
                    writer.append(shard.activations, _context(shard))
                    have += len(shard)
                if len(shard) < wanted:
                    log.warning("the text ended after %d of %d rows", have, rows)
                    writer.manifest.text_ended = True
                    break
        writer.manifest.complete = True
        writer.manifest.write(writer.folder)
        return writer.manifest


def _finished(folder: Path, settings: dict[str, Any], rows: int) -> Manifest | None:
    """The manifest of a folder that already holds these rows, so that no model needs to be loaded."""
    if not (folder / MANIFEST).exists():
        return None
    manifest = Manifest.read(folder)
    check_settings(folder, settings, manifest.settings)
    if not manifest.complete or (manifest.rows < rows and not manifest.text_ended):
        return None
    for entry in manifest.entries():
        entry.check_size(folder)
    return manifest


def _recorded_dtype(folder: Path) -> torch.dtype | None:
    """The dtype in which an earlier call, perhaps on another machine, ran the model."""
    recorded = Manifest.read(folder).provenance if (folder / MANIFEST).exists() else {}
    return getattr(torch, recorded["model"]["dtype"]) if recorded else None


def _describe_or_compare(writer: ShardWriter, language_model: LanguageModel, stream: ActivationStream) -> None:
    """Record the model in the manifest; in a folder from an earlier call, check that it is the same model."""
    described = language_model.describe()
    if writer.manifest.provenance:
        check_settings(writer.folder, {"model": described}, {"model": writer.manifest.provenance["model"]})
    else:
        version = importlib.metadata.version("torch")
        writer.manifest.provenance = {"model": described, "layer": stream.names[0], "torch": version}


def _others(stream: ActivationStream) -> list[HookFiles]:
    """The hooks after the first, without files yet."""
    places = zip(stream.config.hooks, stream.names, stream.widths, strict=True)
    return [HookFiles(hook, name, width) for hook, name, width in places][1:]


def _read(stream: ActivationStream, wanted: int, shown: tqdm) -> Rows:
    """The next batches of the stream until there are `wanted` rows, or all remaining ones."""
    parts: list[Rows] = []
    have = 0
    while have < wanted and (part := stream.next()) is not None:
        parts.append(part)
        have += len(part)
        shown.update(len(part))
        shown.set_postfix(too_large=stream.stats["rows_dropped_norm"], refresh=False)
    return join_rows(parts, stream.d_in, stream.config.window)


def _context(rows: Rows) -> dict[str, Tensor]:
    """The tensors of a shard that locate its rows in the text."""
    return {
        "token_ids": rows.token_ids.to(torch.int32),
        "window": rows.window.to(torch.int32),
        "position": rows.position.to(torch.int32),
    }
