"""Checkpoints of the Hugging Face hub: `org/repo`, `org/repo/sub/folder` or `org/repo/a/file.safetensors`.

If the hub does not answer, the local cache is used. Only the configurations and the weights of the one folder or file
are fetched. `upload` sends a folder there.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path, PurePosixPath
from types import ModuleType

from fastsae.interop.files import SUFFIXES
from fastsae.model.files import SavedModuleError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[^/\\]+)*/?")
PREFERRED = (
    "sae_weights.safetensors", "sae.safetensors", "ae.pt", "params.npz", "params.safetensors",
    "checkpoints/final.safetensors",
)  # fmt: skip
"""Names of weights that are loaded for a folder, whatever other files it has."""


def could_be(name: str) -> bool:
    """Whether a text could name a repository, or something in one."""
    return NAME.fullmatch(name) is not None and not name.startswith(("./", "../"))


def fetch(name: str, subfolder: str | None, revision: str | None) -> tuple[Path, str]:
    """The local folder or file for what is asked for, and its repository.

    Raises ImportError if huggingface_hub is not installed, and SavedModuleError, in one line, if the repository or the
    file in it does not exist, or is not in the cache while the hub does not answer.
    """
    client = _client(f"{name} is not a local file or folder, and reading it from the hub")
    from fastsae.data.hub import why_unreachable

    parts = [*name.strip("/").split("/"), *(subfolder or "").strip("/").split("/")]
    if any(part in (".", "..") or "\\" in part for part in parts):
        raise SavedModuleError(f"{name} {subfolder or ''} leads out of the repository; name a folder or file inside it")
    repo, inside = "/".join(parts[:2]), "/".join(parts[2:]).strip("/")
    unreachable = why_unreachable()
    try:
        if unreachable:
            root = Path(client.snapshot_download(repo, revision=revision, local_files_only=True))
        else:
            names = client.HfApi().list_repo_files(repo, revision=revision)
            for wanted in _wanted(names, inside, repo):
                local = Path(client.hf_hub_download(repo, wanted, revision=revision))
            root = local.parents[len(PurePosixPath(wanted).parts) - 1]
    except client.errors.LocalEntryNotFoundError as error:
        raise SavedModuleError(
            f"{name} is neither a local path nor in the cache of the hub, which does not answer ({unreachable})"
        ) from error
    except _faults(client) as error:
        raise SavedModuleError(f"{name} is not a local path, and the hub refused {repo}: {_line(error)}") from error
    found = root / inside
    if not found.exists():
        where = f"the cache of the hub, which does not answer ({unreachable})" if unreachable else "the repository"
        raise SavedModuleError(f"{inside} of {repo} is not in {where}")
    return found, repo


def upload(folder: Path, repo: str, subfolder: str | None, *, private: bool | None, card: str) -> str:
    """Sends the files of a folder to a repository, created if it does not exist, and returns their address.

    card: the README.md of a repository that has none. Raises as `fetch`: ImportError, SavedModuleError; and where the
    place has weights under another name, of which `fetch` would take one or the other.
    """
    client = _client(f"sending {repo} to the hub")
    parts = (subfolder or "").strip("/").split("/")
    if len(repo.split("/")) != 2 or not could_be(repo) or any(part in (".", "..") for part in parts):
        raise SavedModuleError(
            f"the repository is {repo!r}, the subfolder {subfolder!r}; expected org/name, and a folder inside it"
        )
    api, name = client.HfApi(), "/".join([repo, *parts]).rstrip("/")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        there = api.list_repo_files(repo)
        _check_place(there, "/".join(parts), {one.name for one in folder.iterdir()}, name)
        api.upload_folder(folder_path=str(folder), repo_id=repo, path_in_repo="/".join(parts) or None)
        if "README.md" not in there:  # last: it says how to load what is there by then
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo)
    except _faults(client) as error:
        raise SavedModuleError(f"the hub refused to upload to {repo}: {_line(error)}") from error
    return name


def _check_place(there: list[str], inside: str, sent: set[str], name: str) -> None:
    """Raises SavedModuleError where files to be sent to a folder of a repository would lie beside other weights."""
    prefix = f"{inside}/" if inside else ""
    here = [one.removeprefix(prefix) for one in there if one.startswith(prefix)]
    other = sorted(one for one in here if one.endswith(SUFFIXES) and "/" not in one and one not in sent)
    if other:
        raise SavedModuleError(f"{name} already holds {', '.join(other)}; give another subfolder, or delete it there")


def _client(what: str) -> ModuleType:
    """huggingface_hub, with its errors. Raises ImportError, naming what needs it, where it is not installed."""
    try:
        client = importlib.import_module("huggingface_hub")
        importlib.import_module("huggingface_hub.errors")
    except ImportError as error:
        raise ImportError(f"{what} needs huggingface_hub: pip install huggingface_hub") from error
    return client


def _faults(client: ModuleType) -> tuple[type[Exception], ...]:
    faults = (client.errors.HfHubHTTPError, client.errors.HFValidationError, OSError)
    if importlib.util.find_spec("httpx") is None:  # its client since 1.0; the one before raises OSErrors
        return faults
    return (*faults, importlib.import_module("httpx").HTTPError)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _wanted(names: list[str], inside: str, repo: str) -> list[str]:
    """The files to fetch: one with weights, and every JSON file beside it.

    Raises SavedModuleError where no weights are there, or several could be meant.
    """
    folder = inside if inside not in names else inside.rpartition("/")[0]
    prefix = f"{folder}/" if folder else ""
    here = [name for name in names if name.startswith(prefix)]
    weights = [inside] if inside in names else []
    if not weights:
        weights = [prefix + name for name in PREFERRED if prefix + name in here]
    if not weights:
        weights = [name for name in here if name.endswith(SUFFIXES) and "/" not in name[len(prefix) :]]
        if len(weights) != 1:
            deeper = sorted({name[len(prefix) :].split("/")[0] for name in here if name.endswith(SUFFIXES)})
            could = f"; name one of {', '.join(deeper[:8])}{', ...' if len(deeper) > 8 else ''}" if deeper else ""
            raise SavedModuleError(
                f"{'/'.join([repo, inside]).rstrip('/')} holds {len(weights)} files of weights{could}"
            )
    return [name for name in here if name.endswith(".json") and "/" not in name[len(prefix) :]] + weights
