// S[g, j] = sum over r of max(a[r, g], b[r, j]): a matrix product with max for multiply, so built like one.
//
// A tile of 6 columns of a by 4 vectors of columns of b lives in 24 registers; each row then costs 4 loads, 6
// broadcasts, 24 max and 24 add, and the vector units are the limit. Both operands are first copied into panels of 128
// rows so that they are read in order from the level 1 (a, b) and level 2 cache (all of b's panel).
// Sums over 128 rows are float32, their total float64: always the same order, however many threads there are.
#pragma once
#include "kernels.h"
#include "scratch.h"
#include "unrolled.h"

namespace sparsify { namespace {

constexpr int64_t kSumRows = 128;
constexpr int64_t kTaskVectors = 16;  // vectors of b's columns in a task
constexpr int64_t kBlocksA = 8;       // register tiles of a that are packed together

template <class V>
struct MaxTile {
  static constexpr int kVectors = V::kLanes == 16 ? 4 : 2;  // AVX2 has half the registers
  static constexpr int kColumns = V::kLanes == 16 ? 6 : 5;
};

// sum[g][j] over `rows` rows of a panel [rows][kColumns] and b panel [rows][kVectors * kLanes], added to out.
template <class V>
void max_tile(const float* a, const float* b, int64_t rows, double* out, int64_t stride, int64_t columns_a,
              int64_t columns_b) {
  constexpr int G = MaxTile<V>::kColumns, J = MaxTile<V>::kVectors;
  typename V::F sum[G][J];
  unrolled<G>([&](auto g) SPARSIFY_INLINE {
    unrolled<J>([&](auto j) SPARSIFY_INLINE { sum[g][j] = V::zero(); });
  });
  for (int64_t r = 0; r < rows; ++r, a += G, b += J * V::kLanes) {
    typename V::F right[J];
    unrolled<J>([&](auto j) SPARSIFY_INLINE { right[j] = V::load(b + j * V::kLanes); });
    unrolled<G>([&](auto g) SPARSIFY_INLINE {
      const typename V::F left = V::broadcast(a[g]);
      unrolled<J>([&](auto j) SPARSIFY_INLINE { sum[g][j] = V::add(sum[g][j], V::max(left, right[j])); });
    });
  }
  float tile[G][J * V::kLanes];
  unrolled<G>([&](auto g) SPARSIFY_INLINE {
    unrolled<J>([&](auto j) SPARSIFY_INLINE { V::store(tile[g] + j * V::kLanes, sum[g][j]); });
  });
  for (int64_t g = 0; g < columns_a; ++g)
    for (int64_t j = 0; j < columns_b; ++j) out[g * stride + j] += double(tile[g][j]);
}

// Copies columns first .. first + width of rows [r, r_last) to out [rows][width]; missing columns are 0.
inline void pack_columns(const float* from, int64_t columns, int64_t r, int64_t r_last, int64_t first, int64_t width,
                         float* out) {
  const int64_t valid = columns - first < width ? columns - first : width;
  for (; r < r_last; ++r, out += width) {
    std::memcpy(out, from + r * columns + first, size_t(valid) * sizeof(float));
    for (int64_t i = valid; i < width; ++i) out[i] = 0.0f;
  }
}

template <class V>
void pairwise_max_sum(const float* a, const float* b, int64_t rows, int64_t k1, int64_t k2, double* out,
                      const Parallel& parallel) {
  constexpr int64_t G = MaxTile<V>::kColumns, width = MaxTile<V>::kVectors * V::kLanes;
  constexpr int64_t task_width = kTaskVectors * V::kLanes, a_width = kBlocksA * G;
  auto task = [&](int64_t index) {
    const int64_t first = index * task_width;
    const int64_t last = first + task_width < k2 ? first + task_width : k2;
    for (int64_t g = 0; g < k1; ++g)
      for (int64_t j = first; j < last; ++j) out[g * k2 + j] = 0.0;
    Scratch<float> panels = scratch<float>(kSumRows * (task_width + a_width));
    float *b_panel = panels.get(), *a_panel = b_panel + kSumRows * task_width;
    for (int64_t r = 0; r < rows; r += kSumRows) {
      const int64_t r_last = r + kSumRows < rows ? r + kSumRows : rows;
      for (int64_t j = first; j < last; j += width)
        pack_columns(b, k2, r, r_last, j, width, b_panel + (j - first) * kSumRows);
      for (int64_t g0 = 0; g0 < k1; g0 += a_width) {
        const int64_t g_last = g0 + a_width < k1 ? g0 + a_width : k1;
        for (int64_t g = g0; g < g_last; g += G) pack_columns(a, k1, r, r_last, g, G, a_panel + (g - g0) * kSumRows);
        for (int64_t j = first; j < last; j += width)
          for (int64_t g = g0; g < g_last; g += G)
            max_tile<V>(a_panel + (g - g0) * kSumRows, b_panel + (j - first) * kSumRows, r_last - r,
                        out + g * k2 + j, k2, g_last - g < G ? g_last - g : G, last - j < width ? last - j : width);
      }
    }
  };
  parallel_for(parallel, (k2 + task_width - 1) / task_width, task);
}

}}  // namespace sparsify::
