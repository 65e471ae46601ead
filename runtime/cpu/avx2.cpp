// The kernels of linear.h for this instruction set; the build compiles only this file for it.
#include "simd_avx2.h"

#include "linear.h"

namespace sparsify {

extern const Kernels kAvx2;
const Kernels kAvx2 = make_kernels<Avx2>("avx2");

}  // namespace sparsify
