"""A slower backend than the device could have says so: once, with the reason and with what mends it.

Extensions that are missing, broken or old are tried on copies of the package, in processes of their own.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fastsae
from fastsae import ops
from fastsae.backends import BackendError, BackendWarning, extension, reference, versions
from fastsae.backends.extension import digest

backends = importlib.import_module("fastsae.backends")  # fastsae.backends is its function of the same name
ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
needs_cpu = pytest.mark.skipif(
    not fastsae.backends()["cpu"]["available"], reason="the C++ extension is not built: the cpu backend is missing"
)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_said", set())
    monkeypatch.delenv("FASTSAE_BACKEND", raising=False)


def said(dtype: torch.dtype = torch.float32, device: str = "cpu", backend: str | None = None) -> list[str]:
    """The warnings of two encodings."""
    W, b = (torch.ones(shape, dtype=dtype, device=device) for shape in ((8, 4), (8,)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ops.encode_topk(W[:2], W, b, 2, backend=backend)
    return [str(w.message) for w in caught if issubclass(w.category, BackendWarning)]


# -- the C++ extension -------------------------------------------------------------------------------------------------

TWICE = """
import sys, warnings, torch
# An editable install's finder would find, for a module that the copy lacks, the one of the clone.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in finder.__module__]
warnings.simplefilter("always")
import fastsae
from fastsae import ops
print("imported", flush=True)
W, b = torch.ones(8, 4), torch.ones(8)
ops.encode_topk(W[:2], W, b, 2); ops.encode_topk(W[:2], W, b, 2); ops.decode(ops.encode_topk(W[:2], W, b, 2), W)
print(fastsae.backends()["cpu"]["reason"])
"""


def run_copy(folder: Path, program: str = TWICE) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(folder), "FASTSAE_BACKEND": ""}
    return subprocess.run([sys.executable, "-c", program], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package and its sources, with the extension that is in use; compiled files save a second of each import."""
    clean = shutil.ignore_patterns("*.so")
    for name in ("fastsae", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=clean)
    shutil.copy(ROOT / "setup.py", tmp_path)
    if installed := sys.modules.get("fastsae._cpu"):
        shutil.copy(str(installed.__file__), tmp_path / "fastsae")
    return tmp_path


def built(copy: Path) -> Path:
    (found,) = (copy / "fastsae").glob("_cpu*.so")
    return found


@needs_cpu
def test_a_current_extension_says_nothing(copy: Path) -> None:
    done = run_copy(copy)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert done.stdout.splitlines()[-1] == "None"


@pytest.mark.long
@needs_cpu
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        ("missing", "the C++ extension cannot be used"),
        ("broken", "file too short"),
        ("not a library", "invalid ELF header"),
        ("older than a change", "is older than its sources in"),
        ("older than a file", "is older than its sources in"),
    ],
)
def test_an_extension_that_cannot_be_used_is_said_once_with_the_command(copy: Path, harm: str, reason: str) -> None:
    if harm == "missing":
        built(copy).unlink()
    elif harm == "broken":
        built(copy).write_bytes(built(copy).read_bytes()[:40])
    elif harm == "not a library":
        built(copy).write_bytes(b"not a library" * 100)
    elif harm == "older than a change":
        with (copy / "csrc" / "cpu" / "decode.cpp").open("a") as file:
            file.write("// later\n")
    else:
        (copy / "csrc" / "cpu" / "later.h").write_text("\n")
    done = run_copy(copy)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported")
    (warning,) = [line for line in done.stderr.splitlines() if "BackendWarning" in line]
    assert warning.startswith("<string>:"), "not at the line that called"
    assert "runs on the reference backend, dense PyTorch and many times slower" in warning
    assert reason in warning
    assert f"pip install --no-deps -e {copy}" in warning
    assert reason in done.stdout.splitlines()[-1]


@needs_cpu
def test_a_clone_that_hides_an_installed_build_says_so(copy: Path) -> None:
    site = copy / "site-packages"
    (site / "fastsae").mkdir(parents=True)
    built(copy).rename(site / "fastsae" / built(copy).name)
    done = run_copy(copy, f"import sys; sys.path.insert(2, {str(site)!r})\n{TWICE}")
    assert done.returncode == 0, done.stderr
    (warning,) = [line for line in done.stderr.splitlines() if "BackendWarning" in line]
    assert f"No module named 'fastsae._cpu' in {copy / 'fastsae'}" in warning
    assert f"which hides the fastsae installed in {site}: work in another folder" in warning
    assert f"pip install --no-deps -e {copy}" in warning


@needs_cpu
def test_a_named_backend_without_its_extension_is_an_error_with_the_command(copy: Path) -> None:
    built(copy).unlink()
    done = run_copy(copy, TWICE.replace("b, 2)", 'b, 2, backend="cpu")'))
    assert done.returncode == 1
    assert "BackendError" in done.stderr
    assert "pip install --no-deps -e" in done.stderr


def test_the_digest_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("x")
    first = digest(tmp_path)
    (tmp_path / "notes.txt").write_text("y")
    assert digest(tmp_path) == first
    (tmp_path / "a.cpp").rename(tmp_path / "b.cpp")
    renamed = digest(tmp_path)
    (tmp_path / "b.cpp").write_text("z")
    assert len({first, renamed, digest(tmp_path)}) == 3


def test_a_build_that_is_named_and_no_library_is_an_import_error(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match=r"is not an extension module, expected a build of csrc/cpu"):
        extension.load("_cpu", str(tmp_path / "nothing"))


def test_the_command_of_a_wheel_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(extension, "ROOT", tmp_path)
    assert extension.command("FASTSAE_CUDA=require").startswith("FASTSAE_CUDA=require pip install")
    assert extension.command().endswith("fastsae-engine")


# -- dtypes ------------------------------------------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_dtype_without_a_kernel_is_said_once(dtype: torch.dtype) -> None:
    (warning,) = said(dtype)
    assert warning.startswith("fastsae.encode_topk runs on the reference backend")
    assert f"encode_topk has no kernel for {dtype}; cast to torch.float32 or torch.bfloat16" in warning
    assert said(dtype) == []


@needs_cpu
def test_nothing_is_said_where_the_fastest_serves_or_the_slow_one_is_named() -> None:
    assert said(torch.float32) == []
    assert said(torch.float16, backend="reference") == []


# -- a machine with a GPU ----------------------------------------------------------------------------------------------


class OnMeta(ModuleType):
    """A backend for tensors of another device than the CPU."""

    def __init__(self, name: str, reason: str | None = None):
        super().__init__(name)
        self.reason = reason

    def available(self) -> str | None:
        return self.reason

    def supports(self, op: str, *tensors: torch.Tensor, **info: object) -> str | None:
        return None

    def by_name_only(self) -> bool:
        return False


def chosen(monkeypatch: pytest.MonkeyPatch, **registry: ModuleType | str) -> tuple[str, list[str]]:
    """Which backend serves a tensor of a GPU, for which meta stands here, and what is said in two calls."""
    monkeypatch.setattr(backends, "OF_DEVICE", {"meta": ("cuda", "triton")})
    monkeypatch.setattr(backends, "_REGISTRY", (*registry.items(), ("reference", reference)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t = torch.ones(2, 2, device="meta")
        modules = [backends.choose("decode", None, t) for _ in range(2)]
    assert modules[0] is modules[1]
    return modules[0].__name__, [str(w.message) for w in caught]


def test_a_gpu_without_either_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    real = builtins.__import__

    def fails(name: str, *args: object, **kwargs: object) -> object:
        if name == "fastsae.backends" and args[2] and set(args[2]) & {"triton", "cuda"}:  # type: ignore[call-overload]
            raise ImportError(f"no {args[2]}")
        return real(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", fails)
    cuda, triton = backends._built_cuda(), backends._built_triton()
    monkeypatch.undo()
    monkeypatch.setattr(backends, "_said", set())
    name, heard = chosen(monkeypatch, cuda=cuda, triton=triton)
    assert name == "fastsae.backends.reference"
    (warning,) = heard
    assert "many times slower" in warning
    assert "FASTSAE_CUDA=require pip install --no-deps -e" in warning
    assert "pip install triton" in warning


def test_a_gpu_with_an_unsupported_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module("fastsae.backends.triton")
    monkeypatch.setattr(module.triton, "__version__", "2.1.0")
    reason = module.available()
    assert reason is not None
    name, (warning,) = chosen(monkeypatch, cuda="the CUDA extension cannot be used (x)", triton=OnMeta("t", reason))
    assert name == "fastsae.backends.reference"
    assert "triton 2.1.0 is installed, expected 3.6 or newer: pip install 'triton>=3.6'" in warning


def test_a_gpu_whose_faster_backend_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    name, (warning,) = chosen(monkeypatch, cuda="the CUDA extension cannot be used (x)", triton=OnMeta("triton"))
    assert name == "triton"
    assert warning.startswith("fastsae.decode runs on the triton backend: cuda: the CUDA extension cannot be used")


def test_a_gpu_with_all_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, cuda=OnMeta("cuda"), triton=OnMeta("triton")) == ("cuda", [])


def test_the_error_of_a_backend_that_is_named_keeps_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_REGISTRY", (("triton", "Triton is not installed"), ("reference", reference)))
    with pytest.raises(BackendError, match=r"triton: Triton is not installed"):
        backends.choose("decode", "triton", torch.ones(2, 2, device=CPU))


# -- versions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "oldest", "newest"), [("torch", "2.11", "2.15"), ("triton", "3.6", "3.9")])
def test_newer_versions_than_those_tested_are_used_with_a_warning(name: str, oldest: str, newest: str) -> None:
    """Nothing is refused upwards; each version warns once."""
    versions.warn_of.cache_clear()
    major, minor = map(int, newest.split("."))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (f"{oldest}.0", f"{newest}.0", f"{newest}.0+cu130", f"{newest}.3"):
            versions.warn_of(name, fine)
    new, old = f"{major}.{minor + 1}.0", f"{major - 1}.99.0"
    with pytest.warns(BackendWarning, match=rf"{name} {new} is newer than {newest}.*'{name}<{major}\.{minor + 1}'"):
        versions.warn_of(name, new)
    with pytest.warns(
        BackendWarning, match=rf"{name} {old} is installed, expected {oldest} or newer.*'{name}>={oldest}'"
    ):
        versions.warn_of(name, old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_of(name, new)
    assert versions.untried(name, "10.0.0a1") is not None
    versions.warn_of.cache_clear()


def test_a_triton_that_nobody_tried_serves_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    module = importlib.import_module("fastsae.backends.triton")
    monkeypatch.setattr(module.triton, "__version__", "3.99.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    versions.warn_of.cache_clear()
    with pytest.warns(BackendWarning, match=r"triton 3\.99\.0 is newer than 3\.9"):
        assert module.available() is None
    versions.warn_of.cache_clear()


def test_installing_never_replaces_a_newer_torch_or_python() -> None:
    """No upper limit in what pip reads; the lower ones are those of fastsae.backends.versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    wanted = [*project["dependencies"], *(w for extra in project["optional-dependencies"].values() for w in extra)]
    found = {name: [w for w in wanted if w.startswith(name + ">")] for name in versions.OLDEST}
    assert found == {name: [f"{name}>={versions.shown(least)}"] for name, least in versions.OLDEST.items()}


@pytest.mark.long
def test_the_suite_runs_beside_a_triton_that_its_interpreter_does_not_know() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("on a GPU kernels run compiled")
    code = (
        "import sys, triton; triton.__version__ = '3.99.0'; import pytest; "
        "sys.exit(pytest.main(['-p', 'no:cacheprovider', *sys.argv[1:]]))"
    )
    paths = [f"tests/test_{name}.py" for name in ("interpreter", "triton_update", "gpu_skip", "schedules")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    assert "the tests of Triton's kernels are skipped: the mended interpreter" in run.stdout
    assert "found 3.99.0" in run.stdout
    assert re.search(r"[1-9]\d* passed", run.stdout)
    assert re.search(r"[1-9]\d* skipped", run.stdout)
    assert "failed" not in run.stdout
