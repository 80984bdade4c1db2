"""Checkpoints that each library trained and wrote itself, here: loaded by fastsae, and accelerated in the library."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from tests.accelerate_case import K, M, default_dtype, inputs, library, make, transcoder
from tests.test_accelerate_thresholds import TRAINERS, trainer_of
from tests.test_accelerate_trainers import DICTIONARIES, LENS, dictionary_trainer, lens_trainer, stream, tiny_run

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fastsae.backends.errors.BackendWarning", "ignore::UserWarning"),
]
STEPS = 60
X = inputs(1234, n=200)


def close(mine: Any, truth: Any) -> None:
    torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11)


def loads(path: Path, acts: Tensor, recon: Tensor, **how: Any) -> None:
    """fastsae.load gives these acts and reconstructions of X."""
    sae = fastsae.load(path, **how)
    assert sae.W_dec.dtype == torch.float64
    assert bool((acts != 0).any())
    codes = sae.encode(X)
    close(codes.to_dense(), acts.detach())
    close(sae.decode(codes, like=X), recon.detach())


def accelerates(theirs: Any) -> None:
    """An accelerated copy gives the same, and so does its gradient."""
    mine, found = fastsae.accelerate(copy.deepcopy(theirs)), []
    for module in (theirs, mine):
        x = X.clone().requires_grad_()
        out = module(x)
        out = out[2] if isinstance(out, tuple) else out
        out.square().sum().backward()
        found.append((out.detach(), x.grad))
    for a, b in zip(*found, strict=True):
        close(b, a)


@pytest.mark.parametrize("name", LENS)
def test_saelens(name: str, tmp_path: Path) -> None:
    lens = library("sae_lens")
    trainer = lens_trainer(name, STEPS)
    trainer.fit()
    trainer.sae.save_model(tmp_path / "training")
    trainer.sae.save_inference_model(tmp_path / "inference")
    theirs = lens.SAE.load_from_disk(tmp_path / "inference")
    acts, recon = theirs.encode(X), theirs(X)
    loads(tmp_path / "inference", acts, recon)
    loads(tmp_path / "training", acts, recon)
    accelerates(theirs)


@pytest.mark.parametrize("name", [*DICTIONARIES, *TRAINERS])
def test_dictionary_learning(name: str, tmp_path: Path) -> None:
    trainer = dictionary_trainer(name) if name in DICTIONARIES else trainer_of(name)
    with default_dtype(torch.float64):
        for i, x in zip(range(STEPS), stream(), strict=False):
            trainer.update(i, x)
    torch.save(trainer.ae.state_dict(), tmp_path / "ae.pt")  # as trainSAE writes both
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer.config, "buffer": None}))
    theirs = trainer.ae
    acts, recon = theirs.encode(X), theirs(X)
    if name.startswith(("april", "p-anneal")):  # its loader scales acts by the decoder's norms, which are not 1
        acts = acts * theirs.decoder.weight.norm(dim=0)
    loads(tmp_path, acts, recon)
    accelerates(theirs)


@pytest.mark.parametrize("coder", [{}, {"transcode": True, "skip_connection": True}], ids=str)
def test_sparsify(coder: dict[str, Any], tmp_path: Path) -> None:
    with tiny_run(tmp_path, "adam", torch.float64, **coder) as trainer:
        trainer.fit()
        for key, theirs in trainer.saes.items():
            top = theirs.encode(X)
            acts = torch.zeros(len(X), M, dtype=torch.float64).scatter(-1, top.top_indices, top.top_acts)
            recon = theirs.decode(top.top_acts, top.top_indices)
            loads(tmp_path / "unnamed" / key, acts, recon + X @ theirs.W_skip.mT if coder else recon)
            with torch.no_grad():
                close(fastsae.accelerate(copy.deepcopy(theirs))(X).sae_out, theirs(X).sae_out)


@pytest.mark.parametrize(("rule", "named"), [("relu", fastsae.ReLU(l1=0.0)), ("topk", fastsae.TopK(K))])
def test_circuit_tracer(rule: str, named: Any, tmp_path: Path) -> None:
    """It has no trainer: steps of torch's Adam."""
    library("circuit_tracer")
    theirs = transcoder({"rule": rule, "skip_connection": True}, torch.float64)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=5e-3)
    for i in range(STEPS):
        (theirs(inputs(i)) - inputs(i).roll(1, 1)).square().sum(-1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.to_safetensors(str(tmp_path / "layer_0.safetensors"))
    loads(tmp_path / "layer_0.safetensors", theirs.encode(X), theirs(X), activation=named)
    accelerates(theirs)


@pytest.mark.parametrize(
    ("name", "named"),
    [("overcomplete-topk", fastsae.TopK(K)), ("overcomplete-relu", fastsae.ReLU(l1=0.0)), ("overcomplete-jump", None)],
)
def test_overcomplete(name: str, named: Any, tmp_path: Path) -> None:
    sae = library("overcomplete")
    theirs = make(name, 0)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=2e-3)
    with contextlib.redirect_stdout(io.StringIO()):
        sae.train_sae(theirs, [inputs(i) for i in range(STEPS)], sae.mse_l1, optimizer, nb_epochs=1)
    torch.save(theirs.eval().state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        _, acts, recon = theirs(X)
    loads(tmp_path / "weights.pt", acts, recon, activation=named)
    mine = make(name, 0)  # no copy: its dictionary keeps a tensor of the graph
    mine.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        close(fastsae.accelerate(mine).eval()(X)[2], recon)
