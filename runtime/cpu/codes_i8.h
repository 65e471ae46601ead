// Activations as 8-bit codes for vpdpbusd, which multiplies unsigned by signed bytes. Where the weights are signed, 128
// is added to the codes, and 128 times the sum of the weights taken off again; where the weights are made unsigned, the
// codes stay signed.
#pragma once
#include <immintrin.h>

#include "quantise_tokens.h"
#include "scratch.h"
#include "simd_avx512.h"

namespace sparsify { namespace {

// What a token is divided by: its codes are all 0 where the step is 0 (or NaN: its results will be NaN anyway).
struct Divisor {
  __m512 step, inverse;
};
[[maybe_unused]] Divisor divisor(float step) {
  const float by = step > 0.0f ? step : INFINITY;
  return {_mm512_set1_ps(by), _mm512_set1_ps(1.0f / by)};
}

// x / step to the nearest integer, ties to even, for |x| up to 127 steps. The product with the inverse is off by less than
// 127 * 2^-23 = 1.6e-5, so only where it is that close to a tie may the quotient itself round to another integer; a
// division takes as long as eight products.
SPARSIFY_INLINE inline __m512i nearest_codes(__m512 x, const Divisor& by) {
  const __m512 product = _mm512_mul_ps(x, by.inverse);
  const __m512i codes = _mm512_cvtps_epi32(product);
  const __m512 off = _mm512_abs_ps(_mm512_sub_ps(product, _mm512_cvtepi32_ps(codes)));
  if (__builtin_expect(_mm512_cmp_ps_mask(off, _mm512_set1_ps(0.4999f), _CMP_GT_OQ), 0))
    return _mm512_cvtps_epi32(_mm512_div_ps(x, by.step));
  return codes;
}

// 16 signed codes of a token.
SPARSIFY_INLINE inline __m128i codes_16(__m512 x, const Divisor& by) { return _mm512_cvtepi32_epi8(nearest_codes(x, by)); }

// Every token's codes, each token padded with zeros to a multiple of 128 columns, and its step.
struct TokenCodes {
  int64_t stride;
  Scratch<uint8_t> codes;
  Scratch<float> steps;
};

// `shift`: what is added to the codes, 128 or 0.
[[maybe_unused]] TokenCodes token_codes(const float* x, int64_t tokens, int64_t cols, int shift) {
  const __m128i flip = _mm_set1_epi8(int8_t(shift));
  const int64_t stride = (cols + 127) / 128 * 128;
  TokenCodes result{stride, scratch<uint8_t>(tokens * stride), scratch<float>(tokens)};
  for (int64_t token = 0; token < tokens; ++token) {
    const float* from = x + token * cols;
    uint8_t* to = result.codes.get() + token * stride;
    const Divisor by = divisor(result.steps[token] = token_step<Avx512>(from, cols));
    for (int64_t k = 0; k < stride; k += 16) {
      const int64_t left = cols - k;
      const __mmask16 valid = left >= 16 ? 0xffff : left > 0 ? __mmask16((1 << left) - 1) : 0;
      const __m128i code = _mm_xor_si128(codes_16(_mm512_maskz_loadu_ps(valid, from + k), by), flip);
      _mm_store_si128(reinterpret_cast<__m128i*>(to + k), _mm_maskz_mov_epi8(valid, code));
    }
  }
  return result;
}

}}  // namespace sparsify::
