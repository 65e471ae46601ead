// panel.h in bfloat16: 32 columns to a register, two products to a lane. The activations are rounded to bfloat16.
#pragma once
#include "panel.h"

namespace sparsify { namespace {

struct PanelBf16 {
  static constexpr int64_t kColumns = 32;
  using Sum = __m512;

  const float* x;
  int64_t cols;

  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum from_bits(__m512i v) { return _mm512_castsi512_ps(v); }
  static __m512i to_bits(Sum v) { return _mm512_castps_si512(v); }
  static __m512i add(__m512i a, __m512i b) { return to_bits(_mm512_add_ps(from_bits(a), from_bits(b))); }
  static __m512i permute(__m512i places, __m512i v) { return _mm512_permutexvar_epi16(places, v); }
  static Sum multiply_add(Sum sum, __m512i x, __m512i w) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w); }

  __m512i pack(int64_t token, int64_t k, int64_t count) const {
    const float* at = x + token * cols + k;
    const uint32_t valid = uint32_t((uint64_t(1) << count) - 1);
    const __m512 low = _mm512_maskz_loadu_ps(__mmask16(valid), at);
    const __m512 high = _mm512_maskz_loadu_ps(__mmask16(valid >> 16), at + 16);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
  }

  struct Rows {};
  Rows rows(const NmWeight&, int64_t, int64_t) const { return {}; }

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

  void unpack(const NmWeight& w, const Rows&, int64_t, int64_t r, int64_t row_last, int64_t step, int64_t count,
              PanelBlock& block) const {
    const int64_t kept = w.kept_per_row(), index_bytes = w.index_bytes_per_row();
    for (int64_t p = 0; p < kPairs; ++p)
      for (int64_t s = 0; s < count; ++s) {
        const int64_t first = (step + s) * 16, left = kept - first < 16 ? kept - first : 16;
        __m256i half[2];
        uint64_t codes = 0;
        for (int h = 0; h < 2; ++h) {
          const int64_t row = r + p + h * kPairs;
          const int64_t here = row < row_last ? left : 0;
          const uint16_t* from = static_cast<const uint16_t*>(w.values) + row * kept + first;
          half[h] = _mm256_maskz_loadu_epi16(__mmask16((1 << here) - 1), from);
          if (here == 16) prefetch(from + kPanelRows * kept);
          const __mmask16 bytes = __mmask16((1 << (here + 3) / 4) - 1);
          const __m128i code = _mm_maskz_loadu_epi8(bytes, w.indices + row * index_bytes + first / 4);
          codes |= uint64_t(_mm_cvtsi128_si64(code)) << (32 * h);
        }
        block.places[s][p] = places(codes);
        block.weights[s][p] = _mm512_inserti64x4(_mm512_castsi256_si512(half[0]), half[1], 1);
      }
  }

  __m256 finish(const NmWeight&, const Rows&, int64_t, __m256i sums, int64_t, int64_t, __mmask8, __m256 bias) const {
    return _mm256_add_ps(_mm256_castsi256_ps(sums), bias);
  }
};

}}  // namespace sparsify::
