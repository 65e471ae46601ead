// Put in front of a kernel by tests/cuda/test_broken.py: the indices of groups 0 and 1 change places.
#pragma once
#include "ptx.cuh"

namespace sparsify_cuda {

template <class T, int selector>
void broken_mma_sp(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  mma_sp_m16n8k32<T, selector>(d, a, b, (metadata & ~0xffu) | (metadata & 0xf) << 4 | (metadata >> 4 & 0xf));
}

}  // namespace sparsify_cuda

#define mma_sp_m16n8k32 broken_mma_sp
