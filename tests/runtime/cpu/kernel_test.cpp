// Every kernel on buffers of exactly the right size, for the sanitizers to watch; also without them, results are
// compared. All numbers are small integers, so every order of summation gives the same float and "equal" means equal.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "experts.h"
#include "formats.h"
#include "kernels.h"
#include "pack.h"
#include "thread_pool.h"

using namespace sparsify;

namespace {

std::mt19937 random_bits(0);
int failures = 0;

int below(int limit) { return int(random_bits() % unsigned(limit)); }

// Memory of exactly this size, begun at an odd address where `odd` says so.
struct Bytes {
  explicit Bytes(size_t size, bool odd = false) : memory(new uint8_t[size + odd]), data(memory.get() + odd) {
    std::memset(memory.get(), 0, size + odd);
  }
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* data;
};

struct Floats {
  explicit Floats(int64_t count) : memory(new float[size_t(count)]), size(count) {
    for (int64_t i = 0; i < count; ++i) memory[size_t(i)] = float(below(9) - 4);
  }
  std::unique_ptr<float[]> memory;
  int64_t size;
};

uint16_t half_bits(int value) {
  const float number = float(value);
  uint32_t bits;
  std::memcpy(&bits, &number, 4);
  return value == 0 ? 0 : uint16_t((bits >> 31) << 15 | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023));
}

// Value number `index` behind `values`. Small integers are exact in every type: bf16 is the upper half of float32, fp16
// is found by its exponent; of i8 and i4 this is the code.
void put(uint8_t* values, DType type, int64_t index, int value) {
  if (type == DType::i8) values[index] = uint8_t(value);
  if (type == DType::i4) values[index / 2] |= uint8_t((value + 8) << (index % 2 * 4));
  if (is_quantised(type)) return;
  const float number = float(value);
  uint32_t bits;
  std::memcpy(&bits, &number, 4);
  if (type == DType::f32) {
    std::memcpy(values + 4 * index, &number, 4);
    return;
  }
  const uint16_t half = type == DType::f16 ? half_bits(value) : uint16_t(bits >> 16);
  std::memcpy(values + 2 * index, &half, 2);
}

// Scales 1, 2 or 4 of a quantised weight, and what they are for every column.
struct Scales {
  Scales(DType type, int64_t rows, int64_t cols, int64_t group)
      : shape(type == DType::i8 ? Shape{rows} : Shape{rows, group ? (cols + group - 1) / group : 0}),
        width(type == DType::i8 ? cols : group) {
    const int64_t groups = type == DType::i8 ? 1 : shape[1];
    for (int64_t i = 0; is_quantised(type) && i < rows * groups; ++i) {
      const int scale = 1 << below(3);
      number.push_back(scale);
      whole.push_back(float(scale));
      half.push_back(half_bits(scale));
    }
    per_row = groups;
    if (type == DType::i8) data = whole.data();
    if (type == DType::i4) data = half.data();
    given = is_quantised(type) ? &shape : nullptr;
  }
  int at(int64_t row, int64_t col) const { return given ? number[size_t(row * per_row + col / width)] : 1; }

  Shape shape;
  int64_t width, per_row = 0;
  std::vector<int> number;
  std::vector<float> whole;
  std::vector<uint16_t> half;
  const void* data = nullptr;
  const Shape* given = nullptr;
};

// Integers up to 127, which every token has: its step is 1, and its codes are the integers themselves.
Floats activations(DType type, int64_t tokens, int64_t cols) {
  Floats x(tokens * cols);
  for (int64_t t = 0; is_quantised(type) && cols > 0 && t < tokens; ++t)
    x.memory[size_t(t * cols + below(int(cols)))] = 127.0f;
  return x;
}

int64_t group_of(DType type) { return type == DType::i4 ? int64_t{32} << below(3) : 0; }

#ifdef SPARSIFY_TEST_THREADS
const Parallel kParallel = (set_num_threads(SPARSIFY_TEST_THREADS), thread_pool());
#else
void run_tasks(void*, size_t count, void (*task)(void*, size_t), void* arg) {
  for (size_t i = count; i > 0; --i) task(arg, i - 1);  // backwards: order must not matter
}
const Parallel kParallel = {nullptr, run_tasks};
#endif

void expect(const std::vector<int>& dense, const Floats& x, const Floats& bias, const Floats& y, int64_t tokens,
            int64_t rows, int64_t cols, const char* what) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      float want = bias.memory[size_t(r)];
      for (int64_t k = 0; k < cols; ++k) want += float(dense[size_t(r * cols + k)]) * x.memory[size_t(t * cols + k)];
      const float got = y.memory[size_t(t * rows + r)];
      if (got != want && failures++ < 10)
        std::printf("%s: y[%d, %d] of [%d, %d], K = %d: got %g, want %g\n", what, int(t), int(r), int(tokens),
                    int(rows), int(cols), double(got), double(want));
    }
}

void fail_if(const std::string& why) {
  if (!why.empty() && failures++ < 10) std::printf("refused: %s\n", why.c_str());
}

void test_nm(const Kernels& kernels, int n, int m, DType type, int64_t tokens, int64_t rows, int64_t groups) {
  NmWeight w{rows, groups * m, n, m, type, nullptr, nullptr, nullptr, group_of(type)};
  const int64_t kept = groups * n;
  const Scales scales(type, rows, w.cols, w.group);
  w.scales = scales.data;
  Bytes values(size_t(rows * w.value_bytes_per_row()), true);
  Bytes indices(size_t(rows * w.index_bytes_per_row()), true);
  std::vector<int> dense(size_t(rows * w.cols));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t group = 0; group < groups; ++group)
      for (int i = 0, position = 0; i < n; ++i, ++position) {
        position += below(m - position - (n - 1 - i));  // leave room for the rest
        const int value = below(7) - 3;
        dense[size_t(row * w.cols + group * m + position)] = value * scales.at(row, group * m + position);
        const int64_t at = group * n + i;
        put(values.data + row * w.value_bytes_per_row(), type, at, value);
        const int bits = w.index_bits();
        indices.data[row * w.index_bytes_per_row() + at * bits / 8] |= uint8_t(position << (at * bits % 8));
      }
  w.values = values.data;
  w.indices = indices.data;
  const int64_t row_values = type == DType::i4 ? w.value_bytes_per_row() : kept;
  fail_if(check_nm(w, {rows, row_values}, {rows, w.index_bytes_per_row()}, scales.given, nullptr));
  Floats x = activations(type, tokens, w.cols), bias(rows), y(tokens * rows);
  kernels.linear_nm(w, x.memory.get(), tokens, bias.memory.get(), y.memory.get(), kParallel);
  expect(dense, x, bias, y, tokens, rows, w.cols, "linear_nm");
}

void test_bitmask(const Kernels& kernels, int percent, DType type, int64_t tokens, int64_t rows, int64_t cols) {
  BitmaskWeight w{rows, cols, type, nullptr, nullptr, nullptr, nullptr, group_of(type)};
  const Scales scales(type, rows, cols, w.group);
  w.scales = scales.data;
  Bytes mask(size_t(rows * w.mask_bytes_per_row()), true);
  std::vector<int> dense(size_t(rows * cols));
  std::vector<uint8_t> stored;
  std::vector<int64_t> row_start = {0};
  const int64_t element = type == DType::i4 ? 1 : int64_t(byte_size(type));
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t chunk = 0; chunk < cols; chunk += kNibbleColumns) {
      std::vector<int> kept;
      for (int64_t k = chunk; k < cols && k < chunk + kNibbleColumns; ++k)
        if (below(100) < percent) {
          mask.data[row * w.mask_bytes_per_row() + k / 8] |= uint8_t(1 << (k % 8));
          kept.push_back(below(7) - 3);
          dense[size_t(row * cols + k)] = kept.back() * scales.at(row, k);
        }
      const size_t first = stored.size();
      stored.resize(first + size_t(stored_bytes(type, int64_t(kept.size()))));
      for (size_t i = 0; i < kept.size(); ++i) put(stored.data() + first, type, int64_t(i), kept[i]);
    }
    row_start.push_back(int64_t(stored.size()) / element);
  }
  Bytes values(stored.size(), true);
  if (!stored.empty()) std::memcpy(values.data, stored.data(), stored.size());
  w.values = values.data;
  w.mask = mask.data;
  w.row_start = row_start.data();
  fail_if(check_bitmask(w, {row_start.back()}, {rows, w.mask_bytes_per_row()}, {rows + 1}, scales.given, nullptr));
  Floats x = activations(type, tokens, cols), bias(rows), y(tokens * rows);
  kernels.linear_bitmask(w, x.memory.get(), tokens, bias.memory.get(), y.memory.get(), kParallel);
  expect(dense, x, bias, y, tokens, rows, cols, "linear_bitmask");
}

// Packing and unpacking, on buffers of exactly the right size.
void test_pack(DType type, int64_t rows, int64_t cols, int n, int m) {
  std::vector<float> dense(size_t(rows * cols)), again(dense.size());
  for (size_t i = 0; i < dense.size(); ++i)
    dense[i] = int(i % size_t(cols) % size_t(m)) < n && below(10) ? float(1 << below(3)) : 0.0f;
  NmWeight w{rows, cols, n, m, type, nullptr, nullptr, nullptr, group_of(type)};
  Scales scales(type, rows, cols, w.group);
  for (int64_t row = 0; is_quantised(type) && row < rows; ++row)
    for (int64_t k = 0; k < cols; ++k) dense[size_t(row * cols + k)] *= float(scales.at(row, k));
  w.scales = scales.data;
  Bytes values(size_t(rows * w.value_bytes_per_row()), true), indices(size_t(rows * w.index_bytes_per_row()), true);
  fail_if(pack_nm(dense.data(), w, values.data, indices.data, kParallel));
  w.values = values.data;
  w.indices = indices.data;
  const int64_t row_values = type == DType::i4 ? w.value_bytes_per_row() : w.kept_per_row();
  fail_if(check_nm(w, {rows, row_values}, {rows, w.index_bytes_per_row()}, scales.given, nullptr));
  unpack_nm(w, again.data(), kParallel);
  if (again != dense && failures++ < 10) std::printf("pack_nm %d:%d loses weights\n", n, m);

  BitmaskWeight b{rows, cols, type, nullptr, nullptr, nullptr, scales.data, w.group};
  Bytes mask(size_t(rows * b.mask_bytes_per_row()), true);
  std::vector<int64_t> row_start(size_t(rows + 1));
  find_mask(dense.data(), rows, cols, type, mask.data, row_start.data(), kParallel);
  b.mask = mask.data;
  b.row_start = row_start.data();
  Bytes stored(size_t(row_start.back()) * (type == DType::i4 ? 1 : byte_size(type)), true);
  fail_if(pack_bitmask(dense.data(), b, stored.data, kParallel));
  b.values = stored.data;
  fail_if(check_bitmask(b, {row_start.back()}, {rows, b.mask_bytes_per_row()}, {rows + 1}, scales.given, nullptr));
  std::fill(again.begin(), again.end(), -1.0f);
  unpack_bitmask(b, again.data(), kParallel);
  if (again != dense && failures++ < 10) std::printf("pack_bitmask loses weights\n");
}

// Experts by their kernel, each expert's rows checked against its own dense weight; every third token is zeros.
template <class Weight>
void expect_experts(void (*linear)(const Weight&, const float*, int64_t, const float*, float*, const Parallel&),
                    const Weight& w, const std::vector<int>& dense, int64_t experts, int64_t tokens, const char* what) {
  const int64_t rows = w.rows / experts;
  fail_if(check_experts(experts, w.rows));
  Floats x = activations(w.type, tokens, w.cols), bias(w.rows), y(tokens * rows);
  std::vector<int64_t> ids(static_cast<size_t>(tokens));
  for (int64_t t = 0; t < tokens; ++t) {
    // Some in a row, some not; the last expert is asked by nobody where there are more.
    ids[size_t(t)] = tokens > 8 && t < 4 ? 0 : below(int(std::max(experts - 1, int64_t{1})));
    if (t % 3 == 2) std::fill_n(x.memory.get() + t * w.cols, w.cols, 0.0f);
  }
  fail_if(check_ids(ids.data(), tokens, experts));
  linear_experts(linear, w, experts, x.memory.get(), ids.data(), tokens, bias.memory.get(), y.memory.get(), kParallel);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t row = ids[size_t(t)] * rows + r;
      float want = bias.memory[size_t(row)];
      for (int64_t k = 0; k < w.cols; ++k)
        want += float(dense[size_t(row * w.cols + k)]) * x.memory[size_t(t * w.cols + k)];
      const float got = y.memory[size_t(t * rows + r)];
      if (got != want && failures++ < 10)
        std::printf("experts of %s: y[%d, %d] of expert %d: got %g, want %g\n", what, int(t), int(r),
                    int(ids[size_t(t)]), double(got), double(want));
    }
}

void test_experts(const Kernels& kernels, DType type, int64_t experts, int64_t rows, int64_t cols, int64_t tokens) {
  const int64_t all = experts * rows;
  Scales scales(type, all, cols, group_of(type));
  std::vector<float> weight(size_t(all * cols));
  std::vector<int> dense(weight.size());
  for (int64_t row = 0; row < all; ++row)
    for (int64_t k = 0; k < cols; ++k)
      if (k % 4 < 2) {
        dense[size_t(row * cols + k)] = (below(7) - 3) * scales.at(row, k);
        weight[size_t(row * cols + k)] = float(dense[size_t(row * cols + k)]);
      }
  NmWeight w{all, cols, 2, 4, type, nullptr, nullptr, scales.data, type == DType::i4 ? scales.width : 0};
  Bytes values(size_t(all * w.value_bytes_per_row()), true), indices(size_t(all * w.index_bytes_per_row()), true);
  fail_if(pack_nm(weight.data(), w, values.data, indices.data, kParallel));
  w.values = values.data;
  w.indices = indices.data;
  expect_experts(kernels.linear_nm, w, dense, experts, tokens, "linear_nm");

  BitmaskWeight b{all, cols, type, nullptr, nullptr, nullptr, scales.data, w.group};
  Bytes mask(size_t(all * b.mask_bytes_per_row()), true);
  std::vector<int64_t> row_start(size_t(all + 1));
  find_mask(weight.data(), all, cols, type, mask.data, row_start.data(), kParallel);
  b.mask = mask.data;
  b.row_start = row_start.data();
  Bytes stored(size_t(row_start.back()) * (type == DType::i4 ? 1 : byte_size(type)), true);
  fail_if(pack_bitmask(weight.data(), b, stored.data, kParallel));
  b.values = stored.data;
  expect_experts(kernels.linear_bitmask, b, dense, experts, tokens, "linear_bitmask");
}

void test_pairwise_max_sum(const Kernels& kernels, int64_t r, int64_t k1, int64_t k2) {
  Floats a(r * k1), b(r * k2);
  std::vector<double> out(size_t(k1 * k2), -1.0);
  kernels.pairwise_max_sum(a.memory.get(), b.memory.get(), r, k1, k2, out.data(), kParallel);
  for (int64_t g = 0; g < k1; ++g)
    for (int64_t j = 0; j < k2; ++j) {
      double want = 0.0;
      for (int64_t i = 0; i < r; ++i)
        want += double(std::max(a.memory[size_t(i * k1 + g)], b.memory[size_t(i * k2 + j)]));
      if (out[size_t(g * k2 + j)] != want && failures++ < 10)
        std::printf("pairwise_max_sum: S[%d, %d], R = %d: got %g, want %g\n", int(g), int(j), int(r),
                    out[size_t(g * k2 + j)], want);
    }
}

}  // namespace

int main() {
  const char* error = nullptr;
  const Kernels* kernels = best_kernels(&error);
  if (!kernels) {
    std::printf("skipped: %s\n", error);
    return 77;
  }
  const int patterns[][2] = {{1, 2}, {2, 4}, {1, 4}, {3, 4}, {2, 3}, {4, 8}, {5, 7}, {8, 16}, {2, 17}, {16, 32}, {3, 32}};
  const int64_t all_tokens[] = {0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 127, 129};
  const DType types[] = {DType::f32, DType::f16, DType::bf16, DType::i8, DType::i4};
  for (const DType type : types)
    for (const int64_t rows : {0, 1, 5})
      for (const auto& [n, m] : patterns)
        for (const int64_t groups : {1, 7, 33}) test_pack(type, rows, groups * m, n, m);
  for (const DType type : types)
    for (const int64_t tokens : all_tokens) {
      for (const auto& [n, m] : patterns)
        for (const int64_t rows : {0, 1, 3, 18})
          for (const int64_t groups : {1, 7, 33}) test_nm(*kernels, n, m, type, tokens, rows, groups);
      for (const int percent : {0, 10, 50, 100})
        for (const int64_t rows : {0, 1, 5, 18})
          for (const int64_t cols : {0, 1, 31, 32, 33, 64, 65, 100})
            test_bitmask(*kernels, percent, type, tokens, rows, cols);
    }
  for (const DType type : types)
    for (const int64_t experts : {1, 2, 5})
      for (const int64_t rows : {1, 18})
        for (const int64_t cols : {4, 132})
          for (const int64_t tokens : {0, 1, 2, 7, 40}) test_experts(*kernels, type, experts, rows, cols, tokens);
  for (const DType type : {DType::f32, DType::i8, DType::i4}) {  // more than one panel, group and chunk
    test_nm(*kernels, 2, 4, type, 1100, 70, 150);
    test_bitmask(*kernels, 50, type, 1100, 70, 601);
  }
  for (const DType type : {DType::bf16, DType::i8, DType::i4}) {  // more than one block of columns and strip of rows
    test_nm(*kernels, 2, 4, type, 40, 70, 2100);
    test_nm(*kernels, 1, 4, type, 18, 35, 1050);
    test_bitmask(*kernels, 50, type, 40, 70, 4401);
    test_bitmask(*kernels, 30, type, 17, 1100, 99);
  }
  for (const int64_t r : {0, 1, 128, 129})
    for (const int64_t k : {1, 6, 7, 50}) test_pairwise_max_sum(*kernels, r, k, 3 * k + 1);
  const bool modelled = std::strcmp(kernels->isa, "amx-model") == 0;
  std::printf("%s: %d failures%s\n", kernels->isa, failures, modelled ? "; tiles by the model, not by the processor" : "");
  return failures != 0;
}
