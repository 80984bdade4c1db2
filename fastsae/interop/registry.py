"""Every format by name, which of them a path has, and `fastsae.load` and `fastsae.save` over all of them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from fastsae.interop import bare, dictionary_learning, gemma_scope, hub, llama_scope, openai, saelens, sparsify
from fastsae.interop.base import Format
from fastsae.interop.files import Checkpoint
from fastsae.model import files as own
from fastsae.model.files import SavedModuleError
from fastsae.model.rules import Activation
from fastsae.model.sae import SparseAutoencoder, as_sae

OWN = "fastsae"
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        saelens.FORMAT, sparsify.FORMAT, dictionary_learning.FORMAT, *gemma_scope.FORMATS,
        openai.FORMAT, *llama_scope.FORMATS, *bare.FORMATS,
    )
}  # fmt: skip
WRITTEN = (OWN, *(name for name, f in FORMATS.items() if f.write is not None))


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    *,
    subfolder: str | None = None,
    format: str | None = None,
    activation: Activation | None = None,
    revision: str | None = None,
) -> SparseAutoencoder:
    """The SAE at a path or in a repository of the Hugging Face hub, in eval mode, on `device` (None: the CPU).

    path        a folder, a file of weights, or `org/repo`, with or without `/sub/folder` or `/a/file` appended. A path
                that exists locally is never looked up on the hub. Written by `save`, or by another library: see
                docs/interop.md. Nothing is unpickled.
    subfolder   the same as appended to the path.
    format      the format, by its name in docs/interop.md, if it could be two.
    activation  the rule, if the files do not record it (Qwen-Scope, overcomplete); an error if they do.
    revision    of a repository.

    Acts and reconstructions are those of the library that wrote it, in the units of the data: scales and norms are
    folded into the weights. Training settings, such as a penalty, are not read.
    Raises SavedModuleError, in one line that names the file, if a file is missing or damaged, fits no known format or
    several, its tensors do not match its settings, or it uses what fastsae does not have. Raises ImportError for a
    repository if huggingface_hub is not installed.
    """
    given = os.fspath(path)
    local = Path(given) / subfolder if subfolder else Path(given)
    label = str(local)
    if format is not None and format != OWN and format not in FORMATS:
        raise ValueError(f"format is {format!r}, expected one of {', '.join((OWN, *FORMATS))}")
    if not Path(given).exists() and hub.could_be(given):
        local, label = hub.fetch(given, subfolder, revision)
    elif not local.exists():
        return own.load(local, device)  # which says what is missing
    files = Checkpoint.at(local, label)
    if format == OWN or (format is None and _is_own(files)):
        if activation is not None:
            raise SavedModuleError(f"{local} says which latents are active; leave activation={activation} out")
        return own.load(files.root, device)
    found = FORMATS[format] if format is not None else _recognised(files)
    try:
        return found.read(files, activation).build(device)
    except SavedModuleError:
        raise
    except (ValueError, OverflowError) as error:  # settings that a rule or the module refuses
        raise SavedModuleError(f"{files.label} is no SAE that fastsae has: {error}") from error


def save(sae: SparseAutoencoder, directory: str | os.PathLike[str], format: str = OWN) -> Path:
    """Writes `sae` into `directory` (created if missing) and returns that path; `load` reads it back.

    format: "fastsae", or for inference elsewhere "saelens", "sparsify", "dictionary_learning", "gemma_scope" or
    "circuit_tracer". A rule that a format does not have is written as one with equal codes: BatchTopK for SAELens as
    JumpReLU.
    Raises SavedModuleError naming the file that could not be written, for a setting that the format cannot hold, and if
    the directory has a checkpoint of another format. Raises TypeError for a module that holds or wraps an SAE.
    """
    if format == OWN:
        return own.save(sae, directory)
    if format not in WRITTEN:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(WRITTEN)}")
    sae, root = as_sae(sae, "sae"), Path(directory)
    sae.check_whole("save")
    if root.exists() and not root.is_dir():
        raise SavedModuleError(f"{root} is a file, expected a folder; give another name")
    if root.is_dir():
        files = Checkpoint.at(root)
        others = [OWN] if _is_own(files) else [name for name, _ in _matches(files) if name != format]
        if others:
            raise SavedModuleError(f"{root} has a checkpoint in the {others[0]} format; give another folder")
    write = FORMATS[format].write
    assert write is not None
    write(sae, root)
    return root


def push_to_hub(
    sae: SparseAutoencoder,
    repo: str,
    *,
    subfolder: str | None = None,
    format: str = OWN,
    private: bool | None = None,
) -> str:
    """Saves `sae` in a repository `org/name` of the Hugging Face hub, and returns what `load` takes to read it back.

    The repository is created if it does not exist, with a README.md that says how to load it. subfolder: where in the
    repository, so that it can hold several; format: as for `save`; private: whether a new repository is private (None:
    the organization's default). Log in first: `hf auth login`, or the variable HF_TOKEN.
    Raises SavedModuleError if the hub refuses or does not answer, if the place has other weights, and as `save`;
    ImportError if huggingface_hub is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="fastsae-push-") as folder:
        saved = save(sae, Path(folder) / "sae", format)
        return hub.upload(saved, repo, subfolder, private=private, card=_card(repo, subfolder, as_sae(sae, "sae")))


def _card(repo: str, subfolder: str | None, sae: SparseAutoencoder) -> str:
    where = f"{repo}/{subfolder.strip('/')}" if subfolder else repo
    return (
        "---\nlibrary_name: fastsae\ntags:\n- sparse-autoencoder\n---\n\n"
        f"# {repo}\n\nSparse autoencoder of {sae.d_sae:,} latents on rows of {sae.d_in:,} numbers, {sae.rule}.\n\n"
        f'```python\nimport fastsae\n\nsae = fastsae.load("{where}")\n```\n'
    )


def _is_own(files: Checkpoint) -> bool:
    """Whether `save` wrote it: the header of its weights says so, or its configuration where there is no other."""
    if files.only not in (None, own.WEIGHTS):
        return False
    if own.WEIGHTS in files and own.HEADER in files.metadata(own.WEIGHTS):
        return True
    return own.CONFIG in files and str(files.json(own.CONFIG).get("architecture")).startswith("fastsae.")


def _matches(files: Checkpoint) -> list[tuple[str, str]]:
    """(format, what is of it) for each format that this could be."""
    for inside in (False, True):
        found = [(name, f.match(files)) for name, f in FORMATS.items() if f.bare is inside]
        if some := [(name, what) for name, what in found if what is not None]:
            return some
    return []


def _recognised(files: Checkpoint) -> Format:
    """The only format that this can be. Raises SavedModuleError if there is none, or several."""
    matches = _matches(files)
    if len(matches) == 1:
        return FORMATS[matches[0][0]]
    if matches:
        said = " and ".join(f"{name} ({what})" for name, what in matches)
        raise SavedModuleError(f"{files.label} could be {said}; name the file, or pass format=")
    there = files.weights()
    if not there:
        within = sorted(
            path.parent.name for path in files.root.glob("*/*") if path.suffix in (".safetensors", ".npz", ".pt")
        )
        if within:
            few = ", ".join(list(dict.fromkeys(within))[:5])
            raise SavedModuleError(
                f"{files.label} holds no weights itself, only the folders {few}, ...; name one of them"
            )
        raise SavedModuleError(
            f"{files.path(own.WEIGHTS)} is missing; expected a directory written by fastsae.save, or a checkpoint in "
            f"one of the formats {', '.join(FORMATS)}"
        )
    raise SavedModuleError(
        f"{files.label} holds {', '.join(there[:5])}, expected files of a format {', '.join((OWN, *FORMATS))}"
    )
