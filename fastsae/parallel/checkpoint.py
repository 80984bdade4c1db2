"""An SAE and its optimizer as torch.distributed.checkpoint (DCP) saves them: each process its rows, on any mesh."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from fastsae.model.parameters import EXTRA_STATE
from fastsae.model.sae import SparseAutoencoder, as_sae
from fastsae.model.settings import compared, config_of, flat
from fastsae.parallel.shards import by_latent
from fastsae.training.optimizers import FusedOptimizer
from fastsae.training.step import FusedTrainStep, load_named_state, named_state

NUMBERS_BYTES = 16_384
"""The numbers of a state, as JSON, are padded to this: DCP loads in place, which needs a tensor of the saved size."""


class Sharded:
    """What DCP saves of an SAE and of the fastsae optimizer or FusedTrainStep that trains it.

        state = {"train": Sharded(sae, optimizer)}
        torch.distributed.checkpoint.save(state, checkpoint_id="runs/a/step_100")
        torch.distributed.checkpoint.load(state, checkpoint_id="runs/a/step_100")   # on any mesh, or in one process

    No process holds more than its own rows. All processes make the same calls. What is loaded goes on as on the mesh
    that saved it; a FusedTrainStep's schedules are functions and are not saved. Loading into an SAE with other settings
    or sizes raises DCP's error, whose missing key names the settings that were expected, and changes nothing. An SAE
    that left pre_bias open, and was then trained with targets, loads into one with pre_bias=False. `Sharded(sae)` alone
    takes the weights of a checkpoint that also has an optimizer.
    Raises ValueError for latents that are not cut as DTensor cuts; TypeError for another optimizer: torch's have no
    state before their first step, so that there would be nothing to load into.
    DCP's files hold pickled metadata: load only what you trust. Checkpoints of `fastsae train` hold none.
    """

    def __init__(self, sae: SparseAutoencoder, trained_by: FusedTrainStep | FusedOptimizer | None = None):
        if not isinstance(trained_by, FusedTrainStep | FusedOptimizer | None):
            raise TypeError(
                f"got a {type(trained_by).__name__}, expected a FusedTrainStep or an optimizer of fastsae.optim; give "
                "torch.distributed.checkpoint a torch optimizer by torch.distributed.checkpoint.state_dict"
            )
        self.sae, self.trained_by = as_sae(sae, "sae"), trained_by
        p = self.sae.placement
        each = 0 if p is None else -(-p.d_sae // p.latents.size)
        if p is not None and (p.first, p.own) != (p.latents.rank * each, min(each, p.d_sae - p.first)):
            raise ValueError(
                f"{p.d_sae} latents in groups on {p.latents.size} processes are not cut as a DTensor is; save "
                "gathered(sae), or take a number of processes that divides that of groups"
            )

    def state_dict(self) -> dict[str, Any]:
        """The live tensors by name, those with a row for each latent as DTensors of the whole dictionary."""
        sae, found = self.sae, self._of_trainer()
        tensors: dict[str, Any] = {f"sae.{name}": self._whole(name, t) for name, t in _tensors(sae).items()}
        for name, kept in found.pop("state").items():
            for key, t in kept.items():
                tensors[f"optimizer.{name}.{key}"] = t if key == "step" else self._whole(name, t)
        text = json.dumps({"sae": sae.config, **found}).encode()
        if len(text) > NUMBERS_BYTES:
            raise ValueError(f"the numbers of this state take {len(text)} bytes, expected at most {NUMBERS_BYTES}")
        tensors["numbers"] = torch.tensor(list(text.ljust(NUMBERS_BYTES)), dtype=torch.uint8, device="cpu")
        return tensors | dict.fromkeys(self._made_for(), torch.zeros((), dtype=torch.uint8, device="cpu"))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what DCP has loaded into the tensors of `state_dict`; DCP calls it."""
        numbers = json.loads(bytes(state["numbers"].tolist()))
        sae, own = self.sae, {name: getattr(t, "to_local", lambda t=t: t)() for name, t in state.items()}
        settings = config_of(sae.get_extra_state()) | {"pre_bias": numbers.pop("sae")["pre_bias"]}
        extra = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8, device="cpu")
        state = {name: own[f"sae.{name}"] for name in sae.state_dict() if name != EXTRA_STATE}
        sae.load_state_dict({**state, EXTRA_STATE: extra})
        if self.trained_by is None:
            return
        moments: dict[str, dict[str, Tensor]] = {}
        for name, t in own.items():
            if name.startswith("optimizer."):
                parameter, key = name.removeprefix("optimizer.").rsplit(".", 1)
                moments.setdefault(parameter, {})[key] = t
        inner = {"state": moments, "param_groups": numbers.pop("param_groups")}
        if isinstance(self.trained_by, FusedTrainStep):
            self.trained_by.load_state_dict({**self.trained_by.state_dict(), **numbers, "optimizer": inner})
        else:
            load_named_state(sae, self.trained_by, inner)

    def _of_trainer(self) -> dict[str, Any]:
        """{"state": moments by parameter, and what else is numbers}."""
        if self.trained_by is None:
            return {"state": {}}
        if not isinstance(self.trained_by, FusedTrainStep):
            return named_state(self.sae, self.trained_by)
        state = self.trained_by.state_dict()
        return {**state.pop("optimizer"), **{name: value for name, value in state.items() if name != "settings"}}

    def _whole(self, name: str, t: Tensor) -> Tensor:
        """The rows of all processes as a DTensor, if `name` has a row for each latent; it shares t's memory."""
        placement = self.sae.placement
        if placement is None or name not in by_latent(self.sae):
            return t
        from torch.distributed.tensor import DTensor, Replicate, Shard  # half a second, which few need

        names = placement.mesh.mesh_dim_names or ()
        cut = [Shard(0) if axis == "latents" else Replicate() for axis in names]
        shape = torch.Size([placement.d_sae, *t.shape[1:]])
        return DTensor.from_local(t.detach(), placement.mesh, cut, run_check=False, shape=shape, stride=t.stride())

    def _made_for(self) -> list[str]:
        """Keys that name what has to be the same where the state is loaded; DCP misses them before it loads."""
        config = {**self.sae.config, "d_sae": self.sae.n_latents, "dtype": str(self.sae.W_dec.dtype)}
        facts = {name: value for name, value in flat(config).items() if compared(name)} | {
            "pre_bias": self.sae.pre_bias
        }
        keys = ["an SAE with " + json.dumps(facts)]
        if self.trained_by is not None:
            optimizer = self.trained_by.optimizer if isinstance(self.trained_by, FusedTrainStep) else self.trained_by
            kind = {"moments": optimizer.moments, "groups": len(optimizer.param_groups)}
            keys.append(f"trained by {type(optimizer).__name__} with {json.dumps(kind)}")
        return keys


def _tensors(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """The state without settings, and the counters of `density`."""
    state = {name: t for name, t in sae.state_dict().items() if name != EXTRA_STATE}
    return {**state, "fired": sae.fired, "fired_over": sae.fired_over}
