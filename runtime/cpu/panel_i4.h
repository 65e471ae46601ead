// panel.h with 4-bit weights: multiplied in 8 bits as in panel_i8.h, and scaled step by step. A lane adds up four products
// of 8 neighbouring columns, which share a scale.
//
//   sum += scale * (start + codes * (x + 128)),   start = -128 * codes added up in each lane
#pragma once
#include "decode_i8.h"
#include "panel_i8.h"

namespace sparsify { namespace {

struct alignas(64) PanelBlockI4 : PanelBlock {
  __m512i start[kPanelSteps][kPairs];
  __m512 scale[kPanelSteps][kPairs];
};

struct PanelI4 {
  static constexpr int64_t kColumns = PanelI8::kColumns;
  using Sum = __m512;
  using Block = PanelBlockI4;

  PanelI8 codes;  // of the activations

  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum from_bits(__m512i v) { return _mm512_castsi512_ps(v); }
  static __m512i to_bits(Sum v) { return _mm512_castps_si512(v); }
  static __m512i add(__m512i a, __m512i b) { return to_bits(_mm512_add_ps(from_bits(a), from_bits(b))); }
  static __m512i permute(__m512i places, __m512i v) { return PanelI8::permute(places, v); }
  static Sum multiply_add(Sum sum, __m512i x, __m512i w, const Block& block, int64_t s, int r) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(block.start[s][r], x, w)), block.scale[s][r], sum);
  }
  __m512i pack(int64_t token, int64_t k, int64_t count) const { return codes.pack(token, k, count); }

  struct Rows {};
  Rows rows() const { return {}; }

  // A row of W from step `step` on: 16 bytes of codes to a step, and the scales of kScaled steps at a time. A row that does
  // not exist has scales of zero.
  static constexpr int64_t kScaled = 8;
  struct HalfRow {
    const uint8_t* values = reinterpret_cast<const uint8_t*>(kZeros);
    const uint8_t* codes = kNoCodes;
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(kZeros);
    int64_t groups = 0;

    HalfRow(const NmWeight& w, int64_t row, int64_t row_last, int64_t step) {
      if (row >= row_last) return;
      groups = (w.cols + w.group - 1) / w.group;
      values = static_cast<const uint8_t*>(w.values) + row * w.value_bytes_per_row() + step * 16;
      codes = w.indices + row * w.index_bytes_per_row() + step * 8;
      scales = static_cast<const uint16_t*>(w.scales) + row * groups;
    }
    // Those of the 16 groups from `group` on.
    __m512 scales_from(int64_t group) const {
      const int64_t left = groups - group;
      const __mmask16 valid = left <= 0 ? 0 : left >= 16 ? __mmask16(0xffff) : __mmask16((1 << left) - 1);
      return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(valid, scales + group));
    }
  };

  void unpack(const NmWeight& w, Rows&, int64_t, int64_t r, int64_t row_last, int64_t step, int64_t count,
              Block& block) const {
    const int64_t kept = w.kept_per_row(), ahead = kPanelRows * w.value_bytes_per_row();
    const __m512i half = _mm512_set_epi32(1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0);  // of the step's columns
    const __m512i other_row = _mm512_set_epi32(16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m128i halves = _mm_cvtsi32_si128(w.group == 128 ? 2 : w.group == 64 ? 1 : 0);  // half steps to a group, log2
    for (int64_t p = 0; p < kPairs; ++p) {
      const HalfRow low(w, r + p, row_last, step), high(w, r + p + kPairs, row_last, step);
      for (int64_t begin = 0; begin < count; begin += kScaled) {
        const int64_t group = (step + begin) * kColumns / w.group;
        const __m512 low_scales = low.scales_from(group), high_scales = high.scales_from(group);
        const int64_t end = begin + kScaled < count ? begin + kScaled : count;
        for (int64_t s = begin; s < end; ++s) {
          const int64_t left = kept - (step + s) * 32;
          __m512i weights;
          if (left >= 32) {
            if (s % 4 == 0) prefetch(low.values + ahead + s * 16);
            if (s % 4 == 0) prefetch(high.values + ahead + s * 16);
            if (s % 8 == 0) prefetch(low.codes + kPanelRows * w.index_bytes_per_row() + s * 8);
            if (s % 8 == 0) prefetch(high.codes + kPanelRows * w.index_bytes_per_row() + s * 8);
            const __m128i nibbles = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low.values + s * 16));
            const __m128i others = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high.values + s * 16));
            weights = from_nibbles(_mm256_inserti128_si256(_mm256_castsi128_si256(nibbles), others, 1));
            block.places[s][p] = PanelI8::places(load_bits(low.codes + s * 8, 8), load_bits(high.codes + s * 8, 8));
          } else {  // the last step of a row
            const __mmask16 bytes = __mmask16((1 << (left + 1) / 2) - 1);
            const __m128i nibbles = _mm_maskz_loadu_epi8(bytes, low.values + s * 16);
            const __m128i others = _mm_maskz_loadu_epi8(bytes, high.values + s * 16);
            const uint64_t valid = (uint64_t(1) << left) - 1;
            const __m512i all = from_nibbles(_mm256_inserti128_si256(_mm256_castsi128_si256(nibbles), others, 1));
            weights = _mm512_maskz_mov_epi8(valid << 32 | valid, all);
            block.places[s][p] = PanelI8::places(load_bits(low.codes + s * 8, (left + 3) / 4),
                                                 load_bits(high.codes + s * 8, (left + 3) / 4));
          }
          block.weights[s][p] = weights;
          block.start[s][p] = _mm512_sub_epi32(_mm512_setzero_si512(), PanelI8::shift(_mm512_setzero_si512(), weights));
          const __m512i halves_on = _mm512_add_epi32(half, _mm512_set1_epi32(int(2 * (s - begin))));
          const __m512i from = _mm512_or_si512(_mm512_srl_epi32(halves_on, halves), other_row);
          block.scale[s][p] = _mm512_permutex2var_ps(low_scales, from, high_scales);
        }
      }
    }
  }

  __m256 finish(const NmWeight&, const Rows&, int64_t, __m256i sums, int64_t token, int64_t, __mmask8, __m256 bias) const {
    return _mm256_add_ps(_mm256_mul_ps(_mm256_castsi256_ps(sums), _mm256_set1_ps(codes.steps[token])), bias);
  }
};

}}  // namespace sparsify::
