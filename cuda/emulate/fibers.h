// A block of CUDA threads as cooperative fibers of one CPU thread: what cuda_runtime.h beside this file runs on.
//
// A fiber runs until it waits for others, at a barrier of its block or of its warp, and a warp runs as far ahead of the
// others as it can. So a run is exactly repeatable, and AddressSanitizer sees every access. A kernel that forgets a
// barrier reads what the order of the fibers makes it read; run it in both orders (`backwards`) and one of them is
// wrong. Fibers that wait for one that has returned abort.
#pragma once
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulate {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kSlotBytes = 64;  // the most that a lane shows the others at once

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda/emulate: %s\n", what);
  std::abort();
}

// Fibers that have come to a barrier; all of `size` open it for the next round.
struct Barrier {
  int size = 0, arrived = 0;
  uint64_t round = 0;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char slots[2][kWarp][kSlotBytes];  // two: a lane may be one exchange ahead of another
};

// A copy that cp.async has begun. It happens when the thread waits for its group, the latest moment allowed.
struct Copy {
  void* to;
  const void* from;
  size_t bytes, read;  // bytes behind the first `read` become 0
};

struct Fiber {
  ucontext_t context;
  int index = 0;
  bool done = false;
  Barrier* waits_for = nullptr;
  uint64_t round = 0;
  unsigned exchanges = 0;
  std::vector<std::vector<Copy>> copies;  // by group, the last one still open
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  Fiber* current = nullptr;
  std::function<void()> body;
  const void* scheduler_stack = nullptr;  // for the sanitizer
  size_t scheduler_stack_bytes = 0;
};

inline Block block;
inline bool backwards = false;

inline std::unique_ptr<unsigned char[]>& stacks() {
  static std::unique_ptr<unsigned char[]> memory(new unsigned char[kMostThreads * kStackBytes]);
  return memory;
}

// Switches to `to`; returns when somebody switches back to `from`.
inline void switch_fiber(ucontext_t& from, ucontext_t& to, const void* stack, size_t bytes, bool leaves = false) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(leaves ? nullptr : &fake_stack, stack, bytes);
  swapcontext(&from, &to);
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#else
  (void)stack, (void)bytes, (void)leaves;
  swapcontext(&from, &to);
#endif
}

inline void back_to_scheduler(bool leaves) {
  switch_fiber(block.current->context, block.scheduler, block.scheduler_stack, block.scheduler_stack_bytes, leaves);
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_bytes);
#endif
  block.body();
  block.current->done = true;
  back_to_scheduler(true);
}

inline void wait_at(Barrier& barrier) {
  Fiber& self = *block.current;
  self.round = barrier.round;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.round;
    return;
  }
  self.waits_for = &barrier;
  back_to_scheduler(false);
}

inline int lane() { return block.current->index % kWarp; }
inline Warp& warp() { return block.warps[size_t(block.current->index / kWarp)]; }

// Shows `mine` to the warp: returns what all 32 lanes showed, at multiples of kSlotBytes, until the next exchange.
template <class T>
const unsigned char* exchange(const T& mine) {
  static_assert(sizeof(T) <= kSlotBytes);
  auto& slots = warp().slots[block.current->exchanges++ % 2];
  std::memcpy(slots[lane()], &mine, sizeof mine);
  wait_at(warp().barrier);
  return slots[0];
}

template <class T>
T shown_by(const unsigned char* slots, int lane) {
  T value;
  std::memcpy(&value, slots + size_t(lane) * kSlotBytes, sizeof value);
  return value;
}

// How often one of the 8 rows of 16 bytes of an ldmatrix waited for another in the same banks: a matrix is read at once
// where all 8 are in different ones.
inline uint64_t matrices = 0, conflicts = 0;

inline void count_conflicts(const unsigned char* rows) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    int in_bank[8] = {}, most = 0;
    for (int row = 0; row < 8; ++row) {
      const auto address = reinterpret_cast<uintptr_t>(shown_by<const void*>(rows, 8 * matrix + row));
      const int count = ++in_bank[address / 16 % 8];
      most = count > most ? count : most;
    }
    ++matrices;
    conflicts += uint64_t(most - 1);
  }
}

// Runs `body` once for each of `threads` threads; `enter(i)` is called whenever thread i goes on.
inline void run_block(int threads, const std::function<void(int)>& enter, std::function<void()> body) {
  block.body = std::move(body);
  block.fibers.clear();
  block.fibers.resize(size_t(threads));
  block.warps.assign(size_t(threads / kWarp), Warp());
  for (Warp& warp : block.warps) warp.barrier.size = kWarp;
  block.barrier = Barrier();
  block.barrier.size = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[size_t(i)];
    fiber.index = i;
    fiber.copies.emplace_back();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks().get() + size_t(i) * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  int left = threads;
  const auto run_if_ready = [&](int i) {
    Fiber& fiber = block.fibers[size_t(i)];
    if (fiber.done || (fiber.waits_for && fiber.waits_for->round == fiber.round)) return false;
    fiber.waits_for = nullptr;
    block.current = &fiber;
    enter(i);
    switch_fiber(block.scheduler, fiber.context, fiber.context.uc_stack.ss_sp, kStackBytes);
    left -= fiber.done;
    return true;
  };
  while (left > 0) {
    bool moved = false;
    for (int w = 0; w < threads; w += kWarp)
      for (bool again = true; again; moved |= again) {  // a warp goes on as long as any of its lanes can
        again = false;
        for (int i = w; i < w + kWarp; ++i) again |= run_if_ready(backwards ? threads - 1 - i : i);
      }
    if (!moved) fail("threads wait at a barrier that others never reach");
  }
}

}  // namespace emulate
