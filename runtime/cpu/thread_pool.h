// Persistent worker threads for the Python module. (Inside ONNX Runtime its own pool is used instead.)
#pragma once
#include "kernels.h"

namespace sparsify {

// A Parallel that shares tasks among `num_threads()` threads, the calling one included.
Parallel thread_pool();

void set_num_threads(int threads);  // threads >= 1; takes effect with the next op
int num_threads();

}  // namespace sparsify
