"""SAEs in a language model, for `fastsae eval` and `sweep`: held-out text, special tokens as in training, splices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fastsae.cli.options import Eval, LanguageOptions, checked_device, torch_dtype
from fastsae.data.models import LanguageModel, load_model
from fastsae.data.splice import Site, Where
from fastsae.data.stream import ActivationStream, StreamConfig
from fastsae.data.text import Corpus, load_text
from fastsae.model.sae import SparseAutoencoder
from fastsae.runs.evaluate import EvalResult, evaluate
from fastsae.runs.opening import LanguageRecord, OpenedRun, language_of_run, open_run
from fastsae.runs.spliced import SplicedLoss, activations_at, spliced_loss

TOKENS = 4096
"""Tokens of a text that is not the run's, unless another number is asked for."""


@dataclasses.dataclass(frozen=True)
class InModel:
    """What `fastsae eval` finds with a language model."""

    result: EvalResult
    loss: SplicedLoss
    where: str
    """The rows, in words."""
    origin: dict[str, Any]
    """The model and the text."""

    def record(self) -> dict[str, Any]:
        """For evaluation.json."""
        return {**self.loss.to_json(), **self.origin}

    def table(self) -> dict[str, Any]:
        """For the terminal."""
        loss = self.loss
        return {
            "spliced in at": f"{', '.join(loss.hooks)} at {loss.replaced_share:.2%} of the tokens",
            "left alone": loss.special,
            "predictions": f"{loss.n_predictions:,}, in nats below",
            "cross-entropy": f"{loss.ce_untouched:.5f} untouched, {loss.ce_spliced:.5f} spliced, "
            f"{loss.ce_zero:.5f} zero ablation, {loss.ce_mean:.5f} mean ablation",
            "kl": f"{loss.kl_spliced:.5f} spliced, {loss.kl_zero:.5f} zero ablation, {loss.kl_mean:.5f} mean ablation",
            "recovered": f"{loss.recovered_over_zero:.4f} over zero ablation, {loss.recovered_over_mean:.4f} over mean "
            f"ablation (mean of {loss.mean_of})",
        }


def asks_for_language(options: Eval) -> bool:
    """Whether any option of `fastsae eval` needs a language model. Raises ValueError beside one for stored rows."""
    own = [name for name in ("spliced", "also") if getattr(options, name)]
    given = own + options.language.given()
    if given and (options.data is not None or options.all_rows):
        stored = "--data" if options.data is not None else "--all-rows"
        raise ValueError(
            f"--{given[0].replace('_', '-')} measures on text and {stored} on stored rows; give one of them"
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

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """`activations_at` the hook, of the tokens that are replaced."""
        config, where = self.stream.config, self.stream.filter.ordinary
        return activations_at(
            self.model, self.site, self.ids, where=where, windows_per_batch=config.windows_per_batch
        )  # fmt: skip

    def loss(
        self, sae: SparseAutoencoder, mean: Tensor | None, others: Mapping[Site, tuple[SparseAutoencoder, Where]],
        progress: bool,
    ) -> SplicedLoss:  # fmt: skip
        """`spliced_loss` of an SAE. mean (d_out,): of what is replaced; None: computed, as it must be with others."""
        hooks = {self.site: sae} | {site: other for site, (other, _) in others.items()}
        where = {self.site: self.stream.filter.ordinary} | {site: where for site, (_, where) in others.items()}
        return spliced_loss(
            self.model, hooks, self.ids, where=where, means=None if mean is None else {self.site: mean},
            mean_of="the replaced activations of this text", special=left_alone(self.stream), progress=progress,
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
    config = stream_config(options, record, name)
    corpus = held_out_text(options, record, name)
    spec = options.model or (record.model if record else None)
    if not spec:
        raise ValueError(f"{name} does not record its language model; name it with --model")
    dtype = options.model_dtype or (record.dtype if record and record.dtype else "bfloat16")
    model = load_model(spec, dtype=torch_dtype(dtype), device=str(checked_device(device)), head=True)
    if record and not options.any_model:
        check_model(model, record, dtype)
    stream = ActivationStream(model, corpus, config)
    calibrate(stream, record)
    if stream.d_in != d_in:
        raise ValueError(
            f"the activations at {stream.hooked.name} of {spec} have {stream.d_in} numbers, the autoencoder expects "
            f"d_in = {d_in}; name its own model and hook with --model and --hook"
        )
    site: Site = config.hook if options.output_hook is None else (config.hook, options.output_hook)
    wanted = options.tokens or math.ceil(config.holdout / stream.rows_per_window) * config.window
    return HeldOutText(model, corpus, stream, site, stream.held_out_windows(wanted))


def measure_in_model(options: Eval, run: OpenedRun) -> InModel:
    """Loads the model and the text that the options name, or the run records, and measures.

    Raises as `open_text` and `spliced_loss`.
    """
    runs = [(path, open_run(path, device=options.device)) for path in options.also]
    record = language_of_run(run.config)
    text = open_text(options.language, record, run.path, run.sae.d_in, options.device)
    others: dict[Site, tuple[SparseAutoencoder, Where]] = {}
    for path, other in runs:
        add_other(others, text, path, other)
    rows, targets = text.rows()
    result = evaluate(run.sae, rows, targets=targets, batch_size=options.batch_size)
    mean = None if others else (rows if targets is None else targets).double().mean(0)
    del rows, targets
    loss = text.loss(run.sae, mean, others, options.progress)
    named = options.language.text
    other_text = "held-out text of the run" if named is None else f"text of {named}"
    return InModel(result, loss, f"rows of the {other_text}", text.origin())


def spliced_in(text: HeldOutText) -> Callable[[SparseAutoencoder], dict[str, Any]]:
    """What `fastsae sweep` measures of each SAE: `SplicedLoss` as JSON, the mean of the ablation computed once."""
    mean, origin = text.rows()[0].double().mean(0), text.origin()
    return lambda sae: {**text.loss(sae, mean, {}, progress=False).to_json(), **origin}


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
        return load_text(options.text)
    if record is None or not record.text:
        raise ValueError(f"{name} does not record its text; name one that it was not trained on with --text")
    if record.stream.holdout == 0:
        raise ValueError(f"{name} was trained on all of its text; name another with --text")
    corpus = load_text(record.text["spec"])
    here, then = corpus.describe()["digest"], record.text.get("digest")
    if then is not None and here != then:
        raise ValueError(
            f"the text {record.text['spec']} has digest {here}, the run was trained on {then}: its held-out part may "
            "hold text of the training; restore it, or name a text with --text"
        )
    return corpus


def check_model(model: LanguageModel, record: LanguageRecord, dtype: str) -> None:
    """Raises ValueError if this is not the model that the run's activations come from, as far as the run says."""
    if record.digest is None or dtype != record.dtype:  # the digest is of rounded weights
        return
    digests = {model.base.describe()["digest"], model.describe()["digest"]}
    if record.digest not in digests:
        raise ValueError(
            f"the model {model.name} has digest {model.base.describe()['digest']}, the run's activations come from "
            f"{record.model} with digest {record.digest}; name that model, or measure on this one with --any-model"
        )


def calibrate(stream: ActivationStream, record: LanguageRecord | None) -> None:
    """The norm filter of the training, if it was at the same hook."""
    if record and record.norm_median is not None and str(stream.config.hook) == str(record.stream.hook):
        stream.filter.median = record.norm_median


def add_other(
    others: dict[Site, tuple[SparseAutoencoder, Where]], text: HeldOutText, path: Any, other: OpenedRun
) -> None:  # fmt: skip
    """One more run, at the hook that it records, with the filter of its own training."""
    record = language_of_run(other.config)
    if record is None:
        raise ValueError(f"{path} does not record where its activations were taken; --also takes runs that do")
    if record.stream.hook in {text.site, *others}:
        raise ValueError(f"{path} is of the hook {record.stream.hook}, as another of these runs; splice in one of them")
    stream = ActivationStream(text.model, text.corpus, record.stream)
    calibrate(stream, record)
    others[record.stream.hook] = other.sae, stream.filter.ordinary


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
