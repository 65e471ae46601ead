// Put in front of a kernel by tests/cuda/test_broken.py: threads do not wait for each other.
#pragma once
#include <cuda_runtime.h>

#define __syncthreads() static_cast<void>(0)
