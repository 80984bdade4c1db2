// Which narrow formats this processor can screen in, and which is the fastest.
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "encode.h"

namespace fastsae {

int64_t words_per_row(Format format, int64_t d) {
  switch (format) {
    case Format::f32: return d;
    case Format::i8: return (d + 3) / 4;
    case Format::bf16: return (d + 1) / 2;
    default: return (d + 31) / 32 * 16;   // AMX reads tiles of 16 words
  }
}

#if defined(__x86_64__)
// The processor must have the tiles, and the kernel must let this process use them.
static bool amx_usable() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

bool format_supported(Format format, const char* isa) {
  if (format == Format::f32) return true;
#if defined(__x86_64__)
  if (std::string(isa) != "avx512") return false;
  __builtin_cpu_init();
  static const bool amx = amx_usable();
  switch (format) {
    case Format::i8: return __builtin_cpu_supports("avx512vnni");
    case Format::bf16: return __builtin_cpu_supports("avx512bf16");
    case Format::amx: return amx;
    case Format::amx_emulated: return true;
    case Format::f32: return true;
  }
#else
  (void)isa;
#endif
  return false;
}

// AMX in bf16 beats VNNI in 8 bits on the processors that have both (wider, and its bound is tighter).
Format tight_format(const char* isa) {
  if (format_supported(Format::amx, isa)) return Format::amx;
  if (format_supported(Format::bf16, isa)) return Format::bf16;
  return Format::f32;
}

// VNNI has twice the rate of the AVX-512 bf16 instruction. Its 32-bit sums are exact up to 66,000 inputs.
Format fastest_format(const char* isa, int64_t d) {
  const bool i8 = d <= 65536 && format_supported(Format::i8, isa);
  return i8 && !format_supported(Format::amx, isa) ? Format::i8 : tight_format(isa);
}

}  // namespace fastsae
