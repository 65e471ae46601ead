// BESA's row-wise mask and its straight-through gradients, as calibrate/ranked.py: prune defines them (Xu et al. 2024,
// "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation", section 3.2).
//
// The gradient of candidate d is a sum over the weights whose rank is below T_d = floor(d C / (D - 1)). A row's ranks
// are a permutation, so products are put at the place of their rank, and the weights between two stairs become
// neighbours. Every sum is then taken in the order of the ranks: no atomics, the same bits on every run.
#include "launch.cuh"
#include "number.cuh"

namespace sparsify_cuda {

constexpr int kThreads = 256;
constexpr int kWindow = 8192;  // ranks that a block sorts at a time: 32 KB of shared memory

template <class T, class Rank>
__global__ void keep_ranked(const T* __restrict__ from, const Rank* __restrict__ rank,
                            const int32_t* __restrict__ counts, bool count_each, T* __restrict__ out, int64_t C,
                            unsigned blocks_per_row) {
  const int64_t row = blockIdx.x / blocks_per_row;
  const int64_t column = int64_t{blockIdx.x % blocks_per_row} * blockDim.x + threadIdx.x;
  if (column >= C) return;
  const int64_t at = row * C + column;
  out[at] = rank[at] >= counts[count_each ? row : 0] ? from[at] : from_float<T>(0.0f);
}

// Inclusive sums over a block of kThreads, in a fixed order.
__device__ inline float sum_up_to(float value, float* room) {
  const int me = threadIdx.x;
  for (int delta = 1; delta < kThreads; delta *= 2) {
    room[me] = value;
    __syncthreads();
    if (me >= delta) value += room[me - delta];
    __syncthreads();
  }
  return value;
}

// One block a row: grad_beta [R, D].
template <class T, class Rank>
__global__ void __launch_bounds__(kThreads)
    rate_gradient(const T* __restrict__ weight, const Rank* __restrict__ rank, const T* __restrict__ grad,
                  float* __restrict__ grad_beta, int64_t C, int64_t D) {
  __shared__ float product[kWindow];
  __shared__ float room[kThreads];
  const int64_t row = blockIdx.x;
  float* const out = grad_beta + row * D;
  const auto stair = [&](int64_t d) { return d <= 0 ? 0 : d * C / (D - 1); };

  for (int64_t d = threadIdx.x; d < D; d += kThreads) out[d] = 0.0f;
  for (int64_t first = 0; first < C; first += kWindow) {
    const int64_t last = first + kWindow < C ? first + kWindow : C;
    for (int64_t j = threadIdx.x; j < C; j += kThreads) {
      const int64_t place = rank[row * C + j];
      if (place >= first && place < last)
        product[place - first] = to_float(grad[row * C + j]) * to_float(weight[row * C + j]);
    }
    __syncthreads();
    for (int64_t d = threadIdx.x; d < D; d += kThreads) {  // what lies between the stair below d and that of d
      const int64_t low = stair(d - 1), high = stair(d);
      float sum = 0.0f;
      for (int64_t r = low > first ? low : first; r < (high < last ? high : last); ++r) sum += product[r - first];
      out[d] -= sum;
    }
    __syncthreads();
  }

  float below = 0.0f;  // of all candidates before these
  for (int64_t d = 0; d < D; d += kThreads) {
    const int64_t mine = d + threadIdx.x;
    const float sum = below + sum_up_to(mine < D ? out[mine] : 0.0f, room);
    if (mine < D) out[mine] = sum;
    room[threadIdx.x] = sum;
    __syncthreads();
    below = room[kThreads - 1];
    __syncthreads();
  }
}

// One block a candidate: the sum of a column of [R, D] in double.
__global__ void __launch_bounds__(kThreads)
    sum_rows(const float* __restrict__ rows, float* __restrict__ out, int64_t R, int64_t D) {
  __shared__ double room[kThreads];
  double sum = 0.0;
  for (int64_t r = threadIdx.x; r < R; r += kThreads) sum += double(rows[r * D + blockIdx.x]);
  room[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < kThreads; ++i) sum += room[i];
  out[blockIdx.x] = float(sum);
}

template <class Body>
cudaError_t for_rank(int32_t rank_bytes, Body body) {
  if (rank_bytes == 2) return body(int16_t());
  if (rank_bytes == 4) return body(int32_t());
  return cudaErrorInvalidValue;
}

cudaError_t mask(DType type, const void* from, int32_t rank_bytes, const void* rank, const int32_t* counts,
                 int64_t count_rows, void* out, int64_t R, int64_t C, cudaStream_t stream) {
  return for_type(type, [&](auto type_of) {
    return for_rank(rank_bytes, [&](auto rank_of) {
      using T = decltype(type_of);
      using Rank = decltype(rank_of);
      const int64_t blocks_per_row = ceil_div(C, kThreads), blocks = R * blocks_per_row;
      if (blocks == 0) return cudaSuccess;
      if (!fits_grid(blocks)) return cudaErrorInvalidConfiguration;
      return launch(keep_ranked<T, Rank>, dim3(unsigned(blocks)), dim3(kThreads), stream, static_cast<const T*>(from),
                    static_cast<const Rank*>(rank), counts, count_rows != 1, static_cast<T*>(out), C,
                    unsigned(blocks_per_row));
    });
  });
}

bool sizes_fit(int64_t count_rows, int64_t R, int64_t C) {
  return R >= 0 && C >= 0 && (count_rows == R || count_rows == 1);
}

extern "C" cudaError_t sparsify_rate_mask_forward(DType type, const void* weight, int32_t rank_bytes, const void* rank,
                                                  const int32_t* counts, int64_t count_rows, void* out, int64_t R,
                                                  int64_t C, cudaStream_t stream) {
  if (!sizes_fit(count_rows, R, C)) return cudaErrorInvalidValue;
  return mask(type, weight, rank_bytes, rank, counts, count_rows, out, R, C, stream);
}

extern "C" cudaError_t sparsify_rate_mask_backward(DType type, const void* weight, int32_t rank_bytes, const void* rank,
                                                   const int32_t* counts, int64_t count_rows, const void* grad,
                                                   void* grad_weight, float* grad_beta, int64_t beta_rows, int64_t D,
                                                   float* workspace, int64_t R, int64_t C, cudaStream_t stream) {
  if (!sizes_fit(count_rows, R, C)) return cudaErrorInvalidValue;
  if (grad_beta && (D < 2 || (beta_rows != R && beta_rows != 1))) return cudaErrorInvalidValue;
  if (grad_weight) {
    const cudaError_t status = mask(type, grad, rank_bytes, rank, counts, count_rows, grad_weight, R, C, stream);
    if (status != cudaSuccess) return status;
  }
  if (!grad_beta) return cudaSuccess;
  const bool together = beta_rows == 1 && R != 1;
  if (together && R > 0 && !workspace) return cudaErrorInvalidValue;
  float* const by_row = together ? workspace : grad_beta;
  if (R > 0) {
    const cudaError_t status = for_type(type, [&](auto type_of) {
      return for_rank(rank_bytes, [&](auto rank_of) {
        using T = decltype(type_of);
        using Rank = decltype(rank_of);
        if (!fits_grid(R)) return cudaErrorInvalidConfiguration;
        return launch(rate_gradient<T, Rank>, dim3(unsigned(R)), dim3(kThreads), stream, static_cast<const T*>(weight),
                      static_cast<const Rank*>(rank), static_cast<const T*>(grad), by_row, C, D);
      });
    });
    if (status != cudaSuccess) return status;
  }
  if (!together) return cudaSuccess;
  if (!fits_grid(D)) return cudaErrorInvalidConfiguration;
  return launch(sum_rows, dim3(unsigned(D)), dim3(kThreads), stream, workspace, grad_beta, R, D);
}

}  // namespace sparsify_cuda
