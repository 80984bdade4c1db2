"""A step never destroys a run: every rule, optimizer and structure, against hostile batches and states.

After any step all parameters, moments, counters and thresholds are finite. Either nothing changed and `skipped` was
counted, and the next batch gives the bits of a run that never saw the bad one; or the change is float64's.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastsae
from fastsae import FusedTrainStep, SparseAutoencoder, reference
from fastsae.model.resample import resample_
from fastsae.model.rules import Activation
from fastsae.training.batch import BatchTrainStep, SAEBatch
from fastsae.training.optimizers import OPTIMIZERS as FUSED
from fastsae.training.step import PlainTrainStep
from tests import truth

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::RuntimeWarning")]

D, M, N = 8, 16, 6
NAN, INF = float("nan"), float("inf")
RULES: dict[str, Activation] = {
    "topk": fastsae.TopK(3),
    "topk-all": fastsae.TopK(M),
    "batch_topk": fastsae.BatchTopK(3),
    "relu": fastsae.ReLU(0.3),
    "relu-target": fastsae.ReLU(target_l0=3.0),
    "jumprelu": fastsae.JumpReLU(0.1, threshold=0.3, bandwidth=0.2),
    "jumprelu-target": fastsae.JumpReLU(target_l0=3.0),
    "jumprelu-tanh": fastsae.JumpReLU(0.1, threshold=0.3, bandwidth=0.2, penalty_kind="tanh"),
    "gated": fastsae.Gated(0.2),
    "matryoshka": fastsae.Matryoshka(fastsae.TopK(3), groups=(4, 12)),
    "matryoshka-sampled": fastsae.Matryoshka(fastsae.BatchTopK(3), sampled=3, shortest=2),
    "hierarchical_topk": fastsae.HierarchicalTopK((1, 3)),
    "group_max": fastsae.GroupMax(4),
    "abs_topk": fastsae.AbsTopK(3),
}
OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "adam": (FusedTrainStep, {"optimizer": "adam"}),
    "adam-bf16": (FusedTrainStep, {"optimizer": "adam", "moments": "bf16"}),
    "adam-8bit": (FusedTrainStep, {"optimizer": "adam", "moments": "8bit"}),
    "adam-reference": (FusedTrainStep, {"optimizer": "adam", "backend": "reference"}),
    "adamw": (FusedTrainStep, {"optimizer": "adamw", "weight_decay": 0.1}),
    "lion": (FusedTrainStep, {"optimizer": "lion", "weight_decay": 0.1}),
    "signsgd": (FusedTrainStep, {"optimizer": "signsgd", "weight_decay": 0.1}),
    "torch-adam": (PlainTrainStep, {"optimizer": "adam"}),
    "torch-adamw": (PlainTrainStep, {"optimizer": "adamw", "weight_decay": 0.1}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {}, "aux_k": {"aux_k": 4}, "residual": {"ghost": "residual"}, "pull": {"ghost": "pull"},
    "tied": {"tied": True}, "skip": {"skip": True}, "layer_norm": {"normalize": "layer_norm"},
    "constant": {"normalize": "constant"}, "fvu": {"loss": "fvu"}, "free": {"decoder_norm": "free", "pre_bias": False},
}  # fmt: skip
LR = 1e-2
PAIRS = [
    *itertools.product(RULES, ["adam"], ["plain"]),
    *itertools.product(["topk", "jumprelu"], list(OPTIMIZERS)[1:], ["plain"]),
    *itertools.product(["topk", "jumprelu-target", "gated"], ["adam"], list(SETTINGS)[1:]),
    *itertools.product(["topk", "gated"], ["torch-adam"], ["skip", "aux_k"]),
]


def rows(n: int = N, seed: int = 0) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def spoilt(value: float) -> Tensor:
    x = rows()
    x[1, 2] = value
    return x


BATCHES: dict[str, Callable[[], Tensor]] = {
    **{f"{value}": lambda value=value: spoilt(value) for value in (NAN, INF, -INF, 3e38, 1e30, 1e19, 1e18, 1e10)},
    "all NaN": lambda: rows() * NAN, "all 1e30": lambda: rows() * 1e30, "tiny": lambda: rows() * 1e-30,
    "denormal": lambda: rows() * 1e-42, "zero": lambda: rows() * 0, "one token": lambda: rows()[:1],
    "one token repeated": lambda: rows()[:1].repeat(N, 1), "fp16": lambda: (rows() * 2e4).half(),
    "a constant column": lambda: torch.cat([rows()[:, 1:], torch.full((N, 1), 3.0)], 1),
}  # fmt: skip


class Run:
    """A small SAE and its step, which can be put back to where they were after two ordinary steps."""

    def __init__(self, rule: str, optimizer: str, settings: dict[str, Any], dtype: torch.dtype = torch.float32):
        sae = SparseAutoencoder(D, M, RULES[rule], seed=1, dtype=dtype, dead_after=10, **settings)
        with torch.no_grad():
            sae.b_dec.add_(0.1)
        sae.calibrate_(rows(50, 3).to(dtype))
        sae.train().start_(rows(50, 3).to(dtype))
        kind, options = OPTIMIZERS[optimizer]
        more = {} if optimizer in ("lion", "signsgd") else {"eps": 1e-4}
        self.sae, self.step, self.optimizer = sae, kind(sae, lr=LR, **more, **options), optimizer
        for seed in (10, 11):
            self.step(rows(seed=seed).to(dtype))
        self.start = self.state()
        self.share = sae.active_share

    def tensors(self) -> dict[str, Tensor]:
        found = dict(itertools.chain(self.sae.named_parameters(), self.sae.named_buffers()))
        names = {id(p): name for name, p in self.sae.named_parameters()}
        for p, state in self.step.optimizer.state.items():
            found |= {f"{key} of {names[id(p)]}": t for key, t in state.items()}
        return found

    def state(self) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.tensors().items()}

    @torch.no_grad()
    def put_back(self) -> None:
        for name, t in self.tensors().items():
            copy_(t, self.start[name])
        self.sae.active_share = self.share
        self.step.lr = LR
        if isinstance(self.step, PlainTrainStep):
            self.step.step = 2

    @property
    def skipped(self) -> int:
        return int(self.step.skipped)

    def not_finite(self) -> list[str]:
        return [name for name, t in self.tensors().items() if not bool(t.float().isfinite().all())]

    def changed(self, since: dict[str, Tensor]) -> list[str]:
        return [name for name, t in self.tensors().items() if not torch.equal(bits(t), bits(since[name]))]

    def in_float64(self, x: Tensor) -> dict[str, Tensor] | None:
        """The parameters after a step on x from the present state, in float64 by the reference; None: it makes none."""
        twin = copy.deepcopy(self.sae).double()
        options = {"optimizer": "adam", **OPTIMIZERS[self.optimizer][1], "moments": "fp32", "backend": "reference"}
        more = {} if self.optimizer in ("lion", "signsgd") else {"eps": 1e-4}
        step = FusedTrainStep(twin, lr=float(self.step.lr), **more, **options)
        for p, mine in zip(twin.parameters(), self.sae.parameters(), strict=True):
            state = self.step.optimizer.state[mine]
            for key, t in step.optimizer.state[p].items():
                held = state[key]
                if f"{key}_scale" in state:
                    held = reference.EightBit(held, state[f"{key}_scale"]).widened()
                t.copy_(held)
        step(x.double())
        return None if int(step.skipped) else {name: p.detach() for name, p in twin.named_parameters()}


def copy_(to: Tensor, what: Tensor) -> None:
    as_bits = to.dtype == torch.float8_e4m3fn
    (to.view(torch.uint8) if as_bits else to).copy_(what.view(torch.uint8) if as_bits else what)


def bits(t: Tensor) -> Tensor:
    return t.detach().reshape(-1).contiguous().view(torch.uint8)


def look_at(run: Run, x: Tensor, undisturbed: dict[str, Tensor] | None, what: str, exact: bool = True) -> list[str]:
    """One step on x, an ordinary one, and what is wrong then. undisturbed: the state after the ordinary one alone;
    None where x is ordinary and the state is not. exact: the change can be held against float64's.
    """
    before, skipped = run.state(), run.skipped
    expected = run.in_float64(x)
    metrics = run.step(x)
    made = run.skipped == skipped
    wrong = [f"{what}: {name} is not finite" for name in run.not_finite()]
    if int(metrics["skipped"]) != run.skipped:
        wrong.append(f"{what}: the metric says {int(metrics['skipped'])} skipped, the step {run.skipped}")
    if not made:
        wrong += [f"{what}: skipped, and {name} changed" for name in run.changed(before)]
    elif expected is None:
        wrong.append(f"{what}: a step was made that float64 does not make")
    elif exact:
        for name, p in run.sae.named_parameters():
            off = ((p.double() - expected[name]).abs() > 2e-3 * LR + 1e-6 * expected[name].abs()).double().mean()
            if float(off) > 0.03:  # the sign or the quotient of a gradient that is rounding alone
                wrong.append(f"{what}: {float(off):.0%} of {name} is not where float64 has it")
    if undisturbed is None:
        return wrong
    after = run.step(rows(seed=20))
    if not bool(after["loss"].isfinite()) or run.skipped != skipped + (not made):
        wrong.append(f"{what}: the ordinary batch after it has loss {float(after['loss'])}, skipped {run.skipped}")
    if not made:
        wrong += [
            f"{what}: the ordinary batch after it gives other bits of {name}" for name in run.changed(undisturbed)
        ]
    return wrong


@pytest.mark.long
@pytest.mark.parametrize(("rule", "optimizer", "settings"), PAIRS, ids=map("-".join, PAIRS))
def test_a_hostile_batch_changes_nothing_or_what_float64_says(rule: str, optimizer: str, settings: str) -> None:
    run = Run(rule, optimizer, SETTINGS[settings])
    run.step(rows(seed=20))
    undisturbed, wrong, skips = run.state(), [], 0
    for name, make in BATCHES.items():
        run.put_back()
        x, before = make(), run.skipped
        if settings == "fvu" and len(x) == 1:
            continue  # refused: its variance is 0
        wrong += look_at(run, x, undisturbed, name, exact=x.abs().max() < 1e15)
        skips += run.skipped > before
        if not bool(x.isfinite().all()) and run.skipped == before:
            wrong.append(f"{name}: the step was made")
    assert not wrong, "\n".join(wrong)
    assert skips < len(BATCHES), "every batch was skipped, ordinary ones too"


# -- states -----------------------------------------------------------------------------------------------------------


def fill_moments(run: Run, first: float, second: float, scale: float) -> None:
    """m and v as far as the dtype that they are kept in goes; scale: of v in 8 bits."""
    for state in run.step.optimizer.state.values():
        for key, t in state.items():
            if key.endswith("_scale"):
                t.fill_(scale if key == "exp_avg_sq_scale" else 1e-3)
            elif key != "step":
                value = second if key == "exp_avg_sq" else first
                most = torch.finfo(t.dtype).max
                copy_(t, torch.full(t.shape, max(-most, min(value, most)), dtype=torch.float64).to(t.dtype))


def set_bias(run: Run, value: float) -> None:
    run.sae.b_enc.fill_(value)


def all_dead(run: Run) -> None:
    run.sae.b_enc.fill_(-1e3)
    run.sae.tokens_since_fired.fill_(10**6)


def equal_rows(run: Run) -> None:
    run.sae.W_dec[1:4] = run.sae.W_dec[0]
    if run.sae.W_enc is not None:
        run.sae.W_enc[1:4] = run.sae.W_enc[0]


def every_weight_zero(run: Run) -> None:
    for p in run.sae.parameters():
        p.zero_()


def zero_row(run: Run) -> None:
    run.sae.W_dec[2] = 0


def set_rate(run: Run, lr: float) -> None:
    run.step.lr = lr


STATES: dict[str, Callable[[Run], None]] = {
    "v at its largest": lambda run: fill_moments(run, 0.1, INF, 7e35),
    "v beyond bfloat16": lambda run: fill_moments(run, 0.1, 3.4e38, 7e35),
    "moments denormal": lambda run: fill_moments(run, 1e-41, 1e-41, 1e-43),
    "v zero": lambda run: fill_moments(run, 1.0, 0.0, 1.0),
    "lr 0": lambda run: set_rate(run, 0.0),
    "lr 1e37": lambda run: set_rate(run, 1e37),
    "lr 1e300": lambda run: set_rate(run, 1e300),
    "all latents dead": all_dead,
    "duplicate rows": equal_rows,
    "a zero row": zero_row,
    "zero": every_weight_zero,
    "a bias of 1e30": lambda run: set_bias(run, 1e30),
    "biases of 3e38": lambda run: set_bias(run, 3e38),
}
STATE_PAIRS = [
    *itertools.product(RULES, ["adam"], ["plain"]),
    *itertools.product(["topk"], list(OPTIMIZERS)[1:], ["plain"]),
    *itertools.product(["topk", "gated"], ["adam"], ["aux_k", "residual", "pull", "tied", "free"]),
]


@pytest.mark.long
@pytest.mark.parametrize(("rule", "optimizer", "settings"), STATE_PAIRS, ids=map("-".join, STATE_PAIRS))
def test_a_hostile_state_is_no_worse_after_a_step(rule: str, optimizer: str, settings: str) -> None:
    run, wrong = Run(rule, optimizer, SETTINGS[settings]), []
    for name, spoil in STATES.items():
        run.put_back()
        with torch.no_grad():
            spoil(run)
        for seed in (20, 21):
            # float64 steps at rates and from moments that float32 does not.
            extreme = name.startswith(("lr 1e", "v at", "v beyond", "moments", "v zero", "biases", "a bias"))
            wrong += look_at(run, rows(seed=seed), None, name, exact=not extreme and seed == 20)
        if name in ("lr 0", "all latents dead", "duplicate rows", "a zero row", "zero", "v at its largest", "v zero"):
            skipped = run.skipped
            run.step(rows(seed=22))
            if run.skipped != skipped:
                wrong.append(f"{name}: an ordinary batch is skipped")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("moments", ["fp32", "bf16", "8bit"])
def test_a_rate_of_0_moves_no_weight_whatever_the_decay(moments: str) -> None:
    sae = SparseAutoencoder(D, M, fastsae.TopK(3), seed=1)
    step = FusedTrainStep(sae, lr=0.0, optimizer="adamw", weight_decay=0.5, moments=moments)
    before = copy.deepcopy(sae.state_dict())
    for seed in range(3):
        assert int(step(rows(seed=seed))["skipped"]) == 0
    for name, p in sae.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=5e-7)  # rows are renormalized


def test_bfloat16_moments_stay_finite_at_their_limit() -> None:
    top = torch.tensor([3.3895313892515355e38, 3.39e38, 3.4028e38, -3.4e38, INF, NAN])
    for seed in range(20):
        found = reference.round_to_bf16(top, seed, torch.tensor(1), 0).double()
        assert found[:4].abs().max() == torch.finfo(torch.bfloat16).max
        assert found[4] == INF
        assert bool(found[5].isnan())


@pytest.mark.parametrize(
    ("kind", "moments"), [*itertools.product(FUSED, ["bf16"]), ("adam", "8bit"), ("adamw", "8bit")]
)
@pytest.mark.parametrize("scale", [1e8, 1e10, 1e13, 1e18, 1e19, 1e20, 1e30, 1e60])
def test_float64_weights_with_narrow_moments(kind: str, moments: str, scale: float) -> None:
    """Gradients whose squares float64 holds, and bf16 and 8 bits do not, past 3e38."""
    sae = SparseAutoencoder(D, M, fastsae.TopK(3), dtype=torch.float64, decoder_norm="free", skip=True, seed=0)
    given: dict[str, Any] = {} if kind == "signsgd" else {"betas": (0.0, 0.0)}  # the moment is the last square
    if kind == "adam":
        given["clip_norm"] = 1.0
    optimizer = FUSED[kind](sae, lr=1e-3, moments=moments, **given)
    for steps, factor in enumerate((1.0, scale, 1.0)):
        before = {name: p.detach().clone() for name, p in sae.named_parameters()}
        (sae(rows(seed=steps).double()).loss * factor).backward()
        optimizer.step()
        held = [*sae.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
        assert all(bool(t.double().isfinite().all()) for t in held)
        moved = any(not torch.equal(p, before[name]) for name, p in sae.named_parameters())
        assert moved == bool(optimizer.made)
    assert int(optimizer.skipped) == (scale > 1e18 and kind != "signsgd")  # which keeps no moments


def test_an_eps_that_divides_0_by_0_is_refused() -> None:
    for kind in (FusedTrainStep, PlainTrainStep):
        with pytest.raises(ValueError, match=r"eps is 0\.0, expected at least .* would divide 0 by 0"):
            kind(SparseAutoencoder(D, M, fastsae.TopK(3)), lr=1e-3, eps=0.0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("settings", ["plain", "aux_k", "pull"])
def test_no_token_at_all(rule: str, settings: str) -> None:
    run = Run(rule, "adam", SETTINGS[settings])
    with pytest.raises(ValueError, match="an empty batch cannot train"):
        run.step(rows(0))
    assert not run.changed(run.start)
    run.sae(rows(0)).loss.backward()  # in a loop of one's own a step of momentum alone
    run.step.optimizer.step()
    assert not run.not_finite()
    assert bool(run.step(rows(seed=20))["loss"].isfinite())


@pytest.mark.parametrize("rule", ["topk", "relu", "jumprelu"])
def test_resampling_leaves_finite_rows(rule: str) -> None:
    run = Run(rule, "adam", {})
    x = torch.cat([rows(20), torch.stack([spoilt(value)[1] for value in (NAN, INF, 1e30)])])
    with torch.no_grad():
        all_dead(run)
    assert resample_(run.sae, x, run.step) == M
    assert not run.not_finite()
    torch.testing.assert_close(run.sae.W_dec.norm(dim=1), torch.ones(M))
    assert int(run.step(rows(seed=20))["skipped"]) == 0
    assert not run.not_finite()


# -- narrow types and other loops -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_float16_weights(rule: str) -> None:
    run, wrong = Run(rule, "adam", {}, torch.float16), []
    for name, make in BATCHES.items():
        run.put_back()
        before, skipped = run.state(), run.skipped
        run.step(make().half())
        wrong += [f"{name}: {of} is not finite" for of in run.not_finite()]
        if run.skipped > skipped:
            wrong += [f"{name}: skipped, and {of} changed" for of in run.changed(before)]
        if not bool(run.step(rows(seed=20).half())["loss"].isfinite()):
            wrong.append(f"{name}: the next loss is not finite")
    assert not wrong, "\n".join(wrong)


def test_torchs_adam_refuses_float16_weights() -> None:
    sae = SparseAutoencoder(D, M, fastsae.TopK(3)).half()
    with pytest.raises(ValueError, match="float16, and torch's Adam would keep its second moments in float16"):
        PlainTrainStep(sae, lr=1e-3)


@pytest.mark.parametrize("rule", ["topk", "batch_topk", "jumprelu", "gated"])
@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_and_a_scaler_that_overflows(rule: str, narrow: torch.dtype) -> None:
    """The scaler's first scale is too large for float32; and then a batch of its own is bad."""
    sae = Run(rule, "adam", {}).sae
    optimizer = fastsae.optim.Adam(sae, lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=1e37, backoff_factor=2**-8, growth_interval=1)

    def step(x: Tensor) -> bool:
        before = [p.detach().clone() for p in sae.parameters()]
        with torch.autocast("cpu", narrow):
            loss = sae(x).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert all(bool(p.isfinite().all()) for p in sae.parameters())
        return not all(map(torch.equal, before, sae.parameters()))

    assert not step(rows())
    made = [step(rows(seed=seed)) for seed in range(20)]
    assert not made[0]
    assert any(made[:18])
    assert not step(spoilt(NAN))
    assert not step(spoilt(1e30))
    assert any([step(rows(seed=seed)) for seed in range(10)])


@pytest.mark.parametrize("kind", [fastsae.optim.Adam, fastsae.optim.AdamW, fastsae.optim.Lion, fastsae.optim.SignSGD])
@pytest.mark.parametrize("rule", ["topk", "relu", "gated"])
def test_in_a_loop_of_ones_own_with_other_parameters(kind: type, rule: str) -> None:
    run = Run(rule, "adam", {})
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = kind([{"params": run.sae}, {"params": [other]}], lr=LR)
    for value in (NAN, INF, 1e30):
        before = [p.detach().clone() for p in (*run.sae.parameters(), other)]
        (run.sae(spoilt(value)).loss + (other * value).sum()).backward()
        optimizer.step()
        assert all(map(torch.equal, before, (*run.sae.parameters(), other))), value
        run.sae(rows(seed=20)).loss.backward()
        optimizer.step()
        assert all(bool(p.isfinite().all()) for p in (*run.sae.parameters(), other))
        states = [t for state in optimizer.state.values() for t in state.values()]
        assert all(bool(t.float().isfinite().all()) for t in states)
    assert int(optimizer.skipped) == 6  # of each group


BATCH_RULES = ["topk", "batch_topk", "relu", "jumprelu", "gated", "matryoshka", "group_max", "abs_topk"]


@pytest.mark.parametrize("rule", BATCH_RULES)
@pytest.mark.parametrize("value", [NAN, INF, 1e30, 1e19])
def test_one_of_many_saes_skips_and_the_others_go_on(rule: str, value: float) -> None:
    """A bad token in the rows of the second of three SAEs; and then one in rows that all share."""

    def made() -> tuple[SAEBatch, BatchTrainStep]:
        batch = SAEBatch(3, D, M, RULES[rule], dead_after=10)
        return batch, BatchTrainStep(batch, lr=LR, eps=1e-4)

    def state(batch: SAEBatch, step: BatchTrainStep) -> list[Tensor]:
        moments = [t for held in step.optimizer.state.values() for name, t in held.items() if name != "step"]
        buffers = [t for name, t in batch.named_buffers() if name != "ks"]
        return [t.detach().clone() for t in (*batch.parameters(), *buffers, *moments)]

    (batch, step), (clean, clean_step) = made(), made()
    x = torch.stack([rows(seed=seed) for seed in range(3)])
    for one in (step, clean_step):
        one(x)
    before = state(batch, step)
    bad = x.clone()
    bad[1] = spoilt(value)
    assert step(bad)["skipped"].tolist() == [0, 1, 0]
    clean_step(x)
    for t, old, fresh in zip(state(batch, step), before, state(clean, clean_step), strict=True):
        assert torch.equal(t[1], old[1])
        torch.testing.assert_close(t[[0, 2]], fresh[[0, 2]])
    before = state(batch, step)
    assert step(spoilt(value))["skipped"].tolist() == [1, 2, 1]
    assert all(map(torch.equal, state(batch, step), before))
    assert bool(step(x)["loss"].isfinite().all())


# -- NaN in, NaN out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("backend", [name for name in truth.BACKENDS if name != "triton" or torch.cuda.is_available()])
def test_nan_in_nan_out_and_the_other_tokens_as_without(rule: str, backend: str) -> None:
    """Tokens with one number that is none, and tokens of nothing else, of each kind."""
    good = torch.ones(13, dtype=torch.bool)
    one, whole = [1, 4, 9], [2, 7, 12]
    good[one + whole] = False
    x, values = rows(13, 4), torch.tensor([NAN, INF, -INF])
    y = x.clone()
    y[one, 3], y[whole] = values, values[:, None]
    every: list[dict[str, Any]] = [
        {},
        {"normalize": "layer_norm"},
        {"normalize": "constant"},
        {"skip": True},
        {"tied": True},
    ]
    if backend == "cuda" and not torch.cuda.is_available():
        every = [{}]  # emulated kernels are slow, and around them these settings are torch's own operations
    for settings in every:
        sae = Run(rule, "adam", settings).sae
        sae.backend = backend
        for training in (True, False):
            sae.train(training)
            with torch.no_grad():
                alone, out, codes = sae(x[good]), sae(y), sae.encode(y)
                assert bool(out.recon[~good].isnan().all())
                assert not bool(codes.to_dense()[~good].isfinite().all(-1).any())
                assert bool(sae.decode(codes, like=y)[~good].isnan().all())
                torch.testing.assert_close(out.recon[good], alone.recon)
                torch.testing.assert_close(out.codes.to_dense()[good], alone.codes.to_dense())


@pytest.mark.parametrize("rule", BATCH_RULES)
def test_nan_in_nan_out_of_many_saes(rule: str) -> None:
    good = torch.ones(9, dtype=torch.bool)
    good[[2, 7]] = False
    batch, x = SAEBatch(2, D, M, RULES[rule]), rows(9, 4)
    with torch.no_grad():
        for training in (True, False):
            alone = batch.train(training)(x[good])
            for value in (NAN, INF, -INF):
                y = x.clone()
                y[2, 3], y[7] = value, value
                out = batch(y)
                assert bool(out.recon[:, ~good].isnan().all())
                torch.testing.assert_close(out.recon[:, good], alone.recon)


@pytest.mark.parametrize("rule", RULES)
def test_the_dense_truth_gives_nan_for_nan(rule: str) -> None:
    sae = SparseAutoencoder(D, M, RULES[rule], seed=1, dtype=torch.float64).eval()
    params = {name: p.detach() for name, p in sae.named_parameters()}
    state = {name: params[name] for name in sae.rule_parameters}
    found = reference.forward(params, spoilt(NAN).double(), sae.rule, {**dict(sae.named_buffers()), **state})
    assert bool(found.recon[1].isnan().all())
    assert bool(found.recon[[0, 2, 3, 4, 5]].isfinite().all())


def test_layer_norm_of_float16_activations_of_some_hundreds() -> None:
    x = rows() * 1000
    sae = SparseAutoencoder(D, M, fastsae.TopK(3), seed=1, normalize="layer_norm")
    half = copy.deepcopy(sae).half()
    found, wanted = half.inputs(x.half()).x, sae.inputs(x).x
    torch.testing.assert_close(found.float(), wanted, rtol=5e-3, atol=5e-3)
    assert bool(sae(x * 1e19).recon.isnan().all())  # its variance overflows: NaN, not a token of zeros


@pytest.mark.parametrize("rule", ["topk", "jumprelu", "gated"])
def test_a_steered_token_that_is_no_number_stays_none(rule: str) -> None:
    class Finite(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nan_to_num(x, nan=1.0, posinf=1.0)

    model = torch.nn.Sequential(torch.nn.Identity(), Finite())
    sae = Run(rule, "adam", {}).sae.eval()
    with torch.no_grad():
        for bad in (NAN, INF):
            x = spoilt(bad)
            with fastsae.steer(model, ("0", "1"), sae, {3: 0.5}):  # reads what is bad; what it writes to is finite
                out = model(x)
            assert bool(out[1].isnan().all())
            assert bool(out[[0, 2, 3, 4, 5]].isfinite().all())
            with fastsae.splice(model, ("0", "1"), sae):
                spliced = model(x)
            assert bool(spliced[1].isnan().all())
            assert bool(spliced[[0, 2, 3, 4, 5]].isfinite().all())
