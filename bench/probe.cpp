// Peaks of this processor's units, on so many threads at once, as one line of JSON: products in 1e12 operations a second from
// registers, 0 where the processor lacks the instruction; reads of memory that stays in L2, in L3, and of memory beyond, and a copy,
// in GB/s (a copied byte counts twice). Arguments: threads, seconds for
// each, and "avx2" or "base" where nothing wider is to be measured.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

int threads = 1;
double seconds = 0.2;

// Work per second of all threads: work(thread) does some and says how much; the median of five rounds.
template <class Work> double rate(Work work) {
  std::vector<double> found;
  for (int round = 0; round < 5; ++round) {
    double all = 0, longest = 0;
#pragma omp parallel num_threads(threads) reduction(+ : all) reduction(max : longest)
    {
      const int thread = omp_get_thread_num();
#pragma omp barrier
      const double begun = omp_get_wtime();
      do all += work(thread);
      while (omp_get_wtime() - begun < seconds / 5);
      longest = omp_get_wtime() - begun;
    }
    found.push_back(all / longest);
  }
  std::sort(found.begin(), found.end());
  return found[2];
}

constexpr int kTurns = 20000;

// In the compiler's portable vectors, where nothing wider is there.
__attribute__((noinline)) void fp32_portable() {
  typedef float four __attribute__((vector_size(16)));
  four sum[8] = {}, a = {}, b = {};
  for (int turn = 0; turn < kTurns; ++turn) {
    asm volatile("" : "+m"(a), "+m"(b));
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] += a * b;
  }
  asm volatile("" : : "r"(&sum) : "memory");
}

#if defined(__x86_64__)
// A chain of one instruction for each register but the two operands: more than hide its latency. In assembly, as compilers spill or drop
// such loops; a call may overwrite every vector register anyway.
#define WIDE "8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31"
#define NARROW "4,5,6,7,8,9,10,11,12,13,14,15"
#define CHAINS(NAME, INSTRUCTION, CLEAR, KIND, REGISTERS)                                                              \
  __attribute__((noinline)) void NAME() {                                                                              \
    asm volatile(".irp r,0,1," REGISTERS "\n" CLEAR " %%" KIND "\\r, %%" KIND "\\r, %%" KIND "\\r\n.endr" : :);          \
    for (int turn = 0; turn < kTurns; ++turn)                                                                          \
      asm volatile(".irp r," REGISTERS "\n" INSTRUCTION " %%" KIND "0, %%" KIND "1, %%" KIND "\\r\n.endr" : :);        \
    asm volatile("vzeroupper" : :);                                                                                    \
  }

CHAINS(fp32_avx512, "vfmadd231ps", "vpxord", "zmm", WIDE)
CHAINS(fp32_avx2, "vfmadd231ps", "vpxor", "ymm", NARROW)
CHAINS(bf16_avx512, "vdpbf16ps", "vpxord", "zmm", WIDE)
CHAINS(int8_avx512, "vpdpbusd", "vpxord", "zmm", WIDE)
CHAINS(int8_avx2, "%{vex%} vpdpbusd", "vpxor", "ymm", NARROW)

// Linux hands out the tile registers on request.
bool has_tiles() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0; }

__attribute__((target("amx-tile"))) void set_tiles() {
  alignas(64) struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t columns[16] = {};
    uint8_t rows[16] = {};
  } shape;
  for (int tile = 0; tile < 8; ++tile) shape.columns[tile] = 64, shape.rows[tile] = 16;
  _tile_loadconfig(&shape);
}

__attribute__((target("amx-tile,amx-bf16"), noinline)) void bf16_amx() {
  set_tiles();
  for (int turn = 0; turn < kTurns; ++turn) {
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

__attribute__((target("amx-tile,amx-int8"), noinline)) void int8_amx() {
  set_tiles();
  for (int turn = 0; turn < kTurns; ++turn) {
    _tile_dpbusd(0, 4, 6); _tile_dpbusd(1, 4, 7); _tile_dpbusd(2, 5, 6); _tile_dpbusd(3, 5, 7);
  }
  _tile_release();
}
#endif

// operations: of one turn of `loop`, products and sums.
double products(void (*loop)(), double operations) {
  return rate([=](int) {
           loop();
           return operations * kTurns;
         }) / 1e12;
}

// Bytes of a cache as Linux gives them for the first core, or what is usual.
size_t cache(int level, size_t usual) {
  for (int index = 0; index < 8; ++index) {
    const std::string folder = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index);
    std::ifstream of_level(folder + "/level"), of_size(folder + "/size");
    int found = 0;
    size_t size = 0;
    if (of_level >> found && found == level && of_size >> size) return size << 10;   // "1024K"
  }
  return usual;
}

double read_rate(size_t bytes) {
  std::vector<std::vector<uint64_t>> own(threads);
#pragma omp parallel num_threads(threads)
  own[omp_get_thread_num()].assign(bytes / 8, 1);
  return rate([&](int thread) {
           const std::vector<uint64_t>& words = own[thread];
           typedef uint64_t two __attribute__((vector_size(16)));
           two sum[8] = {};
           for (size_t i = 0; i + 16 <= words.size(); i += 16)
#pragma GCC unroll 8
             for (int j = 0; j < 8; ++j) {
               two some;
               std::memcpy(&some, &words[i + 2 * j], 16);
               sum[j] |= some;
             }
           asm volatile("" : : "r"(&sum) : "memory");
           return double(words.size() * 8);
         }) / 1e9;
}

double copy_rate(size_t bytes) {
  std::vector<std::vector<char>> from(threads), to(threads);
#pragma omp parallel num_threads(threads)
  from[omp_get_thread_num()].assign(bytes, 1), to[omp_get_thread_num()].assign(bytes, 2);
  return rate([&](int thread) {
           std::memcpy(to[thread].data(), from[thread].data(), bytes);
           asm volatile("" : : "r"(to[thread].data()) : "memory");
           return 2.0 * bytes;
         }) / 1e9;
}

}  // namespace

int main(int count, char** given) {
  if (count > 1) threads = std::max(1, std::atoi(given[1]));
  if (count > 2) seconds = std::atof(given[2]);
  double fp32 = products(fp32_portable, 8 * 8), bf16 = 0, int8 = 0, amx_bf16 = 0, amx_int8 = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const std::string widest = count > 3 ? given[3] : "";
  const bool vectors = widest != "base", wide = vectors && widest != "avx2" && __builtin_cpu_supports("avx512f");
  if (wide) fp32 = products(fp32_avx512, 24 * 32);
  else if (vectors && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) fp32 = products(fp32_avx2, 12 * 16);
  if (wide && __builtin_cpu_supports("avx512bf16")) bf16 = products(bf16_avx512, 24 * 64);
  // GCC 12 knows no name for AVX-VNNI and AMX here: leaf 7 of CPUID has them.
  unsigned a = 7, b = 0, c = 0, d = 0, a1 = 7, c1 = 1;
  asm volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  asm volatile("cpuid" : "+a"(a1), "+c"(c1) : : "ebx", "edx");
  if (wide && __builtin_cpu_supports("avx512vnni")) int8 = products(int8_avx512, 24 * 128);
  else if (vectors && a1 >> 4 & 1) int8 = products(int8_avx2, 12 * 64);
  if (wide && d >> 24 & 1 && has_tiles()) {
    if (d >> 22 & 1) amx_bf16 = products(bf16_amx, 4 * 16 * 16 * 64.0);
    if (d >> 25 & 1) amx_int8 = products(int8_amx, 4 * 16 * 16 * 128.0);
  }
#endif
  const size_t l2 = cache(2, 1 << 20), l3 = cache(3, 32 << 20);
  std::printf("{\"fp32_tflops\": %.4f, \"bf16_tflops\": %.4f, \"int8_tops\": %.4f, \"amx_bf16_tflops\": %.4f, "
              "\"amx_int8_tops\": %.4f, \"l2_gbs\": %.2f, \"l3_gbs\": %.2f, \"read_gbs\": %.2f, \"copy_gbs\": %.2f}\n",
              fp32, bf16, int8, amx_bf16, amx_int8, read_rate(l2 / 2), read_rate(std::max(l3 / (4 * threads), 2 * l2)),
              read_rate(std::max<size_t>(256 << 20, 2 * l3)), copy_rate(std::max<size_t>(128 << 20, l3)));
}
