"""Builds the extension modules; everything else about the package is in pyproject.toml.

fastsae._cpu: each op compiled once per instruction set (own flags, own namespace), chosen at run time, so a wheel runs
on any x86-64, and on arm64 by its portable code. Never -march=native.

FASTSAE_SANITIZE, for tests, is the compiler's list of sanitizers that watch fastsae._cpu ("address,undefined").

fastsae._cuda: built if there is an nvcc, for the targets it knows, with CUDA's runtime linked in. Two variables:
    FASTSAE_CUDA                auto (default: built if possible, else skipped with a message), require (an error if it
                                cannot be built), skip
    FASTSAE_CUDA_ARCHITECTURES  nvcc's names, default "80;90a;100a"; PTX for later devices is always included

torch is not needed to build. Objects stay in build/, and are compiled anew where the contents of a file that they were
made of have changed, or the command has.
"""

import os
import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
digest = runpy.run_path(str(ROOT / "fastsae" / "backends" / "extension.py"))["digest"]
CPU, CUDA = ROOT / "csrc" / "cpu", ROOT / "csrc" / "cuda"
HOST = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]
COMMON = [*HOST, "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-Wno-maybe-uninitialized"]
SANITIZE: list[str] = []
if os.environ.get("FASTSAE_SANITIZE"):
    SANITIZE = [f"-fsanitize={os.environ['FASTSAE_SANITIZE']}", "-fno-sanitize-recover=all"]
    # The reports name lines. -Og compiles in half of -O1's time, and the tests take as long. In intrinsics that leave a
    # vector unset on purpose, gcc 12 warns of it then.
    COMMON += [*SANITIZE, "-Og", "-g1", "-fno-omit-frame-pointer", "-Wno-uninitialized"]
AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]

# Sources compiled once, and sources compiled once per instruction set.
ONCE = ["bind.cpp", "dispatch.cpp", "by_latent.cpp", "format.cpp"]
PER_ISA = [
    "decode.cpp",
    "active_dot.cpp",
    "active_outer.cpp",
    "digest.cpp",
    "screen.cpp",
    "screen_f32.cpp",
    "candidates.cpp",
    "encode_topk.cpp",
    "ragged.cpp",
    "encode_above.cpp",
    "encode_batch_topk.cpp",
    "update_latents.cpp",
    "registry.cpp",
]
# The narrow multiply-adds: sources with flags of their own, chosen by format once the processor has shown it has them.
NARROW = {
    "screen_i8.cpp": ["-mavx512vnni"],
    "screen_bf16.cpp": ["-mavx512bf16"],
    "screen_amx.cpp": ["-mamx-tile", "-mamx-bf16"],
}
ISAS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {"avx2": ["-mavx2", "-mfma"], "avx512": AVX512}

ARCHITECTURES = ("80", "90a", "100a")
PTX = "80"  # for later devices: their drivers compile it
NVCC = "/usr/local/cuda/bin/nvcc"  # the default place


class CudaUnavailable(Exception):
    """Why the CUDA extension cannot be built here."""


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    for found in (home and f"{home}/bin/nvcc", shutil.which("nvcc"), NVCC):
        if found and os.access(found, os.X_OK):
            return found
    raise CudaUnavailable("there is no nvcc (in CUDA_HOME, on the PATH or in /usr/local/cuda)")


def cuda_architectures(nvcc: str) -> list[str]:
    """The targets to build for: those asked for, or the usual ones that this nvcc knows."""
    asked = os.environ.get("FASTSAE_CUDA_ARCHITECTURES")
    if asked:
        return asked.split(";")
    known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    if "sm_37" in known:  # which CUDA 12 gave up; 11.8 knows sm_90, but not what is special to it, sm_90a
        raise CudaUnavailable(f"{nvcc} is from CUDA 11, expected 12 or later")
    found = [a for a in ARCHITECTURES if f"sm_{a}" in known or f"sm_{a.rstrip('a')}" in known]
    if not found:
        raise CudaUnavailable(f"{nvcc} knows none of the targets {', '.join(ARCHITECTURES)}")
    return found


def headers(command: list[str]) -> list[Path]:
    """The folders in which a command looks for headers; at last the root, for files elsewhere."""
    return [*(Path(x.removeprefix("-I")) for x in command if x.startswith("-I")), Path("/")]


def without_folders(command: list[str]) -> str:
    """A command as it is kept beside its object. Folders of headers are left out, here and in the names of files, so
    that a build elsewhere finds the object current: a source archive's, or pip's, which has pybind11 in a new folder.
    """
    return " ".join(x for x in command if not x.startswith("-I"))


def files_of(target: Path) -> list[Path]:
    """What an object was made of: the compiler wrote it down beside it."""
    names = target.with_suffix(".d").read_text().split(":", 1)[1].replace("\\\n", " ").split()
    return [Path(name) for name in dict.fromkeys(names)]


def record(target: Path, command: list[str]) -> None:
    """Keeps beside an object its command, and digest and name of every file that it was made of."""
    lines = [without_folders(command)]
    for path in files_of(target):
        name = next(path.relative_to(folder) for folder in headers(command) if path.is_relative_to(folder))
        lines.append(f"{sha256(path.read_bytes()).hexdigest()} {name}")
    target.with_suffix(".made").write_text("\n".join(lines) + "\n")


def is_current(target: Path, command: list[str]) -> bool:
    """Whether this command made the object, of files with the contents that they have now."""
    kept = target.with_suffix(".made")
    if not (target.exists() and kept.exists()):
        return False
    made_by, *files = kept.read_text().splitlines()
    if made_by != without_folders(command):
        return False
    for digest_then, name in (line.split(" ", 1) for line in files):
        path = next((folder / name for folder in headers(command) if (folder / name).is_file()), None)
        if path is None or sha256(path.read_bytes()).hexdigest() != digest_then:
            return False
    return True


class BuildExtensions(build_ext):
    """Compiles what is not current, in parallel, and links it."""

    def finalize_options(self):
        # pip builds an editable install in a temporary folder, where the next one would find no objects.
        if self.build_temp is None:
            folder = f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            self.build_temp = str(ROOT / "build" / folder)
        super().finalize_options()

    def build_extensions(self):
        mode = os.environ.get("FASTSAE_CUDA", "auto")
        if mode not in ("auto", "require", "skip"):
            sys.exit(f"FASTSAE_CUDA is {mode!r}, expected auto, require or skip")
        # CUDA's first: whether it can be built shows at once, and the other takes minutes.
        for extension in sorted(self.extensions, key=lambda extension: extension.name != "fastsae._cuda"):
            if extension.name != "fastsae._cuda":
                self.build_extension(extension)
                continue
            try:
                if mode == "skip":
                    raise CudaUnavailable("FASTSAE_CUDA is skip")
                self.build_cuda(extension)
            except (CudaUnavailable, subprocess.CalledProcessError) as why:
                if mode == "require":
                    sys.exit(f"the CUDA extension could not be built, and FASTSAE_CUDA is require: {why}")
                print(f"fastsae: the CUDA extension is left out: {why}", file=sys.stderr)
                # An older build would be taken for this one. A sanitized build lies elsewhere and takes no one's place.
                old = [self.get_ext_fullpath(extension.name), ROOT / self.get_ext_filename(extension.name)]
                for path in [] if SANITIZE else old:
                    Path(path).unlink(missing_ok=True)
                self.extensions.remove(extension)

    def compile_all(self, jobs) -> list[str]:
        """Compiles (source, object, command) jobs whose object is not current; the objects in order."""

        def compile_one(job):
            source, target, command = job
            if self.force or not is_current(target, command):
                log = target.with_suffix(".log")
                log.parent.mkdir(parents=True, exist_ok=True)
                target.with_suffix(".made").unlink(missing_ok=True)
                log.touch()
                start = log.stat().st_mtime_ns  # by the clock of files, which may be behind time.time()
                depends = ["-MMD", "-MF", str(target.with_suffix(".d"))]
                done = subprocess.run(
                    [*command, *depends, "-c", str(source), "-o", str(target)],
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                )  # fmt: skip
                # ptxas says here what registers each kernel takes; `make cuda-check` reads it.
                log.write_text(done.stdout)
                if done.returncode or source.suffix != ".cu":
                    sys.stderr.write(done.stdout)
                done.check_returncode()
                # A file that was changed meanwhile leaves no record, and the object is compiled again next time.
                if all(path.stat().st_mtime_ns < start for path in files_of(target)):
                    record(target, command)
            return str(target)

        with ThreadPoolExecutor(cpu_count()) as pool:
            return list(pool.map(compile_one, jobs))

    def include_flags(self, extension, folder: Path) -> list[str]:
        return [f"-I{d}" for d in [*extension.include_dirs, *self.include_dirs, folder]]

    def build_extension(self, ext):
        build = Path(self.build_temp).resolve()
        jobs = [("once", name, stamp(CPU) if name == "bind.cpp" else []) for name in ONCE]
        jobs += [(isa, name, [*flags, f"-DFASTSAE_ISA={isa}"]) for isa, flags in ISAS.items() for name in PER_ISA]
        if "avx512" in ISAS:
            jobs += [("avx512", name, [*AVX512, *flags, "-DFASTSAE_ISA=avx512"]) for name, flags in NARROW.items()]
        compiler = [*self.compiler.compiler_so, *COMMON, *self.include_flags(ext, CPU)]
        objects = self.compile_all(
            (CPU / name, build / group / Path(name).with_suffix(".o").name, [*compiler, *flags])
            for group, name, flags in jobs
        )
        # The order matters: of an inline function that several objects hold (std::vector's), the linker keeps the
        # first, and that must be the one that every processor can run. So the widest instruction set comes last.
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            extra_postargs=["-fopenmp", *SANITIZE, *exports(CPU)],
            target_lang="c++",
        )

    def build_cuda(self, ext):
        nvcc = find_nvcc()
        targets = cuda_architectures(nvcc)
        build = Path(self.build_temp).resolve() / "cuda"
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in targets]
        codes += [f"-gencode=arch=compute_{PTX},code=compute_{PTX}"]
        names = " ".join([f"sm_{a}" for a in targets] + [f"compute_{PTX}"])
        device = [nvcc, "-std=c++17", "-O3", "--threads", "0", *codes, f'-DFASTSAE_ARCHITECTURES="{names}"']
        device += [f"-I{CUDA}", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra", "-Xptxas", "-v"]
        host = [*self.compiler.compiler_so, *HOST, *self.include_flags(ext, CUDA)]
        objects = self.compile_all(
            (source, build / (source.name + ".o"), device if source.suffix == ".cu" else [*host, *stamp(CUDA)])
            for source in [*sorted(CUDA.glob("*.cu")), *sorted(CUDA.glob("*.cpp"))]
        )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # nvcc links too: it may be a wrapper script, so the folder of its libraries cannot be told from its own.
        link = [nvcc, "-shared", "-nodlink", "--cudart", "static"]
        link += [option.replace("-Wl,", "-Xlinker=") for option in exports(CUDA)]
        subprocess.run([*link, *objects, "-o", str(target)], check=True)


def stamp(folder: Path) -> list[str]:
    """Records the sources in an extension: fastsae refuses one that is older than its sources."""
    return [f'-DFASTSAE_SOURCES="{digest(folder)}"']


def exports(folder: Path) -> list[str]:
    return [f"-Wl,--version-script={folder / 'exports.map'}"] if sys.platform == "linux" else []


def cpu_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


setup(
    ext_modules=[
        Pybind11Extension("fastsae._cpu", [f"csrc/cpu/{n}" for n in ONCE + PER_ISA]),
        Pybind11Extension("fastsae._cuda", [f"csrc/cuda/{p.name}" for p in sorted(CUDA.glob("*.c*"))]),
    ],
    cmdclass={"build_ext": BuildExtensions},
)
