// y = x W^T on tiles, for any format: the kept values are expanded to dense tiles in cache, once for all tokens.
//
//   a    32 rows of W by one step of columns         two tiles, expanded (amx_expand.h), from the level 1 cache
//   b    one step of columns by 32 tokens            two tiles, laid out once (amx_pack.h), from the level 2 cache
//   c    32 rows by 32 tokens                        four tiles of sums
//
// Zeros are multiplied too: a tile product makes 16,384 (bfloat16: 8,192) multiply-adds in 16 cycles, four to eight times
// what vector instructions do, which no skipping of half of them makes up for. What is saved by sparsity is memory.
//
// A strip of rows goes through the columns block by block; between blocks the sums wait in memory.
#pragma once
#include "amx_expand.h"
#include "amx_pack.h"

namespace sparsify { namespace {

constexpr int64_t kMostTileTokens = 512;   // laid out and multiplied at a time: bounds the scratch memory
constexpr int64_t kMostStripRows = 256;    // of one task: the laid out tokens are read from memory once a strip

// What is multiplied: products<c, a, b> of one step; kParts of a meet the same b.
struct MultiplyBf16 {
  template <int c, int a, int b>
  static void dp() { Tiles::dp_bf16<c, a, b>(); }
};
struct MultiplyI8 {
  template <int c, int a, int b>
  static void dp() { Tiles::dp_i8<c, a, b>(); }
};

// c (+)= a b for `steps` steps and T tiles of tokens. Tiles 0 .. 3: sums; 4, 5: rows; 6, 7: tokens.
template <class Multiply, int64_t kParts, int T>
void multiply_block(const char* a, const char* b, int64_t steps, char* c, bool first, FetchRows& ahead) {
  unrolled<2 * T>([&](auto i) SPARSIFY_INLINE {
    if (first) Tiles::zero<i>();
    else Tiles::load<i>(c + i * kTileBytes);
  });
  for (int64_t s = 0; s < steps; ++s, a += step_bytes(kParts), b += T * kTileBytes) {
    ahead.some<4>();
    unrolled<T>([&](auto t) SPARSIFY_INLINE { Tiles::load<6 + t>(b + t * kTileBytes); });
    unrolled<int(kParts)>([&](auto part) SPARSIFY_INLINE {
      Tiles::load<4>(a + part * 2 * kTileBytes);
      Tiles::load<5>(a + (part * 2 + 1) * kTileBytes);
      unrolled<T>([&](auto t) SPARSIFY_INLINE {
        Multiply::template dp<2 * t, 4, 6 + t>();
        Multiply::template dp<2 * t + 1, 5, 6 + t>();
      });
    });
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
template <class Multiply, class Expand, class Finish, class Weight>
void multiply_strip(const Expand& expand, const Finish& finish, const Weight& w, const TokenLayout& layout,
                    const char* packed, int64_t row, int64_t row_last, int64_t tokens, const float* bias, float* y) {
  thread_local KeptScratch<uint64_t> words_room;
  thread_local KeptScratch<char> tiles_room, sums_room;
  const int64_t pairs = (row_last - row + kStripRows32 - 1) / kStripRows32, words = mask_words(w.cols) * kStripRows32;
  const int64_t sums_bytes = 2 * layout.tiles * kTileBytes;  // of 32 rows
  uint64_t* const masks = words_room.get(pairs * words);
  char* const a = tiles_room.get(layout.in_block(0) * step_bytes(Expand::kParts));
  char* const sums = sums_room.get(pairs * sums_bytes);
  ExpandRow rows[kMostStripRows];
  for (int64_t p = 0; p < pairs; ++p)
    begin_rows(w, row + p * kStripRows32, row_last, masks + p * words, rows + p * kStripRows32);

  const int64_t block_bytes = layout.fetched_apart() ? mean_row_bytes(w) * layout.block / layout.steps : 0;

  const Tiles tiles;
  int64_t step = 0;
  do {  // at least once, so that there are sums when there are no columns
    const int64_t count = layout.in_block(step);
    for (int64_t p = 0; p < pairs; ++p) {
      expand_rows(expand, rows + p * kStripRows32, step, count, a);
      FetchRows ahead(rows + (p + 1 < pairs ? p + 1 : 0) * kStripRows32, Expand::kValueBits, block_bytes);
      for (int64_t t = 0; t < layout.tiles; t += 2) {
        char* const c = sums + p * sums_bytes + t * 2 * kTileBytes;
        const char* const b = packed + layout.offset(step, t);
        if (layout.in_pair(t) == 2) multiply_block<Multiply, Expand::kParts, 2>(a, b, count, c, step == 0, ahead);
        else multiply_block<Multiply, Expand::kParts, 1>(a, b, count, c, step == 0, ahead);
      }
    }
    step += count;
  } while (step < layout.steps);
  for (int64_t t = 0; t < layout.tiles; ++t)  // neighbours in y one after another
    for (int64_t p = 0; p < pairs; ++p)
      for (int64_t half = 0; half < 2; ++half)
        write_tile(finish, sums + p * sums_bytes + (2 * t + half) * kTileBytes, row + p * kStripRows32 + half * kTileRows,
                   w.rows, t * kTileTokens, tokens, bias, y);
}

template <class Multiply, class Expand, class Finish, class Weight>
void multiply_rows(const Expand& expand, const Finish& finish, const Weight& w, const char* packed, int64_t tokens,
                   const float* bias, float* y, const Parallel& parallel) {
  const TokenLayout layout = token_layout(tokens, w.cols, Expand::kColumns);
  // Small layers get small strips so that every thread has work; few tokens need not be read again for each.
  int64_t strip = layout.fetched_apart() ? kMostStripRows : kStripRows32;
  while (strip > kStripRows32 && (w.rows + strip - 1) / strip < 8) strip /= 2;
  auto task = [&](int64_t index) {
    const int64_t row = index * strip, row_last = row + strip < w.rows ? row + strip : w.rows;
    multiply_strip<Multiply>(expand, finish, w, layout, packed, row, row_last, tokens, bias, y);
  };
  parallel_for(parallel, (w.rows + strip - 1) / strip, task);
}

template <class Pack>
Scratch<char> laid_out(const Pack& pack, int64_t tokens, int64_t cols, const Parallel& parallel) {
  Scratch<char> packed = scratch<char>(token_layout(tokens, cols, Pack::kColumns).bytes());
  pack_tiles(pack, tokens, cols, packed.get(), parallel);
  return packed;
}

// False, and nothing written, where an activation is not finite in bfloat16: a pruned weight would make NaN of it.
template <class Weight>
bool linear_tiles_bf16(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  std::atomic<bool> not_finite{false};
  const Scratch<char> packed = laid_out(PackBf16{x, w.cols, &not_finite}, tokens, w.cols, parallel);
  if (not_finite) return false;
  multiply_rows<MultiplyBf16>(ExpandBf16{values_end(w)}, FinishBf16{}, w, packed.get(), tokens, bias, y, parallel);
  return true;
}

template <class Weight>
void linear_tiles_quantised(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y,
                            const Parallel& parallel) {
  Scratch<float> steps = scratch<float>(tokens);
  auto measure = [&](int64_t token) { steps[token] = token_step<Avx512>(x + token * w.cols, w.cols); };
  parallel_for(parallel, tokens, measure);
  if (w.type == DType::i8) {
    const Scratch<char> packed = laid_out(PackI8{x, w.cols, steps.get()}, tokens, w.cols, parallel);
    const FinishI8 finish{static_cast<const float*>(w.scales), steps.get()};
    return multiply_rows<MultiplyI8>(ExpandI8{values_end(w)}, finish, w, packed.get(), tokens, bias, y, parallel);
  }
  const Scratch<char> packed = laid_out(PackCodesBf16{x, w.cols, steps.get()}, tokens, w.cols, parallel);
  const ExpandI4<std::is_same_v<Weight, BitmaskWeight>> expand{values_end(w), w.group == 32 ? 5 : w.group == 64 ? 6 : 7};
  multiply_rows<MultiplyBf16>(expand, FinishI4{steps.get()}, w, packed.get(), tokens, bias, y, parallel);
}

// Whether it was done here.
template <class Weight>
bool linear_tiles(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  if (w.type == DType::f32 || w.type == DType::f16) return false;
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
