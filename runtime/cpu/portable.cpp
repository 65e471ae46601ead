// Every op as plain loops: the version to read, the oracle of the fast ones, and what runs on other processors.
#include <cstring>
#include <vector>

#include "half.h"
#include "kernels.h"

namespace sparsify {
namespace {

// Rows that one task computes. Fixed, so that the split does not depend on the number of threads.
constexpr int64_t kRowsPerTask = 16;

// One row of W, unpacked: weight[i] belongs to column[i], ascending.
struct KeptRow {
  std::vector<float> weight;
  std::vector<int64_t> column;
};

void unpack_row(const NmWeight& w, int64_t row, KeptRow& kept) {
  const int bits = w.index_bits();
  const uint8_t* packed = w.indices + row * w.index_bytes_per_row();
  for (int64_t i = 0; i < w.kept_per_row(); ++i) {
    const int position = packed[i * bits / 8] >> (i * bits % 8) & ((1 << bits) - 1);
    kept.weight.push_back(value_at(w.values, w.type, row * w.kept_per_row() + i));
    kept.column.push_back(i / w.n * w.m + position);
  }
}

void unpack_row(const BitmaskWeight& w, int64_t row, KeptRow& kept) {
  const uint8_t* mask = w.mask + row * w.mask_bytes_per_row();
  int64_t next = w.row_start[row];
  for (int64_t k = 0; k < w.cols; ++k) {
    if (!(mask[k / 8] >> (k % 8) & 1)) continue;
    kept.weight.push_back(value_at(w.values, w.type, next++));
    kept.column.push_back(k);
  }
}

template <class Weight>
void linear(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  auto task = [&](int64_t index) {
    const int64_t first = index * kRowsPerTask;
    const int64_t last = first + kRowsPerTask < w.rows ? first + kRowsPerTask : w.rows;
    KeptRow kept;
    for (int64_t row = first; row < last; ++row) {
      kept.weight.clear();
      kept.column.clear();
      unpack_row(w, row, kept);
      for (int64_t token = 0; token < tokens; ++token) {
        float sum = bias ? bias[row] : 0.0f;
        for (size_t i = 0; i < kept.weight.size(); ++i) sum += kept.weight[i] * x[token * w.cols + kept.column[i]];
        y[token * w.rows + row] = sum;
      }
    }
  };
  if (tokens > 0) parallel_for(parallel, (w.rows + kRowsPerTask - 1) / kRowsPerTask, task);
}

void pairwise_max_sum(const float* a, const float* b, int64_t r, int64_t k1, int64_t k2, double* out,
                      const Parallel& parallel) {
  auto task = [&](int64_t g) {
    double* sum = out + g * k2;
    for (int64_t j = 0; j < k2; ++j) sum[j] = 0.0;
    for (int64_t row = 0; row < r; ++row)
      for (int64_t j = 0; j < k2; ++j) {
        const float left = a[row * k1 + g], right = b[row * k2 + j];
        sum[j] += left > right ? left : right;
      }
  };
  parallel_for(parallel, k1, task);
}

float read_all(const float* data, int64_t count, const Parallel&) {
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += data[i];
  return sum;
}

int64_t fma_burst(int64_t steps, const Parallel&) {
  volatile float sum = 0.0f;
  for (int64_t i = 0; i < steps; ++i) sum = sum * 0.999f + 0.001f;
  return steps * 2;
}

}  // namespace

const Kernels kPortable = {"portable", linear<NmWeight>, linear<BitmaskWeight>, pairwise_max_sum,
                           read_all,   fma_burst};

}  // namespace sparsify
