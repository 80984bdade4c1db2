"""The part "interruptions": runs and harvests of random settings that are killed, fill the disk or meet another
writer.

Whatever happened, the same call again must end with the bits of an undisturbed run: checkpoints and logs, or shards and
manifest. Every process here is a fork of the worker, which has imported all and uses one thread.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from threading import RLock
from typing import Any

from tqdm import tqdm

import fastsae
from bench.hostile.calls import Draw
from bench.hostile.run import ERRORS, Found, judge_raised
from fastsae.data import Manifest, harvest
from fastsae.runs.checkpoint import list_checkpoints, verify_checkpoint
from fastsae.runs.trainer import Trainer
from tests import data_case, kill_worker, train_case

KINDS = ("train", "harvest", "disk", "writers")
Act = Callable[[Path], object]
Compare = Callable[[Path, Path], list[str]]


def case(kind: str, seed: int, number: int, backend: str | None) -> tuple[str, Callable[[], Found]]:
    draw = Draw(f"interruptions/{kind}", seed, number)
    of_run = kind == "train" or (kind != "harvest" and draw.chance(0.5))
    said, act, compare = _run(draw) if of_run else _harvest(draw)
    _warm()

    def run() -> Found:
        with tempfile.TemporaryDirectory() as folder:
            return RUNS[kind](draw, Path(folder), act, compare, of_run)

    return f"{kind}: {said}", run


@cache
def _warm() -> None:
    """Loads what a first run and a first harvest load, before any fork."""
    tqdm.set_lock(RLock())  # its own is shared with forks: one that is killed would hold it for ever
    with tempfile.TemporaryDirectory() as folder:
        for number, make in enumerate((_run, _harvest)):
            make(Draw("warm", 0, number))[1](Path(folder) / str(number))


# -- what is interrupted -----------------------------------------------------------------------------------------------


def _run(draw: Draw) -> tuple[str, Act, Compare]:
    k = int(draw.rng.integers(1, 7))
    rule = draw.of((
        fastsae.TopK(k), fastsae.BatchTopK(k), fastsae.ReLU(0.1), fastsae.Gated(0.1), fastsae.JumpReLU(target_l0=4.0),
        fastsae.Matryoshka(fastsae.TopK(k), groups=(16, 80)),
    ))  # fmt: skip
    fused = draw.chance(0.8)
    settings: dict[str, Any] = {
        "steps": int(draw.rng.integers(8, 25)), "batch_size": draw.of((16, 48)),
        "checkpoint_every": draw.of((1, 2, 5, 9)),
        "log_every": draw.of((1, 1, 3)), "eval_every": draw.of((0, 4, 10)), "keep": draw.of((1, 2, 3)), "fused": fused,
        "optimizer": draw.of(("adam", "adamw", "lion", "signsgd") if fused else ("adam", "adamw")),
        "init_b_dec": draw.of(("mean", "zero")), "decay": draw.of(("linear", "constant", "cosine")), "warmup": 3,
    }  # fmt: skip
    if fused:
        few = settings["optimizer"] in ("lion", "signsgd")
        settings["moments"] = draw.of(("fp32", "bf16") if few else ("fp32", "bf16", "8bit"))
    kind = draw.of(("tensor", "tensor", "live"))
    more = draw.of(({"aux_k": 8}, {"aux_k": None}, {"aux_k": None, "tied": True}))

    def act(folder: Path) -> object:
        data = train_case.source(kind)
        sae = train_case.module(d_in=data.d_in, activation=rule, **more)
        return Trainer(sae, data, train_case.config(**settings), folder).run()

    return f"run of {rule} on a {kind} source, {more}, {settings}", act, _same_run


def _same_run(whole: Path, other: Path) -> list[str]:
    """How the other run's folder differs."""
    kept = [path.name for path in list_checkpoints(whole / "checkpoints")]
    theirs = [path.name for path in list_checkpoints(other / "checkpoints")]
    if kept != theirs:
        return [f"checkpoints {theirs}, expected {kept}"]
    found = []
    for name in kept:
        verify_checkpoint(other / "checkpoints" / name)
        mine, its = (train_case.saved_bytes(folder / "checkpoints" / name) for folder in (whole, other))
        found += [f"{name}/{file}" for file in mine if mine[file] != its[file]]
    if train_case.curve(whole) != train_case.curve(other):
        found.append("metrics.jsonl")
    if train_case.lines(whole / "eval.jsonl") != train_case.lines(other / "eval.jsonl"):
        found.append("eval.jsonl")
    return found + _names(whole, other) + _names(whole / "checkpoints", other / "checkpoints")


def _names(whole: Path, other: Path) -> list[str]:
    mine, its = ({path.name for path in folder.iterdir()} for folder in (whole, other))
    return [f"{name} is only in one folder" for name in sorted(mine ^ its)]


def _harvest(draw: Draw) -> tuple[str, Act, Compare]:
    settings = {"rows": draw.of((100, 300, 700)), "rows_per_shard": draw.of((40, 120, 500))}
    hook = draw.of((2, 2, (0, 2)))
    config = data_case.toy_config(hook=hook, holdout=draw.of((0, 60)))

    def act(folder: Path) -> object:
        return harvest(data_case.toy_model(), data_case.toy_corpus(), folder, config, **settings, progress=False)

    return f"harvest of {hook}, {settings}", act, _same_harvest


def _same_harvest(whole: Path, other: Path) -> list[str]:
    mine, its = Manifest.read(whole), Manifest.read(other)
    for entry in mine.entries():
        entry.check_content(other)
    return ([] if mine == its else ["manifest.json"]) + _names(whole, other)


# -- processes ---------------------------------------------------------------------------------------------------------


def _fork(act: Callable[[], object], words: Path) -> int:
    """Starts act() in a fork; how it ended is in the file `words`."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            try:
                act()
                found = Found("right")
            except (*ERRORS, KeyboardInterrupt) as error:
                found = judge_raised(error)
            words.write_text(json.dumps(found))
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def _ended(pid: int, words: Path) -> Found | None:
    """How a fork ended; None where it was killed."""
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return None
    return Found(*json.loads(words.read_text())) if status == 0 else Found("wrong", f"a process ended with {status}")


def _done(act: Callable[[], object], folder: Path) -> tuple[Found, float]:
    """act() in a fork to its end, and the time that took."""
    start, words = time.perf_counter(), folder / "words"
    found = _ended(_fork(act, words), words)
    return found or Found("wrong", "a process was killed from elsewhere"), time.perf_counter() - start


def _finish(folder: Path, act: Act, compare: Compare, kills: int, refused: bool = False) -> Found:
    """The last call, which must succeed, and the comparison."""
    found, _ = _done(partial(act, folder / "other"), folder)
    if found.verdict != "right":
        return Found("wrong", f"the last call ended: {found}", kills)
    differences = compare(folder / "whole", folder / "other")
    if differences:
        return Found("wrong", f"these differ from an undisturbed run: {', '.join(differences)}", kills)
    return Found("refused" if refused else "right", "", kills)


# -- what happens to them ----------------------------------------------------------------------------------------------


def _place(draw: Draw, of_run: bool) -> Callable[[], object]:
    """Makes a fork kill itself at a place in the code, if it comes there."""
    n = int(draw.rng.integers(1, 8))
    if of_run:
        return partial(kill_worker.PLACES[draw.of(kill_worker.PLACES)], n)
    after = draw.chance(0.5)
    return lambda: kill_worker.on_call(os, "replace", n, lambda *_: kill_worker.die(), first=not after)


def _kill(draw: Draw, folder: Path, act: Act, compare: Compare, of_run: bool) -> Found:
    whole, seconds = _done(partial(act, folder / "whole"), folder)
    if whole.verdict != "right":
        return Found("wrong", f"undisturbed: {whole}")
    kills = 0
    for _ in range(draw.of((1, 2, 3, 4))):
        at_place, share = draw.chance(0.4), float(draw.rng.random())
        arm = _place(draw, of_run) if at_place else (lambda: None)
        pid = _fork(lambda arm=arm: (arm(), act(folder / "other")), folder / "words")  # type: ignore[misc]
        if not at_place:
            time.sleep(share * seconds)
            os.kill(pid, signal.SIGKILL)
        found = _ended(pid, folder / "words")
        kills += found is None
        if found is not None and found.verdict != "right":
            return Found("wrong", f"it ended: {found}", kills)
    return _finish(folder, act, compare, kills)


def _disk(draw: Draw, folder: Path, act: Act, compare: Compare, of_run: bool) -> Found:
    whole, _ = _done(partial(act, folder / "whole"), folder)
    if whole.verdict != "right":
        return Found("wrong", f"undisturbed: {whole}")
    sizes = [path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file()]
    small, share = draw.chance(0.5), float(draw.rng.random())
    other = folder / "other"
    other.mkdir()
    options = f"size={max(4096, int(share * sum(sizes)))}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(other)]
    mounted = (
        small and shutil.which("mount") is not None and not subprocess.run(command, capture_output=True).returncode
    )
    try:
        found, _ = _done(
            partial(act, other) if mounted else partial(_limited, act, other, int(share * max(sizes))), folder
        )
        if found.verdict == "wrong":
            return Found("wrong", f"with a full disk it ended: {found.what}")
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=64m", str(other)], check=True)
        return _finish(folder, act, compare, 0, refused=found.verdict == "refused")
    finally:
        if mounted:
            subprocess.run(["umount", str(other)], check=True)


def _limited(act: Act, folder: Path, size: int) -> object:
    """act where the system refuses to write files past a size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        return act(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def _writers(draw: Draw, folder: Path, act: Act, compare: Compare, of_run: bool) -> Found:
    whole, seconds = _done(partial(act, folder / "whole"), folder)
    if whole.verdict != "right":
        return Found("wrong", f"undisturbed: {whole}")
    pids = []
    for number in range(draw.of((2, 2, 3))):
        if number:
            time.sleep(float(draw.rng.random()) * seconds / 2)
        pids.append(_fork(partial(act, folder / "other"), folder / f"words{number}"))
    kills = 0
    if draw.chance(0.3):
        os.kill(pids[0], signal.SIGKILL)
    ends = [_ended(pid, folder / f"words{number}") for number, pid in enumerate(pids)]
    kills = sum(end is None for end in ends)
    bad = [end for end in ends if end is not None and end.verdict == "wrong"]
    if bad:
        return Found("wrong", f"one of several writers ended: {bad[0].what}", kills)
    if not kills and all(end is not None and end.verdict == "refused" for end in ends):
        return Found("wrong", "every writer was refused", kills)
    return _finish(
        folder, act, compare, kills, refused=any(end is not None and end.verdict == "refused" for end in ends)
    )


RUNS: dict[str, Callable[[Draw, Path, Act, Compare, bool], Found]] = {
    "train": _kill, "harvest": _kill, "disk": _disk, "writers": _writers,
}  # fmt: skip
