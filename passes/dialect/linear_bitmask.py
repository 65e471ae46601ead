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
"""

import math
from collections.abc import Sequence

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset
from torch import Tensor

from ... import _native
from .storage import to_storage

NAME = "linear_bitmask"

# Decoding with standard ops. A value's place is the number of mask bits before its own: an exclusive cumulative sum.
# The zero appended to the values is what Gather finds where a matrix has no values at all.
FUNCTION = onnx.parser.parse_function("""
<domain: "sparsify", opset_import: ["" : 23]>
linear_bitmask (x, values, mask, row_start, bias) => (y)
{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    axis2 = Constant <value_ints = [2]> ()
    flat = Constant <value_ints = [0, -1]> ()
    minus1 = Constant <value_ints = [-1]> ()
    k = Shape <start = -1> (x)

    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    eight = Constant <value_int = 8> ()
    shift64 = Range (zero, eight, one)
    shift = Cast <to = 2> (shift64)
    one8 = Cast <to = 2> (one)
    byte = Unsqueeze (mask, axis2)
    shifted = BitShift <direction = "RIGHT"> (byte, shift)
    fields = BitwiseAnd (shifted, one8)
    padded = Reshape (fields, flat)
    bits = Slice (padded, axis0, k, axis1)
    stored = Cast <to = 9> (bits)

    bits64 = Cast <to = 7> (bits)
    line = Reshape (bits64, minus1)
    place_line = CumSum <exclusive = 1> (line, zero)
    bits_shape = Shape (bits)
    place = Reshape (place_line, bits_shape)
    values32 = Cast <to = 1> (values)
    spare = Constant <value_floats = [0.0]> ()
    values_and_zero = Concat <axis = 0> (values32, spare)
    spread = Gather (values_and_zero, place)
    nothing = Constant <value_float = 0.0> ()
    weight = Where (stored, spread, nothing)

    out = Shape <start = 0, end = 1> (weight)
    rows = Concat <axis = 0> (minus1, k)
    x2 = Reshape (x, rows)
    y2 = Gemm <transB = 1> (x2, weight, bias)
    tokens = Shape <start = 0, end = -1> (x)
    y_shape = Concat <axis = 0> (tokens, out)
    y = Reshape (y2, y_shape)
}
""")


def packed_bytes(out_features: int, in_features: int, nonzeros: int, dtype: torch.dtype) -> int:
    """Size of values, mask and row starts together."""
    return nonzeros * dtype.itemsize + out_features * math.ceil(in_features / 8) + 8 * (out_features + 1)


def pack(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Split a weight into its non-zeros, their bitmask and the row starts.

    Args:
        weight: ``[N, K]``, any float dtype.
        dtype: float32, float16 or bfloat16: how the values are stored.

    Returns:
        ``values``, ``mask`` and ``row_start`` as described at the top of this file.

    Raises:
        ValueError: a value does not fit ``dtype``.
    """
    stored = weight != 0
    row_start = torch.zeros(len(weight) + 1, dtype=torch.int64)
    row_start[1:] = stored.sum(dim=1).cumsum(0)
    padded = torch.nn.functional.pad(stored, (0, -weight.shape[1] % 8))
    bits = padded.reshape(len(weight), -1, 8).to(torch.uint8)
    mask = (bits << torch.arange(8, dtype=torch.uint8)).sum(dim=2, dtype=torch.uint8)
    return to_storage(weight[stored], dtype), mask, row_start


def unpack(values: Tensor, mask: Tensor, in_features: int) -> Tensor:
    """The dense weight ``[N, in_features]`` in the dtype of ``values``: the inverse of ``pack``."""
    bits = (mask[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    stored = bits.reshape(len(mask), -1)[:, :in_features].bool()
    dense = values.new_zeros(stored.shape)
    dense[stored] = values
    return dense


def stack(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The packed tensors of several weights of one K as those of one, their rows below each other."""
    values, mask, row_start, *others = zip(*parts, strict=True)
    starts, before = [torch.zeros(1, dtype=torch.int64)], 0
    for start in row_start:
        starts.append(start[1:] + before)
        before += int(start[-1])
    return torch.cat(values), torch.cat(mask), torch.cat(starts), *(torch.cat(tensors) for tensors in others)


@torch.library.custom_op("sparsify::linear_bitmask", mutates_args=())
def linear_bitmask(x: Tensor, values: Tensor, mask: Tensor, row_start: Tensor, bias: Tensor | None) -> Tensor:
    """The op in torch, run by the CPU kernels; shapes and dtypes as at the top of this file."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.from_numpy(_native.linear_bitmask(rows, values, mask, row_start, bias))
    return y.reshape(*x.shape[:-1], len(mask))


@linear_bitmask.register_fake
def _(x: Tensor, values: Tensor, mask: Tensor, row_start: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], mask.shape[0])


def reference(x: Tensor, values: Tensor, mask: Tensor, row_start: Tensor, bias: Tensor | None) -> Tensor:
    """What the op computes, by unpacking: the oracle of the kernels and of the function body."""
    return torch.nn.functional.linear(x, unpack(values, mask, x.shape[-1]).to(x.dtype), bias)


Formal = OpSchema.FormalParameter
SCHEMA = OpSchema(
    NAME,
    "sparsify",
    1,
    inputs=[
        Formal("x", "tensor(float)"),
        Formal("values", "T"),
        Formal("mask", "tensor(uint8)"),
        Formal("row_start", "tensor(int64)"),
        Formal("bias", "tensor(float)", param_option=OpSchema.FormalParameterOption.Optional),
    ],
    outputs=[Formal("y", "tensor(float)")],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "how values are stored")],
)
onnx.defs.register_schema(SCHEMA)


def to_onnx(x: object, values: object, mask: object, row_start: object, bias: object) -> object:
    """Write the torch op as one ONNX node, while ``torch.onnx`` translates the graph."""
    return Opset("sparsify", 1).linear_bitmask(x, values, mask, row_start, bias)
