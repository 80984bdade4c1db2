"""setup.py on a copy of itself with one tiny .cu, and a stand-in for nvcc: for tests/test_cuda_build.py."""

from __future__ import annotations

import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).resolve().parent.parent

NVCC = """#!/bin/sh
# Knows four targets; writes down how it was called, makes what it is asked for, and fails where the source says so.
[ "$1" = --list-gpu-code ] && { echo sm_75 sm_80 sm_90 sm_100; exit; }
echo "$@" >> "$(dirname "$0")/calls"
while [ $# -gt 0 ]; do
  case "$1" in -o) object=$2;; -MF) depends=$2;; -c) source=$2;; esac
  shift
done
echo "said of $source"
[ -n "$source" ] && grep -q fails "$source" && exit 1
[ -n "$source" ] && grep -q "edited meanwhile" "$source" && touch "$(dirname "$source")/tiny.h"
touch "$object"
[ -z "$depends" ] || echo "$object : $source $(dirname "$source")/tiny.h" > "$depends"
"""


class Tree:
    """A tree with setup.py, one .cu and its header, and no nvcc until `install_nvcc`."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.cuda, self.monkeypatch = root, root / "csrc" / "cuda", monkeypatch
        self.objects = root / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "cuda"
        self.extension = root / "fastsae" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
        for folder in (self.cuda, self.extension.parent):
            folder.mkdir(parents=True)
        for name in ("exports.map", "tiny.h", "tiny.cu"):
            (self.cuda / name).touch()
            os.utime(self.cuda / name, (1e9, 1e9))  # older than any build
        copy(ROOT / "setup.py", root)
        (root / "fastsae" / "backends").mkdir()
        copy(ROOT / "fastsae" / "backends" / "extension.py", root / "fastsae" / "backends")
        self.given: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", self.given.update)
        spec = importlib.util.spec_from_file_location("setup_of_a_tiny_tree", root / "setup.py")
        assert spec is not None
        assert spec.loader is not None
        self.setup = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.setup)
        monkeypatch.setattr(self.setup.BuildExtensions, "build_extension", self.touch)
        # This machine may have an nvcc in the usual place.
        monkeypatch.setattr(self.setup, "NVCC", str(root / "nowhere" / "nvcc"))
        for name in ("CUDA_HOME", "FASTSAE_CUDA", "FASTSAE_CUDA_ARCHITECTURES"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("PATH", str(root / "nowhere"))
        monkeypatch.chdir(root)

    @staticmethod
    def touch(command: Any, extension: Any) -> None:
        """Stands in for the build of the CPU extension, which takes minutes."""
        target = Path(command.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()

    def install_nvcc(self) -> None:
        nvcc = self.root / "toolkit" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(NVCC)
        nvcc.chmod(0o755)
        self.monkeypatch.setenv("CUDA_HOME", str(self.root / "toolkit"))
        self.monkeypatch.setenv("PATH", "/usr/bin:/bin")

    def build(self, mode: str | None = None) -> list[str]:
        """What `setup.py build_ext --inplace` calls nvcc with."""
        if mode is not None:
            self.monkeypatch.setenv("FASTSAE_CUDA", mode)
        given = {"packages": ["fastsae"], "ext_modules": list(self.given["ext_modules"]), "script_name": "setup.py"}
        distribution = setuptools.Distribution(given)
        distribution.get_command_obj("build").build_temp = str(self.root / "pip")  # as pip does for an editable install
        command = self.setup.BuildExtensions(distribution)
        command.inplace = True
        command.ensure_finalized()
        command.run()
        calls = self.root / "toolkit" / "bin" / "calls"
        made = calls.read_text().splitlines() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return made
