// Activations of quantised weights: one step for each token, codes -127 .. 127 (kernels.h says how they are rounded).
#pragma once
#include <cfloat>
#include <cmath>

#include "rows.h"

namespace sparsify { namespace {

// The token's step; NaN if it holds a NaN or an infinity, 0 if all of its codes are 0.
template <class V>
float token_step(const float* x, int64_t cols) {
  typename V::I most = V::broadcast(uint32_t(0));
  int64_t k = 0;
  // Compared as integers: NaN is above infinity, and infinity above everything else.
  for (; k + V::kLanes <= cols; k += V::kLanes) most = V::max(most, V::magnitude_bits(V::load(x + k)));
  most = V::max(most, V::magnitude_bits(load_some_values<V, DType::f32>(reinterpret_cast<const char*>(x + k), cols - k)));
  uint32_t lanes[V::kLanes], bits = 0;
  V::store(lanes, most);
  for (const uint32_t lane : lanes) bits = lane > bits ? lane : bits;
  if (bits >= 0x7f800000) return NAN;
  const float step = float_from_bits(bits) / 127.0f;
  return step < FLT_MIN ? 0.0f : step;
}

// to = code * step for every element of a token; NaN everywhere if one is not finite.
template <class V>
void round_token(const float* x, int64_t cols, float* to) {
  const float step = token_step<V>(x, cols);
  const typename V::F by = V::broadcast(step == 0.0f ? INFINITY : step), factor = V::broadcast(step);
  const auto rounded = [&](typename V::F v) { return V::mul(V::round(V::div(v, by)), factor); };
  int64_t k = 0;
  for (; k + V::kLanes <= cols; k += V::kLanes) V::store(to + k, rounded(V::load(x + k)));
  float last[V::kLanes];
  V::store(last, rounded(load_some_values<V, DType::f32>(reinterpret_cast<const char*>(x + k), cols - k)));
  std::memcpy(to + k, last, size_t(cols - k) * sizeof(float));
}

}}  // namespace sparsify::
