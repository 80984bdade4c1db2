"""The fibers that emulate a GPU's threads detect the faults they are meant to detect: each fault here is planted."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent / "emulation"
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

PROGRAM = r"""
#include <emulation.h>
#include <cstdio>
#include <cstdlib>

constexpr unsigned ALL = 0xffffffffu;

// The sum of 128 numbers, all of which have to be there before one thread adds them up.
template <bool BARRIER> void sum(const float* x, float* out) {
  SHARED(float[128], shown);
  shown[threadIdx.x] = x[threadIdx.x];
  if (BARRIER) __syncthreads();
  if (threadIdx.x == 127) {
    float total = 0;
    for (int i = 0; i < 128; ++i) total += shown[i];
    *out = total;
  }
}

void warps(int* out) {
  const int lane = threadIdx.x % 32;
  int total = lane;
  for (int step = 16; step; step /= 2) total += __shfl_xor_sync(ALL, total, step);
  const unsigned odd = __ballot_sync(ALL, lane % 2);
  const int from_left = __shfl_up_sync(ALL, lane, 3), from_right = __shfl_down_sync(ALL, lane, 3, 8);
  const bool shifted = from_left == (lane < 3 ? lane : lane - 3) && from_right == (lane % 8 < 5 ? lane + 3 : lane);
  const bool voted = __any_sync(ALL, lane == 7) && !__all_sync(ALL, lane);
  out[threadIdx.x] = total == 496 && odd == 0xaaaaaaaau && shifted && voted;
}

void leaves_early() { if (threadIdx.x < 64) __syncthreads(); }
void half_a_warp() { if (threadIdx.x % 32 < 16) __shfl_sync(ALL, 1, 0); }
void named_lanes() { __ballot_sync(0xffff, 1); }
void past_shared() { SHARED(int[4], few); int* p = few; p[threadIdx.x] = 1; }
void past_dynamic() { static_cast<char*>(emulation::dynamic_shared())[threadIdx.x] = 1; }
void shared_is_fresh(int* out) {
  SHARED(float[32], left_over);
  out[blockIdx.x * 32 + threadIdx.x] = left_over[threadIdx.x] != left_over[threadIdx.x];
  left_over[threadIdx.x] = 1;
}

int main(int, char** arguments) {
  const std::string what = arguments[1];
  emulation::settings().seed = std::strtoull(arguments[2], nullptr, 10);
  float x[128], total = 0;
  int flags[128] = {};
  for (int i = 0; i < 128; ++i) x[i] = 1;
  try {
    if (what == "sum") emulation::run(1, 128, 0, [&] { sum<true>(x, &total); });
    if (what == "no barrier") emulation::run(1, 128, 0, [&] { sum<false>(x, &total); });
    if (what == "warps") emulation::run(1, 128, 0, [&] { warps(flags); });
    if (what == "fresh") emulation::run(4, 32, 0, [&] { shared_is_fresh(flags); });
    if (what == "leaves early") emulation::run(1, 128, 0, leaves_early);
    if (what == "half a warp") emulation::run(1, 32, 0, half_a_warp);
    if (what == "named lanes") emulation::run(1, 32, 0, named_lanes);
    if (what == "past shared") emulation::run(1, 64, 0, past_shared);
    if (what == "past dynamic") emulation::run(1, 64, 63, past_dynamic);
    if (what == "odd block") emulation::run(1, 33, 0, [] {});
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  int right = total == 128;
  for (int flag : flags) right += flag;
  std::printf("%d\n", right);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("g++") is None or os.uname().machine != "x86_64":
        pytest.skip("the emulation needs g++ and an x86-64 processor")
    folder = tmp_path_factory.mktemp("emulation")
    (folder / "planted.cpp").write_text(PROGRAM)
    sources = [str(folder / "planted.cpp"), str(HERE / "fibers.cpp")]
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-g1", *SANITIZE, f"-I{HERE}", *sources, "-o", str(folder / "planted")], check=True
    )
    return folder / "planted"


def run(program: Path, what: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": ""}
    return subprocess.run([str(program), what, str(seed)], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("what", "right"), [("sum", 1), ("warps", 128), ("fresh", 128)])
def test_correct_kernels_run_in_every_order(program: Path, what: str, right: int, seed: int) -> None:
    done = run(program, what, seed)
    assert done.stdout.split() == [str(right)], done.stdout + done.stderr


def test_a_missing_barrier_shows_once_threads_are_shuffled(program: Path) -> None:
    """In order, the thread that adds runs last and hides the fault. Shuffled, it reads unwritten memory: NaN."""
    assert run(program, "no barrier", 0).stdout.split() == ["1"]
    assert all(run(program, "no barrier", seed).stdout.split() == ["0"] for seed in range(1, 6))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("leaves early", "wait for each other for ever: 64 at a barrier, 0 for their warp, 64 have left"),
        ("half a warp", "wait for each other for ever: 0 at a barrier, 16 for their warp, 16 have left"),
        ("named lanes", "collectives of whole warps only"),
        ("odd block", "33 threads are not whole warps"),
        ("past shared", "use-after-poison"),
        ("past dynamic", "use-after-poison"),
    ],
)
def test_a_fault_that_breaks_a_gpu_is_an_error(program: Path, what: str, says: str) -> None:
    done = run(program, what)
    assert done.returncode != 0
    assert says in done.stdout + done.stderr
