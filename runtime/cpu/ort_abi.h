// The part of ONNX Runtime's C ABI that the ops use, declared here because no header ships with the wheel.
//
// OrtApi is a table of function pointers that is append-only ("NEVER remove or rearrange"), so a function is its
// place in the table. Everything below exists since version 17 (ONNX Runtime 1.17). Numbers were counted in the
// released header of version 29; a test compares them with that list.
#pragma once
#include <cstddef>
#include <cstdint>

struct OrtApi {
  void (*entry[275])();  // the first 275 entries, those of version 17
};
struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// Opaque.
struct OrtStatus;
struct OrtValue;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtTensorTypeAndShapeInfo;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtCustomOp;

namespace ort {

constexpr uint32_t kVersion = 17;

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

// Function number `number` of the table: Name(api, arguments...).
template <class Signature>
struct Slot;
template <class Result, class... Args>
struct Slot<Result(Args...)> {
  size_t number;
  Result operator()(const OrtApi* api, Args... args) const {
    return reinterpret_cast<Result (*)(Args...)>(api->entry[number])(args...);
  }
};

using Info = OrtTensorTypeAndShapeInfo;

inline constexpr Slot<OrtStatus*(ErrorCode, const char* message)> CreateStatus{0};
inline constexpr Slot<OrtStatus*(const char* domain, OrtCustomOpDomain**)> CreateCustomOpDomain{26};
inline constexpr Slot<OrtStatus*(OrtCustomOpDomain*, const OrtCustomOp*)> CustomOpDomain_Add{27};
inline constexpr Slot<OrtStatus*(OrtSessionOptions*, OrtCustomOpDomain*)> AddCustomOpDomain{28};
inline constexpr Slot<OrtStatus*(OrtValue*, void** data)> GetTensorMutableData{51};
inline constexpr Slot<OrtStatus*(Info**)> CreateTensorTypeAndShapeInfo{57};
inline constexpr Slot<OrtStatus*(Info*, ElementType)> SetTensorElementType{58};
inline constexpr Slot<OrtStatus*(Info*, const int64_t* dims, size_t rank)> SetDimensions{59};
inline constexpr Slot<OrtStatus*(const Info*, size_t* rank)> GetDimensionsCount{61};
inline constexpr Slot<OrtStatus*(const Info*, int64_t* dims, size_t rank)> GetDimensions{62};
inline constexpr Slot<OrtStatus*(const Info*, const char** names, size_t rank)> GetSymbolicDimensions{63};
inline constexpr Slot<OrtStatus*(const OrtValue*, Info**)> GetTensorTypeAndShape{65};
inline constexpr Slot<OrtStatus*(const OrtKernelInfo*, const char* name, int64_t*)> KernelInfoGetAttribute_int64{86};
inline constexpr Slot<OrtStatus*(const OrtKernelContext*, size_t* count)> KernelContext_GetInputCount{88};
inline constexpr Slot<OrtStatus*(const OrtKernelContext*, size_t index, const OrtValue**)> KernelContext_GetInput{90};
inline constexpr Slot<OrtStatus*(OrtKernelContext*, size_t index, const int64_t* dims, size_t rank, OrtValue**)>
    KernelContext_GetOutput{91};
inline constexpr Slot<void(OrtStatus*)> ReleaseStatus{93};
inline constexpr Slot<void(Info*)> ReleaseTensorTypeAndShapeInfo{99};
inline constexpr Slot<OrtStatus*(const OrtKernelContext*, void** stream)> KernelContext_GetGPUComputeStream{193};
inline constexpr Slot<OrtStatus*(const OrtKernelInfo*, char* name, size_t* size)> KernelInfo_GetNodeName{244};
inline constexpr Slot<OrtStatus*(const OrtKernelInfo*, size_t index, int* is_constant, const OrtValue**)>
    KernelInfoGetConstantInput_tensor{249};
inline constexpr Slot<OrtStatus*(const OrtShapeInferContext*, size_t index, Info**)>  // borrowed, never released
    ShapeInferContext_GetInputTypeShape{268};
inline constexpr Slot<OrtStatus*(const OrtShapeInferContext*, size_t index, const Info*)>
    ShapeInferContext_SetOutputTypeShape{270};
inline constexpr Slot<OrtStatus*(Info*, const char** names, size_t rank)> SetSymbolicDimensions{271};
inline constexpr Slot<OrtStatus*(const OrtKernelContext*, void (*task)(void*, size_t), size_t count, size_t batches,
                                 void* arg)>
    KernelContext_ParallelFor{274};

}  // namespace ort

// The order of the members is the ABI. Members that stay null are declared as plain pointers.
struct OrtCustomOp {
  uint32_t version;
  void* CreateKernel;
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  ort::ElementType (*GetInputType)(const OrtCustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  ort::ElementType (*GetOutputType)(const OrtCustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void* KernelCompute;
  void (*KernelDestroy)(void* kernel);
  ort::Characteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t index);
  ort::Characteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t index);
  int (*GetInputMemoryType)(const OrtCustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext*);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  void* after_version_17[4];  // GetMayInplace, ReleaseMayInplace, GetAliasMap, ReleaseAliasMap
};
