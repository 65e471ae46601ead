"""The compiled CPU kernels (runtime/cpu/native.cpp). Arguments must be C-contiguous and on the CPU."""

from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

_Floats: TypeAlias = NDArray[np.float32] | torch.Tensor
_Array: TypeAlias = NDArray[Any] | torch.Tensor

_Bytes: TypeAlias = NDArray[np.uint8] | torch.Tensor
_Int64s: TypeAlias = NDArray[np.int64] | torch.Tensor

# Values are float32, float16, bfloat16, int8, or uint8 that hold two int4. numpy has no bfloat16: its bits are passed,
# and returned, as uint16. int8 comes with scales float32 [N], int4 with scales float16 [N, ceil(K / group)] and a group
# of 32, 64 or 128 columns. The layouts are described in passes/dialect, one file an op.

def linear_nm(
    x: _Floats,
    values: _Array,
    indices: _Bytes,
    n: int,
    m: int,
    bias: _Floats | None = None,
    *,
    scales: _Array | None = None,
    group: int = 0,
    out: _Floats | None = None,
) -> NDArray[np.float32]:
    """Return ``y [M, N] = x [M, K] @ W.T + bias`` for an n:m weight ``W [N, K]``.

    Args:
        x: float32 ``[M, K]``; quantised token by token where the values are int8 or int4.
        values: ``[N, K * n / m]``; int4: ``[N, ceil(K * n / m / 2)]``.
        indices: uint8 ``[N, ceil(K * n / m * b / 8)]``; b = 1, 2, 4, 8 bits for m = 2, up to 4, up to 16, up to 32.
        n: kept weights in a group.
        m: size of a group.
        bias: float32 ``[N]``.
        scales: of int8 and int4 values.
        group: of int4 values.
        out: float32 ``[M, N]`` to write and return; a new array otherwise.

    Raises:
        ValueError: shapes disagree, an index is not below m, or a scale is not finite.
    """

def linear_bitmask(
    x: _Floats,
    values: _Array,
    mask: _Bytes,
    row_start: _Int64s,
    bias: _Floats | None = None,
    *,
    scales: _Array | None = None,
    group: int = 0,
    out: _Floats | None = None,
) -> NDArray[np.float32]:
    """Return ``y [M, N] = x [M, K] @ W.T + bias`` for an unstructured weight ``W [N, K]``.

    Args:
        x: float32 ``[M, K]``; quantised token by token where the values are int8 or int4.
        values: ``[nnz]``, row after row; int4: ``[bytes]``, every 64 columns of a row begin a new one.
        mask: uint8 ``[N, ceil(K / 8)]``; bit ``k % 8`` of byte ``k // 8`` set = weight k is kept.
        row_start: int64 ``[N + 1]``, the first element of ``values`` of each row, then their number.
        bias: float32 ``[N]``.
        scales: of int8 and int4 values.
        group: of int4 values.
        out: float32 ``[M, N]`` to write and return; a new array otherwise.

    Raises:
        ValueError: shapes disagree, the mask does not agree with row_start, or a scale is not finite.
    """

def pack_nm(
    weight: _Floats, n: int, m: int, dtype: str, *, group: int = 0, scales: _Array | None = None
) -> tuple[NDArray[Any], NDArray[np.uint8], Any]:
    """Return values, indices and scales (None for float types) of an n:m weight.

    Args:
        weight: float32 ``[N, K]``.
        n: kept weights in a group.
        m: size of a group.
        dtype: ``fp32``, ``fp16``, ``bf16``, ``int8`` or ``int4``.
        group: of int4 values.
        scales: to quantise with, and to return; None finds those that fit the weight.

    Raises:
        ValueError: K is not a multiple of m, a group holds more than n non-zeros, or a weight does not fit the dtype.
    """

def pack_bitmask(
    weight: _Floats, dtype: str, *, group: int = 0, scales: _Array | None = None
) -> tuple[NDArray[Any], NDArray[np.uint8], NDArray[np.int64], Any]:
    """Return values, mask, row_start and scales (None for float types) of a weight; arguments as for ``pack_nm``.

    Raises:
        ValueError: a weight does not fit the dtype.
    """

def unpack_nm(
    values: _Array,
    indices: _Bytes,
    n: int,
    m: int,
    *,
    scales: _Array | None = None,
    group: int = 0,
    in_features: int = 0,
) -> NDArray[np.float32]:
    """Return the dense weight ``[N, K]``; int4 values want ``in_features``, others say it by their shape.

    Raises:
        ValueError: as for ``linear_nm``, or two values of a group are not in ascending places.
    """

def unpack_bitmask(
    values: _Array,
    mask: _Bytes,
    row_start: _Int64s,
    in_features: int,
    *,
    scales: _Array | None = None,
    group: int = 0,
) -> NDArray[np.float32]:
    """Return the dense weight ``[N, in_features]``.

    Raises:
        ValueError: as for ``linear_bitmask``.
    """

def pairwise_max_sum(a: _Floats, b: _Floats) -> NDArray[np.float64]:
    """Return ``S [K1, K2]``, ``S[g, j] = sum_r max(a[r, g], b[r, j])``, for ``a [R, K1]`` and ``b [R, K2]``."""

def read_all(data: _Floats) -> float:
    """Return the sum of an array, read once. Time it for the read bandwidth."""

def fma_burst(steps: int) -> int:
    """Do independent multiply-adds on every thread and return how many operations. Time it for the peak."""

def tile_burst(steps: int, dtype: Literal["bf16", "int8"]) -> int:
    """Do products of tiles on every thread and return how many operations; 0 where the processor has no tiles."""

def isa() -> str:
    """Name the instruction set in use: ``amx``, ``avx512bf16``, ``avx512vnni``, ``avx512``, ``avx2``, ``portable``."""

def num_threads() -> int:
    """Return how many threads an op uses."""

def set_num_threads(threads: int) -> None:
    """Use this many threads from the next op on. Results do not depend on it."""
