// Every GPU kernel, run by cuda/emulate on buffers of exactly the right size, for the sanitizers to watch. All numbers
// are small integers, so every order of summation gives the same float and "equal" means equal.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "number.cuh"

using namespace sparsify_cuda;

namespace {

std::mt19937 random_bits(0);
int failures = 0;

int below(int limit) { return int(random_bits() % unsigned(limit)); }

// An array on the heap of exactly `count` elements, or one that begins `skip` elements behind where the heap begins.
template <class T>
struct Array {
  explicit Array(int64_t count, int skip = 0) : memory(new T[size_t(count + skip)]()), data(memory.get() + skip) {}
  T& operator[](int64_t i) { return data[i]; }
  std::unique_ptr<T[]> memory;
  T* data;
};

struct Shape {
  int64_t M, N, K;
  int skip;
};

template <class T>
DType type_of();
template <>
DType type_of<float>() { return DType::f32; }
template <>
DType type_of<__half>() { return DType::f16; }
template <>
DType type_of<__nv_bfloat16>() { return DType::bf16; }

void expect(bool equal, const char* what, const Shape& s) {
  if (!equal && failures++ < 10)
    std::printf("%s: wrong for M = %d, N = %d, K = %d, skip %d\n", what, int(s.M), int(s.N), int(s.K), s.skip);
}

void expect_success(cudaError_t status, const char* what, const Shape& s) { expect(status == cudaSuccess, what, s); }

// What both linears share: activations, bias, and the dense product.
template <class X>
struct Problem {
  explicit Problem(const Shape& s) : shape(s), x(s.M * s.K, s.skip), bias(s.N), dense(size_t(s.N * s.K)) {
    for (int64_t i = 0; i < s.M * s.K; ++i) x[i] = from_float<X>(float(below(9) - 4));
    for (int64_t i = 0; i < s.N; ++i) bias[i] = float(below(9) - 4);
  }

  void check(Array<X>& y, const char* what) {
    bool equal = true;
    for (int64_t m = 0; m < shape.M; ++m)
      for (int64_t n = 0; n < shape.N; ++n) {
        float want = bias[n];
        for (int64_t k = 0; k < shape.K; ++k)
          want += float(dense[size_t(n * shape.K + k)]) * to_float(x[m * shape.K + k]);
        equal &= to_float(y[m * shape.N + n]) == to_float(from_float<X>(want));
      }
    expect(equal, what, shape);
  }

  Shape shape;
  Array<X> x;
  Array<float> bias;
  std::vector<int> dense;  // [N, K]
};

// Two different places of a group, ascending.
void two_places(int& first, int& second) {
  first = below(3);
  second = first + 1 + below(3 - first);
}

template <class X, class W>
void test_24(const Shape& s) {
  Problem<X> problem(s);
  Array<W> values(s.N * s.K / 2, s.skip);
  Array<uint8_t> indices(s.N * ((s.K + 7) / 8), s.skip);
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t g = 0; g < s.K / 4; ++g) {
      int place[2];
      two_places(place[0], place[1]);
      for (int i = 0; i < 2; ++i) {
        const int weight = below(5) - 2;
        problem.dense[size_t(n * s.K + 4 * g + place[i])] = weight;
        values[n * (s.K / 2) + 2 * g + i] = from_float<W>(float(weight));
        indices[n * ((s.K + 7) / 8) + g / 2] |= uint8_t(place[i] << (g % 2 * 4 + 2 * i));
      }
    }
  const auto run = [&](decltype(sparsify_spmm_24)& launch, const char* what) {
    Array<X> y(s.M * s.N);
    expect_success(launch(type_of<X>(), type_of<W>(), problem.x.data, values.data, indices.data, problem.bias.data,
                          y.data, s.M, s.N, s.K, nullptr), what, s);
    problem.check(y, what);
  };
  run(sparsify_spmm_24_readable, "spmm_24_readable");
  run(sparsify_spmm_24_decode, "spmm_24_decode");
  if (has_tensor_cores(type_of<X>(), type_of<W>())) {
    run(sparsify_spmm_24_few, "spmm_24_few");
    run(sparsify_spmm_24_prefill, "spmm_24_prefill");
  }
  run(sparsify_spmm_24, "spmm_24");
}

template <class X, class W>
void test_bitmask(const Shape& s) {
  Problem<X> problem(s);
  std::vector<int> kept;
  Array<uint8_t> mask(s.N * ((s.K + 7) / 8), s.skip);
  Array<int64_t> row_start(s.N + 1);
  for (int64_t n = 0; n < s.N; ++n) {
    for (int64_t k = 0; k < s.K; ++k) {
      if (below(2)) continue;
      kept.push_back(problem.dense[size_t(n * s.K + k)] = below(5) - 2);
      mask[n * ((s.K + 7) / 8) + k / 8] |= uint8_t(1 << k % 8);
    }
    row_start[n + 1] = int64_t(kept.size());
  }
  Array<W> values(int64_t(kept.size()), s.skip);
  for (size_t i = 0; i < kept.size(); ++i) values[int64_t(i)] = from_float<W>(float(kept[i]));
  const auto run = [&](decltype(sparsify_spmm_bitmask)& launch, const char* what) {
    Array<X> y(s.M * s.N);
    expect_success(launch(type_of<X>(), type_of<W>(), problem.x.data, values.data, mask.data, row_start.data,
                          problem.bias.data, y.data, s.M, s.N, s.K, nullptr), what, s);
    problem.check(y, what);
  };
  run(sparsify_spmm_bitmask_readable, "spmm_bitmask_readable");
  run(sparsify_spmm_bitmask_decode, "spmm_bitmask_decode");
  if (has_tensor_cores(type_of<X>(), type_of<W>())) run(sparsify_spmm_bitmask_prefill, "spmm_bitmask_prefill");
  run(sparsify_spmm_bitmask, "spmm_bitmask");
}

// Every token holds 127, so its step is 1 and its codes are the integers themselves.
void test_int4(const Shape& s, int group) {
  Problem<float> problem(s);
  for (int64_t m = 0; m < s.M && s.K > 0; ++m) problem.x[m * s.K + below(int(s.K))] = 127.0f;
  const int64_t groups = (s.K + group - 1) / group;
  Array<uint8_t> values(s.N * s.K / 4, s.skip), indices(s.N * ((s.K + 7) / 8), s.skip);
  Array<__half> scales(s.N * groups);
  for (int64_t i = 0; i < s.N * groups; ++i) scales[i] = from_float<__half>(float(1 << below(3)));
  for (int64_t n = 0; n < s.N; ++n)
    for (int64_t g = 0; g < s.K / 4; ++g) {
      int place[2];
      two_places(place[0], place[1]);
      for (int i = 0; i < 2; ++i) {
        const int code = below(15) - 7;
        const int scale = int(to_float(scales[n * groups + 4 * g / group]));
        problem.dense[size_t(n * s.K + 4 * g + place[i])] = code * scale;
        values[n * (s.K / 4) + g] |= uint8_t((code + 8) << 4 * i);
        indices[n * ((s.K + 7) / 8) + g / 2] |= uint8_t(place[i] << (g % 2 * 4 + 2 * i));
      }
    }
  Array<int8_t> codes(s.M * code_pitch(s.K));
  Array<float> steps(s.M);
  expect_success(sparsify_quantise_tokens(DType::f32, problem.x.data, codes.data, steps.data, s.M, s.K, nullptr),
                 "quantise_tokens", s);
  const auto run = [&](decltype(sparsify_spmm_24_int4)& launch, const char* what) {
    Array<float> y(s.M * s.N);
    expect_success(launch(DType::f32, codes.data, steps.data, values.data, indices.data, scales.data, problem.bias.data,
                          y.data, s.M, s.N, s.K, group, nullptr), what, s);
    problem.check(y, what);
  };
  run(sparsify_spmm_24_int4_readable, "spmm_24_int4_readable");
  run(sparsify_spmm_24_int4, "spmm_24_int4");
}

void test_gather(const Shape& s) {
  Array<float> x(s.M * s.K), y(s.M * s.N);
  Array<int64_t> index(s.N);
  for (int64_t i = 0; i < s.M * s.K; ++i) x[i] = float(i);
  for (int64_t j = 0; j < s.N; ++j) index[j] = below(int(s.K));
  expect_success(sparsify_gather_channels(4, x.data, index.data, y.data, s.M, s.K, s.N, nullptr), "gather", s);
  bool equal = true;
  for (int64_t i = 0; i < s.M * s.N; ++i) equal &= y[i] == x[i / s.N * s.K + index[i % s.N]];
  expect(equal, "gather", s);
}

// M rows, K columns, N candidates.
template <class Rank>
void test_rate_mask(const Shape& s, bool together) {
  const int64_t R = s.M, C = s.K, D = s.N + 1, beta_rows = together ? 1 : R;
  Array<float> weight(R * C), grad(R * C), out(R * C), for_weight(R * C), for_beta(beta_rows * D), workspace(R * D);
  Array<Rank> rank(R * C);
  Array<int32_t> counts(R);
  for (int64_t i = 0; i < R; ++i) {
    counts[i] = below(int(C) + 1);
    for (int64_t j = 0; j < C; ++j) rank[i * C + j] = Rank(j);
    for (int64_t j = C - 1; j > 0; --j) std::swap(rank[i * C + j], rank[i * C + below(int(j) + 1)]);
    for (int64_t j = 0; j < C; ++j) weight[i * C + j] = float(below(5) - 2), grad[i * C + j] = float(below(5) - 2);
  }
  expect_success(sparsify_rate_mask_forward(DType::f32, weight.data, sizeof(Rank), rank.data, counts.data, R, out.data,
                                            R, C, nullptr), "rate_mask_forward", s);
  expect_success(sparsify_rate_mask_backward(DType::f32, weight.data, sizeof(Rank), rank.data, counts.data, R,
                                             grad.data, for_weight.data, for_beta.data, beta_rows, D,
                                             together ? workspace.data : nullptr, R, C, nullptr),
                 "rate_mask_backward", s);
  std::vector<float> want(size_t(beta_rows * D));
  bool equal = true;
  for (int64_t i = 0; i < R; ++i)
    for (int64_t j = 0; j < C; ++j) {
      const int64_t at = i * C + j;
      const bool keep = rank[at] >= counts[i];
      equal &= out[at] == (keep ? weight[at] : 0) && for_weight[at] == (keep ? grad[at] : 0);
      for (int64_t d = 0; d < D; ++d)
        if (rank[at] < d * C / (D - 1)) want[size_t((together ? 0 : i) * D + d)] -= weight[at] * grad[at];
    }
  for (size_t i = 0; i < want.size(); ++i) equal &= for_beta[int64_t(i)] == want[i];
  expect(equal, "rate_mask", s);
}

}  // namespace

int main() {
  for (const Shape& s : {Shape{1, 1, 4, 0}, Shape{3, 5, 36, 0}, Shape{9, 130, 100, 0}, Shape{66, 3, 64, 0},
                         Shape{17, 33, 192, 0}, Shape{2, 7, 512, 0}, Shape{5, 9, 96, 1}, Shape{2, 3, 0, 0}}) {
    test_24<__half, __half>(s);
    test_24<__nv_bfloat16, __nv_bfloat16>(s);
    test_24<float, float>(s);
    test_24<float, __half>(s);
    test_24<float, __nv_bfloat16>(s);
    test_int4(s, 32);
    test_int4(s, 128);
  }
  for (const Shape& s : {Shape{1, 1, 1, 0}, Shape{3, 5, 37, 0}, Shape{9, 66, 97, 0}, Shape{66, 3, 64, 0},
                         Shape{17, 33, 192, 0}, Shape{2, 7, 257, 0}, Shape{5, 9, 96, 1}, Shape{2, 3, 0, 0}}) {
    test_bitmask<__half, __half>(s);
    test_bitmask<__nv_bfloat16, __nv_bfloat16>(s);
    test_bitmask<float, float>(s);
    test_bitmask<float, __half>(s);
    test_bitmask<float, __nv_bfloat16>(s);
  }
  for (const Shape& s : {Shape{1, 1, 1, 0}, Shape{3, 255, 17, 0}, Shape{2, 257, 300, 0}}) test_gather(s);
  for (const Shape& s : {Shape{1, 1, 1, 0}, Shape{3, 100, 40, 0}, Shape{2, 257, 300, 0}, Shape{1, 10, 8193, 0}}) {
    test_rate_mask<int16_t>(s, false);
    test_rate_mask<int32_t>(s, true);
  }
  if (failures) std::printf("%d failures\n", failures);
  return failures != 0;
}
