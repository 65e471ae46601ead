// The kernels of linear.h for this instruction set; the build compiles only this file for it.
#include "simd_avx512.h"

#include "linear.h"

namespace sparsify {

extern const Kernels kAvx512;
const Kernels kAvx512 = make_kernels<Avx512>("avx512");

}  // namespace sparsify
