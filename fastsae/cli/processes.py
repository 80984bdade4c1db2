"""The processes that torchrun started for one command."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from fastsae.parallel import mesh
from fastsae.runs.together import ProcessError

ANSWER = 5.0
"""Seconds in which the processes that lost one say so, and the lost one does not."""

LONGEST = 365 * 24 * 3600.0


def started_by_torchrun() -> bool:
    """Whether torchrun started this process, among others or alone."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def joined(device: str, latent_shards: int, wait: float = 1800.0, feeders: int = 0) -> Iterator[DeviceMesh | None]:
    """Joins the processes that torchrun started into a mesh; None for a single process.

    feeders: how many of the processes, the last ones, are not in the mesh.
    Raises ValueError if `latent_shards` does not divide the number of the others; ProcessError, which names it, if one
    of the processes ends too early or keeps the others waiting for more than `wait` seconds.
    """
    if not started_by_torchrun():
        if feeders:
            raise ValueError(
                f"--feeders {feeders} gives processes to the language model alone, and this is one process; start "
                f"several: torchrun --nproc-per-node {feeders + 1} -m fastsae train live ..."
            )
        if latent_shards != 1:
            raise ValueError(
                f"--latent-shards {latent_shards} shares the dictionary between processes, and this is one process; "
                f"start several: torchrun --nproc-per-node {latent_shards} -m fastsae train ..."
            )
        yield None
        return
    if not 0 < wait <= LONGEST:
        raise ValueError(f"--wait is {wait:g}, expected seconds above 0, at most a year of them")
    kind, timeout = torch.device(device).type, timedelta(seconds=wait)
    if kind == "cuda":
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    trained = size - feeders
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=timeout
    )
    try:
        if trained < 1:
            raise ValueError(f"--feeders {feeders} leaves none of {size} processes to train; give fewer")
        yield mesh(latents=latent_shards, device_type=kind, processes=trained, timeout=timeout)
    except RuntimeError as error:
        if isinstance(error, ProcessError) or not _lost(error):
            raise
        what = str(error).splitlines()[0].split(". This is")[0]
        raise ProcessError(
            f"{_silent(store, rank, trained)} of this run ended or does not answer ({what}). The checkpoints are "
            "intact; the same command with --resume continues the run"
        ) from error
    finally:
        dist.destroy_process_group()


def _silent(store: dist.Store, rank: int, size: int) -> str:
    """Who of the first `size` processes does not say, within some seconds, that it lost another one: that is the one
    they lost.
    """
    names = [f"fastsae/lost_another/{one}" for one in range(size)]
    try:
        store.set(f"fastsae/lost_another/{rank}", "")
        until = time.monotonic() + ANSWER
        while True:
            silent = [one for one, name in enumerate(names) if not store.check([name])]
            if len(silent) <= 1 or time.monotonic() > until:
                break
            time.sleep(0.1)
    except RuntimeError:  # the store went with the process that held it
        return "another process"
    return f"process {', '.join(map(str, silent))}" if silent else "another process"


def local_device(device: str) -> str:
    """The device of this process: of several GPUs each takes the one of its number on the machine."""
    if device == "cuda" and started_by_torchrun():
        return f"cuda:{dist.get_node_local_rank()}"
    return device


def _lost(error: RuntimeError) -> bool:
    """Whether an error says that a connection to another process broke, as gloo and NCCL report it."""
    said = str(error).lower()
    return isinstance(error, dist.DistError) or any(words in said for words in ("gloo", "pair closure", "timed out"))
