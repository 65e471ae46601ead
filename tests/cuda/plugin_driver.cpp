// Takes a TensorRT plugin through its life as TensorRT does, on the CPU, with the emulated kernels: for
// test_tensorrt_plugin.py. The expression builder is a double: sizes are known numbers.
#include <NvInferRuntime.h>

#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

namespace {

struct Number final : IDimensionExpr, apiv::VDimensionExpr {
  explicit Number(int64_t value) : value(value) { mImpl = this; }
  bool isConstant() const override { return true; }
  int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
  int64_t value;
};

struct Builder final : IExprBuilder, apiv::VExprBuilder {
  Builder() { mImpl = this; }
  const IDimensionExpr* constant(int64_t value) override { return &numbers.emplace_back(value); }
  const IDimensionExpr* operation(DimensionOperation op, const IDimensionExpr& a, const IDimensionExpr& b) override {
    return op == DimensionOperation::kSUB ? constant(a.getConstantValue() - b.getConstantValue()) : nullptr;
  }
  const IDimensionExpr* declareSizeTensor(int32_t, const IDimensionExpr&, const IDimensionExpr&) override {
    return nullptr;
  }
  std::deque<Number> numbers;
};

struct Logger final : ILogger {
  void log(Severity, const char* message) noexcept override { said += std::string(message) + "\n"; }
  std::string said;
} logger;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &logger; }
} finder;

IPluginCreatorV3One* creator_of(const char* name) {
  int32_t count = 0;
  IPluginCreatorInterface* const* const all = getCreators(count);
  for (int32_t i = 0; i < count; ++i) {
    auto* const creator = static_cast<IPluginCreatorV3One*>(all[i]);
    if (std::strcmp(creator->getPluginName(), name) == 0) return creator;
  }
  return nullptr;
}

template <class Capability>
Capability& as(IPluginV3& plugin, PluginCapabilityType type) {
  return *static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

struct Tensor {  // mirrored by ctypes
  int32_t type, rank;
  int64_t dims[8];
  const void* data;
};

PluginTensorDesc describe(const Tensor& tensor, bool known) {
  PluginTensorDesc desc{};
  desc.type = DataType(tensor.type);
  desc.format = TensorFormat::kLINEAR;
  desc.scale = -1.0f;
  desc.dims.nbDims = tensor.rank;
  for (int32_t i = 0; i < tensor.rank; ++i) desc.dims.d[i] = known || i + 1 == tensor.rank ? tensor.dims[i] : -1;
  return desc;
}

}  // namespace

// What was logged since the last call.
extern "C" const char* driver_log() {
  static std::string last;
  last.swap(logger.said);
  logger.said.clear();
  return last.c_str();
}

extern "C" const char* driver_names(const char* op) {
  static std::string all;
  IPluginCreatorV3One& creator = *creator_of(op);
  all = std::string(creator.getPluginNamespace()) + "::" + creator.getPluginName() + " " + creator.getPluginVersion();
  for (int32_t i = 0; i < creator.getFieldNames()->nbFields; ++i)
    all += std::string(" ") + creator.getFieldNames()->fields[i].name;
  return all.c_str();
}

// Returns "" or where it stopped. tell_shapes: call onShapeChange before the run.
// `y` holds the type and data to be written; its shape is filled in.
extern "C" const char* driver_run(const char* op, const char* const* fields, const int32_t* numbers, int32_t nb_fields,
                                  const Tensor* inputs, int32_t count, Tensor* y, int32_t tell_shapes) {
  setLoggerFinder(&finder);
  IPluginCreatorV3One& creator = *creator_of(op);

  std::vector<PluginField> given;
  for (int32_t i = 0; i < nb_fields; ++i)
    given.emplace_back(fields[i], &numbers[i], PluginFieldType::kINT32, 1);
  const PluginFieldCollection collection{nb_fields, given.data()};
  std::unique_ptr<IPluginV3> built(creator.createPlugin("node", &collection, TensorRTPhase::kBUILD));
  if (!built) return "createPlugin";
  built.reset(std::unique_ptr<IPluginV3>(std::move(built))->clone());
  auto& core = as<IPluginV3OneCore>(*built, PluginCapabilityType::kCORE);
  if (std::strcmp(core.getPluginName(), creator.getPluginName()) || std::strcmp(core.getPluginVersion(), "1") ||
      std::strcmp(core.getPluginNamespace(), creator.getPluginNamespace()))
    return "names";

  auto& build = as<IPluginV3OneBuild>(*built, PluginCapabilityType::kBUILD);
  DataType type;
  std::vector<DataType> types;
  for (int32_t i = 0; i < count; ++i) types.push_back(DataType(inputs[i].type));
  if (build.getNbOutputs() != 1 || build.getOutputDataTypes(&type, 1, types.data(), count)) return "getOutputDataTypes";
  if (type != DataType(y->type)) return "type";

  Builder builder;
  std::vector<DimsExprs> dims(size_t(count) + 1);
  for (int32_t i = 0; i < count; ++i) {
    dims[size_t(i)].nbDims = inputs[i].rank;
    for (int32_t j = 0; j < inputs[i].rank; ++j) dims[size_t(i)].d[j] = builder.constant(inputs[i].dims[j]);
  }
  if (build.getOutputShapes(dims.data(), count, nullptr, 0, &dims[size_t(count)], 1, builder)) return "getOutputShapes";
  y->rank = dims[size_t(count)].nbDims;
  for (int32_t j = 0; j < y->rank; ++j) y->dims[j] = dims[size_t(count)].d[j]->getConstantValue();

  std::vector<PluginTensorDesc> now;
  std::vector<DynamicPluginTensorDesc> open;
  for (int32_t i = 0; i <= count; ++i) {
    const Tensor& tensor = i < count ? inputs[i] : *y;
    now.push_back(describe(tensor, true));
    open.push_back({describe(tensor, i > 0 && i < count), now.back().dims, now.back().dims, now.back().dims});
  }
  for (int32_t i = 0; i <= count; ++i)
    if (!build.supportsFormatCombination(i, open.data(), count, 1)) return "supportsFormatCombination";
  if (build.configurePlugin(open.data(), count, &open[size_t(count)], 1)) return "configurePlugin";
  if (build.getWorkspaceSize(open.data(), count, &open[size_t(count)], 1) != 0) return "getWorkspaceSize";

  built.reset(std::unique_ptr<IPluginV3>(std::move(built))->clone());  // what was configured is cloned

  // Into the plan and out of it again, where the strings and numbers have other addresses.
  const PluginFieldCollection* kept = as<IPluginV3OneRuntime>(*built, PluginCapabilityType::kRUNTIME).getFieldsToSerialize();
  std::deque<std::string> names;
  std::deque<int32_t> values;
  std::vector<PluginField> read;
  for (int32_t i = 0; i < kept->nbFields; ++i)
    read.emplace_back(names.emplace_back(kept->fields[i].name).c_str(),
                      &values.emplace_back(*static_cast<const int32_t*>(kept->fields[i].data)), kept->fields[i].type,
                      kept->fields[i].length);
  built.reset();
  const PluginFieldCollection stored{int32_t(read.size()), read.data()};
  std::unique_ptr<IPluginV3> loaded(creator.createPlugin("node", &stored, TensorRTPhase::kRUNTIME));
  if (!loaded) return "createPlugin at run time";
  std::unique_ptr<IPluginV3> attached(
      as<IPluginV3OneRuntime>(*loaded, PluginCapabilityType::kRUNTIME).attachToContext(nullptr));
  loaded.reset();
  auto& runtime = as<IPluginV3OneRuntime>(*attached, PluginCapabilityType::kRUNTIME);
  if (tell_shapes && runtime.onShapeChange(now.data(), count, &now[size_t(count)], 1)) return "onShapeChange";
  std::vector<const void*> data;
  for (int32_t i = 0; i < count; ++i) data.push_back(inputs[i].data);
  void* const out = const_cast<void*>(y->data);
  if (runtime.enqueue(now.data(), &now[size_t(count)], data.data(), &out, nullptr, nullptr)) return "enqueue";
  return "";
}
