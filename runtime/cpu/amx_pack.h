// The activations as tiles, laid out once for all rows of W: row j of a tile holds, for each of 16 tokens, the 4 bytes of
// columns 2 j, 2 j + 1 (bfloat16) or 4 j .. 4 j + 3 (8 bits).
//
//   layout   [block of steps][pair of tiles][step][tile][16 rows][16 tokens][4 bytes]      the last pair may be one tile
//
// A block of steps of two tiles is what the multiplication reads in one go.
#pragma once
#include <atomic>

#include "amx_expand.h"
#include "codes_i8.h"

namespace sparsify { namespace {

constexpr int64_t kTileTokens = 16;

struct TokenLayout {
  int64_t tiles, steps;  // of 16 tokens, of 64 bytes of columns
  int64_t block;         // of steps

  int64_t blocks() const { return (steps + block - 1) / block; }
  int64_t in_block(int64_t step) const { return steps - step < block ? steps - step : block; }
  int64_t in_pair(int64_t tile) const { return tiles - tile < 2 ? tiles - tile : 2; }
  // Where the block of steps that begins with `step` begins for the pair that begins with `tile`.
  int64_t offset(int64_t step, int64_t tile) const { return (step * tiles + tile * in_block(step)) * kTileBytes; }
  int64_t bytes() const { return tiles * steps * kTileBytes; }
};

// `columns` to a step. 1 MiB of tokens stays in the level 2 cache, and the sums are fetched and put away as rarely as that
// allows.
[[maybe_unused]] TokenLayout token_layout(int64_t tokens, int64_t cols, int64_t columns) {
  TokenLayout layout{(tokens + kTileTokens - 1) / kTileTokens, (cols + columns - 1) / columns, 0};
  layout.block = layout.tiles <= 8 ? kMostBlockSteps : 1024 / layout.tiles;
  if (layout.block > layout.steps) layout.block = layout.steps;
  return layout;
}

// 32 columns of a token in bfloat16, those behind `count` 0; `bad` collects whether one is not finite.
struct PackBf16 {
  static constexpr int64_t kColumns = 32;
  const float* x;
  int64_t cols;
  std::atomic<bool>* not_finite;

  __m512i operator()(int64_t token, int64_t k, int64_t count, __mmask32& bad) const {
    const float* at = x + token * cols + k;
    const uint32_t valid = uint32_t((uint64_t(1) << count) - 1);
    const __m512 low = _mm512_maskz_loadu_ps(__mmask16(valid), at);
    const __m512 high = _mm512_maskz_loadu_ps(__mmask16(valid >> 16), count > 16 ? at + 16 : at);
    const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    bad |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(packed, exponent), exponent);
    return packed;
  }
  void finish(__mmask32 bad) const {
    if (bad) not_finite->store(true, std::memory_order_relaxed);
  }
};

// 64 codes of a token, or 32 as bfloat16 numbers.
struct PackI8 {
  static constexpr int64_t kColumns = 64;
  const float* x;
  int64_t cols;
  const float* steps;  // of the tokens

  __m512i operator()(int64_t token, int64_t k, int64_t count, __mmask32&) const {
    const float* at = x + token * cols + k;
    const uint64_t valid = count == 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
    const Divisor by = divisor(steps[token]);
    __m512i all = _mm512_setzero_si512();
    const auto part = [&](auto i) SPARSIFY_INLINE {
      const float* from = count > 16 * i ? at + 16 * i : at;
      all = _mm512_inserti32x4(all, codes_16(_mm512_maskz_loadu_ps(__mmask16(valid >> (16 * i)), from), by), i);
    };
    unrolled<4>(part);
    return all;
  }
  void finish(__mmask32) const {}
};

struct PackCodesBf16 {
  static constexpr int64_t kColumns = 32;
  const float* x;
  int64_t cols;
  const float* steps;

  __m512i operator()(int64_t token, int64_t k, int64_t count, __mmask32&) const {
    const float* at = x + token * cols + k;
    const uint32_t valid = uint32_t((uint64_t(1) << count) - 1);
    const Divisor by = divisor(steps[token]);
    const __m512i low = nearest_codes(_mm512_maskz_loadu_ps(__mmask16(valid), at), by);
    const __m512i high = nearest_codes(_mm512_maskz_loadu_ps(__mmask16(valid >> 16), count > 16 ? at + 16 : at), by);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtepi32_ps(high), _mm512_cvtepi32_ps(low));  // exact: at most 127
  }
  void finish(__mmask32) const {}
};

// Tile `tile` of the tokens for the block of steps that begins with `first`.
template <class Pack>
void pack_tile(const Pack& pack, const TokenLayout& layout, int64_t tokens, int64_t cols, int64_t first, int64_t tile,
               char* packed) {
  const int64_t pair = tile / 2 * 2, width = layout.in_pair(pair), token = tile * kTileTokens;
  char* to = packed + layout.offset(first, pair) + (tile - pair) * kTileBytes;
  __mmask32 bad = 0;
  for (int64_t step = first; step < first + layout.in_block(first); ++step, to += width * kTileBytes) {
    const int64_t k = step * Pack::kColumns, count = cols - k < Pack::kColumns ? cols - k : Pack::kColumns;
    __m512 lines[16];
    for (int64_t t = 0; t < 16; ++t)
      lines[t] = token + t < tokens ? _mm512_castsi512_ps(pack(token + t, k, count, bad)) : _mm512_setzero_ps();
    Avx512::transpose(lines);
    for (int64_t row = 0; row < 16; ++row) _mm512_store_ps(to + row * kTileRowBytes, lines[row]);
  }
  pack.finish(bad);
}

// Lays out all tokens; begin(token) is called before a token is packed.
template <class Pack, class Begin>
Scratch<char> pack_tiles(const Pack& pack, const TokenLayout& layout, int64_t tokens, int64_t cols,
                         const Parallel& parallel, const Begin& begin) {
  Scratch<char> packed = scratch<char>(layout.bytes());
  auto task = [&](int64_t tile) {
    const int64_t first = tile * kTileTokens;
    for (int64_t token = first; token < tokens && token < first + kTileTokens; ++token) begin(token);
    for (int64_t step = 0; step < layout.steps; step += layout.block)
      pack_tile(pack, layout, tokens, cols, step, tile, packed.get());
  };
  parallel_for(parallel, layout.tiles, task);
  return packed;
}

}}  // namespace sparsify::
