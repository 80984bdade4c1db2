"""One SAE on several processes: by latents, by tokens of the batch, or both, with one process's numbers.

    mesh = fastsae.parallel.mesh(data=2, latents=2)     # after torch.distributed.init_process_group
    sae = fastsae.parallel.parallelize(sae, mesh)       # the same SAE in every process; each keeps its rows
    optimizer = fastsae.optim.Adam(sae)                 # the loop stays as it is
    whole = fastsae.parallel.gathered(sae)              # an ordinary SAE again

Every process calls the same methods in the same order. docs/distributed.md says what is exchanged, and how exact it is.
"""

from fastsae.parallel.checkpoint import Sharded
from fastsae.parallel.shards import gathered, gathered_state, mesh, own_state, parallelize

__all__ = ["Sharded", "gathered", "gathered_state", "mesh", "own_state", "parallelize"]
