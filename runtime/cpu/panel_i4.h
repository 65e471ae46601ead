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
  Rows rows(const NmWeight&, int64_t, int64_t) const { return {}; }

  // A row of W in one step: 32 codes, their positions, and the scales of the step's halves. Of a row that does not exist
  // nothing is valid.
  struct HalfStep {
    __m128i nibbles = _mm_setzero_si128();
    uint64_t positions = 0;
    uint32_t valid = 0;
    float scale[2] = {};

    HalfStep(const NmWeight& w, int64_t row, int64_t row_last, int64_t step) {
      if (row >= row_last) return;
      const int64_t left = w.kept_per_row() - step * 32, kept = left < 32 ? left : 32, groups = (w.cols + w.group - 1) / w.group;
      const uint8_t* values = static_cast<const uint8_t*>(w.values) + row * w.value_bytes_per_row() + step * 16;
      nibbles = _mm_maskz_loadu_epi8(__mmask16((1 << (kept + 1) / 2) - 1), values);
      positions = load_bits(w.indices + row * w.index_bytes_per_row() + step * 8, (kept + 3) / 4);
      valid = kept == 32 ? ~uint32_t(0) : (uint32_t(1) << kept) - 1;
      for (int half = 0; half < 2; ++half) {
        const int64_t column = step * kColumns + half * 32;
        if (column < w.cols) scale[half] = group_scale(w.scales, row * groups + column / w.group);
      }
    }
  };

  void unpack(const NmWeight& w, const Rows&, int64_t, int64_t r, int64_t row_last, int64_t step, int64_t count,
              Block& block) const {
    for (int64_t p = 0; p < kPairs; ++p)
      for (int64_t s = 0; s < count; ++s) {
        const HalfStep low(w, r + p, row_last, step + s), high(w, r + p + kPairs, row_last, step + s);
        const __m512i all = from_nibbles(_mm256_inserti128_si256(_mm256_castsi128_si256(low.nibbles), high.nibbles, 1));
        const __m512i weights = _mm512_maskz_mov_epi8(uint64_t(high.valid) << 32 | low.valid, all);
        block.weights[s][p] = weights;
        block.places[s][p] = PanelI8::places(low.positions, high.positions);
        const __m512i shifted = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_set1_epi8(int8_t(-128)), weights);
        block.start[s][p] = _mm512_sub_epi32(_mm512_setzero_si512(), shifted);
        const __m512 lower = _mm512_mask_blend_ps(0x00f0, _mm512_set1_ps(low.scale[0]), _mm512_set1_ps(low.scale[1]));
        const __m512 upper = _mm512_mask_blend_ps(0xf000, _mm512_set1_ps(high.scale[0]), _mm512_set1_ps(high.scale[1]));
        block.scale[s][p] = _mm512_mask_blend_ps(0xff00, lower, upper);
      }
  }

  __m256 finish(const NmWeight&, const Rows&, int64_t, __m256i sums, int64_t token, int64_t, __mmask8, __m256 bias) const {
    return _mm256_add_ps(_mm256_mul_ps(_mm256_castsi256_ps(sums), _mm256_set1_ps(codes.steps[token])), bias);
  }
};

}}  // namespace sparsify::
