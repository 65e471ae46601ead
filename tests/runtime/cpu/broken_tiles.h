// Put in front of amx_model.cpp by CMakeLists.txt: a model of the tiles that is wrong in one place. The kernel test must
// see it, or it would not see a wrong kernel either.
#pragma once
#define SPARSIFY_TILE_MODEL
#include "tiles_model.h"

namespace sparsify { namespace {

struct BrokenTiles : Tiles {
  template <int c, int a, int b>
  static void dp_i8() { Tiles::dp_i8<c, b, a>(); }
  template <int c, int a, int b>
  static void dp_bf16() { Tiles::dp_bf16<c, b, a>(); }
};

}}  // namespace sparsify::

#define Tiles BrokenTiles
