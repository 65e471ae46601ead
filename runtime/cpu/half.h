// fp16 and bf16 to float32, one at a time. Exact: both are subsets of float32.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

// Every instruction set compiles its own copy: with one shared copy the linker could keep the one that uses
// instructions this machine lacks.
namespace sparsify { namespace {

float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] float bf16_to_float(uint16_t half) { return float_from_bits(uint32_t(half) << 16); }

[[maybe_unused]] float f16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) return float_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);  // inf, NaN
  if (magnitude < 0x400) {  // subnormal: magnitude * 2^-24
    const float value = float(magnitude) * float_from_bits(0x33800000);
    return sign ? -value : value;
  }
  return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));  // exponent bias 15 -> 127
}

// Element `index` of a weight's values.
[[maybe_unused]] float value_at(const void* values, DType type, int64_t index) {
  const char* at = static_cast<const char*>(values) + index * int64_t(byte_size(type));
  if (type == DType::f32) {
    float value;
    std::memcpy(&value, at, sizeof value);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  return type == DType::f16 ? f16_to_float(half) : bf16_to_float(half);
}

}}  // namespace sparsify::
