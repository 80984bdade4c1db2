// Twins of the PTX in csrc/cuda/copy.h. A real copy may write its destination at any time until a thread waits for it. The
// emulated one spoils its destination and moves the data at the wait, so a missing wait or early reuse shows as NaN.
#pragma once
#include <deque>
#include <map>
#include <vector>

#include "emulation.h"

namespace emulation {

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

inline Copy begin_copy(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16 || !bytes)
    throw std::logic_error("a copy of " + std::to_string(bytes) + " bytes is not of whole 16 bytes at multiples of 16");
  std::memset(to, 0xff, bytes);
  return {to, from, bytes};
}

inline void finish(const Copy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }

// -- bulk copies, counted by an mbarrier with one arrival ----------------------------------------------------------------

struct Barrier {
  unsigned phase = 0;  // its parity
  bool arrived = false;
  size_t expected = 0;
  std::vector<Copy> copies;
};

inline std::map<const void*, Barrier>& barriers() {
  static std::map<const void*, Barrier> all;
  return all;
}

inline void init_barrier(uint64_t* barrier) {
  if (!barriers()[barrier].copies.empty()) throw std::logic_error("a block has ended with copies on their way");
  barriers()[barrier] = Barrier{};
}

inline void arrive_expecting(uint64_t* barrier, size_t bytes) {
  Barrier& b = barriers().at(barrier);
  if (b.arrived) throw std::logic_error("a barrier is arrived at twice in a phase");
  b.arrived = true;
  b.expected = bytes;
}

inline void bulk_copy(void* to, const void* from, size_t bytes, uint64_t* barrier) {
  barriers().at(barrier).copies.push_back(begin_copy(to, from, bytes));
}

inline void wait_for_phase(uint64_t* barrier, unsigned parity) {
  Barrier& b = barriers().at(barrier);
  for (int polls = 0; b.phase == parity; ++polls) {
    size_t bytes = 0;
    for (const Copy& copy : b.copies) bytes += copy.bytes;
    if (b.arrived && bytes == b.expected) {
      for (const Copy& copy : b.copies) finish(copy);
      b = Barrier{1 - b.phase, false, 0, {}};
    } else if (polls == 10000) {
      throw std::logic_error("a barrier expects " + std::to_string(b.expected) + " bytes and gets " + std::to_string(bytes));
    } else {
      pause();
    }
  }
}

// -- each thread's own copies, in groups ---------------------------------------------------------------------------------

inline std::deque<std::vector<Copy>>& groups() {  // of this thread; the last is open
  static std::map<unsigned, std::deque<std::vector<Copy>>> all;
  const Thread& me = thread();
  return all[(me.index.z * me.block_shape.y + me.index.y) * me.block_shape.x + me.index.x];
}

inline void forget_groups() { groups().assign(1, {}); }  // at the start of a block

inline void copy_16(void* to, const void* from) { groups().back().push_back(begin_copy(to, from, 16)); }

inline void commit_group() { groups().emplace_back(); }

inline void wait_for_groups(size_t later) {  // all but the last `later` groups
  for (; groups().size() > later + 1; groups().pop_front())
    for (const Copy& copy : groups().front()) finish(copy);
}

}  // namespace emulation
