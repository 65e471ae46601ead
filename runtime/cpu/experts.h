// Many linears of one size, of which each token asks for one. They are stored row below row as one weight, so expert e
// is rows e * n .. (e + 1) * n of it, and every kernel of kernels.h runs it as it is.
#pragma once
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace sparsify { namespace {

inline const void* skip(const void* from, int64_t bytes) {
  return from ? static_cast<const char*>(from) + bytes : nullptr;
}

// Bytes of the scales of `rows` rows.
template <class Weight>
int64_t scale_bytes(const Weight& w, int64_t rows) {
  return w.type == DType::i4 ? rows * ((w.cols + w.group - 1) / w.group) * 2 : rows * 4;
}

// Rows begin .. begin + count as a weight of their own.
inline NmWeight rows_of(const NmWeight& w, int64_t begin, int64_t count, std::vector<int64_t>&) {
  NmWeight part = w;
  part.rows = count;
  part.values = skip(w.values, begin * w.value_bytes_per_row());
  part.indices = w.indices + begin * w.index_bytes_per_row();
  part.scales = skip(w.scales, scale_bytes(w, begin));
  return part;
}

// The same; `starts` holds its row_start, which counts from its own first value: kernels cut their work by it.
inline BitmaskWeight rows_of(const BitmaskWeight& w, int64_t begin, int64_t count, std::vector<int64_t>& starts) {
  const int64_t first = w.row_start[begin];
  starts.resize(size_t(count) + 1);
  for (int64_t row = 0; row <= count; ++row) starts[size_t(row)] = w.row_start[begin + row] - first;
  BitmaskWeight part = w;
  part.rows = count;
  part.values = skip(w.values, w.type == DType::i4 ? first : stored_bytes(w.type, first));
  part.mask = w.mask + begin * w.mask_bytes_per_row();
  part.row_start = starts.data();
  part.scales = skip(w.scales, scale_bytes(w, begin));
  return part;
}

// "" or why the experts cannot be run: they must divide the rows.
inline std::string check_experts(int64_t experts, int64_t rows) {
  if (experts > 0 && rows % experts == 0) return "";
  return "experts must divide the " + std::to_string(rows) + " rows of the weight, got " + std::to_string(experts);
}

// "" or which id is none.
inline std::string check_ids(const int64_t* ids, int64_t tokens, int64_t experts) {
  for (int64_t t = 0; t < tokens; ++t)
    if (ids[t] < 0 || ids[t] >= experts)
      return "ids must be 0 .. " + std::to_string(experts - 1) + ", got " + std::to_string(ids[t]) + " for row " +
             std::to_string(t);
  return "";
}

// y[t] = x[t] W_e^T + bias_e, e = ids[t]. A token of zeros is not multiplied: its y is the bias. Experts run one after
// another, each on all of its tokens and on all threads; which tokens come together does not depend on the threads.
template <class Weight>
void linear_experts(void (*linear)(const Weight&, const float*, int64_t, const float*, float*, const Parallel&),
                    const Weight& w, int64_t experts, const float* x, const int64_t* ids, int64_t tokens,
                    const float* bias, float* y, const Parallel& parallel) {
  const int64_t rows = w.rows / experts;
  std::vector<std::vector<int64_t>> asking(static_cast<size_t>(experts));
  for (int64_t t = 0; t < tokens; ++t) {
    const float* own = x + t * w.cols;
    if (std::any_of(own, own + w.cols, [](float value) { return value != 0.0f; }))
      asking[size_t(ids[t])].push_back(t);
    else
      std::memcpy(y + t * rows, bias + ids[t] * rows, size_t(rows) * sizeof(float));
  }
  size_t most = 0;
  const auto together = [](const std::vector<int64_t>& its) { return its.back() - its[0] + 1 == int64_t(its.size()); };
  for (const auto& its : asking)
    if (!its.empty() && !together(its)) most = std::max(most, its.size());
  const Scratch<float> from = scratch<float>(int64_t(most) * w.cols), to = scratch<float>(int64_t(most) * rows);
  std::vector<int64_t> starts;
  for (int64_t e = 0; e < experts; ++e) {
    const std::vector<int64_t>& its = asking[size_t(e)];
    if (its.empty()) continue;
    const Weight own = rows_of(w, e * rows, rows, starts);
    const int64_t count = int64_t(its.size());
    if (together(its)) {
      linear(own, x + its[0] * w.cols, count, bias + e * rows, y + its[0] * rows, parallel);
      continue;
    }
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(from.get() + i * w.cols, x + its[size_t(i)] * w.cols, size_t(w.cols) * sizeof(float));
    linear(own, from.get(), count, bias + e * rows, to.get(), parallel);
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(y + its[size_t(i)] * rows, to.get() + i * rows, size_t(rows) * sizeof(float));
  }
}

}}  // namespace sparsify::
