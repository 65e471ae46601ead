// What the ops of libsparsify_ort.so and libsparsify_ort_cuda.so have in common: calls of the C ABI, and an OrtCustomOp
// made of a class `Kernel` with
//   kName, kProvider (null: the CPU), kTypes (of the inputs before the bias), kBias (its number), kRowsFrom (the input
//   whose first dimension is out_features), name (of the node), w (a weight of kernels.h, checked by the constructor),
//   compute(context, x, tokens, bias, y).
#pragma once
#include <cstdint>
#include <cstring>
#include <exception>
#include <string>
#include <vector>

#include "formats.h"
#include "kernels.h"
#include "ort_abi.h"

namespace sparsify {

inline const OrtApi* api = nullptr;  // set by RegisterCustomOps; the same table for every session

struct Refused {  // carries a status to `guarded`; never leaves the library
  OrtStatus* status;
};

inline void check(OrtStatus* status) {
  if (status) throw Refused{status};
}

inline void refuse_if(const std::string& why) {
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

inline Shape dims_of(const OrtTensorTypeAndShapeInfo* info) {
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

inline Tensor tensor(const OrtValue* value) {
  struct Owned {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    ~Owned() { ort::ReleaseTensorTypeAndShapeInfo(api, info); }
  } owned;
  check(ort::GetTensorTypeAndShape(api, value, &owned.info));
  void* data = nullptr;
  check(ort::GetTensorMutableData(api, const_cast<OrtValue*>(value), &data));
  return {dims_of(owned.info), data};
}

inline std::string node_name(const OrtKernelInfo* info) {
  size_t size = 0;
  if (OrtStatus* status = ort::KernelInfo_GetNodeName(api, info, nullptr, &size)) ort::ReleaseStatus(api, status);
  std::string name(size ? size : 1, '\0');
  check(ort::KernelInfo_GetNodeName(api, info, &name[0], &size));
  name.resize(size ? size - 1 : 0);  // without the final zero
  return name;
}

// Refuses the node that is being created, by name.
inline void refuse(const OrtKernelInfo* info, const std::string& why) {
  if (!why.empty()) refuse_if(node_name(info) + ": " + why);
}

inline Tensor constant(const OrtKernelInfo* info, size_t index, const char* name) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  check(ort::KernelInfoGetConstantInput_tensor(api, info, index, &is_constant, &value));
  if (!is_constant || !value) refuse(info, std::string(name) + " must be an initializer, got a computed input");
  return tensor(value);
}

inline int64_t attribute(const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  check(ort::KernelInfoGetAttribute_int64(api, info, name, &value));
  return value;
}

// For n and m. What does not fit an int is refused by check_nm, and so is its nearest int.
inline int small_attribute(const OrtKernelInfo* info, const char* name) {
  const int64_t value = attribute(info, name);
  return int(value < INT32_MIN ? INT32_MIN : value > INT32_MAX ? INT32_MAX : value);
}

// The elements of a constant input. A file may place them at any offset and ONNX Runtime maps it as it is: what does not
// lie at a multiple of its element's size is copied, once.
template <class T>
class Elements {
 public:
  Elements() = default;
  explicit Elements(const Tensor& tensor) {
    if (reinterpret_cast<uintptr_t>(tensor.data) % sizeof(T) == 0) return;
    size_t count = 1;
    for (const int64_t size : tensor.shape) count *= size_t(size);
    copy_.resize(count);
    std::memcpy(copy_.data(), tensor.data, count * sizeof(T));
  }

  // `now` is where ONNX Runtime has them in this call.
  const T* read(const void* now) const { return copy_.empty() ? static_cast<const T*>(now) : copy_.data(); }

 private:
  std::vector<T> copy_;
};

inline const OrtValue* input(const OrtKernelContext* context, size_t index) {
  size_t count = 0;
  check(ort::KernelContext_GetInputCount(api, context, &count));
  const OrtValue* value = nullptr;
  if (index < count) check(ort::KernelContext_GetInput(api, context, index, &value));
  return value;  // null where an optional input is missing
}

inline const uint8_t* bytes(const OrtKernelContext* context, size_t index) {
  return static_cast<const uint8_t*>(tensor(input(context, index)).data);
}

// x and y are float32; y has x's leading dimensions.
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
  kernel.compute(context, static_cast<const float*>(x.data), tokens, bias, static_cast<float*>(out));
}

// y has x's shape with the last dimension out_features; names of symbolic dimensions are kept.
inline void infer_shape(OrtShapeInferContext* context, size_t rows_from) {
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
    GetExecutionProviderType = [](const OrtCustomOp*) { return Kernel::kProvider; };
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

// What a library's RegisterCustomOps does. ONNX Runtime takes a domain once a session, so a library brings all it has.
inline OrtStatus* register_ops(OrtSessionOptions* options, const OrtApiBase* base,
                               std::vector<const OrtCustomOp*> (*ops)()) {
  const OrtApi* table = base->GetApi(ort::kVersion);
  if (!table) return nullptr;  // older than 1.17: no status can be made; loading the model will name the missing op
  api = table;
  return guarded([&] {
    // Sessions keep pointers to the ops and the domain for as long as they live.
    static OrtCustomOpDomain* const domain = [ops] {
      OrtCustomOpDomain* made = nullptr;
      check(ort::CreateCustomOpDomain(api, "sparsify", &made));
      for (const OrtCustomOp* op : ops()) check(ort::CustomOpDomain_Add(api, made, op));
      return made;
    }();
    check(ort::AddCustomOpDomain(api, options, domain));
  });
}

// The ops on the CPU (ort_ops.cpp); they live forever.
std::vector<const OrtCustomOp*> cpu_ops();

}  // namespace sparsify
