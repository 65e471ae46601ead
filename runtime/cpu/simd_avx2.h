// AVX2 with FMA and F16C in the vocabulary the kernels are written in (simd_avx512.h documents it). What AVX-512
// does with mask registers, this does with a table of permutations for each of the 256 masks of 8 lanes.
#pragma once
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace sparsify { namespace {

// expand[mask][i]: which packed value lane i takes.
struct MaskTable {
  uint8_t expand[256][8] = {};
  constexpr MaskTable() {
    for (int mask = 0; mask < 256; ++mask) {
      int kept = 0;
      for (int lane = 0; lane < 8; ++lane) {
        expand[mask][lane] = uint8_t(kept);
        kept += mask >> lane & 1;
      }
    }
  }
};
constexpr MaskTable kMaskTable;

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kAccumulators = 8;  // of 16 registers: 2 FMA a cycle x 4 cycles latency
  static constexpr int kTileVectors = 4;
  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static F broadcast(float v) { return _mm256_set1_ps(v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F round(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }

  static I load(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static void store(uint32_t* p, I v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static I broadcast(uint32_t v) { return _mm256_set1_epi32(int(v)); }
  static I max(I a, I b) { return _mm256_max_epu32(a, b); }
  static I magnitude_bits(F v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)); }
  static I add(I a, I b) { return _mm256_add_epi32(a, b); }

  template <DType type>
  static F load_values(const char* p) {
    if constexpr (type == DType::f32) return _mm256_loadu_ps(reinterpret_cast<const float*>(p));
    if constexpr (type == DType::i8)
      return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (type == DType::f16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }

  template <int bits>
  static I positions(const uint8_t* p) {
    if constexpr (bits == 8) return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    std::conditional_t<bits == 4, uint32_t, std::conditional_t<bits == 2, uint16_t, uint8_t>> word;
    std::memcpy(&word, p, sizeof word);
    const I shift = _mm256_mullo_epi32(lane(), _mm256_set1_epi32(bits));
    return _mm256_and_si256(_mm256_srlv_epi32(_mm256_set1_epi32(int(word)), shift),
                            _mm256_set1_epi32((1 << bits) - 1));
  }

  static F pick(F v, I lane) { return _mm256_permutevar8x32_ps(v, lane); }
  static F select(F low, I index, F high) {  // bit 3 of the index chooses the half; blendv looks at the sign bit
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index),
                            _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
  }

  static uint32_t mask_bits(const uint8_t* p) { return *p; }
  static F expand(uint32_t bits, F v) { return _mm256_permutevar8x32_ps(v, bytes(kMaskTable.expand[bits & 255])); }
  static F fma_where(uint32_t bits, F a, F b, F c) {  // both factors: 0 * inf must not appear in a pruned lane
    const F mask = _mm256_castsi256_ps(lane_mask(bits));
    return _mm256_fmadd_ps(_mm256_and_ps(a, mask), _mm256_and_ps(b, mask), c);
  }
  static F load_where(uint32_t bits, const float* p) { return _mm256_maskload_ps(p, lane_mask(bits)); }

  static void transpose(F (&r)[8]) {
    F t[8];
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
      t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }

 private:
  static I lane() { return _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0); }
  static I bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static I lane_mask(uint32_t bits) {
    const I lane_bit = _mm256_set_epi32(128, 64, 32, 16, 8, 4, 2, 1);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane_bit), lane_bit);
  }
};

}}  // namespace sparsify::
