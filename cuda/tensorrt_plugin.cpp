// libsparsify_tensorrt.so: the ops linear_bitmask and linear_nm (2:4) of the domain sparsify as TensorRT plugins
// (IPluginV3), version "1", namespace "sparsify"; for TensorRT 10.15 or newer and 11.
//
//              inputs                                                                        fields (ONNX: attributes)
//   linear_bitmask  x [..., K], values [nnz], mask, row_start [N + 1] INT64, bias [N] FP32   in_features = K
//   linear_nm       x [..., K], values [N, K / 2], indices, bias [N] FP32                    n = 2, m = 4
//
// One output, y [..., N] of x's type. x and values: both FP16, both BF16, or FP32 with any of the three. The bias may
// be left out; whether it is there is kept in the plan as a field of ours, `bias` (0 or 1). TensorRT's plugins know no
// UINT8: mask and indices come as INT32 [words], the bytes of kernels.h in their order, with zeros behind them up to a whole word. Weights are network constants and trusted, as the kernels do.
//
// Loaded by IPluginRegistry::loadLibrary (trtexec --dynamicPlugins), which asks for getCreators; needs no symbol of
// TensorRT. tensorrt_register.cpp is for loaders that only call dlopen.
#include <NvInferRuntime.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>

#include "kernels.h"

#define SPARSIFY_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace nvinfer1;
using sparsify_cuda::DType;

constexpr char kVersion[] = "1";
constexpr char kNamespace[] = "sparsify";
constexpr char kBias[] = "bias";

std::atomic<ILoggerFinder*> logger_finder{nullptr};

void complain(const std::string& why) noexcept {
  ILoggerFinder* const finder = logger_finder;
  ILogger* const logger = finder ? finder->findLogger() : nullptr;
  if (logger)
    logger->log(ILogger::Severity::kERROR, why.c_str());
  else
    std::fprintf(stderr, "%s\n", why.c_str());
}

std::string show(const Dims& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) text += (i ? ", " : "") + std::to_string(dims.d[i]);
  return text + "]";
}

// A size is -1 while it is not known, and then not asked about.
bool may_be(int64_t got, int64_t wanted) { return got < 0 || wanted < 0 || got == wanted; }

bool type_of(DataType type, DType& ours) {
  switch (type) {
    case DataType::kFLOAT: ours = DType::f32; return true;
    case DataType::kHALF: ours = DType::f16; return true;
    case DataType::kBF16: ours = DType::bf16; return true;
    default: return false;
  }
}

// What differs between the two ops. Both have ceil(K / 8) bytes a row of mask or of indices.
struct Bitmask {
  static constexpr char kName[] = "linear_bitmask";
  static constexpr int32_t kWeights = 3;  // tensors: values, mask, row_start
  static constexpr std::array<const char*, 1> kFields = {"in_features"};

  static const char* refuse(const std::array<int32_t, 1>& fields) {
    return fields[0] >= 0 ? nullptr : "in_features must not be negative";
  }
  static int64_t columns(const std::array<int32_t, 1>& fields, const PluginTensorDesc*) { return fields[0]; }
  static int64_t rows(const PluginTensorDesc* in) { return in[3].dims.d[0] < 0 ? -1 : in[3].dims.d[0] - 1; }
  static const IDimensionExpr* rows(const DimsExprs* in, IExprBuilder& build) {
    return build.operation(DimensionOperation::kSUB, *in[3].d[0], *build.constant(1));
  }
  static bool is_values(const Dims& dims) { return dims.nbDims == 1; }
  static constexpr char kValues[] = "[nnz]";
  static constexpr char kPacked[] = "mask";
  static constexpr char kLast[] = "row_start";
  static cudaError_t run(DType x_type, DType w_type, void const* const* in, const float* bias, void* y, int64_t M,
                         int64_t N, int64_t K, cudaStream_t stream) {
    return sparsify_cuda::sparsify_spmm_bitmask(x_type, w_type, in[0], in[1], static_cast<const uint8_t*>(in[2]),
                                                static_cast<const int64_t*>(in[3]), bias, y, M, N, K, stream);
  }
};

struct TwoFour {
  static constexpr char kName[] = "linear_nm";
  static constexpr int32_t kWeights = 2;  // values, indices
  static constexpr std::array<const char*, 2> kFields = {"n", "m"};

  static const char* refuse(const std::array<int32_t, 2>& fields) {
    return fields[0] == 2 && fields[1] == 4 ? nullptr : "the GPU kernels have n = 2 with m = 4 only";
  }
  static int64_t columns(const std::array<int32_t, 2>&, const PluginTensorDesc* in) {
    return in[1].dims.d[1] < 0 ? -1 : in[1].dims.d[1] * 2;
  }
  static int64_t rows(const PluginTensorDesc* in) { return in[1].dims.d[0]; }
  static const IDimensionExpr* rows(const DimsExprs* in, IExprBuilder&) { return in[1].d[0]; }
  static bool is_values(const Dims& dims) { return dims.nbDims == 2 && (dims.d[1] < 0 || dims.d[1] % 2 == 0); }
  static constexpr char kValues[] = "[N, K / 2] with K a multiple of 4";
  static constexpr char kPacked[] = "indices";
  static constexpr char kLast[] = "indices";
  static cudaError_t run(DType x_type, DType w_type, void const* const* in, const float* bias, void* y, int64_t M,
                         int64_t N, int64_t K, cudaStream_t stream) {
    return sparsify_cuda::sparsify_spmm_24(x_type, w_type, in[0], in[1], static_cast<const uint8_t*>(in[2]), bias, y, M,
                                           N, K, stream);
  }
};

template <class Op>
class SparseLinear final : public IPluginV3,
                           public IPluginV3OneCore,
                           public IPluginV3OneBuild,
                           public IPluginV3OneRuntime {
 public:
  using Fields = std::array<int32_t, Op::kFields.size()>;

  SparseLinear(const Fields& fields, int32_t has_bias) : fields_(fields), has_bias_(has_bias) {
    for (size_t i = 0; i < fields_.size(); ++i) {
      serialised_[i] = PluginField(Op::kFields[i], &fields_[i], PluginFieldType::kINT32, 1);
      state_ += (i ? ", " : "") + (Op::kFields[i] + (" = " + std::to_string(fields_[i])));
    }
    serialised_.back() = PluginField(kBias, &has_bias_, PluginFieldType::kINT32, 1);
    collection_ = {int32_t(serialised_.size()), serialised_.data()};
  }
  SparseLinear(const SparseLinear&) = delete;  // serialised_ points into the object: see clone

  // ---- IPluginV3
  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }
  IPluginV3* clone() noexcept override {
    try {
      return new SparseLinear(fields_, has_bias_);
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }

  // ---- Core
  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }

  // ---- Build
  int32_t getNbOutputs() const noexcept override { return 1; }

  int32_t getOutputDataTypes(DataType* outputs, int32_t, const DataType* inputs, int32_t) const noexcept override {
    outputs[0] = inputs[0];
    return 0;
  }

  int32_t getOutputShapes(const DimsExprs* in, int32_t count, const DimsExprs*, int32_t, DimsExprs* out, int32_t,
                          IExprBuilder& build) noexcept override {
    if (!takes(count)) return 1;
    if (in[0].nbDims < 1) return refuse("x must have at least one dimension, got a scalar");
    for (int32_t i = 1; i < count; ++i)
      if (in[i].nbDims < 1) return refuse("input " + std::to_string(i) + " must not be a scalar");
    out[0] = in[0];
    out[0].d[in[0].nbDims - 1] = Op::rows(in, build);
    return 0;
  }

  bool supportsFormatCombination(int32_t at, const DynamicPluginTensorDesc* all, int32_t inputs,
                                 int32_t) noexcept override {
    const PluginTensorDesc& mine = all[at].desc;
    if (mine.format != TensorFormat::kLINEAR) return false;
    DType ours;
    if (at == inputs) return mine.type == all[0].desc.type;  // y
    if (at == 0) return type_of(mine.type, ours);            // x
    const DataType x = all[0].desc.type;
    if (at == 1) return type_of(mine.type, ours) && (mine.type == x || x == DataType::kFLOAT);
    if (at == 2) return mine.type == DataType::kINT32;             // mask or indices
    if (at <= Op::kWeights) return mine.type == DataType::kINT64;  // row_start
    return mine.type == DataType::kFLOAT;                          // bias
  }

  int32_t configurePlugin(const DynamicPluginTensorDesc* in, int32_t count, const DynamicPluginTensorDesc*,
                          int32_t) noexcept override {
    if (!takes(count)) return 1;
    has_bias_ = count == Op::kWeights + 2;
    PluginTensorDesc now[Op::kWeights + 2];
    for (int32_t i = 0; i < count; ++i) now[i] = in[i].desc;
    return check(now, count);
  }

  const char* getTimingCacheID() noexcept override { return state_.c_str(); }
  const char* getMetadataString() noexcept override { return state_.c_str(); }

  // ---- Runtime
  int32_t onShapeChange(const PluginTensorDesc* in, int32_t count, const PluginTensorDesc*, int32_t) noexcept override {
    if (!takes(count)) return 1;
    has_bias_ = count == Op::kWeights + 2;
    return check(in, count);
  }

  int32_t enqueue(const PluginTensorDesc* in, const PluginTensorDesc*, void const* const* inputs, void* const* outputs,
                  void*, cudaStream_t stream) noexcept override {
    DType x_type, w_type;
    if (!type_of(in[0].type, x_type) || !type_of(in[1].type, w_type)) return refuse("a type that the kernels lack");
    int64_t tokens = 1;
    for (int32_t i = 0; i + 1 < in[0].dims.nbDims; ++i) tokens *= in[0].dims.d[i];
    const float* bias = has_bias_ ? static_cast<const float*>(inputs[Op::kWeights + 1]) : nullptr;
    const cudaError_t status = Op::run(x_type, w_type, inputs, bias, outputs[0], tokens, Op::rows(in),
                                       Op::columns(fields_, in), stream);
    return status == cudaSuccess ? 0 : refuse("the kernel's launch failed with CUDA error " + std::to_string(status));
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }  // nothing to share
  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  static int32_t refuse(const std::string& why) noexcept {
    complain(std::string("sparsify::") + Op::kName + ": " + why);
    return 1;
  }

  static bool takes(int32_t count) noexcept {
    if (count == Op::kWeights + 1 || count == Op::kWeights + 2) return true;
    refuse("wants " + std::to_string(Op::kWeights + 1) + " inputs, or one more with a bias, got " +
           std::to_string(count));
    return false;
  }

  // Do the shapes belong together? Returns 0, or complains.
  int32_t check(const PluginTensorDesc* in, int32_t count) const noexcept {
    const Dims &x = in[0].dims, &values = in[1].dims, &packed = in[2].dims, &last = in[Op::kWeights].dims;
    if (!Op::is_values(values))
      return refuse("values must have shape " + std::string(Op::kValues) + ", got " + show(values));
    if (last.nbDims != 1) return refuse(std::string(Op::kLast) + " must have one dimension, got " + show(last));
    const int64_t N = Op::rows(in), K = Op::columns(fields_, in);
    if (x.nbDims < 1 || !may_be(x.d[x.nbDims - 1], K))
      return refuse("x must have shape [..., " + std::to_string(K) + "] to match the weight, got " + show(x));
    const int64_t words = N < 0 || K < 0 ? -1 : (N * ((K + 7) / 8) + 3) / 4;
    if (packed.nbDims != 1 || !may_be(packed.d[0], words))
      return refuse(std::string(Op::kPacked) + " must have shape [" + std::to_string(words) +
                    "], words of INT32, got " + show(packed));
    if (count == Op::kWeights + 2) {
      const Dims& bias = in[Op::kWeights + 1].dims;
      if (bias.nbDims != 1 || !may_be(bias.d[0], N))
        return refuse("bias must have shape [" + std::to_string(N) + "], got " + show(bias));
    }
    return 0;
  }

  Fields fields_;
  int32_t has_bias_;  // known when the plugin is configured; cloned and serialised
  std::array<PluginField, Op::kFields.size() + 1> serialised_;
  PluginFieldCollection collection_;
  std::string state_;
};

template <class Op>
class Creator final : public IPluginCreatorV3One {
 public:
  Creator() {
    for (size_t i = 0; i < fields_.size(); ++i)
      fields_[i] = PluginField(Op::kFields[i], nullptr, PluginFieldType::kINT32, 1);
    collection_ = {int32_t(fields_.size()), fields_.data()};
  }

  const char* getPluginName() const noexcept override { return Op::kName; }
  const char* getPluginVersion() const noexcept override { return kVersion; }
  const char* getPluginNamespace() const noexcept override { return kNamespace; }
  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }

  IPluginV3* createPlugin(const char* name, const PluginFieldCollection* given, TensorRTPhase) noexcept override {
    try {
      const std::string node = std::string("sparsify::") + Op::kName + " " + (name ? name : "");
      typename SparseLinear<Op>::Fields fields;
      for (size_t i = 0; i < fields.size(); ++i) {
        if (find(given, Op::kFields[i], fields[i])) continue;
        complain(node + ": wants the field " + Op::kFields[i] + " with one INT32, got none");
        return nullptr;
      }
      if (const char* why = Op::refuse(fields)) {
        complain(node + ": " + why);
        return nullptr;
      }
      int32_t has_bias = 0;  // a node does not say; a plan does
      find(given, kBias, has_bias);
      return new SparseLinear<Op>(fields, has_bias);
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
  }

 private:
  static bool find(const PluginFieldCollection* given, const char* name, int32_t& value) {
    for (int32_t i = 0; given && i < given->nbFields; ++i) {
      const PluginField& field = given->fields[i];
      if (std::strcmp(field.name, name) != 0 || field.type != PluginFieldType::kINT32 || field.length != 1) continue;
      std::memcpy(&value, field.data, sizeof value);
      return true;
    }
    return false;
  }

  std::array<PluginField, Op::kFields.size()> fields_;
  PluginFieldCollection collection_;
};

}  // namespace

SPARSIFY_EXPORT void setLoggerFinder(ILoggerFinder* finder) { logger_finder = finder; }

SPARSIFY_EXPORT IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static Creator<Bitmask> bitmask;
  static Creator<TwoFour> two_four;
  static IPluginCreatorInterface* const all[] = {&bitmask, &two_four};
  count = 2;
  return all;
}
