// The two limits of this machine, measured with the threads and instructions that the kernels use.
#pragma once
#include <atomic>

#include "kernels.h"
#include "unrolled.h"

namespace sparsify { namespace {

// Sum of all of `data`: reads every byte once and does next to nothing else. Time it for the read bandwidth.
template <class V>
float read_all(const float* data, int64_t count, const Parallel& parallel) {
  constexpr int64_t kPerTask = 1 << 16;  // 256 KiB
  std::atomic<float> total{0.0f};
  auto task = [&](int64_t index) {
    const float* at = data + index * kPerTask;
    const int64_t length = count - index * kPerTask < kPerTask ? count - index * kPerTask : kPerTask;
    typename V::F sum[8];
    unrolled<8>([&](auto j) SPARSIFY_INLINE { sum[j] = V::zero(); });
    for (int64_t i = 0; i + 8 * V::kLanes <= length; i += 8 * V::kLanes)
      unrolled<8>([&](auto j) SPARSIFY_INLINE { sum[j] = V::add(sum[j], V::load(at + i + j * V::kLanes)); });
    unrolled<7>([&](auto j) SPARSIFY_INLINE { sum[0] = V::add(sum[0], sum[j + 1]); });
    const float part = V::sum(sum[0]);
    for (float old = total; !total.compare_exchange_weak(old, old + part);) {
    }
  };
  parallel_for(parallel, (count + kPerTask - 1) / kPerTask, task);
  return total;
}

// `steps` rounds of independent FMAs in each of 64 tasks; returns how many floating-point operations that was.
template <class V>
int64_t fma_burst(int64_t steps, const Parallel& parallel) {
  constexpr int kChains = 10;  // more than latency 4 x 2 a cycle, and fits 16 registers
  constexpr int64_t kTasks = 64;
  auto task = [&](int64_t) {
    typename V::F sum[kChains], factor = V::broadcast(0.999f), term = V::broadcast(0.001f);
    unrolled<kChains>([&](auto j) SPARSIFY_INLINE { sum[j] = V::zero(); });
    for (int64_t i = 0; i < steps; ++i)
      unrolled<kChains>([&](auto j) SPARSIFY_INLINE {
        sum[j] = V::fma(sum[j], factor, term);
        asm volatile("" : "+v"(sum[j]));  // keep it, and in a register
      });
  };
  parallel_for(parallel, kTasks, task);
  return steps * kTasks * kChains * V::kLanes * 2;
}

}}  // namespace sparsify::
