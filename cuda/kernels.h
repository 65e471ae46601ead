// The GPU kernels as their callers see them: raw pointers, sizes and a stream. No torch, no Python, no TensorRT.
//
//   x [M, K], y [M, N], both row-major, of the same type; y = x W^T + bias for a sparse W [N, K].
//   M = tokens, N = out_features, K = in_features. bias [N] float32 or null, whatever the other types are.
//
// Weights are read in the layout of the file, passes/dialect/*.py: nothing is repacked. All pointers are device memory,
// aligned to their element; loads are wide where x, values and indices begin on 16 bytes and K is a multiple of 32, and
// element by element where not. Every element of y is written. Weights must have been checked (runtime/cpu/formats.h).
// Sums are float32, in an order that does not depend on what else runs: the same input gives the same bits.
//
// Every function launches on `stream`, does not wait, and returns what the launch returned. A type that it does not
// have, a negative size or a K that the format cannot have is cudaErrorInvalidValue; M = 0 or N = 0 does nothing.
// K = 0 gives the bias.
//
// Infinities and NaN: y is not finite where one meets a kept weight, and 2:4 keeps two of four even where they are 0.
// spmm_bitmask_prefill multiplies the zeros too, as the dense product does: there an infinity or NaN in a token makes
// all of the token's outputs NaN. In all other functions it does not reach outputs that do not keep its column.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sparsify_cuda {

// The numbers are those of sparsify::DType (runtime/cpu/kernels.h).
enum class DType : int32_t { f32 = 0, f16 = 1, bf16 = 2 };

extern "C" {

// ---- 2:4, passes/dialect/linear_nm.py with n = 2, m = 4. K is a multiple of 4.
//   values  [N, K / 2]        the kept weights, row after row, ascending inside a group
//   indices [N, ceil(K / 8)]  2 bits for each value, the first in the lowest bits; rows start on a byte
// x_type / w_type: f32 with f32, f16 or bf16; f16 with f16; bf16 with bf16.

// Chooses (choose.cuh): few, then prefill from some number of tokens on where the types allow it, else decode.
cudaError_t sparsify_spmm_24(DType x_type, DType w_type, const void* x, const void* values, const uint8_t* indices,
                             const float* bias, void* y, int64_t M, int64_t N, int64_t K, cudaStream_t stream);
// One thread an output, plain loops: the oracle.
cudaError_t sparsify_spmm_24_readable(DType x_type, DType w_type, const void* x, const void* values,
                                      const uint8_t* indices, const float* bias, void* y, int64_t M, int64_t N,
                                      int64_t K, cudaStream_t stream);
// Few tokens: reads each weight once for up to 8 tokens (4 where x is f32), FP32 multiplications.
cudaError_t sparsify_spmm_24_decode(DType x_type, DType w_type, const void* x, const void* values,
                                    const uint8_t* indices, const float* bias, void* y, int64_t M, int64_t N, int64_t K,
                                    cudaStream_t stream);
// A few tokens: sparse tensor cores (mma.sp), one pass over the weight for up to 32 tokens. f16 with f16, bf16 with bf16.
cudaError_t sparsify_spmm_24_few(DType x_type, DType w_type, const void* x, const void* values, const uint8_t* indices,
                                 const float* bias, void* y, int64_t M, int64_t N, int64_t K, cudaStream_t stream);
// Many tokens: sparse tensor cores (mma.sp). f16 with f16, bf16 with bf16.
cudaError_t sparsify_spmm_24_prefill(DType x_type, DType w_type, const void* x, const void* values,
                                     const uint8_t* indices, const float* bias, void* y, int64_t M, int64_t N,
                                     int64_t K, cudaStream_t stream);

// ---- 2:4 in 4 bits, passes/dialect/linear_nm_int4.py with n = 2, m = 4: activations are quantised token by token to
// 8 bits first, then codes are multiplied with codes in integers, as on the CPU.

// Bytes between two tokens' codes: K rounded up to a multiple of 16.
inline int64_t code_pitch(int64_t K) { return (K + 15) / 16 * 16; }

//   codes [M, code_pitch(K)] int8, 0 behind column K;  steps [M] float32: x is replaced by code * step
//   step = max|x| / 127, codes to nearest, ties to even. A step below the smallest normal float32 counts as 0; a token
//   that holds an infinity or a NaN gets the step NaN and codes 0. x_type: any.
cudaError_t sparsify_quantise_tokens(DType x_type, const void* x, int8_t* codes, float* steps, int64_t M, int64_t K,
                                     cudaStream_t stream);
//   codes, steps: of sparsify_quantise_tokens, on 16 bytes;  group 32, 64 or 128
//   values  [N, ceil(K / 4)] uint8   two codes + 8 a byte, the first in the lower half
//   indices [N, ceil(K / 8)] uint8   as above
//   scales  [N, ceil(K / group)] float16
// y_type: any. Reads each weight once for up to 8 tokens.
cudaError_t sparsify_spmm_24_int4(DType y_type, const int8_t* codes, const float* steps, const uint8_t* values,
                                  const uint8_t* indices, const void* scales, const float* bias, void* y, int64_t M,
                                  int64_t N, int64_t K, int32_t group, cudaStream_t stream);
// One thread an output, plain loops: the oracle.
cudaError_t sparsify_spmm_24_int4_readable(DType y_type, const int8_t* codes, const float* steps, const uint8_t* values,
                                           const uint8_t* indices, const void* scales, const float* bias, void* y,
                                           int64_t M, int64_t N, int64_t K, int32_t group, cudaStream_t stream);

// ---- Unstructured, passes/dialect/linear_bitmask.py.
//   values    [nnz]               row after row, ascending column
//   mask      [N, ceil(K / 8)]    bit k % 8 of byte k / 8: weight k is kept; 0 behind column K
//   row_start [N + 1] int64       first value of each row, then nnz
// Types as for 2:4.

// Chooses: prefill where M > 8 and its types allow it, else decode.
cudaError_t sparsify_spmm_bitmask(DType x_type, DType w_type, const void* x, const void* values, const uint8_t* mask,
                                  const int64_t* row_start, const float* bias, void* y, int64_t M, int64_t N, int64_t K,
                                  cudaStream_t stream);
// One thread an output, plain loops: the oracle.
cudaError_t sparsify_spmm_bitmask_readable(DType x_type, DType w_type, const void* x, const void* values,
                                           const uint8_t* mask, const int64_t* row_start, const float* bias, void* y,
                                           int64_t M, int64_t N, int64_t K, cudaStream_t stream);
// Few tokens (SpMV): one warp a row, reads each weight once for up to 8 tokens (4 where x is f32), FP32
// multiplications.
cudaError_t sparsify_spmm_bitmask_decode(DType x_type, DType w_type, const void* x, const void* values,
                                         const uint8_t* mask, const int64_t* row_start, const float* bias, void* y,
                                         int64_t M, int64_t N, int64_t K, cudaStream_t stream);
// Many tokens: loads sparse, computes dense on tensor cores (mma). f16 with f16, bf16 with bf16.
cudaError_t sparsify_spmm_bitmask_prefill(DType x_type, DType w_type, const void* x, const void* values,
                                          const uint8_t* mask, const int64_t* row_start, const float* bias, void* y,
                                          int64_t M, int64_t N, int64_t K, cudaStream_t stream);

// ---- y[m, j] = x[m, index[j]], bit for bit, for permutations that no weight can absorb.
//   x [M, K_in], index [K_out] int64 in 0 .. K_in - 1 (not checked), y [M, K_out]; elements of 2 or 4 bytes.
cudaError_t sparsify_gather_channels(int32_t element_bytes, const void* x, const int64_t* index, void* y, int64_t M,
                                     int64_t K_in, int64_t K_out, cudaStream_t stream);

// ---- BESA's row-wise mask, calibrate/ranked.py: prune. R rows, C columns.
//   weight [R, C] of `type`;  rank [R, C], rank_bytes 2 (int16) or 4 (int32): in every row each of 0 .. C - 1 once
//   counts [count_rows] int32 in 0 .. C, count_rows R or 1

// out[i, j] = weight[i, j] where rank[i, j] >= counts[i], else 0.
cudaError_t sparsify_rate_mask_forward(DType type, const void* weight, int32_t rank_bytes, const void* rank,
                                       const int32_t* counts, int64_t count_rows, void* out, int64_t R, int64_t C,
                                       cudaStream_t stream);
// The straight-through gradients, for grad [R, C], the gradient of `out`, of `type` like grad_weight.
//   grad_weight [R, C] or null    grad where the weight was kept, else 0
//   grad_beta [beta_rows, D] float32 or null, beta_rows R or 1, D >= 2 candidates
//     [i, d] = - sum of grad[i, j] * weight[i, j] over rank[i, j] < floor(d * C / (D - 1));  summed over rows for 1
//   workspace [R, D] float32      where grad_beta is wanted and beta_rows is 1 and R is not; else unused
cudaError_t sparsify_rate_mask_backward(DType type, const void* weight, int32_t rank_bytes, const void* rank,
                                        const int32_t* counts, int64_t count_rows, const void* grad, void* grad_weight,
                                        float* grad_beta, int64_t beta_rows, int64_t D, float* workspace, int64_t R,
                                        int64_t C, cudaStream_t stream);

}  // extern "C"

}  // namespace sparsify_cuda
