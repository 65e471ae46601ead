// The Python module sparsify_export._cuda: the kernels of kernels.h on arrays by DLPack, on a given stream. Nothing is
// copied and nothing waits. Signatures: tools/sparsify_export/_cuda.pyi.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace nb = nanobind;
namespace sparsify_cuda {
namespace {

#ifdef SPARSIFY_EMULATED  // cuda/emulate: kernels run on the CPU's memory
constexpr int kDevice = nb::device::cpu::value;
constexpr char kMemory[] = "the CPU";
#else
constexpr int kDevice = nb::device::cuda::value;
constexpr char kMemory[] = "an NVIDIA GPU";
#endif

using Array = nb::ndarray<nb::ro>;  // of any type, anywhere; `Call` asks
using Shape = std::vector<int64_t>;

std::string show(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

Shape shape_of(const Array& array) {
  Shape shape(array.ndim());
  for (size_t i = 0; i < shape.size(); ++i) shape[i] = int64_t(array.shape(i));
  return shape;
}

constexpr nb::dlpack::dtype kUint8{uint8_t(nb::dlpack::dtype_code::UInt), 8, 1};
constexpr nb::dlpack::dtype kInt8{uint8_t(nb::dlpack::dtype_code::Int), 8, 1};
constexpr nb::dlpack::dtype kInt16{uint8_t(nb::dlpack::dtype_code::Int), 16, 1};
constexpr nb::dlpack::dtype kInt32{uint8_t(nb::dlpack::dtype_code::Int), 32, 1};
constexpr nb::dlpack::dtype kInt64{uint8_t(nb::dlpack::dtype_code::Int), 64, 1};
constexpr nb::dlpack::dtype kFloat16{uint8_t(nb::dlpack::dtype_code::Float), 16, 1};
constexpr nb::dlpack::dtype kFloat32{uint8_t(nb::dlpack::dtype_code::Float), 32, 1};
constexpr nb::dlpack::dtype kBfloat16{uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1};

constexpr int64_t kAny = -1;  // of a shape

// The arguments of one call: all arrays must be on one GPU.
struct Call {
  int device_id = -1;

  // An array's memory, or a sentence about what is wrong with it. An entry of kAny may be anything.
  void* data(const char* name, const Array& array, const Shape& wanted) {
    const std::string what = name;
    if (array.device_type() != kDevice)
      throw nb::value_error((what + " must be in the memory of " + kMemory + ", got device type " +
                             std::to_string(array.device_type())).c_str());
    if (device_id < 0) device_id = array.device_id();
    if (array.device_id() != device_id)
      throw nb::value_error((what + " is on GPU " + std::to_string(array.device_id()) + ", and the first array on " +
                             std::to_string(device_id)).c_str());
    const Shape got = shape_of(array);
    bool same = got.size() == wanted.size();
    for (size_t i = 0; same && i < got.size(); ++i) same = wanted[i] == kAny || got[i] == wanted[i];
    if (!same) throw nb::value_error((what + " must have shape " + show(wanted) + ", got " + show(got)).c_str());
    int64_t step = 1;
    for (size_t i = got.size(); i-- > 0; step *= got[i])
      if (got[i] > 1 && array.size() > 0 && array.stride(i) != step)
        throw nb::value_error((what + " must be contiguous").c_str());
    return const_cast<void*>(array.data());
  }

  template <class T>
  T* data(const char* name, const Array& array, nb::dlpack::dtype type, const Shape& wanted) {
    if (array.dtype() != type) throw nb::value_error((std::string(name) + " has the wrong element type").c_str());
    return static_cast<T*>(data(name, array, wanted));
  }

  // Null where there is none.
  template <class T>
  T* maybe(const char* name, const std::optional<Array>& array, nb::dlpack::dtype type, const Shape& wanted) {
    return array ? data<T>(name, *array, type, wanted) : nullptr;
  }
};

DType type_of(const char* name, const Array& array) {
  if (array.dtype() == kFloat32) return DType::f32;
  if (array.dtype() == kFloat16) return DType::f16;
  if (array.dtype() == kBfloat16) return DType::bf16;
  throw nb::value_error((std::string(name) + " must be float32, float16 or bfloat16").c_str());
}

DType same_type(const char* name, const Array& array, DType wanted, const char* other) {
  if (type_of(name, array) != wanted)
    throw nb::value_error((std::string(name) + " must have the type of " + other).c_str());
  return wanted;
}

struct Matrix {
  int64_t rows, columns;
  Matrix(const char* name, const Array& array) {
    if (array.ndim() != 2)
      throw nb::value_error(
          (std::string(name) + " must have two dimensions, got shape " + show(shape_of(array))).c_str());
    rows = int64_t(array.shape(0));
    columns = int64_t(array.shape(1));
  }
};

cudaStream_t stream_at(uint64_t handle) { return reinterpret_cast<cudaStream_t>(uintptr_t(handle)); }

void finish(cudaError_t status) {
  if (status == cudaErrorInvalidValue) throw nb::value_error("the kernel has no such combination of types and sizes");
  if (status != cudaSuccess)
    throw std::runtime_error("the kernel's launch failed with CUDA error " + std::to_string(int(status)));
}

// One of a kernel's versions, "" for the one that chooses.
template <class Function>
struct Version {
  const char* name;
  Function* run;
};
template <class Function, size_t count>
Function* pick(const Version<Function> (&versions)[count], const std::string& name) {
  std::string all;
  for (const auto& version : versions) {
    if (version.name == name) return version.run;
    all += std::string(all.empty() ? "'" : ", '") + version.name + "'";
  }
  throw nb::value_error(("version must be one of " + all + ", got '" + name + "'").c_str());
}

using Spmm24 = decltype(sparsify_spmm_24);
constexpr Version<Spmm24> kSpmm24[] = {{"", sparsify_spmm_24},
                                       {"readable", sparsify_spmm_24_readable},
                                       {"decode", sparsify_spmm_24_decode},
                                       {"few", sparsify_spmm_24_few},
                                       {"prefill", sparsify_spmm_24_prefill}};
using SpmmBitmask = decltype(sparsify_spmm_bitmask);
constexpr Version<SpmmBitmask> kSpmmBitmask[] = {{"", sparsify_spmm_bitmask},
                                                 {"readable", sparsify_spmm_bitmask_readable},
                                                 {"decode", sparsify_spmm_bitmask_decode},
                                                 {"prefill", sparsify_spmm_bitmask_prefill}};
using Spmm24Int4 = decltype(sparsify_spmm_24_int4);
constexpr Version<Spmm24Int4> kSpmm24Int4[] = {{"", sparsify_spmm_24_int4},
                                               {"readable", sparsify_spmm_24_int4_readable}};

void spmm_24(const Array& x, const Array& values, const Array& indices, const std::optional<Array>& bias,
             const Array& y, uint64_t stream, const std::string& version) {
  const auto [M, K] = Matrix("x", x);
  const int64_t N = Matrix("values", values).rows;
  const DType x_type = same_type("y", y, type_of("x", x), "x"), w_type = type_of("values", values);
  Call call;
  const void* const x_at = call.data("x", x, {M, K});
  const void* const values_at = call.data("values", values, {N, K / 2});
  const auto* const indices_at = call.data<uint8_t>("indices", indices, kUint8, {N, (K + 7) / 8});
  const float* const bias_at = call.maybe<float>("bias", bias, kFloat32, {N});
  finish(pick(kSpmm24, version)(x_type, w_type, x_at, values_at, indices_at, bias_at, call.data("y", y, {M, N}), M, N,
                                K, stream_at(stream)));
}

void spmm_bitmask(const Array& x, const Array& values, const Array& mask, const Array& row_start,
                  const std::optional<Array>& bias, const Array& y, uint64_t stream, const std::string& version) {
  const auto [M, K] = Matrix("x", x);
  const int64_t N = Matrix("mask", mask).rows;
  const DType x_type = same_type("y", y, type_of("x", x), "x"), w_type = type_of("values", values);
  Call call;
  const void* const x_at = call.data("x", x, {M, K});
  const void* const values_at = call.data("values", values, {kAny});
  const auto* const mask_at = call.data<uint8_t>("mask", mask, kUint8, {N, (K + 7) / 8});
  const auto* const row_start_at = call.data<int64_t>("row_start", row_start, kInt64, {N + 1});
  const float* const bias_at = call.maybe<float>("bias", bias, kFloat32, {N});
  finish(pick(kSpmmBitmask, version)(x_type, w_type, x_at, values_at, mask_at, row_start_at, bias_at,
                                     call.data("y", y, {M, N}), M, N, K, stream_at(stream)));
}

void quantise_tokens(const Array& x, const Array& codes, const Array& steps, uint64_t stream) {
  const auto [M, K] = Matrix("x", x);
  const DType x_type = type_of("x", x);
  Call call;
  const void* const x_at = call.data("x", x, {M, K});
  auto* const codes_at = call.data<int8_t>("codes", codes, kInt8, {M, code_pitch(K)});
  auto* const steps_at = call.data<float>("steps", steps, kFloat32, {M});
  finish(sparsify_quantise_tokens(x_type, x_at, codes_at, steps_at, M, K, stream_at(stream)));
}

void spmm_24_int4(const Array& codes, const Array& steps, const Array& values, const Array& indices,
                  const Array& scales, const std::optional<Array>& bias, const Array& y, int64_t in_features,
                  int32_t group, uint64_t stream, const std::string& version) {
  if (in_features < 0 || group < 1) throw nb::value_error("in_features and group must be positive");
  const int64_t K = in_features, M = Matrix("codes", codes).rows, N = Matrix("values", values).rows;
  const DType y_type = type_of("y", y);
  Call call;
  const auto* const codes_at = call.data<int8_t>("codes", codes, kInt8, {M, code_pitch(K)});
  const auto* const steps_at = call.data<float>("steps", steps, kFloat32, {M});
  const auto* const values_at = call.data<uint8_t>("values", values, kUint8, {N, (K + 3) / 4});
  const auto* const indices_at = call.data<uint8_t>("indices", indices, kUint8, {N, (K + 7) / 8});
  const auto* const scales_at = call.data<uint16_t>("scales", scales, kFloat16, {N, (K + group - 1) / group});
  const float* const bias_at = call.maybe<float>("bias", bias, kFloat32, {N});
  finish(pick(kSpmm24Int4, version)(y_type, codes_at, steps_at, values_at, indices_at, scales_at, bias_at,
                                    call.data("y", y, {M, N}), M, N, K, group, stream_at(stream)));
}

void gather_channels(const Array& x, const Array& index, const Array& y, uint64_t stream) {
  const auto [M, K_in] = Matrix("x", x);
  const int64_t K_out = Matrix("y", y).columns;
  if (x.dtype() != y.dtype()) throw nb::value_error("y must have the type of x");
  Call call;
  const void* const x_at = call.data("x", x, {M, K_in});
  const auto* const index_at = call.data<int64_t>("index", index, kInt64, {K_out});
  finish(sparsify_gather_channels(x.dtype().bits / 8, x_at, index_at, call.data("y", y, {M, K_out}), M, K_in, K_out,
                                  stream_at(stream)));
}

// What both halves of rate_mask are given.
struct Ranked {
  Call call;
  DType type;
  int64_t R, C, count_rows;
  int32_t rank_bytes;
  const void *weight, *rank;
  const int32_t* counts;

  Ranked(const Array& w, const Array& r, const Array& n) : type(type_of("weight", w)) {
    const Matrix size("weight", w);
    R = size.rows;
    C = size.columns;
    weight = call.data("weight", w, {R, C});
    if (r.dtype() != kInt16 && r.dtype() != kInt32) throw nb::value_error("rank must be int16 or int32");
    rank_bytes = r.dtype().bits / 8;
    rank = call.data("rank", r, {R, C});
    count_rows = n.ndim() == 1 && n.shape(0) == 1 ? 1 : R;
    counts = call.data<int32_t>("counts", n, kInt32, {count_rows});
  }
};

void rate_mask_forward(const Array& weight, const Array& rank, const Array& counts, const Array& out, uint64_t stream) {
  Ranked r(weight, rank, counts);
  same_type("out", out, r.type, "weight");
  finish(sparsify_rate_mask_forward(r.type, r.weight, r.rank_bytes, r.rank, r.counts, r.count_rows,
                                    r.call.data("out", out, {r.R, r.C}), r.R, r.C, stream_at(stream)));
}

void rate_mask_backward(const Array& weight, const Array& rank, const Array& counts, const Array& grad,
                        const std::optional<Array>& grad_weight, const std::optional<Array>& grad_beta,
                        const std::optional<Array>& workspace, uint64_t stream) {
  Ranked r(weight, rank, counts);
  same_type("grad", grad, r.type, "weight");
  if (grad_weight) same_type("grad_weight", *grad_weight, r.type, "weight");
  const void* const grad_at = r.call.data("grad", grad, {r.R, r.C});
  void* const for_weight = grad_weight ? r.call.data("grad_weight", *grad_weight, {r.R, r.C}) : nullptr;
  int64_t beta_rows = 0, D = 0;
  if (grad_beta) {
    const Matrix size("grad_beta", *grad_beta);
    beta_rows = size.rows;
    D = size.columns;
  }
  float* const for_beta = r.call.maybe<float>("grad_beta", grad_beta, kFloat32, {beta_rows, D});
  float* const room = r.call.maybe<float>("workspace", workspace, kFloat32, {r.R, D});
  finish(sparsify_rate_mask_backward(r.type, r.weight, r.rank_bytes, r.rank, r.counts, r.count_rows, grad_at,
                                     for_weight, for_beta, beta_rows, D, room, r.R, r.C, stream_at(stream)));
}

}  // namespace
}  // namespace sparsify_cuda

NB_MODULE(_cuda, m) {
  using namespace sparsify_cuda;
  const auto array = [](const char* name) { return nb::arg(name).noconvert(); };
  const auto bias = [&] { return array("bias").none(); };
  m.def("spmm_24", &spmm_24, array("x"), array("values"), array("indices"), bias(), array("y"), nb::arg("stream"),
        nb::arg("version") = "");
  m.def("spmm_bitmask", &spmm_bitmask, array("x"), array("values"), array("mask"), array("row_start"), bias(),
        array("y"), nb::arg("stream"), nb::arg("version") = "");
  m.def("quantise_tokens", &quantise_tokens, array("x"), array("codes"), array("steps"), nb::arg("stream"));
  m.def("spmm_24_int4", &spmm_24_int4, array("codes"), array("steps"), array("values"), array("indices"),
        array("scales"), bias(), array("y"), nb::arg("in_features"), nb::arg("group"), nb::arg("stream"),
        nb::arg("version") = "");
  m.def("gather_channels", &gather_channels, array("x"), array("index"), array("y"), nb::arg("stream"));
  m.def("rate_mask_forward", &rate_mask_forward, array("weight"), array("rank"), array("counts"), array("out"),
        nb::arg("stream"));
  m.def("rate_mask_backward", &rate_mask_backward, array("weight"), array("rank"), array("counts"), array("grad"),
        array("grad_weight").none(), array("grad_beta").none(), array("workspace").none(), nb::arg("stream"));
}
