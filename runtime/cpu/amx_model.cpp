// AMX as tiles_model.h describes it, for the tests of machines without tiles. Far slower than anything else.
#define SPARSIFY_TILE_MODEL
#include "amx_kernels.h"

namespace sparsify {
extern const Kernels kAmxModel;
const Kernels kAmxModel = tile_kernels("amx-model");
}  // namespace sparsify
