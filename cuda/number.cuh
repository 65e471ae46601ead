// The element types of the kernels: to and from float, and two of them in a 32-bit word.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels.h"

namespace sparsify_cuda {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float<float>(float value) { return value; }
template <>
__device__ inline __half from_float<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

// Element i of an array of T that lies in 32-bit words, the first in the lowest bits.
template <class T>
__device__ float element(const uint32_t* words, int i);
template <>
__device__ inline float element<float>(const uint32_t* words, int i) { return __uint_as_float(words[i]); }
template <>
__device__ inline float element<__half>(const uint32_t* words, int i) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(words[i / 2] >> i % 2 * 16)));
}
template <>
__device__ inline float element<__nv_bfloat16>(const uint32_t* words, int i) {
  return __bfloat162float(__ushort_as_bfloat16(static_cast<unsigned short>(words[i / 2] >> i % 2 * 16)));
}

// body(X(), W()) for the types of activations and weights that belong together.
template <class Body>
cudaError_t for_types(DType x, DType w, Body body) {
  if (x == DType::f16 && w == DType::f16) return body(__half(), __half());
  if (x == DType::bf16 && w == DType::bf16) return body(__nv_bfloat16(), __nv_bfloat16());
  if (x == DType::f32 && w == DType::f32) return body(float(), float());
  if (x == DType::f32 && w == DType::f16) return body(float(), __half());
  if (x == DType::f32 && w == DType::bf16) return body(float(), __nv_bfloat16());
  return cudaErrorInvalidValue;
}

// body(T()) for one type.
template <class Body>
cudaError_t for_type(DType type, Body body) {
  if (type == DType::f32) return body(float());
  if (type == DType::f16) return body(__half());
  if (type == DType::bf16) return body(__nv_bfloat16());
  return cudaErrorInvalidValue;
}

// The types that tensor cores multiply.
inline bool has_tensor_cores(DType x, DType w) { return x == w && (x == DType::f16 || x == DType::bf16); }

}  // namespace sparsify_cuda
