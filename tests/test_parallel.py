"""fastsae.parallel: processes that share a batch, a dictionary or both train the SAE that one process trains."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import fastsae
from fastsae.model.axis import Axis, bounds
from tests import parallel_worker as worker

ROOT = Path(__file__).parent.parent
MESHES = [(world, f"{data}x{latents}") for world, shapes in worker.MESHES.items() for data, latents in shapes]


def of_meshes(fits: Callable[[str], bool] = lambda shape: True) -> Any:
    """Parametrizes a test by the meshes whose shape fits; more than two processes are long."""
    chosen = [one for one in MESHES if fits(one[1])]
    return pytest.mark.parametrize(
        ("world", "shape"), [pytest.param(*one, marks=[pytest.mark.long] if one[0] > 2 else []) for one in chosen]
    )


each_mesh = of_meshes()
CLOSE = 1e-9
"""Of float64: sums of one process and of several differ in their rounding."""


def launch(
    world: int, *arguments: str, module: str = "tests.parallel_worker", expected: int = 0, limit: int = 600
) -> list[str]:
    """Runs `world` processes to their end, and returns what each wrote to stderr."""
    command = [sys.executable, "-m", module]
    running = [
        subprocess.Popen([*command, str(rank), str(world), *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    errors = [process.communicate(timeout=limit)[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == expected, error
    return errors


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the processes of a world found, by rank; each world runs once."""

    folders: dict[int, Path] = {}

    @cache
    def of(world: int) -> list[dict[str, Any]]:
        out = folders[world] = tmp_path_factory.mktemp(f"world{world}")
        for rule, kind in worker.SAVED:
            worker.stopped(None, str(out / f"alone-{rule}-{kind}"), rule, kind)
        launch(world, str(out / "store"), str(out))
        return [torch.load(out / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]

    of.folder = folders.__getitem__
    return of


@cache
def alone(name: str) -> dict[str, Any]:
    """The same in one process."""
    return worker.train(*worker.cases()[name]) if name in worker.cases() else worker.EDGES[name](None)


def assert_close(ranks: list[dict[str, Any]], name: str, expected: dict[str, Any], **tolerance: float) -> None:
    for rank in ranks:
        found = rank[name]
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if not value.is_floating_point():
                assert torch.equal(found[key], value), f"{name}: {key}"
                continue
            torch.testing.assert_close(found[key], value, **tolerance, msg=lambda m, k=key: f"{name}: {k}: {m}")


@each_mesh
def test_every_rule_setting_and_optimizer(world: int, shape: str, results: Any) -> None:
    """Weights, counters, thresholds, losses and the gradients' norm."""
    for name in worker.cases():
        assert_close(results(world), f"{shape}, {name}", alone(name), rtol=CLOSE, atol=1e-11)


@each_mesh
def test_ties_microbatches_targets_states_and_bad_numbers(world: int, shape: str, results: Any) -> None:
    for name in worker.EDGES:
        close = {"rtol": CLOSE, "atol": 1e-11} if name != "fp32 moments" else {"rtol": 1e-4, "atol": 1e-6}
        assert_close(results(world), f"{shape}, {name}", alone(name), **close)


@each_mesh
def test_checkpoints_of_torch_go_on_with_any_number_of_processes(
    world: int, shape: str, results: Any, tmp_path: Path
) -> None:
    """From one process on a mesh, from a mesh on itself, and from a mesh in one process."""
    ranks, made = results(world), results.folder(world)
    for rule, kind in worker.SAVED:
        case, rounds = f"{rule} {kind}", kind == "fp32"
        worker.stopped(None, str(tmp_path / case), rule, kind)
        expected = worker.gone_on(None, str(tmp_path / case), rule, kind)
        close = {"rtol": 1e-4, "atol": 1e-6} if rounds else {"rtol": 3e-2, "atol": 3e-3}
        for saved in ("alone", shape):
            assert_close(ranks, f"{shape}, {case} from {saved}", expected, **close)
        back = worker.gone_on(None, str(made / f"{shape}-{rule}-{kind}"), rule, kind)
        assert_close([{"back": back}], "back", expected, **close)


def test_a_checkpoint_of_torch_names_the_settings_that_it_was_made_for(tmp_path: Path) -> None:
    """And leaves an SAE of others as it was."""
    worker.stopped(None, str(tmp_path), "topk", "fp32")
    for rule, kind, pre_bias in (("abs_topk", "fp32", None), ("topk", "fp32", False), ("topk", "bf16", None)):
        sae, _, state = worker.saver(None, rule, kind, seed=2, pre_bias=pre_bias)
        before = {name: t.clone() for name, t in sae.state_dict().items()}
        missing = "trained by Adam.*bf16" if kind == "bf16" else "an SAE with"
        with pytest.raises(CheckpointException, match=f"Missing key in checkpoint state_dict: train.{missing}"):
            dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
        assert all(torch.equal(t, before[name]) for name, t in sae.state_dict().items())


def test_a_checkpoint_of_torch_with_a_bare_optimizer_or_for_the_weights_alone(tmp_path: Path) -> None:
    def made(lr: float) -> Any:
        sae = worker.sae_of("topk", "plain", torch.float32)
        optimizer = fastsae.optim.AdamW(sae, lr=lr)
        return sae, optimizer, {"train": fastsae.parallel.Sharded(sae, optimizer)}

    sae, optimizer, state = made(1e-2)
    worker.one_step(sae, optimizer, 0)
    dcp.save(state, checkpoint_id=str(tmp_path), no_dist=True)
    again, its, state = made(2e-2)
    dcp.load(state, checkpoint_id=str(tmp_path), no_dist=True)
    alone, _, _ = made(1e-2)
    dcp.load({"train": fastsae.parallel.Sharded(alone)}, checkpoint_id=str(tmp_path), no_dist=True)
    assert_close([{"found": worker.state_of(alone)}], "found", worker.state_of(sae), rtol=0, atol=0)
    for one, its_optimizer in ((sae, optimizer), (again, its)):
        worker.one_step(one, its_optimizer, 1)
    assert_close([{"found": worker.state_of(again)}], "found", worker.state_of(sae), rtol=0, atol=0)
    with pytest.raises(TypeError, match="expected a FusedTrainStep"):
        fastsae.parallel.Sharded(sae, torch.optim.Adam(sae.parameters()))  # type: ignore[arg-type]


def test_an_open_pre_bias_stays_open_in_a_checkpoint_of_torch(tmp_path: Path) -> None:
    for i in range(2):
        sae = fastsae.SparseAutoencoder(12, 40, fastsae.TopK(5), seed=i)
        state = {"train": fastsae.parallel.Sharded(sae)}
        (dcp.load if i else dcp.save)(state, checkpoint_id=str(tmp_path), no_dist=True)
    assert sae.config["pre_bias"] is None


@of_meshes(lambda shape: shape.endswith("x1"))  # shards add their reconstructions in another order
def test_a_shared_batch_gives_one_processs_bits(world: int, shape: str, results: Any) -> None:
    """In float32, whatever stores the moments: the update adds the tokens in the same order."""
    exact = {"fp32": worker.train("topk", "plain", "adam", None, torch.float32)}
    exact |= {f"{kind} moments": worker.moments(None, kind) for kind in ("bf16", "8bit")}
    for name, expected in exact.items():
        assert_close(results(world), f"{shape}, {name}", expected, rtol=0, atol=0)


@of_meshes(lambda shape: shape.startswith("1x"))  # a shared batch needs an optimizer that adds gradients
def test_shards_of_a_dictionary_take_torchs_optimizers(world: int, shape: str, results: Any) -> None:
    assert_close(results(world), f"{shape}, torch's optimizer", worker.torch_optimizer(None), rtol=CLOSE, atol=1e-11)


@each_mesh
def test_refusals_say_the_same_in_every_process(world: int, shape: str, results: Any) -> None:
    said = results(world)[0][f"{shape}, refusals"]
    assert all(rank[f"{shape}, refusals"] == said for rank in results(world))
    words = {
        "other weights": f"processes [{world - 1}] of the mesh have other weights, seeds or settings",
        "a mesh that does not fit": f"does not fit {world} processes",
        "twice": "on several processes already",
        "own rows": "Give the rows of the whole batch to each of them",
        "clip_grad_norm_": "clip_norm= of the optimizer",
        "accumulated terms": "expected at most 1: with several processes they are kept until the step joins them",
    }
    if shape.endswith("x1"):
        words["torch's optimizer"] = "make one for it"
    else:
        words |= {"another batch": "expected the same batch", "too few latents": "at least one unit each"}
    assert said.keys() == words.keys()
    for what, part in words.items():
        assert part in said[what], what


@each_mesh
def test_counted_bytes_are_those_of_the_formula(world: int, shape: str, results: Any) -> None:
    """Within 2 %: docs/distributed.md carries it to larger machines."""
    for rank in results(world):
        found = rank[f"{shape}, bytes"]
        assert found["counted"] == pytest.approx(found["formula"], rel=0.02)


@pytest.mark.long
def test_200_steps_in_float32(tmp_path: Path) -> None:
    """Two processes of each mesh against one: bit for bit with a shared batch, else within rounding that training
    amplifies: 1e-3 of the largest weight, and the same loss to 1e-4."""
    launch(2, str(tmp_path / "store"), str(tmp_path), "200")
    expected = worker.moments(None, "fp32", steps=100)
    for rank in (torch.load(tmp_path / f"2-{rank}.pt", weights_only=True) for rank in range(2)):
        for key, value in expected.items():
            assert torch.equal(rank["2x1, 200 steps"][key], value), key
        sharded = rank["1x2, 200 steps"]
        torch.testing.assert_close(sharded["metrics.loss"], expected["metrics.loss"], rtol=1e-4, atol=0)
        for key in ("W_enc", "W_dec", "b_dec"):
            worst = (sharded[key] - expected[key]).abs().max()
            assert worst <= 1e-3 * expected[key].abs().max(), key


def test_one_process_alone() -> None:
    """Without a group an axis changes nothing and says that nothing travelled."""
    axis, t = Axis(), torch.arange(6.0).view(2, 3)
    assert axis.sum(t) is t
    assert axis.summed(t) is t
    assert torch.equal(axis.gather(t)[0], t)
    assert axis.received == 0
    assert bounds(10, 3) == [0, 4, 7, 10]
    sae = fastsae.SparseAutoencoder(4, 8, fastsae.TopK(2), seed=0)
    assert fastsae.parallel.gathered(sae) is sae
    with pytest.raises(RuntimeError, match="init_process_group first"):
        fastsae.parallel.mesh()
