// AMX as tiles_model.h describes it, for the tests of machines without tiles. Far slower than anything else.
#ifndef SPARSIFY_TILE_MODEL
#define SPARSIFY_TILE_MODEL
#endif
#include "amx_kernels.h"

namespace sparsify {
extern const Kernels kAmxModel;
const Kernels kAmxModel = tile_kernels("amx-model");
}  // namespace sparsify
