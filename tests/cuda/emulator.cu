// What only the emulator has: the order of its fibers, and kernels that are wrong in ways it must notice.
#include "launch.cuh"
#include "ptx.cuh"

namespace sparsify_cuda {

extern "C" void sparsify_emulate_backwards(bool backwards) { emulate::backwards = backwards; }

extern "C" uint64_t sparsify_emulate_matrices() { return emulate::matrices; }
extern "C" int32_t sparsify_emulate_dynamic_shared() { return emulate::DynamicShared::last_bytes; }
extern "C" uint64_t sparsify_emulate_conflicts() { return emulate::conflicts; }

__global__ void leave_before_the_barrier() {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void indices_that_do_not_ascend() {
  float d[4] = {};
  const uint32_t zeros[4] = {};
  mma_sp_m16n8k32<__half, 0>(d, zeros, zeros, 0x44444440);
}

__global__ void copy_to_an_odd_address(const uint32_t* from) {
  alignas(16) __shared__ uint32_t room[8];
  cp_async_16(room + 1, from, true);
}

__global__ void read_matrix_from_an_odd_address() {
  alignas(16) __shared__ uint32_t room[64];
  uint32_t r[4];
  ldmatrix_x4(r, room + 1);
}

// Rows of 64 bytes, not swizzled: every second one is in the same banks.
__global__ void read_matrix_with_conflicts() {
  alignas(128) __shared__ uint32_t room[32][16];
  uint32_t r[4];
  ldmatrix_x4(r, room[threadIdx.x]);
}

extern "C" cudaError_t sparsify_conflicts() { return launch(read_matrix_with_conflicts, dim3(1), dim3(32), nullptr); }
extern "C" cudaError_t sparsify_wrong_leaves() { return launch(leave_before_the_barrier, dim3(1), dim3(32), nullptr); }
extern "C" cudaError_t sparsify_wrong_indices() {
  return launch(indices_that_do_not_ascend, dim3(1), dim3(32), nullptr);
}
extern "C" cudaError_t sparsify_wrong_copy() {
  alignas(16) const uint32_t from[4] = {};
  return launch(copy_to_an_odd_address, dim3(1), dim3(32), nullptr, from);
}
extern "C" cudaError_t sparsify_wrong_matrix() {
  return launch(read_matrix_from_an_odd_address, dim3(1), dim3(32), nullptr);
}
extern "C" cudaError_t sparsify_wrong_block() { return launch(leave_before_the_barrier, dim3(1), dim3(33), nullptr); }
extern "C" cudaError_t sparsify_too_many_threads() {
  return launch(leave_before_the_barrier, dim3(1), dim3(2048), nullptr);
}

}  // namespace sparsify_cuda
