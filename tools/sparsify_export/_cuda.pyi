"""The GPU kernels (cuda/bindings.cpp); only in builds with SPARSIFY_CUDA=ON.

Every function launches on ``stream`` (the handle, 0 for the default stream), does not wait, and writes its last arrays.
Arrays come by DLPack from one GPU, contiguous and without a gradient. Shapes and types are checked and named where they
are wrong (ValueError); what weights hold is not, as in cuda/kernels.h, where the equations and layouts are.
"""

from torch import Tensor

def spmm_24(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, y: Tensor, stream: int, version: str = ""
) -> None:
    """Write ``y [M, N] = x [M, K] W^T + bias`` for a 2:4 weight.

    Versions: readable, decode, few, prefill; '' chooses.
    """

def spmm_bitmask(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    row_start: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stream: int,
    version: str = "",
) -> None:
    """Write ``y [M, N] = x [M, K] W^T + bias`` for a weight with zeros anywhere; versions as above."""

def quantise_tokens(x: Tensor, codes: Tensor, steps: Tensor, stream: int) -> None:
    """Write codes int8 ``[M, K rounded up to 16]`` and steps float32 ``[M]`` of ``x [M, K]``."""

def spmm_24_int4(
    codes: Tensor,
    steps: Tensor,
    values: Tensor,
    indices: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    in_features: int,
    group: int,
    stream: int,
    version: str = "",
) -> None:
    """Write ``y [M, N]`` for a 2:4 weight in 4 bits and quantised tokens; version: readable or ''."""

def gather_channels(x: Tensor, index: Tensor, y: Tensor, stream: int) -> None:
    """Write ``y[m, j] = x[m, index[j]]``."""

def rate_mask_forward(weight: Tensor, rank: Tensor, counts: Tensor, out: Tensor, stream: int) -> None:
    """Write the weight where its rank is not below its row's count (int32), and 0 elsewhere."""

def rate_mask_backward(
    weight: Tensor,
    rank: Tensor,
    counts: Tensor,
    grad: Tensor,
    grad_weight: Tensor | None,
    grad_beta: Tensor | None,
    workspace: Tensor | None,
    stream: int,
) -> None:
    """Write the straight-through gradients; workspace float32 ``[R, D]`` where ``grad_beta`` has one row."""
