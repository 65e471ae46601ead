// Every op as plain loops: the version to read, the oracle of the fast ones, and what runs on other processors.
#include <vector>

#include "kept_row.h"
#include "kernels.h"
#include "quantise.h"

namespace sparsify {
namespace {

// Rows that one task computes. Fixed, so that the split does not depend on the number of threads.
constexpr int64_t kRowsPerTask = 16;

template <class Weight>
void linear_float(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y,
                  const Parallel& parallel) {
  auto task = [&](int64_t index) {
    const int64_t first = index * kRowsPerTask;
    const int64_t last = first + kRowsPerTask < w.rows ? first + kRowsPerTask : w.rows;
    KeptRow kept;
    for (int64_t row = first; row < last; ++row) {
      kept.clear();
      unpack_row(w, row, kept);
      for (int64_t token = 0; token < tokens; ++token) {
        float sum = bias ? bias[row] : 0.0f;
        for (size_t i = 0; i < kept.weight.size(); ++i) sum += kept.weight[i] * x[token * w.cols + kept.column[i]];
        y[token * w.rows + row] = sum;
      }
    }
  };
  parallel_for(parallel, (w.rows + kRowsPerTask - 1) / kRowsPerTask, task);
}

// Sums of integers are exact in float64, so the result is rounded once for every scale group and once at the end.
template <class Weight>
void linear_quantised(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y,
                      const Parallel& parallel) {
  std::vector<int8_t> codes(size_t(tokens * w.cols));
  std::vector<float> step(static_cast<size_t>(tokens));
  for (int64_t t = 0; t < tokens; ++t)
    step[size_t(t)] = quantise_token(x + t * w.cols, w.cols, codes.data() + t * w.cols);
  auto task = [&](int64_t index) {
    const int64_t first = index * kRowsPerTask;
    const int64_t last = first + kRowsPerTask < w.rows ? first + kRowsPerTask : w.rows;
    KeptRow kept;
    for (int64_t row = first; row < last; ++row) {
      kept.clear();
      unpack_row(w, row, kept);
      const RowScales scales = row_scales(w, row);
      for (int64_t t = 0; t < tokens; ++t) {
        double total = 0.0;
        for (size_t i = 0; i < kept.weight.size();) {
          const int64_t group = scales.group(kept.column[i]);
          double sum = 0.0;
          for (; i < kept.weight.size() && scales.group(kept.column[i]) == group; ++i)
            sum += double(kept.weight[i]) * codes[size_t(t * w.cols + kept.column[i])];
          total += double(scales.values[size_t(group)]) * sum;
        }
        y[t * w.rows + row] = float(double(step[size_t(t)]) * total + (bias ? double(bias[row]) : 0.0));
      }
    }
  };
  parallel_for(parallel, (w.rows + kRowsPerTask - 1) / kRowsPerTask, task);
}

template <class Weight>
void linear(const Weight& w, const float* x, int64_t tokens, const float* bias, float* y, const Parallel& parallel) {
  if (tokens == 0) return;
  if (is_quantised(w.type)) return linear_quantised(w, x, tokens, bias, y, parallel);
  linear_float(w, x, tokens, bias, y, parallel);
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
                           read_all,   fma_burst,              nullptr};

}  // namespace sparsify
