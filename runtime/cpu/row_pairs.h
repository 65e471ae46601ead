// 2:4 in float32 for some tokens on AVX-512: the columns of two rows in the lanes, the activations permuted to them.
//
//   x        16 columns of one token: 4 groups, one in each 128-bit lane
//   weights  in lane j what row a keeps of group j, then what row b keeps:   a0 a1 b0 b1
//   sum     += weights * permute(x)     inside the 128-bit lanes: the 2-bit codes are the permutation as they are
//
// Nothing is unpacked to memory: a register of weights and its codes serve up to 16 tokens at once. The limit is the three
// ports that permutes and multiply-adds share. x is read from the level 1 cache, a block of columns at a time. While a
// strip of rows is multiplied the next one is fetched, in the order of memory: the hardware would follow rows, not blocks.
// Other stored types are made float32 first, a strip at a time.
#pragma once
#include "rows.h"
#include "scratch.h"
#include "simd_avx512.h"
#include "unrolled.h"

namespace sparsify { namespace {

constexpr int64_t kSlab = 32;            // columns: a register of values and 4 bytes of codes of each row
constexpr int64_t kBlockSlabs = 16;      // of a block of columns: 32 KiB of x for 16 tokens
constexpr int64_t kGroupTokens = 16;     // tokens multiplied at once; the last group may be smaller
constexpr int64_t kStripRows = 32;       // most rows that share a block of x while it is in cache
constexpr int64_t kTaskRows = 256;       // rows in a task, 8 strips: those after the first are fetched ahead
constexpr int64_t kLeastTaskRows = 64;
constexpr int64_t kPackFloats = 1 << 16;  // of x laid out by one task: less is over before another thread wakes up

struct PairRow {
  const float* values;
  const uint8_t* codes;
};

// Memory that will be needed soon.
struct Ahead {
  const char *at, *end;

  template <int lines>
  SPARSIFY_INLINE void fetch() {
    if (at >= end) return;
    unrolled<lines>([&](auto line) SPARSIFY_INLINE { prefetch(at + 64 * line); });
    at += 64 * lines;
  }
};

// sums[p * stride + t] (+)= rows 2p and 2p + 1 x token t, for P pairs and T tokens. x is [slabs][2][T][16].
template <int P, int T>
void pair_block(const PairRow* rows, int64_t slabs, const float* x, Ahead& values, Ahead& codes, __m512* sums,
                int64_t stride, bool first) {
  alignas(64) static constexpr uint32_t kShift[2][16] = {
      {0, 2, 0, 2, 4, 6, 4, 6, 8, 10, 8, 10, 12, 14, 12, 14},
      {16, 18, 16, 18, 20, 22, 20, 22, 24, 26, 24, 26, 28, 30, 28, 30}};
  const __m512i shift[2] = {_mm512_load_si512(kShift[0]), _mm512_load_si512(kShift[1])};
  const __m512i mix[2] = {_mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0), _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4)};
  __m512 sum[P][T];
  unrolled<P>([&](auto p) SPARSIFY_INLINE {
    unrolled<T>([&](auto t) SPARSIFY_INLINE { sum[p][t] = first ? _mm512_setzero_ps() : sums[p * stride + t]; });
  });
  codes.template fetch<2 * P>();
  for (int64_t s = 0; s < slabs; ++s, x += 2 * T * 16) {
    __m512d a[P], b[P];
    __m512i code[P];
    values.template fetch<2 * P>();
    unrolled<P>([&](auto p) SPARSIFY_INLINE {
      int32_t code_a, code_b;
      std::memcpy(&code_a, rows[2 * p].codes + 4 * s, 4);
      std::memcpy(&code_b, rows[2 * p + 1].codes + 4 * s, 4);
      code[p] = _mm512_mask_set1_epi32(_mm512_set1_epi32(code_a), 0xcccc, code_b);
      a[p] = _mm512_loadu_pd(rows[2 * p].values + 16 * s);
      b[p] = _mm512_loadu_pd(rows[2 * p + 1].values + 16 * s);
    });
    unrolled<2>([&](auto half) SPARSIFY_INLINE {
      __m512i place[P];
      __m512 weights[P];
      unrolled<P>([&](auto p) SPARSIFY_INLINE {
        place[p] = _mm512_srlv_epi32(code[p], shift[half]);
        weights[p] = _mm512_castpd_ps(_mm512_permutex2var_pd(a[p], mix[half], b[p]));
      });
      unrolled<T>([&](auto t) SPARSIFY_INLINE {
        __m512 token = _mm512_load_ps(x + (half * T + t) * 16);
        asm("" : "+v"(token));  // a permute from memory is slower
        unrolled<P>([&](auto p) SPARSIFY_INLINE {
          sum[p][t] = _mm512_fmadd_ps(_mm512_permutevar_ps(token, place[p]), weights[p], sum[p][t]);
        });
      });
    });
  }
  unrolled<P>([&](auto p) SPARSIFY_INLINE {
    unrolled<T>([&](auto t) SPARSIFY_INLINE { sums[p * stride + t] = sum[p][t]; });
  });
}

// Rows 0 .. 7 from the sums of 4 pairs for one token.
inline __m256 pair_totals(const __m512* sums, int64_t stride) {
  const auto fold = [](__m512 v, __m512 w) SPARSIFY_INLINE {  // halves of v added, then halves of w
    return _mm512_add_ps(_mm512_shuffle_f32x4(v, w, 0x44), _mm512_shuffle_f32x4(v, w, 0xee));
  };
  const auto fold_quarters = [](__m512 v, __m512 w) SPARSIFY_INLINE {
    return _mm512_add_ps(_mm512_shuffle_f32x4(v, w, 0x88), _mm512_shuffle_f32x4(v, w, 0xdd));
  };
  const __m512 pairs =
      fold_quarters(fold(sums[0], sums[stride]), fold(sums[2 * stride], sums[3 * stride]));  // lane p: a0 a1 b0 b1
  const __m512 totals = _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1));                // a a b b
  return _mm512_castps512_ps256(_mm512_maskz_compress_ps(0x5555, totals));
}

// x in the order in which it is read: block of slabs, group of tokens, slab, half of it, token, 16 columns.
struct PairLayout {
  int64_t tokens, cols;

  int64_t slabs() const { return (cols + kSlab - 1) / kSlab; }
  int64_t padded() const { return (tokens + 3) / 4 * 4; }
  int64_t groups() const { return (tokens + kGroupTokens - 1) / kGroupTokens; }
  int64_t in_group(int64_t g) const {
    return padded() - g * kGroupTokens < kGroupTokens ? padded() - g * kGroupTokens : kGroupTokens;
  }
  int64_t in_block(int64_t slab) const { return slabs() - slab < kBlockSlabs ? slabs() - slab : kBlockSlabs; }
  // Where group g of the block that begins with `slab` begins.
  int64_t offset(int64_t g, int64_t slab) const {
    return (slab * padded() + g * kGroupTokens * in_block(slab)) * kSlab;
  }
  int64_t floats() const { return slabs() * padded() * kSlab; }
};

inline void pack_pairs(const PairLayout& layout, const float* x, int64_t slab, float* packed) {
  for (int64_t g = 0; g < layout.groups(); ++g) {
    float* out = packed + layout.offset(g, slab);
    const int64_t each = layout.in_group(g);
    for (int64_t t = 0; t < each; ++t)
      for (int64_t half = 0; half < 2 * layout.in_block(slab); ++half) {
        const int64_t k = slab * kSlab + half * 16, token = g * kGroupTokens + t;
        const int64_t left = token < layout.tokens && k < layout.cols ? layout.cols - k : 0;
        const __mmask16 valid = left >= 16 ? 0xffff : __mmask16((1 << left) - 1);
        _mm512_store_ps(out + (half * each + t) * 16, _mm512_maskz_loadu_ps(valid, x + (left ? token * layout.cols + k : 0)));
      }
  }
}

// One group of tokens, one block of columns, all rows of a strip; `rows` point at the block.
using StripBlock = void (*)(const PairRow* rows, int64_t count, int64_t slabs, const float* x, Ahead& values,
                            Ahead& codes, __m512* sums, int64_t stride, bool first);

template <int P, int T>
void strip_block(const PairRow* rows, int64_t count, int64_t slabs, const float* x, Ahead& values, Ahead& codes,
                 __m512* sums, int64_t stride, bool first) {
  for (int64_t r = 0; r < count; r += 2 * P)
    pair_block<P, T>(rows + r, slabs, x, values, codes, sums + r / 2 * stride, stride, first);
}
constexpr StripBlock kStripBlocks[] = {strip_block<2, 4>, strip_block<2, 8>, strip_block<1, 12>, strip_block<1, 16>};

// What rows and columns that do not exist read.
alignas(64) constexpr float kNoPairValues[kBlockSlabs * kSlab / 2] = {};
constexpr uint8_t kNoPairCodes[kBlockSlabs * kSlab / 8] = {};

// The last, incomplete slab of a strip's rows, filled up with zeros.
struct LastSlab {
  alignas(64) float values[kStripRows][kSlab / 2];
  uint8_t codes[kStripRows][kSlab / 8];
};

// Rows row .. row_last for all tokens.
inline void pair_strip(const NmWeight& w, const PairLayout& layout, const float* packed, int64_t row, int64_t row_last,
                       Ahead values, Ahead codes, const float* bias, float* y) {
  thread_local KeptScratch<float> floats_room;
  thread_local KeptScratch<float> sums_room;
  const int64_t kept = w.kept_per_row(), count = (row_last - row + 3) / 4 * 4, stride = layout.padded();
  const int64_t whole = w.cols / kSlab, rest = (w.cols - whole * kSlab) / 2;  // slabs, and kept values behind them
  float* const floats = floats_room.get(w.type == DType::f32 ? 0 : kStripRows * kept);
  __m512* const sums = reinterpret_cast<__m512*>(sums_room.get(kStripRows / 2 * stride * 16));
  PairRow rows[kStripRows];
  LastSlab last = {};
  for (int64_t i = 0; i < count; ++i) {
    if (row + i >= row_last) {
      rows[i] = {kNoPairValues, kNoPairCodes};
      continue;
    }
    rows[i] = {row_values<Avx512>(w, row + i, floats + i * kept), w.indices + (row + i) * w.index_bytes_per_row()};
    if (!rest) continue;
    std::memcpy(last.values[i], rows[i].values + whole * 16, size_t(rest) * sizeof(float));
    std::memcpy(last.codes[i], rows[i].codes + whole * 4, size_t(rest + 3) / 4);
  }
  int64_t slab = 0;
  do {  // at least once, so that there are sums when there are no columns
    const int64_t in_block = layout.in_block(slab), complete = whole - slab < in_block ? whole - slab : in_block;
    PairRow at[kStripRows], tail[kStripRows];
    for (int64_t i = 0; i < count; ++i) {
      const bool exists = row + i < row_last;
      at[i] = exists ? PairRow{rows[i].values + slab * 16, rows[i].codes + slab * 4} : rows[i];
      tail[i] = {last.values[i], last.codes[i]};
    }
    for (int64_t g = 0; g < layout.groups(); ++g) {
      const int64_t each = layout.in_group(g);
      const StripBlock run = kStripBlocks[each / 4 - 1];
      const float* const x = packed + layout.offset(g, slab);
      __m512* const own = sums + g * kGroupTokens;
      run(at, count, complete, x, values, codes, own, stride, slab == 0);
      if (complete < in_block) run(tail, count, 1, x + complete * kSlab * each, values, codes, own, stride, false);
    }
    slab += in_block;
  } while (slab < layout.slabs());
  for (int64_t token = 0; token < layout.tokens; ++token)
    for (int64_t r = row; r < row_last; r += 8) {
      const __mmask8 valid = row_last - r >= 8 ? 0xff : __mmask8((1 << (row_last - r)) - 1);
      const __m256 add = bias ? _mm256_maskz_loadu_ps(valid, bias + r) : _mm256_setzero_ps();
      const __m256 totals = pair_totals(sums + (r - row) / 2 * stride + token, stride);
      _mm256_mask_storeu_ps(y + token * w.rows + r, valid, _mm256_add_ps(totals, add));
    }
}

[[maybe_unused]] void linear_row_pairs(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                                       const Parallel& parallel) {
  const PairLayout layout{tokens, w.cols};
  Scratch<float> packed = scratch<float>(layout.floats());
  const int64_t blocks = (layout.slabs() + kBlockSlabs - 1) / kBlockSlabs;
  const int64_t each = kPackFloats / (kBlockSlabs * kSlab * layout.padded()) + 1;
  auto pack = [&](int64_t task) {
    for (int64_t block = task * each; block < blocks && block < (task + 1) * each; ++block)
      pack_pairs(layout, x, block * kBlockSlabs, packed.get());
  };
  parallel_for(parallel, (blocks + each - 1) / each, pack);

  int64_t task_rows = kTaskRows;  // small layers get small tasks so that every thread has work
  while (task_rows > kLeastTaskRows && (w.rows + task_rows - 1) / task_rows < 16) task_rows /= 2;
  const int64_t strip = task_rows / 8;
  auto task = [&](int64_t index) {
    const int64_t end = (index + 1) * task_rows < w.rows ? (index + 1) * task_rows : w.rows;
    for (int64_t row = index * task_rows; row < end; row += strip) {
      const int64_t row_last = row + strip < end ? row + strip : end;
      const int64_t next_last = row_last + strip < end ? row_last + strip : end;
      const char* const values = static_cast<const char*>(w.values);
      const char* const codes = reinterpret_cast<const char*>(w.indices);
      pair_strip(w, layout, packed.get(), row, row_last,
                 {values + row_last * w.value_bytes_per_row(), values + next_last * w.value_bytes_per_row()},
                 {codes + row_last * w.index_bytes_per_row(), codes + next_last * w.index_bytes_per_row()}, bias, y);
    }
  };
  parallel_for(parallel, (w.rows + task_rows - 1) / task_rows, task);
}

}}  // namespace sparsify::
