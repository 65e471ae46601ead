// The kernels of a processor with AMX: bfloat16, 8 and 4 bits on tiles, everything else as in avx512bf16.cpp. Compiled by
// amx.cpp for the processor's own tiles and by amx_model.cpp for the model of them.
#pragma once
#include "amx.h"

namespace sparsify { namespace {

// Up to here memory is the limit, and vectors read it faster; 4-bit codes take longer to expand. As measured.
constexpr int64_t kFewTokens = 2, kFewTokensI4 = 8;

template <class Weight>
bool on_tiles(const Weight& w, int64_t tokens) {
  if (w.rows == 0 || w.type == DType::f32 || w.type == DType::f16) return false;
  const bool has_decode = is_24(w) || std::is_same_v<Weight, BitmaskWeight>;
  return tokens > (w.type == DType::i4 && has_decode ? kFewTokensI4 : kFewTokens);
}

inline void linear_nm(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  if (!on_tiles(w, tokens) || !linear_tiles(w, x, tokens, bias, y, parallel))
    kAvx512Bf16.linear_nm(w, x, tokens, bias, y, parallel);
}

inline void linear_bitmask(const BitmaskWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                           const Parallel& parallel) {
  if (!on_tiles(w, tokens) || !linear_tiles(w, x, tokens, bias, y, parallel))
    kAvx512Bf16.linear_bitmask(w, x, tokens, bias, y, parallel);
}

// `steps` rounds of what the kernels do for one step of columns, in each of 64 tasks, on numbers as real ones are (a core
// takes less power for zeros, and is faster); returns how many operations that was. Time it for the peak.
template <class Multiply>
int64_t tile_products(int64_t columns, int64_t steps, const Parallel& parallel) {
  constexpr int64_t kTasks = 64;
  auto task = [&](int64_t) {
    thread_local KeptScratch<char> room;
    char* const at = room.get(8 * kTileBytes);
    for (uint32_t i = 0, bits = 1; i < 8 * kTileBytes; i += 2) {
      bits = bits * 1664525 + 1013904223;
      const uint16_t half = columns == 64 ? uint16_t(bits >> 16) : uint16_t(0x3f00 | (bits >> 16 & 0x80ff));  // 0.5 to 1
      std::memcpy(at + i, &half, 2);
    }
    const Tiles tiles;
    unrolled<4>([&](auto i) SPARSIFY_INLINE { Tiles::zero<i>(); });
    for (int64_t s = 0; s < steps; ++s) {
      const char* const from = at + s % 2 * 4 * kTileBytes;
      unrolled<4>([&](auto i) SPARSIFY_INLINE { Tiles::load<4 + i>(from + i * kTileBytes); });
      unrolled<2>([&](auto t) SPARSIFY_INLINE {
        Multiply::template dp<2 * t, 4, 6 + t>();
        Multiply::template dp<2 * t + 1, 5, 6 + t>();
      });
    }
  };
  parallel_for(parallel, kTasks, task);
  return kTasks * steps * 4 * 2 * kTileRows * kTileTokens * columns;
}

inline int64_t tile_burst(DType type, int64_t steps, const Parallel& parallel) {
  return type == DType::i8 ? tile_products<MultiplyI8>(64, steps, parallel)
                           : tile_products<MultiplyBf16>(32, steps, parallel);
}

constexpr Kernels tile_kernels(const char* isa) {
  return {isa,
          linear_nm,
          linear_bitmask,
          [](auto... a) { kAvx512.pairwise_max_sum(a...); },
          [](auto... a) { return kAvx512.read_all(a...); },
          [](auto... a) { return kAvx512.fma_burst(a...); },
          tile_burst};
}

}}  // namespace sparsify::
