// What TensorRT's headers want of CUDA's: two types.
#pragma once
#include "cuda_runtime.h"

using cudaEvent_t = struct CUevent_st*;
