// AVX-512 (F, BW, DQ, VL) in the vocabulary the kernels are written in. simd_avx2.h speaks the same one.
#pragma once
#include <immintrin.h>

#include <cstring>
#include <type_traits>

#include "kernels.h"

namespace sparsify { namespace {

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kAccumulators = 16;  // of 32 registers: 2 FMA a cycle x 4 cycles latency, twice
  static constexpr int kTileVectors = 8;    // of tokens in a tile
  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F broadcast(float v) { return _mm512_set1_ps(v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b where either is NaN
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }  // ties to even
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(F v) { return _mm512_reduce_add_ps(v); }

  static I load(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint32_t* p, I v) { _mm512_storeu_si512(p, v); }
  static I broadcast(uint32_t v) { return _mm512_set1_epi32(int(v)); }
  static I max(I a, I b) { return _mm512_max_epu32(a, b); }
  static I magnitude_bits(F v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }
  static I add(I a, I b) { return _mm512_add_epi32(a, b); }

  // kLanes values as float32.
  template <DType type>
  static F load_values(const char* p) {
    if constexpr (type == DType::f32) return _mm512_loadu_ps(p);
    if constexpr (type == DType::i8)
      return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (type == DType::f16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }

  // kLanes indices of `bits` bits each, from 2 * bits bytes.
  template <int bits>
  static I positions(const uint8_t* p) {
    if constexpr (bits == 8) return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const I lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const I low = _mm512_set1_epi32((1 << bits) - 1);
    if constexpr (bits == 4) {  // 64 bits: lanes 0-7 take the lower word, lanes 8-15 the upper
      const __m128i both = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
      const I word = _mm512_permutexvar_epi32(_mm512_srli_epi32(lane, 3), _mm512_castsi128_si512(both));
      return _mm512_and_si512(_mm512_srlv_epi32(word, _mm512_slli_epi32(_mm512_and_si512(lane, _mm512_set1_epi32(7)), 2)), low);
    }
    std::conditional_t<bits == 2, uint32_t, uint16_t> word;  // read as one: a cleared word patched in memory stalls
    std::memcpy(&word, p, sizeof word);
    const I shift = bits == 2 ? _mm512_slli_epi32(lane, 1) : lane;
    return _mm512_and_si512(_mm512_srlv_epi32(_mm512_set1_epi32(int(word)), shift), low);
  }

  // Lane lane[i] of v in every lane i: a broadcast, if all are equal.
  static F pick(F v, I lane) { return _mm512_permutexvar_ps(lane, v); }
  // Lane i of the result is element index[i] of the 2 * kLanes floats low, high.
  static F select(F low, I index, F high) { return _mm512_permutex2var_ps(low, index, high); }

  static uint32_t mask_bits(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, sizeof bits);
    return bits;
  }
  // Below, `bits` is a mask of kLanes bits.
  // The values of the set lanes, in order, from the low lanes of v; rubbish in the lanes not set.
  static F expand(uint32_t bits, F v) {
    asm("" : "+v"(v));  // from a register: vexpandps from memory is microcoded on Zen
    return _mm512_mask_expand_ps(v, __mmask16(bits), v);  // merging: on Zen 5 twice as fast as zeroing
  }
  static F fma_where(uint32_t bits, F a, F b, F c) { return _mm512_mask3_fmadd_ps(a, b, c, __mmask16(bits)); }
  static F load_where(uint32_t bits, const float* p) { return _mm512_maskz_loadu_ps(__mmask16(bits), p); }

  static void transpose(F (&r)[16]) {
    F t[16];
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
      r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
      r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
  }
};

}}  // namespace sparsify::
