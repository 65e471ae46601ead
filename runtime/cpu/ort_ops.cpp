// libsparsify_ort.so: the ops of the domain sparsify for ONNX Runtime: linear_nm and linear_bitmask, and each again
// with _int8 and _int4 behind its name.
//
// One OrtCustomOp per type of values. A weight is checked once, when the session creates the kernel, so a
// damaged file is refused there; weights are read in place from the memory-mapped file.
#include <atomic>
#include <exception>
#include <string>
#include <type_traits>

#include "formats.h"
#include "kernels.h"
#include "ort_abi.h"

namespace {

using namespace sparsify;

const OrtApi* api;  // set by RegisterCustomOps; the same table for every session

struct Refused {  // carries a status to `guarded`; never leaves this file
  OrtStatus* status;
};

void check(OrtStatus* status) {
  if (status) throw Refused{status};
}

void refuse_if(const std::string& why) {
  if (!why.empty()) throw Refused{ort::CreateStatus(api, ort::kInvalidArgument, why.c_str())};
}

// Runs body; what it throws becomes a status, because exceptions must not cross the C ABI.
template <class Body>
OrtStatus* guarded(Body&& body) {
  try {
    body();
    return nullptr;
  } catch (const Refused& refused) {
    return refused.status;
  } catch (const std::exception& error) {
    return ort::CreateStatus(api, ort::kFail, error.what());
  } catch (...) {
    return ort::CreateStatus(api, ort::kFail, "unknown error in libsparsify_ort");
  }
}

Shape dims_of(const OrtTensorTypeAndShapeInfo* info) {
  size_t rank = 0;
  check(ort::GetDimensionsCount(api, info, &rank));
  Shape dims(rank);
  check(ort::GetDimensions(api, info, dims.data(), rank));
  return dims;
}

struct Tensor {
  Shape shape;
  const void* data = nullptr;
};

Tensor tensor(const OrtValue* value) {
  struct Owned {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    ~Owned() { ort::ReleaseTensorTypeAndShapeInfo(api, info); }
  } owned;
  check(ort::GetTensorTypeAndShape(api, value, &owned.info));
  void* data = nullptr;
  check(ort::GetTensorMutableData(api, const_cast<OrtValue*>(value), &data));
  return {dims_of(owned.info), data};
}

std::string node_name(const OrtKernelInfo* info) {
  size_t size = 0;
  if (OrtStatus* status = ort::KernelInfo_GetNodeName(api, info, nullptr, &size)) ort::ReleaseStatus(api, status);
  std::string name(size ? size : 1, '\0');
  check(ort::KernelInfo_GetNodeName(api, info, &name[0], &size));
  name.resize(size ? size - 1 : 0);  // without the final zero
  return name;
}

// Refuses the node that is being created, by name.
void refuse(const OrtKernelInfo* info, const std::string& why) {
  if (!why.empty()) refuse_if(node_name(info) + ": " + why);
}

Tensor constant(const OrtKernelInfo* info, size_t index, const char* name) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(ort::KernelInfoGetConstantInput_tensor(api, info, index, &is_constant, &value));
  if (!is_constant || !value) refuse(info, std::string(name) + " must be an initializer, got a computed input");
  return tensor(value);
}

int attribute(const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  check(ort::KernelInfoGetAttribute_int64(api, info, name, &value));
  constexpr int64_t kFar = 1000000000;  // fits an int, and what check_nm refuses stays refused
  return int(value < -kFar ? -kFar : value > kFar ? kFar : value);
}

const OrtValue* input(const OrtKernelContext* context, size_t index) {
  size_t count = 0;
  check(ort::KernelContext_GetInputCount(api, context, &count));
  const OrtValue* value = nullptr;
  if (index < count) check(ort::KernelContext_GetInput(api, context, index, &value));
  return value;  // null where an optional input is missing
}

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

const uint8_t* bytes(const OrtKernelContext* context, size_t index) {
  return static_cast<const uint8_t*>(tensor(input(context, index)).data);
}

// linear_nm(x, values, indices, bias?)
// linear_nm_int8(x, values, indices, scales, bias?), linear_nm_int4 likewise
template <DType type>
struct NmKernel {
  static constexpr const char* kName = type == DType::i8   ? "linear_nm_int8"
                                       : type == DType::i4 ? "linear_nm_int4"
                                                           : "linear_nm";
  static constexpr ort::ElementType kTypes[] = {ort::kFloat, value_type(type), ort::kUint8, scale_type(type)};
  static constexpr size_t kBias = is_quantised(type) ? 4 : 3;
  static constexpr size_t kRowsFrom = 1;  // the input whose first dimension is out_features

  std::string name;
  NmWeight w{};

  explicit NmKernel(const OrtKernelInfo* info) : name(node_name(info)) {
    const Tensor values = constant(info, 1, "values"), indices = constant(info, 2, "indices");
    const Tensor scales = is_quantised(type) ? constant(info, 3, "scales") : Tensor{};
    w = {0, 0, attribute(info, "n"), attribute(info, "m"), type, values.data,
         static_cast<const uint8_t*>(indices.data), scales.data, 0};
    if (type == DType::i4) w.cols = attribute(info, "in_features"), w.group = attribute(info, "group");
    refuse(info, check_nm(w, values.shape, indices.shape, is_quantised(type) ? &scales.shape : nullptr, nullptr));
  }

  void compute(const OrtKernelContext* context, const float* x, int64_t tokens, const float* bias, float* y,
               const Parallel& parallel) const {
    NmWeight now = w;  // ask for the pointers again: they are only promised to last for one call
    now.values = bytes(context, 1);
    now.indices = bytes(context, 2);
    if (is_quantised(type)) now.scales = bytes(context, 3);
    best_kernels(nullptr)->linear_nm(now, x, tokens, bias, y, parallel);
  }
};

// linear_bitmask(x, values, mask, row_start, bias?)
// linear_bitmask_int8(x, values, mask, row_start, scales, bias?), linear_bitmask_int4 likewise
template <DType type>
struct BitmaskKernel {
  static constexpr const char* kName = type == DType::i8   ? "linear_bitmask_int8"
                                       : type == DType::i4 ? "linear_bitmask_int4"
                                                           : "linear_bitmask";
  static constexpr ort::ElementType kTypes[] = {ort::kFloat, value_type(type), ort::kUint8, ort::kInt64,
                                                scale_type(type)};
  static constexpr size_t kBias = is_quantised(type) ? 5 : 4;
  static constexpr size_t kRowsFrom = 2;

  std::string name;
  BitmaskWeight w{};

  explicit BitmaskKernel(const OrtKernelInfo* info) : name(node_name(info)) {
    const Tensor values = constant(info, 1, "values"), mask = constant(info, 2, "mask"),
                 row_start = constant(info, 3, "row_start");
    const Tensor scales = is_quantised(type) ? constant(info, 4, "scales") : Tensor{};
    w = {0, attribute(info, "in_features"), type, values.data, static_cast<const uint8_t*>(mask.data),
         static_cast<const int64_t*>(row_start.data), scales.data, type == DType::i4 ? attribute(info, "group") : 0};
    refuse(info, check_bitmask(w, values.shape, mask.shape, row_start.shape,
                               is_quantised(type) ? &scales.shape : nullptr, nullptr));
  }

  void compute(const OrtKernelContext* context, const float* x, int64_t tokens, const float* bias, float* y,
               const Parallel& parallel) const {
    BitmaskWeight now = w;
    now.values = bytes(context, 1);
    now.mask = bytes(context, 2);
    now.row_start = static_cast<const int64_t*>(tensor(input(context, 3)).data);
    if (is_quantised(type)) now.scales = bytes(context, 4);
    best_kernels(nullptr)->linear_bitmask(now, x, tokens, bias, y, parallel);
  }
};

template <class Kernel>
void compute(const Kernel& kernel, OrtKernelContext* context) {
  const Tensor x = tensor(input(context, 0));
  const std::string why = check_x(x.shape, kernel.w.cols);
  if (!why.empty()) refuse_if(kernel.name + ": " + why);
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < x.shape.size(); ++i) tokens *= x.shape[i];
  const float* bias = nullptr;
  if (const OrtValue* value = input(context, Kernel::kBias)) {
    const Tensor given = tensor(value);
    if (given.shape != Shape{kernel.w.rows})
      refuse_if(kernel.name + ": bias must have shape " + show({kernel.w.rows}) + ", got " + show(given.shape));
    bias = static_cast<const float*>(given.data);
  }
  Shape y_shape = x.shape;
  y_shape.back() = kernel.w.rows;
  OrtValue* y = nullptr;
  check(ort::KernelContext_GetOutput(api, context, 0, y_shape.data(), y_shape.size(), &y));
  void* out = nullptr;
  check(ort::GetTensorMutableData(api, y, &out));
  OrtThreads threads{context};
  kernel.compute(context, static_cast<const float*>(x.data), tokens, bias, static_cast<float*>(out),
                 Parallel{&threads, OrtThreads::run});
}

// y has x's shape with the last dimension out_features; names of symbolic dimensions are kept.
void infer_shape(OrtShapeInferContext* context, size_t rows_from) {
  OrtTensorTypeAndShapeInfo *x = nullptr, *weight = nullptr;
  check(ort::ShapeInferContext_GetInputTypeShape(api, context, 0, &x));
  check(ort::ShapeInferContext_GetInputTypeShape(api, context, rows_from, &weight));
  Shape dims = dims_of(x);
  const Shape weight_dims = dims_of(weight);
  if (dims.empty() || weight_dims.empty()) return;  // rank not known
  std::vector<const char*> names(dims.size(), "");
  check(ort::GetSymbolicDimensions(api, x, names.data(), names.size()));
  // The API writes down an unknown dimension without a name as the length -1, so then nothing is said.
  for (size_t axis = 0; axis + 1 < dims.size(); ++axis) {
    if (dims[axis] < 0 && *names[axis] == '\0') return;
  }
  dims.back() = weight_dims[0];
  names.back() = "";
  struct Owned {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    ~Owned() { ort::ReleaseTensorTypeAndShapeInfo(api, info); }
  } y;
  check(ort::CreateTensorTypeAndShapeInfo(api, &y.info));
  check(ort::SetTensorElementType(api, y.info, ort::kFloat));
  check(ort::SetDimensions(api, y.info, dims.data(), dims.size()));
  check(ort::SetSymbolicDimensions(api, y.info, names.data(), names.size()));
  check(ort::ShapeInferContext_SetOutputTypeShape(api, context, 0, y.info));
}

template <class Kernel>
struct Op : OrtCustomOp {
  Op() : OrtCustomOp{} {
    version = ort::kVersion;
    GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // the CPU
    GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::kBias + 1; };
    GetInputType = [](const OrtCustomOp*, size_t index) {
      return index == Kernel::kBias ? ort::kFloat : Kernel::kTypes[index];
    };
    GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
    GetOutputType = [](const OrtCustomOp*, size_t) { return ort::kFloat; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
      return index == Kernel::kBias ? ort::kOptional : ort::kRequired;
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return ort::kRequired; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return 0; };
    GetVariadicInputMinArity = GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi*, const OrtKernelInfo* info, void** kernel) {
      return guarded([&] { *kernel = new Kernel(info); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      return guarded([&] { compute(*static_cast<const Kernel*>(kernel), context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
    InferOutputShapeFn = [](const OrtCustomOp*, OrtShapeInferContext* context) {
      return guarded([&] { infer_shape(context, Kernel::kRowsFrom); });
    };
  }
};

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* table = base->GetApi(ort::kVersion);
  if (!table) return nullptr;  // older than 1.17: no status can be made; loading the model will name the missing op
  api = table;
  return guarded([&] {
    const char* error = nullptr;
    if (!best_kernels(&error)) refuse_if(error);
    // Sessions keep pointers to the ops and the domain for as long as they live.
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
    static OrtCustomOpDomain* const domain = [] {
      OrtCustomOpDomain* made = nullptr;
      check(ort::CreateCustomOpDomain(api, "sparsify", &made));
      const OrtCustomOp* ops[] = {&nm_f32,      &nm_f16,      &nm_bf16,      &nm_i8,      &nm_i4,
                                  &bitmask_f32, &bitmask_f16, &bitmask_bf16, &bitmask_i8, &bitmask_i4};
      for (const OrtCustomOp* op : ops) check(ort::CustomOpDomain_Add(api, made, op));
      return made;
    }();
    check(ort::AddCustomOpDomain(api, options, domain));
  });
}
