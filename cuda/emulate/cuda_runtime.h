// With this folder in front of the include path, g++ compiles our .cu files and runs their kernels on the CPU.
//
// Only what our kernels use of CUDA exists here, with the meaning of the CUDA C++ Programming Guide. A warp has 32
// lanes and takes part in its shuffles and votes as a whole. Blocks run one after another; shared memory keeps what the
// block before left in it. Not for use by several CPU threads.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;

enum cudaMemcpyKind { cudaMemcpyDefault = 4 };
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t count, cudaMemcpyKind) {
  if (count) std::memcpy(to, from, count);
  return cudaSuccess;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulate {

// Shared memory that a launch asks for, of exactly the right size, on 16 bytes. At first it holds
// numbers so large that nobody reads them unseen, which as metadata of mma.sp are allowed.
struct DynamicShared {
  inline static void* now = nullptr;
  inline static int last_bytes = 0;
  explicit DynamicShared(int bytes) : memory(new uint4[size_t(bytes) / sizeof(uint4)]) {
    if (bytes % int(sizeof(uint4))) fail("dynamic shared memory must be a multiple of 16 bytes here");
    std::memset(static_cast<void*>(memory.get()), 0xee, size_t(bytes));
    now = memory.get();
    last_bytes = bytes;
  }
  ~DynamicShared() { now = nullptr; }
  DynamicShared(const DynamicShared&) = delete;
  std::unique_ptr<uint4[]> memory;
};

// kernel<<<grid, block>>>(args...)
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 threads, Arguments... arguments) {
  const unsigned count = threads.x * threads.y * threads.z;
  if (!count || count > kMostThreads || !grid.x || grid.x > 0x7fffffffu || !grid.y || grid.y > 65535 || !grid.z ||
      grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (count % kWarp) fail("a block must be whole warps here");
  gridDim = grid;
  blockDim = threads;
  const auto enter = [&](int i) {
    const unsigned index = unsigned(i);
    threadIdx = dim3(index % threads.x, index / threads.x % threads.y, index / threads.x / threads.y);
  };
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t b = 0; b < blocks; ++b) {
    const uint64_t at = backwards ? blocks - 1 - b : b;
    blockIdx = dim3(unsigned(at % grid.x), unsigned(at / grid.x % grid.y), unsigned(at / grid.x / grid.y));
    run_block(int(count), enter, [&] { kernel(arguments...); });
  }
  return cudaSuccess;
}

inline void whole_warp(unsigned mask) {
  if (mask != 0xffffffffu) fail("only whole warps take part in shuffles and votes here");
}

}  // namespace emulate

inline void __syncthreads() { emulate::wait_at(emulate::block.barrier); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulate::whole_warp(mask);
  emulate::wait_at(emulate::warp().barrier);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  emulate::whole_warp(mask);
  return emulate::shown_by<T>(emulate::exchange(value), from & 31);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, emulate::lane() ^ bits);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const int from = emulate::lane() - int(delta);
  const T got = __shfl_sync(mask, value, from);
  return from < 0 ? value : got;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  emulate::whole_warp(mask);
  const unsigned char* all = emulate::exchange(predicate);
  unsigned votes = 0;
  for (int i = 0; i < emulate::kWarp; ++i) votes |= unsigned(emulate::shown_by<int>(all, i) != 0) << i;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

template <class T>
T atomicAdd(T* at, T value) {
  const T old = *at;
  *at = T(old + value);
  return old;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Byte i of the result is byte `selector >> 4 i & 7` of the eight of low and high.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}

// The dot product of four signed bytes, added to c.
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += int(int8_t(unsigned(a) >> 8 * i)) * int(int8_t(unsigned(b) >> 8 * i));
  return c;
}

template <class T>
T __ldcs(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % alignof(T)) emulate::fail("a wide load from an address that is not aligned");
  return *at;
}
