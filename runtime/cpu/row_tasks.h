// How the rows of W are cut into tasks where memory is the limit.
#pragma once
#include "kernels.h"

namespace sparsify { namespace {

inline int64_t weight_bytes(const NmWeight& w) { return w.rows * (w.value_bytes_per_row() + w.index_bytes_per_row()); }
inline int64_t weight_bytes(const BitmaskWeight& w) {
  return stored_bytes(w.type, w.row_start[w.rows]) + w.rows * w.mask_bytes_per_row();
}

// Bytes of weights that one task reads: a sixteenth of all, but not so little that a task is over at once, nor so much
// that threads wait for the last one.
constexpr int64_t kLeastTaskBytes = 48 << 10, kMostTaskBytes = 512 << 10;

// Calls decode(row, row_last) for tasks of whole groups of 4 rows.
template <class Decode>
void for_row_tasks(int64_t rows, int64_t weight_bytes, const Parallel& parallel, const Decode& decode) {
  const int64_t row_bytes = rows ? weight_bytes / rows + 1 : 1;
  int64_t bytes = weight_bytes / 16;
  bytes = bytes < kLeastTaskBytes ? kLeastTaskBytes : bytes > kMostTaskBytes ? kMostTaskBytes : bytes;
  int64_t per_task = (bytes / row_bytes + 3) / 4 * 4;
  if (per_task < 4) per_task = 4;
  auto task = [&](int64_t index) {
    const int64_t row = index * per_task;
    decode(row, row + per_task < rows ? row + per_task : rows);
  };
  parallel_for(parallel, (rows + per_task - 1) / per_task, task);
}

}}  // namespace sparsify::
