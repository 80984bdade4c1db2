"""The language model's loss when reconstructions replace its activations.

    CE   mean over predictions of -log p(next token), in nats
    KL   mean over predictions of Σ_v p(v) log(p(v) / q(v)), p of the untouched model, q of the changed one
    recovered over an ablation = (CE_ablation - CE_spliced) / (CE_ablation - CE_untouched)

The share is undefined if the ablation has no measurable cost on these predictions: if its cost, the divisor, is not
above twice its standard error over the predictions (taken as independent). Near a divisor of 0 the share could be any
number, of either sign, and if the ablation lowers the cross-entropy it has no meaning.

Two ablations: the activations are replaced by 0, or by their mean. The mean is the fairer one if activations lie far
from 0: zeroing a residual stream breaks the model altogether, and almost any SAE recovers nearly all of that. Both
change exactly the tokens that the splice changes, chosen by the untouched model's activations. Every token of a
window but the last predicts the next one.

Four passes of the model over every window; logits of one batch of windows twice, log-probabilities in float64 of a few
tokens at a time.
Source: Bricken et al. (2023, "Towards Monosemanticity"), loss recovered; Gao et al. (2024), on its baselines.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsae.data.filters import in_windows
from fastsae.data.hooks import HookedModel, device_of, find, run
from fastsae.data.models import LanguageModel
from fastsae.data.padding import is_text, masked, trimmed
from fastsae.data.splice import Edit, Site, Where, check_apart, edited, splice, where_of
from fastsae.progress import bar

if TYPE_CHECKING:
    from fastsae.model.sae import SparseAutoencoder

LOGITS = 1 << 25
"""Numbers in one batch's logits at most, about: 134 MB in fp32, and twice that is held."""
CHUNK = 1 << 22
"""Numbers in one piece of float64 log-probabilities, about: 34 MB, a few at a time."""


@dataclasses.dataclass(frozen=True)
class SplicedLoss:
    """What `spliced_loss` measures; cross-entropies and divergences in nats per prediction."""

    hooks: tuple[str, ...]
    """The places, as the model names them; of a transcoder "where it reads -> what it replaces"."""
    n_windows: int
    window: int
    n_predictions: int
    replaced_share: float
    """Share of all tokens at which the activation was replaced, over all hooks; the others kept the model's own."""
    special: str
    """Which tokens these are."""
    mean_of: str
    """Of which activations the mean ablation takes the mean."""
    ce_untouched: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    kl_spliced: float
    kl_zero: float
    kl_mean: float
    recovered_over_zero: float
    """1: as good as the untouched model; 0: as bad as zero ablation. NaN where it is `undefined`."""
    recovered_over_mean: float
    """The same over mean ablation."""
    undefined: dict[str, str] = dataclasses.field(default_factory=dict)
    """{"recovered_over_zero": why it is undefined, ...}; empty where both are defined."""

    def to_json(self) -> dict[str, Any]:
        """A dictionary for json.dumps; an undefined value is null."""
        record = {**dataclasses.asdict(self), "hooks": list(self.hooks)}
        return {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}


def spliced_loss(
    model: nn.Module | LanguageModel,
    hooks: Mapping[Site, SparseAutoencoder],
    token_ids: Tensor,
    *,
    where: Where | Mapping[Site, Where] | None = None,
    means: Mapping[Site, Tensor] | None = None,
    mean_of: str = "the same activations",
    special: str | None = None,
    ablations: SplicedLoss | None = None,
    windows_per_batch: int | None = None,
    progress: bool = False,
) -> SplicedLoss:
    """SplicedLoss of `model` with {hook: sae, ...} spliced in, all at the same time.

    model       a causal language model with its head: its output is logits (windows, window, vocabulary), or has them
                as `.logits` or first. It and the SAEs run in eval mode, and get their own modes back.
    token_ids   (windows, window) int64, whole windows of text that the SAEs were not trained on; PAD (-1) at their end
                means no token: it is masked, never replaced and not predicted.
    where       see `splice`: the tokens whose activations are replaced, in the ablations too. An `Ordinary` that leaves
                out token ids receives the ids of each batch.
    means       of the mean ablation, (d_out,) by hook; `mean_of` says of what. None: of the activations that are
                replaced here, from an extra pass.
    special     a sentence for the result: which tokens keep the model's own activation.
    ablations   a result for other SAEs with the same model, hooks, token_ids, where and means, whose ablations are
                reused: they do not depend on the SAEs, and are half of the passes.
    windows_per_batch  None: as many as keep the logits of a batch small.
    Raises ValueError for no windows, nothing to predict, no hooks, a model without logits, ablations of other hooks,
    windows or tokens, and as `splice`.
    """
    module = model.model if isinstance(model, LanguageModel) else model
    if not hooks:
        raise ValueError("spliced_loss: got no hooks, expected {hook: sae, ...}")
    if token_ids.ndim != 2 or token_ids.is_floating_point() or token_ids.shape[0] < 1 or token_ids.shape[1] < 2:
        raise ValueError(
            f"spliced_loss: expected token ids (windows, window >= 2), got {token_ids.dtype} {tuple(token_ids.shape)}"
        )
    check_apart(module, hooks)
    size = windows_per_batch or _windows_per_batch(module, token_ids.shape[1])
    batches = [trimmed(batch) for batch in token_ids.split(size)]
    n = sum(int(is_text(batch[:, 1:]).sum()) for batch in batches)
    if n == 0:
        raise ValueError("spliced_loss: no window holds two tokens, so there is nothing to predict; give more text")
    names = tuple(name_of(module, site) for site in hooks)
    with evaluating(module, *hooks.values()), torch.no_grad():
        if means is None and ablations is None:
            means = {site: _mean(module, site, batches, where_of(where, site)) for site in hooks}
        chosen: dict[Site, Tensor] = {}  # the tokens of a batch that are replaced, as the untouched model has them
        fixed = {site: _taken(chosen, site) for site in hooks}
        contexts: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
            "spliced": lambda: splice(module, hooks, where=fixed)
        }
        if ablations is None:
            contexts["zero"] = lambda: _ablated(module, fixed, None)
            contexts["mean"] = lambda: _ablated(module, fixed, means)
        replaced = 0
        ce = dict.fromkeys(("untouched", *contexts), 0.0)
        kl = dict.fromkeys(contexts, 0.0)
        squares = dict.fromkeys(contexts, 0.0)
        with bar(len(token_ids), "window", progress, what="eval") as shown:
            for batch in batches:
                target = batch[:, 1:].flatten().to(device_of(module))
                with _noted(module, hooks, where, batch, chosen):
                    clean = _logits(module, batch)
                replaced += sum(int(mask.sum()) for mask in chosen.values())
                ce["untouched"] += _sums(clean, clean, target).ce
                for name, context in contexts.items():
                    with context():
                        changed = _logits(module, batch)
                    sums = _sums(clean, changed, target)
                    ce[name] += sums.ce
                    kl[name] += sums.kl
                    squares[name] += sums.squares
                    del changed  # before the next pass: logits are the largest tensors here
                shown.update(len(batch))
    ce = {name: total / n for name, total in ce.items()}
    kl = {name: total / n for name, total in kl.items()}
    share = replaced / (len(hooks) * int(is_text(token_ids).sum()))
    if ablations is None:
        undefined = {
            f"recovered_over_{name}": why
            for name in ("zero", "mean")
            if (why := _costs_nothing(ce, name, squares[name] / n, n))
        }
    else:
        _check_same(ablations, names, token_ids, share)
        ce |= {"zero": ablations.ce_zero, "mean": ablations.ce_mean}
        kl |= {"zero": ablations.kl_zero, "mean": ablations.kl_mean}
        mean_of, undefined = ablations.mean_of, dict(ablations.undefined)
    if special is None:
        special = "the tokens that `where` leaves out keep the model's own activation" if where else "none"
    recovered = {
        name: math.nan if name in undefined else _recovered(ce, name.removeprefix("recovered_over_"))
        for name in ("recovered_over_zero", "recovered_over_mean")
    }
    return SplicedLoss(
        hooks=names,
        n_windows=token_ids.shape[0],
        window=token_ids.shape[1],
        n_predictions=n,
        replaced_share=share,
        special=special,
        mean_of=mean_of,
        **{f"ce_{name}": value for name, value in ce.items()},
        **{f"kl_{name}": value for name, value in kl.items()},
        **recovered,
        undefined=undefined,
    )


def _check_same(ablations: SplicedLoss, hooks: tuple[str, ...], token_ids: Tensor, share: float) -> None:
    """Raises ValueError if these ablations are visibly of something else."""
    theirs = (ablations.hooks, ablations.n_windows, ablations.window, ablations.replaced_share)
    ours = (hooks, *token_ids.shape, share)
    if theirs != ours:
        raise ValueError(
            f"spliced_loss: the ablations are of (hooks, windows, window, share replaced) {theirs}, expected {ours}"
        )


def activations_at(
    model: nn.Module | LanguageModel,
    site: Site,
    token_ids: Tensor,
    *,
    where: Where | None = None,
    windows_per_batch: int = 16,
) -> tuple[Tensor, Tensor | None]:
    """(rows (n, d_in), targets) at a site of the untouched model, for the tokens of `where`, without padding.

    targets (n, d_out) is what a transcoder replaces; None if the site is a single hook. The layers after the site do
    not run. The model is put into eval mode.
    """
    module = model.model if isinstance(model, LanguageModel) else model
    rows, targets = [], []
    for x, y in _read(module, site, token_ids.split(windows_per_batch), where):
        rows.append(x)
        targets.append(y)
    return torch.cat(rows), torch.cat(targets) if isinstance(site, tuple) else None


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode in the block; afterwards every submodule has the mode that it had."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def _noted(
    model: nn.Module,
    hooks: Iterable[Site],
    where: Where | Mapping[Site, Where] | None,
    batch: Tensor,
    chosen: dict[Site, Tensor],
) -> Iterator[None]:
    """Writes the tokens of a batch that `where` chooses at every hook into `chosen`, and changes nothing.

    Every splice and ablation then replaces these, whatever norms an earlier one of several hooks leaves behind.
    """

    def note(site: Site) -> Where:
        choose = in_windows(where_of(where, site), batch)

        def choose_none(x: Tensor) -> Tensor:
            every = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
            chosen[site] = every if choose is None else choose(x)
            return ~every

        return choose_none

    with contextlib.ExitStack() as stack:
        for site in hooks:
            stack.enter_context(edited(model, site, lambda x, y: y, note(site)))
        yield


def _taken(chosen: Mapping[Site, Tensor], site: Site) -> Where:
    return lambda x: chosen[site]


@contextlib.contextmanager
def _ablated(model: nn.Module, where: Mapping[Site, Where], means: Mapping[Site, Tensor] | None) -> Iterator[None]:
    """Activations are 0, or their mean, at every hook."""

    def constant(value: Tensor | None) -> Edit:
        return lambda x, y: torch.zeros_like(y) if value is None else value.to(y).expand_as(y)

    with contextlib.ExitStack() as stack:
        for site, choose in where.items():
            stack.enter_context(edited(model, site, constant(None if means is None else means[site]), choose))
        yield


def _read(
    model: nn.Module, site: Site, batches: Iterable[Tensor], where: Where | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows read, rows to replace) of each batch, equal where the site is one hook."""
    hooked = HookedModel(model, site)
    for batch in map(trimmed, batches):
        with masked(model, batch) as ids:
            parts = hooked.parts(ids)
        x, y = parts[0], parts[-1]
        choose = in_windows(where, batch)
        chosen = torch.ones(batch.shape, dtype=torch.bool, device=x.device) if choose is None else choose(x)
        yield x[chosen], y[chosen]


def _mean(model: nn.Module, site: Site, batches: Iterable[Tensor], where: Where | None) -> Tensor:
    """The mean (d_out,) float64 of the activations that are replaced."""
    total, n = torch.zeros((), dtype=torch.float64, device=device_of(model)), 0
    for _, y in _read(model, site, batches, where):
        total = total + y.double().sum(0)
        n += len(y)
    if n == 0:
        raise ValueError(f"spliced_loss: `where` leaves out every token at {site!r}; there is nothing to replace")
    return total / n


def _windows_per_batch(model: nn.Module, window: int) -> int:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1 << 16
    return max(1, LOGITS // (window * vocabulary))


def name_of(model: nn.Module, site: Site) -> str:
    """The site as the model names its modules. Raises ValueError for a hook that it does not have."""
    return " -> ".join(find(model, hook).name for hook in (site if isinstance(site, tuple) else (site,)))


def _logits(model: nn.Module, token_ids: Tensor) -> Tensor:
    """The logits (n, vocabulary) of every position but each window's last, in the model's dtype."""
    with masked(model, token_ids) as ids:
        output = run(model, ids)
    logits = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != token_ids.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"expected logits ({', '.join(map(str, token_ids.shape))}, vocabulary) from {type(model).__name__}, "
            f"got {got}; load the model with its head: load_model(..., head=True)"
        )
    return logits[:, :-1].flatten(0, 1)


class _Sums(NamedTuple):
    """Over predictions, p of the untouched model and q of the changed one: Σ -log q(target), Σ KL(p ‖ q) and
    Σ (log p(target) - log q(target))².
    """

    ce: float
    kl: float
    squares: float


def _sums(clean: Tensor, changed: Tensor, target: Tensor) -> _Sums:
    """p of clean and q of changed, logits (n, vocabulary); target (n,), PAD where nothing is predicted."""
    ce = kl = squares = 0.0
    if not bool(is_text(target).all()):
        same, kept = clean is changed, is_text(target)
        clean, target = clean[kept], target[kept]
        changed = clean if same else changed[kept]
    rows = max(1, CHUNK // clean.shape[1])
    for p_logits, q_logits, ids in zip(clean.split(rows), changed.split(rows), target.split(rows), strict=True):
        q = q_logits.double().log_softmax(-1)
        hit = q.gather(1, ids[:, None])
        ce -= float(hit.sum())
        if clean is not changed:
            p = p_logits.double().log_softmax(-1)
            share = p.exp()
            # A token that a model rules out has p = 0 and log p = -inf, and adds nothing.
            kl += float(torch.where(share > 0, share * (p - q), 0).sum())
            squares += float((p.gather(1, ids[:, None]) - hit).square().sum())
    return _Sums(ce, kl, squares)


def _costs_nothing(ce: Mapping[str, float], ablation: str, square: float, n: int) -> str | None:
    """Why no share can be recovered over an ablation; None if its cost is above twice its standard error.

    square: the mean of the predictions' squared costs, of n predictions.
    """
    cost = ce[ablation] - ce["untouched"]
    error = math.sqrt(max(square - cost * cost, 0.0) / max(n - 1, 1))
    if cost > 2 * error:
        return None
    if not math.isfinite(cost):
        return f"the cross-entropy under {ablation} ablation is not finite"
    does = f"lowers the cross-entropy by {-cost:.3g}" if cost < 0 else f"raises the cross-entropy by only {cost:.3g}"
    return f"{ablation} ablation {does} nats (standard error {error:.2g}), so there is nothing to recover"


def _recovered(ce: Mapping[str, float], ablation: str) -> float:
    return (ce[ablation] - ce["spliced"]) / (ce[ablation] - ce["untouched"])
