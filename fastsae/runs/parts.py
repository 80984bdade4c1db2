"""Checkpoints of an SAE on several processes, in the files of one process: none of them holds more than its rows.

Each sends its rows, some at a time, to the first process, which writes them; each reads its rows of the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.model.files import WEIGHTS, load_rows_, saved_config, seal, tensors_of, unsealed_header
from fastsae.model.placement import Placement
from fastsae.model.sae import SparseAutoencoder
from fastsae.model.tensorfile import TensorWriter, order_of
from fastsae.parallel.shards import by_latent, of_size
from fastsae.runs import checkpoint
from fastsae.runs.checkpoint import Written
from fastsae.runs.state_tree import split_state

OWN = ("optimizer", "density")
"""The sections of a training state of which each process has its rows; the first process has the others."""


@dataclass(frozen=True)
class RowsFile:
    """A file with tensors of which this process has all, or, of those named in `rows`, the rows of its latents."""

    name: str
    tensors: Mapping[str, Tensor]
    rows: frozenset[str]
    metadata: Mapping[str, str] | None = None


def write(
    root: Path, step: int, sae: SparseAutoencoder, trained: Mapping[str, Any], others: Mapping[str, Any] | None,
    agreed: Callable[[], AbstractContextManager[None]],
) -> Path | None:  # fmt: skip
    """Writes a checkpoint of the whole SAE, of which `sae` is a part; all processes call it. Its path, in the first.

    trained: the state of the step that trains the part. others: further sections, given in the first process alone.
    Raises CheckpointError in the first process, and in the others what `agreed` makes of it; as `write_checkpoint`.
    """
    p = sae.placement
    assert p is not None
    state = {
        "optimizer": of_size(trained, sae, p.d_sae),
        "density": {"fired": sae.fired, "over": int(sae.fired_over)},
    }
    split = {section: split_state(tree, section) for section, tree in state.items()}
    config, named = saved_config(sae), frozenset(by_latent(sae))
    files = [RowsFile(WEIGHTS, tensors_of(sae), named, unsealed_header(config))]
    files += [
        RowsFile(f"{section}.safetensors", tensors, frozenset(n for n in tensors if has_row_each(n, sae)))
        for section, (_, tensors) in split.items()
    ]
    with ExitStack() as stack:
        with agreed():
            partial = None if others is None else stack.enter_context(checkpoint.writing(root, step))
        problem = write_files(partial, files, p)
        with agreed(), stack.pop_all():
            if problem is not None:
                raise problem
            if partial is not None and others is not None:
                seal(partial, config)
                trees = {section: Written(tree) for section, (tree, _) in split.items()}
                checkpoint.write_state(partial, step, {"optimizer": trees.pop("optimizer"), **others, **trees})
    return None if others is None else checkpoint.checkpoint_path(root, step)


def write_files(folder: Path | None, files: list[RowsFile], p: Placement) -> OSError | None:
    """Writes files in the first process, which alone gives a folder; all processes of the mesh call it.

    Returns, in the first, what went wrong, instead of raising it: the exchange goes on to its end whatever it was.
    """
    if p.tokens.rank:
        return None  # others have the same rows
    problem: OSError | None = None
    for file in files:
        shapes = {
            name: (t.dtype, (p.d_sae, *t.shape[1:]) if name in file.rows else tuple(t.shape))
            for name, t in file.tensors.items()
        }
        writer: TensorWriter | None = None
        try:
            if folder is not None and problem is None:
                writer = TensorWriter(folder / file.name, shapes, file.metadata)
        except OSError as error:
            problem = error

        def take(piece: Tensor, writer: TensorWriter | None = writer) -> None:
            nonlocal problem
            try:
                if writer is not None and problem is None:
                    writer.add(piece)
            except OSError as error:
                problem = error

        try:
            for name in order_of(shapes):
                if name in file.rows:
                    p.latents.pass_to_first(file.tensors[name], take)
                else:
                    take(file.tensors[name])
        finally:
            try:
                if writer is not None:
                    writer.close()
            except OSError as error:
                problem = problem or error
    return problem


def read(path: Path, sae: SparseAutoencoder) -> dict[str, Any]:
    """Loads a part of an SAE from the checkpoint of the whole, and returns its part of the training state.

    Raises as `checkpoint.read_state` and `load_rows_`.
    """
    p = sae.placement
    assert p is not None
    own = slice(p.first, p.first + p.own)
    state = checkpoint.read_state(path, lambda name: own if has_row_each(name, sae) else None)
    load_rows_(sae, path, by_latent(sae))
    return {**state, "optimizer": of_size(state["optimizer"], sae, p.own)}


def has_row_each(name: str, sae: SparseAutoencoder) -> bool:
    """Whether a tensor of a training state, by its name in a file, has a row for each latent."""
    *before, parameter, key = name.split(".")
    if not before:
        return name == "density.fired"
    return before == ["optimizer", "optimizer", "state"] and parameter in by_latent(sae) and key != "step"
