// The ops of the domain sparsify for ONNX Runtime's CPU provider: linear_nm and linear_bitmask, and each again with
// _int8 and _int4 behind its name.
//
// One OrtCustomOp per type of values. A weight is checked once, when the session creates the kernel, so a
// damaged file is refused there; weights are read in place from the memory-mapped file.
#include <atomic>
#include <string>
#include <type_traits>

#include "ort_op.h"

namespace {

using namespace sparsify;

// ONNX Runtime's threads, so that intra_op_num_threads is obeyed.
struct OrtThreads {
  const OrtKernelContext* context;

  static void run(void* self, size_t count, void (*task)(void*, size_t), void* arg) {
    struct Job {
      void (*task)(void*, size_t);
      void* arg;
      std::atomic<bool> failed{false};
    } job{task, arg};
    const auto guarded_task = [](void* at, size_t index) {
      Job& shared = *static_cast<Job*>(at);
      try {
        shared.task(shared.arg, index);
      } catch (...) {
        shared.failed = true;
      }
    };
    const OrtKernelContext* context = static_cast<OrtThreads*>(self)->context;
    check(ort::KernelContext_ParallelFor(api, context, guarded_task, count, 0, &job));
    if (job.failed) refuse_if("out of memory");
  }
};

constexpr ort::ElementType value_type(DType type) {
  switch (type) {
    case DType::f32: return ort::kFloat;
    case DType::f16: return ort::kFloat16;
    case DType::bf16: return ort::kBfloat16;
    case DType::i8: return ort::kInt8;
    case DType::i4: return ort::kUint8;
  }
  return ort::kFloat;
}

constexpr ort::ElementType scale_type(DType type) { return type == DType::i4 ? ort::kFloat16 : ort::kFloat; }
template <DType type>
using Scale = std::conditional_t<type == DType::i4, uint16_t, float>;

// linear_nm(x, values, indices, bias?)
// linear_nm_int8(x, values, indices, scales, bias?), linear_nm_int4 likewise
template <DType type>
struct NmKernel {
  static constexpr const char* kName = type == DType::i8   ? "linear_nm_int8"
                                       : type == DType::i4 ? "linear_nm_int4"
                                                           : "linear_nm";
  static constexpr const char* kProvider = nullptr;
  static constexpr ort::ElementType kTypes[] = {ort::kFloat, value_type(type), ort::kUint8, scale_type(type)};
  static constexpr size_t kBias = is_quantised(type) ? 4 : 3;
  static constexpr size_t kRowsFrom = 1;  // the input whose first dimension is out_features

  std::string name;
  NmWeight w{};
  Elements<Scale<type>> scale;

  explicit NmKernel(const OrtKernelInfo* info) : name(node_name(info)) {
    const Tensor values = constant(info, 1, "values"), indices = constant(info, 2, "indices");
    const Tensor scales = is_quantised(type) ? constant(info, 3, "scales") : Tensor{};
    if (is_quantised(type)) scale = Elements<Scale<type>>(scales);
    w = {0, 0, small_attribute(info, "n"), small_attribute(info, "m"), type, values.data,
         static_cast<const uint8_t*>(indices.data), is_quantised(type) ? scale.read(scales.data) : nullptr, 0};
    if (type == DType::i4) w.cols = attribute(info, "in_features"), w.group = attribute(info, "group");
    refuse(info, check_nm(w, values.shape, indices.shape, is_quantised(type) ? &scales.shape : nullptr, nullptr));
  }

  void compute(const OrtKernelContext* context, const float* x, int64_t tokens, const float* bias, float* y) const {
    NmWeight now = w;  // ask for the pointers again: they are only promised to last for one call
    now.values = bytes(context, 1);
    now.indices = bytes(context, 2);
    if (is_quantised(type)) now.scales = scale.read(bytes(context, 3));
    OrtThreads threads{context};
    best_kernels(nullptr)->linear_nm(now, x, tokens, bias, y, Parallel{&threads, OrtThreads::run});
  }
};

// linear_bitmask(x, values, mask, row_start, bias?)
// linear_bitmask_int8(x, values, mask, row_start, scales, bias?), linear_bitmask_int4 likewise
template <DType type>
struct BitmaskKernel {
  static constexpr const char* kName = type == DType::i8   ? "linear_bitmask_int8"
                                       : type == DType::i4 ? "linear_bitmask_int4"
                                                           : "linear_bitmask";
  static constexpr const char* kProvider = nullptr;
  static constexpr ort::ElementType kTypes[] = {ort::kFloat, value_type(type), ort::kUint8, ort::kInt64,
                                                scale_type(type)};
  static constexpr size_t kBias = is_quantised(type) ? 5 : 4;
  static constexpr size_t kRowsFrom = 2;

  std::string name;
  BitmaskWeight w{};
  Elements<int64_t> start;
  Elements<Scale<type>> scale;

  explicit BitmaskKernel(const OrtKernelInfo* info) : name(node_name(info)) {
    const Tensor values = constant(info, 1, "values"), mask = constant(info, 2, "mask"),
                 row_start = constant(info, 3, "row_start");
    const Tensor scales = is_quantised(type) ? constant(info, 4, "scales") : Tensor{};
    start = Elements<int64_t>(row_start);
    if (is_quantised(type)) scale = Elements<Scale<type>>(scales);
    w = {0, attribute(info, "in_features"), type, values.data, static_cast<const uint8_t*>(mask.data),
         start.read(row_start.data), is_quantised(type) ? scale.read(scales.data) : nullptr,
         type == DType::i4 ? attribute(info, "group") : 0};
    refuse(info, check_bitmask(w, values.shape, mask.shape, row_start.shape,
                               is_quantised(type) ? &scales.shape : nullptr, nullptr));
  }

  void compute(const OrtKernelContext* context, const float* x, int64_t tokens, const float* bias, float* y) const {
    BitmaskWeight now = w;
    now.values = bytes(context, 1);
    now.mask = bytes(context, 2);
    now.row_start = start.read(bytes(context, 3));
    if (is_quantised(type)) now.scales = scale.read(bytes(context, 4));
    OrtThreads threads{context};
    best_kernels(nullptr)->linear_bitmask(now, x, tokens, bias, y, Parallel{&threads, OrtThreads::run});
  }
};

}  // namespace

std::vector<const OrtCustomOp*> sparsify::cpu_ops() {
  const char* error = nullptr;
  if (!best_kernels(&error)) refuse_if(error);
  static const Op<NmKernel<DType::f32>> nm_f32;
  static const Op<NmKernel<DType::f16>> nm_f16;
  static const Op<NmKernel<DType::bf16>> nm_bf16;
  static const Op<NmKernel<DType::i8>> nm_i8;
  static const Op<NmKernel<DType::i4>> nm_i4;
  static const Op<BitmaskKernel<DType::f32>> bitmask_f32;
  static const Op<BitmaskKernel<DType::f16>> bitmask_f16;
  static const Op<BitmaskKernel<DType::bf16>> bitmask_bf16;
  static const Op<BitmaskKernel<DType::i8>> bitmask_i8;
  static const Op<BitmaskKernel<DType::i4>> bitmask_i4;
  return {&nm_f32,      &nm_f16,      &nm_bf16,      &nm_i8,      &nm_i4,
          &bitmask_f32, &bitmask_f16, &bitmask_bf16, &bitmask_i8, &bitmask_i4};
}
