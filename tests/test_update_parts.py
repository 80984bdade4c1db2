"""update_latents_ beyond TopK: given gradients of the pre-acts, parts from no term, clipping, norms_only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastsae import Screen, SparseCodes, UpdateTerm, ops, reference
from fastsae.backends.gpu import raw_ops
from tests import truth
from tests.cases import BY_NAME, Case
from tests.update_case import BETAS, EPS, Problem, check, gradient_truth, make_problem, most_backends

pytestmark = pytest.mark.usefixtures("one_thread")
NARROW_CASE = Case("narrow", 23, 30, 70, 4, BY_NAME["random"].make)
HOT = Case("hot", 1300, 24, 60, 2, BY_NAME["hot-latent"].make)  # one latent has over 1024 tokens: it is cut
double = pytest.mark.parametrize("backend", [name for name in truth.BACKENDS if name not in truth.GPU])


def give_dacts(problem: Problem, share: float = 0.3) -> None:
    """Gives every term gradients of its pre-acts and sets some acts to 0. A slot with an act of 0 counts in a ragged
    code and not in a fixed one. The gradients of slots that do not count are NaN.
    """
    g = torch.Generator().manual_seed(7)
    for i, t in enumerate(problem.terms):
        shape = t.codes.acts.shape
        if t.codes.is_ragged:
            acts = torch.where(torch.rand(shape, generator=g) < share, 0, t.codes.acts)
            codes = replace(t.codes, acts=acts)
        else:
            empty = (torch.rand(shape[0], 1, generator=g) < share) & (torch.arange(shape[1]) >= shape[1] // 2)
            last = t.codes.d_sae - 1
            codes = replace(
                t.codes, acts=torch.where(empty, 0, t.codes.acts), indices=torch.where(empty, last, t.codes.indices)
            )
        dacts = torch.where(codes.occupied(), torch.randn(shape, generator=g), torch.nan)
        problem.terms[i] = replace(t, codes=codes, dacts=dacts.to(t.x.dtype))


def with_parts(problem: Problem, *names: str) -> Problem:
    g = torch.Generator().manual_seed(3)
    (M, d_out), dtype = problem.params["W_dec"].shape, problem.params["W_dec"].dtype

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    for name in names:
        match name:
            case "dacts":
                give_dacts(problem)
            case "pull" | "segments":
                problem.settings["decoder_pull"] = randn(M, 1 if name == "pull" else d_out // 5)
            case "db_enc":
                problem.settings["db_enc"] = randn(M)
            case "added":
                rows = [randn(*p.shape) for n, p in problem.params.items() if n.startswith("W")]
                problem.settings["added"] = [*rows, randn(M)]
            case "scale":
                problem.settings["grad_scale"] = torch.tensor(0.37, dtype=torch.float64)
            case "clip":
                norms = gradient_truth(problem)[0]["W_dec"].norm(dim=-1)
                problem.settings["clip_rows"] = float(norms.median()) or 1.0
    return problem


PARTS = ("dacts", "pull", "segments", "db_enc", "added", "scale", "clip")


@most_backends
@pytest.mark.parametrize("part", PARTS)
def test_each_part(part: str, backend: str, dtype: torch.dtype) -> None:
    check(with_parts(make_problem(NARROW_CASE, dtype), part), backend)


@most_backends
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unit_norm": False, "pre_bias": False},
        {"tied": True},
        {"tied": True, "unit_norm": False},
        {"d_out": 45},
        {"aux": True},
        {"ragged": True},
        {"aux": True, "ragged": True, "tied": True},
    ],
    ids=lambda options: "-".join(f"{k}={v}" for k, v in options.items()) or "plain",
)
def test_all_parts_together(options: dict, backend: str, dtype: torch.dtype) -> None:
    check(with_parts(make_problem(NARROW_CASE, dtype, **options), "dacts", "segments", *PARTS[3:]), backend)


@most_backends
@pytest.mark.parametrize("ragged", [False, True], ids=["fixed", "ragged"])
def test_a_latent_of_more_than_a_thousand_tokens(ragged: bool, backend: str, dtype: torch.dtype) -> None:
    problem = make_problem(replace(HOT, N=150) if backend in truth.GPU else HOT, dtype, ragged=ragged)
    assert backend in truth.GPU or int(ops.by_latent(problem.terms[0].codes).offsets.diff().max()) > 1024
    check(with_parts(problem, "dacts", "added"), backend)


@most_backends
def test_parts_alone_and_terms_without_tokens(backend: str, dtype: torch.dtype) -> None:
    alone = with_parts(make_problem(NARROW_CASE, dtype), "pull", "db_enc", "added", "clip")
    alone.terms = []
    check(alone, backend)
    check(with_parts(make_problem(BY_NAME["no-tokens"], dtype, ragged=True), "dacts", "added"), backend)


@most_backends
def test_a_ragged_slot_counts_though_its_act_is_0(backend: str, dtype: torch.dtype) -> None:
    """As for a latent in JumpReLU's band: it adds nothing to the reconstruction but has a gradient."""
    problem = make_problem(NARROW_CASE, dtype, ragged=True, unit_norm=False, pre_bias=False)
    give_dacts(problem, share=2.0)  # no act is left
    before = {name: p.clone() for name, p in problem.params.items()}
    problem.moments = [torch.zeros_like(m) for m in problem.moments]
    latents = problem.terms[0].codes.indices[problem.terms[0].codes.occupied()].unique().long()
    assert latents.numel() > 3
    problem.run(backend)
    moved = (problem.params["W_enc"] != before["W_enc"]).any(-1)
    assert torch.equal(moved.nonzero().squeeze(1), latents)
    assert torch.equal(problem.params["W_dec"], before["W_dec"])
    assert not torch.equal(problem.params["b_enc"], before["b_enc"])


@pytest.mark.parametrize("backend", truth.BACKENDS)
def test_given_dacts_replace_the_computed_ones(backend: str) -> None:
    inside, given = (make_problem(NARROW_CASE, torch.float32, ragged=True) for _ in range(2))
    term = given.terms[0]
    dacts = ops.active_dot(term.grad, term.codes, given.params["W_dec"], backend=backend)
    given.terms = [replace(term, dacts=dacts)]
    inside.run(backend)
    given.run(backend)
    for a, b in zip([*inside.params.values(), *inside.moments], [*given.params.values(), *given.moments], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# -- clipping ---------------------------------------------------------------------------------------------------------


@most_backends
@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
def test_norms_only_gives_the_norms_and_changes_nothing(tied: bool, backend: str, dtype: torch.dtype) -> None:
    problem = with_parts(
        make_problem(NARROW_CASE, dtype, tied=tied), "dacts", "segments", "db_enc", "added", "clip", "scale"
    )
    screen = ops.prepare_screen(
        problem.params["W_dec" if tied else "W_enc"], problem.params["b_enc"], backend=backend
    ) if dtype == torch.float32 else None  # fmt: skip
    held = [*problem.params.values(), *problem.moments, *(screen.tensors if screen else [])]
    before = [t.clone() for t in held]
    norms = problem.run(backend, norms_only=True, screen=screen)
    assert all(map(torch.equal, held, before))
    del problem.settings["grad_scale"]
    torch.testing.assert_close(norms, reference.squared_norms(gradient_truth(problem)[0]), rtol=1e-4, atol=1e-10)


@double
@pytest.mark.parametrize("unit_norm", [False, True], ids=["free", "unit"])
def test_two_calls_clip_the_global_norm_as_torch_does(unit_norm: bool, backend: str) -> None:
    problem = make_problem(NARROW_CASE, torch.float64, unit_norm=unit_norm)
    problem.moments = [torch.zeros_like(m) for m in problem.moments]
    problem.step = 1
    grads, _ = gradient_truth(problem)
    leaves = [torch.nn.Parameter(p.clone()) for p in problem.params.values()]
    for leaf, g in zip(leaves, grads.values(), strict=True):
        leaf.grad = g.clone()
    total = torch.nn.utils.clip_grad_norm_(leaves, max_norm=0.5)
    torch.optim.Adam(leaves, lr=problem.lr, betas=BETAS, eps=EPS).step()

    norm = problem.run(backend, norms_only=True).sum().sqrt()
    torch.testing.assert_close(norm, total.detach(), rtol=1e-12, atol=0)
    problem.run(backend, grad_scale=(0.5 / (norm + 1e-6)).clamp(max=1))
    for (name, p), leaf in zip(problem.params.items(), leaves, strict=True):
        expected = leaf.detach()
        if name == "W_dec" and unit_norm:
            expected = reference.normalize(expected)
        torch.testing.assert_close(p, expected, rtol=1e-10, atol=1e-14, msg=name)


@double
def test_rows_are_clipped_to_a_norm_and_short_ones_left_alone(backend: str) -> None:
    problem = make_problem(NARROW_CASE, torch.float64, unit_norm=False)
    norms = gradient_truth(problem)[0]["W_enc"].norm(dim=-1)
    most = float(norms.median())
    assert 0 < int((norms > most).sum()) < norms.numel()
    old = problem.moments[0].clone()
    problem.run(backend, clip_rows=most)
    taken = ((problem.moments[0] - BETAS[0] * old) / (1 - BETAS[0])).norm(dim=-1)
    torch.testing.assert_close(taken, norms.clamp(max=most), rtol=1e-10, atol=1e-12)


# -- skip -------------------------------------------------------------------------------------------------------------

STORED = {"wide": None, "bf16": torch.bfloat16, "8 bit": torch.float8_e4m3fn}
"""How moments are stored. `8 bit` applies to the dictionaries' moments only."""


def stored_as(problem: Problem, optimizer: str, storage: str) -> Problem:
    """The problem with an optimizer's moments, in one of the ways to store them."""
    kept = len(reference.MOMENTS_OF[optimizer])
    moments = [m for i, m in enumerate(problem.moments) if i % 2 < kept]
    problem.settings |= {"optimizer": optimizer, "seed": 7}
    if storage == "8 bit":
        made = [reference.round_to_fp8(m, 7, torch.tensor(2), i, False) for i, m in enumerate(moments) if m.ndim == 2]
        problem.settings["scales"] = [m.scales for m in made]
        moments = [m.codes for m in made] + [m for m in moments if m.ndim == 1]
    elif storage == "bf16":
        moments = [m.bfloat16() for m in moments]
    problem.moments = moments
    return problem


def bits(problem: Problem, screen: Screen | None) -> list[Tensor]:
    """Copies of everything that an update may write, as bytes, so that NaN equals NaN and 8-bit moments compare."""
    held = [*problem.params.values(), *problem.moments, *problem.settings.get("scales", ())]
    held += [] if screen is None else screen.tensors
    return [t.clone().contiguous().reshape(-1).view(torch.uint8) for t in held]


SKIPPED = [
    (kind, storage, ragged)
    for kind, kept in reference.MOMENTS_OF.items()
    for storage in STORED
    for ragged in (False, True)
    if (kept or storage == "wide") and (kept == "mv" or storage != "8 bit")
]
INTERPRETED = [("adam", "wide", True), ("adam", "bf16", False), ("adamw", "8 bit", True), ("lion", "bf16", True),
               ("signsgd", "wide", False)]  # fmt: skip
"""Each optimizer, each way to store moments and both layouts; the interpreter takes a second for each."""


@pytest.mark.parametrize(
    ("optimizer", "storage", "ragged"),
    [
        pytest.param(
            *which,
            id=f"{which[0]}-{which[1]}-{'ragged' if which[2] else 'fixed'}",
            marks=[] if which in INTERPRETED else pytest.mark.long_interpreted,
        )
        for which in SKIPPED
    ],
)
@pytest.mark.parametrize("backend", truth.BACKENDS)
def test_a_skipped_update_changes_nothing(backend: str, optimizer: str, storage: str, ragged: bool) -> None:
    """The gradient is NaN, as after a loss that is not finite. With skip False, every bit is that of a plain call."""
    plain, kept = (
        stored_as(make_problem(NARROW_CASE, torch.float32, ragged=ragged), optimizer, storage) for _ in range(2)
    )
    W, b = kept.params["W_enc"], kept.params["b_enc"]
    screen = ops.prepare_screen(W, b, backend=backend)
    before = bits(kept, screen)
    good = kept.terms
    kept.terms = [replace(t, grad=torch.full_like(t.grad, torch.nan)) for t in good]
    stats = kept.run(backend, skip=torch.tensor(True), screen=screen)
    assert stats.shape == (4,)
    assert stats.dtype == torch.float64
    assert all(map(torch.equal, bits(kept, screen), before))

    kept.terms = good
    norms = kept.run(backend, skip=torch.tensor(True), norms_only=True)
    assert bool(norms.isfinite().all())
    assert torch.equal(norms, plain.run(backend, norms_only=True)), "norms_only writes nothing that could be skipped"

    fresh = ops.prepare_screen(plain.params["W_enc"], plain.params["b_enc"], backend=backend)
    plain.run(backend, screen=fresh)
    kept.run(backend, skip=torch.tensor(False), screen=screen)
    after = bits(kept, screen)
    assert not torch.equal(after[0], before[0])
    assert all(map(torch.equal, after, bits(plain, fresh)))


# -- what a GPU does not store ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("optimizer", "storage", "ragged"), INTERPRETED, ids=str)
@pytest.mark.parametrize("backend", truth.GPU)
def test_a_gpu_stores_no_gradient_of_a_dictionary(
    backend: str, optimizer: str, storage: str, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rule, the storage of moments and the parts, and for a global clip, which is two calls."""

    def refuse(*_: object) -> Tensor:
        raise AssertionError("the gradients were stored")

    monkeypatch.setattr(raw_ops, "update_storing_gradients", refuse)
    plain, clipped = (
        stored_as(
            with_parts(make_problem(NARROW_CASE, torch.float32, ragged=ragged), *(PARTS if every else ())),
            optimizer,
            storage,
        )
        for every in (False, True)
    )
    for problem in (plain, clipped):
        grads, _ = gradient_truth(problem)
        norms = problem.run(backend, norms_only=True)
        unscaled = reference.squared_norms(grads) / float(problem.settings.get("grad_scale", 1.0)) ** 2
        torch.testing.assert_close(norms, unscaled, rtol=1e-4, atol=1e-10)
        before = bits(problem, None)
        problem.run(backend)
        assert not torch.equal(bits(problem, None)[0], before[0])


@pytest.mark.parametrize("kind", [kind for kind in reference.MOMENTS_OF if kind != "adam"])
@pytest.mark.parametrize("backend", truth.GPU)
def test_every_rule_steps_the_sum_of_all_parts(backend: str, kind: str) -> None:
    problem = stored_as(make_problem(NARROW_CASE, torch.float32, ragged=True, aux=True), kind, "wide")
    problem.settings.pop("seed")
    problem.settings["weight_decay"] = 0.2
    check(with_parts(problem, *PARTS), backend)


@pytest.mark.parametrize("backend", truth.GPU)
def test_gradients_that_are_given_beside_terms_without(backend: str) -> None:
    """As a penalty beside AuxK: the other terms' are computed, in a term of narrower numbers too."""
    problem = make_problem(NARROW_CASE, torch.float32, aux=True)
    given, computed = problem.terms
    alone = replace(problem, terms=[given])
    give_dacts(alone)
    problem.terms = [*alone.terms, computed]
    check(problem, backend)


# -- order and threads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", truth.THREADED)
def test_parts_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    threads, runs = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            problem = with_parts(make_problem(HOT, torch.float32, aux=True), "dacts", *PARTS[2:])
            norms = problem.run(backend, norms_only=True)
            runs.append([norms, problem.run(backend), *problem.params.values(), *problem.moments])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


def test_batch_dimensions_of_a_code_are_those_of_its_gradient() -> None:
    flat, deep = (with_parts(make_problem(Case("even", 24, 12, 40, 3, BY_NAME["random"].make), torch.float32), "dacts")
                  for _ in range(2))  # fmt: skip
    term = deep.terms[0]
    assert term.dacts is not None
    codes: SparseCodes = term.codes.with_batch((4, 6))
    deep.terms = [UpdateTerm(codes, term.x, term.grad, dacts=term.dacts.view(4, 6, -1))]
    flat.run("reference")
    deep.run("reference")
    assert torch.equal(flat.params["W_enc"], deep.params["W_enc"])
