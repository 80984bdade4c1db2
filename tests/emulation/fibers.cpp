// The fibers of emulation.h: one grid at a time, block by block, each thread on its own stack.
#include "emulation.h"

#include <pthread.h>

#include <exception>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __x86_64__
#error "the emulation switches stacks in x86-64 assembly"
#endif

// Saves the callee-saved registers on the current stack and continues where `to` was left. ucontext would do the same with
// two system calls, thirty times slower.
extern "C" void emulation_switch(void** from, void* to);
asm(R"(
.text
.type emulation_switch, @function
emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch, . - emulation_switch
)");

namespace emulation {
namespace {

constexpr size_t STACK = 256 << 10;

enum class State { ready, at_warp, at_block, done };

struct Fiber {
  std::unique_ptr<char[]> stack;
  void* sp = nullptr;
  void* fake_stack = nullptr;
  Thread thread;
  State state = State::done;
};

struct Warp {
  uint64_t words[2][32];
  unsigned shown[2];  // lanes that have reached an exchange; two slots alternate, since a lane may be one ahead
  unsigned turn[32];
};

// Shared memory of a block: filled with one bits, and poisoned past its end.
class Shared {
 public:
  Shared() = default;
  Shared(size_t size, size_t alignment) : memory_(new char[size + alignment]) {
    const size_t offset = (alignment - reinterpret_cast<uintptr_t>(memory_.get()) % alignment) % alignment;
    data = memory_.get() + offset;
    std::memset(data, 0xff, size);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(static_cast<char*>(data) + size, alignment - offset);
#endif
  }
  void* data = nullptr;

 private:
  std::unique_ptr<char[]> memory_;
};

struct Machine {
  Settings settings;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> order;  // the order in which fibers run
  int threads = 0, left = 0, current = -1, turn = 0, at_block = 0;
  void* scheduler = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  Shared dynamic;
  std::map<const void*, Shared> statics;
  uint64_t random = 1;

  uint64_t next(uint64_t below) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return (random >> 33) % below;
  }
};

Machine& machine() {
  static Machine m;
  return m;
}

void switch_from(void** from, void** fake_stack, void* to, const void* bottom, size_t size, bool leaves_for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaves_for_good ? nullptr : fake_stack, bottom, size);
#else
  (void)bottom, (void)size, (void)leaves_for_good;
#endif
  emulation_switch(from, to);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(*fake_stack, nullptr, nullptr);
#endif
}

// Switches to the next ready fiber of this round, or else to the scheduler. Returns when this fiber is resumed.
void suspend(State state) {
  Machine& m = machine();
  Fiber& me = m.fibers[m.current];
  me.state = state;
  const bool for_good = state == State::done;
  if (!m.error)
    while (++m.turn < m.threads) {
      Fiber& next = m.fibers[m.order[m.turn]];
      if (next.state != State::ready) continue;
      m.current = m.order[m.turn];
      switch_from(&me.sp, &me.fake_stack, next.sp, next.stack.get(), STACK, for_good);
      return;
    }
  switch_from(&me.sp, &me.fake_stack, m.scheduler, m.scheduler_stack, m.scheduler_size, for_good);
}

void first_frame() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  try {
    (*m.body)();
  } catch (...) {
    if (!m.error) m.error = std::current_exception();
  }
  --m.left;
  suspend(State::done);
}

void prepare(Fiber& f) {
  if (!f.stack) f.stack.reset(new char[STACK]);
#if defined(__SANITIZE_ADDRESS__)
  // An abandoned fiber leaves its frames behind.
  if (f.state != State::done) __asan_unpoison_memory_region(f.stack.get(), STACK);
#endif
  auto top = reinterpret_cast<uintptr_t>(f.stack.get() + STACK) & ~uintptr_t{15};
  auto* words = reinterpret_cast<void**>(top) - 2;
  words[0] = reinterpret_cast<void*>(&first_frame);
  words[1] = nullptr;
  f.sp = words - 6;
  std::fill(words - 6, words, nullptr);
  f.fake_stack = nullptr;
  f.state = State::ready;
}

// The bounds of the scheduler's own stack: the sanitizer needs them when a fiber switches back to it.
void own_stack(Machine& m) {
  thread_local void* bottom = nullptr;
  thread_local size_t size = 0;
  if (!bottom) {
    pthread_attr_t attributes;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &bottom, &size);
    pthread_attr_destroy(&attributes);
  }
  m.scheduler_stack = bottom;
  m.scheduler_size = size;
}

template <class T> void shuffle(std::vector<T>& order) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[machine().next(i)]);
}

void run_block() {
  Machine& m = machine();
  m.left = m.threads;
  while (m.left) {
    if (m.settings.seed) shuffle(m.order);
    const auto ready = [&](int i) { return m.fibers[i].state == State::ready; };
    const auto first = std::find_if(m.order.begin(), m.order.end(), ready);
    if (first == m.order.end()) {
      const Thread& t = m.fibers[0].thread;
      int at_warp = 0;
      for (int i = 0; i < m.threads; ++i) at_warp += m.fibers[i].state == State::at_warp;
      throw std::logic_error("threads of block (" + std::to_string(t.block.x) + ", " + std::to_string(t.block.y) +
                             ") wait for each other for ever: " + std::to_string(m.at_block) + " at a barrier, " +
                             std::to_string(at_warp) + " for their warp, " + std::to_string(m.threads - m.left) + " have left");
    }
    m.turn = static_cast<int>(first - m.order.begin());
    m.current = *first;
    void* fake_stack = nullptr;
    const Fiber& f = m.fibers[*first];
    switch_from(&m.scheduler, &fake_stack, f.sp, f.stack.get(), STACK, false);
    if (m.error) return;
  }
}

}  // namespace

Settings& settings() { return machine().settings; }

const Thread& thread() { return machine().fibers[machine().current].thread; }

std::string refusal(const char* name, size_t shared) {
  if (machine().settings.refuse == "*" || machine().settings.refuse == name) return "told to refuse it";
  return shared > static_cast<size_t>(most_shared()) ? "more shared memory than a block can have" : "";
}

void* dynamic_shared() { return machine().dynamic.data; }

void* shared_of(const void* key, size_t size, size_t alignment) {
  Shared& place = machine().statics[key];
  if (!place.data) place = Shared(size, alignment);
  return place.data;
}

void wait_for_block() {
  Machine& m = machine();
  if (++m.at_block < m.threads) return suspend(State::at_block);
  m.at_block = 0;
  for (int i = 0; i < m.threads; ++i)
    if (m.fibers[i].state == State::at_block) m.fibers[i].state = State::ready;
}

void pause() { suspend(State::ready); }

const uint64_t* exchange(uint64_t mine) {
  Machine& m = machine();
  const int first = m.current / 32 * 32;
  Warp& w = m.warps[m.current / 32];
  const unsigned lane = m.current % 32, turn = w.turn[lane] ^= 1;
  w.words[turn][lane] = mine;
  if (++w.shown[turn] < 32) {
    suspend(State::at_warp);
  } else {
    w.shown[turn] = 0;
    for (int i = first; i < first + 32; ++i)
      if (m.fibers[i].state == State::at_warp) m.fibers[i].state = State::ready;
  }
  return w.words[turn];
}

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
  Machine& m = machine();
  m.threads = block.x * block.y * block.z;
  if (m.threads < 1 || m.threads > 1024) throw std::invalid_argument(std::to_string(m.threads) + " threads in a block");
  if (m.threads % 32) throw std::logic_error(std::to_string(m.threads) + " threads are not whole warps");
  if (grid.y > 65535 || grid.z > 65535) throw std::invalid_argument("a grid of " + std::to_string(grid.y) + " rows");
  if (m.fibers.size() < static_cast<size_t>(m.threads)) m.fibers.resize(m.threads);
  m.warps.assign(m.threads / 32, Warp{});
  m.body = &body;
  own_stack(m);
  m.error = nullptr;
  m.random = m.settings.seed;

  std::vector<int64_t> blocks(int64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  if (m.settings.seed) shuffle(blocks);
  m.order.resize(m.threads);
  std::iota(m.order.begin(), m.order.end(), 0);

  for (int64_t b : blocks) {
    const dim3 at(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    m.statics.clear();
    m.dynamic = Shared(shared, 128);
    m.at_block = 0;
    for (Warp& w : m.warps) w = Warp{};
    for (int i = 0; i < m.threads; ++i) {
      Fiber& f = m.fibers[i];
      prepare(f);
      f.thread = {dim3(i % block.x, i / block.x % block.y, i / block.x / block.y), at, block, grid,
                  static_cast<unsigned>(i % 32)};
    }
    run_block();
    if (m.error) std::rethrow_exception(m.error);
  }
}

}  // namespace emulation
