"""The command line as typed dataclasses: one for each subcommand, a field for each option, with its help."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from torch.distributed.device_mesh import DeviceMesh

from fastsae.cli.rules import DEFAULT, RuleOptions, rule_options, settings_of
from fastsae.data.documents import FIELD, TOKEN_TYPE, TokenType
from fastsae.data.live import LiveSource
from fastsae.data.models import fast_dtype, load_model, load_tokenizer
from fastsae.data.passes import ModelPasses
from fastsae.data.stream import SplitText, StreamConfig, check_model
from fastsae.data.text import load_text
from fastsae.interop.registry import FORMATS, WRITTEN
from fastsae.model.rules import variants
from fastsae.model.sae import SparseAutoencoder
from fastsae.parallel import parallelize
from fastsae.runs.config import TrainConfig
from fastsae.runs.feeders import Feeders
from fastsae.runs.opening import Selection
from fastsae.runs.sweep import transcoder_settings

FloatType = Literal["float32", "bfloat16", "float16"]
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
"""An option that is off unless given: --resume, without a --no-resume."""
LIVE = "live"
REPLACED = {
    "--l1-norm": "--weighted True or --weighted False",
    "--penalty": "--penalty-kind",
    "--prefixes": "--sampled",
    "--no-pre-bias": "--pre-bias False",
}
"""Former options of `fastsae train`: settings of rules now have their fields' names."""
Hook = int | str
Repeated = Annotated[tuple[Hook, ...], tyro.conf.UseAppendAction]
"""An option that may be given several times: --hook 6 --hook mlp.6."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype for the value of an option."""
    return getattr(torch, name)


def rule_settings(arguments: list[str]) -> tuple[str, dict[str, str]]:
    """The rule that arguments of `fastsae train` name, or the default one, and what its own options mean."""
    names = [after for before, after in pairwise(arguments) if before == "--activation"]
    names += [given.partition("=")[2] for given in arguments if given.startswith("--activation=")]
    rule = names[-1] if names and names[-1] in variants() else DEFAULT
    return rule, settings_of(_rule_options(), rule)


def _rule_options() -> type[RuleOptions]:
    """Called whenever options are parsed, so that newly registered rules have their options."""
    others = {field.name for options in (Train, SaeOptions, TrainConfig) for field in dataclasses.fields(options)}
    return rule_options(others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Common:
    """Options of every subcommand."""

    debug: Switch = False
    """Show the full traceback of an error."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structure:
    """The autoencoder, whatever its rule, size and seed."""

    pre_bias: bool | None = None
    """Subtract the decoder's bias from the input before encoding. Left out: yes, but not in a transcoder, whose bias is
    a mean of targets."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """Keep the decoder's rows at norm 1, or leave them free."""
    normalize: Literal["none", "constant", "layer_norm", "standardize"] | None = None
    """Scale the input: not at all; by one factor from the first batch; or each token by its own mean and spread, as in
    torch's layer norm or by the standard deviation. Left out: constant if a penalty is adjusted to a target L0,
    else none."""
    tied: Switch = False
    """Use one dictionary for encoder and decoder."""
    skip: Switch = False
    """Add a skip connection: a linear path beside the latents."""
    layers: int = 1
    """For a crosscoder: how many activations of equal width a row concatenates."""
    init_norm: float = 1.0
    """Initial norm of the encoder's rows, and of the decoder's if its norm is free."""
    aux_k: int | None = None
    """Dead latents per token in the AuxK loss that revives them. Left out: no such loss."""
    aux_coef: float = 1 / 32
    """Weight of the AuxK loss."""
    ghost: Literal["residual", "pull"] | None = None
    """Ghost gradients for dead latents: they model the residual, or turn towards tokens with a large error. Left out:
    none."""
    ghost_coef: float = 1.0
    """Weight of the ghost gradients."""
    dead_after: int = 10_000_000
    """Tokens without firing after which a latent counts as dead."""
    loss: Literal["mse", "fvu"] = "mse"
    """Squared error per token, or squared error over the variance of the batch."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights."""
    device: str = "cpu"
    """Device of the autoencoder: cpu, cuda, cuda:1."""
    precision: Literal["exact", "screened", "fp32"] = "exact"
    """How latents are selected: screened in a narrow format and certified (exact), screened only, or in fp32.
    "screened" depends on the format, which is chosen again on every start, so it does not resume bit for bit."""

    def arguments(self) -> dict[str, Any]:
        """Arguments of SparseAutoencoder: all but `precision`, which is set afterwards."""
        names = (
            "pre_bias", "decoder_norm", "normalize", "tied", "skip", "layers", "init_norm", "aux_k", "aux_coef",
            "ghost", "ghost_coef", "dead_after", "loss",
        )  # fmt: skip
        places = {"dtype": torch_dtype(self.dtype), "device": checked_device(self.device)}
        return {name: getattr(self, name) for name in names} | places


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How many latents."""

    d_sae: int
    """Latents of the autoencoder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SaeOptions(Structure, Size):  # the last base's options come first
    """The autoencoder."""

    rule: Annotated[RuleOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(constructor_factory=_rule_options)]
    init_seed: int = 0
    """Seed of the initial weights."""

    def build(self, d_in: int, d_target: int | None = None, mesh: DeviceMesh | None = None) -> SparseAutoencoder:
        """The autoencoder for rows of d_in numbers, or the transcoder to targets of d_target; of the processes of a
        mesh, each its part of it.

        Raises ValueError for settings that do not fit together.
        """
        settings = self.arguments()
        if d_target is not None:
            settings |= transcoder_settings(settings, d_target)
        if mesh is None:
            sae = SparseAutoencoder(d_in, self.d_sae, self.rule.rule(), **settings, seed=self.init_seed)
        else:
            device = settings.pop("device")
            sae = SparseAutoencoder(d_in, self.d_sae, self.rule.rule(), **settings, device="meta")
            parallelize(sae, mesh, seed=self.init_seed, device=device)
        sae.precision = self.precision
        return sae


@dataclasses.dataclass(frozen=True)
class HarvestStream(StreamConfig):
    """How text becomes rows."""

    hook: Repeated
    """Where the activations are taken: a number L for the residual stream after L layers (0: the embeddings), mlp.L or
    attn.L, or a module's name for its output ("model.layers.14"), with ":input" for its input. May be repeated: one
    pass reads all hooks, and a token is dropped at all of them if its norm is too large at any."""


@dataclasses.dataclass(frozen=True)
class LiveStream(StreamConfig):
    """How text becomes rows."""

    hook: tyro.conf.Suppress[Any] = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiveOptions:
    """Training straight from a running language model; used if DATA is `live`."""

    model: str = ""
    """The language model: a folder, a .gguf file, package:NAME for one in an installed package, or a hub name."""
    text: str = ""
    """Its text: a file, a folder, a glob pattern, package:NAME/PATTERN, debian:NAME or datasets:NAME[:CONFIG][@SPLIT].
    Files of text, JSON lines (both also .gz, .zst), parquet, or token ids (.npy, .bin)."""
    text_field: str = FIELD
    """Field of JSON lines, parquet and data sets with the text, or with the messages of a chat."""
    token_type: TokenType = TOKEN_TYPE
    """Dtype of the ids in .bin files."""
    hook: Repeated = ()
    """Where the activations are taken: a number of layers, mlp.L, attn.L or a module's name, :input for its input. May
    be repeated: one pass reads all of them."""
    stream: Annotated[StreamConfig, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: LiveStream(hook="")
    )
    buffer_rows: int = 65_536
    """Rows of the shuffle buffer."""
    model_device: str = "cpu"
    """Device of the language model."""
    model_dtype: FloatType | None = None
    """Dtype in which the language model runs. Left out: the fastest on its device."""
    prefetch: Switch = False
    """Run the model on a separate thread while the autoencoder trains; for a model on another device."""

    @property
    def config(self) -> StreamConfig:
        """How text becomes rows."""
        stream = {field.name: getattr(self.stream, field.name) for field in dataclasses.fields(StreamConfig)}
        return StreamConfig(**{**stream, "hook": self.hook or self.stream.hook})

    def notes(self) -> dict[str, Any]:
        """For config.json."""
        chosen = {"hook": (), "stream": self.config.to_record(), "model_dtype": self.chosen_dtype()}
        return {**dataclasses.asdict(self), **chosen}

    def chosen_dtype(self) -> str:
        return self.model_dtype or str(fast_dtype(self.model_device)).removeprefix("torch.")

    def check(self) -> None:
        """Raises ValueError for anything missing."""
        for name, value in (("model", self.model), ("text", self.text), ("hook", self.config.hook)):
            if value == "":
                raise ValueError(f"training live needs --live.{name}")

    def all_hooks(self, target: tuple[Hook, ...]) -> StreamConfig:
        """`config` with the hooks of the targets after its own."""
        return dataclasses.replace(self.config, hook=(*self.config.hooks, *target))

    def open(self, target: tuple[Hook, ...] = (), feeders: Feeders | None = None) -> LiveSource:
        """Loads the model, unless feeders run it, and starts the stream.

        Raises ValueError for anything missing or not found, and what the feeders raise.
        """
        self.check()
        corpus = load_text(self.text, field=self.text_field, token_type=self.token_type)
        model: str | Feeders = self.model
        if feeders is not None:
            tokenizer = load_tokenizer(self.model)
            SplitText(corpus, tokenizer, self.all_hooks(target))  # what is wrong with the text is said at once
            model = feeders.ready(tokenizer)
        return LiveSource(
            model, corpus, self.config, target=target or None, buffer_rows=self.buffer_rows, prefetch=self.prefetch,
            model_dtype=torch_dtype(self.chosen_dtype()), device=str(checked_device(self.model_device)),
        )  # fmt: skip

    def load(self, target: tuple[Hook, ...] = ()) -> ModelPasses:
        """The model alone, as a feeder runs it. Raises ValueError as `open`."""
        self.check()
        config = self.all_hooks(target)
        model = load_model(
            self.model, dtype=torch_dtype(self.chosen_dtype()), device=str(checked_device(self.model_device)),
            check=lambda found: check_model(found, config),
        )  # fmt: skip
        return ModelPasses(model, config.hook, config.window)

    @classmethod
    def from_notes(cls, notes: dict[str, Any]) -> LiveOptions:
        """The options that a run's config.json recorded. Raises ValueError if they do not fit this version."""
        try:
            hook = tuple(notes.get("hook", ()))
            return cls(**{**notes, "hook": hook, "stream": StreamConfig.from_record(notes["stream"])})
        except (KeyError, TypeError) as error:
            raise ValueError(f"the run's record of its live data does not fit this version: {error}") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Harvest(Common):
    """Stores a language model's activations over a text as shards on disk.

    If it was stopped, run it again with the same options to continue.
    """

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder for the shards."""
    model: str
    """The language model: a folder, a .gguf file, package:NAME for one in an installed package, or a hub name."""
    text: str
    """Its text: a file, a folder, a glob pattern, package:NAME/PATTERN, debian:NAME or datasets:NAME[:CONFIG][@SPLIT].
    Files of text, JSON lines (both also .gz, .zst), parquet, or token ids (.npy, .bin)."""
    text_field: str = FIELD
    """Field of JSON lines, parquet and data sets with the text, or with the messages of a chat."""
    token_type: TokenType = TOKEN_TYPE
    """Dtype of the ids in .bin files."""
    stream: Annotated[HarvestStream, tyro.conf.OmitArgPrefixes, tyro.conf.arg(help="How text becomes rows.")]
    rows: int = 1_000_000
    """Rows (tokens) to store for training; held-out rows are stored in addition."""
    rows_per_shard: int = 65_536
    """Rows per file."""
    dtype: FloatType = "bfloat16"
    """Dtype of the stored rows."""
    device: str = "cpu"
    """Device of the language model: cpu, cuda, cuda:1."""
    model_dtype: FloatType | None = None
    """Dtype in which the language model runs. Left out: the fastest on its device, or that of a resumed harvest."""
    threads: int | None = None
    """CPU threads. Left out: torch's default."""
    progress: bool = True
    """Show a progress bar on stderr."""
    essential: ClassVar[dict[str, str]] = {
        "FOLDER": "folder for the activations",
        "--model": "a folder, a .gguf file, package:NAME or a hub name",
        "--text": "a file, a folder, a glob pattern, package:..., datasets:...",
        "--hook": "where to read: after how many layers, such as 12; or mlp.L, attn.L, a module's name",
        "--rows": "how many tokens to store",
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Common):
    """Trains a sparse autoencoder on activations; writes checkpoints, metrics and TensorBoard events."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of `fastsae harvest`, a .safetensors or .npy file of rows, or the word live: see the live options."""
    run_dir: Path
    """Folder of the run: config.json, metrics.jsonl, eval.jsonl, checkpoints/, tensorboard/."""
    resume: Switch = False
    """Continue from the newest checkpoint in the run folder. Without this, a folder with checkpoints is an error."""
    hook: Repeated = ()
    """The hook to train on, if the folder has several. Repeated: an autoencoder for each, in a folder of its own under
    --run-dir; if --layers is the number of hooks, one crosscoder for all. For DATA live: --live.hook."""
    target_hook: Repeated = ()
    """The hook whose activations a transcoder learns to predict, such as mlp.L from mlp.L:input. Repeated: the targets
    of all hooks, side by side."""
    tensor: str | None = None
    """Name of the tensor in a .safetensors file. Left out: "activations", or the only one."""
    target_tensor: str | None = None
    """Name of the tensor of targets in a .safetensors file: trains a transcoder."""
    holdout: int | None = None
    """Rows held out for evaluation, at the end. Left out: the folder's own; for a file 2,048, at most a tenth."""
    data_seed: int = 0
    """Seed of the order of the rows."""
    latent_shards: int = 1
    """Under torchrun: how many processes share the dictionary. Processes / this number share the batch."""
    feeders: int = 0
    """Under torchrun, for DATA live: how many processes, the last ones, only run the language model; the others only
    train. 0: the first process runs the model and trains."""
    wait: float = 1800.0
    """Under torchrun: seconds to wait for a process that does not answer; then the run ends and names it. Set it to
    more than the first process takes to load a live model or to make a block of rows."""
    train: Annotated[TrainConfig, tyro.conf.OmitArgPrefixes, tyro.conf.arg(help="How to train.")] = dataclasses.field(
        default_factory=TrainConfig
    )
    sae: Annotated[SaeOptions, tyro.conf.OmitArgPrefixes]
    live: LiveOptions = dataclasses.field(default_factory=LiveOptions)
    essential: ClassVar[dict[str, str]] = {
        "DATA": "a folder of `fastsae harvest`, a file of rows, or live",
        "--run-dir": "folder for the run",
        "--d-sae": "how many latents",
        "--activation": "the rule, topk by default",
        "--k": "active latents per token; for relu, gated and jumprelu use --target-l0",
        "--lr": "the learning rate, 1e-3 for a short run",
        "--steps": "how many updates, of --batch-size tokens; one pass over the data if left out",
        "--resume": "continue a run that was stopped",
    }
    """The options that most calls set: --help begins with them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageOptions:
    """The language model and its text; each of these options implies --spliced."""

    model: str | None = None
    """The language model. Left out: the one that the run records."""
    any_model: Switch = False
    """Measure even if the language model is not the one that the run was trained on."""
    text: str | None = None
    """Text to use instead of the run's own: anything that `fastsae harvest` accepts."""
    text_field: str = FIELD
    """Field of that text, if it is JSON lines, parquet or a data set."""
    token_type: TokenType = TOKEN_TYPE
    """Dtype of its ids, if it is .bin files."""
    hook: str | None = None
    """Where the autoencoder reads: a number of layers, mlp.L, attn.L or a module's name; with --data, one of the hooks
    of the folder. Left out: the run's."""
    target_hook: str | None = None
    """For a transcoder: what it replaces, such as mlp.L. Left out: the run's, or the hook where it reads."""
    window: int | None = None
    """Tokens in one window of text. Left out: the run's, or 256."""
    tokens: int | None = None
    """Tokens of held-out text to measure on, rounded up to whole windows. Left out: as many as the run holds out."""
    model_dtype: FloatType | None = None
    """Dtype in which the language model runs. Left out: as for the run's activations."""

    def given(self) -> list[str]:
        """The names of the options whose value is not the default."""
        return [field.name for field in dataclasses.fields(self) if getattr(self, field.name) != field.default]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval(Common):
    """Measures a run's newest checkpoint (or any saved autoencoder) on held-out rows; prints a table, writes JSON."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, one of its checkpoints, or the folder of a saved autoencoder."""
    data: Path | None = None
    """Activations to use instead of the run's own: a folder of `fastsae harvest`, .safetensors or .npy."""
    tensor: str | None = None
    """Name of the tensor in a .safetensors file given as --data."""
    target_tensor: str | None = None
    """Name of the tensor of a transcoder's targets in that file."""
    all_rows: Switch = False
    """Measure on every row of --data, not only on its held-out rows."""
    batch_size: int = 4096
    """Tokens per batch."""
    out: Path | None = None
    """File for the JSON. Left out: evaluation.json (with a language model evaluation_spliced.json) in the folder of the
    run or autoencoder; for a checkpoint, evaluation_step_N.json in the run's folder."""
    density: Switch = False
    """Also write the density of every latent."""
    spliced: Switch = False
    """Measure on the run's held-out text, through its language model, and also measure how much that model loses when
    the reconstruction replaces its activations: cross-entropy and KL, against zero and mean ablation."""
    language: Annotated[LanguageOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=LanguageOptions)
    also: tuple[Path, ...] = ()
    """Other runs, each at the hook that it records: they are spliced in at the same time, and each is also measured on
    the rows of its own filter. Implies --spliced."""
    progress: bool = True
    """Show a progress bar on stderr."""
    backend: str | None = None
    """Backend of the ops, see `fastsae info`. Left out: the fastest that supports them."""
    device: str = "cpu"
    """Device of the autoencoder and the language model: cpu, cuda, cuda:1."""
    essential: ClassVar[dict[str, str]] = {
        "RUN": "a run, a checkpoint or a saved autoencoder",
        "--spliced": "also measure how much the language model loses with the reconstruction in place",
        "--data": "activations to use instead of the run's own",
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweptLanguage(LanguageOptions):
    """The language model and its text; each of these options implies --spliced. "The run" means the activations of the
    sweep."""

    hook: tyro.conf.Suppress[str | None] = None
    target_hook: tyro.conf.Suppress[str | None] = None
    tokens: Annotated[int | None, tyro.conf.arg(name="text-tokens")] = None
    """Tokens of held-out text to measure on, rounded up to whole windows. Left out: as many as the run holds out."""


@dataclasses.dataclass(frozen=True)
class SweptConfig(TrainConfig):
    """How to train each run."""

    seed: tyro.conf.Suppress[int] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Common):
    """Trains every combination of rules, L0s, sizes and seeds on one set of activations, each in a run folder of its
    own, and measures it on held-out rows. Writes a table, a plot of FVU over L0 and a page; marks the runs on the
    frontier of FVU and L0.

    If it was stopped, run it again with the same options to continue; you may add values.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """A folder of `fastsae harvest`, or a .safetensors or .npy file of rows."""
    out: Path
    """Folder for sweep.json, table.md, pareto.svg, sweep.html and runs/."""
    rules: tuple[str, ...]
    """Rules, by the names that `fastsae train --activation` takes; settings other than L0 keep their defaults."""
    l0s: tuple[float, ...]
    """Active latents per token: k, or target_l0 of relu, gated and jumprelu."""
    d_sae: tuple[int, ...]
    """Latents of the autoencoder."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights. The order of the rows is the same for all."""
    hook: Repeated = ()
    """The hook to train on, if the folder has several. Repeated: joined side by side; set
    --layers to their number."""
    target_hook: Repeated = ()
    """The hook whose activations transcoders learn to predict."""
    tensor: str | None = None
    """Name of the tensor in a .safetensors file. Left out: "activations", or the only one."""
    target_tensor: str | None = None
    """Name of the tensor of targets in a .safetensors file: trains transcoders."""
    holdout: int | None = None
    """Rows held out to measure on, at the end. Left out: the folder's own; for a file 2,048, at most a tenth."""
    data_seed: int = 0
    """Seed of the order of the rows."""
    spliced: Switch = False
    """Also measure how much the language model loses when each reconstruction replaces its activations, on held-out
    text: cross-entropy and KL."""
    language: Annotated[SweptLanguage, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=SweptLanguage)
    train: Annotated[SweptConfig, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=SweptConfig)
    sae: Annotated[Structure, tyro.conf.OmitArgPrefixes] = dataclasses.field(default_factory=Structure)
    essential: ClassVar[dict[str, str]] = {
        "DATA": "a folder of `fastsae harvest`, or a file of rows",
        "--out": "folder for the table, the plot and the runs",
        "--rules": "such as topk jumprelu",
        "--l0s": "active latents per token, such as 16 32 64",
        "--d-sae": "how many latents; several sizes may be given",
        "--lr": "the learning rate, 1e-3 for a short run",
        "--steps": "updates of each run; one pass over the data if left out",
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Common):
    """Writes one HTML page with a run's curves and settings and, if it was trained on a language model, passages on
    which its latents are active."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """The run folder; the run may still be in progress."""
    out: Path | None = None
    """File for the page. Left out: report.html in the run folder."""
    latents: Annotated[str | None, tyro.conf.arg(metavar="INDICES")] = None
    """Latents to show with their passages, such as 12,415; end a single one with a comma: 12,. Left out: a sample."""
    sample: int | None = None
    """Number of latents to draw at random over all densities. 0: none. Left out: 24, or none with --latents."""
    passages: int = 8
    """Passages of text per latent."""
    seed: int = 0
    """Seed for drawing these latents."""
    promoted: bool = True
    """Show the tokens that each latent promotes and suppresses: loads the run's language model, if it is on this
    disk."""
    max_rows: int = 131_072
    """Search at most this many rows for passages."""
    time_step: bool = True
    """Time the parts of one update on the run's data; this takes as long as a few updates, and memory for Adam's
    moments."""
    backend: str | None = None
    """Backend of the ops, see `fastsae info`. Left out: the fastest that supports them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reproduce(Common):
    """Runs a published system, prints its tables beside the published figures, and puts everything on one HTML page.

    If it was stopped, run it again with the same options to continue.
    """

    system: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SYSTEM")]
    """Name of the system: clustering, dictionary_comparison, interpretable_directions, monosemanticity or othello."""
    out: Path | None = None
    """Folder for page.html, results.json, table.md and pictures. Left out: runs/SYSTEM, or runs/SYSTEM-quick."""
    seeds: int | None = None
    """Seeds per experiment. Left out: 10 for clustering, 3 for the other systems (1 in their grids)."""
    quick: Switch = False
    """Run a tiny version that takes seconds; its figures mean nothing."""
    scale: tuple[str, ...] = ()
    """Override the system's sizes, models and texts, such as steps=1000; an unknown name lists the known ones."""
    experiments: tuple[str, ...] = ()
    """Names of the experiments to run. Left out: all."""
    threads: int = 1
    """CPU threads; SAEs this small are slower with more than one."""
    progress: bool = True
    """Show a progress bar on stderr."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convert(Common):
    """Writes a saved autoencoder in another format: that of fastsae, SAELens, sparsify, circuit-tracer, ...

    docs/interop.md lists what can be read and written.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """A folder or file in any format that fastsae.load reads, or a repository of the Hugging Face hub."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """The folder to write."""
    format: Literal[*WRITTEN] = "fastsae"  # type: ignore[valid-type]
    """The format to write."""
    source_format: Literal[*FORMATS] | None = None  # type: ignore[valid-type]
    """The format of IN, needed only if its files fit two. Left out: recognized from the files."""
    subfolder: str | None = None
    """The folder inside IN. Left out: IN itself."""
    k: int | None = None
    """Active latents per token of a TopK whose files do not record them, such as Qwen-Scope's and overcomplete's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info(Common):
    """Shows what is installed, which backends work here, and why the others do not."""

    json: Switch = False
    """Print JSON."""


def selection(options: Train | Sweep) -> Selection:
    """The rows that the options of a command name."""
    return Selection(options.hook, options.target_hook, options.tensor, options.target_tensor)


def latent_indices(text: str) -> tuple[int, ...]:
    """(12, 415) from "12,415". Raises ValueError for anything else, and for a single number without a comma."""
    names = [name.strip() for name in text.split(",")]
    if len(names) > 1 and names[-1] == "":
        names.pop()
    if not all(name.isdecimal() for name in names):
        raise ValueError(f"--latents is {text!r}, expected indices with commas, such as 12,415")
    if "," not in text:
        raise ValueError(
            f"--latents {names[0]} is ambiguous: --latents {names[0]}, (with a comma) shows "
            f"latent {names[0]}, --sample {names[0]} draws {names[0]} at random"
        )
    return tuple(map(int, names))


def checked_device(name: str) -> torch.device:
    """The torch device of that name. Raises ValueError if this machine has no such device."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}, expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices here; use cpu")
    return device
