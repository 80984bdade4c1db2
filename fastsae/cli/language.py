"""`fastsae eval` with a language model: held-out text, special tokens as in training, reconstructions spliced in."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsae.cli.options import Eval, checked_device, torch_dtype
from fastsae.data.models import LanguageModel, load_model
from fastsae.data.splice import Site
from fastsae.data.stream import ActivationStream, StreamConfig
from fastsae.data.text import Corpus, load_text
from fastsae.runs.evaluate import EvalResult, evaluate
from fastsae.runs.opening import LanguageRecord, OpenedRun, language_of_run, open_run, other_model
from fastsae.runs.spliced import SplicedLoss, activations_at, name_of, spliced_loss

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
        """For evaluation.json."""
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
    model: dict[str, Any]
    text: dict[str, Any]

    @property
    def result(self) -> EvalResult:
        return self.at[0].result

    def record(self, with_density: bool) -> dict[str, Any]:
        """For evaluation.json."""
        return {
            "hooks": [one.record(with_density) for one in self.at],
            "spliced": {**self.loss.to_json(), "model": self.model, "text": self.text},
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
    names = ("spliced", "model", "any_model", "text", "hook", "output_hook", "window", "tokens", "also")
    given = [name for name in names if getattr(options, name) != Eval.__dataclass_fields__[name].default]
    if given and (options.data is not None or options.all_rows):
        stored = "--data" if options.data is not None else "--all-rows"
        raise ValueError(
            f"--{given[0].replace('_', '-')} measures on text and {stored} on stored rows; give one of them"
        )
    return bool(given)


def measure_in_model(options: Eval, run: OpenedRun) -> InModel:
    """Loads the model and the text that the options name, or the run records, and measures.

    Raises ValueError for what is neither given nor recorded, for another model or text than the run's, a text too
    short, and as `spliced_loss`; ImportError where transformers is not installed.
    """
    record = language_of_run(run.config)
    config = stream_config(options, record, run)
    corpus = held_out_text(options, record, run)
    spec = options.model or (record.model if record else None)
    if not spec:
        raise ValueError(f"{run.path} does not record its language model; name it with --model")
    dtype = options.model_dtype or (record.dtype if record and record.dtype else "bfloat16")
    model = load_model(spec, dtype=torch_dtype(dtype), device=str(checked_device(options.device)), head=True)
    if record and not options.any_model and (other := other_model(model, record)):
        raise ValueError(f"{other}; name that model, or measure on this one with --any-model")
    stream = ActivationStream(model, corpus, config)
    calibrate(stream, record)
    site: Site = config.hook if options.output_hook is None else (config.hook, options.output_hook)
    rows_wanted = options.tokens or math.ceil(config.holdout / stream.rows_per_window) * config.window
    ids = stream.held_out_windows(rows_wanted)
    members = {site: (run, stream)}
    for path in options.also:
        add_other(members, options, model, corpus, path, stream)
    at, means = [], {}
    for one, (opened, its) in members.items():
        opened.sae.backend = options.backend
        rows, targets = activations_at(
            model, one, ids, where=its.filter.ordinary, windows_per_batch=config.windows_per_batch
        )
        check_widths(opened, its.hooked.name, rows, targets)
        result = evaluate(opened.sae, rows, targets=targets, batch_size=options.batch_size)
        means[one] = (rows if targets is None else targets).double().mean(0)
        at.append(AtHook(name_of(model.model, one), opened, result, left_alone(its)))
        del rows, targets
    special = at[0].special if len(at) == 1 else "; ".join(f"at {one.hook} {one.special}" for one in at)
    loss = spliced_loss(
        model, {one: opened.sae for one, (opened, _) in members.items()}, ids,
        where={one: its.filter.ordinary for one, (_, its) in members.items()}, means=means,
        mean_of="the replaced activations of this text", special=special, progress=options.progress,
    )  # fmt: skip
    other_text = "held-out text of the run" if options.text is None else f"text of {options.text}"
    return InModel(at, loss, f"rows of the {other_text}", model.base.describe(), corpus.describe())


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
            f"{width} numbers; name the place with --output-hook"
        )


def stream_config(options: Eval, record: LanguageRecord | None, run: OpenedRun) -> StreamConfig:
    """How text becomes rows: as in training, but for what the options say."""
    hook = options.hook or (record.stream.hook if record else None)
    if hook is None:
        raise ValueError(f"{run.path} does not record where its activations were taken; name the place with --hook")
    config = dataclasses.replace(record.stream if record else StreamConfig(hook=hook), hook=hook)
    if options.window is not None:
        config = dataclasses.replace(config, window=options.window)
    if options.tokens is not None and options.tokens < 1:
        raise ValueError(f"--tokens is {options.tokens}, expected at least 1")
    # The split of the run's own text must stay as it was in training; of any other, everything is held out.
    return config if options.text is None else dataclasses.replace(config, holdout=options.tokens or TOKENS)


def held_out_text(options: Eval, record: LanguageRecord | None, run: OpenedRun) -> Corpus:
    """The text. Raises ValueError if the run's own has changed since, or holds nothing out."""
    if options.text is not None:
        return load_text(options.text)
    if record is None or not record.text:
        raise ValueError(f"{run.path} does not record its text; name one that it was not trained on with --text")
    if record.stream.holdout == 0:
        raise ValueError(f"{run.path} was trained on all of its text; name another with --text")
    corpus = load_text(record.text["spec"])
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
    members: dict[Site, tuple[OpenedRun, ActivationStream]],
    options: Eval,
    model: LanguageModel,
    corpus: Corpus,
    path: Path,
    first: ActivationStream,
) -> None:
    """One more run, at the hook that it records, with the filter of its own training.

    Raises ValueError where it does not record one, is of another model or another run's hook, or was trained on a part
    of the text that is measured on.
    """
    other = open_run(path, device=options.device)
    record = language_of_run(other.config)
    if record is None:
        raise ValueError(f"{path} does not record where its activations were taken; --also takes runs that do")
    hook = record.stream.hook
    if hook in members:
        raise ValueError(f"{path} is of the hook {hook}, as another of these runs; splice in one of them")
    if not options.any_model and (wrong := other_model(model, record)):
        raise ValueError(f"{path}: {wrong}; splice in runs of one model, or measure on this one with --any-model")
    text, here = record.text or {}, corpus.describe()
    same = any(key in text and text[key] == here[key] for key in ("digest", "spec"))
    # Of another text nothing was trained on, and it may be shorter than what the run held out of its own.
    config = record.stream if same else dataclasses.replace(record.stream, holdout=first.config.holdout)
    stream = ActivationStream(model, corpus, config)
    calibrate(stream, record)
    if same and stream.n_train > first.n_train:
        raise ValueError(
            f"{path} was trained on a part of the text that {options.run} held out; give another text with --text"
        )
    members[hook] = (other, stream)


def left_alone(stream: ActivationStream) -> str:
    """Which tokens keep the model's own activation, in words."""
    ordinary = stream.filter.ordinary
    parts = []
    if ordinary.first:
        parts.append(f"the first {'position' if ordinary.first == 1 else f'{ordinary.first} positions'} of a window")
    if ordinary.last:
        parts.append(f"the last {'position' if ordinary.last == 1 else f'{ordinary.last} positions'}")
    if ordinary.max_norm is not None:
        parts.append(f"activations of norm above {ordinary.max_norm:.4g}")
    return f"{', '.join(parts)}: as in training" if parts else "no token"
