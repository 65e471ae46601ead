// 2:4 with many tokens on AVX-512: the columns in the lanes, the activations permuted to where the weights are.
//
//   x        64 bytes of one token: C columns (32 bfloat16 or 64 8-bit codes)
//   weights  the C / 2 kept values of row r in the lower half of a register, those of row r + 4 in the upper
//   places   which column of x each of them takes
//   sum     += weights * permute(x, places)            one permute and one multiply-add for two rows of C columns
//
// Both operands stay in registers for 4 tokens by 8 rows, so the level 1 cache is out of the way, and the limit is the
// three ports that permutes and multiply-adds share: 1.5 pairs a cycle, each worth 2 C dense multiply-adds. Weights and
// places are unpacked once for a block of columns and kPanelTokenBlock tokens. Sums over the lanes come last.
//
// E, the element, is one of the structs of panel_bf16.h, panel_i8.h and panel_i4.h; E::Block may hold more than weights and
// places.
#pragma once
#include <immintrin.h>

#include "rows.h"
#include "scratch.h"
#include "unrolled.h"

namespace sparsify { namespace {

constexpr int kPairs = 4, kPairTokens = 4;      // register block: rows r and r + 4 for r < 4, by 4 tokens
constexpr int64_t kPanelRows = 2 * kPairs;
constexpr int64_t kPanelSteps = 32;             // steps of 64 bytes in a block: 16 KiB of weights and places
constexpr int64_t kPanelTokenBlock = 128;       // tokens that share an unpacking
constexpr int64_t kPanelChunk = 64;              // rows in a task

// What rows that do not exist read: a block of zeros.
alignas(64) constexpr char kZeros[kPanelSteps * 32] = {};
constexpr uint8_t kNoCodes[kPanelSteps * 8] = {};

// A row of W from step `step` on, for the elements that are stored as they are multiplied: 32 bytes of values to a step.
struct HalfRow {
  const char* values;
  const uint8_t* codes;

  HalfRow(const NmWeight& w, int64_t row, int64_t row_last, int64_t step) : values(kZeros), codes(kNoCodes) {
    if (row >= row_last) return;
    values = static_cast<const char*>(w.values) + row * w.value_bytes_per_row() + step * 32;
    codes = w.indices + row * w.index_bytes_per_row() + step * 8 / int64_t(byte_size(w.type));
  }
};

struct alignas(64) PanelBlock {
  __m512i weights[kPanelSteps][kPairs];
  __m512i places[kPanelSteps][kPairs];
};

// sums[r * kPairTokens + t] (+)= a block of weights x 4 tokens; x is [steps][4][64 bytes].
template <class E>
void panel_block(const typename E::Block& block, int64_t steps, const char* x, __m512i* sums, bool first) {
  typename E::Sum sum[kPairs][kPairTokens];
  unrolled<kPairs>([&](auto r) SPARSIFY_INLINE {
    unrolled<kPairTokens>([&](auto t) SPARSIFY_INLINE {
      sum[r][t] = first ? E::zero() : E::from_bits(_mm512_load_si512(sums + r * kPairTokens + t));
    });
  });
  for (int64_t s = 0; s < steps; ++s, x += kPairTokens * 64) {
    __m512i weights[kPairs], places[kPairs];
    unrolled<kPairs>([&](auto r) SPARSIFY_INLINE {
      weights[r] = _mm512_load_si512(&block.weights[s][r]);
      places[r] = _mm512_load_si512(&block.places[s][r]);
    });
    unrolled<kPairTokens>([&](auto t) SPARSIFY_INLINE {
      const __m512i token = _mm512_load_si512(x + t * 64);
      unrolled<kPairs>([&](auto r) SPARSIFY_INLINE {
        sum[r][t] = E::multiply_add(sum[r][t], E::permute(places[r], token), weights[r], block, s, r);
      });
    });
  }
  unrolled<kPairs>([&](auto r) SPARSIFY_INLINE {
    unrolled<kPairTokens>([&](auto t) SPARSIFY_INLINE {
      _mm512_store_si512(sums + r * kPairTokens + t, E::to_bits(sum[r][t]));
    });
  });
}

// The sums of 4 row pairs for one token over their lanes: rows 0 .. 7.
template <class E>
__m256i over_lanes(const __m512i* sums) {
  const __m512i a = sums[0], b = sums[kPairTokens], c = sums[2 * kPairTokens], d = sums[3 * kPairTokens];
  const __m512i ab = E::add(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = E::add(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd = E::add(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));  // in each 128-bit lane
  const __m512i both = E::add(abcd, _mm512_shuffle_i64x2(abcd, abcd, 0b10'11'00'01));         // halves 0, 1 and 2, 3
  return _mm256_inserti128_si256(_mm512_castsi512_si256(both), _mm512_extracti32x4_epi32(both, 2), 1);
}

// x in the order in which it is read: block of steps, group of 4 tokens, step, token, 64 bytes.
struct PanelLayout {
  int64_t groups, steps;
  int64_t in_block(int64_t step) const { return steps - step < kPanelSteps ? steps - step : kPanelSteps; }
  // Where the block that begins with `step` begins for a group.
  int64_t offset(int64_t group, int64_t step) const {
    return (step * groups + group * in_block(step)) * kPairTokens * 64;
  }
  int64_t bytes() const { return groups * steps * kPairTokens * 64; }
};

template <class E>
PanelLayout panel_layout(int64_t tokens, int64_t cols) {
  return {(tokens + kPairTokens - 1) / kPairTokens, (cols + E::kColumns - 1) / E::kColumns};
}

// y = x W^T for x laid out in `packed`.
template <class E>
void linear_panels(const E& element, const NmWeight& w, const char* packed, int64_t tokens, const float* bias, float* y,
                   const Parallel& parallel) {
  const PanelLayout layout = panel_layout<E>(tokens, w.cols);
  int64_t chunk = kPanelChunk;  // small layers get small chunks so that every thread has work
  while (chunk > kPanelRows && (w.rows + chunk - 1) / chunk < 16) chunk /= 2;
  auto task = [&](int64_t index) {
    thread_local KeptScratch<typename E::Block> block_room;
    thread_local KeptScratch<__m512i> sums_room;
    const int64_t row = index * chunk, row_last = row + chunk < w.rows ? row + chunk : w.rows;
    typename E::Block& block = *block_room.get(1);
    for (int64_t start = 0; start < tokens; start += kPanelTokenBlock) {
      const int64_t last = start + kPanelTokenBlock < tokens ? start + kPanelTokenBlock : tokens;
      const int64_t groups = (last - start + kPairTokens - 1) / kPairTokens;
      constexpr int64_t kTile = kPairs * kPairTokens;
      auto rows = element.rows();
      __m512i* const sums = sums_room.get((chunk / kPanelRows) * groups * kTile);
      int64_t step = 0;
      do {  // at least once, so that there are sums when there are no columns
        const int64_t count = layout.in_block(step);
        for (int64_t r = row; r < row_last; r += kPanelRows) {
          element.unpack(w, rows, row, r, row_last, step, count, block);
          __m512i* const own = sums + (r - row) / kPanelRows * groups * kTile;
          for (int64_t g = 0; g < groups; ++g)
            panel_block<E>(block, count, packed + layout.offset(start / kPairTokens + g, step), own + g * kTile, step == 0);
        }
        step += count;
      } while (step < layout.steps);
      for (int64_t token = start; token < last; token += kPairTokens)  // their rows together: neighbours in y
        for (int64_t r = row; r < row_last; r += kPanelRows) {
          const __mmask8 valid = row_last - r >= kPanelRows ? 0xff : __mmask8((1 << (row_last - r)) - 1);
          const __m256 add = bias ? _mm256_maskz_loadu_ps(valid, bias + r) : _mm256_setzero_ps();
          const __m512i* const own = sums + ((r - row) / kPanelRows * groups + (token - start) / kPairTokens) * kTile;
          for (int64_t t = 0; t < kPairTokens && token + t < last; ++t) {
            const __m256 result = element.finish(w, rows, row, over_lanes<E>(own + t), token + t, r, valid, add);
            _mm256_mask_storeu_ps(y + (token + t) * w.rows + r, valid, result);
          }
        }
    }
  };
  parallel_for(parallel, (w.rows + chunk - 1) / chunk, task);
}

// Lays x out: element.pack(token, first column, count) gives 64 bytes, those behind `count` columns 0.
template <class E>
void pack_panels(const E& element, int64_t tokens, int64_t cols, char* packed, const Parallel& parallel) {
  const PanelLayout layout = panel_layout<E>(tokens, cols);
  auto group = [&](int64_t g) {
    for (int64_t s = 0; s < layout.steps; ++s) {
      const int64_t block = s / kPanelSteps * kPanelSteps, left = cols - s * E::kColumns;
      char* out = packed + layout.offset(g, block) + (s - block) * kPairTokens * 64;
      for (int64_t t = 0; t < kPairTokens; ++t) {
        const int64_t token = g * kPairTokens + t;
        const __m512i x = token < tokens ? element.pack(token, s * E::kColumns, left < E::kColumns ? left : E::kColumns)
                                         : _mm512_setzero_si512();
        _mm512_store_si512(out + t * 64, x);
      }
    }
  };
  parallel_for(parallel, layout.groups, group);
}

}}  // namespace sparsify::
