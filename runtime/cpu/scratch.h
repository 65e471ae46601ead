// Memory for a kernel's intermediate results, aligned to a cache line.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace sparsify { namespace {

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Scratch = std::unique_ptr<T[], FreeDeleter>;

template <class T>
Scratch<T> scratch(int64_t count) {
  const size_t bytes = (size_t(count) * sizeof(T) + 63) / 64 * 64;
  void* memory = std::aligned_alloc(64, bytes ? bytes : 64);
  if (!memory) throw std::bad_alloc();
  return Scratch<T>(static_cast<T*>(memory));
}

// Scratch memory that a thread keeps from task to task: fresh pages cost more than the work.
template <class T>
struct KeptScratch {
  Scratch<T> memory;
  int64_t size = 0;
  T* get(int64_t count) {
    if (count > size) {
      memory = scratch<T>(count);
      size = count;
    }
    return memory.get();
  }
};

}}  // namespace sparsify::
