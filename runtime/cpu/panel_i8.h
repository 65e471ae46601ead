// panel.h in 8 bits: 64 columns to a register, four products to a lane.
#pragma once
#include "codes_i8.h"
#include "panel.h"

namespace sparsify { namespace {

struct PanelI8 {
  static constexpr int64_t kColumns = 64;
  using Sum = __m512i;
  using Block = PanelBlock;

  const float* x;
  int64_t cols;
  const float* steps;  // of the tokens

  static Sum zero() { return _mm512_setzero_si512(); }
  static Sum from_bits(__m512i v) { return v; }
  static __m512i to_bits(Sum v) { return v; }
  static __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }
  static __m512i permute(__m512i places, __m512i v) { return _mm512_permutexvar_epi8(places, v); }
  static Sum multiply_add(Sum sum, __m512i x, __m512i w, const Block&, int64_t, int) {
    return _mm512_dpbusd_epi32(sum, x, w);
  }

  __m512i pack(int64_t token, int64_t k, int64_t count) const {
    const float* at = x + token * cols + k;
    const uint64_t valid = count == 64 ? ~uint64_t(0) : (uint64_t(1) << count) - 1;
    const Divisor by = divisor(steps[token]);
    __m512i all = _mm512_setzero_si512();
    all = _mm512_inserti32x4(all, codes_16(_mm512_maskz_loadu_ps(__mmask16(valid), at), by), 0);
    all = _mm512_inserti32x4(all, codes_16(_mm512_maskz_loadu_ps(__mmask16(valid >> 16), at + 16), by), 1);
    all = _mm512_inserti32x4(all, codes_16(_mm512_maskz_loadu_ps(__mmask16(valid >> 32), at + 32), by), 2);
    all = _mm512_inserti32x4(all, codes_16(_mm512_maskz_loadu_ps(__mmask16(valid >> 48), at + 48), by), 3);
    return _mm512_maskz_mov_epi8(valid, _mm512_xor_si512(all, _mm512_set1_epi8(int8_t(-128))));  // + 128
  }

  // 128 times the sum of each row's weights, what the shift of x adds: summed up while they are unpacked, since a loop of
  // its own would wait for memory with nothing to compute.
  struct Rows {
    alignas(32) int32_t shifted[kPanelChunk];
  };
  Rows rows() const { return {}; }

  static __m512i places(uint64_t low, uint64_t high) {
    const __m512i offsets = _mm512_set1_epi64(0x0e0c0a0806040200);
    const __m512i start = _mm512_set_epi64(0x3c3c383834343030, 0x2c2c282824242020, 0x1c1c181814141010, 0x0c0c080804040000,
                                           0x3c3c383834343030, 0x2c2c282824242020, 0x1c1c181814141010, 0x0c0c080804040000);
    const __m512i words = _mm512_cvtepu16_epi64(_mm_set_epi64x(int64_t(high), int64_t(low)));
    const __m512i code = _mm512_multishift_epi64_epi8(offsets, words);
    return _mm512_ternarylogic_epi32(start, code, _mm512_set1_epi8(3), 0xf8);  // start | (code & 3)
  }

  void unpack(const NmWeight& w, Rows& rows, int64_t row, int64_t r, int64_t row_last, int64_t step, int64_t count,
              PanelBlock& block) const {
    const int64_t kept = w.kept_per_row(), index_bytes = w.index_bytes_per_row(), ahead = kPanelRows * kept;
    const int64_t whole = w.cols / kColumns - step < count ? w.cols / kColumns - step : count;
    for (int64_t p = 0; p < kPairs; ++p) {
      const HalfRow low(w, r + p, row_last, step), high(w, r + p + kPairs, row_last, step);
      __m512i sum = _mm512_setzero_si512();
      for (int64_t s = 0; s < whole; ++s) {
        if (s % 2 == 0) prefetch(low.values + ahead + s * 32);
        if (s % 2 == 0) prefetch(high.values + ahead + s * 32);
        if (s % 8 == 0) prefetch(low.codes + kPanelRows * index_bytes + s * 8);
        if (s % 8 == 0) prefetch(high.codes + kPanelRows * index_bytes + s * 8);
        block.places[s][p] = places(load_bits(low.codes + s * 8, 8), load_bits(high.codes + s * 8, 8));
        block.weights[s][p] = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low.values + s * 32))),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high.values + s * 32)), 1);
        sum = shift(sum, block.weights[s][p]);
      }
      for (int64_t s = whole; s < count; ++s) {  // at most one
        const int64_t left = kept - (step + s) * 32;
        const __mmask32 valid = (1u << left) - 1;
        const int64_t bytes = index_bytes - (step + s) * 8;
        block.places[s][p] = places(load_bits(low.codes + s * 8, bytes), load_bits(high.codes + s * 8, bytes));
        block.weights[s][p] =
            _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi8(valid, low.values + s * 32)),
                               _mm256_maskz_loadu_epi8(valid, high.values + s * 32), 1);
        sum = shift(sum, block.weights[s][p]);
      }
      rows.shifted[r - row + p] += _mm512_mask_reduce_add_epi32(0x00ff, sum);
      rows.shifted[r - row + p + kPairs] += _mm512_mask_reduce_add_epi32(0xff00, sum);
    }
  }

  static __m512i shift(__m512i sum, __m512i weights) {
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(int8_t(-128)), weights);  // unsigned: 128
  }

  __m256 finish(const NmWeight& w, const Rows& rows, int64_t row, __m256i sums, int64_t token, int64_t r, __mmask8 valid,
                __m256 bias) const {
    const __m256i exact = _mm256_sub_epi32(sums, _mm256_load_si256(reinterpret_cast<const __m256i*>(rows.shifted + (r - row))));
    const __m256 scale = _mm256_maskz_loadu_ps(valid, static_cast<const float*>(w.scales) + r);
    const __m256 product = _mm256_mul_ps(_mm256_mul_ps(_mm256_cvtepi32_ps(exact), scale), _mm256_set1_ps(steps[token]));
    return _mm256_add_ps(product, bias);
  }
};

}}  // namespace sparsify::
