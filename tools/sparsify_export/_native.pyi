"""The compiled CPU kernels (runtime/cpu/native.cpp). Arguments must be C-contiguous and on the CPU."""

from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

_Floats: TypeAlias = NDArray[np.float32] | torch.Tensor
_Array: TypeAlias = NDArray[Any] | torch.Tensor

def linear_nm(
    x: _Floats,
    values: _Array,
    indices: NDArray[np.uint8] | torch.Tensor,
    n: int,
    m: int,
    bias: _Floats | None = None,
    *,
    out: _Floats | None = None,
) -> NDArray[np.float32]:
    """Return ``y [M, N] = x [M, K] @ W.T + bias`` for an n:m weight ``W [N, K]``.

    Args:
        x: float32 ``[M, K]``.
        values: ``[N, K * n / m]`` float32, float16 or bfloat16. numpy has no bfloat16: pass its bits as uint16.
        indices: uint8 ``[N, ceil(K * n / m * b / 8)]``; b = 1, 2, 4, 8 bits for m = 2, up to 4, up to 16, up to 32.
        n: kept weights in a group.
        m: size of a group.
        bias: float32 ``[N]``.
        out: float32 ``[M, N]`` to write and return; a new array otherwise.

    Raises:
        ValueError: shapes disagree, or an index is not below m.
    """

def linear_bitmask(
    x: _Floats,
    values: _Array,
    mask: NDArray[np.uint8] | torch.Tensor,
    row_start: NDArray[np.int64] | torch.Tensor,
    bias: _Floats | None = None,
    *,
    out: _Floats | None = None,
) -> NDArray[np.float32]:
    """Return ``y [M, N] = x [M, K] @ W.T + bias`` for an unstructured weight ``W [N, K]``.

    Args:
        x: float32 ``[M, K]``.
        values: ``[nnz]`` float32, float16 or bfloat16, row after row. numpy has no bfloat16: pass its bits as uint16.
        mask: uint8 ``[N, ceil(K / 8)]``; bit ``k % 8`` of byte ``k // 8`` set = weight k is kept.
        row_start: int64 ``[N + 1]``.
        bias: float32 ``[N]``.
        out: float32 ``[M, N]`` to write and return; a new array otherwise.

    Raises:
        ValueError: shapes disagree, or the mask does not agree with row_start.
    """

def pairwise_max_sum(a: _Floats, b: _Floats) -> NDArray[np.float64]:
    """Return ``S [K1, K2]``, ``S[g, j] = sum_r max(a[r, g], b[r, j])``, for ``a [R, K1]`` and ``b [R, K2]``."""

def read_all(data: _Floats) -> float:
    """Return the sum of an array, read once. Time it for the read bandwidth."""

def fma_burst(steps: int) -> int:
    """Do independent multiply-adds on every thread and return how many operations. Time it for the peak."""

def isa() -> str:
    """Name the instruction set in use: ``avx512``, ``avx2`` or ``portable``."""

def num_threads() -> int:
    """Return how many threads an op uses."""

def set_num_threads(threads: int) -> None:
    """Use this many threads from the next op on. Results do not depend on it."""
