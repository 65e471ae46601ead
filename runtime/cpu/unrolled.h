// Loops over registers. GCC keeps an array in registers only where every index is a constant when the optimiser first
// looks; a counted loop becomes constant too late and its accumulators are stored to the stack.
#pragma once
#include <utility>

#define SPARSIFY_INLINE __attribute__((always_inline))

namespace sparsify { namespace {

template <class Body, int... index>
SPARSIFY_INLINE inline void call_each(const Body& body, std::integer_sequence<int, index...>) {
  (body(std::integral_constant<int, index>{}), ...);
}

// body(0), body(1) .. body(count - 1), the index a compile-time constant. Body: [&](auto i) SPARSIFY_INLINE {...}
template <int count, class Body>
SPARSIFY_INLINE inline void unrolled(const Body& body) {
  call_each(body, std::make_integer_sequence<int, count>{});
}

}}  // namespace sparsify::
