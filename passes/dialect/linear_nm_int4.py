"""``sparsify::linear_nm_int4``: ``linear_nm`` with weights of 4 bits and one scale a group of columns.

    y = x' W^T + bias       x [..., K] float32,  W [N, K],  bias [N] float32 or absent,  y [..., N] float32

x' is x quantised token by token to 8 bits (storage.py: quantise_tokens). W is stored as three tensors:

``values``   [N, ceil(K n/m / 2)]  uint8
    The codes of the kept weights, in the order of linear_nm.py, with 8 added, two to a byte, the first in the lower
    half: ``W[n, k] = (half - 8) * scales[n, k // group]``. We write codes -7 .. 7. A kept weight whose code is 0 (half
    8) stays where it is; spare slots hold code 0. Every row starts on a byte; the half behind an odd number of values
    is 0 and never read.

``indices``  [N, ceil(K n/m b / 8)]  uint8
    As in linear_nm.py.

``scales``   [N, ceil(K / group)]  float16
    Finite. Unless given, the largest ``|W|`` of ``group`` neighbouring columns over 7, rounded to float16 before codes
    are made; 0 for nothing but zeros, else at least the smallest positive float16.

One row of 2:4, a = 7 and the others smaller::

    codes   [7 0 0 -1 | 0 3 1 0]    values bytes 0x7f 0x9b  (7 + 8 | -1 + 8,  3 + 8 | 1 + 8)
                                    indices byte 0b10_01_11_00

For 2:4 that is 3 bits a weight, and 16 / group for the scales. A row keeps at most 131072 values.
"""

import math

import torch
from onnxscript.values import Opset
from torch import Tensor

from ... import _native
from ...calibrate.patterns import NM
from . import gpu
from .functions import function
from .linear_nm import index_bits
from .schema import register
from .storage import plain, quantise_tokens, tensor

NAME = "linear_nm_int4"

# Decoding with standard ops, for a runtime without our library.
FUNCTION = function("""
linear_nm_int4 <n, m, group, in_features> (x, values, indices, scales, bias) => (y)
{
    axis0 = Constant <value_ints = [0]> ()
    axis1 = Constant <value_ints = [1]> ()
    k0 = Constant <value_int: int = @in_features> ()
    n0 = Constant <value_int: int = @n> ()
    m0 = Constant <value_int: int = @m> ()
    groups = Div (k0, m0)
    kept0 = Mul (groups, n0)
    kept = Unsqueeze (kept0, axis0)
    padded = sparsify.int4_codes (values)
    codes = Slice (padded, axis0, kept, axis1)
    dense_codes = sparsify.nm_weight <n: int = @n, m: int = @m> (codes, indices)
    weight = sparsify.scale_groups <group: int = @group> (dense_codes, scales)
    tokens = sparsify.quantise_tokens (x)
    y = sparsify.dense_linear (tokens, weight, bias)
}
""")


def packed_bytes(out_features: int, in_features: int, nm: NM, group: int) -> int:
    """Size of values, indices and scales together."""
    kept = in_features * nm.n // nm.m
    scales = 2 * math.ceil(in_features / group)
    return out_features * (math.ceil(kept / 2) + math.ceil(kept * index_bits(nm.m) / 8) + scales)


def pack(weight: Tensor, nm: NM, group: int, scales: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise an N:M weight: codes to nearest, ties to even.

    Args:
        weight: ``[N, K]``, taken as float32, K a multiple of m, at most n non-zeros in every group.
        nm: the pattern.
        group: columns that share a scale: 32, 64 or 128.
        scales: ``[N, ceil(K / group)]`` float16 to use instead of those that fit the weight; codes end at -7 and 7.

    Returns:
        ``values``, ``indices`` and ``scales`` as described at the top of this file.

    Raises:
        ValueError: K is not a multiple of m, a group holds more than n non-zeros, a weight or scale is not finite, or a
            scale does not fit float16.
    """
    values, indices, used = _native.pack_nm(plain(weight), nm.n, nm.m, "int4", group=group, scales=scales)
    return tensor(values), tensor(indices), tensor(used) if scales is None else scales


def unpack(values: Tensor, indices: Tensor, scales: Tensor, nm: NM, group: int, in_features: int) -> Tensor:
    """The dense weight ``[N, in_features]`` float32, code times scale.

    Raises:
        ValueError: shapes disagree, or two values of a group are not in ascending places.
    """
    return tensor(_native.unpack_nm(values, indices, nm.n, nm.m, scales=scales, group=group, in_features=in_features))


@torch.library.custom_op("sparsify::linear_nm_int4", mutates_args=())
def linear_nm_int4(
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
    """The op in torch, run by the CPU kernels; shapes and dtypes as at the top of this file. On GPUs: gpu.py."""
    rows = x.reshape(-1, in_features).contiguous()
    y = torch.from_numpy(_native.linear_nm(rows, values, indices, n, m, bias, scales=scales, group=group))
    return y.reshape(*x.shape[:-1], len(values))


@linear_nm_int4.register_fake
def _(
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
    return x.new_empty(*x.shape[:-1], values.shape[0])


linear_nm_int4.register_kernel("cuda")(gpu.linear_24_int4)


def reference(
    x: Tensor,
    values: Tensor,
    indices: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    nm: NM,
    group: int,
    in_features: int,
) -> Tensor:
    """What the op computes, by unpacking: the oracle of the kernels and of the function body."""
    codes = unpack(values, indices, torch.ones_like(scales), nm, group, in_features).to(x.dtype)
    each = scales.to(x.dtype).repeat_interleave(group, dim=1)[:, :in_features]
    return torch.nn.functional.linear(quantise_tokens(x), codes * each, bias)


SCHEMA = register(
    NAME,
    {"values": "tensor(uint8)", "indices": "tensor(uint8)", "scales": "tensor(float16)"},
    ["n", "m", "group", "in_features"],
)


def to_onnx(
    x: object,
    values: object,
    indices: object,
    scales: object,
    bias: object,
    n: int,
    m: int,
    group: int,
    in_features: int,
) -> object:
    """Write the torch op as one ONNX node, while ``torch.onnx`` translates the graph."""
    return Opset("sparsify", 1).linear_nm_int4(
        x, values, indices, scales, bias, n=n, m=m, group=group, in_features=in_features
    )
