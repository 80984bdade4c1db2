"""fastsae.accelerate at the edges: no tokens, frozen thresholds, torch.func, acts of 0, and errors that undo all."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae.swapped import Unsupported
from fastsae.swapped.base import EncoderInputs, Swapped
from fastsae.swapped.lazy import LazyActs
from tests.accelerate_case import CASES, FIRST, D, K, M, inputs, lens_step, library, make
from tests.test_accelerate_trainers import dictionary_trainer

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fastsae.backends.errors.BackendWarning", "ignore::UserWarning"),
]
BATCH_TOPK = ["lens-batchtopk-training", "lens-matryoshka-training", "dictionary-batchtopk", "dictionary-matryoshka",
              "overcomplete-batchtopk"]  # fmt: skip


def close(mine: Any, truth: Any) -> None:
    torch.testing.assert_close(mine, truth, rtol=1e-9, atol=1e-11)


def pair(name: str, number: int = 0) -> tuple[Any, Any]:
    return make(name, number), fastsae.accelerate(make(name, number))


def both(one: Any, other: Any) -> None:
    """The same tensor, or an error of both."""
    found: list[Any] = []
    for run in (one, other):
        try:
            found.append(run())
        except (RuntimeError, ValueError, IndexError) as error:
            found.append(error)
    if isinstance(found[0], Exception):
        assert isinstance(found[1], Exception), found
    else:
        close(found[1], found[0])


@pytest.mark.parametrize("name", BATCH_TOPK)
def test_batch_top_k_of_no_tokens(name: str) -> None:
    case, (theirs, mine) = CASES[name], pair(name)
    flags = {"use_threshold": False} if name.startswith("dictionary") else {}
    x = inputs(0, n=0)

    def acts(module: Any) -> Tensor:
        found: Tensor = module.encode(x, **flags) if flags else case.encode(module, x)
        return found + 0

    both(lambda: acts(theirs), lambda: acts(mine))


def test_batch_top_k_that_rounds_to_no_act_and_one_that_is_too_large() -> None:
    for k, n in ((0.4, 2), (M + 1.0, 2)):
        theirs, mine = (CASES["lens-batchtopk-training"].make({"k": k}, torch.float64) for _ in range(2))
        fastsae.accelerate(mine)
        x = inputs(0, n=n)
        both(lambda m=theirs, x=x: lens_step(m, x, None).loss, lambda m=mine, x=x: lens_step(m, x, None).loss)


@pytest.mark.parametrize("number", [1, 2])
def test_a_kernel_that_trains_the_encoder_does_so_while_thresholds_are_frozen(number: int) -> None:
    theirs, mine = pair("lens-jumprelu-training", number)
    for module in (theirs, mine):
        module.threshold.requires_grad_(False)
        lens_step(module, inputs(1), None).loss.backward()
    assert isinstance(mine.encode(inputs(1)), LazyActs)
    for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
        if p.requires_grad:
            close(q.grad, p.grad)


# sparsify's own encoder takes no transform; overcomplete's dictionary writes .data in forward, and torch crashes there.
FUNCTIONAL = [name for name, _ in FIRST if not name.startswith(("sparsify", "overcomplete"))]


@pytest.mark.parametrize("name", FUNCTIONAL)
def test_transforms_of_torch_func_go_the_librarys_way(name: str) -> None:
    case, (theirs, mine) = CASES[name], pair(name)
    x = inputs(1)

    def gradient(module: Any) -> Any:
        return torch.func.grad(lambda x: case.call(module, x).square().sum())(x)

    def along(module: Any) -> Any:
        return torch.func.jvp(lambda x: case.call(module, x), (x,), (x.roll(1, 0),))[1]

    def each(module: Any) -> Any:
        return torch.func.vmap(lambda x: case.call(module, x[None])[0])(x)

    for run in (gradient, along, each):
        both(lambda run=run: run(theirs), lambda run=run: run(mine))
    assert isinstance(mine, Swapped)


def test_an_act_of_0_has_a_gradient_in_sparsifys_decoder() -> None:
    theirs, mine = pair("sparsify")
    top = theirs.encode(inputs(1)).top_indices
    given = [torch.zeros(top.shape, dtype=torch.float64).requires_grad_() for _ in range(2)]
    for module, acts in zip((theirs, mine), given, strict=True):
        module.decode(acts, top).sin().sum().backward()
    assert bool((given[0].grad != 0).all())
    close(given[1].grad, given[0].grad)
    none = torch.zeros(0, K, dtype=torch.float64), top[:0]
    assert mine.decode(*none).shape == (0, D)


def test_a_running_threshold_that_is_a_number() -> None:
    theirs, mine = pair("overcomplete-batchtopk-inference")
    for module in (theirs, mine):
        module.running_threshold = 0.7
    close(mine.encode(inputs(1))[1] + 0, theirs.encode(inputs(1))[1])


def test_llamascopiums_batch_of_further_dimensions() -> None:
    theirs, mine = pair("llama-batchtopk")
    x = inputs(1).view(2, 3, 4, D)
    close(mine.encode(x) + 0, theirs.encode(x))


def test_cross_layer_acts_of_other_layers_are_decoded_as_they_are() -> None:
    library("circuit_tracer")
    kind = importlib.import_module("circuit_tracer.transcoder.cross_layer_transcoder").CrossLayerTranscoder
    theirs, mine = (kind(2, M, D, lazy_decoder=False, dtype=torch.float64, device=torch.device("cpu")) for _ in "ab")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
            q.copy_(p)
        for module in (theirs, mine):
            module.b_enc.sub_(6.0)
    fastsae.accelerate(mine)
    x = inputs(1).view(1, -1, D)
    acts = mine.encode_layer(x, 0)
    assert isinstance(acts, LazyActs)
    close(mine.decode(acts), theirs.decode(theirs.encode_layer(x, 0)))


def test_a_trainer_that_cannot_be_fused_stays_as_it_was() -> None:
    trainer = dictionary_trainer("dictionary-topk")
    trainer.ae.encoder.bias.requires_grad_(False)
    before = type(trainer), type(trainer.ae), trainer.optimizer, trainer.scheduler
    with pytest.raises(ValueError, match="b_enc do not require a gradient"):
        fastsae.accelerate(trainer)
    assert (type(trainer), type(trainer.ae), trainer.optimizer, trainer.scheduler) == before
    assert trainer.ae.decoder.weight.is_contiguous()


@pytest.mark.parametrize("asked", [False, True])
def test_the_running_threshold_of_top_k_encodes_once(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, mine = pair("dictionary-topk")
    for module in (theirs, mine):
        module.threshold.fill_(0.5)
    runs = []
    topk = EncoderInputs.topk
    monkeypatch.setattr(EncoderInputs, "topk", lambda self, k: runs.append(k) or topk(self, k))
    a, b = (module.encode(inputs(1), return_topk=asked, use_threshold=True) for module in (theirs, mine))
    close((b[0] if asked else b) + 0, a[0] if asked else a)
    assert len(runs) == asked


def test_memory_of_lazy_acts_that_others_read_and_write() -> None:
    """Through DLPack, storages, shared memory, data."""
    theirs, mine = pair("lens-topk")
    x = inputs(1)
    new = torch.rand(len(x), M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def by_data(acts: Tensor) -> None:
        acts.data = new.clone()

    def by_storage(acts: Tensor) -> None:
        torch.empty(0, dtype=acts.dtype).set_(acts.untyped_storage()).fill_(0.5)

    writes: dict[str, Any] = {
        "torch": lambda acts: torch.from_dlpack(acts).mul_(2), "numpy": lambda acts: np.from_dlpack(acts).sum(),
        "shared": lambda acts: acts.share_memory_()[0].fill_(3.0), "data": by_data, "storage": by_storage,
        "old data": lambda acts: acts.data.mul_(3),
    }  # fmt: skip
    for name, write in writes.items():
        with torch.no_grad():
            found = []
            for module in (theirs, mine):
                acts = module.encode(x)
                assert acts.is_shared() is False
                write(acts)
                assert acts.is_shared() == (name == "shared")
                found.append((acts + 0, module.decode(acts)))
        for b, a in zip(found[1], found[0], strict=True):
            close(b, a)
    acts = mine.encode(x)
    with pytest.raises(BufferError, match="require gradient"):
        torch.from_dlpack(acts)
    with pytest.raises(RuntimeError, match="expected \\(24, 48\\)"):
        acts.data = new[:, :3]
    with torch.no_grad():
        np.testing.assert_array_equal(np.from_dlpack(mine.encode(x)), theirs.encode(x).numpy())


def test_a_model_with_somebodys_subclass_inside_is_refused_as_a_whole() -> None:
    known, own = make("lens-topk", 0), make("lens-topk", 0)
    own.__class__ = type("Own", (type(own),), {})
    for model in (nn.Sequential(known, own), nn.Sequential(own)):
        with pytest.raises(Unsupported, match="Own is a subclass of TopKSAE"):
            fastsae.accelerate(model)
        assert not any(isinstance(module, Swapped) for module in model)


@pytest.mark.parametrize("name", [name for name, _ in FIRST])
def test_a_hook_on_any_part_runs_as_often_as_the_librarys(name: str) -> None:
    case = CASES[name]
    parts = [key for key, _ in make(name, 0).named_modules() if key]
    for key in parts:
        found = []
        for module in pair(name):
            runs: list[int] = []
            handle = module.get_submodule(key).register_forward_hook(lambda *_, runs=runs: runs.append(1))
            with torch.no_grad():
                out = case.call(module, inputs(1))
            found.append((len(runs), out))
            handle.remove()
        assert found[0][0] == found[1][0], key
        if isinstance(found[0][1], Tensor):
            close(found[1][1], found[0][1])


@pytest.mark.parametrize("name", ["lens-topk", "lens-jumprelu", "lens-standard-training", "transcoder"])
def test_an_activation_that_is_replaced_afterwards_is_heeded(name: str) -> None:
    case, (theirs, mine) = CASES[name], pair(name)
    where = "activation_function" if name == "transcoder" else "activation_fn"
    for module in (theirs, mine):
        setattr(module, where, nn.LeakyReLU(0.3))
    with pytest.warns(UserWarning, match=rf"{where} .* is .*LeakyReLU, expected .*library's dense path answers"):
        close(case.call(mine, inputs(1)), case.call(theirs, inputs(1)))


def test_a_cross_layer_transcoder_of_another_activation_is_refused() -> None:
    library("circuit_tracer")
    kind = importlib.import_module("circuit_tracer.transcoder.cross_layer_transcoder").CrossLayerTranscoder
    module = kind(2, M, D, lazy_decoder=False, dtype=torch.float64, device=torch.device("cpu"))
    module.activation_function = nn.LeakyReLU(0.3)
    with pytest.raises(
        Unsupported, match="activation_function of the CrossLayerTranscoder is LeakyReLU, expected ReLU"
    ):
        fastsae.accelerate(module)
    assert type(module) is kind
