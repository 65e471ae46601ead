// The PTX instructions that the tensor-core kernels use, one function each: inline PTX on the device, and their meaning
// in C++ for the emulator, written from the fragment tables of the PTX ISA (section 9.7, warp level matrix
// instructions). tests/cuda/test_ptx.py runs both against fragments worked out by hand.
//
// The tables, for a lane with g = lane / 4 and j = lane % 4; every register holds two 16-bit elements, low half first:
//
//   A [16, 16] row-major   register r holds row g + 8 (r % 2), columns 2j + 8 (r / 2) and the next
//   B [K, 8]               register r holds rows 2j + 8 r and the next, column g
//   C, D [16, 8] float     element i is row g + 8 (i / 2), column 2j + i % 2
//
// A of mma.sp holds the kept two of four neighbours, so A [16, 16] stands for [16, 32]. Its metadata is 2 bits for each
// kept element, the first in the lowest bits, which is how passes/dialect/linear_nm.py stores indices: 32 bits a row,
// and the row's first 16 bits are what a lane holds for 16 columns:
//
//   metadata of lane (g, j), j = 2 selector + h:   bits 0-15 row g,   bits 16-31 row g + 8,   columns 16 h .. 16 h + 15
//
// The two indices of a group must ascend (ordered_metadata); 0b0000 and other pairs that do not are undefined.
#pragma once
#include <type_traits>

#include "number.cuh"

namespace sparsify_cuda {

#ifdef __CUDACC__

#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ < 1205
#error "mma.sp::ordered_metadata wants CUDA 12.5 or newer"
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#error "2:4 tensor cores begin with sm_80"
#endif

// D = A B + D, with A [16, 16] and B [16, 8].
template <class T>
__device__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// D = A B + D, with A [16, 32] stored as its kept [16, 16], and B [32, 8]. Of every four lanes, 2 selector and
// 2 selector + 1 give the metadata; that of the others is not read.
template <class T, int selector>
__device__ void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(selector));
  else
    asm volatile(
        "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
          "n"(selector));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane l gives the address of row l % 8 of matrix l / 8, a
// multiple of 16; it gets elements 2j and 2j + 1 of row g of matrix r in register r.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Begins to copy 16 bytes to shared memory, past L1; zeros, and no read, unless `exists`. Both addresses are multiples
// of 16.
__device__ inline void cp_async_16(void* to, const void* from, bool exists) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(address), "l"(from), "r"(exists ? 16 : 0)
               : "memory");
}

// The same for 4 bytes, by way of L1: neighbours that come in later steps are then near. Both addresses are multiples
// of 4.
__device__ inline void cp_async_4(void* to, const void* from, bool exists) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(address), "l"(from), "r"(exists ? 4 : 0)
               : "memory");
}

// Closes the group of the copies begun since the last.
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

// Waits until at most the `pending` latest groups of this thread are still under way.
template <int pending>
__device__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
}

#else

struct MmaOperands {
  uint32_t a[4], b[4], metadata;
};

// A fragment's element of matrix A; every lane's operands are at `all`.
template <class T>
float a_element(const unsigned char* all, int row, int column) {
  const MmaOperands lane = emulate::shown_by<MmaOperands>(all, row % 8 * 4 + column % 8 / 2);
  return element<T>(lane.a, 2 * (row / 8 + 2 * (column / 8)) + column % 2);
}

template <class T>
float b_element(const unsigned char* all, int row, int column) {
  const MmaOperands lane = emulate::shown_by<MmaOperands>(all, column * 4 + row % 8 / 2);
  return element<T>(lane.b, 2 * (row / 8) + row % 2);
}

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const unsigned char* all =
      emulate::exchange(MmaOperands{{a[0], a[1], a[2], a[3]}, {b[0], b[1], 0, 0}, 0});
  const int g = emulate::lane() / 4, j = emulate::lane() % 4;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k)
      d[i] += a_element<T>(all, g + 8 * (i / 2), k) * b_element<T>(all, k, 2 * j + i % 2);
}

template <class T, int selector>
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  const unsigned char* all =
      emulate::exchange(MmaOperands{{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}, metadata});
  const int g = emulate::lane() / 4, j = emulate::lane() % 4;
  for (int i = 0; i < 4; ++i)
    for (int group = 0; group < 8; ++group) {
      const uint32_t word = emulate::shown_by<MmaOperands>(all, g * 4 + 2 * selector + group / 4).metadata;
      const uint32_t code = word >> (16 * (i / 2) + group % 4 * 4) & 15;
      const int first = code & 3, second = code >> 2;
      if (first >= second) emulate::fail("mma.sp: the two indices of a group do not ascend");
      const int row = g + 8 * (i / 2), column = 2 * j + i % 2;
      d[i] += a_element<T>(all, row, 2 * group) * b_element<T>(all, 4 * group + first, column);
      d[i] += a_element<T>(all, row, 2 * group + 1) * b_element<T>(all, 4 * group + second, column);
    }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) emulate::fail("ldmatrix: an address that is not a multiple of 16");
  const unsigned char* all = emulate::exchange(row);
  const int g = emulate::lane() / 4, j = emulate::lane() % 4;
  if (emulate::lane() == 0) emulate::count_conflicts(all);
  for (int matrix = 0; matrix < 4; ++matrix)
    std::memcpy(&r[matrix], emulate::shown_by<const uint32_t*>(all, matrix * 8 + g) + j, 4);
  __syncwarp();  // the manual lets no lane go on before all have read
}

inline void cp_async(void* to, const void* from, size_t bytes, bool exists) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    emulate::fail("cp.async: an address that is not a multiple of its size");
  emulate::block.current->copies.back().push_back({to, from, bytes, exists ? bytes : 0});
}
inline void cp_async_16(void* to, const void* from, bool exists) { cp_async(to, from, 16, exists); }
inline void cp_async_4(void* to, const void* from, bool exists) { cp_async(to, from, 4, exists); }

inline void cp_async_commit() { emulate::block.current->copies.emplace_back(); }

template <int pending>
void cp_async_wait() {
  auto& groups = emulate::block.current->copies;  // the last one is open
  while (groups.size() > size_t{pending} + 1) {
    for (const emulate::Copy& copy : groups.front()) {
      std::memset(copy.to, 0, copy.bytes);
      if (copy.read) std::memcpy(copy.to, copy.from, copy.read);
    }
    groups.erase(groups.begin());
  }
}

#endif

}  // namespace sparsify_cuda
