// y = x W^T on tiles, for any format: the kept values are expanded to dense tiles in cache, once for all tokens.
//
//   a    32 rows of W by one step of columns         two tiles, expanded (amx_expand.h), from the caches
//   b    one step of columns by 32 tokens            two tiles, laid out once (amx_pack.h), from the level 2 cache
//   c    32 rows by 32 tokens                        four tiles of sums
//
// Zeros are multiplied too: a tile product makes 16,384 (bfloat16: 8,192) multiply-adds in 16 cycles, four to eight times
// what vector instructions do, which no skipping of half of them makes up for. What is saved by sparsity is memory.
//
// A strip of rows goes through the columns block by block; between blocks the sums wait in memory. While a block is
// multiplied the next one is expanded, and what the one after it needs is fetched.
#pragma once
#include <thread>
#include <utility>

#include "amx_expand.h"
#include "amx_pack.h"

namespace sparsify { namespace {

constexpr int64_t kMostTileTokens = 512;  // laid out and multiplied at a time: bounds the scratch memory
constexpr int64_t kMostStripRows = 512;   // of one task: many tokens are read from memory once a strip
constexpr int64_t kStripSums = 1 << 17;   // and the sums of a strip, 512 KiB, stay in the level 2 cache

// What is multiplied: products<c, a, b> of one step; kParts of a meet the same b.
struct MultiplyBf16 {
  template <int c, int a, int b>
  static void dp() { Tiles::dp_bf16<c, a, b>(); }
};
struct MultiplyI8 {
  template <int c, int a, int b>
  static void dp() { Tiles::dp_i8<c, a, b>(); }
};

// c = a b (first) or c += a b for `steps` steps and T tiles of tokens. Tiles 0 .. 3: sums; 4, 5: rows; 6, 7: tokens. With
// every step `side` does `portion` of something else.
template <class Multiply, int64_t kParts, int T, class Side>
void multiply_block(const char* a, int64_t stride, const char* b, int64_t steps, char* c, bool first, Side& side,
                    int64_t portion) {
  unrolled<2 * T>([&](auto i) SPARSIFY_INLINE {
    if (first) Tiles::zero<i>();
    else Tiles::load<i>(c + i * kTileBytes);
  });
  for (int64_t s = 0; s < steps; ++s, a += kParts * kTileRowBytes, b += T * kTileBytes) {
    unrolled<T>([&](auto t) SPARSIFY_INLINE { Tiles::load<6 + t>(b + t * kTileBytes); });
    unrolled<int(kParts)>([&](auto part) SPARSIFY_INLINE {
      Tiles::load<4>(a + part * kTileRowBytes, stride);
      Tiles::load<5>(a + part * kTileRowBytes + kTileRows * stride, stride);
      unrolled<T>([&](auto t) SPARSIFY_INLINE {
        Multiply::template dp<2 * t, 4, 6 + t>();
        Multiply::template dp<2 * t + 1, 5, 6 + t>();
      });
    });
    side.some(portion);
  }
  unrolled<2 * T>([&](auto i) SPARSIFY_INLINE { Tiles::store<i>(c + i * kTileBytes); });
}

// How the sums become results: y = finish(sums of 16 rows for a token).
struct FinishBf16 {
  __m512 operator()(__m512i sums, int64_t, int64_t, __mmask16, __m512 bias) const {
    return _mm512_add_ps(_mm512_castsi512_ps(sums), bias);
  }
};
struct FinishI8 {
  const float *scales, *steps;
  __m512 operator()(__m512i sums, int64_t token, int64_t row, __mmask16 valid, __m512 bias) const {
    const __m512 scale = _mm512_maskz_loadu_ps(valid, scales + row);
    const __m512 product = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sums), scale), _mm512_set1_ps(steps[token]));
    return _mm512_add_ps(product, bias);
  }
};
struct FinishI4 {
  const float* steps;
  __m512 operator()(__m512i sums, int64_t token, int64_t, __mmask16, __m512 bias) const {
    return _mm512_add_ps(_mm512_mul_ps(_mm512_castsi512_ps(sums), _mm512_set1_ps(steps[token])), bias);
  }
};

// One tile of sums, 16 rows by 16 tokens, to y.
template <class Finish>
void write_tile(const Finish& finish, const char* sums, int64_t row, int64_t rows, int64_t token, int64_t tokens,
                const float* bias, float* y) {
  if (row >= rows) return;
  __m512 lines[16];
  for (int64_t r = 0; r < 16; ++r) lines[r] = _mm512_load_ps(sums + r * kTileRowBytes);
  Avx512::transpose(lines);
  const __mmask16 valid = rows - row >= 16 ? 0xffff : __mmask16((1 << (rows - row)) - 1);
  const __m512 add = bias ? _mm512_maskz_loadu_ps(valid, bias + row) : _mm512_setzero_ps();
  for (int64_t t = 0; t < 16 && token + t < tokens; ++t)
    _mm512_mask_storeu_ps(y + (token + t) * rows + row, valid,
                          finish(_mm512_castps_si512(lines[t]), token + t, row, valid, add));
}

// Rows row .. row_last, at most kMostStripRows, for all tokens laid out in `packed`.
template <class Multiply, bool two_of_four, class Expand, class Finish, class Weight>
void multiply_strip(const Expand& expand, const Finish& finish, const Weight& w, const TokenLayout& layout,
                    const char* packed, int64_t row, int64_t row_last, int64_t tokens, const float* bias, float* y) {
  thread_local KeptScratch<uint64_t> words_room;
  thread_local KeptScratch<char> tiles_room, sums_room;
  const int64_t pairs = (row_last - row + kBlockRows - 1) / kBlockRows, count = pairs * layout.blocks();
  const int64_t sums_bytes = 2 * layout.tiles * kTileBytes;  // of 32 rows
  const int64_t stride = expanded_stride(layout.block, Expand::kParts);
  char* a = tiles_room.get(2 * kBlockRows * stride);
  char* a_next = a + kBlockRows * stride;
  char* const sums = sums_room.get(pairs * sums_bytes);
  ExpandRow rows[kMostStripRows];
  begin_rows(w, row, row_last, words_room.get(pairs * kBlockRows * made_words(w)), rows, pairs * kBlockRows);

  // The blocks of 32 rows and some steps, one after another, those of the same columns first; while one is multiplied,
  // the next one is expanded. Behind the last one comes one without steps.
  const auto block = [&](int64_t i) {
    const int64_t step = i / pairs * layout.block;
    return BlockOfRows{rows + i % pairs * kBlockRows, step, i < count ? layout.in_block(step) : 0, w.cols};
  };
  using Expander = ExpandBlock<Expand, two_of_four>;
  const int64_t block_values = kept_in_all(w) / w.rows / layout.blocks();
  const auto expander = [&](int64_t i, char* to) {
    const BlockOfRows later = block(i + 1 < count ? i + 1 : 0);
    return Expander(expand, block(i), to, stride, later, pairs == 1 ? block_values : 0);
  };
  expander(0, a).rest();
  const int64_t token_pairs = (layout.tiles + 1) / 2, portion = (kBlockRows + token_pairs - 1) / token_pairs;
  {
    const Tiles tiles;
    for (int64_t i = 0; i < count; ++i) {
      const BlockOfRows now = block(i);
      Expander next = expander(i + 1, a_next);
      for (int64_t t = 0; t < layout.tiles; t += 2) {
        char* const c = sums + i % pairs * sums_bytes + t * 2 * kTileBytes;
        const auto run = layout.in_pair(t) == 2 ? multiply_block<Multiply, Expand::kParts, 2, Expander>
                                                : multiply_block<Multiply, Expand::kParts, 1, Expander>;
        run(a, stride, packed + layout.offset(now.step, t), now.steps, c, now.step == 0, next, portion);
      }
      next.rest();
      std::swap(a, a_next);
    }
  }
  for (int64_t t = 0; t < layout.tiles; ++t)  // neighbours in y one after another
    for (int64_t p = 0; p < pairs; ++p)
      for (int64_t half = 0; half < 2; ++half)
        write_tile(finish, sums + p * sums_bytes + (2 * t + half) * kTileBytes, row + p * kBlockRows + half * kTileRows,
                   w.rows, t * kTileTokens, tokens, bias, y);
}

// Cores of this machine. Results do not depend on it: how rows are cut changes no sum.
inline int64_t cores() {
  static const int64_t count = std::thread::hardware_concurrency();
  return count ? count : 1;
}

template <class Multiply, class Expand, class Finish, class Weight>
void multiply_rows(const Expand& expand, const Finish& finish, const Weight& w, const TokenLayout& layout,
                   const char* packed, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  int64_t strip = kMostStripRows;
  while (strip > kBlockRows && (strip * layout.tiles * kTileTokens > kStripSums ||
                                  (w.rows + strip - 1) / strip < 4 * cores()))
    strip /= 2;
  auto task = [&](int64_t index) {
    const int64_t row = index * strip, row_last = row + strip < w.rows ? row + strip : w.rows;
    if (is_24(w)) multiply_strip<Multiply, true>(expand, finish, w, layout, packed, row, row_last, tokens, bias, y);
    else multiply_strip<Multiply, false>(expand, finish, w, layout, packed, row, row_last, tokens, bias, y);
  };
  parallel_for(parallel, (w.rows + strip - 1) / strip, task);
}

// y = bias where there are no columns.
inline void write_bias(int64_t rows, int64_t tokens, const float* bias, float* y) {
  for (int64_t token = 0; token < tokens; ++token)
    for (int64_t row = 0; row < rows; ++row) y[token * rows + row] = bias ? bias[row] : 0.0f;
}

// False, and nothing written, where an activation is not finite in bfloat16: a pruned weight would make NaN of it.
template <class Weight>
bool linear_tiles_bf16(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  const TokenLayout layout = token_layout(tokens, w.cols, ExpandBf16::kColumns);
  std::atomic<bool> not_finite{false};
  const Scratch<char> packed =
      pack_tiles(PackBf16{x, w.cols, &not_finite}, layout, tokens, w.cols, parallel, [](int64_t) {});
  if (not_finite) return false;
  multiply_rows<MultiplyBf16>(ExpandBf16{values_end(w)}, FinishBf16{}, w, layout, packed.get(), tokens, bias, y, parallel);
  return true;
}

template <class Multiply, class Pack, class Expand, class Finish, class Weight>
void linear_tiles_quantised(const Expand& expand, const Finish& finish, const Weight& w, const float* x, float* steps,
                            int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  const TokenLayout layout = token_layout(tokens, w.cols, Expand::kColumns);
  const auto measure = [&](int64_t token) { steps[token] = token_step<Avx512>(x + token * w.cols, w.cols); };
  const Scratch<char> packed = pack_tiles(Pack{x, w.cols, steps}, layout, tokens, w.cols, parallel, measure);
  multiply_rows<Multiply>(expand, finish, w, layout, packed.get(), tokens, bias, y, parallel);
}

template <class Weight>
void linear_tiles_quantised(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y,
                            const Parallel& parallel) {
  const Scratch<float> steps = scratch<float>(tokens);
  if (w.type == DType::i8) {
    const FinishI8 finish{static_cast<const float*>(w.scales), steps.get()};
    return linear_tiles_quantised<MultiplyI8, PackI8>(ExpandI8{values_end(w)}, finish, w, x, steps.get(), tokens, bias, y,
                                                      parallel);
  }
  const ExpandI4<std::is_same_v<Weight, BitmaskWeight>> expand{values_end(w), w.group == 32 ? 5 : w.group == 64 ? 6 : 7};
  linear_tiles_quantised<MultiplyBf16, PackCodesBf16>(expand, FinishI4{steps.get()}, w, x, steps.get(), tokens, bias, y,
                                                      parallel);
}

// Whether it was done here.
template <class Weight>
bool linear_tiles(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  if (w.type == DType::f32 || w.type == DType::f16) return false;
  if (w.cols == 0) {
    write_bias(w.rows, tokens, bias, y);
    return true;
  }
  for (int64_t start = 0; start < tokens; start += kMostTileTokens) {
    const int64_t count = tokens - start < kMostTileTokens ? tokens - start : kMostTileTokens;
    const float* const from = x + start * w.cols;
    float* const to = y + start * w.rows;
    if (is_quantised(w.type)) linear_tiles_quantised(w, from, count, bias, to, parallel);
    else if (!linear_tiles_bf16(w, from, count, bias, to, parallel)) return false;
  }
  return true;
}

}}  // namespace sparsify::
