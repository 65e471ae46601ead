// Is this a well-formed sparse weight? Asked once, when a weight enters; the kernels then trust it.
// Each check returns "" or a sentence with what was got and what was wanted. Nothing is read out of bounds, and the time
// a check takes is bounded by the bytes that are there, whatever the shapes say.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace sparsify {

using Shape = std::vector<int64_t>;

std::string show(const Shape& shape);  // "[2, 3]"

// The most values a quantised row may keep: sums of products of two 8-bit codes must fit 32 bits.
constexpr int64_t kMostQuantised = int64_t{1} << 17;

// Fills rows of `w`, and cols, which only i4 must bring along: an odd number of values ends in half a byte. `w` must
// hold all else that its type has. `scales` is null for float types, `bias` where there is none.
std::string check_nm(NmWeight& w, const Shape& values, const Shape& indices, const Shape* scales, const Shape* bias);

// Fills rows of `w`, which must hold all else that its type has.
std::string check_bitmask(BitmaskWeight& w, const Shape& values, const Shape& mask, const Shape& row_start,
                          const Shape* scales, const Shape* bias);

// The parts of both that need neither values nor indices or mask: sizes and scales.
std::string check_nm_sizes(const NmWeight& w, const Shape* scales);
std::string check_bitmask_sizes(const BitmaskWeight& w, const Shape* scales);

std::string check_x(const Shape& x, int64_t cols);

}  // namespace sparsify
