// libsparsify_tensorrt_static.so is tensorrt_plugin.cpp and this: it registers the plugins when it is loaded, for
// loaders that only call dlopen (Triton's --backend-config=tensorrt,plugins=..., trtexec --staticPlugins). Not for
// IPluginRegistry::loadLibrary, which refuses plugins that are there already.
//
// Wants libnvinfer in the process, but links none: which one is the host's affair. Such hosts load it, and this, with
// RTLD_LOCAL, so its symbols are not found by name; it is asked for where it already lies (RTLD_NOLOAD).
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <string>

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

nvinfer1::IPluginRegistry* find_registry() {
  const std::string major = std::to_string(NV_TENSORRT_MAJOR);
  for (const char* library : {"libnvinfer.so.", "libnvinfer_lean.so.", "libnvinfer_dispatch.so."}) {
    void* const loaded = dlopen((library + major).c_str(), RTLD_LAZY | RTLD_NOLOAD);  // stays, with our creators
    void* const get = loaded ? dlsym(loaded, "getPluginRegistry") : nullptr;
    if (get) return reinterpret_cast<nvinfer1::IPluginRegistry* (*)()>(get)();
  }
  std::fprintf(stderr, "sparsify: found no libnvinfer.so.%s in this process; load TensorRT before the plugins\n",
               major.c_str());
  return nullptr;
}

[[maybe_unused]] const bool registered = [] {
  nvinfer1::IPluginRegistry* const registry = find_registry();
  if (!registry) return false;
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
  bool all = true;
  for (int32_t i = 0; i < count; ++i) all &= registry->registerCreator(*creators[i], "sparsify");
  if (!all) std::fprintf(stderr, "sparsify: TensorRT refused a plugin; were they registered before?\n");
  return all;
}();

}  // namespace
