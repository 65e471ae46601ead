"""The sparse linears on CUDA tensors: what `linear_nm`, `linear_nm_int4` and `linear_bitmask` do there.

    y = x W^T + bias        x [..., K] and y [..., N] float32, float16 or bfloat16; bias [N] of any float type

Weights are those of the CPU, moved: the kernels (cuda/kernels.h) read the layout of the file. Types of x and of the
values: both float16, both bfloat16, or float32 with any of the three. What the weights hold is not checked again.
"""

import torch
from torch import Tensor

from ...calibrate.gpu import kernels


def linear_24(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """``linear_nm`` on a GPU.

    Raises:
        ValueError: the pattern is not 2:4, or types or shapes do not belong together.
    """
    _check_24(n, m)
    rows, y = _rows(x, values.shape[-1] * 2, len(values))
    with kernels(x) as (cuda, stream):
        cuda.spmm_24(rows, values.detach(), indices, _bias(bias), y, stream)
    return y.reshape(*x.shape[:-1], len(values))


def linear_24_int4(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    n: int,
    m: int,
    group: int,
    in_features: int,
) -> Tensor:
    """``linear_nm_int4`` on a GPU: tokens are quantised to 8 bits, as on the CPU.

    Raises:
        ValueError: the pattern is not 2:4, or types or shapes do not belong together.
    """
    _check_24(n, m)
    rows, y = _rows(x, in_features, len(values))
    codes = x.new_empty(len(rows), -(-in_features // 16) * 16, dtype=torch.int8)
    steps = x.new_empty(len(rows), dtype=torch.float32)
    with kernels(x) as (cuda, stream):
        cuda.quantise_tokens(rows, codes, steps, stream)
        cuda.spmm_24_int4(codes, steps, values, indices, scales.detach(), _bias(bias), y, in_features, group, stream)
    return y.reshape(*x.shape[:-1], len(values))


def linear_bitmask(
    x: Tensor, values: Tensor, mask: Tensor, row_start: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    """``linear_bitmask`` on a GPU.

    Raises:
        ValueError: types or shapes do not belong together.
    """
    rows, y = _rows(x, in_features, len(mask))
    with kernels(x) as (cuda, stream):
        cuda.spmm_bitmask(rows, values.detach(), mask, row_start, _bias(bias), y, stream)
    return y.reshape(*x.shape[:-1], len(mask))


def _check_24(n: int, m: int) -> None:
    if (n, m) != (2, 4):
        raise ValueError(f"the GPU kernels have the pattern 2:4, got {n}:{m}")


def _rows(x: Tensor, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Tokens as ``[M, K]``, and ``[M, N]`` to be written."""
    if x.shape[-1] != in_features:
        raise ValueError(f"x must have shape [..., {in_features}] to match the weight, got {list(x.shape)}")
    rows = x.detach().reshape(x.shape[:-1].numel(), in_features).contiguous()
    return rows, x.new_empty(len(rows), out_features)


def _bias(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().float()
