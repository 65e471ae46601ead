// Loads of 4, 8 or 16 bytes from anywhere: of what lies behind the end of a row there are zeros.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sparsify_cuda {

// `count` 32-bit words from `from`, of which only `bytes` bytes exist (maybe none, or fewer than none). wide: the
// address is a multiple of 4 * count, and the words exist all or not at all; else byte by byte.
template <bool wide, int count>
__device__ void load_words(uint32_t (&words)[count], const void* from, int64_t bytes) {
  static_assert(count == 1 || count == 2 || count == 4);
  if constexpr (wide && count == 4) {
    const uint4 got = bytes > 0 ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
    words[0] = got.x, words[1] = got.y, words[2] = got.z, words[3] = got.w;
  } else if constexpr (wide && count == 2) {
    const uint2 got = bytes > 0 ? *static_cast<const uint2*>(from) : uint2{0, 0};
    words[0] = got.x, words[1] = got.y;
  } else if constexpr (wide) {
    words[0] = bytes > 0 ? *static_cast<const uint32_t*>(from) : 0;
  } else {
    const uint8_t* at = static_cast<const uint8_t*>(from);
#pragma unroll
    for (int i = 0; i < count; ++i) {
      words[i] = 0;
#pragma unroll 1
      for (int j = 4 * i; j < 4 * i + 4 && j < bytes; ++j) words[i] |= uint32_t(at[j]) << j % 4 * 8;
    }
  }
}

// The same for a multiple of 4 words; wide: `from` is a multiple of 16 bytes.
template <bool wide, int count>
__device__ void load_many_words(uint32_t (&words)[count], const void* from, int64_t bytes) {
#pragma unroll
  for (int i = 0; i < count; i += 4) {
    uint32_t four[4];
    load_words<wide>(four, static_cast<const uint8_t*>(from) + 4 * i, bytes - 4 * i);
#pragma unroll
    for (int j = 0; j < 4; ++j) words[i + j] = four[j];
  }
}

// Whether every load may be wide: rows begin on 16 bytes in arrays of whole 32 columns.
inline bool all_wide(int64_t K, const void* a, const void* b, const void* c) {
  const auto on_16 = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return K % 32 == 0 && on_16(a) && on_16(b) && on_16(c);
}

// Sum over a warp, in every lane, always in the same order.
__device__ inline float warp_sum(float value) {
  for (int bits = 16; bits > 0; bits /= 2) value += __shfl_xor_sync(0xffffffffu, value, bits);
  return value;
}

}  // namespace sparsify_cuda
