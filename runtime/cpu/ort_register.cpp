// libsparsify_ort.so: the ops of ort_ops.cpp, for SessionOptions.register_custom_ops_library.
#include "ort_op.h"

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  return sparsify::register_ops(options, base, sparsify::cpu_ops);
}
