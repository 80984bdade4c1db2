"""How a compiled extension is found: fastsae._cpu or fastsae._cuda, or another build of one, which a test names.

An extension that is older than its sources is refused: it may take other arguments than the Python code beside it
passes. This is seen where the sources lie beside the package, as in a clone; an installed wheel has none. setup.py runs
this file by itself for `digest`, so it imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def load(name: str, instead: str | None = None) -> ModuleType:
    """fastsae.<name>, or the extension module at the path `instead`, under the same name.

    Raises ImportError if it is missing or broken, or older than its sources.
    """
    full = f"fastsae.{name}"
    if instead is None:
        try:
            module = importlib.import_module(full)
        except ModuleNotFoundError as error:
            if error.name != full or (hidden := _hidden(name)) is None:
                raise
            what = f"{error} in {ROOT / 'fastsae'}, which hides the fastsae installed in {hidden}"
            raise ImportError(f"{what}: work in another folder") from error
        _check_current(module, ROOT / "csrc" / name.removeprefix("_"))
        return module
    spec = importlib.util.spec_from_file_location(full, instead)
    if spec is None or spec.loader is None:
        raise ImportError(f"{instead!r} is not an extension module, expected a build of csrc/{name.removeprefix('_')}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[full] = module
    return module


def _hidden(name: str) -> Path | None:
    """Where a fastsae that has this extension is installed, if it is not this one. Python looks into the current folder
    first, so that in a clone after `pip install .`, without -e, the sources hide what was built of them.
    """
    places = (Path(place).resolve() for place in sys.path if place)
    return next((p for p in places if p != ROOT and any((p / "fastsae").glob(f"{name}.*"))), None)


def digest(folder: Path) -> str:
    """Of the names and contents of the C++ and CUDA files in a folder. Two milliseconds for the larger one."""
    found = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".cpp", ".cu", ".h")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def _check_current(module: ModuleType, folder: Path) -> None:
    if folder.is_dir() and getattr(module, "sources", None) != digest(folder):
        raise ImportError(f"{module.__file__} is older than its sources in {folder}")


def command(variables: str = "") -> str:
    """What builds the extensions anew; variables: FASTSAE_CUDA=require, or nothing."""
    target = f"-e {ROOT}" if (ROOT / "setup.py").is_file() else "--force-reinstall --no-binary :all: fastsae-engine"
    return f"{variables} pip install --no-deps {target}".strip()
