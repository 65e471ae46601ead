// The ops of the domain sparsify for ONNX Runtime's CPU provider: linear_nm and linear_bitmask, each again with _int8
// and _int4 behind its name, and all of these with experts_ in front.
//
// One OrtCustomOp per type of values. A weight is checked once, when the session creates the kernel, so a
// damaged file is refused there; weights are read in place from the memory-mapped file.
#include <atomic>
#include <string>
#include <type_traits>

#include "experts.h"
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
// `first` is the input that values are.
template <DType type, size_t first = 1>
struct NmKernel {
  static constexpr const char* kName = type == DType::i8   ? "linear_nm_int8"
                                       : type == DType::i4 ? "linear_nm_int4"
                                                           : "linear_nm";
  static constexpr const char* kProvider = nullptr;
  static constexpr ort::ElementType kTypes[] = {ort::kFloat, value_type(type), ort::kUint8, scale_type(type)};
  static constexpr size_t kBias = (is_quantised(type) ? 3 : 2) + first;
  static constexpr size_t kRowsFrom = first;  // the input whose first dimension is out_features

  std::string name;
  NmWeight w{};
  Elements<Scale<type>> scale;

  explicit NmKernel(const OrtKernelInfo* info) : name(node_name(info)) {
    const Tensor values = constant(info, first, "values"), indices = constant(info, first + 1, "indices");
    const Tensor scales = is_quantised(type) ? constant(info, first + 2, "scales") : Tensor{};
    if (is_quantised(type)) scale = Elements<Scale<type>>(scales);
    w = {0, 0, small_attribute(info, "n"), small_attribute(info, "m"), type, values.data,
         static_cast<const uint8_t*>(indices.data), is_quantised(type) ? scale.read(scales.data) : nullptr, 0};
    if (type == DType::i4) w.cols = attribute(info, "in_features"), w.group = attribute(info, "group");
    refuse(info, check_nm(w, values.shape, indices.shape, is_quantised(type) ? &scales.shape : nullptr, nullptr));
  }

  NmWeight now(const OrtKernelContext* context) const {
    NmWeight now = w;  // ask for the pointers again: they are only promised to last for one call
    now.values = bytes(context, first);
    now.indices = bytes(context, first + 1);
    if (is_quantised(type)) now.scales = scale.read(bytes(context, first + 2));
    return now;
  }

  static auto linear() { return best_kernels(nullptr)->linear_nm; }

  void compute(const OrtKernelContext* context, const float* x, int64_t tokens, const float* bias, float* y) const {
    OrtThreads threads{context};
    linear()(now(context), x, tokens, bias, y, Parallel{&threads, OrtThreads::run});
  }
};

// linear_bitmask(x, values, mask, row_start, bias?)
// linear_bitmask_int8(x, values, mask, row_start, scales, bias?), linear_bitmask_int4 likewise
template <DType type, size_t first = 1>
struct BitmaskKernel {
  static constexpr const char* kName = type == DType::i8   ? "linear_bitmask_int8"
                                       : type == DType::i4 ? "linear_bitmask_int4"
                                                           : "linear_bitmask";
  static constexpr const char* kProvider = nullptr;
  static constexpr ort::ElementType kTypes[] = {ort::kFloat, value_type(type), ort::kUint8, ort::kInt64,
                                                scale_type(type)};
  static constexpr size_t kBias = (is_quantised(type) ? 4 : 3) + first;
  static constexpr size_t kRowsFrom = first + 1;

  std::string name;
  BitmaskWeight w{};
  Elements<int64_t> start;
  Elements<Scale<type>> scale;

  explicit BitmaskKernel(const OrtKernelInfo* info) : name(node_name(info)) {
    const Tensor values = constant(info, first, "values"), mask = constant(info, first + 1, "mask"),
                 row_start = constant(info, first + 2, "row_start");
    const Tensor scales = is_quantised(type) ? constant(info, first + 3, "scales") : Tensor{};
    start = Elements<int64_t>(row_start);
    if (is_quantised(type)) scale = Elements<Scale<type>>(scales);
    w = {0, attribute(info, "in_features"), type, values.data, static_cast<const uint8_t*>(mask.data),
         start.read(row_start.data), is_quantised(type) ? scale.read(scales.data) : nullptr,
         type == DType::i4 ? attribute(info, "group") : 0};
    refuse(info, check_bitmask(w, values.shape, mask.shape, row_start.shape,
                               is_quantised(type) ? &scales.shape : nullptr, nullptr));
  }

  BitmaskWeight now(const OrtKernelContext* context) const {
    BitmaskWeight now = w;
    now.values = bytes(context, first);
    now.mask = bytes(context, first + 1);
    now.row_start = start.read(bytes(context, first + 2));
    if (is_quantised(type)) now.scales = scale.read(bytes(context, first + 3));
    return now;
  }

  static auto linear() { return best_kernels(nullptr)->linear_bitmask; }

  void compute(const OrtKernelContext* context, const float* x, int64_t tokens, const float* bias, float* y) const {
    OrtThreads threads{context};
    linear()(now(context), x, tokens, bias, y, Parallel{&threads, OrtThreads::run});
  }
};

// experts_OP(x, ids, the stored tensors of OP, bias), `Linear` being the kernel of OP with one input more in front.
template <class Linear>
struct ExpertsKernel {
  std::string name;
  Linear linear;
  int64_t experts;

  explicit ExpertsKernel(const OrtKernelInfo* info)
      : name(node_name(info)), linear(info), experts(attribute(info, "experts")) {
    refuse(info, check_experts(experts, linear.w.rows));
  }

  void run(OrtKernelContext* context) const {
    const Tensor x = tensor(input(context, 0)), ids = tensor(input(context, 1));
    const Tensor bias = tensor(input(context, Linear::kBias));
    const int64_t rows = linear.w.rows / experts;
    std::string why = x.shape.size() == 2 ? check_x(x.shape, linear.w.cols) : "x must be [S, K], got " + show(x.shape);
    if (why.empty() && ids.shape != Shape{x.shape[0]})
      why = "ids must have shape " + show({x.shape[0]}) + " as x has rows, got " + show(ids.shape);
    if (why.empty() && bias.shape != Shape{linear.w.rows})
      why = "bias must have shape " + show({linear.w.rows}) + ", got " + show(bias.shape);
    const int64_t* id = static_cast<const int64_t*>(ids.data);
    if (why.empty()) why = check_ids(id, x.shape[0], experts);
    if (!why.empty()) refuse_if(name + ": " + why);
    const int64_t y_shape[] = {x.shape[0], rows};
    OrtValue* y = nullptr;
    check(ort::KernelContext_GetOutput(api, context, 0, y_shape, 2, &y));
    void* out = nullptr;
    check(ort::GetTensorMutableData(api, y, &out));
    OrtThreads threads{context};
    linear_experts(Linear::linear(), linear.now(context), experts, static_cast<const float*>(x.data), id, x.shape[0],
                   static_cast<const float*>(bias.data), static_cast<float*>(out),
                   Parallel{&threads, OrtThreads::run});
  }
};

template <class Linear>
struct ExpertsOp : Op<Linear> {
  using Kernel = ExpertsKernel<Linear>;
  ExpertsOp() {
    this->GetName = [](const OrtCustomOp*) {
      static const std::string name = std::string("experts_") + Linear::kName;
      return name.c_str();
    };
    this->GetInputType = [](const OrtCustomOp*, size_t index) {
      if (index == 1) return ort::kInt64;
      return index == Linear::kBias ? ort::kFloat : Linear::kTypes[index ? index - 1 : 0];
    };
    this->GetInputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
    this->CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return guarded([&] { *kernel = new Kernel(info); });
    };
    this->KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded([&] { static_cast<const Kernel*>(kernel)->run(context); });
    };
    this->KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    this->InferOutputShapeFn = nullptr;  // the rows of one expert are in an attribute, which shape inference has not
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
  static const ExpertsOp<NmKernel<DType::f32, 2>> experts_nm_f32;
  static const ExpertsOp<NmKernel<DType::f16, 2>> experts_nm_f16;
  static const ExpertsOp<NmKernel<DType::bf16, 2>> experts_nm_bf16;
  static const ExpertsOp<NmKernel<DType::i8, 2>> experts_nm_i8;
  static const ExpertsOp<NmKernel<DType::i4, 2>> experts_nm_i4;
  static const ExpertsOp<BitmaskKernel<DType::f32, 2>> experts_bitmask_f32;
  static const ExpertsOp<BitmaskKernel<DType::f16, 2>> experts_bitmask_f16;
  static const ExpertsOp<BitmaskKernel<DType::bf16, 2>> experts_bitmask_bf16;
  static const ExpertsOp<BitmaskKernel<DType::i8, 2>> experts_bitmask_i8;
  static const ExpertsOp<BitmaskKernel<DType::i4, 2>> experts_bitmask_i4;
  return {&nm_f32,
          &nm_f16,
          &nm_bf16,
          &nm_i8,
          &nm_i4,
          &bitmask_f32,
          &bitmask_f16,
          &bitmask_bf16,
          &bitmask_i8,
          &bitmask_i4,
          &experts_nm_f32,
          &experts_nm_f16,
          &experts_nm_bf16,
          &experts_nm_i8,
          &experts_nm_i4,
          &experts_bitmask_f32,
          &experts_bitmask_f16,
          &experts_bitmask_bf16,
          &experts_bitmask_i8,
          &experts_bitmask_i4};
}
