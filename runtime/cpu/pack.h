// From a dense float32 weight to the layouts of kernels.h, and back.
//
// A row is packed by one thread, so results do not depend on how many there are. A call that can fail returns "" or a
// sentence about the first row that does not fit; what it has written by then means nothing.
//
//   rounding       f16 and bf16 to nearest, ties to even; what rounds to zero becomes +0.0, what is kept stays kept
//   quantisation   code = weight / scale rounded to nearest, ties to even, within -127..127 (i8) or -7..7 (i4);
//                  0 where the scale is 0
#pragma once
#include <string>

#include "kernels.h"

namespace sparsify {

// The scales of a dense weight [rows, cols]: the largest |weight| of a row over 127, or of a group over 7, rounded to
// float16. 0 for nothing but zeros; never 0 otherwise: then the smallest positive number of the type.
std::string find_scales(const float* dense, int64_t rows, int64_t cols, DType type, int64_t group, void* scales,
                        const Parallel& parallel);

// Writes the two arrays. `w` holds all the rest: sizes, type, and scales where it is quantised.
std::string pack_nm(const float* dense, const NmWeight& w, void* values, uint8_t* indices, const Parallel& parallel);

// First pass: which weights are kept, and where each row's values begin.
void find_mask(const float* dense, int64_t rows, int64_t cols, DType type, uint8_t* mask, int64_t* row_start,
               const Parallel& parallel);

// Second pass: writes the values of `w`, which holds all the rest.
std::string pack_bitmask(const float* dense, const BitmaskWeight& w, void* values, const Parallel& parallel);

// The dense weight, of a weight that has passed formats.h.
void unpack_nm(const NmWeight& w, float* dense, const Parallel& parallel);
void unpack_bitmask(const BitmaskWeight& w, float* dense, const Parallel& parallel);

}  // namespace sparsify
