"""``sparsify::linear_bitmask``: a linear whose weight has zeros anywhere.

    y = x W^T + bias        x [..., K] float32,  W [N, K],  bias [N] float32 or absent,  y [..., N] float32

W is stored as three tensors, in the order in which the kernels read them:

``values``     [nnz]  float32, float16 or bfloat16
    The non-zeros, row after row, by ascending column.

``mask``       [N, ceil(K / 8)]  uint8
    Bit ``k % 8`` of byte ``k // 8`` is 1 where ``W[n, k]`` is stored. The bits behind column K are 0.

``row_start``  [N + 1]  int64
    Row n holds ``values[row_start[n] : row_start[n + 1]]``; the last entry is nnz.

One row of five columns::

    W row   [a 0 c 0 e]   values [a, c, e]   mask byte 0b000_10101   row_start [0, 3]

At a sparsity of 50 % that is 0.53 of the dense bytes in float32, 0.56 in 16 bits; it breaks even at 3 % and 6 %.
K does not follow from the tensors, so the node has it as its attribute ``in_features``.

Sums are float32. With bfloat16 values, kernels that use bfloat16 instructions round x to bfloat16 as well, so "the
plain expression in its dtype" is x and W in bfloat16, added up in float32.
"""

import math

import torch
from onnxscript.values import Opset
from torch import Tensor

from ... import _native
from . import gpu
from .functions import function
from .schema import FLOATS, register
from .storage import FLOATS as STORED
from .storage import plain, tensor

NAME = "linear_bitmask"

# Decoding with standard ops, for a runtime without our library.
FUNCTION = function("""
linear_bitmask <in_features> (x, values, mask, row_start, bias) => (y)
{
    bits = sparsify.mask_bits <in_features: int = @in_features> (mask)
    place = sparsify.places (bits)
    values32 = Cast <to = 1> (values)
    weight = sparsify.spread (values32, bits, place)
    y = sparsify.dense_linear (x, weight, bias)
}
""")


def packed_bytes(out_features: int, in_features: int, nonzeros: int, dtype: torch.dtype) -> int:
    """Size of values, mask and row starts together."""
    return nonzeros * dtype.itemsize + out_features * math.ceil(in_features / 8) + 8 * (out_features + 1)


def pack(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Split a weight into its non-zeros, their bitmask and the row starts.

    Args:
        weight: ``[N, K]``, taken as float32; NaN is stored.
        dtype: float32, float16 or bfloat16: how the values are stored.

    Returns:
        ``values``, ``mask`` and ``row_start`` as described at the top of this file.

    Raises:
        ValueError: a value does not fit ``dtype``.
    """
    values, mask, row_start, _ = _native.pack_bitmask(plain(weight), STORED[dtype])
    return tensor(values).view(dtype), tensor(mask), tensor(row_start)


def unpack(values: Tensor, mask: Tensor, row_start: Tensor, in_features: int) -> Tensor:
    """The dense weight ``[N, in_features]`` in the dtype of ``values``: the inverse of ``pack``.

    Raises:
        ValueError: shapes disagree, or the mask does not agree with the row starts.
    """
    return tensor(_native.unpack_bitmask(values, mask, row_start, in_features)).to(values.dtype)


@torch.library.custom_op("sparsify::linear_bitmask", mutates_args=())
def linear_bitmask(
    x: Tensor, values: Tensor, mask: Tensor, row_start: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    """The op in torch, run by the CPU kernels; shapes and dtypes as at the top of this file. On GPUs: gpu.py."""
    rows = x.reshape(-1, in_features).contiguous()
    y = torch.from_numpy(_native.linear_bitmask(rows, values, mask, row_start, bias))
    return y.reshape(*x.shape[:-1], len(mask))


@linear_bitmask.register_fake
def _(x: Tensor, values: Tensor, mask: Tensor, row_start: Tensor, bias: Tensor | None, in_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])


linear_bitmask.register_kernel("cuda")(gpu.linear_bitmask)


def reference(
    x: Tensor, values: Tensor, mask: Tensor, row_start: Tensor, bias: Tensor | None, in_features: int
) -> Tensor:
    """What the op computes, by unpacking: the oracle of the kernels and of the function body."""
    return torch.nn.functional.linear(x, unpack(values, mask, row_start, in_features).to(x.dtype), bias)


SCHEMA = register(NAME, {"values": FLOATS, "mask": "tensor(uint8)", "row_start": "tensor(int64)"}, ["in_features"])


def to_onnx(x: object, values: object, mask: object, row_start: object, bias: object, in_features: int) -> object:
    """Write the torch op as one ONNX node, while ``torch.onnx`` translates the graph."""
    return Opset("sparsify", 1).linear_bitmask(x, values, mask, row_start, bias, in_features=in_features)
