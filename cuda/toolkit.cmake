# What a CUDA toolkit must be, and what is compiled with it where nothing is asked for.
#
#   SPARSIFY_TOOLKIT         its version, e.g. 12.8
#   SPARSIFY_TOO_OLD         why it cannot be used; empty where it can
#   SPARSIFY_ARCHITECTURES   every GPU with 2:4 tensor cores that it knows; the last also as PTX, for later ones
if(SPARSIFY_TOOLKIT VERSION_LESS 12.5)
  set(SPARSIFY_TOO_OLD "the GPU kernels want CUDA 12.5 or newer (mma.sp::ordered_metadata), got ${SPARSIFY_TOOLKIT}")
elseif(SPARSIFY_TOOLKIT VERSION_LESS 12.8)
  set(SPARSIFY_ARCHITECTURES 80-real 86-real 87-real 89-real 90)
elseif(SPARSIFY_TOOLKIT VERSION_LESS 13.0)
  set(SPARSIFY_ARCHITECTURES 80-real 86-real 87-real 89-real 90-real 100-real 120)
else()
  set(SPARSIFY_ARCHITECTURES 80-real 86-real 87-real 89-real 90-real 100-real 110-real 120)
endif()
