"""An SAE on disk: config.json (its settings) and sae.safetensors (its state), in one directory.

The header of sae.safetensors holds the same settings, so that `load` detects files of two different saves, and a
checksum of settings and tensors. Each file is written under a temporary name, fsync'ed and renamed, so an interrupted
save leaves the old file or the new one, never half of one. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastsae.atomic import replace_file
from fastsae.model.parameters import EXTRA_STATE
from fastsae.model.sae import SparseAutoencoder, as_sae
from fastsae.model.settings import config_of
from fastsae.model.tensorfile import CODES

CONFIG, WEIGHTS = "config.json", "sae.safetensors"
ARCHITECTURE, VERSION = "fastsae.SparseAutoencoder", 1
HEADER, _DIGEST = "fastsae", "sha256"
PIECE = 1 << 24
"""Bytes that are read at once for a checksum."""


class SavedModuleError(ValueError):
    """An SAE that cannot be saved, or a saved one that cannot be loaded; the message names the file."""


def save(sae: SparseAutoencoder, directory: str | os.PathLike[str]) -> Path:
    """Writes `sae` into `directory` (created if missing) and returns that path.

    Raises SavedModuleError naming the file that could not be written, for instance because the disk is full; an older
    file of that name is then unchanged. Raises TypeError for a module that holds or wraps one.
    """
    sae = as_sae(sae, "sae")
    sae.check_whole("save")
    root = Path(directory)
    config = saved_config(sae)
    tensors = {name: t.detach().contiguous() for name, t in tensors_of(sae).items()}
    text = json.dumps(config, indent=2)
    target = root
    if root.exists() and not root.is_dir():
        raise SavedModuleError(f"{root} is a file, expected a folder, new or written by save; give another name")
    try:
        root.mkdir(parents=True, exist_ok=True)
        target = root / WEIGHTS
        header = {HEADER: json.dumps(config), _DIGEST: _digest(config, tensors)}
        replace_file(target, lambda path: _write_tensors(path, tensors, header))
        target = root / CONFIG
        replace_file(target, lambda path: _write_text(path, text + "\n"))
    except (OSError, SafetensorError) as error:
        raise SavedModuleError(f"cannot write {target}: {error}; an older file of that name is unchanged") from error
    return root


def load(directory: str | os.PathLike[str], device: torch.device | str | None = None) -> SparseAutoencoder:
    """The SAE that `save` wrote into `directory`, in its dtype, on `device` (None: the CPU), in eval mode.

    Call `.train()` to continue training: only training mode counts dead latents and adds the losses on them.
    Raises SavedModuleError naming the file when one is missing, truncated or damaged, of another architecture or
    version, or when its tensors do not match the configuration.
    """
    root = Path(directory)
    sae, config, digest, expected = _described_in(root)
    with safe_open(root / WEIGHTS, framework="pt", device=str(device or "cpu")) as file:
        # Cloned out of the mapped file: the copy is aligned, and replacing the file does not change it.
        tensors = {name: file.get_tensor(name).clone() for name in expected}
    if digest is not None and digest != (got := _digest(config, tensors)):
        raise SavedModuleError(
            f"{root / WEIGHTS} is damaged: its settings and tensors have sha256 {got}, expected {digest}; take another "
            "copy of it"
        )
    sae.load_state_dict({**tensors, EXTRA_STATE: sae.get_extra_state()}, assign=True)
    return sae.eval()


def load_rows_(sae: SparseAutoencoder, directory: str | os.PathLike[str], by_latent: Collection[str]) -> None:
    """Loads into a part of an SAE (fastsae.parallel) its rows of the saved whole, and reads no others.

    by_latent: the tensors that have a row for each latent. Raises as `load`, and ValueError for other settings; but it
    does not compare the checksum, which is of all rows: verify the file before.
    """
    root, p = Path(directory), sae.placement
    assert p is not None
    whole, _, _, expected = _described_in(root)
    if whole.d_sae != p.d_sae:
        raise ValueError(f"{root} holds an SAE of {whole.d_sae} latents, expected {p.d_sae}")
    own = slice(p.first, p.first + p.own)
    with safe_open(root / WEIGHTS, framework="pt") as file:
        tensors = {
            name: file.get_slice(name)[own] if name in by_latent else file.get_tensor(name).clone() for name in expected
        }
    settings = config_of(sae.get_extra_state()) | whole.config | {"d_sae": p.own}
    extra = torch.tensor(list(json.dumps(settings).encode()), dtype=torch.uint8, device="cpu")
    sae.load_state_dict({**tensors, EXTRA_STATE: extra})


def _described_in(
    root: Path,
) -> tuple[SparseAutoencoder, dict[str, Any], str | None, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """Of a saved SAE: it on the meta device, its settings, its checksum, and the tensors that its file holds."""
    header, digest, shapes = _read_header(root / WEIGHTS)
    config = _read_config(root / CONFIG, header, root / WEIGHTS)
    settings = {name: value for name, value in config.items() if name not in ("architecture", "version", "dtype")}
    try:
        # On the meta device, so that nothing is allocated before the tensors of the file are checked.
        sae = SparseAutoencoder.from_config(settings, device="meta", dtype=_dtype(config.get("dtype")))
    except ValueError as error:
        raise SavedModuleError(f"{root / CONFIG} does not describe an SAE: {error}") from error
    expected = {name: (tuple(t.shape), t.dtype) for name, t in tensors_of(sae).items()}
    for name, beside in (("threshold_weight", "threshold"), ("log_start", "log_coef")):
        if beside in shapes and name not in shapes:
            expected.pop(name, None)  # older files have none, and load_state_dict says what it becomes
    _compare(root / WEIGHTS, expected, shapes)
    return sae, config, digest, expected


def saved_config(sae: SparseAutoencoder) -> dict[str, Any]:
    """The settings of an SAE, or of the whole that it is a part of, as its files hold them."""
    settings = {**sae.config, "d_sae": sae.n_latents}
    return {"architecture": ARCHITECTURE, "version": VERSION, "dtype": _dtype_name(sae.W_dec.dtype), **settings}


def seal(directory: Path, config: dict[str, Any]) -> None:
    """Completes a saved SAE whose tensors were written with `unsealed_header`: their checksum, and config.json."""
    path = directory / WEIGHTS
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata = header.pop("__metadata__")
        digest = _begun_digest(config)
        for name, one in sorted(header.items()):
            _add_name(digest, name, one["shape"], _dtype_of(one["dtype"]))
            start, end = one["data_offsets"]
            file.seek(8 + size + start)
            for at in range(start, end, PIECE):
                digest.update(file.read(min(PIECE, end - at)))
    _set_metadata(path, {**metadata, _DIGEST: digest.hexdigest()})
    _write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")


def unsealed_header(config: dict[str, Any]) -> dict[str, str]:
    """The metadata of a file whose checksum is not known yet."""
    return {HEADER: json.dumps(config), _DIGEST: "0" * 64}


def tensors_of(sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    """The state without the settings: the header of the file has them, readable without torch."""
    return {name: t for name, t in sae.state_dict().items() if name != EXTRA_STATE}


def _begun_digest(config: dict[str, Any]) -> hashlib._Hash:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode())


def _add_name(digest: hashlib._Hash, name: str, shape: Iterable[int], dtype: torch.dtype) -> None:
    digest.update(f"{name} {tuple(shape)} {dtype} ".encode())


def _digest(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """The sha256 of the settings and of every tensor's name, shape, dtype and bytes."""
    digest = _begun_digest(config)
    for name, t in sorted(tensors.items()):
        _add_name(digest, name, t.shape, t.dtype)
        digest.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file with sorted metadata: the library writes it in a different order each time, and equal modules
    should have equal files.
    """
    save_file(tensors, path, metadata=metadata)
    _set_metadata(path, metadata)


def _set_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Puts metadata of the same length into a safetensors file. Raises SavedModuleError where they are longer."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = metadata
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise SavedModuleError(f"{path}: its header has {size} bytes, expected {len(text)}; use safetensors >= 0.5")
        file.seek(8)
        file.write(text.ljust(size))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: Any) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {name!r}, expected the name of a floating-point type of torch such as 'float32'")
    return dtype


def _read_header(
    path: Path,
) -> tuple[dict[str, Any] | None, str | None, dict[str, tuple[tuple[int, ...], torch.dtype]]]:
    """The configuration and the digest in the header (None where there is none), and each tensor's shape and dtype;
    reads no tensor.
    """
    if not path.is_file():
        raise SavedModuleError(f"{path} is not there; expected a directory written by fastsae.save")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata.get(HEADER)
            # The header's size is checked against the file's by safetensors: a truncated file does not get this far.
            found = {name: _described(file.get_slice(name)) for name in file.keys()}  # noqa: SIM118
        return (None if text is None else json.loads(text)), metadata.get(_DIGEST), found
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise SavedModuleError(
            f"{path} is truncated or no safetensors file: {error}; take another copy of it"
        ) from error


def _described(tensor: Any) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.get_shape()), _dtype_of(tensor.get_dtype())


def _dtype_of(name: str) -> torch.dtype:
    names = {
        CODES[dtype]: dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
    }
    if name not in names:
        raise ValueError(f"a tensor of dtype {name}, expected one of {sorted(names)}")
    return names[name]


def _read_config(path: Path, header: dict[str, Any] | None, weights: Path) -> dict[str, Any]:
    """config.json, or the header's copy if that file is missing. If both exist, they must be equal."""
    if path.is_file():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SavedModuleError(f"{path} is damaged: {error}; delete it: {weights.name} holds a copy") from error
    elif header is not None:
        config = header
    else:
        raise SavedModuleError(
            f"{path} is not there, and {weights} has no copy of it; was this written by fastsae.save?"
        )
    if not isinstance(config, dict) or config.get("architecture") != ARCHITECTURE:
        got = config.get("architecture") if isinstance(config, dict) else config
        raise SavedModuleError(f"{path} has architecture {got!r}, expected {ARCHITECTURE!r}")
    if config.get("version") != VERSION:
        raise SavedModuleError(f"{path} has version {config.get('version')!r}, expected {VERSION}; update fastsae")
    if header is not None and header != config:
        names = sorted(name for name in {*header, *config} if header.get(name) != config.get(name))
        raise SavedModuleError(
            f"{path} and {weights} come from different saves: they differ in {', '.join(names)}. "
            f"{weights.name} holds its own configuration: delete {path.name} to use that"
        )
    return config


def _compare(path: Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    for what, names in (("lacks", expected.keys() - found.keys()), ("also holds", found.keys() - expected.keys())):
        if names:
            raise SavedModuleError(f"{path} {what} {', '.join(sorted(names))}; expected {', '.join(sorted(expected))}")
    for name, (shape, dtype) in expected.items():
        if found[name] != (shape, dtype):
            got_shape, got_dtype = found[name]
            raise SavedModuleError(f"{path}: {name} is {got_dtype} {got_shape}, its configuration says {dtype} {shape}")
