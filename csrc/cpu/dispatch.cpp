// Chooses an instruction set when the module is imported: the fastest that this processor has, or the one asked for.
#include <stdexcept>
#include <string>

#include "ops.h"

namespace fastsae {

namespace base { extern const Ops table; }
#if defined(__x86_64__)
namespace avx2 { extern const Ops table; }
namespace avx512 { extern const Ops table; }
#endif

const Ops* const all_ops[] = {
#if defined(__x86_64__)
    &avx512::table, &avx2::table,
#endif
    &base::table, nullptr};

bool isa_supported(const char* name) {
  const std::string isa = name;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return isa == "base";
}

static const Ops* fastest() {
  for (const Ops* const* t = all_ops;; ++t)
    if (isa_supported((*t)->name)) return *t;
}

static const Ops* in_use = fastest();

const Ops& ops() { return *in_use; }

void use_isa(const char* name) {
  const std::string wanted = name;
  std::string have;
  for (const Ops* const* t = all_ops; *t; ++t) {
    if (!isa_supported((*t)->name)) continue;
    if (wanted == (*t)->name) {
      in_use = *t;
      return;
    }
    have += std::string(have.empty() ? "" : ", ") + (*t)->name;
  }
  throw std::invalid_argument("instruction set \"" + wanted + "\" is not available here; this processor has: " + have);
}

}  // namespace fastsae
