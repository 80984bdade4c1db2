"""The part "modules": modules, training steps and optimizers of random rules, structures, dtypes and settings, given
hostile batches while torch's settings change.

Each call must raise an error of fastsae in words and change nothing, or give what dense.py gives. Whatever was in the
batch, parameters, moments and counters stay finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastsae
from bench.hostile import dense, spoil
from bench.hostile.calls import Draw
from bench.hostile.dense import Before, Step, Tensors
from bench.hostile.ops import bits_of
from bench.hostile.run import ERRORS, Found, judge_raised
from bench.hostile.truth import Wrong, require, roundoff
from fastsae import SparseAutoencoder, reference
from fastsae.model.parameters import EXTRA_STATE
from fastsae.model.rules import Activation
from fastsae.training.optimizers import OPTIMIZERS
from fastsae.training.step import FusedTrainStep, PlainTrainStep

Compute = Callable[[Tensors], Tensors]
KINDS = ("forward", "fused", "plain", "optimizer", "batch")
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float64, torch.float16)
HARMS = {name: harm for name, harm in spoil.TENSOR.items() if "memory" not in name}
"""A tensor without memory ends a process in torch's own arithmetic, before any of ours."""
BAD: tuple[dict[str, Any], ...] = (
    {"d_in": 0}, {"d_in": 2.5}, {"d_in": True}, {"d_sae": -3}, {"d_sae": "7"}, {"d_sae": None}, {"activation": "topk"},
    {"activation": None}, {"d_out": 0}, {"d_out": "3"}, {"pre_bias": 1}, {"tied": "no"}, {"decoder_norm": "Unit"},
    {"normalize": "batch"}, {"layers": 0}, {"layers": 7}, {"init_norm": float("nan")}, {"init_norm": 0.0},
    {"init_norm": "1"}, {"aux_k": 0}, {"aux_k": 10**6}, {"aux_k": 1.5}, {"aux_coef": -1.0}, {"aux_coef": None},
    {"ghost": "push"}, {"ghost_coef": float("inf")}, {"dead_after": 0}, {"dead_after": 1e7}, {"loss": "l2"},
    {"dtype": torch.int32}, {"dtype": "float32"}, {"rule_dtype": torch.float16}, {"device": "moon"}, {"seed": "x"},
    {"surprise": 1},
)  # fmt: skip
BAD_STEPS: tuple[dict[str, Any], ...] = (
    {"lr": -1.0}, {"lr": float("nan")}, {"lr": "fast"}, {"lr": None}, {"betas": (0.9,)}, {"betas": (1.0, 0.9)},
    {"betas": 0.9}, {"eps": -1.0}, {"eps": None}, {"weight_decay": -0.1}, {"weight_decay": "x"}, {"clip_norm": 0.0},
    {"clip_norm": float("nan")}, {"optimizer": "sgd"}, {"optimizer": None},
)  # fmt: skip


def case(kind: str, seed: int, number: int, backend: str | None) -> tuple[str, Callable[[], Found]]:
    draw = Draw(f"modules/{kind}", seed, number)
    settings, bad = (_batch_settings if kind == "batch" else _settings)(draw)
    said: list[str] = [f"{kind} of " + ", ".join(f"{k}={v!r}" for k, v in settings.items())]

    def run() -> Found:
        try:
            return RUNS[kind](draw, settings, bad, backend, said)
        except Wrong as wrong:
            return Found("wrong", f"{'; '.join(said[1:])}: {wrong}")

    return said[0], run


# -- what is drawn -----------------------------------------------------------------------------------------------------


def _rule(draw: Draw, M: int) -> Activation:
    k = int(draw.rng.integers(1, min(M, 6) + 1))
    cut = sorted({*draw.rng.integers(1, M, 2).tolist(), M} if M > 1 else {M})
    groups = tuple(end - start for start, end in zip([0, *cut], cut, strict=False))
    inner = draw.of((fastsae.TopK(k), fastsae.BatchTopK(k)))
    kinds = ("l0", "tanh", "target")
    of_kind = draw.of(kinds)
    groups_of_one = draw.of(n for n in (1, 2, 3, 8) if M % n == 0)
    return draw.of([
        fastsae.TopK(k), fastsae.TopK(k), fastsae.BatchTopK(k), fastsae.GroupMax(groups_of_one),
        fastsae.ReLU(0.3, weighted=draw.chance(0.5)), fastsae.ReLU(target_l0=min(4.0, M / 2)),
        fastsae.JumpReLU(0.1, threshold=0.3, bandwidth=draw.of((0.2, 0.8)), penalty_kind=of_kind,
                         target_l0=min(4.0, M / 2) if of_kind == "target" else None),
        fastsae.Gated(0.2, weighted=draw.chance(0.5)),
        fastsae.Matryoshka(inner, groups=groups), fastsae.Matryoshka(inner, sampled=3, shortest=min(M, 2)),
        fastsae.HierarchicalTopK(tuple(sorted({int(n) for n in draw.rng.integers(1, min(M, 8) + 1, 3)}))),
    ])  # fmt: skip


def _settings(draw: Draw) -> tuple[dict[str, Any], bool]:
    """Arguments of a SparseAutoencoder, and whether one of them is bad."""
    D, M = draw.of((1, 2, 3, 8, 16, 17)), draw.of((1, 2, 5, 16, 33, 64))
    given: dict[str, Any] = {"d_in": D, "d_sae": M, "activation": _rule(draw, M), "dtype": draw.of(DTYPES), "seed": 1}
    wide = draw.chance(0.15)
    tied = not wide and draw.chance(0.2)
    options: dict[str, Any] = {
        "tied": tied, "pre_bias": False if wide else draw.of((None, True, False)),
        "decoder_norm": draw.of(("unit", "free")), "normalize": draw.of((None, "none", "constant", "layer_norm")),
        "skip": draw.chance(0.2), "layers": 2 if D % 2 == 0 and not wide and draw.chance(0.2) else 1,
        "loss": draw.of(("mse", "mse", "fvu")), "dead_after": draw.of((3, 40, 10**7)),
        "aux_k": int(draw.rng.integers(1, min(M, 5) + 1)) if draw.chance(0.3) else None,
        "rule_dtype": torch.float64 if draw.chance(0.1) else torch.float32,
    }  # fmt: skip
    if wide:
        options["d_out"] = draw.of([n for n in (1, 2, 5, 9) if n != D])
    elif options["aux_k"] is None and draw.chance(0.3):
        options["ghost"] = draw.of(("residual", "pull"))
    if not (tied and options["decoder_norm"] == "unit"):
        options["init_norm"] = draw.of((1.0, 0.3))
    defaults = {"tied": False, "pre_bias": None, "normalize": None, "skip": False, "layers": 1, "aux_k": None}
    given |= {name: value for name, value in options.items() if value != defaults.get(name, "?")}
    bad = draw.chance(0.08)
    return given | (draw.of(BAD) if bad else {}), bad


def _batch_settings(draw: Draw) -> tuple[dict[str, Any], bool]:
    D, M, n = draw.of((1, 3, 8)), draw.of((2, 5, 16)), draw.of((1, 2, 3))
    rule = _rule(draw, M)
    if isinstance(rule, fastsae.TopK) and draw.chance(0.5):
        rules: Any = [replace(rule, k=int(k)) for k in draw.rng.integers(1, rule.k + 1, n)]
    else:
        rules = rule
    given = {
        "n": n, "d_in": D, "d_sae": M, "activation": rules, "pre_bias": draw.chance(0.5),
        "loss": draw.of(("mse", "fvu")),
        "decoder_norm": draw.of(("unit", "forward", "free")), "encoder_norm": draw.of(("free", "forward")),
        "dtype": draw.of((torch.float32, torch.float64)),
    }  # fmt: skip
    bad = draw.chance(0.08)
    return given | (draw.of(({"n": 0}, {"encoder_norm": "unit"}, {"seeds": (1,) * 9}, *BAD[:11])) if bad else {}), bad


def _tensor(draw: Draw, batch: tuple[int, ...], width: int, dtype: torch.dtype) -> tuple[str, Any]:
    """A batch, spoiled or not, and in which way."""
    t = draw.randn((*batch, width), dtype)
    if draw.chance(0.55):
        return "", t
    if draw.chance(0.5):
        name = draw.of(spoil.FLOATS)
        return name, spoil.FLOATS[name](draw, t)
    name = draw.of(HARMS)
    try:
        return name, HARMS[name](t)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return "", t  # torch has no such tensor


def _batch(draw: Draw, module: Any, dtype: torch.dtype, said: list[str]) -> tuple[Any, Any, str, bool]:
    """x, target, torch's setting while they are used, and whether all of it is as it should be."""
    N = draw.of((0, 1, 2, 3, 5, 9, 20, 20))
    batch = (2, N) if draw.chance(0.1) and not isinstance(module, fastsae.SAEBatch) else (N,)
    taken = dtype if draw.chance(0.8) else draw.of(DTYPES)
    harm, x = _tensor(draw, batch, module.d_in, taken)
    wants = module.d_out != module.d_in
    harm_of_target, target = "", None
    if wants or draw.chance(0.15):
        harm_of_target, target = _tensor(draw, batch, module.d_out, taken)
    setting = draw.of(spoil.SETTINGS) if draw.chance(0.3) else "as it is"
    said.append(
        f"x {taken} {batch} {harm or 'as it should be'}, target {harm_of_target or target is not None}, {setting}"
    )
    fine = not harm and not harm_of_target and setting not in ("inference_mode", "no_grad") and N > 1
    return x, target, setting, fine


def _moved(draw: Draw, module: Any) -> None:
    """Every parameter in general position, some of them dead."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * draw.randn(tuple(p.shape), p.dtype))
        module.tokens_since_fired[..., ::3] = 50


def _sae(draw: Draw, settings: dict[str, Any], bad: bool, backend: str | None) -> SparseAutoencoder | Found:
    """The module, ready to train; or what came of settings that it does not take."""
    try:
        sae = SparseAutoencoder(**settings)
    except ERRORS as error:
        return judge_raised(error) if bad else Found("wrong", f"refused good settings: {error}")
    _moved(draw, sae)
    sae.normalize_decoder_()
    sample = draw.randn((40, sae.d_in), torch.float32).to(sae.W_dec.dtype)
    sae.calibrate_(sample)
    wide = draw.randn((40, sae.d_out), torch.float32).to(sae.W_dec.dtype) if sae.d_out != sae.d_in else None
    sae.start_(sample, wide)
    sae.backend = backend or draw.of((None, None, "reference"))
    return sae


# -- one call ----------------------------------------------------------------------------------------------------------


def floating(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested dicts and lists, by where they are; settings are none."""
    if name.endswith(EXTRA_STATE):
        return
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from floating(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from floating(item, f"{name}[{i}]")


def _stays_finite(held: Callable[[], dict[str, Any]]) -> None:
    for name, t in floating(held()):
        require(_is_finite(t), f"{name[1:]} is not finite after the call")
        require("since_fired" not in name or bool((t >= 0).all()), f"{name[1:]} is {t.tolist()}")


def _is_finite(t: Tensor) -> bool:
    return bool((t.float() if t.itemsize == 1 else t).isfinite().all())  # torch knows no infinite 8-bit floats


def attempt(held: Callable[[], dict[str, Any]], setting: str, fine: bool, act: Callable[[], Any]) -> Any:
    """What act() returns; or a Found where it raised. An error must leave what is held as it is, bit for bit."""
    before = {name: bits_of(t) for name, t in floating(held())}
    try:
        with spoil.under(setting):
            return act()
    except ERRORS as error:
        after = {name: bits_of(t) for name, t in floating(held())}
        changed = [name[1:] for name in before.keys() & after.keys() if before[name] != after[name]]
        require(not changed, f"changed {', '.join(changed[:5])} and raised {type(error).__name__}: {error}")
        found = judge_raised(error)
        require(not (fine and found.verdict == "refused"), f"refused what is fine: {type(error).__name__}: {error}")
        return found


def _computed_in(dtype: torch.dtype, setting: str) -> torch.dtype:
    """Under autocast torch's own products, such as the skip connection's, are narrower."""
    narrow = spoil.AUTOCAST.get(setting)
    return dtype if narrow is None or dtype == torch.float16 else torch.bfloat16


def _as_read(t: Any, width: int, dtype: torch.dtype) -> Tensor:
    """The values of a batch as the module reads them: float64 (N, width)."""
    t = t.inner if isinstance(t, spoil.Wrapped) else t
    with torch.inference_mode(False):
        return t.detach().as_subclass(Tensor).clone().to(dtype).to(torch.float64).reshape(-1, width)


def _of_forward(sae: SparseAutoencoder, before: Before) -> Compute:
    def compute(v: Tensors) -> Tensors:
        return dense.forward(sae, before, {n: v[n] for n in before.params}, v["x"], v.get("target"))

    return compute


def _of_step(sae: SparseAutoencoder, rule: Step, before: Before, moments: Mapping[str, Any], count: int) -> Compute:
    def compute(v: Tensors) -> Tensors:
        def loss(p: Tensors) -> Tensor:
            return dense.forward(sae, before, p, v["x"], v.get("target"))["loss"]

        with torch.enable_grad():
            return rule({n: v[n] for n in before.params}, loss, moments, count, sae.decoder_norm == "unit")

    return compute


def _forward(draw: Draw, settings: dict[str, Any], bad: bool, backend: str | None, said: list[str]) -> Found:
    sae = _sae(draw, settings, bad, backend)
    if isinstance(sae, Found):
        return sae
    sae.train(draw.chance(0.6))
    last = Found("right")
    for _ in range(draw.of((1, 2))):
        x, target, setting, fine = _batch(draw, sae, sae.W_dec.dtype, said)
        fine = fine and (sae.loss == "mse" or x.shape[0] > 1)
        before, bits = Before.of(sae), {name: bits_of(t) for name, t in floating(sae.state_dict())}
        out = attempt(sae.state_dict, setting, fine, partial(sae, x, target))
        if isinstance(out, Found):
            last = out
            continue
        require(
            {n: bits_of(t) for n, t in floating(sae.state_dict())} == bits, "a forward pass changed the module's state"
        )
        dtype = sae.W_dec.dtype
        got = {**{name: t for name, t in out.losses.items()}, "loss": out.loss, "recon": out.recon.flatten(0, -2)}
        values = {"x": _as_read(x, sae.d_in, dtype)}
        if target is not None:
            values["target"] = _as_read(target, sae.d_out, dtype)
        known = torch.stack([dense.moderate(t) for t in values.values()]).all(0)
        if not bool(known.all()):
            # Each token by itself: what is wrong with one is no matter of the others.
            if not bool(known.any()) or isinstance(getattr(sae.rule, "inner", sae.rule), fastsae.BatchTopK):
                continue
            got = {"recon": got["recon"][known]}
            values = {name: t[known] for name, t in values.items()}
        if not dense.divides(sae.loss, values.get("target", values["x"])):
            continue
        if sae.norm.mode == "layer_norm" and sae.d_in < 4:
            continue  # tokens of two numbers become ±1, and their variance is rounding
        compute = _of_forward(sae, before)
        # recon is the target and its error, so it is rounded where the target is.
        largest = max(values["target"].abs().flatten().tolist(), default=0.0) if "target" in values else 0.0
        rounded = 4 * roundoff(_computed_in(dtype, setting)) * largest
        with torch.inference_mode(False):
            dense.agree(
                {n: t.clone() for n, t in got.items()},
                compute,
                before.params | values,
                draw,
                _computed_in(dtype, setting),
                rounded,
            )
        last = Found("right")
    return last


# -- training ----------------------------------------------------------------------------------------------------------


def _step_settings(draw: Draw, kind: str) -> tuple[dict[str, Any], bool]:
    """Arguments of a step or an optimizer, and whether one is bad."""
    ours = kind in ("fused", "optimizer")
    name = draw.of(("adam", "adam", "adamw", "lion", "signsgd") if ours else ("adam", "adamw"))
    given: dict[str, Any] = {"optimizer": name, "lr": draw.of((1e-3, 1e-2, 0.1))}
    if name != "adam":
        given["weight_decay"] = draw.of((0.0, 0.1))
    if name in ("adam", "adamw"):
        given |= {"betas": draw.of(((0.9, 0.999), (0.0, 0.9))), "eps": draw.of((1e-3, 1e-2, 0.1))}
    elif name == "lion":
        given["betas"] = (0.9, 0.99)
    if kind != "batch" and draw.chance(0.3):
        given["clip_norm"] = draw.of((0.01, 1.0))
    if ours:
        if "clip_norm" not in given and draw.chance(0.2):
            given["clip_rows"] = 0.1
        given["moments"] = draw.of(("fp32", "fp32", "bf16", "8bit") if name in ("adam", "adamw") else ("fp32", "bf16"))
    if kind == "fused":
        given |= draw.of(({}, {"dense_above": 0.0}, {"dense_above": 1.0}))
    bad = draw.chance(0.06)
    fits = [one for one in BAD_STEPS if set(one) <= set(given) and not (kind == "optimizer" and "optimizer" in one)]
    return given | (draw.of(fits) if bad else {}), bad


def _moments(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer) -> tuple[dict[str, list[Tensor]], int]:
    """Of each parameter in float64, and the number of steps so far."""
    found, count = {}, 0
    for name, p in sae.named_parameters():
        state = optimizer.state.get(p, {})
        count = max(count, int(state["step"])) if "step" in state else count
        kept = [(key, state[key]) for key in ("exp_avg", "exp_avg_sq") if key in state]
        found[name] = [
            (reference.EightBit(t, state[f"{key}_scale"]).widened() if f"{key}_scale" in state else t).to(
                torch.float64, copy=True
            )
            for key, t in kept
        ]
    return {name: moments for name, moments in found.items() if moments}, count


def _train(kind: str) -> Callable[..., Found]:
    def run(draw: Draw, settings: dict[str, Any], bad: bool, backend: str | None, said: list[str]) -> Found:
        sae = _sae(draw, settings, bad, backend)
        if isinstance(sae, Found):
            return sae
        given, bad = _step_settings(draw, kind)
        bad = bad or (kind == "plain" and sae.W_dec.dtype == torch.float16)
        said.append(", ".join(f"{k}={v!r}" for k, v in given.items()))
        made = attempt(sae.state_dict, "as it is", not bad, lambda: _maker(kind, sae, given))
        if isinstance(made, Found):
            return made
        optimizer, step = made
        names = {f.name for f in Step.__dataclass_fields__.values()}
        rule = Step(
            given["optimizer"], **{k: v for k, v in given.items() if k in names}, undecayed=tuple(sae.rule_parameters)
        )

        def held() -> dict[str, Any]:
            return {"sae": sae.state_dict(), "optimizer": optimizer.state_dict()["state"]}

        def unless_counted() -> dict[str, Any]:
            """What a refused step leaves: in a loop of one's own the backward pass has counted before it."""
            return held() if kind != "optimizer" else held() | {"sae": dict(sae.named_parameters())}

        last = Found("right")
        for _ in range(draw.of((1, 2, 3))):
            x, target, setting, fine = _batch(draw, sae, sae.W_dec.dtype, said)
            before, (moments, count) = Before.of(sae), _moments(sae, optimizer)
            sae.train()
            out = attempt(unless_counted, setting, fine, partial(step, x, target))
            if isinstance(out, Found):
                last = out
                continue
            _stays_finite(held)
            last = Found("right")
            values = {"x": _as_read(x, sae.d_in, sae.W_dec.dtype)}
            if target is not None:
                values["target"] = _as_read(target, sae.d_out, sae.W_dec.dtype)
            if not all(bool(dense.moderate(t).all()) for t in values.values()):
                continue
            if not dense.divides(sae.loss, values.get("target", values["x"])):
                continue
            if not all(bool(t.isfinite().all()) and float(t.abs().max()) < 1e3 for t in before.params.values()):
                continue
            compute = _of_step(sae, rule, before, moments, count + 1)
            got = {name: p.detach().clone() for name, p in sae.named_parameters()}
            dense.agree(got, compute, before.params | values, draw, _computed_in(sae.W_dec.dtype, setting), rule.turns)
        return last

    return run


def _maker(
    kind: str, sae: SparseAutoencoder, given: dict[str, Any]
) -> tuple[torch.optim.Optimizer, Callable[[Any, Any], Any]]:
    """An optimizer, and what makes one step by it."""
    if kind == "plain":
        plain = PlainTrainStep(sae, **given)
        return plain.optimizer, plain
    if kind == "fused":
        fused = FusedTrainStep(sae, **given)
        return fused.optimizer, fused
    rest = {name: value for name, value in given.items() if name != "optimizer"}
    optimizer = OPTIMIZERS[given["optimizer"]](sae, **rest)

    def step(x: Any, target: Any) -> None:
        try:
            sae(x, target).loss.backward()
            optimizer.step()
        finally:
            optimizer.zero_grad()

    return optimizer, step


def _in_batch(draw: Draw, settings: dict[str, Any], bad: bool, backend: str | None, said: list[str]) -> Found:
    try:
        batch = fastsae.SAEBatch(**settings)
    except ERRORS as error:
        return judge_raised(error)  # many rules do not fit a batch
    _moved(draw, batch)
    given, bad = _step_settings(draw, "batch")
    bad = bad or settings["dtype"] == torch.float16
    said.append(", ".join(f"{k}={v!r}" for k, v in given.items()))
    made = attempt(batch.state_dict, "as it is", not bad, lambda: fastsae.BatchTrainStep(batch, **given))
    if isinstance(made, Found):
        return made
    names = set(Step.__dataclass_fields__)
    rule = Step(given["optimizer"], **{k: v for k, v in given.items() if k in names})

    def held() -> dict[str, Any]:
        return {"batch": batch.state_dict(), "optimizer": made.optimizer.state_dict()["state"]}

    x, target, setting, fine = _batch(draw, batch, settings["dtype"], said)
    if target is not None:
        fine = False
    before = Before.of(batch)
    out = attempt(held, setting, fine, lambda: made(x, target))
    if isinstance(out, Found):
        return out
    _stays_finite(held)
    if target is not None or x.ndim != 2:
        return Found("right")
    values = {"x": _as_read(x, batch.d_in, settings["dtype"])}
    if not bool(dense.moderate(values["x"]).all()) or not dense.divides(batch.loss, values["x"]) or x.shape[0] < 2:
        return Found("right")

    def compute(v: dict[str, Tensor]) -> dict[str, Tensor]:
        def loss(p: dict[str, Tensor]) -> Tensor:
            each = [dense.batch_forward(batch, i, before, p, v["x"], v)["loss"] for i in range(len(batch))]
            return torch.stack(each).sum()

        with torch.enable_grad():
            return rule({n: v[n] for n in before.params}, loss, {}, 1, batch.decoder_norm == "unit")

    got = {name: p.detach().clone() for name, p in batch.named_parameters()}
    inputs = before.params | values | dense.unit_factors(batch)
    dense.agree(got, compute, inputs, draw, _computed_in(settings["dtype"], setting))
    return Found("right")


RUNS: dict[str, Callable[..., Found]] = {
    "forward": _forward, "fused": _train("fused"), "plain": _train("plain"), "optimizer": _train("optimizer"),
    "batch": _in_batch,
}  # fmt: skip
