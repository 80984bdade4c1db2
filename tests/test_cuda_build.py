"""The build of the CUDA extension: it imports without a driver, exports one symbol; setup.py makes it or says why not.

setup.py is tested on a copy of it with a tiny source and a stand-in for nvcc (setup_case.py).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path
from shutil import copy, copytree, ignore_patterns
from typing import Any

import pytest

from tests.setup_case import NVCC, Tree
from tests.test_cpp_build import exported, objdump

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = ROOT / "fastsae" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
needs_build = pytest.mark.skipif(not EXTENSION.exists(), reason="fastsae._cuda is not built in this tree (no nvcc)")

# -- the extension that is here ----------------------------------------------------------------------------------------


def answer(program: str) -> list[str]:
    """The lines that a program prints in a process of its own, without the emulation in place of the extension."""
    emulation = ("FASTSAE_CUDA_EMULATION", "LD_PRELOAD")
    env = {name: value for name, value in os.environ.items() if name not in emulation}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_build
def test_it_imports_without_a_driver_and_says_why_it_is_unavailable() -> None:
    devices, why, runtime, driver, architectures = answer(
        "from fastsae import _cuda; print(*_cuda.status(), _cuda.architectures, sep='\\n')"
    )
    assert re.fullmatch(r"(sm_\d+a? )+compute_80", architectures)
    assert int(runtime) >= 12_000
    if int(driver):
        pytest.skip("there is an NVIDIA driver, so its absence cannot be seen")
    assert devices == "0"
    assert "CUDA" in why
    assert answer("import fastsae; print(fastsae.backends()['cuda']['reason'])") == ["no NVIDIA driver is installed"]


@needs_build
def test_only_the_entry_is_exported() -> None:
    assert exported(EXTENSION) == ["PyInit__cuda"]


@needs_build
def test_the_cuda_runtime_is_linked_statically() -> None:
    """torch has a runtime of its own, and the extension opens the driver when the first op runs."""
    needed = re.findall(r"NEEDED\s+(\S+)", objdump("-p", str(EXTENSION)))
    assert "libc.so.6" in needed
    assert not [name for name in needed if "cuda" in name]


# -- setup.py, on a copy with a stand-in for nvcc ----------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    return Tree(tmp_path, monkeypatch)


@pytest.mark.parametrize("mode", [None, "auto"])
def test_without_nvcc_it_is_left_out_with_a_message(tree: Tree, mode: str | None, capsys: Any) -> None:
    tree.extension.touch()  # an older build must not pass for this one
    assert tree.build(mode) == []
    assert not tree.extension.exists()
    assert "the CUDA extension is left out: there is no nvcc (in CUDA_HOME, on the PATH" in capsys.readouterr().err
    assert [path.name for path in tree.extension.parent.glob("*.so")] == [tree.extension.name.replace("cuda", "cpu")]


def test_without_nvcc_require_is_an_error(tree: Tree) -> None:
    with pytest.raises(SystemExit, match="could not be built, and FASTSAE_CUDA is require: there is no nvcc"):
        tree.build("require")
    assert not list(tree.root.rglob("*.so")), "the error should come before anything is compiled"


def test_skip_leaves_it_out(tree: Tree, capsys: Any) -> None:
    tree.install_nvcc()
    assert tree.build("skip") == []
    assert not tree.extension.exists()
    assert "the CUDA extension is left out: FASTSAE_CUDA is skip" in capsys.readouterr().err


def test_a_bad_value_is_refused(tree: Tree) -> None:
    tree.install_nvcc()
    with pytest.raises(SystemExit, match="FASTSAE_CUDA is 'yes', expected auto, require or skip"):
        tree.build("yes")


def test_a_source_that_does_not_compile(tree: Tree, capsys: Any) -> None:
    tree.install_nvcc()
    (tree.cuda / "tiny.cu").write_text("fails")
    with pytest.raises(SystemExit, match=r"could not be built, and FASTSAE_CUDA is require: .* returned non-zero"):
        tree.build("require")
    assert "said of" in capsys.readouterr().err  # the compiler's own output
    tree.extension.touch()
    tree.build("auto")
    assert not tree.extension.exists()


@pytest.mark.parametrize(("asked", "targets"), [("", ["80", "90a", "100a"]), ("90a", ["90a"]), ("75;86", ["75", "86"])])
def test_it_is_built_for_the_targets_asked_for(tree: Tree, asked: str, targets: list[str]) -> None:
    tree.install_nvcc()
    tree.monkeypatch.setenv("FASTSAE_CUDA_ARCHITECTURES", asked)
    compiled, linked = tree.build("require")
    assert tree.extension.exists()
    names = [f"sm_{target}" for target in targets]
    assert re.findall(r"code=(sm_\w+)", compiled) == names
    assert f'-DFASTSAE_ARCHITECTURES="{" ".join(names)} compute_80"' in compiled
    assert "code=compute_80" in compiled
    assert "--cudart static" in linked
    assert "exports.map" in linked
    assert (tree.objects / "tiny.cu.log").read_text() == f"said of {tree.cuda / 'tiny.cu'}\n"


def test_an_nvcc_that_knows_none_of_the_targets(tree: Tree) -> None:
    tree.install_nvcc()
    nvcc = tree.root / "toolkit" / "bin" / "nvcc"
    nvcc.write_text(NVCC.replace("echo sm_75 sm_80 sm_90 sm_100", "echo sm_35"))
    with pytest.raises(SystemExit, match="knows none of the targets 80, 90a, 100a"):
        tree.build("require")


# -- what is compiled again --------------------------------------------------------------------------------------------


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


@pytest.mark.parametrize(
    "change",
    ["nothing", "touched", "source", "header", "other", "header is gone", "record is gone", "command", "moved"],
)
def test_an_object_is_current_until_something_it_was_made_of_changes(tree: Tree, change: str) -> None:
    header, target, command = tree.cuda / "tiny.h", tree.root / "tiny.cu.o", ["nvcc", "-O3", f"-I{tree.cuda}"]
    target.touch()
    target.with_suffix(".d").write_text(f"{target} : {tree.cuda / 'tiny.cu'} \\\n {header}\n")
    tree.setup.record(target, command)
    assert tree.setup.is_current(target, command)
    match change:
        case "touched":
            (tree.cuda / "tiny.cu").touch()
        case "source":
            (tree.cuda / "tiny.cu").write_text("changed")
        case "header":
            header.write_text("changed")
        case "other":
            (tree.cuda / "another.h").touch()
        case "header is gone":
            header.unlink()
        case "record is gone":
            target.with_suffix(".made").unlink()
        case "command":
            command = ["nvcc", "-O2", f"-I{tree.cuda}"]
        case "moved":  # as the whole tree in a source archive, and pybind11 in a pip build
            copytree(tree.cuda, tree.root / "elsewhere")
            header.write_text("of the old folder")
            command = ["nvcc", "-O3", f"-I{tree.root / 'elsewhere'}"]
    assert tree.setup.is_current(target, command) == (change in ("nothing", "touched", "other", "moved"))


def test_only_what_changed_is_compiled_again(tree: Tree) -> None:
    tree.install_nvcc()
    assert len(tree.build("require")) == 2
    assert len(tree.build("require")) == 1, "only the link step should run again"
    tree.monkeypatch.setenv("FASTSAE_CUDA_ARCHITECTURES", "90a")
    assert len(tree.build("require")) == 2
    (tree.cuda / "tiny.h").write_text("changed")
    age(tree.cuda / "tiny.h", 100)
    assert len(tree.build("require")) == 2
    assert len(tree.build("require")) == 1


def test_a_source_edited_during_compilation_is_compiled_again(tree: Tree) -> None:
    tree.install_nvcc()
    (tree.cuda / "tiny.cu").write_text("edited meanwhile")
    age(tree.cuda / "tiny.cu", 100)
    assert len(tree.build("require")) == 2
    assert len(tree.build("require")) == 2


# -- what is packed ----------------------------------------------------------------------------------------------------

NOT_PACKED = ignore_patterns("__pycache__", "*.so", ".*")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package's files, so that packing leaves nothing in this tree."""
    root = tmp_path_factory.mktemp("packed")
    for folder in ("csrc", "fastsae"):
        copytree(ROOT / folder, root / folder, ignore=NOT_PACKED)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        copy(ROOT / name, root)
    return root


def files(root: Path, *folders: str) -> set[str]:
    return {str(p.relative_to(root)) for folder in folders for p in (root / folder).rglob("*") if p.is_file()}


def python(copied: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=copied, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_sdist_holds_every_source(copied: Path, tmp_path: Path) -> None:
    wanted = files(copied, "csrc", "fastsae") | {"setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert {"csrc/cuda/exports.map", "csrc/cuda/decode.cu", "csrc/cuda/launch.h", "csrc/cpu/screen_i8.cpp"} <= wanted
    python(copied, "-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})")
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {member.name.split("/", 1)[1] for member in packed.getmembers() if member.isfile()}
    assert wanted - held == set()


def test_a_wheel_holds_every_file_of_the_package(copied: Path, tmp_path: Path) -> None:
    python(copied, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path))
    wanted = files(copied, "fastsae")
    assert any(name.endswith(".css") for name in wanted)
    assert wanted - files(tmp_path, "fastsae") == set()


def test_python_started_beside_the_clone_finds_the_package(tmp_path: Path) -> None:
    """There the clone, a folder without __init__.py, is a namespace package for Python, if no path has a real one."""
    (tmp_path / "fastsae").symlink_to(ROOT)
    program = "import fastsae, fastsae.kernels; print(fastsae.TopK(3))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("TopK(k=3"), done.stderr
