"""Builds the extension modules; everything else about the package stands in pyproject.toml.

The CPU extension compiles each op once per instruction set (own flags, own namespace) and chooses at run time, so a
wheel runs on any x86-64, and on arm64 by its portable code. Never -march=native. torch is not needed to build.
"""

import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from os import cpu_count
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU = ROOT / "csrc" / "cpu"
COMMON = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fopenmp",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]
AVX512 = ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]

# Sources compiled once, and sources compiled once per instruction set.
ONCE = ["bind.cpp", "dispatch.cpp", "by_latent.cpp", "format.cpp"]
PER_ISA = [
    "decode.cpp",
    "active_dot.cpp",
    "active_outer.cpp",
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


class BuildCpu(build_ext):
    """Compiles what is older than its sources, in parallel, and links it."""

    def build_extension(self, ext):
        build = Path(self.build_temp).resolve()
        headers = max(p.stat().st_mtime for p in [*CPU.glob("*.h"), Path(__file__)])
        jobs = [("once", name, []) for name in ONCE]
        jobs += [(isa, name, [*flags, f"-DFASTSAE_ISA={isa}"]) for isa, flags in ISAS.items() for name in PER_ISA]
        if "avx512" in ISAS:
            jobs += [("avx512", name, [*AVX512, *flags, "-DFASTSAE_ISA=avx512"]) for name, flags in NARROW.items()]

        def compile_one(job):
            group, name, flags = job
            source, folder = CPU / name, build / group
            target = folder / Path(name).with_suffix(".o").name
            newest = max(source.stat().st_mtime, headers)
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                folder.mkdir(parents=True, exist_ok=True)
                command = [*self.compiler.compiler_so, *COMMON, *flags]
                command += [f"-I{d}" for d in [*ext.include_dirs, *self.include_dirs, CPU]]
                subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
            return str(target)

        with ThreadPoolExecutor(cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        # The order matters: of an inline function that several objects hold (std::vector's), the linker keeps the
        # first, and that must be the one that every processor can run. So the widest instruction set comes last.
        link = ["-fopenmp"] + ([f"-Wl,--version-script={CPU / 'exports.map'}"] if sys.platform == "linux" else [])
        self.compiler.link_shared_object(
            objects, self.get_ext_fullpath(ext.name), extra_postargs=link, target_lang="c++"
        )


extension = Pybind11Extension("fastsae._cpu", [f"csrc/cpu/{n}" for n in ONCE + PER_ISA])
setup(ext_modules=[extension], cmdclass={"build_ext": BuildCpu})
