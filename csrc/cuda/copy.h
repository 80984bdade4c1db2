// Rows on their way from global to shared memory while a block computes.
//
// Copies are begun in stages: a stage is some rows that are waited for together, and has memory of its own, which is used
// again and again. On sm_90 and later one thread hands whole rows to the copy engine and an mbarrier of the stage counts
// their bytes (cp.async.bulk); before, every thread copies pieces of 16 bytes, and a stage is a group of those (cp.async).
// Neither takes registers while the bytes are under way. Rows are whole 16 bytes at multiples of 16, of either memory.
#pragma once
#include "device.h"
#ifdef FASTSAE_EMULATED
#include <copies.h>
#endif

namespace fastsae {

struct RowCopy {
  void* to;          // shared
  const void* from;  // global
  uint32_t bytes;    // 0: no such row
};

// -- PTX ---------------------------------------------------------------------------------------------------------------

#ifdef FASTSAE_EMULATED

inline bool has_copy_engine() { return emulation::capability() >= 90; }
using emulation::arrive_expecting, emulation::bulk_copy, emulation::commit_group, emulation::copy_16;
using emulation::forget_groups, emulation::init_barrier, emulation::wait_for_phase;
template <int LATER> void wait_for_groups() { emulation::wait_for_groups(LATER); }
inline void order_proxies() {}

#else

// Of what this was compiled for, which may be older than the device that it runs on.
__device__ constexpr bool has_copy_engine() {
#if __CUDA_ARCH__ >= 900
  return true;
#else
  return false;
#endif
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline void init_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// What this thread, or others before a barrier, did to shared memory comes before what the copy engine does from here on.
__device__ inline void order_proxies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

__device__ inline void arrive_expecting(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#endif
}

// Each row is read once a step: out of L2 first, where gathered rows are worth more.
__device__ inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
               ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier)),
               "l"(policy) : "memory");
#endif
}

__device__ inline void wait_for_phase(uint64_t* barrier, uint32_t parity) {
#if __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done)
    asm volatile("{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
                 : "=r"(done) : "r"(shared_address(barrier)), "r"(parity) : "memory");
#endif
}

__device__ inline void forget_groups() {}

__device__ inline void copy_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(__cvta_generic_to_global(from))
               : "memory");
}

__device__ inline void commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int LATER> __device__ inline void wait_for_groups() {  // all but so many of the last
  asm volatile("cp.async.wait_group %0;" ::"n"(LATER) : "memory");
}

#endif

// -- stages ------------------------------------------------------------------------------------------------------------

class Stages {
 public:
  // Every thread comes here first. arrived: shared, a word for each stage.
  __device__ Stages(uint64_t* arrived, int stages) : arrived_(arrived) {
    forget_groups();
    if (!has_copy_engine()) return;
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < stages; ++stage) init_barrier(arrived + stage);
      order_proxies();
    }
    __syncthreads();
  }

  // Every thread comes here, after a barrier behind which no thread reads the stage. none: nothing is left to copy,
  // but the stages go on being counted.
  template <int ROWS> __device__ void begin(int stage, const RowCopy (&rows)[ROWS], bool none) const {
    if (has_copy_engine()) {
      if (threadIdx.x || none) return;
      uint32_t bytes = 0;
#pragma unroll
      for (int r = 0; r < ROWS; ++r) bytes += rows[r].bytes;
      order_proxies();
      arrive_expecting(arrived_ + stage, bytes);
#pragma unroll
      for (int r = 0; r < ROWS; ++r)
        if (rows[r].bytes) bulk_copy(rows[r].to, rows[r].from, rows[r].bytes, arrived_ + stage);
    } else {
      if (!none) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll 1
          for (uint32_t at = 16 * threadIdx.x; at < rows[r].bytes; at += 16 * blockDim.x)
            copy_16(static_cast<char*>(rows[r].to) + at, static_cast<const char*>(rows[r].from) + at);
      }
      commit_group();
    }
  }

  // Until the rows of a stage are there for every thread. use: how often it was waited for before; LATER: how many stages
  // were begun after it.
  template <int LATER> __device__ void wait(int stage, uint32_t use) const {
    if (has_copy_engine()) {
      wait_for_phase(arrived_ + stage, use % 2);
    } else {
      wait_for_groups<LATER>();
      __syncthreads();
    }
  }

 private:
  uint64_t* arrived_;
};

}  // namespace fastsae
