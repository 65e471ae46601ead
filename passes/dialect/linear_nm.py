"""``sparsify::linear_nm``: a linear whose weight keeps n of every m neighbours along in_features.

    y = x W^T + bias        x [..., K] float32,  W [N, K],  bias [N] float32 or absent,  y [..., N] float32

W is stored as two tensors, in the order in which the kernels read them:

``values``   [N, K n/m]  float32, float16 or bfloat16
    Row after row, group after group; inside a group the kept weights by ascending position. A group with fewer
    than n non-zeros still fills n slots: the spare ones hold +0.0, at the lowest positions that are not in use.

``indices``  [N, ceil(K n/m b / 8)]  uint8
    The position (0 .. m-1) of every value inside its group, b bits each, the first in the lowest bits of the first
    byte. b is 1 for m = 2, 2 for m up to 4, 4 for m up to 16, 8 above, so no index straddles two bytes. Every row
    starts on a byte; the bits behind its last index are 0.

For 2:4 one byte holds two groups::

    W row   [a 0 0 d | 0 f g 0]   values [a, d, f, g]   byte 0b10_01_11_00   (g at 2, f at 1, d at 3, a at 0)

which is 16 values and one 32-bit word for 32 columns: 0.53 of the dense bytes in float32, 0.56 in 16 bits.
"""

import math
from collections.abc import Sequence

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset
from torch import Tensor

from ... import _native
from ...calibrate.masks import nm_keep_mask
from ...calibrate.patterns import NM, largest_group_count
from .storage import to_storage

NAME = "linear_nm"

# Decoding with standard ops, for a runtime without our library. The index bits b follow from m as above; Gemm takes
# an absent bias as absent, which Add would not.
FUNCTION = onnx.parser.parse_function("""
<domain: "sparsify", opset_import: ["" : 23]>
linear_nm <n, m> (x, values, indices, bias) => (y)
{
    n0 = Constant <value_int: int = @n> ()
    m0 = Constant <value_int: int = @m> ()
    axis0 = Constant <value_ints = [0]> ()
    axis2 = Constant <value_ints = [2]> ()
    n1 = Unsqueeze (n0, axis0)
    m1 = Unsqueeze (m0, axis0)

    two = Constant <value_int = 2> ()
    four = Constant <value_int = 4> ()
    eight = Constant <value_int = 8> ()
    sixteen = Constant <value_int = 16> ()
    one = Constant <value_int = 1> ()
    zero = Constant <value_int = 0> ()
    over2 = Greater (m0, two)
    over4 = Greater (m0, four)
    over16 = Greater (m0, sixteen)
    bits_a = Where (over2, two, one)
    bits_b = Where (over4, four, bits_a)
    bits = Where (over16, eight, bits_b)

    shift64 = Range (zero, eight, bits)
    shift = Cast <to = 2> (shift64)
    span = Pow (two, bits)
    ones64 = Sub (span, one)
    ones = Cast <to = 2> (ones64)
    byte = Unsqueeze (indices, axis2)
    shifted = BitShift <direction = "RIGHT"> (byte, shift)
    fields = BitwiseAnd (shifted, ones)
    flat = Constant <value_ints = [0, -1]> ()
    row_fields = Reshape (fields, flat)

    kept = Shape <start = 1> (values)
    columns = Constant <value_ints = [1]> ()
    row_index = Slice (row_fields, axis0, kept, columns)
    keep_rest = Constant <value_ints = [0, -1]> ()
    by_group = Concat <axis = 0> (keep_rest, n1)
    index8 = Reshape (row_index, by_group)
    index = Cast <to = 7> (index8)
    values32 = Cast <to = 1> (values)
    update = Reshape (values32, by_group)
    groups = Shape <start = 0, end = 2> (index)
    dense_shape = Concat <axis = 0> (groups, m1)
    empty = ConstantOfShape (dense_shape)
    scattered = ScatterElements <axis = 2> (empty, index, update)
    weight = Reshape (scattered, flat)

    k = Shape <start = 1> (weight)
    out = Shape <start = 0, end = 1> (weight)
    minus1 = Constant <value_ints = [-1]> ()
    rows = Concat <axis = 0> (minus1, k)
    x2 = Reshape (x, rows)
    y2 = Gemm <transB = 1> (x2, weight, bias)
    tokens = Shape <start = 0, end = -1> (x)
    y_shape = Concat <axis = 0> (tokens, out)
    y = Reshape (y2, y_shape)
}
""")


def index_bits(m: int) -> int:
    """Bits of one stored position: the smallest of 1, 2, 4, 8 that holds ``m - 1``."""
    return next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)


def packed_bytes(out_features: int, in_features: int, nm: NM, dtype: torch.dtype) -> int:
    """Size of values and indices together."""
    kept = in_features * nm.n // nm.m
    return out_features * (kept * dtype.itemsize + math.ceil(kept * index_bits(nm.m) / 8))


def pack(weight: Tensor, nm: NM, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split an N:M weight into its values and their positions.

    Args:
        weight: ``[N, K]``, any float dtype, K a multiple of m, at most n non-zeros in every group.
        nm: the pattern.
        dtype: float32, float16 or bfloat16: how the values are stored.

    Returns:
        ``values`` and ``indices`` as described at the top of this file.

    Raises:
        ValueError: K is not a multiple of m, a group holds more than n non-zeros, or a value does not fit ``dtype``.
    """
    out_features, in_features = weight.shape
    if (most := largest_group_count(weight, nm.m)) > nm.n:
        raise ValueError(f"a group of {nm.m} holds {most} non-zeros, at most {nm.n} can be packed as {nm}")
    # Non-zeros score 1 and zeros 0, and ties go to the lower position: exactly the layout's rule for spare slots.
    keep = nm_keep_mask((weight != 0).float(), nm)
    groups = (out_features, in_features // nm.m, nm.m)
    index = keep.reshape(groups).nonzero()[:, 2].to(torch.uint8).reshape(out_features, -1)
    values = to_storage(weight[keep], dtype).reshape(index.shape)
    return values, _pack_bits(index, index_bits(nm.m))


def unpack(values: Tensor, indices: Tensor, nm: NM) -> Tensor:
    """The dense weight ``[N, K]`` in the dtype of ``values``: the inverse of ``pack``."""
    rows, kept = values.shape
    bits = index_bits(nm.m)
    shift = torch.arange(0, 8, bits, dtype=torch.uint8)
    fields = (indices[:, :, None] >> shift) & ((1 << bits) - 1)
    index = fields.reshape(rows, -1)[:, :kept].reshape(rows, kept // nm.n, nm.n)
    dense = values.new_zeros(rows, kept // nm.n, nm.m)
    return dense.scatter_(2, index.long(), values.reshape(index.shape)).reshape(rows, -1)


def stack(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """The packed tensors of several weights of one pattern and K as those of one, their rows below each other."""
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def _pack_bits(index: Tensor, bits: int) -> Tensor:
    per_byte = 8 // bits
    padded = torch.nn.functional.pad(index, (0, -index.shape[1] % per_byte))
    fields = padded.reshape(len(index), -1, per_byte)
    byte = torch.zeros(fields.shape[:2], dtype=torch.uint8)
    for place in range(per_byte):
        byte |= fields[:, :, place] << (place * bits)
    return byte


@torch.library.custom_op("sparsify::linear_nm", mutates_args=())
def linear_nm(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """The op in torch, run by the CPU kernels; shapes and dtypes as at the top of this file."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.from_numpy(_native.linear_nm(rows, values, indices, n, m, bias))
    return y.reshape(*x.shape[:-1], len(values))


@linear_nm.register_fake
def _(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def reference(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, nm: NM) -> Tensor:
    """What the op computes, by unpacking: the oracle of the kernels and of the function body."""
    return torch.nn.functional.linear(x, unpack(values, indices, nm).to(x.dtype), bias)


Formal = OpSchema.FormalParameter
SCHEMA = OpSchema(
    NAME,
    "sparsify",
    1,
    inputs=[
        Formal("x", "tensor(float)"),
        Formal("values", "T"),
        Formal("indices", "tensor(uint8)"),
        Formal("bias", "tensor(float)", param_option=OpSchema.FormalParameterOption.Optional),
    ],
    outputs=[Formal("y", "tensor(float)")],
    type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "how values are stored")],
    attributes=[OpSchema.Attribute(name, OpSchema.AttrType.INT, "") for name in ("n", "m")],
)
onnx.defs.register_schema(SCHEMA)


def to_onnx(x: object, values: object, indices: object, bias: object, n: int, m: int) -> object:
    """Write the torch op as one ONNX node, while ``torch.onnx`` translates the graph."""
    return Opset("sparsify", 1).linear_nm(x, values, indices, bias, n=n, m=m)
