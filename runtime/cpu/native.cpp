// The Python module sparsify_export._native: the kernels on arrays. Signatures: tools/sparsify_export/_native.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <new>
#include <optional>
#include <string>

#include "formats.h"
#include "kernels.h"
#include "pack.h"
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
  if (values.dtype() == nb::dtype<int8_t>()) return DType::i8;
  if (values.dtype() == nb::dtype<uint8_t>()) return DType::i4;
  const nb::dlpack::dtype got = values.dtype();
  if (got.lanes == 1 && got.bits == 16) {
    if (got.code == uint8_t(nb::dlpack::dtype_code::Float)) return DType::f16;
    if (got.code == uint8_t(nb::dlpack::dtype_code::Bfloat)) return DType::bf16;
    if (got.code == uint8_t(nb::dlpack::dtype_code::UInt)) return DType::bf16;  // numpy has no bfloat16
  }
  throw nb::value_error(
      "values must be float32, float16, bfloat16, uint16 holding bfloat16 bits, int8, or uint8 holding two int4");
}

DType type_named(const std::string& name) {
  const char* names[] = {"fp32", "fp16", "bf16", "int8", "int4"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return DType(i);
  throw nb::value_error(("dtype must be fp32, fp16, bf16, int8 or int4, got " + name).c_str());
}

struct Scales {
  const void* data = nullptr;
  Shape dims;
  const Shape* shape = nullptr;  // of `dims`; null where there are none

  Scales(DType type, const std::optional<Values>& given) {
    if (!given) return;
    const nb::dlpack::dtype wanted = type == DType::i4 ? nb::dlpack::dtype{2, 16, 1} : nb::dtype<float>();
    if (given->dtype() != wanted)
      refuse_if(type == DType::i4 ? "scales of int4 values must be float16" : "scales must be float32");
    data = given->data();
    dims = shape_of(*given);
    shape = &dims;
  }
  Scales(const Scales&) = delete;
};

const Kernels& kernels() {
  const char* error;
  const Kernels* best = best_kernels(&error);
  if (!best) throw nb::value_error(error);
  return *best;
}

// Arrays at odd addresses are legal in numpy and not in C++.
template <class Array>
void check_aligned(const Array& array, const char* name) {
  const size_t size = size_t(array.dtype().bits) / 8;
  if (array.size() && reinterpret_cast<uintptr_t>(array.data()) % size)
    refuse_if(std::string(name) + " must begin at a multiple of " + std::to_string(size) + " bytes in memory");
}

size_t count_of(const Shape& shape) {
  size_t count = 1;
  for (const int64_t size : shape)
    if (__builtin_mul_overflow(count, size_t(size), &count)) throw std::bad_alloc();
  return count;
}

// The array to write: the caller's `out`, or a new one.
template <class T, class Array>
nb::object output(const std::optional<Array>& out, const Shape& shape, T** data) {
  if (out) {
    if (shape_of(*out) != shape) refuse_if("out must have shape " + show(shape) + ", got " + show(shape_of(*out)));
    check_aligned(*out, "out");
    *data = out->data();
    return nb::cast(*out);
  }
  const size_t sizes[2] = {size_t(shape[0]), size_t(shape[1])};
  auto owned = std::make_unique<T[]>(count_of(shape) + 1);
  *data = owned.get();
  nb::capsule owner(owned.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  owned.release();
  return nb::cast(nb::ndarray<nb::numpy, T>(*data, 2, sizes, owner));
}

NmWeight nm_weight(const Values& values, const Bytes& indices, int n, int m, const Scales& scales, int64_t group,
                   int64_t cols, const Shape* bias) {
  NmWeight w{0, cols, n, m, type_of(values), values.data(), indices.data(), scales.data, group};
  refuse_if(check_nm(w, shape_of(values), shape_of(indices), scales.shape, bias));
  return w;
}

BitmaskWeight bitmask_weight(const Values& values, const Bytes& mask, const Int64s& row_start, const Scales& scales,
                             int64_t group, int64_t cols, const Shape* bias) {
  BitmaskWeight w{0, cols, type_of(values), values.data(), mask.data(), row_start.data(), scales.data, group};
  refuse_if(check_bitmask(w, shape_of(values), shape_of(mask), shape_of(row_start), scales.shape, bias));
  return w;
}

void check_x_and_bias(const Floats& x, const std::optional<Floats>& bias) {
  if (x.ndim() != 2) refuse_if("x must be 2-d [tokens, K], got " + show(shape_of(x)));
  check_aligned(x, "x");
  if (bias) check_aligned(*bias, "bias");
}

nb::object linear_nm(Floats x, Values values, Bytes indices, int n, int m, std::optional<Floats> bias,
                     std::optional<Values> scales, int64_t group, std::optional<Out> out) {
  check_x_and_bias(x, bias);
  const Shape bias_shape = bias ? shape_of(*bias) : Shape{};
  const Scales given(type_of(values), scales);
  const NmWeight w =
      nm_weight(values, indices, n, m, given, group, int64_t(x.shape(1)), bias ? &bias_shape : nullptr);
  refuse_if(check_x(shape_of(x), w.cols));
  const int64_t tokens = int64_t(x.shape(0));
  float* y;
  nb::object result = output<float>(out, {tokens, w.rows}, &y);
  const Kernels& run = kernels();
  nb::gil_scoped_release released;
  run.linear_nm(w, x.data(), tokens, bias ? bias->data() : nullptr, y, thread_pool());
  return result;
}

nb::object linear_bitmask(Floats x, Values values, Bytes mask, Int64s row_start, std::optional<Floats> bias,
                          std::optional<Values> scales, int64_t group, std::optional<Out> out) {
  check_x_and_bias(x, bias);
  const Shape bias_shape = bias ? shape_of(*bias) : Shape{};
  const Scales given(type_of(values), scales);
  const BitmaskWeight w =
      bitmask_weight(values, mask, row_start, given, group, int64_t(x.shape(1)), bias ? &bias_shape : nullptr);
  const int64_t tokens = int64_t(x.shape(0));
  float* y;
  nb::object result = output<float>(out, {tokens, w.rows}, &y);
  const Kernels& run = kernels();
  nb::gil_scoped_release released;
  run.linear_bitmask(w, x.data(), tokens, bias ? bias->data() : nullptr, y, thread_pool());
  return result;
}

// The result of work() done while other Python threads may run.
template <class Work>
auto released(Work&& work) {
  nb::gil_scoped_release release;
  return work();
}

// A new numpy array that is not filled yet.
template <class T>
nb::object new_array(const Shape& shape, nb::dlpack::dtype dtype, T** data) {
  size_t sizes[2] = {1, 1};
  for (size_t i = 0; i < shape.size(); ++i) sizes[i] = size_t(shape[i]);
  std::unique_ptr<T[]> owned(new T[count_of(shape) + 1]);
  *data = owned.get();
  nb::capsule owner(owned.get(), [](void* p) noexcept { delete[] static_cast<T*>(p); });
  owned.release();
  return nb::cast(nb::ndarray<nb::numpy>(*data, shape.size(), sizes, owner, nullptr, dtype));
}

// Memory for values: numpy has no bfloat16 and no int4, so their bits are returned as uint16 and uint8.
nb::object new_values(DType type, const Shape& shape, void** data) {
  if (type == DType::f32) return new_array<float>(shape, nb::dtype<float>(), reinterpret_cast<float**>(data));
  if (is_quantised(type))
    return new_array<uint8_t>(shape, type == DType::i8 ? nb::dtype<int8_t>() : nb::dtype<uint8_t>(),
                              reinterpret_cast<uint8_t**>(data));
  return new_array<uint16_t>(shape, type == DType::f16 ? nb::dlpack::dtype{2, 16, 1} : nb::dtype<uint16_t>(),
                             reinterpret_cast<uint16_t**>(data));
}

// The caller's scales, or those that fit the weight; the object is None for float types.
struct NewScales {
  nb::object object = nb::none();
  void* data = nullptr;
  Shape dims;
  const Shape* shape = nullptr;

  NewScales(const Floats& weight, DType type, int64_t group, const std::optional<Values>& given) {
    const Scales checked(type, given);
    if (!given && !is_quantised(type)) return;
    shape = &dims;
    if (given) {
      object = nb::cast(*given);
      data = const_cast<void*>(checked.data);
      dims = checked.dims;
      return;
    }
    if (type == DType::i4 && group != 32 && group != 64 && group != 128)
      refuse_if("group must be 32, 64 or 128, got " + std::to_string(group));
    const int64_t rows = int64_t(weight.shape(0)), cols = int64_t(weight.shape(1));
    dims = type == DType::i8 ? Shape{rows} : Shape{rows, (cols + group - 1) / group};
    object = new_values(type == DType::i8 ? DType::f32 : DType::f16, dims, &data);
    refuse_if(released([&] { return find_scales(weight.data(), rows, cols, type, group, data, thread_pool()); }));
  }
  NewScales(const NewScales&) = delete;
};

void check_weight(const Floats& weight) {
  if (weight.ndim() != 2) refuse_if("weight must be 2-d [N, K], got " + show(shape_of(weight)));
  if (weight.shape(0) > INT32_MAX) refuse_if("weight is too large: " + show(shape_of(weight)));
  check_aligned(weight, "weight");
}

nb::tuple packed_nm(Floats weight, int n, int m, const std::string& dtype, int64_t group,
                    std::optional<Values> scales) {
  check_weight(weight);
  const int64_t rows = int64_t(weight.shape(0)), cols = int64_t(weight.shape(1));
  const DType type = type_named(dtype);
  const NewScales its(weight, type, group, scales);
  const NmWeight w{rows, cols, n, m, type, nullptr, nullptr, its.data, group};
  refuse_if(check_nm_sizes(w, its.shape));
  void* values;
  uint8_t* positions;
  nb::object stored = new_values(type, {rows, type == DType::i4 ? w.value_bytes_per_row() : w.kept_per_row()}, &values);
  nb::object indices = new_array<uint8_t>({rows, w.index_bytes_per_row()}, nb::dtype<uint8_t>(), &positions);
  refuse_if(released([&] { return pack_nm(weight.data(), w, values, positions, thread_pool()); }));
  return nb::make_tuple(stored, indices, its.object);
}

nb::tuple packed_bitmask(Floats weight, const std::string& dtype, int64_t group, std::optional<Values> scales) {
  check_weight(weight);
  const int64_t rows = int64_t(weight.shape(0)), cols = int64_t(weight.shape(1));
  const DType type = type_named(dtype);
  const NewScales its(weight, type, group, scales);
  uint8_t* bits;
  int64_t* starts;
  nb::object mask = new_array<uint8_t>({rows, (cols + 7) / 8}, nb::dtype<uint8_t>(), &bits);
  nb::object row_start = new_array<int64_t>({rows + 1}, nb::dtype<int64_t>(), &starts);
  const BitmaskWeight w{rows, cols, type, nullptr, bits, starts, its.data, group};
  refuse_if(check_bitmask_sizes(w, its.shape));
  released([&] { find_mask(weight.data(), rows, cols, type, bits, starts, thread_pool()); });
  void* values;
  nb::object stored = new_values(type, {starts[rows]}, &values);
  refuse_if(released([&] { return pack_bitmask(weight.data(), w, values, thread_pool()); }));
  return nb::make_tuple(stored, mask, row_start, its.object);
}

nb::object dense_nm(Values values, Bytes indices, int n, int m, std::optional<Values> scales, int64_t group,
                     int64_t in_features) {
  const Scales given(type_of(values), scales);
  const NmWeight w = nm_weight(values, indices, n, m, given, group, in_features, nullptr);
  float* dense;
  nb::object result = new_array<float>({w.rows, w.cols}, nb::dtype<float>(), &dense);
  released([&] { unpack_nm(w, dense, thread_pool()); });
  return result;
}

nb::object dense_bitmask(Values values, Bytes mask, Int64s row_start, int64_t in_features,
                          std::optional<Values> scales, int64_t group) {
  const Scales given(type_of(values), scales);
  const BitmaskWeight w = bitmask_weight(values, mask, row_start, given, group, in_features, nullptr);
  float* dense;
  nb::object result = new_array<float>({w.rows, w.cols}, nb::dtype<float>(), &dense);
  released([&] { unpack_bitmask(w, dense, thread_pool()); });
  return result;
}

nb::object pairwise_max_sum(Floats a, Floats b) {
  if (a.ndim() != 2 || b.ndim() != 2 || a.shape(0) != b.shape(0))
    refuse_if("a and b must be 2-d with the same number of rows, got " + show(shape_of(a)) + " and " +
              show(shape_of(b)));
  check_aligned(a, "a");
  check_aligned(b, "b");
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
             nb::arg("bias") = nb::none(), nb::kw_only(), nb::arg("scales") = nb::none(), nb::arg("group") = 0,
             nb::arg("out") = nb::none(), "Return y [M, N] = x [M, K] @ W.T + bias for an n:m weight W [N, K].");
  module.def("linear_bitmask", linear_bitmask, nb::arg("x"), nb::arg("values"), nb::arg("mask"), nb::arg("row_start"),
             nb::arg("bias") = nb::none(), nb::kw_only(), nb::arg("scales") = nb::none(), nb::arg("group") = 0,
             nb::arg("out") = nb::none(),
             "Return y [M, N] = x [M, K] @ W.T + bias for an unstructured weight W [N, K].");
  module.def("pack_nm", packed_nm, nb::arg("weight"), nb::arg("n"), nb::arg("m"), nb::arg("dtype"), nb::kw_only(),
             nb::arg("group") = 0, nb::arg("scales") = nb::none(),
             "Return values, indices and scales (None for float types) of an n:m weight [N, K].");
  module.def("pack_bitmask", packed_bitmask, nb::arg("weight"), nb::arg("dtype"), nb::kw_only(), nb::arg("group") = 0,
             nb::arg("scales") = nb::none(),
             "Return values, mask, row_start and scales (None for float types) of a weight [N, K].");
  module.def("unpack_nm", dense_nm, nb::arg("values"), nb::arg("indices"), nb::arg("n"), nb::arg("m"), nb::kw_only(),
             nb::arg("scales") = nb::none(), nb::arg("group") = 0, nb::arg("in_features") = 0,
             "Return the dense float32 weight [N, K].");
  module.def("unpack_bitmask", dense_bitmask, nb::arg("values"), nb::arg("mask"), nb::arg("row_start"),
             nb::arg("in_features"), nb::kw_only(), nb::arg("scales") = nb::none(), nb::arg("group") = 0,
             "Return the dense float32 weight [N, K].");
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
  module.def(
      "tile_burst",
      [](int64_t steps, const std::string& dtype) {
        if (dtype != "bf16" && dtype != "int8") refuse_if("dtype must be bf16 or int8, got " + dtype);
        const Kernels& run = kernels();
        nb::gil_scoped_release released;
        return run.tile_burst ? run.tile_burst(type_named(dtype), steps, thread_pool()) : int64_t{0};
      },
      nb::arg("steps"), nb::arg("dtype"),
      "Do products of tiles, return how many operations: time it for the peak. 0 where there are no tiles.");
  module.def("isa", [] { return kernels().isa; }, "Name the instruction set in use: amx, avx512bf16, avx512vnni, avx512, avx2 or portable.");
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
