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

Sums are float32. With bfloat16 values, kernels that use bfloat16 instructions round x to bfloat16 as well, so "the
plain expression in its dtype" is x and W in bfloat16, added up in float32.
"""

import math

import torch
from onnxscript.values import Opset
from torch import Tensor

from ... import _native
from ...calibrate.patterns import NM
from . import gpu
from .functions import function
from .schema import FLOATS, register
from .storage import FLOATS as STORED
from .storage import plain, tensor

NAME = "linear_nm"

# Decoding with standard ops, for a runtime without our library.
FUNCTION = function("""
linear_nm <n, m> (x, values, indices, bias) => (y)
{
    values32 = Cast <to = 1> (values)
    weight = sparsify.nm_weight <n: int = @n, m: int = @m> (values32, indices)
    y = sparsify.dense_linear (x, weight, bias)
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
        weight: ``[N, K]``, taken as float32, K a multiple of m, at most n non-zeros in every group; NaN is one.
        nm: the pattern.
        dtype: float32, float16 or bfloat16: how the values are stored.

    Returns:
        ``values`` and ``indices`` as described at the top of this file.

    Raises:
        ValueError: K is not a multiple of m, a group holds more than n non-zeros, or a value does not fit ``dtype``.
    """
    values, indices, _ = _native.pack_nm(plain(weight), nm.n, nm.m, STORED[dtype])
    return tensor(values).view(dtype), tensor(indices)


def unpack(values: Tensor, indices: Tensor, nm: NM) -> Tensor:
    """The dense weight ``[N, K]`` in the dtype of ``values``: the inverse of ``pack``.

    Raises:
        ValueError: shapes disagree, or two values of a group are not in ascending places.
    """
    return tensor(_native.unpack_nm(values, indices, nm.n, nm.m)).to(values.dtype)


@torch.library.custom_op("sparsify::linear_nm", mutates_args=())
def linear_nm(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    """The op in torch, run by the CPU kernels; shapes and dtypes as at the top of this file. On GPUs: gpu.py."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.from_numpy(_native.linear_nm(rows, values, indices, n, m, bias))
    return y.reshape(*x.shape[:-1], len(values))


@linear_nm.register_fake
def _(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


linear_nm.register_kernel("cuda")(gpu.linear_24)


def reference(x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, nm: NM) -> Tensor:
    """What the op computes, by unpacking: the oracle of the kernels and of the function body."""
    return torch.nn.functional.linear(x, unpack(values, indices, nm).to(x.dtype), bias)


SCHEMA = register(NAME, {"values": FLOATS, "indices": "tensor(uint8)"}, ["n", "m"])


def to_onnx(x: object, values: object, indices: object, bias: object, n: int, m: int) -> object:
    """Write the torch op as one ONNX node, while ``torch.onnx`` translates the graph."""
    return Opset("sparsify", 1).linear_nm(x, values, indices, bias, n=n, m=m)
