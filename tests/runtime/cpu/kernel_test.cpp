// Every kernel on buffers of exactly the right size, for the sanitizers to watch; also without them, results are
// compared. All numbers are small integers, so every order of summation gives the same float and "equal" means equal.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "formats.h"
#include "kernels.h"

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

// Small integers are exact in every type: bf16 is the upper half of float32, fp16 is found by its exponent.
void put(uint8_t* values, DType type, int64_t index, int value) {
  const float number = float(value);
  uint32_t bits;
  std::memcpy(&bits, &number, 4);
  if (type == DType::f32) {
    std::memcpy(values + 4 * index, &number, 4);
    return;
  }
  uint16_t half = uint16_t(bits >> 16);
  if (type == DType::f16)
    half = value == 0 ? 0 : uint16_t((bits >> 31) << 15 | ((bits >> 23 & 255) - 112) << 10 | (bits >> 13 & 1023));
  std::memcpy(values + 2 * index, &half, 2);
}

void run_tasks(void*, size_t count, void (*task)(void*, size_t), void* arg) {
  for (size_t i = count; i > 0; --i) task(arg, i - 1);  // backwards: order must not matter
}
const Parallel kParallel = {nullptr, run_tasks};

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
  NmWeight w{rows, groups * m, n, m, type, nullptr, nullptr, nullptr, 0};
  const int64_t kept = groups * n;
  Bytes values(size_t(rows * kept) * byte_size(type), true);
  Bytes indices(size_t(rows * w.index_bytes_per_row()), true);
  std::vector<int> dense(size_t(rows * w.cols));
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t group = 0; group < groups; ++group)
      for (int i = 0, position = 0; i < n; ++i, ++position) {
        position += below(m - position - (n - 1 - i));  // leave room for the rest
        const int value = below(7) - 3;
        dense[size_t(row * w.cols + group * m + position)] = value;
        const int64_t at = group * n + i;
        put(values.data, type, row * kept + at, value);
        const int bits = w.index_bits();
        indices.data[row * w.index_bytes_per_row() + at * bits / 8] |= uint8_t(position << (at * bits % 8));
      }
  w.values = values.data;
  w.indices = indices.data;
  fail_if(check_nm(w, {rows, kept}, {rows, w.index_bytes_per_row()}, nullptr));
  Floats x(tokens * w.cols), bias(rows), y(tokens * rows);
  kernels.linear_nm(w, x.memory.get(), tokens, bias.memory.get(), y.memory.get(), kParallel);
  expect(dense, x, bias, y, tokens, rows, w.cols, "linear_nm");
}

void test_bitmask(const Kernels& kernels, int percent, DType type, int64_t tokens, int64_t rows, int64_t cols) {
  BitmaskWeight w{rows, cols, type, nullptr, nullptr, nullptr, nullptr, 0};
  Bytes mask(size_t(rows * w.mask_bytes_per_row()), true);
  std::vector<int> dense(size_t(rows * cols));
  std::vector<int> kept;
  std::vector<int64_t> row_start = {0};
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t k = 0; k < cols; ++k)
      if (below(100) < percent) {
        mask.data[row * w.mask_bytes_per_row() + k / 8] |= uint8_t(1 << (k % 8));
        kept.push_back(dense[size_t(row * cols + k)] = below(7) - 3);
      }
    row_start.push_back(int64_t(kept.size()));
  }
  Bytes values(kept.size() * byte_size(type), true);
  for (size_t i = 0; i < kept.size(); ++i) put(values.data, type, int64_t(i), kept[i]);
  w.values = values.data;
  w.mask = mask.data;
  w.row_start = row_start.data();
  fail_if(check_bitmask(w, {int64_t(kept.size())}, {rows, w.mask_bytes_per_row()}, {rows + 1}, nullptr));
  Floats x(tokens * cols), bias(rows), y(tokens * rows);
  kernels.linear_bitmask(w, x.memory.get(), tokens, bias.memory.get(), y.memory.get(), kParallel);
  expect(dense, x, bias, y, tokens, rows, cols, "linear_bitmask");
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
  for (const DType type : {DType::f32, DType::f16, DType::bf16})
    for (const int64_t tokens : all_tokens) {
      for (const auto& [n, m] : patterns)
        for (const int64_t rows : {0, 1, 3, 18})
          for (const int64_t groups : {1, 7, 33}) test_nm(*kernels, n, m, type, tokens, rows, groups);
      for (const int percent : {0, 10, 50, 100})
        for (const int64_t rows : {0, 1, 5, 18})
          for (const int64_t cols : {0, 1, 31, 32, 33, 100}) test_bitmask(*kernels, percent, type, tokens, rows, cols);
    }
  test_nm(*kernels, 2, 4, DType::f32, 1100, 70, 150);  // more than one panel, group and chunk
  test_bitmask(*kernels, 50, DType::f32, 1100, 70, 601);
  for (const int64_t r : {0, 1, 128, 129})
    for (const int64_t k : {1, 6, 7, 50}) test_pairwise_max_sum(*kernels, r, k, 3 * k + 1);
  std::printf("%s: %d failures\n", kernels->isa, failures);
  return failures != 0;
}
