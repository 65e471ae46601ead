"""The numbers behind quantised weights, as ONNX and ONNX Runtime's own ops define them."""

import math

import torch
from torch import Tensor


def dequantise(
    values: Tensor, scale: Tensor, zero_point: Tensor | None = None, *, axis: int, block_size: int
) -> Tensor:
    """``(values - zero_point) * scale``, as ONNX's DequantizeLinear does it.

    Args:
        values: ``[A, B]``, float32.
        scale: one number, ``[A]`` or ``[B]`` (whichever ``axis`` says), or, with blocks, one row or column for
            every ``block_size`` along ``axis``.
        zero_point: of the scale's shape, or None for 0.
        axis: 0 or 1, or negative from the end.
        block_size: 0 where there are no blocks.

    Returns:
        float32 ``[A, B]``.
    """
    axis %= values.dim()

    def spread(x: Tensor) -> Tensor:
        if x.numel() == 1:
            return x.reshape(1, 1)
        if block_size:
            return x.repeat_interleave(block_size, dim=axis).narrow(axis, 0, values.shape[axis])
        return x.reshape(-1, 1) if axis == 0 else x.reshape(1, -1)

    centred = values if zero_point is None else values - spread(zero_point)
    return centred * spread(scale)


def dequantise_blocks(
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    shape: tuple[int, int],
    bits: int,
    block_size: int,
    packed_points: bool,
) -> Tensor:
    """The weight of ONNX Runtime's MatMulNBits.

    Args:
        packed: ``[N, blocks, block_size * bits / 8]``, bytes; of two 4-bit numbers in a byte the lower is the first.
        scale: ``N * blocks`` numbers, row after row.
        zero_point: bytes packed like the values, every row starting on a byte (``packed_points``); or ``N * blocks``
            numbers. None means half the range.
        shape: ``(N, K)``; the last block of a row may reach beyond K.
        bits: 4 or 8.
        block_size: columns in a block.
        packed_points: how the zero points are stored.

    Returns:
        float32 ``[N, K]``.
    """
    rows, columns = shape
    blocks = math.ceil(columns / block_size)
    values = _unpacked(packed.reshape(rows, -1), bits)[:, : blocks * block_size].reshape(rows, blocks, block_size)
    if zero_point is None:
        points: Tensor | float = float(1 << (bits - 1))
    elif packed_points:
        points = _unpacked(zero_point.reshape(rows, -1), bits)[:, :blocks, None]
    else:
        points = zero_point.reshape(rows, blocks, 1)
    return ((values - points) * scale.reshape(rows, blocks, 1)).reshape(rows, -1)[:, :columns].contiguous()


def _unpacked(stored: Tensor, bits: int) -> Tensor:
    """``[R, B]`` bytes to ``[R, B * 8 / bits]`` numbers, all float32."""
    if bits == 8:
        return stored
    high = (stored / 16).floor()
    return torch.stack([stored - 16 * high, high], dim=2).reshape(len(stored), -1)
