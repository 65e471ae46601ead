// libsparsify_tensorrt_static.so is tensorrt_plugin.cpp and this: it registers the plugins when it is loaded, for
// loaders that only call dlopen (Triton's --backend-config=tensorrt,plugins=..., trtexec --staticPlugins). Not for
// IPluginRegistry::loadLibrary, which refuses plugins that are there already. Wants libnvinfer in the process.
#include <NvInferRuntime.h>

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count);

namespace {

[[maybe_unused]] const bool registered = [] {
  int32_t count = 0;
  nvinfer1::IPluginCreatorInterface* const* const creators = getCreators(count);
  bool all = true;
  for (int32_t i = 0; i < count; ++i) all &= getPluginRegistry()->registerCreator(*creators[i], "sparsify");
  return all;
}();

}  // namespace
