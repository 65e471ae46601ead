// A program that loads TensorRT and the static plugin library as trtexec --staticPlugins and Triton do, by dlopen with
// RTLD_LAZY and RTLD_LOCAL; prints what was registered. For test_tensorrt_plugin.py.
//
//   plugin_host LIBRARY                  without TensorRT in the process
//   plugin_host LIBRARY LIBNVINFER       with it
//
// With -DSPARSIFY_LIBNVINFER this file is that libnvinfer: it has getPluginRegistry, whose registry keeps names.
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <string>

#ifdef SPARSIFY_LIBNVINFER

namespace {

using namespace nvinfer1;

struct Registry final : IPluginRegistry {
  void setErrorRecorder(IErrorRecorder* const) noexcept override {}
  IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
  bool isParentSearchEnabled() const override { return false; }
  void setParentSearchEnabled(bool const) override {}
  PluginLibraryHandle loadLibrary(AsciiChar const*) noexcept override { return nullptr; }
  void deregisterLibrary(PluginLibraryHandle) noexcept override {}
#if NV_TENSORRT_MAJOR < 11
  bool registerCreator(IPluginCreator&, AsciiChar const* const) noexcept override { return false; }
  bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
  IPluginCreator* const* getPluginCreatorList(int32_t* const) const noexcept override { return nullptr; }
  IPluginCreator* getPluginCreator(AsciiChar const* const, AsciiChar const* const,
                                   AsciiChar const* const) noexcept override {
    return nullptr;
  }
#endif
  bool registerCreator(IPluginCreatorInterface& creator, AsciiChar const* const space) noexcept override {
    auto& one = static_cast<IPluginCreatorV3One&>(creator);
    registered += std::string(space) + "::" + one.getPluginName() + " " + one.getPluginVersion() + "\n";
    return true;
  }
  IPluginCreatorInterface* const* getAllCreators(int32_t* const) const noexcept override { return nullptr; }
  IPluginCreatorInterface* getCreator(AsciiChar const* const, AsciiChar const* const,
                                      AsciiChar const* const) noexcept override {
    return nullptr;
  }
  bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return false; }
  IPluginResource* acquirePluginResource(AsciiChar const*, IPluginResource*) noexcept override { return nullptr; }
  int32_t releasePluginResource(AsciiChar const*) noexcept override { return 0; }
  IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t* const) noexcept override { return nullptr; }
  std::string registered;
};

Registry registry;

}  // namespace

extern "C" IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
extern "C" const char* registered() { return registry.registered.c_str(); }

#else

int main(int count, char** given) {
  void* const tensorrt = count > 2 ? dlopen(given[2], RTLD_LAZY | RTLD_LOCAL) : nullptr;
  if ((count > 2 && !tensorrt) || !dlopen(given[1], RTLD_LAZY | RTLD_LOCAL)) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 1;
  }
  if (tensorrt) std::fputs(reinterpret_cast<const char* (*)()>(dlsym(tensorrt, "registered"))(), stdout);
  return 0;
}

#endif
