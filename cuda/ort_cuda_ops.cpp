// libsparsify_ort_cuda.so: linear_nm (2:4) and linear_bitmask of the domain sparsify for ONNX Runtime's CUDA execution
// provider, values float32, float16 or bfloat16; and all ops of libsparsify_ort.so for the CPU, because a session takes
// a domain from one library only. Where both providers have an op, the order of the session's providers counts.
//
// Everything is in the GPU's memory: the provider moves weights there before the kernels are made. What the kernels
// trust, indices or mask and row starts, is read back once, when the session is made, and checked as on the CPU.
#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "../runtime/cpu/ort_op.h"
#include "kernels.h"

namespace {

using namespace sparsify;

#ifdef SPARSIFY_EMULATED  // cuda/emulate: the GPU's memory is the CPU's, whose provider has no stream
constexpr const char* kCuda = nullptr;
#else
constexpr const char* kCuda = "CUDAExecutionProvider";
#endif
#if defined(SPARSIFY_EMULATED) && !defined(SPARSIFY_WANTS_STREAM)
constexpr bool kWantsStream = false;
#else
constexpr bool kWantsStream = true;
#endif

constexpr ort::ElementType value_type(DType type) {
  return type == DType::f32 ? ort::kFloat : type == DType::f16 ? ort::kFloat16 : ort::kBfloat16;
}

void check_cuda(cudaError_t status, const std::string& name) {
  if (status != cudaSuccess) refuse_if(name + ": CUDA error " + std::to_string(int(status)));
}

// A copy in the CPU's memory, wherever the tensor is.
template <class T>
std::vector<T> on_cpu(const Tensor& tensor, const std::string& name) {
  size_t count = 1;
  for (const int64_t size : tensor.shape) count *= size_t(size);
  std::vector<T> copy(count);
  check_cuda(cudaMemcpy(copy.data(), tensor.data, count * sizeof(T), cudaMemcpyDefault), name);
  return copy;
}

// CUDA's legacy stream is null too, but what runs there is not in order with the provider's other kernels, whose stream
// does not wait for it: a result might be read before it is written.
cudaStream_t stream_of(const OrtKernelContext* context, const std::string& name) {
  void* stream = nullptr;
  check(ort::KernelContext_GetGPUComputeStream(api, context, &stream));
  if (kWantsStream && !stream) refuse_if(name + ": ONNX Runtime gave no CUDA stream to run on");
  return static_cast<cudaStream_t>(stream);
}

constexpr sparsify_cuda::DType f32 = sparsify_cuda::DType::f32;  // of x and y
constexpr sparsify_cuda::DType cuda_type(DType type) { return sparsify_cuda::DType(int32_t(type)); }

// linear_nm(x, values, indices, bias?)
template <DType type>
struct NmKernel {
  static constexpr const char* kName = "linear_nm";
  static constexpr const char* kProvider = kCuda;
  static constexpr ort::ElementType kTypes[] = {ort::kFloat, value_type(type), ort::kUint8};
  static constexpr size_t kBias = 3;
  static constexpr size_t kRowsFrom = 1;

  std::string name;
  NmWeight w{};  // its pointers are null after the constructor

  explicit NmKernel(const OrtKernelInfo* info) : name(node_name(info)) {
    const Tensor values = constant(info, 1, "values"), indices = constant(info, 2, "indices");
    const std::vector<uint8_t> copy = on_cpu<uint8_t>(indices, name);
    w = {0, 0, small_attribute(info, "n"), small_attribute(info, "m"), type, nullptr, copy.data(), nullptr, 0};
    if (w.n != 2 || w.m != 4)
      refuse(info, "the GPU kernels have n = 2 with m = 4, got n = " + std::to_string(w.n) +
                       " and m = " + std::to_string(w.m));
    refuse(info, check_nm(w, values.shape, indices.shape, nullptr, nullptr));
    w.indices = nullptr;
  }

  void compute(const OrtKernelContext* context, const float* x, int64_t tokens, const float* bias, float* y) const {
    check_cuda(sparsify_cuda::sparsify_spmm_24(f32, cuda_type(type), x, bytes(context, 1), bytes(context, 2), bias, y,
                                               tokens, w.rows, w.cols, stream_of(context, name)),
               name);
  }
};

// linear_bitmask(x, values, mask, row_start, bias?)
template <DType type>
struct BitmaskKernel {
  static constexpr const char* kName = "linear_bitmask";
  static constexpr const char* kProvider = kCuda;
  static constexpr ort::ElementType kTypes[] = {ort::kFloat, value_type(type), ort::kUint8, ort::kInt64};
  static constexpr size_t kBias = 4;
  static constexpr size_t kRowsFrom = 2;

  std::string name;
  BitmaskWeight w{};  // its pointers are null after the constructor

  explicit BitmaskKernel(const OrtKernelInfo* info) : name(node_name(info)) {
    const Tensor values = constant(info, 1, "values"), mask = constant(info, 2, "mask"),
                 row_start = constant(info, 3, "row_start");
    const std::vector<uint8_t> bits = on_cpu<uint8_t>(mask, name);
    const std::vector<int64_t> starts = on_cpu<int64_t>(row_start, name);
    w = {0, attribute(info, "in_features"), type, nullptr, bits.data(), starts.data(), nullptr, 0};
    refuse(info, check_bitmask(w, values.shape, mask.shape, row_start.shape, nullptr, nullptr));
    w.mask = nullptr;
    w.row_start = nullptr;
  }

  void compute(const OrtKernelContext* context, const float* x, int64_t tokens, const float* bias, float* y) const {
    const auto* row_start = static_cast<const int64_t*>(tensor(input(context, 3)).data);
    cudaStream_t const stream = stream_of(context, name);
    check_cuda(sparsify_cuda::sparsify_spmm_bitmask(f32, cuda_type(type), x, bytes(context, 1), bytes(context, 2),
                                                    row_start, bias, y, tokens, w.rows, w.cols, stream),
               name);
  }
};

std::vector<const OrtCustomOp*> all_ops() {
  static const Op<NmKernel<DType::f32>> nm_f32;
  static const Op<NmKernel<DType::f16>> nm_f16;
  static const Op<NmKernel<DType::bf16>> nm_bf16;
  static const Op<BitmaskKernel<DType::f32>> bitmask_f32;
  static const Op<BitmaskKernel<DType::f16>> bitmask_f16;
  static const Op<BitmaskKernel<DType::bf16>> bitmask_bf16;
  std::vector<const OrtCustomOp*> ops = {&nm_f32, &nm_f16, &nm_bf16, &bitmask_f32, &bitmask_f16, &bitmask_bf16};
#ifndef SPARSIFY_EMULATED  // there they would be the same ops twice
  for (const OrtCustomOp* op : cpu_ops()) ops.push_back(op);
#endif
  return ops;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  return register_ops(options, base, all_ops);
}
