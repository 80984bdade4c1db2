"""SAEs in a language model, for `fastsae eval` and `sweep`: held-out text, special tokens as in training, splices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.cli.options import Eval, LanguageOptions, checked_device, torch_dtype
from fastsae.data.models import LanguageModel
from fastsae.data.splice import Site, Where
from fastsae.data.stream import ActivationStream, StreamConfig, load_for
from fastsae.data.text import Corpus, load_text, recorded_text
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.evaluate import EvalResult, evaluate
from fastsae.runs.opening import LanguageRecord, OpenedRun, language_of_run, open_run, other_model
from fastsae.runs.spliced import SplicedLoss, activations_at, name_of, spliced_loss

SHOWN = 8
"""Names of special tokens in a sentence, at most."""
TOKENS = 4096
"""Tokens of a text that is not the run's, unless another number is asked for."""


@dataclasses.dataclass(frozen=True)
class AtHook:
    """One autoencoder on the rows of its own filter, at its own hook."""

    hook: str
    """As the model names it; of a transcoder "where it reads -> what it replaces"."""
    run: OpenedRun
    result: EvalResult
    special: str
    """Which tokens are left out of the rows, and keep the model's own activation."""

    def record(self, with_density: bool) -> dict[str, Any]:
        """For evaluation_spliced.json."""
        run = {"hook": self.hook, "step": self.run.step, "weights": str(self.run.path), "special": self.special}
        return {**run, **self.result.to_json(with_density=with_density)}

    def summary(self) -> str:
        """One line for the terminal."""
        found = self.result
        return (
            f"fvu {found.fvu:.5f}, l0 {found.l0:.2f}, dead share {found.dead_share:.2%}, norm ratio "
            f"{found.norm_ratio:.5f} on {found.n_tokens:,} rows"
        )


@dataclasses.dataclass(frozen=True)
class InModel:
    """What `fastsae eval` finds with a language model."""

    at: list[AtHook]
    """The run's own first."""
    loss: SplicedLoss
    where: str
    """The rows, in words."""
    origin: dict[str, Any]
    """The model and the text."""

    @property
    def result(self) -> EvalResult:
        return self.at[0].result

    def record(self, with_density: bool) -> dict[str, Any]:
        """For evaluation_spliced.json."""
        return {
            "hooks": [one.record(with_density) for one in self.at],
            "spliced": {**self.loss.to_json(), **self.origin},
        }

    def table(self) -> dict[str, Any]:
        """For the terminal."""
        loss = self.loss
        zero, mean = (
            f"{v:.4f}" if math.isfinite(v) else "–" for v in (loss.recovered_over_zero, loss.recovered_over_mean)
        )
        return {
            **{f"at {one.hook}": one.summary() for one in self.at if len(self.at) > 1},
            "spliced in at": f"{', '.join(loss.hooks)} at {loss.replaced_share:.2%} of the tokens",
            "left alone": loss.special,
            "predictions": f"{loss.n_predictions:,}, in nats below",
            "cross-entropy": f"{loss.ce_untouched:.5f} untouched, {loss.ce_spliced:.5f} spliced, "
            f"{loss.ce_zero:.5f} zero ablation, {loss.ce_mean:.5f} mean ablation",
            "kl": f"{loss.kl_spliced:.5f} spliced, {loss.kl_zero:.5f} zero ablation, {loss.kl_mean:.5f} mean ablation",
            "recovered": f"{zero} over zero ablation, {mean} over mean ablation (mean of {loss.mean_of})",
            **({"undefined": "; ".join(loss.undefined.values())} if loss.undefined else {}),
        }


def asks_for_language(options: Eval) -> bool:
    """Whether any option of `fastsae eval` needs a language model. Raises ValueError beside one for stored rows."""
    own = [name for name in ("spliced", "also") if getattr(options, name)]
    given = own + options.language.given()
    if options.data is not None:  # of stored rows they name the hooks of a folder
        given = [name for name in given if name not in ("hook", "target_hook")]
    if given and (options.data is not None or options.all_rows):
        stored = "--data" if options.data is not None else "--all-rows"
        raise ValueError(
            f"--{given[0].replace('_', '-')} measures on text, {stored} on stored rows; give only one of them"
        )
    return bool(given)


@dataclasses.dataclass(frozen=True)
class HeldOutText:
    """A language model and text that nothing was trained on, in front of one hook: loaded once, for any number of SAEs.

    ids (windows, window) int64. stream: of the rows at the hook, with the filter of the training.
    """

    model: LanguageModel
    corpus: Corpus
    stream: ActivationStream
    site: Site
    ids: Tensor

    def rows(self, site: Site, stream: ActivationStream) -> tuple[Tensor, Tensor | None]:
        """`activations_at` a site, of the tokens that this stream's filter leaves."""
        return activations_at(
            self.model, site, self.ids, where=stream.filter.ordinary,
            windows_per_batch=self.stream.config.windows_per_batch,
        )  # fmt: skip

    def loss(
        self, saes: Mapping[Site, SparseAutoencoder], where: Mapping[Site, Where], means: Mapping[Site, Tensor],
        special: str, progress: bool, ablations: SplicedLoss | None = None,
    ) -> SplicedLoss:  # fmt: skip
        """`spliced_loss` of SAEs; means (d_out,) are those of what is replaced here."""
        return spliced_loss(
            self.model, saes, self.ids, where=where, means=means, mean_of="the replaced activations of this text",
            special=special, progress=progress, ablations=ablations,
        )  # fmt: skip

    def origin(self) -> dict[str, Any]:
        """What the model and the text are, for a record."""
        return {"model": self.model.base.describe(), "text": self.corpus.describe()}


def open_text(
    options: LanguageOptions, record: LanguageRecord | None, name: Any, d_in: int, device: str
) -> HeldOutText:  # fmt: skip
    """Loads the model and the text that the options name, or the record of the run or activations called `name`.

    Raises ValueError for what is neither given nor recorded, for another model or text than the record's, a text too
    short, a hook of another width than d_in; ImportError where transformers is not installed.
    """
    if options.hook is None:
        refuse_crosscoder(record, name)
    target = options.target_hook or (record.target if record else None)
    config = stream_config(options, record, name)
    corpus = held_out_text(options, record, name)
    spec = options.model or (record.model if record else None)
    if not spec:
        raise ValueError(f"{name} does not record its language model; name it with --model")
    named = options.model_dtype or (record.dtype if record else None)
    dtype = None if named is None else torch_dtype(named)
    model = load_for(
        spec, corpus, config, dtype=dtype, device=str(checked_device(device)), head=True,
        tokens=options.tokens or 0,
    )  # fmt: skip
    if record and not options.any_model and (other := other_model(model, record)):
        raise ValueError(f"{other}; name that model, or measure on this one with --any-model")
    stream = ActivationStream(model, corpus, config)
    calibrate(stream, record)
    if stream.d_in != d_in:
        raise ValueError(
            f"the activations at {stream.name} have {stream.d_in} numbers, the autoencoder expects d_in = {d_in}"
            f"; name the model and hook of {name} with --model and --hook"
        )
    site: Site = config.one_hook if target is None else (config.one_hook, target)
    wanted = options.tokens or math.ceil(config.holdout / stream.rows_per_window) * config.window
    if config.pack == "documents" and not options.tokens:
        wanted = config.holdout  # of short documents no more is held out for sure: as many tokens as there are rows
    return HeldOutText(model, corpus, stream, site, stream.held_out_windows(wanted))


def refuse_crosscoder(record: LanguageRecord | None, name: Any) -> None:
    """Raises ValueError for a run that reads several hooks at once."""
    if record and len(record.stream.hooks) > 1:
        hooks = ", ".join(map(str, record.stream.hooks))
        raise ValueError(
            f"{name} is a crosscoder of {hooks}: its reconstruction at a later hook would overwrite the effect of its "
            "reconstruction at an earlier one, so it cannot be spliced in; measure it on stored rows, without --spliced"
        )


def measure_in_model(options: Eval, run: OpenedRun) -> InModel:
    """Loads the model and the text that the options name, or the run records, and measures.

    Raises as `open_text` and `spliced_loss`.
    """
    text = open_text(options.language, language_of_run(run.config), run.path, run.sae.d_in, options.device)
    members = {text.site: (run, text.stream)}
    for path in options.also:
        add_other(members, options, text, path)
    at, means = [], {}
    for site, (opened, its) in members.items():
        opened.sae.backend = options.backend
        rows, targets = text.rows(site, its)
        check_widths(opened, its.name, rows, targets)
        result = evaluate(opened.sae, rows, targets=targets, batch_size=options.batch_size)
        means[site] = (rows if targets is None else targets).double().mean(0)
        others = language_of_run(opened.config)
        at.append(AtHook(name_of(text.model.model, site), opened, result, left_alone(its, others)))
        del rows, targets
    special = at[0].special if len(at) == 1 else "; ".join(f"at {one.hook} {one.special}" for one in at)
    saes = {site: opened.sae for site, (opened, _) in members.items()}
    where = {site: its.filter.ordinary for site, (_, its) in members.items()}
    loss = text.loss(saes, where, means, special, options.progress)
    named = options.language.text
    other_text = "held-out text of the run" if named is None else f"text of {named}"
    return InModel(at, loss, f"rows of the {other_text}", text.origin())


def check_widths(opened: OpenedRun, name: str, rows: Tensor, targets: Tensor | None) -> None:
    """Raises ValueError where the activations are not as wide as the autoencoder, saying which option to give."""
    sae = opened.sae
    if rows.shape[1] != sae.d_in:
        raise ValueError(
            f"the activations at {name} have {rows.shape[1]} numbers, the autoencoder expects d_in = {sae.d_in}; name "
            f"the model and hook of {opened.path} with --model and --hook"
        )
    width = sae.d_in if targets is None else targets.shape[1]
    if width != sae.d_out:
        raise ValueError(
            f"{opened.path} is a transcoder of d_in = {sae.d_in} to d_out = {sae.d_out}, and what it would replace has "
            f"{width} numbers; name the place with --target-hook"
        )


def spliced_in(
    text: HeldOutText, record: LanguageRecord | None = None
) -> Callable[[SparseAutoencoder], dict[str, Any]]:  # fmt: skip
    """What `fastsae sweep` measures of each SAE: `SplicedLoss` as JSON, its ablations measured with the first."""
    rows, targets = text.rows(text.site, text.stream)
    means = {text.site: (rows if targets is None else targets).double().mean(0)}
    where, origin = {text.site: text.stream.filter.ordinary}, text.origin()
    special = left_alone(text.stream, record)
    first: SplicedLoss | None = None

    def measure(sae: SparseAutoencoder) -> dict[str, Any]:
        nonlocal first
        found = text.loss({text.site: sae}, where, means, special, progress=False, ablations=first)
        first = first or found
        return {**found.to_json(), **origin}

    return measure


def stream_config(options: LanguageOptions, record: LanguageRecord | None, name: Any) -> StreamConfig:
    """How text becomes rows: as in training, but for what the options say."""
    hook = options.hook or (record.stream.hook if record else None)
    if hook is None:
        raise ValueError(f"{name} does not record where its activations were taken; name the place with --hook")
    config = dataclasses.replace(record.stream if record else StreamConfig(hook=hook), hook=hook)
    if options.window is not None:
        config = dataclasses.replace(config, window=options.window)
    if options.tokens is not None and options.tokens < 1:
        raise ValueError(f"{options.tokens} tokens of held-out text were asked for, expected at least 1")
    # The split of the run's own text must stay as it was in training; of any other, everything is held out.
    return config if options.text is None else dataclasses.replace(config, holdout=options.tokens or TOKENS)


def held_out_text(options: LanguageOptions, record: LanguageRecord | None, name: Any) -> Corpus:
    """The text. Raises ValueError if the run's own has changed since, or holds nothing out."""
    if options.text is not None:
        return load_text(options.text, field=options.text_field, token_type=options.token_type)
    if record is None or not record.text:
        raise ValueError(f"{name} does not record its text; name one that it was not trained on with --text")
    if record.stream.holdout == 0:
        raise ValueError(f"{name} was trained on all of its text; name another with --text")
    corpus = recorded_text(record.text)
    here, then = corpus.describe()["digest"], record.text.get("digest")
    if then is not None and here != then:
        raise ValueError(
            f"the text {record.text['spec']} has digest {here}, the run was trained on {then}: its held-out part may "
            "hold text of the training; restore it, or name a text with --text"
        )
    return corpus


def calibrate(stream: ActivationStream, record: LanguageRecord | None) -> None:
    """The norm filter of the training, if it was at the same hook."""
    if record and record.norm_median is not None and str(stream.config.hook) == str(record.stream.hook):
        stream.filter.median = record.norm_median


def add_other(
    members: dict[Site, tuple[OpenedRun, ActivationStream]], options: Eval, text: HeldOutText, path: Path
) -> None:  # fmt: skip
    """One more run, at the hook that it records, with the filter of its own training.

    Raises ValueError where it does not record one, is of another model or another run's hook, or was trained on a part
    of the text that is measured on.
    """
    other = open_run(path, device=options.device)
    record = language_of_run(other.config)
    if record is None:
        raise ValueError(f"{path} does not record where its activations were taken; --also takes runs that do")
    refuse_crosscoder(record, path)
    hook = record.stream.one_hook
    site: Site = hook if record.target is None else (hook, record.target)
    if site in members:
        raise ValueError(f"{path} reads the hook {hook}, and so does another of these runs; splice in only one of them")
    if not options.language.any_model and (wrong := other_model(text.model, record)):
        raise ValueError(f"{path}: {wrong}; splice in runs of one model, or measure on this one with --any-model")
    recorded, here = record.text or {}, text.corpus.describe()
    same = any(key in recorded and recorded[key] == here[key] for key in ("digest", "spec"))
    # Of another text nothing was trained on, and it may be shorter than what the run held out of its own.
    config = record.stream if same else dataclasses.replace(record.stream, holdout=text.stream.config.holdout)
    stream = ActivationStream(text.model, text.corpus, config)
    calibrate(stream, record)
    if same and stream.n_train > text.stream.n_train:
        raise ValueError(
            f"{path} was trained on part of the text that {options.run} held out; give another text with --text"
        )
    members[site] = (other, stream)


def left_alone(stream: ActivationStream, record: LanguageRecord | None = None) -> str:
    """Which tokens keep the model's own activation, in words."""
    ordinary, names = stream.filter.ordinary, stream.filter.without.values()
    parts = []
    if ordinary.first:
        parts.append(f"the first {'position' if ordinary.first == 1 else f'{ordinary.first} positions'} of a window")
    if ordinary.last:
        parts.append(f"the last {'position' if ordinary.last == 1 else f'{ordinary.last} positions'}")
    if ordinary.positions:
        parts.append(f"the positions {', '.join(map(str, ordinary.positions))}")
    if names:
        shown = ", ".join([*names][:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        parts.append(f"the token{'' if len(names) == 1 else 's'} {shown}")
    if ordinary.max_norm is not None:
        parts.append(f"activations of norm above {ordinary.max_norm:.4g}")
    if not parts:
        return "no token"
    filtered = record is not None and record.stream.norm_factor is not None
    elsewhere = [*record.others, *record.targets] if record is not None and filtered else []
    more = f", which also left out tokens by their norms at {', '.join(map(str, elsewhere))}" if elsewhere else ""
    return f"{', '.join(parts)}: as in training{more}"
