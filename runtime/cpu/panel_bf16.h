// panel.h in bfloat16: 32 columns to a register, two products to a lane. The activations are rounded to bfloat16.
#pragma once
#include "panel.h"

namespace sparsify { namespace {

struct PanelBf16 {
  static constexpr int64_t kColumns = 32;
  using Sum = __m512;
  using Block = PanelBlock;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum from_bits(__m512i v) { return _mm512_castsi512_ps(v); }
  static __m512i to_bits(Sum v) { return _mm512_castps_si512(v); }
  static __m512i add(__m512i a, __m512i b) { return to_bits(_mm512_add_ps(from_bits(a), from_bits(b))); }

  const float* x;
  int64_t cols;

  static __m512i permute(__m512i places, __m512i v) { return _mm512_permutexvar_epi16(places, v); }
  static Sum multiply_add(Sum sum, __m512i x, __m512i w, const Block&, int64_t, int) {
    return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
  }

  __m512i pack(int64_t token, int64_t k, int64_t count) const {
    const float* at = x + token * cols + k;
    const uint32_t valid = uint32_t((uint64_t(1) << count) - 1);
    const __m512 low = _mm512_maskz_loadu_ps(__mmask16(valid), at);
    const __m512 high = _mm512_maskz_loadu_ps(__mmask16(valid >> 16), at + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }

  struct Rows {};
  Rows rows() const { return {}; }

  static __m512i places(uint64_t codes) {
    alignas(64) static constexpr uint16_t piece[32] = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,
                                                       2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3};
    alignas(64) static constexpr uint16_t shift[32] = {0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14,
                                                       0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14};
    alignas(64) static constexpr uint16_t start[32] = {0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28,
                                                       0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28};
    const __m512i words = _mm512_permutexvar_epi16(_mm512_load_si512(piece), _mm512_castsi128_si512(_mm_cvtsi64_si128(int64_t(codes))));
    const __m512i code = _mm512_srlv_epi16(words, _mm512_load_si512(shift));
    return _mm512_ternarylogic_epi32(_mm512_load_si512(start), code, _mm512_set1_epi16(3), 0xf8);  // start | (code & 3)
  }

  void unpack(const NmWeight& w, Rows&, int64_t, int64_t r, int64_t row_last, int64_t step, int64_t count,
              PanelBlock& block) const {
    const int64_t kept = w.kept_per_row(), index_bytes = w.index_bytes_per_row(), ahead = kPanelRows * kept * 2;
    const int64_t whole = w.cols / kColumns - step < count ? w.cols / kColumns - step : count;
    for (int64_t p = 0; p < kPairs; ++p) {
      const HalfRow low(w, r + p, row_last, step), high(w, r + p + kPairs, row_last, step);
      for (int64_t s = 0; s < whole; ++s) {
        if (s % 2 == 0) prefetch(low.values + ahead + s * 32);
        if (s % 2 == 0) prefetch(high.values + ahead + s * 32);
        block.places[s][p] = places(load_bits(low.codes + s * 4, 4) | load_bits(high.codes + s * 4, 4) << 32);
        block.weights[s][p] = _mm512_inserti64x4(
            _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low.values + s * 32))),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high.values + s * 32)), 1);
      }
      for (int64_t s = whole; s < count; ++s) {  // at most one
        const int64_t left = kept - (step + s) * 16;
        const __mmask16 valid = __mmask16((1 << left) - 1);
        const int64_t bytes = index_bytes - (step + s) * 4;
        block.places[s][p] = places(load_bits(low.codes + s * 4, bytes) | load_bits(high.codes + s * 4, bytes) << 32);
        block.weights[s][p] =
            _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_maskz_loadu_epi16(valid, low.values + s * 32)),
                               _mm256_maskz_loadu_epi16(valid, high.values + s * 32), 1);
      }
    }
  }

  __m256 finish(const NmWeight&, const Rows&, int64_t, __m256i sums, int64_t, int64_t, __mmask8, __m256 bias) const {
    return _mm256_add_ps(_mm256_castsi256_ps(sums), bias);
  }
};

}}  // namespace sparsify::
