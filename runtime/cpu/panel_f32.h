// panel.h in float32: 16 columns to a register. Weights of every other stored type are made float32 first.
#pragma once
#include "panel.h"
#include "simd_avx512.h"

namespace sparsify { namespace {

struct PanelF32 : FloatSums {
  static constexpr int64_t kColumns = 16;

  const float* x;
  int64_t cols;

  static __m512i permute(__m512i places, __m512i v) { return _mm512_permutexvar_epi32(places, v); }
  static Sum multiply_add(Sum sum, __m512i x, __m512i w) { return _mm512_fmadd_ps(from_bits(x), from_bits(w), sum); }

  __m512i pack(int64_t token, int64_t k, int64_t count) const {
    return _mm512_maskz_loadu_epi32(__mmask16((1 << count) - 1), x + token * cols + k);
  }

  // Values of a task's rows as float32.
  struct Rows {
    const float* values[kPanelChunk];
  };
  Rows rows(const NmWeight& w, int64_t row, int64_t row_last) const {
    thread_local KeptScratch<float> room;
    const int64_t kept = w.kept_per_row();
    float* const unpacked = room.get(w.type == DType::f32 ? 0 : (row_last - row) * kept);
    Rows result;
    for (int64_t r = row; r < row_last; ++r)
      result.values[r - row] = row_values<Avx512>(w, r, w.type == DType::f32 ? nullptr : unpacked + (r - row) * kept);
    return result;
  }

  // Steps step .. step + count of rows r .. r + 8; rows and columns that do not exist become 0 times a zero of x.
  void unpack(const NmWeight& w, const Rows& rows, int64_t row, int64_t r, int64_t row_last, int64_t step, int64_t count,
              PanelBlock& block) const {
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i shift = _mm512_slli_epi32(lane, 1), three = _mm512_set1_epi32(3);
    const __m512i start = _mm512_slli_epi32(_mm512_srli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(7)), 1), 2);
    const auto places = [&](uint32_t low, uint32_t high) SPARSIFY_INLINE {
      const __m512i word = _mm512_set1_epi32(int(low | high << 16));
      return _mm512_ternarylogic_epi32(start, _mm512_srlv_epi32(word, shift), three, 0xf8);  // start | (codes & 3)
    };
    const int64_t ahead = kPanelRows * w.kept_per_row();  // the next rows, fetched while these are multiplied
    for (int64_t p = 0; p < kPairs; ++p) {
      const bool has_low = r + p < row_last, has_high = r + p + kPairs < row_last;
      const float* low = has_low ? rows.values[r + p - row] + step * 8 : reinterpret_cast<const float*>(kZeros);
      const float* high = has_high ? rows.values[r + p + kPairs - row] + step * 8 : reinterpret_cast<const float*>(kZeros);
      const uint8_t* low_codes = has_low ? w.indices + (r + p) * w.index_bytes_per_row() + step * 2 : kNoCodes;
      const uint8_t* high_codes = has_high ? w.indices + (r + p + kPairs) * w.index_bytes_per_row() + step * 2 : kNoCodes;
      const int64_t whole = w.cols / kColumns - step < count ? w.cols / kColumns - step : count;
      for (int64_t s = 0; s < whole; ++s) {
        uint16_t low_code, high_code;
        std::memcpy(&low_code, low_codes + s * 2, 2);
        std::memcpy(&high_code, high_codes + s * 2, 2);
        prefetch(low + ahead + s * 8);
        prefetch(high + ahead + s * 8);
        block.places[s][p] = places(low_code, high_code);
        block.weights[s][p] = to_bits(
            _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(low + s * 8)), _mm256_loadu_ps(high + s * 8), 1));
      }
      for (int64_t s = whole; s < count; ++s) {  // at most one
        const int64_t kept = (w.cols - (step + s) * kColumns) / 2, bytes = (kept + 3) / 4;
        const __mmask8 valid = __mmask8((1 << kept) - 1);
        block.places[s][p] = places(uint32_t(load_bits(low_codes + s * 2, bytes)), uint32_t(load_bits(high_codes + s * 2, bytes)));
        block.weights[s][p] = to_bits(
            _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_maskz_loadu_ps(valid, low + s * 8)),
                               _mm256_maskz_loadu_ps(valid, high + s * 8), 1));
      }
    }
  }

  __m256 finish(const NmWeight&, const Rows&, int64_t, __m256i sums, int64_t, int64_t, __mmask8, __m256 bias) const {
    return _mm256_add_ps(_mm256_castsi256_ps(sums), bias);
  }
};

[[maybe_unused]] void linear_panels_f32(const NmWeight& w, const float* x, int64_t tokens, const float* bias, float* y,
                                        const Parallel& parallel) {
  const PanelF32 element{{}, x, w.cols};
  Scratch<char> packed = scratch<char>(panel_layout<PanelF32>(tokens, w.cols).bytes());
  pack_panels(element, tokens, w.cols, packed.get(), parallel);
  linear_panels(element, w, packed.get(), tokens, bias, y, parallel);
}

}}  // namespace sparsify::
