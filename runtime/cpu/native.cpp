// The Python module sparsify_export._native: the kernels on arrays. Signatures: tools/sparsify_export/_native.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <memory>
#include <optional>
#include <string>

#include "formats.h"
#include "kernels.h"
#include "thread_pool.h"

namespace nb = nanobind;
namespace sparsify {
namespace {

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using Int64s = nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu>;
using Values = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

void refuse_if(const std::string& why) {
  if (!why.empty()) throw nb::value_error(why.c_str());
}

template <class Array>
Shape shape_of(const Array& array) {
  Shape shape(array.ndim());
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = int64_t(array.shape(i));
  return shape;
}

DType type_of(const Values& values) {
  if (values.dtype() == nb::dtype<float>()) return DType::f32;
  const nb::dlpack::dtype got = values.dtype();
  if (got.lanes == 1 && got.bits == 16) {
    if (got.code == uint8_t(nb::dlpack::dtype_code::Float)) return DType::f16;
    if (got.code == uint8_t(nb::dlpack::dtype_code::Bfloat)) return DType::bf16;
    if (got.code == uint8_t(nb::dlpack::dtype_code::UInt)) return DType::bf16;  // numpy has no bfloat16
  }
  throw nb::value_error("values must be float32, float16, bfloat16, or uint16 holding bfloat16 bits");
}

const Kernels& kernels() {
  const char* error;
  const Kernels* best = best_kernels(&error);
  if (!best) throw nb::value_error(error);
  return *best;
}

// The array to write: the caller's `out`, or a new one.
template <class T, class Array>
nb::object output(const std::optional<Array>& out, const Shape& shape, T** data) {
  if (out) {
    if (shape_of(*out) != shape) refuse_if("out must have shape " + show(shape) + ", got " + show(shape_of(*out)));
    *data = out->data();
    return nb::cast(*out);
  }
  const size_t sizes[2] = {size_t(shape[0]), size_t(shape[1])};
  auto owned = std::make_unique<T[]>(sizes[0] * sizes[1] + 1);
  *data = owned.get();
  nb::capsule owner(owned.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  owned.release();
  return nb::cast(nb::ndarray<nb::numpy, T>(*data, 2, sizes, owner));
}

Shape check_2d(const Floats& x, int64_t cols) {
  const Shape shape = shape_of(x);
  if (shape.size() != 2) refuse_if("x must be 2-d [tokens, K], got " + show(shape));
  refuse_if(check_x(shape, cols));
  return shape;
}

nb::object linear_nm(Floats x, Values values, Bytes indices, int n, int m, std::optional<Floats> bias,
                     std::optional<Out> out) {
  NmWeight w{0, 0, n, m, type_of(values), values.data(), indices.data(), nullptr, 0};
  const Shape bias_shape = bias ? shape_of(*bias) : Shape{};
  refuse_if(check_nm(w, shape_of(values), shape_of(indices), bias ? &bias_shape : nullptr));
  const int64_t tokens = check_2d(x, w.cols)[0];
  float* y;
  nb::object result = output<float>(out, {tokens, w.rows}, &y);
  const Kernels& run = kernels();
  nb::gil_scoped_release released;
  run.linear_nm(w, x.data(), tokens, bias ? bias->data() : nullptr, y, thread_pool());
  return result;
}

nb::object linear_bitmask(Floats x, Values values, Bytes mask, Int64s row_start, std::optional<Floats> bias,
                          std::optional<Out> out) {
  if (x.ndim() != 2) refuse_if("x must be 2-d [tokens, K], got " + show(shape_of(x)));
  const int64_t tokens = int64_t(x.shape(0));
  BitmaskWeight w{0, int64_t(x.shape(1)), type_of(values), values.data(), mask.data(), row_start.data(), nullptr, 0};
  const Shape bias_shape = bias ? shape_of(*bias) : Shape{};
  refuse_if(check_bitmask(w, shape_of(values), shape_of(mask), shape_of(row_start), bias ? &bias_shape : nullptr));
  float* y;
  nb::object result = output<float>(out, {tokens, w.rows}, &y);
  const Kernels& run = kernels();
  nb::gil_scoped_release released;
  run.linear_bitmask(w, x.data(), tokens, bias ? bias->data() : nullptr, y, thread_pool());
  return result;
}

nb::object pairwise_max_sum(Floats a, Floats b) {
  if (a.ndim() != 2 || b.ndim() != 2 || a.shape(0) != b.shape(0))
    refuse_if("a and b must be 2-d with the same number of rows, got " + show(shape_of(a)) + " and " +
              show(shape_of(b)));
  const int64_t r = int64_t(a.shape(0)), k1 = int64_t(a.shape(1)), k2 = int64_t(b.shape(1));
  double* sum;
  nb::object result = output<double>(std::optional<nb::ndarray<double, nb::c_contig>>{}, {k1, k2}, &sum);
  const Kernels& run = kernels();
  nb::gil_scoped_release released;
  run.pairwise_max_sum(a.data(), b.data(), r, k1, k2, sum, thread_pool());
  return result;
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "Sparse CPU kernels on arrays (numpy, or torch tensors on the CPU).";
  module.def("linear_nm", linear_nm, nb::arg("x"), nb::arg("values"), nb::arg("indices"), nb::arg("n"), nb::arg("m"),
             nb::arg("bias") = nb::none(), nb::kw_only(), nb::arg("out") = nb::none(),
             "Return y [M, N] = x [M, K] @ W.T + bias for an n:m weight W [N, K].\n\n"
             "values: [N, K*n/m] float32, float16 or bfloat16; numpy has no bfloat16: pass its bits as uint16\n"
             "(torch: t.view(torch.uint16)). indices: uint8 [N, ceil(K*n/m*b/8)]. out: written in place.");
  module.def("linear_bitmask", linear_bitmask, nb::arg("x"), nb::arg("values"), nb::arg("mask"), nb::arg("row_start"),
             nb::arg("bias") = nb::none(), nb::kw_only(), nb::arg("out") = nb::none(),
             "Return y [M, N] = x [M, K] @ W.T + bias for an unstructured weight W [N, K].\n\n"
             "values: [nnz] float32, float16 or bfloat16; numpy has no bfloat16: pass its bits as uint16\n"
             "(torch: t.view(torch.uint16)). mask: uint8 [N, ceil(K/8)]. row_start: int64 [N+1].");
  module.def("pairwise_max_sum", pairwise_max_sum, nb::arg("a"), nb::arg("b"),
             "Return S float64 [K1, K2], S[g, j] = sum over r of max(a[r, g], b[r, j]).");
  module.def(
      "read_all",
      [](Floats data) {
        const Kernels& run = kernels();
        nb::gil_scoped_release released;
        return run.read_all(data.data(), int64_t(data.size()), thread_pool());
      },
      nb::arg("data"), "Return the sum of an array, read once: time it for the read bandwidth.");
  module.def(
      "fma_burst",
      [](int64_t steps) {
        const Kernels& run = kernels();
        nb::gil_scoped_release released;
        return run.fma_burst(steps, thread_pool());
      },
      nb::arg("steps"), "Do independent multiply-adds, return how many operations: time it for the peak.");
  module.def("isa", [] { return kernels().isa; }, "Name the instruction set in use: avx512, avx2 or portable.");
  module.def("num_threads", num_threads, "Return how many threads an op uses.");
  module.def(
      "set_num_threads",
      [](int threads) {
        if (threads < 1) refuse_if("threads must be at least 1, got " + std::to_string(threads));
        set_num_threads(threads);
      },
      nb::arg("threads"), "Use this many threads from the next op on. Results do not depend on it.");
}

}  // namespace sparsify
