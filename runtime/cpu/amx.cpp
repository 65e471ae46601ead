// AMX: the processor's own tiles.
#include "amx_kernels.h"

namespace sparsify {
extern const Kernels kAmx;
const Kernels kAmx = tile_kernels("amx");
}  // namespace sparsify
