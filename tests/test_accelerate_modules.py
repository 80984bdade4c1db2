"""fastsae.accelerate: the same numbers, gradients, objects and files as the library's own class."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastsae
from fastsae.swapped import Unsupported
from fastsae.swapped.base import Swapped
from fastsae.swapped.lazy import LazyActs
from tests.accelerate_case import ALL, CASES, FIRST, K, M, dead_latents, inputs, lens_step, library, make

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::fastsae.backends.errors.BackendWarning", "ignore::UserWarning"),
]
every = pytest.mark.parametrize(("name", "number"), ALL)
first = pytest.mark.parametrize(("name", "number"), FIRST)
# sparsify's encode gives a code instead of dense acts, and has tests of its own.
every_dense = pytest.mark.parametrize(("name", "number"), [one for one in ALL if one[0] != "sparsify"])
first_dense = pytest.mark.parametrize(("name", "number"), [one for one in FIRST if one[0] != "sparsify"])


def pair(name: str, number: int, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    return make(name, number, dtype), fastsae.accelerate(make(name, number, dtype))


def close(mine: Tensor, truth: Tensor, what: str = "") -> None:
    torch.testing.assert_close(
        mine, truth.to(mine.dtype), rtol=1e-9, atol=1e-11, msg=lambda text: f"{what}: {text}"
    )  # fmt: skip


# -- the same numbers -------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("seed", range(4))
def test_loss_and_gradients(name: str, number: int, seed: int) -> None:
    theirs, mine = pair(name, number)
    x, dead = inputs(seed), dead_latents(name, seed)
    given = [x.clone().requires_grad_(seed % 2 == 1) for _ in range(2)]
    losses = [CASES[name].loss(module, one, dead) for module, one in zip((theirs, mine), given, strict=True)]
    close(losses[1], losses[0], "loss")
    for loss in losses:
        loss.backward()
    if seed % 2:
        assert given[0].grad is not None
        assert given[1].grad is not None
        close(given[1].grad, given[0].grad, "x")
    for (key, p), q in zip(theirs.named_parameters(), mine.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        if p.grad is not None:
            assert q.grad is not None
            close(q.grad, p.grad, key)


@every_dense
def test_acts_and_reconstructions(name: str, number: int) -> None:
    """encode, decode and the call, for tokens in any shape, with and without gradients."""
    theirs, mine = pair(name, number)
    case = CASES[name]
    for x in (inputs(1), inputs(1).view(4, 6, -1))[: 1 + case.any_shape]:
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                acts = [case.encode(module, x) for module in (theirs, mine)]
                assert acts[0].shape == acts[1].shape
                recon = case.decode(mine, acts[1], x)
                assert not isinstance(acts[1], LazyActs) or not acts[1].is_made, "decode made the acts dense"
                dense = [a.to_dense() if a.is_sparse else a for a in acts]
                close(dense[1] + 0, dense[0], "acts")
                mine.encode(x), theirs.encode(x)  # normalization keeps its statistics for one decode
                close(recon, case.decode(theirs, dense[0], x), "decode")
                close(case.call(mine, x), case.call(theirs, x), "call")


@every_dense
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_acts_that_were_written_are_decoded_as_they_are(name: str, number: int, context: Any) -> None:
    """As ablation and steering write them, in every way that torch has."""

    def first_view(acts: Tensor) -> None:
        acts[:, : M // 2].zero_()

    def through_numpy(acts: Tensor) -> None:
        acts.detach().numpy()[:, : M // 2] = 0

    case, (theirs, mine), x = CASES[name], pair(name, number), inputs(2)
    for write in (lambda a: a.mul_(0.5), first_view, through_numpy, lambda a: a.data.zero_()):
        with context():
            acts = [case.encode(module, x) for module in (theirs, mine)]
            if acts[0].is_sparse:
                continue
            for one in acts:
                write(one)
            close(case.decode(mine, acts[1], x), case.decode(theirs, acts[0], x), "decode")


@every_dense
def test_the_gradient_of_acts_is_the_librarys_where_it_is_asked_for(name: str, number: int) -> None:
    """Of acts in the graph, by hooks and retained; of acts without one that become a leaf."""
    case, modules, x = CASES[name], pair(name, number), inputs(2)

    def gradient(module: Any, graph: bool, ask: Any) -> Tensor | None:
        with torch.set_grad_enabled(graph):
            acts = case.encode(module, x)
        if acts.is_sparse:
            pytest.skip("sparse acts are no lazy ones")
        hooked: list[Tensor] = []
        ask(acts, hooked)
        case.decode(module, acts, x).square().sum().backward()
        return hooked[0] if hooked else acts.grad

    for graph, ask in (
        (True, lambda acts, _: acts.retain_grad()),
        (True, lambda acts, hooked: acts.register_hook(hooked.append)),
        (False, lambda acts, _: acts.requires_grad_()),
        (False, lambda acts, _: setattr(acts, "requires_grad", True)),
    ):
        theirs, mine = (gradient(module, graph, ask) for module in modules)
        assert theirs is not None
        assert mine is not None
        close(mine, theirs, "acts")


@every_dense
def test_acts_of_another_sae_are_decoded_as_they_are(name: str, number: int) -> None:
    ours, case = [pair(name, number) for _ in range(2)], CASES[name]
    with torch.no_grad():
        for module in ours[1]:
            named = [(key, p) for key, p in module.named_parameters() if p.ndim == 2]
            next(p for key, p in named if "dec" in key or "W_D" in key or "_weights" in key).mul_(3.0)
        x = inputs(2)
        acts = [case.encode(module, x) for module in ours[0]]
        if acts[0].is_sparse:
            pytest.skip("sparse acts carry no code")
        ours[1][0].encode(x), ours[1][1].encode(x)  # normalization keeps its statistics for one decode
        close(case.decode(ours[1][1], acts[1], x), case.decode(ours[1][0], acts[0], x), "decode")


@first
def test_all_of_a_model_or_nothing_and_twice_is_once(name: str, number: int) -> None:
    good, odd = make(name, number, torch.float64), make(name, number, torch.float64)
    kind = type(good)
    if hasattr(odd, "activation_fn"):
        odd.activation_fn = nn.Sigmoid()
        with pytest.raises(Unsupported):
            fastsae.accelerate(nn.ModuleList([good, odd]))
        assert type(good) is kind
    sae = fastsae.accelerate(good)
    assert fastsae.accelerate(sae) is sae
    if not CASES[name].fused:
        with pytest.raises(Unsupported, match=r"no parameter of its own for .*b_dec, which fastsae.optim steps"):
            fastsae.optim.Adam(sae)
        return
    optimizer = fastsae.optim.Adam(sae.requires_grad_())
    fastsae.unaccelerate(sae)
    with pytest.raises(
        RuntimeError, match=r"is not accelerated any more \(fastsae.unaccelerate\); make a new optimizer"
    ):
        optimizer.step()


@first_dense
def test_lazy_acts_are_tensors(name: str, number: int) -> None:
    theirs, mine = pair(name, number)
    case, x = CASES[name], inputs(2)
    truth, acts = case.encode(theirs, x).detach(), case.encode(mine, x)
    if truth.is_sparse:
        truth = truth.to_dense()
    assert isinstance(acts, torch.Tensor)
    assert acts.shape == truth.shape
    close((acts * 2).detach(), truth * 2)
    close((acts > 0).double(), (truth > 0).double())
    assert repr(acts)
    with torch.no_grad():
        acts = case.encode(mine, x)
    assert (acts.numpy() - truth.numpy()).max() < 1e-9
    close(pickle.loads(pickle.dumps(acts)), truth)
    close(copy.deepcopy(acts), truth)
    buffer = io.BytesIO()
    torch.save(acts, buffer)
    buffer.seek(0)
    close(torch.load(buffer), truth)
    before = [case.decode(module, a, x) for module, a in ((theirs, truth), (mine, acts))]
    close(before[1], before[0])
    acts[:, : M // 2] = 0  # a decode after a write decodes what is there
    truth[:, : M // 2] = 0
    close(acts + 0, truth)
    theirs.encode(x)
    after = case.decode(mine, acts, x)
    assert not torch.equal(after, before[1])
    close(after, case.decode(theirs, truth, x))


def test_a_loss_on_the_acts() -> None:
    """A graph through the dense acts: by an op, and by an autograd.Function that sees the tensor itself."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            ctx.save_for_backward(t)
            return t.square()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return 2 * ctx.saved_tensors[0] * grads[0]

    theirs, mine = pair("lens-topk", 1)
    x = inputs(3)
    for module in (theirs, mine):
        acts = module.encode(x)
        (Square.apply(acts).sum() + acts[:, 3:9].sin().sum()).backward()
    for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            close(q.grad, p.grad)


@pytest.mark.parametrize("number", [0, 3])
def test_training_output_of_saelens(number: int) -> None:
    theirs, mine = pair("lens-topk-training", number)
    x = inputs(4)
    a, b = (lens_step(module, x, None) for module in (theirs, mine))
    assert type(a) is type(b)
    assert b.feature_acts.is_sparse == a.feature_acts.is_sparse == (number == 3)
    if number == 0:
        assert isinstance(b.feature_acts, LazyActs)
        assert not b.feature_acts.is_made
    close(b.feature_acts.to_dense(), a.feature_acts.to_dense())
    close(b.hidden_pre + 0, a.hidden_pre)
    assert a.losses.keys() == b.losses.keys()
    for key, value in a.losses.items():
        close(b.losses[key], value, key)
    close(b.sae_out, a.sae_out)


@pytest.mark.parametrize("name", ["lens-topk-training", "lens-batchtopk-training", "lens-jumprelu-training"])
def test_what_fires_is_counted_without_dense_acts(name: str) -> None:
    """As SAETrainer does: bit for bit what dense acts give, and the mask is theirs too where something reads it."""
    acts = pair(name, 0)[1].encode(inputs(6))
    with torch.no_grad():
        mask = acts.bool()
        counted = [mask.float().sum(dim) for dim in (-2, 0, -1, 1)]
        assert isinstance(acts, LazyActs)
        assert not acts.is_made
        assert not mask.is_made
        truth = acts + 0 != 0
        for found, dim in zip(counted, (-2, 0, -1, 1), strict=True):
            assert type(found) is torch.Tensor
            assert torch.equal(found, truth.float().sum(dim))
            assert bool((found > 0).any())
        assert torch.equal(mask | False, truth)
        assert torch.equal(mask.float().sum(), truth.sum().float())
        assert torch.equal(acts.float().bool().float().sum(0), truth.float().sum(0))
        with pytest.raises(IndexError):
            mask.float().sum(2)


def test_a_count_knows_what_was_written() -> None:
    acts = pair("lens-topk-training", 0)[1].encode(inputs(6)).detach()
    with torch.no_grad():
        mask = acts.bool()
        mask[0] = True
        assert int(mask.float().sum(-1)[0]) == M
        counts = acts.bool().float()
        counts.add_(1)
        assert torch.equal(counts.sum(-1), (acts != 0).float().add(1).sum(-1))
        acts.fill_(0)
        assert not bool(acts.bool().float().sum(0).any())


def test_encoder_output_of_sparsify() -> None:
    theirs, mine = pair("sparsify", 0)
    x = inputs(5)
    a, b = theirs.encode(x), mine.encode(x)
    assert type(a) is type(b)
    order = a.top_indices.sort(-1)
    assert torch.equal(b.top_indices, order.values)
    close(b.top_acts, a.top_acts.gather(1, order.indices))
    close(b.pre_acts + 0, a.pre_acts)
    close(mine.decode(a.top_acts, a.top_indices), theirs.decode(a.top_acts, a.top_indices))
    (a.top_acts.sum() + theirs.decode(*a[:2]).square().sum()).backward()
    (b.top_acts.sum() + mine.decode(*b[:2]).square().sum()).backward()
    for p, q in zip(theirs.parameters(), mine.parameters(), strict=True):
        close(q.grad, p.grad)


def test_an_empty_slot_names_no_other_latent() -> None:
    _, mine = pair("sparsify", 0)
    with torch.no_grad():
        mine.encoder.bias.sub_(1.0)  # fewer than K latents are above 0
    out = mine.encode(inputs(6))
    few = (out.top_acts > 0).sum(-1)
    assert int(few.min()) < K
    for acts, indices in zip(out.top_acts[few > 0], out.top_indices[few > 0], strict=True):
        assert set(indices.tolist()) == set(indices[acts > 0].tolist())


# -- the same object --------------------------------------------------------------------------------------------------


@first
def test_parameters_state_and_class_stay(name: str, number: int) -> None:
    module = make(name, number)
    kind, parameters = type(module), list(module.parameters())
    state = copy.deepcopy(module.state_dict())
    mine = fastsae.accelerate(module)
    assert mine is module
    assert isinstance(mine, kind)
    assert isinstance(mine, Swapped)
    assert fastsae.accelerate(mine) is mine
    assert [id(p) for p in mine.parameters()] == [id(p) for p in parameters]
    assert list(mine.state_dict()) == list(state)
    for key, value in state.items():
        assert torch.equal(mine.state_dict()[key], value), key
    for role in set(mine.roles) - set(mine.lacks()):
        assert mine.rows(role).is_contiguous(), role
    fresh = make(name, number)
    fresh.load_state_dict(mine.state_dict())
    mine.load_state_dict(fresh.state_dict(), assign=True)  # new Parameters, in the library's order
    close(CASES[name].loss(mine, inputs(0), None), CASES[name].loss(fresh, inputs(0), None))
    fastsae.unaccelerate(mine)
    assert type(mine) is kind
    assert all(p.is_contiguous() for p in mine.parameters())


@first
def test_copies_and_pickles(name: str, number: int) -> None:
    theirs, mine = pair(name, number)
    x, loss = inputs(1), CASES[name].loss
    copied, unchanged, cast = copy.deepcopy(mine), copy.deepcopy(mine), copy.deepcopy(mine).to(torch.float32)
    assert type(copied) is type(mine)
    assert not {id(p) for p in copied.parameters()} & {id(p) for p in mine.parameters()}
    assert all(p.dtype == torch.float32 for p in cast.parameters())
    assert all(cast.rows(role).is_contiguous() for role in set(cast.roles) - set(cast.lacks()))
    # SAELens' modules hold lambdas, which no pickle takes.
    pickles = CASES[name].pickles and not name.startswith("lens")
    written = pickle.dumps(mine) if pickles else b""
    truth = loss(theirs, x, None).detach()
    close(loss(copied, x, None).detach(), truth)
    with torch.no_grad():
        next(iter(copied.parameters())).add_(1.0)
    close(loss(unchanged, x, None).detach(), truth)
    if name.startswith("lens"):
        assert mine.__reduce_ex__(2)[1][0] is type(theirs)
        assert mine.__reduce_ex__(2)[2]["_parameters"]["W_enc"] is mine.W_enc
    if not pickles:
        return
    assert b"fastsae" not in written
    assert type(pickle.loads(written)) is type(theirs)
    again, optimizer = pickle.loads(pickle.dumps((mine, torch.optim.SGD(mine.parameters(), lr=0.1))))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in again.parameters()]
    close(loss(pickle.loads(written), x, None).detach(), truth)
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)) is type(theirs)


@first
def test_saved_files_load_as_ever(name: str, number: int, tmp_path: Path) -> None:
    theirs, mine = pair(name, number)
    x, loss = inputs(1), CASES[name].loss
    if name.startswith("lens"):
        lens = library("sae_lens")
        mine.save_model(tmp_path)
        loaded = [type(theirs).load_from_disk(tmp_path)]
        if CASES[name].loss is not CASES["lens-topk"].loss:
            inference = [tmp_path / "theirs", tmp_path / "mine"]
            for module, path in zip((theirs, mine), inference, strict=True):
                module.save_inference_model(path)
            a, b = (lens.SAE.load_from_disk(path) for path in inference)
            assert type(a) is type(b)
            close(b(x), a(x))
    elif name == "sparsify":
        mine.save_to_disk(tmp_path)
        loaded = [type(theirs).load_from_disk(tmp_path)]
    else:
        torch.save(mine.state_dict(), tmp_path / "ae.pt")
        loaded = [make(name, number)]
        with torch.no_grad():
            for p in loaded[0].parameters():
                p.zero_()
        loaded[0].load_state_dict(torch.load(tmp_path / "ae.pt"))
    for module in loaded:
        assert type(module) is type(theirs)
        close(loss(module, x, None), loss(theirs, x, None))
        close(loss(fastsae.accelerate(module), x, None), loss(theirs, x, None))


WITHOUT = """
import importlib, importlib.util, pathlib, pickle, sys, types
sys.modules["fastsae"] = None  # an import of it fails
import torch
if spec := importlib.util.find_spec("overcomplete"):  # without its __init__, which imports image models
    sys.modules["overcomplete"] = types.ModuleType("overcomplete")
    sys.modules["overcomplete"].__path__ = spec.submodule_search_locations
for folder in map(pathlib.Path, sys.argv[1:]):
    module, _, name = (folder / "class").read_text().partition(":")
    if (folder / "cfg.json").exists():
        found = getattr(importlib.import_module(module), name).load_from_disk(folder)
    elif (folder / "config.json").exists():
        found = getattr(importlib.import_module(module), name).from_pretrained(str(folder), dtype=torch.float64)
    else:
        found = pickle.loads((folder / "pickle").read_bytes())
    truth = torch.load(folder / "state.pt", weights_only=True)
    mine = torch.load(folder / "mine.pt", weights_only=True)
    assert list(mine) == list(truth), (folder, mine, truth)
    for key, t in mine.items():
        torch.testing.assert_close(t, truth[key], rtol=0, atol=0)
    for key, t in found.state_dict().items():
        rtol = 1e-6 if "threshold" in key else 0  # saved as its logarithm
        torch.testing.assert_close(t, truth.pop(key), rtol=rtol, atol=0, check_dtype=not rtol)
    assert not truth, (folder, truth)
"""


@pytest.mark.parametrize("prefix", sorted({name.split("-")[0] for name, _ in FIRST}))
def test_files_and_pickles_load_where_fastsae_is_not_installed(prefix: str, tmp_path: Path) -> None:
    """By the library's own reader of files, or as a pickle; and the state dict, of plain tensors."""
    folders = []
    for name, number in FIRST:
        if name.split("-")[0] != prefix:
            continue
        theirs, mine = pair(name, number)
        folder = tmp_path / name
        folder.mkdir()
        if prefix == "lens":
            mine.save_model(folder)
        elif prefix == "sparsify":
            mine.save_to_disk(folder)
        elif prefix == "llama":
            mine.save_pretrained(folder)
            mine.cfg.save_hyperparameters(folder)
        else:
            (folder / "pickle").write_bytes(pickle.dumps(mine))
        described(theirs, mine, folder)
        folders.append(folder)
    load_without_fastsae(folders)


def described(theirs: Any, mine: Any, folder: Path) -> None:
    """Writes the class and the tensors that are to be found there."""
    (folder / "class").write_text(f"{type(theirs).__module__}:{type(theirs).__qualname__}")
    for name, module in (("state.pt", theirs), ("mine.pt", mine)):
        torch.save(dict(module.state_dict()), folder / name)


def load_without_fastsae(folders: list[Path]) -> None:
    environment = {**os.environ, "SPARSIFY_DISABLE_TRITON": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT, *map(str, folders)], capture_output=True, text=True,
        check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@first
def test_a_torch_optimizer_made_before(name: str, number: int) -> None:
    theirs, mine = make(name, number), make(name, number)
    optimizers = [torch.optim.Adam(module.parameters(), lr=1e-2) for module in (theirs, mine)]
    for i in range(6):
        if i == 3:
            fastsae.accelerate(mine)
        for module, optimizer in zip((theirs, mine), optimizers, strict=True):
            CASES[name].loss(module, inputs(i), None).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (key, p), q in zip(theirs.named_parameters(), mine.parameters(), strict=True):
        close(q, p, key)


# -- hooks, refusals, imports -----------------------------------------------------------------------------------------


def test_hooks_on_dense_acts_get_them_and_it_is_said_once() -> None:
    theirs, mine = pair("lens-topk", 0)
    x = inputs(1)
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def ablate(i: int) -> Any:
        def hook(acts: Tensor, hook: Any) -> Tensor:
            seen[i].append(acts)
            return torch.where(acts > 0.5, 0, acts)

        return hook

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        outs = [
            module.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_pre", ablate(i)), ("hook_sae_acts_post", ablate(i))])
            for i, module in enumerate((theirs, mine))
        ]
        mine.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", ablate(0))])
    assert len([one for one in said if "dense path answers" in str(one.message)]) == 1
    close(outs[1], outs[0])
    assert type(seen[1][0]) is torch.Tensor
    close(mine(x), theirs(x))
    caches = [module.run_with_cache(x)[1] for module in (theirs, mine)]
    assert caches[0].keys() == caches[1].keys()
    for key, value in caches[0].items():
        close(caches[1][key], value, key)


def test_the_error_term_of_saelens() -> None:
    theirs, mine = pair("lens-topk", 0)
    for module in (theirs, mine):
        module.use_error_term = True
    close(mine(inputs(1)), theirs(inputs(1)))
    close(mine(inputs(1)), inputs(1))


def test_what_is_not_supported_is_named() -> None:
    sparsify = library("sparsify")
    config = sparsify.SparseCoderConfig(num_latents=M, k=K, activation="groupmax")
    module = sparsify.SparseCoder(12, config)
    with pytest.raises(Unsupported, match=r"activation.*'groupmax', expected 'topk'"):
        fastsae.accelerate(module)
    assert type(module) is sparsify.SparseCoder
    with pytest.raises(Unsupported, match="Linear cannot be accelerated"):
        fastsae.accelerate(nn.Linear(3, 3))

    class Mine(sparsify.SparseCoder):
        pass

    own = Mine(12, sparsify.SparseCoderConfig(num_latents=M, k=K))
    with pytest.raises(Unsupported, match="is a subclass of SparseCoder"):
        fastsae.accelerate(own)


def test_a_model_that_holds_saes() -> None:
    model = nn.Sequential(make("lens-topk", 0), nn.Linear(12, 12, dtype=torch.float64))
    truth = model(inputs(1))
    assert fastsae.accelerate(model) is model
    assert isinstance(model[0], Swapped)
    close(model(inputs(1)), truth)
    assert not isinstance(fastsae.unaccelerate(model)[0], Swapped)


def test_importing_fastsae_imports_no_library() -> None:
    code = (
        "import sys, fastsae, fastsae.swapped; "
        "print(sorted({*fastsae.swapped._ROOMS, 'transformer_lens'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
