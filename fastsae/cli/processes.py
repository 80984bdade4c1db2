"""The processes that torchrun started for one command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fastsae.parallel import mesh
from fastsae.runs.together import ProcessError


def started_by_torchrun() -> bool:
    """Whether torchrun started this process, among others or alone."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextmanager
def joined(device: str, latent_shards: int) -> Iterator[DeviceMesh | None]:
    """Joins the processes that torchrun started into a mesh; None for a single process.

    Raises ValueError if `latent_shards` does not divide their number; ProcessError if one of them ends too early.
    """
    if not started_by_torchrun():
        if latent_shards != 1:
            raise ValueError(
                f"--latent-shards {latent_shards} shares the dictionary between processes, and this is one process; "
                f"start several: torchrun --nproc-per-node {latent_shards} -m fastsae train ..."
            )
        yield None
        return
    kind = torch.device(device).type
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield mesh(latents=latent_shards, device_type=kind)
    except RuntimeError as error:
        if not _lost(error):
            raise
        what = str(error).splitlines()[0].split(". This is")[0]
        raise ProcessError(
            f"another process of this run ended or does not answer ({what}). The checkpoints are whole, and the same "
            "command with --resume goes on; torchrun's report names the process that failed first"
        ) from error
    finally:
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """The device of this process: of several GPUs each takes the one of its number on the machine."""
    if device == "cuda" and started_by_torchrun():
        return f"cuda:{dist.get_node_local_rank()}"
    return device


def _lost(error: RuntimeError) -> bool:
    """Whether an error says that a connection to another process broke, as gloo and NCCL report it."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()
