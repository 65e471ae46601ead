// Few tokens, bitmask with 4-bit codes, on AVX-512 with VBMI2 and VNNI. Per 64 columns one expand and one vpdpbusd:
//
//   weights   the stored codes + 8 (0 .. 15, unsigned) where columns are kept, 8 elsewhere, which is code 0
//   sum       = -8 * (sum of x)  +  weights * x           in each of 16 lanes of 4 columns, x signed
//   result   += scale * sum                               in float32, each lane with the scale of its columns
//
// The first term does not depend on the row: it is made once for each token, and the sum starts from it.
#pragma once
#include "codes_i8.h"
#include "decode_i8.h"

namespace sparsify { namespace {

// -8 * the sums of 4 neighbouring codes, for every token [stride / 4].
[[maybe_unused]] Scratch<int32_t> offset_sums(const TokenCodes& x, int64_t tokens) {
  Scratch<int32_t> sums = scratch<int32_t>(tokens * x.stride / 4);
  const int8_t* codes = reinterpret_cast<const int8_t*>(x.codes.get());
  for (int64_t i = 0; i < tokens * x.stride / 4; ++i)
    sums[i] = -8 * (codes[4 * i] + codes[4 * i + 1] + codes[4 * i + 2] + codes[4 * i + 3]);
  return sums;
}

// One row, T tokens; x is signed codes. S scales to 128 columns.
template <int S, int T>
void decode_bits_i4_row(const BitmaskWeight& w, int64_t row, const uint8_t* x, const int32_t* offsets, int64_t stride,
                        const float* steps, float bias, float* y) {
  const int64_t mask_bytes = w.mask_bytes_per_row(), groups = (w.cols + w.group - 1) / w.group;
  const uint8_t* mask = w.mask + row * mask_bytes;
  const uint8_t* values = static_cast<const uint8_t*>(w.values) + w.row_start[row];
  const uint8_t* const end = static_cast<const uint8_t*>(w.values) + w.row_start[w.rows];
  const uint16_t* scales = static_cast<const uint16_t*>(w.scales) + row * groups;
  const __m512i low_half = _mm512_set1_epi16(0x0f0f), none = _mm512_set1_epi8(8);
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512 result[T];
  unrolled<T>([&](auto t) SPARSIFY_INLINE { result[t] = _mm512_setzero_ps(); });

  // Columns k .. k + 64, `half` of 128 whose scales are in the lowest lanes of `own`. `whole`: 32 bytes may be read.
  const auto step = [&](int64_t k, uint64_t word, __m512 own, auto half, auto whole) SPARSIFY_INLINE {
    const int64_t bytes = (__builtin_popcountll(word) + 1) / 2;
    const __m256i packed = whole ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values))
                                 : _mm256_maskz_loadu_epi8(uint32_t((uint64_t(1) << bytes) - 1), values);
    const __m512i wide = _mm512_cvtepu8_epi16(packed);  // 0 0 h l in each 16 bits; wanted 0 h 0 l
    const __m512i codes = _mm512_ternarylogic_epi32(wide, _mm512_slli_epi16(wide, 4), low_half, 0xa8);
    const __m512i weights = expand_bytes(codes, word, none);
    values += bytes;
    const __m512i which = S == 4 ? _mm512_add_epi32(_mm512_srli_epi32(lane, 3), _mm512_set1_epi32(2 * half))
                                 : _mm512_set1_epi32(S == 2 ? half : 0);
    const __m512 scale = _mm512_permutexvar_ps(which, own);
    unrolled<T>([&](auto t) SPARSIFY_INLINE {
      const __m512i start = _mm512_load_si512(offsets + (t * stride + k) / 4);
      const __m512i sum = _mm512_dpbusd_epi32(start, weights, _mm512_load_si512(x + t * stride + k));
      result[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, result[t]);
    });
  };
  const auto as_float = [](uint64_t halves) SPARSIFY_INLINE {
    return _mm512_castps128_ps512(_mm_cvtph_ps(_mm_cvtsi64_si128(int64_t(halves))));
  };
  constexpr std::integral_constant<int, 0> first;
  constexpr std::integral_constant<int, 1> second;
  int64_t k = 0;
  for (; k + 128 <= w.cols && end - values >= 64; k += 128, scales += S) {
    prefetch(values + kAheadI8);
    if (k % 512 == 0) prefetch(mask + k / 8 + kAheadI8 / 2);
    const __m512 own = as_float(load_bits(reinterpret_cast<const uint8_t*>(scales), 2 * S));
    step(k, load_bits(mask + k / 8, 8), own, first, std::true_type());
    step(k + 64, load_bits(mask + k / 8 + 8, 8), own, second, std::true_type());
  }
  for (; k < w.cols; k += 128, scales += S) {
    const int64_t left = w.cols - k < 128 ? w.cols - k : 128, rest = (left + 7) / 8;
    const __m512 own = as_float(load_bits(reinterpret_cast<const uint8_t*>(scales), 2 * ((left + w.group - 1) / w.group)));
    step(k, load_bits(mask + k / 8, rest < 8 ? rest : 8), own, first, std::false_type());
    if (left > 64) step(k + 64, load_bits(mask + k / 8 + 8, rest - 8), own, second, std::false_type());
  }
  for (int t = 0; t < T; ++t) y[t * w.rows + row] = _mm512_reduce_add_ps(result[t]) * steps[t] + bias;
}

}}  // namespace sparsify::
