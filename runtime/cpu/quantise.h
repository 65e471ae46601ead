// Activations of one token as 8-bit codes, one value at a time.
#pragma once
#include <cfloat>
#include <cstdint>
#include <cstring>

// Every instruction set compiles its own copy; see half.h.
namespace sparsify { namespace {

// Rounds to the nearest integer, ties to even, for |value| below 2^22: at 1.5 * 2^23 a float32 has no fraction left.
[[maybe_unused]] int32_t nearest(float value) {
  const float shifted = value + 12582912.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4b400000;
}

// Bits of the largest |value|; 0x7f800000 and more where one is infinite or NaN.
[[maybe_unused]] int32_t largest_magnitude(const float* values, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

constexpr int32_t kInfinityBits = 0x7f800000;

// Writes the codes of x [cols] and returns their step, as kernels.h says it: 0 with codes 0 for a token that is nearly
// zero, NaN with codes 0 for one that is not finite.
[[maybe_unused]] float quantise_token(const float* x, int64_t cols, int8_t* codes) {
  const int32_t bits = largest_magnitude(x, cols);
  float largest;
  std::memcpy(&largest, &bits, sizeof largest);
  const float step = largest / 127.0f;
  if (bits >= kInfinityBits || step < FLT_MIN) {
    for (int64_t k = 0; k < cols; ++k) codes[k] = 0;
    return bits >= kInfinityBits ? __builtin_nanf("") : 0.0f;
  }
  for (int64_t k = 0; k < cols; ++k) codes[k] = int8_t(nearest(x[k] / step));
  return step;
}

}}  // namespace sparsify::
