// Is this a well-formed sparse weight? Asked once, when a weight enters; the kernels then trust it.
// Each check returns "" or a sentence with what was got and what was wanted. Nothing is read out of bounds.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace sparsify {

using Shape = std::vector<int64_t>;

std::string show(const Shape& shape);  // "[2, 3]"

// Fills rows and cols of `w` from the shapes. `w` must hold n, m, type, values and indices.
std::string check_nm(NmWeight& w, const Shape& values, const Shape& indices, const Shape* bias);

// Fills rows of `w`. `w` must hold cols, type, values, mask and row_start; cols may be -1 where it is not known
// yet (the file does not store it), and is then checked by check_mask_cols before the first use.
std::string check_bitmask(BitmaskWeight& w, const Shape& values, const Shape& mask, const Shape& row_start,
                          const Shape* bias);

// Does a mask with this many bytes a row, and these bits set in any row's last byte, fit `cols` columns?
std::string check_mask_cols(int64_t cols, int64_t mask_bytes, uint8_t last_byte_bits);

uint8_t last_byte_bits(const BitmaskWeight& w, int64_t mask_bytes);

std::string check_x(const Shape& x, int64_t cols);

}  // namespace sparsify
