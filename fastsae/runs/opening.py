"""Opens paths that a user gives: a file or folder of activations, a run folder, a saved SAE."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastsae.data.hooks import Hook, Hooks, hooks_of
from fastsae.data.manifest import MANIFEST, Manifest
from fastsae.data.models import LanguageModel
from fastsae.data.shards import ShardSource
from fastsae.data.stream import StreamConfig
from fastsae.data.tensor import TensorSource
from fastsae.model.files import WEIGHTS, load
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.checkpoint import CheckpointError, newest_valid, step_of, verify_checkpoint
from fastsae.runs.rundir import CONFIG

EVALUATION = "evaluation.json"
SPLICED_EVALUATION = "evaluation_spliced.json"
"""The file that `fastsae eval` writes into the run folder and the report reads."""
HOLDOUT = 2048
"""Rows of a tensor file that are held out by default (at most a tenth of them)."""


@dataclasses.dataclass(frozen=True)
class OpenedRun:
    """An SAE from disk. For a saved SAE outside a run, `step` is None and `config` is empty."""

    sae: SparseAutoencoder
    path: Path
    """The folder of the weights."""
    step: int | None
    config: dict[str, Any]
    """The run's config.json."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which rows of a folder or file: the hooks of a folder, or the tensors of a .safetensors file.

    hook           if the folder has several; several chosen ones stand side by side. target: a transcoder's target.
    tensor         None: "activations", or the only one there. target_tensor: likewise for a transcoder.
    """

    hook: Hooks | None = None
    target: Hooks | None = None
    tensor: str | None = None
    target_tensor: str | None = None

    def __post_init__(self) -> None:
        for name in ("hook", "target"):  # JSON and the command line give lists; an empty one means no choice
            given = getattr(self, name)
            if isinstance(given, list | tuple):
                one = given[0] if len(given) == 1 else tuple(given)
                object.__setattr__(self, name, one if given else None)

    def notes(self) -> dict[str, Any]:
        """What is chosen, JSON-able."""
        given = {name: getattr(self, name) for name in ("hook", "target", "target_tensor")}
        return {"tensor": self.tensor, **{name: value for name, value in given.items() if value is not None}}


def open_rows(
    path: str | Path, select: Selection | None = None, *, holdout: int | None = None, seed: int = 0
) -> ShardSource | TensorSource:
    """The activations at `path`: a folder with a manifest, a .safetensors or a .npy file of rows (n, d_in).

    select   which of them; None: the only ones there.
    holdout  rows never trained on, at the end; None: the folder's own, or 2,048 but at most a tenth of a file.
    Raises FileNotFoundError, ShardError, or ValueError with what was found and what was expected.
    """
    path, select = Path(path), select or Selection()
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            raise ValueError(f"{path} holds no activations: expected a {MANIFEST} in it, as `fastsae harvest` writes")
        if select.target_tensor is not None:
            raise ValueError(f"{path} is a folder: name the hook of its targets with target (--target-hook)")
        return ShardSource(path, hook=select.hook, target=select.target, holdout=holdout, seed=seed)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: expected a folder of `fastsae harvest`, .safetensors or .npy")
    if select.hook is not None or select.target is not None:
        raise ValueError(f"{path} is a file, which has no hooks: name its tensors (--tensor, --target-tensor)")
    x = _read_tensor(path, select.tensor)
    if x.ndim != 2:
        raise ValueError(f"{path} holds {x.dtype} of shape {tuple(x.shape)}, expected rows (n, d_in)")
    target = None if select.target_tensor is None else _read_tensor(path, select.target_tensor)
    return TensorSource(x, min(HOLDOUT, len(x) // 10) if holdout is None else holdout, seed, target)


def _read_tensor(path: Path, name: str | None) -> Tensor:
    if path.suffix == ".npy":
        try:
            # "c": memory-mapped, copy-on-write; never unpickled.
            array = np.load(path, mmap_mode="c", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{path} is truncated or not a .npy file of numbers: {error}") from error
        if array.dtype not in (np.float16, np.float32, np.float64):
            raise ValueError(f"{path} holds {array.dtype} of shape {array.shape}, expected float rows (n, d_in)")
        return torch.from_numpy(array)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} is neither a folder nor a .safetensors or .npy file; convert it to one of them")
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            wanted = name or ("activations" if "activations" in names else names[0] if len(names) == 1 else None)
            if wanted is None or wanted not in names:
                asked = f"no tensor {name!r}" if name else "several tensors"
                raise ValueError(f"{path} holds {asked}: name one of {', '.join(names) or '(none)'}")
            return file.get_tensor(wanted)
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a .safetensors file: {error}") from error


def open_run(path: str | Path, *, device: str | None = None) -> OpenedRun:
    """The SAE of a run folder (its newest valid checkpoint), of a checkpoint, or of the folder of a saved SAE.

    Raises FileNotFoundError if there is no such folder; CheckpointError if a run has no usable checkpoint;
    SavedModuleError for a damaged one.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"no run or saved SAE at {path}; `fastsae train ... --run-dir {path}` makes one")
    if (path / WEIGHTS).is_file():
        is_checkpoint = path.parent.name == "checkpoints" and path.name.startswith("step_")
        config = run_config(path.parent.parent) if is_checkpoint else {}
        if is_checkpoint and (path / MANIFEST).is_file():
            verify_checkpoint(path, only=(WEIGHTS, CONFIG))  # files of another run would also load as a module
        return OpenedRun(load(path, device), path, step_of(path) if is_checkpoint else None, config)
    checkpoint, problems = newest_valid(path / "checkpoints")
    if checkpoint is None:
        reason = f": {'; '.join(problems)}" if problems else ""
        raise CheckpointError(f"{path} holds no checkpoint that can be used{reason}")
    return OpenedRun(load(checkpoint, device), checkpoint, step_of(checkpoint), run_config(path))


def run_config(run_dir: Path) -> dict[str, Any]:
    """The settings in a run folder's config.json; empty if there is none. Raises ValueError if it is damaged."""
    path = run_dir / CONFIG
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it or delete it") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected a JSON object; restore it or delete it")
    return config


def describe_rows(
    path: str | Path, select: Selection | None = None, *, holdout: int | None, seed: int
) -> dict[str, Any]:  # fmt: skip
    """The data's description in a run's notes, from which `rows_of_run` can open it again."""
    chosen = (select or Selection()).notes()
    return {"path": str(Path(path).absolute()), **chosen, "holdout": holdout, "seed": seed}


def open_with_notes(
    path: str | Path, select: Selection | None = None, *, holdout: int | None = None, seed: int = 0
) -> tuple[ShardSource | TensorSource, dict[str, Any]]:
    """`open_rows`, and the "data" entry of a run's notes: where the rows are, and how they were harvested."""
    source = open_rows(path, select, holdout=holdout, seed=seed)
    notes = describe_rows(path, select, holdout=holdout, seed=seed)
    return source, notes | ({"harvest": source.manifest.settings} if isinstance(source, ShardSource) else {})


def rows_of_run(config: dict[str, Any]) -> ShardSource | TensorSource | None:
    """The activations that a run was trained on, from its config.json; None if that names no file.

    Raises as `open_rows` does, if the file was moved or damaged.
    """
    notes = config.get("notes")
    data = notes.get("data") if isinstance(notes, dict) else None
    if not isinstance(data, dict) or not isinstance(data.get("path"), str):
        return None
    tensor, holdout, seed = data.get("tensor"), data.get("holdout"), data.get("seed") or 0
    if not (isinstance(tensor, str | None) and isinstance(holdout, int | None) and isinstance(seed, int)):
        raise ValueError(
            f"the run's record of its data has tensor = {tensor!r}, holdout = {holdout!r}, seed = {seed!r}, expected a "
            "name, a number of rows and a number; was config.json edited? Name the data yourself"
        )
    return open_rows(data["path"], selection_of(data), holdout=holdout, seed=seed)


def selection_of(data: dict[str, Any]) -> Selection:
    """The rows that a run's record of its data names."""
    return Selection(data.get("hook"), data.get("target"), data.get("tensor"), data.get("target_tensor"))


@dataclasses.dataclass(frozen=True)
class LanguageRecord:
    """The language model and the text that a run's activations come from; None if the run does not record them."""

    model: str
    text: dict[str, Any] | None
    """`Corpus.describe()`, or only its "spec"."""
    stream: StreamConfig
    """Its hook is the one that the autoencoder reads, or those of a crosscoder."""
    targets: tuple[Hook, ...] = ()
    """The hook that a transcoder predicts, or several, side by side."""
    others: tuple[Hook, ...] = ()
    """Further hooks of the harvest, whose norm filters also dropped tokens."""
    dtype: str | None = None
    """Type in which the model ran."""
    digest: str | None = None
    """Of the model's weights, see `LanguageModel.describe`; of a model of that `dtype`."""
    norm_median: float | None = None
    """The median norm that the norm filter multiplies."""

    @property
    def target(self) -> Hook | None:
        """The hook that a transcoder predicts; None for an autoencoder. Raises ValueError for several."""
        if len(self.targets) > 1:
            raise ValueError(
                f"this transcoder predicts {', '.join(map(str, self.targets))} side by side, but only one hook can be "
                "spliced into a model; measure it on stored rows, without --spliced"
            )
        return self.targets[0] if self.targets else None


def language_of_run(config: dict[str, Any]) -> LanguageRecord | None:
    """From a run's config.json, and the manifest of its activations if that is still there; None for other data.

    Raises ValueError if the record does not fit this version.
    """
    notes = config.get("notes")
    data = notes.get("data") if isinstance(notes, dict) else None
    if not isinstance(data, dict):
        return None
    try:
        live, harvest = data.get("live"), data.get("harvest")
        targets = () if data.get("target") is None else hooks_of(data["target"])
        if live:
            stream = StreamConfig.from_record(live["stream"])
            own = data.get("hook")  # of several live hooks, that of this run
            read = stream.hooks if own is None else hooks_of(own)
            given = {key.removeprefix("text_"): live[key] for key in ("text_field", "token_type") if key in live}
            return LanguageRecord(
                live["model"], {"spec": live["text"], **given}, dataclasses.replace(stream, hook=read), targets,
                tuple(hook for hook in stream.hooks if hook not in read), live["model_dtype"],
            )  # fmt: skip
        if not harvest or "stream" not in harvest:
            return None
        stream = StreamConfig.from_record(harvest["stream"])
        asked = data.get("hook", stream.hooks[0])
        read = hooks_of(asked)
        others = tuple(hook for hook in stream.hooks if str(hook) not in map(str, (*read, *targets)))
        record = LanguageRecord(
            harvest["model"], harvest["text"], dataclasses.replace(stream, hook=read), targets, others
        )
        if not (Path(data["path"]) / MANIFEST).is_file():
            return record
        path = Path(data["path"])
        manifest = Manifest.read(path)
        model = manifest.provenance.get("model") or {}
        used = [manifest.of_hook(hook, path) for hook in (*read, *targets)]  # which a run may call by the module's name
        return dataclasses.replace(
            record,
            others=tuple(one.hook for one in manifest.hooks() if one not in used and one.hook is not None),
            dtype=model.get("dtype"),
            digest=model.get("digest"),
            norm_median=used[0].norm_median,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the run's record of its language model does not fit this version: {error!r}; was config.json edited?"
        ) from error


def other_model(model: LanguageModel, record: LanguageRecord) -> str | None:
    """How this model differs from the one that the run's activations come from; None if not, or if unknown."""
    here = model.base.describe()
    if record.digest is None or here["dtype"] != record.dtype:  # the digest is of rounded weights
        return None
    if record.digest in model.digests():
        return None
    return (
        f"the model {model.name} has digest {here['digest']}, but the run's activations come from {record.model} with "
        f"digest {record.digest}"
    )


def version() -> str:
    """The version of the installed distribution, or "(not installed)" in a bare source tree."""
    try:
        return importlib.metadata.version("fastsae-engine")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
