"""Trains in child processes that are killed: `python -m tests.kill_worker DIR CASES`, CASES in JSON: {name: case}.

The modules are imported once and forked for each child; one thread only, so that no OpenMP team is lost in a fork.
Each case first trains without a kill in DIR/name/whole. Then it trains in DIR/name/killed, child after child, until one
reaches the end. A case is {"settings": of the TrainConfig, "kills": list}. A kill is [where, n]: the child sends itself
SIGKILL when it passes a place in the code for the n-th time. Or it is ["after", share of a whole run's time]: the
parent sends SIGKILL. Writes DIR/outcome.json: {name: how each child ended}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from tqdm import tqdm

from fastsae.runs import checkpoint, logs, rundir
from fastsae.training.step import FusedTrainStep, PlainTrainStep
from tests.train_case import trainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(owner: Any, name: str, n: int, act: Callable[..., None], *, first: bool = True) -> None:
    """Replaces owner.name so that its n-th call runs act(*arguments) first, or last."""
    original, calls = getattr(owner, name), 0

    def replaced(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n and first:
            act(*args)
        result = original(*args, **kwargs)
        if calls == n and not first:
            act(*args)
        return result

    setattr(owner, name, replaced)


def half_a_line(log: logs.JsonlLog, record: dict[str, Any]) -> None:
    os.write(log._fd, json.dumps(record).encode()[:40])
    die()


def half_a_file(tensors: Any, path: Path) -> None:
    path.write_bytes(b"\x10\x00\x00")
    die()


def half_replaced(path: Path, write: Callable[[Path], object]) -> None:
    write(path.with_name(f".{path.name}.{os.getpid()}.partial"))
    die()


def half_deleted(path: Path) -> None:
    (path / "sae.safetensors").unlink(missing_ok=True)
    die()


def after_an_update(n: int) -> None:
    for kind in (FusedTrainStep, PlainTrainStep):
        on_call(kind, "__call__", n, lambda *_: die(), first=False)


PLACES: dict[str, Callable[[int], object]] = {
    "update": after_an_update,
    "line": lambda n: on_call(logs.JsonlLog, "append", n, half_a_line),
    "cut": lambda n: on_call(logs, "replace_file", n, half_replaced),
    "tensors": lambda n: on_call(checkpoint, "save_file", n, half_a_file),
    "manifest": lambda n: on_call(checkpoint, "write_json", n, lambda *_: die()),
    "sealed": lambda n: on_call(checkpoint, "_seal", n, lambda *_: die(), first=False),
    "renamed": lambda n: on_call(checkpoint, "prune", n, lambda *_: die()),
    "deleting": lambda n: on_call(checkpoint.shutil, "rmtree", n, half_deleted),
    "config": lambda n: on_call(rundir, "write_json", n, lambda *_: die()),
}  # fmt: skip


def child(run_dir: Path, settings: dict[str, Any], kill: tuple[str, float] | None) -> str:
    """Trains in a fork and returns how that ended: "done", "SIGKILL" or the exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if kill is not None and kill[0] != "after":
                PLACES[kill[0]](int(kill[1]))
            trainer(run_dir, **settings).run()
            status = 0
        finally:
            sys.stderr.flush()
            os._exit(status)
    if kill is not None and kill[0] == "after":
        time.sleep(kill[1])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return "done" if os.WEXITSTATUS(status) == 0 else f"exit {os.WEXITSTATUS(status)}"


def run_case(directory: Path, settings: dict[str, Any], kills: list[list[Any]]) -> list[str]:
    trainer(directory / "warm", **{**settings, "steps": 6}).run()  # loads what the first step needs, before the forks
    start = time.perf_counter()
    ends = [child(directory / "whole", settings, None)]
    whole = time.perf_counter() - start
    for where, n in kills:
        ends.append(child(directory / "killed", settings, (where, n * whole if where == "after" else n)))
    return [*ends, child(directory / "killed", settings, None)]


def main() -> None:
    directory, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    tqdm.set_lock(RLock())  # its own is shared with forks: a child that is killed would hold it for ever
    outcome = {name: run_case(directory / name, case["settings"], case["kills"]) for name, case in cases.items()}
    (directory / "outcome.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
