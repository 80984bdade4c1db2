"""The part "files": saved modules, runs, rows, harvests and state dicts, with random harm done to their files.

Files are cut, emptied, deleted and lengthened, bits are flipped, versions changed, files of another run put in their
place. What is loaded then must be what was stored, bit for bit; or one error of fastsae says why not.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsae
from bench.hostile.calls import Draw
from bench.hostile.modules import attempt, floating
from bench.hostile.ops import bits_of
from bench.hostile.run import ERRORS, Found, judge_raised
from bench.hostile.truth import Wrong, require
from fastsae.data import Manifest, ShardSource, harvest, save_rows
from fastsae.data.tensor import TensorSource
from fastsae.runs.opening import open_run
from fastsae.runs.trainer import Trainer
from fastsae.training.step import FusedTrainStep, PlainTrainStep
from tests import data_case, train_case

KINDS = ("saved", "run", "rows", "harvest", "states")
STEPS = 12


def case(kind: str, seed: int, number: int, backend: str | None) -> tuple[str, Callable[[], Found]]:
    draw = Draw(f"files/{kind}", seed, number)
    said: list[str] = []

    def run() -> Found:
        with tempfile.TemporaryDirectory() as folder:
            try:
                return RUNS[kind](draw, Path(folder) / "it", said)
            except Wrong as wrong:
                return Found("wrong", f"{'; '.join(said)}: {wrong}")
            except ERRORS as error:
                found = judge_raised(error)
                return found._replace(what=f"{'; '.join(said)}: {found.what}") if found.what else found

    return kind, run


# -- harm --------------------------------------------------------------------------------------------------------------


def _flip(draw: Draw, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw.of((1, 1, 2, 8)) if data else 0):
        data[int(draw.rng.integers(len(data)))] ^= 1 << int(draw.rng.integers(8))
    path.write_bytes(data)


def _version(draw: Draw, path: Path) -> None:
    """Another number where a JSON file says its version."""
    try:
        content = json.loads(path.read_bytes())
        content["version"] = draw.of((0, 3, 99, "1", None))
    except (ValueError, TypeError):
        return _flip(draw, path)
    path.write_text(json.dumps(content))


HARMS: dict[str, Callable[[Draw, Path], object]] = {
    "cut": lambda draw, path: os.truncate(path, int(draw.rng.integers(path.stat().st_size + 1))),
    "emptied": lambda draw, path: path.write_bytes(b""),
    "deleted": lambda draw, path: path.unlink(),
    "lengthened": lambda draw, path: path.write_bytes(path.read_bytes() + b"\0" * int(draw.rng.integers(1, 99))),
    "with flipped bits": _flip,
    "of zeros": lambda draw, path: path.write_bytes(b"\0" * path.stat().st_size),
    "of another version": _version,
}


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "LOCK")


def _harm(draw: Draw, folder: Path, other: Path, said: list[str]) -> bool:
    """Harms one file or two, or puts that of another folder there. Returns whether anything changed."""
    before = {path: path.read_bytes() for path in _files(folder)}
    for _ in range(draw.of((0, 1, 1, 1, 1, 1, 1, 2, 2))):
        path = draw.of(_files(folder) or [folder])
        if path == folder:
            break
        name, theirs = path.relative_to(folder), other / path.relative_to(folder)
        how = draw.of(("of another", *HARMS, "with flipped bits", "with flipped bits"))
        said.append(f"{name} {how}")
        if how != "of another":
            HARMS[how](draw, path)
        elif theirs.is_file():
            shutil.copyfile(theirs, path)
    return {path: path.read_bytes() for path in _files(folder)} != before


# -- what is stored ----------------------------------------------------------------------------------------------------


@cache
def _stored() -> Path:
    """A folder with one of each, undisturbed, and another one of each."""
    root = Path(tempfile.mkdtemp(prefix="hostile-files-"))
    for name, seed in (("it", 1), ("other", 2)):
        sae = train_case.module(seed=seed, activation=fastsae.BatchTopK(6))
        fastsae.save(sae, root / "saved" / name)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(900, 8, generator=generator)
        save_rows(root / "rows" / name, rows, holdout=100, rows_per_shard=300)
        _harvested(root / "harvest" / name, 120, seed)
        _trainer(root / "run" / name, seed, stop=10)
    for most in (120, 300):
        _harvested(root / "whole-harvest", most)
    _trainer(root / "whole-run", 1)
    return root


def _harvested(folder: Path, rows: int, seed: int = 1) -> Manifest:
    corpus = data_case.toy_corpus(seed=seed)
    return harvest(
        data_case.toy_model(), corpus, folder, data_case.toy_config(), rows=rows, rows_per_shard=60, progress=False
    )


class _Stop(Exception):
    pass


def _trainer(folder: Path, seed: int = 1, stop: int | None = None) -> None:
    """Trains to the end, or until a batch that is not given any more. Checkpoints are after steps 3, 6, 9 and 12."""

    def before(n: int, batch: Tensor) -> None:
        if n == stop:
            raise _Stop

    data: Any = train_case.hooked(train_case.source(), before)
    settings = train_case.config(steps=STEPS, checkpoint_every=3, eval_every=6, keep=9)
    with contextlib.suppress(_Stop):
        Trainer(train_case.module(seed=seed), data, settings, folder).run()


def _copied(kind: str, folder: Path) -> tuple[Path, Path]:
    """A copy of what is stored, at `folder`; and the other one."""
    root = _stored() / kind
    shutil.copytree(root / "it", folder)
    return folder, root / "other"


# -- cases -------------------------------------------------------------------------------------------------------------


def _bits(module: torch.nn.Module) -> dict[str, list[bytes]]:
    return {name: bits_of(t) for name, t in floating(module.state_dict())}


def _saved(draw: Draw, folder: Path, said: list[str]) -> Found:
    _harm(draw, *_copied("saved", folder), said)
    got = _bits(fastsae.load(folder))
    root = _stored() / "saved"
    same = [got == _bits(fastsae.load(root / name)) for name in ("it", "other")]
    files = {path.name: path.read_bytes() for path in _files(folder)}
    whole = all((root / "other" / name).read_bytes() == data for name, data in files.items())
    require(same[0] or (same[1] and whole), "another module than the saved one was loaded")
    return Found("right")


def _run(draw: Draw, folder: Path, said: list[str]) -> Found:
    _harm(draw, *_copied("run", folder), said)
    whole = _stored() / "run" / "it" / "checkpoints"
    if draw.chance(0.3):
        path = draw.of([folder, *(p for p in (folder / "checkpoints").iterdir() if p.is_dir())])
        got = _bits(open_run(path).sae)
        stored = [_bits(fastsae.load(step)) for step in sorted(whole.iterdir())]
        require(got in stored, f"{path.relative_to(folder)} opens as a module that it never held")
        if path != folder:
            require(got == _bits(fastsae.load(whole / path.name)), f"{path.name} opens as another step's module")
        return Found("right")
    _trainer(folder)
    name = f"step_{STEPS:08d}"
    mine, its = (train_case.saved_bytes(run / "checkpoints" / name) for run in (_stored() / "whole-run", folder))
    require(mine == its, "the run went on to another end")
    return Found("right")


def _read(folder: Path) -> dict[str, list[bytes]]:
    source = ShardSource(folder, dtype=None)
    every = torch.arange(source.n_tokens or 0)
    found = {"rows": source.rows(every), "held out": source.held_out(), "batch": source.next_batch(64)}
    if source.manifest.settings:
        found["tokens"] = source.token_ids(every)
    return {name: bits_of(t) for name, t in found.items()}


def _rows(draw: Draw, folder: Path, said: list[str]) -> Found:
    kind = draw.of(("rows", "harvest"))
    _harm(draw, *_copied(kind, folder), said)
    require(_read(folder) == _read(_stored() / kind / "it"), "other rows than the stored ones were read")
    return Found("right")


def _goes_on(draw: Draw, folder: Path, said: list[str]) -> Found:
    _harm(draw, *_copied("harvest", folder), said)
    _harvested(folder, 300)
    require(_read(folder) == _read(_stored() / "whole-harvest"), "the harvest went on to other rows")
    mine, its = Manifest.read(folder), Manifest.read(_stored() / "whole-harvest")
    require(mine == its, "the harvest ended with another manifest")
    return Found("right")


# -- state dicts -------------------------------------------------------------------------------------------------------


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in nested dicts and lists, with each of its keys."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from _places(item)


def _spoiled(draw: Draw, state: Any, said: list[str]) -> None:
    """One place of a state: gone, of another type, shape or dtype, or with one more beside it."""
    holder, key = draw.of(_places(state))
    value = holder[key]
    if draw.chance(0.2):
        said.append(f"{key!r} is gone")
        del holder[key]
    elif draw.chance(0.1) and isinstance(holder, dict):
        said.append(f"a surprise beside {key!r}")
        holder["surprise"] = 1
    elif isinstance(value, Tensor) and draw.chance(0.7):
        changed = draw.of(
            (value[:-1] if value.ndim else value[None], value[None], value.flatten()[:0], value.to("meta"))
        )
        said.append(f"{key!r} has shape {tuple(changed.shape)} on {changed.device}")
        holder[key] = changed
    else:
        holder[key] = draw.of((None, "x", -1, [], {}, 1.5, torch.zeros(3)))
        said.append(f"{key!r} is {holder[key]!r}")


def _owners(seed: int, which: str) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """What gives a state and what takes it, of an object after two steps."""
    sae = train_case.module(seed=seed, activation=fastsae.BatchTopK(6))
    x = train_case.rows(60)
    if which == "source":
        source = TensorSource(train_case.rows(), holdout=100, seed=3)
        source.next_batch(50 * seed)
        return source.state_dict, source.load_state_dict
    if which == "batch":
        batch = fastsae.SAEBatch(2, train_case.D_IN, 16, fastsae.TopK(2), seeds=(seed, seed + 5))
        fastsae.BatchTrainStep(batch, lr=0.01)(x)
        return batch.state_dict, batch.load_state_dict
    if which == "optimizer":
        optimizer = fastsae.optim.Adam(sae, lr=0.01 * seed)
        for _ in range(2):
            sae(x).loss.backward()
            optimizer.step()
        return optimizer.state_dict, optimizer.load_state_dict
    step: Any = FusedTrainStep(sae, lr=0.01 * seed) if which != "plain" else PlainTrainStep(sae, lr=0.01 * seed)
    step(x)
    step(x)
    return (sae.state_dict, sae.load_state_dict) if which == "module" else (step.state_dict, step.load_state_dict)


def _states(draw: Draw, folder: Path, said: list[str]) -> Found:
    which = draw.of(("module", "module", "fused", "plain", "optimizer", "source", "batch"))
    said.append(which)
    give = _owners(1, which)[0]
    state = copy.deepcopy(give())
    if draw.chance(0.9):
        _spoiled(draw, state, said)
    mine, take = _owners(2, which)
    found = attempt(lambda: {"state": mine()}, "as it is", len(said) == 1, lambda: take(copy.deepcopy(state)))
    if isinstance(found, Found):
        return found
    given = {name: bits_of(t) for name, t in floating(state)}
    now = {name: bits_of(t) for name, t in floating(mine())}
    different = [name for name in given.keys() & now.keys() if given[name] != now[name]]
    require(not different, f"loaded {different[:3]} as something else")
    fresh = which == "optimizer" and not state["state"]  # a start without moments
    # An older state has no threshold_weight: it gets one, with a warning. A count may be a number or a tensor.
    missing = set() if fresh else (given.keys() ^ now.keys()) - {".threshold_weight"}
    missing = {name for name in missing if not name.endswith(".step")}
    require(not missing, f"loaded, though {sorted(missing)[:3]} are only in one of both")
    return Found("right")


RUNS: dict[str, Callable[[Draw, Path, list[str]], Found]] = {
    "saved": _saved, "run": _run, "rows": _rows, "harvest": _goes_on, "states": _states,
}  # fmt: skip
