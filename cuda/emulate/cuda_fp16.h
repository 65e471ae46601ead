// IEEE half precision for the emulator: storage, and rounding to nearest even. Arithmetic is done in float.
#pragma once
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half half) {
  const unsigned sign = unsigned(half.bits & 0x8000) << 16, magnitude = half.bits & 0x7fff;
  if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  if (magnitude < 0x400) return (sign ? -1.0f : 1.0f) * std::ldexp(float(magnitude), -24);         // subnormal
  return __uint_as_float(sign | ((magnitude << 13) + (112u << 23)));  // exponent bias 15 -> 127
}

inline __half __float2half_rn(float value) {
  const unsigned bits = __float_as_uint(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return {0x7fff};                        // NaN
  if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};      // 65520 and above round to infinity
  if (magnitude < 0x38800000) {                                       // subnormal: multiples of 2^-24
    const float steps = std::nearbyint(std::ldexp(std::fabs(value), 24));
    return {uint16_t(sign | unsigned(steps))};
  }
  const unsigned rounded = magnitude + 0xfff + (magnitude >> 13 & 1);  // ties to even
  return {uint16_t(sign | ((rounded >> 13) - (112u << 10)))};
}
