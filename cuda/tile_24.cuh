// What the tensor-core kernels of 2:4 weights share: indices as mma.sp's metadata, and bringing to shared memory.
#pragma once
#include "load.cuh"
#include "ptx.cuh"

namespace sparsify_cuda {

// In every group the places 0 and 1: what mma.sp gets where there is no weight. Equal indices would be undefined.
constexpr uint32_t kNoCodes = 0x4444;

// The indices of 16 columns from `column` on of one row; kNoCodes for groups that do not exist, whose values are 0.
template <bool wide>
__device__ uint32_t codes_of_16(const uint8_t* indices, int64_t row, int64_t column, int64_t N, int64_t K) {
  if (row >= N || column >= K) return kNoCodes;
  const uint8_t* at = indices + row * ((K + 7) / 8) + column / 8;
  if constexpr (wide) return *reinterpret_cast<const uint16_t*>(at);  // K is a multiple of 32: all groups exist
  const int64_t groups = (K - column) / 4;
  const uint32_t there = groups >= 4 ? 0xffff : (1u << 4 * groups) - 1;
  const uint32_t codes = at[0] | (groups > 2 ? at[1] << 8 : 0);
  return (codes & there) | (kNoCodes & ~there);
}

// The metadata of this lane for 16 rows from `row` on and 64 columns from `column` on: selector 0 of mma.sp uses the
// first 32 columns, selector 1 the others. The named repacking of linear_nm.py's indices: bits are not moved inside
// their 16, only 16 columns of row g and of row g + 8 are put into one word (ptx.cuh).
template <bool wide>
__device__ uint32_t metadata_24(const uint8_t* indices, int64_t row, int64_t column, int64_t N, int64_t K, int lane) {
  const int64_t mine = row + lane / 4;
  column += lane % 4 * 16;
  return codes_of_16<wide>(indices, mine, column, N, K) | codes_of_16<wide>(indices, mine + 8, column, N, K) << 16;
}

// Brings 8 elements of a row to shared memory; zeros where they do not exist.
template <bool wide, class T>
__device__ void bring_8(T* to, const T* from, int64_t exist) {
  if constexpr (wide) {
    cp_async_16(to, from, exist > 0);
  } else {
    uint32_t words[4];
    load_words<false>(words, from, exist * int64_t(sizeof(T)));
    *reinterpret_cast<uint4*>(to) = uint4{words[0], words[1], words[2], words[3]};
  }
}

}  // namespace sparsify_cuda
