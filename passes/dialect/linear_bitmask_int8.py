"""``sparsify::linear_bitmask_int8``: ``linear_bitmask`` with weights of 8 bits and one scale a row.

    y = x' W^T + bias       x [..., K] float32,  W [N, K],  bias [N] float32 or absent,  y [..., N] float32

x' is x quantised token by token to 8 bits (storage.py: quantise_tokens), so that codes are multiplied with codes and
added up in integers. W is stored as four tensors:

``values``     [nnz]  int8
    The codes of the kept weights, row after row, by ascending column: ``W[n, k] = code * scales[n]``. We write
    -127 .. 127. A weight that the mask keeps is stored even if its code is 0.

``mask``       [N, ceil(K / 8)]  uint8,   ``row_start``  [N + 1]  int64
    As in linear_bitmask.py; K is the attribute ``in_features``.

``scales``     [N]  float32
    Finite. Unless given, the largest ``|W|`` of the row over 127; 0 for a row of zeros.

At a sparsity of 50 % that is 0.63 of the dense bytes in int8. A row keeps at most 131072 values, so that its sum fits
32 bits.
"""

import math

import torch
from onnxscript.values import Opset
from torch import Tensor

from ... import _native
from .functions import function
from .schema import register
from .storage import plain, quantise_tokens, tensor

NAME = "linear_bitmask_int8"

# Decoding with standard ops, for a runtime without our library.
FUNCTION = function("""
linear_bitmask_int8 <in_features> (x, values, mask, row_start, scales, bias) => (y)
{
    bits = sparsify.mask_bits <in_features: int = @in_features> (mask)
    place = sparsify.places (bits)
    codes = Cast <to = 1> (values)
    dense_codes = sparsify.spread (codes, bits, place)
    weight = sparsify.scale_rows (dense_codes, scales)
    tokens = sparsify.quantise_tokens (x)
    y = sparsify.dense_linear (tokens, weight, bias)
}
""")


def packed_bytes(out_features: int, in_features: int, nonzeros: int) -> int:
    """Size of values, mask, row starts and scales together."""
    return nonzeros + out_features * (math.ceil(in_features / 8) + 4) + 8 * (out_features + 1)


def pack(weight: Tensor, scales: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise the non-zeros of a weight: codes to nearest, ties to even.

    Args:
        weight: ``[N, K]``, taken as float32.
        scales: ``[N]`` float32 to use instead of those that fit the weight; codes end at -127 and 127.

    Returns:
        ``values``, ``mask``, ``row_start`` and ``scales`` as described at the top of this file.

    Raises:
        ValueError: a weight or scale is not finite.
    """
    values, mask, row_start, used = _native.pack_bitmask(plain(weight), "int8", scales=scales)
    return tensor(values), tensor(mask), tensor(row_start), tensor(used) if scales is None else scales


def unpack(values: Tensor, mask: Tensor, row_start: Tensor, scales: Tensor, in_features: int) -> Tensor:
    """The dense weight ``[N, in_features]`` float32, code times scale.

    Raises:
        ValueError: shapes disagree, or the mask does not agree with the row starts.
    """
    return tensor(_native.unpack_bitmask(values, mask, row_start, in_features, scales=scales))


@torch.library.custom_op("sparsify::linear_bitmask_int8", mutates_args=())
def linear_bitmask_int8(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    row_start: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    in_features: int,
) -> Tensor:
    """The op in torch, run by the CPU kernels; shapes and dtypes as at the top of this file."""
    rows = x.reshape(-1, in_features).contiguous()
    y = torch.from_numpy(_native.linear_bitmask(rows, values, mask, row_start, bias, scales=scales))
    return y.reshape(*x.shape[:-1], len(mask))


@linear_bitmask_int8.register_fake
def _(
    x: Tensor,
    values: Tensor,
    mask: Tensor,
    row_start: Tensor,
    scales: Tensor,
    bias: Tensor | None,
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
    in_features: int,
) -> Tensor:
    """What the op computes, by unpacking: the oracle of the kernels and of the function body."""
    codes = unpack(values, mask, row_start, torch.ones_like(scales), in_features).to(x.dtype)
    return torch.nn.functional.linear(quantise_tokens(x), codes * scales.to(x.dtype)[:, None], bias)


SCHEMA = register(
    NAME,
    {
        "values": "tensor(int8)",
        "mask": "tensor(uint8)",
        "row_start": "tensor(int64)",
        "scales": "tensor(float)",
    },
    ["in_features"],
)


def to_onnx(
    x: object,
    values: object,
    mask: object,
    row_start: object,
    scales: object,
    bias: object,
    in_features: int,
) -> object:
    """Write the torch op as one ONNX node, while ``torch.onnx`` translates the graph."""
    return Opset("sparsify", 1).linear_bitmask_int8(x, values, mask, row_start, scales, bias, in_features=in_features)
