"""``sparsify::linear_bitmask_int4``: ``linear_bitmask`` with weights of 4 bits and one scale a group of columns.

    y = x' W^T + bias       x [..., K] float32,  W [N, K],  bias [N] float32 or absent,  y [..., N] float32

x' is x quantised token by token to 8 bits (storage.py: quantise_tokens). W is stored as four tensors:

``values``     [bytes]  uint8
    The codes of the kept weights, row after row, by ascending column, with 8 added, two to a byte, the first in the
    lower half: ``W[n, k] = (half - 8) * scales[n, k // group]``. We write codes -7 .. 7. Columns 0, 64, 128 ... begin a
    new byte; the half behind an odd number of values is 0 and never read. A weight that the mask keeps is stored even
    if its code is 0 (half 8).

``mask``       [N, ceil(K / 8)]  uint8
    As in linear_bitmask.py; K is the attribute ``in_features``.

``row_start``  [N + 1]  int64
    Row n holds the bytes ``values[row_start[n] : row_start[n + 1]]``.

``scales``     [N, ceil(K / group)]  float16
    Finite. Unless given, the largest ``|W|`` of ``group`` neighbouring columns over 7, rounded to float16 before codes
    are made; 0 for nothing but zeros, else at least the smallest positive float16.

One row of five columns::

    codes  [7 . -1 . 3]    values bytes 0x7f 0x0b    mask byte 0b000_10101    row_start [0, 2]

At a sparsity of 50 % that is about 3 bits a weight, and 16 / group for the scales. A row keeps at most 131072 values.
"""

import math

import torch
from onnxscript.values import Opset
from torch import Tensor

from ... import _native
from .functions import function
from .schema import register
from .storage import plain, quantise_tokens, tensor

NAME = "linear_bitmask_int4"

# Decoding with standard ops, for a runtime without our library.
FUNCTION = function("""
linear_bitmask_int4 <group, in_features> (x, values, mask, row_start, scales, bias) => (y)
{
    bits = sparsify.mask_bits <in_features: int = @in_features> (mask)
    place = sparsify.nibble_places (bits)
    codes = sparsify.int4_codes (values)
    dense_codes = sparsify.spread (codes, bits, place)
    weight = sparsify.scale_groups <group: int = @group> (dense_codes, scales)
    tokens = sparsify.quantise_tokens (x)
    y = sparsify.dense_linear (tokens, weight, bias)
}
""")


def packed_bytes(out_features: int, in_features: int, nonzeros: int, group: int) -> int:
    """Size of values, mask, row starts and scales together, at most: 64 columns may or may not end in half a byte."""
    values = (nonzeros + out_features * math.ceil(in_features / 64)) // 2
    scales = 2 * out_features * math.ceil(in_features / group)
    return values + out_features * math.ceil(in_features / 8) + 8 * (out_features + 1) + scales


def pack(weight: Tensor, group: int, scales: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise the non-zeros of a weight: codes to nearest, ties to even.

    Args:
        weight: ``[N, K]``, taken as float32.
        group: columns that share a scale: 32, 64 or 128.
        scales: ``[N, ceil(K / group)]`` float16 to use instead of those that fit the weight; codes end at -7 and 7.

    Returns:
        ``values``, ``mask``, ``row_start`` and ``scales`` as described at the top of this file.

    Raises:
        ValueError: a weight or scale is not finite, or a scale does not fit float16.
    """
    values, mask, row_start, used = _native.pack_bitmask(plain(weight), "int4", group=group, scales=scales)
    return tensor(values), tensor(mask), tensor(row_start), tensor(used) if scales is None else scales


def unpack(values: Tensor, mask: Tensor, row_start: Tensor, scales: Tensor, group: int, in_features: int) -> Tensor:
    """The dense weight ``[N, in_features]`` float32, code times scale.

    Raises:
        ValueError: shapes disagree, or the mask does not agree with the row starts.
    """
    return tensor(_native.unpack_bitmask(values, mask, row_start, in_features, scales=scales, group=group))


@torch.library.custom_op("sparsify::linear_bitmask_int4", mutates_args=())
def linear_bitmask_int4(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    row_start: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group: int,
    in_features: int,
) -> Tensor:
    """The op in torch, run by the CPU kernels; shapes and dtypes as at the top of this file."""
    rows = x.reshape(-1, in_features).contiguous()
    y = torch.from_numpy(_native.linear_bitmask(rows, values, mask, row_start, bias, scales=scales, group=group))
    return y.reshape(*x.shape[:-1], len(mask))


@linear_bitmask_int4.register_fake
def _(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    row_start: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group: int,
    in_features: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])


def reference(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    row_start: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    group: int,
    in_features: int,
) -> Tensor:
    """What the op computes, by unpacking: the oracle of the kernels and of the function body."""
    codes = unpack(values, mask, row_start, torch.ones_like(scales), group, in_features).to(x.dtype)
    each = scales.to(x.dtype).repeat_interleave(group, dim=1)[:, :in_features]
    return torch.nn.functional.linear(quantise_tokens(x), codes * each, bias)


SCHEMA = register(
    NAME,
    {
        "values": "tensor(uint8)",
        "mask": "tensor(uint8)",
        "row_start": "tensor(int64)",
        "scales": "tensor(float16)",
    },
    ["group", "in_features"],
)


def to_onnx(
    x: object,
    values: object,
    mask: object,
    row_start: object,
    scales: object,
    bias: object,
    group: int,
    in_features: int,
) -> object:
    """Write the torch op as one ONNX node, while ``torch.onnx`` translates the graph."""
    return Opset("sparsify", 1).linear_bitmask_int4(
        x, values, mask, row_start, scales, bias, group=group, in_features=in_features
    )
