"""``sparsify::linear_nm_int8``: ``linear_nm`` with weights of 8 bits and one scale a row.

    y = x' W^T + bias       x [..., K] float32,  W [N, K],  bias [N] float32 or absent,  y [..., N] float32

x' is x quantised token by token to 8 bits (storage.py: quantise_tokens), so that codes are multiplied with codes and
added up in integers. W is stored as three tensors:

``values``   [N, K n/m]  int8
    The codes of the kept weights, in the order of linear_nm.py: ``W[n, k] = code * scales[n]``. We write -127 .. 127.
    A kept weight whose code is 0 stays where it is; spare slots hold 0.

``indices``  [N, ceil(K n/m b / 8)]  uint8
    As in linear_nm.py.

``scales``   [N]  float32
    Finite. Unless given, the largest ``|W|`` of the row over 127; 0 for a row of zeros.

For 2:4 that is 16 codes and one 32-bit word for 32 columns: 0.63 of the dense bytes in int8.
A row keeps at most 131072 values, so that its sum fits 32 bits.
"""

import math

import torch
from onnxscript.values import Opset
from torch import Tensor

from ... import _native
from ...calibrate.patterns import NM
from .functions import function
from .linear_nm import index_bits
from .schema import register
from .storage import plain, quantise_tokens, tensor

NAME = "linear_nm_int8"

# Decoding with standard ops, for a runtime without our library.
FUNCTION = function("""
linear_nm_int8 <n, m> (x, values, indices, scales, bias) => (y)
{
    codes = Cast <to = 1> (values)
    dense_codes = sparsify.nm_weight <n: int = @n, m: int = @m> (codes, indices)
    weight = sparsify.scale_rows (dense_codes, scales)
    tokens = sparsify.quantise_tokens (x)
    y = sparsify.dense_linear (tokens, weight, bias)
}
""")


def packed_bytes(out_features: int, in_features: int, nm: NM) -> int:
    """Size of values, indices and scales together."""
    kept = in_features * nm.n // nm.m
    return out_features * (kept + math.ceil(kept * index_bits(nm.m) / 8) + 4)


def pack(weight: Tensor, nm: NM, scales: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise an N:M weight: codes to nearest, ties to even.

    Args:
        weight: ``[N, K]``, taken as float32, K a multiple of m, at most n non-zeros in every group.
        nm: the pattern.
        scales: ``[N]`` float32 to use instead of those that fit the weight; codes end at -127 and 127.

    Returns:
        ``values``, ``indices`` and ``scales`` as described at the top of this file.

    Raises:
        ValueError: K is not a multiple of m, a group holds more than n non-zeros, or a weight or scale is not finite.
    """
    values, indices, used = _native.pack_nm(plain(weight), nm.n, nm.m, "int8", scales=scales)
    return tensor(values), tensor(indices), tensor(used) if scales is None else scales


def unpack(values: Tensor, indices: Tensor, scales: Tensor, nm: NM) -> Tensor:
    """The dense weight ``[N, K]`` float32, code times scale.

    Raises:
        ValueError: shapes disagree, or two values of a group are not in ascending places.
    """
    return tensor(_native.unpack_nm(values, indices, nm.n, nm.m, scales=scales))


@torch.library.custom_op("sparsify::linear_nm_int8", mutates_args=())
def linear_nm_int8(
    x: Tensor, values: Tensor, indices: Tensor, scales: Tensor, bias: Tensor | None, n: int, m: int
) -> Tensor:
    """The op in torch, run by the CPU kernels; shapes and dtypes as at the top of this file."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = torch.from_numpy(_native.linear_nm(rows, values, indices, n, m, bias, scales=scales))
    return y.reshape(*x.shape[:-1], len(values))


@linear_nm_int8.register_fake
def _(x: Tensor, values: Tensor, indices: Tensor, scales: Tensor, bias: Tensor | None, n: int, m: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def reference(x: Tensor, values: Tensor, indices: Tensor, scales: Tensor, bias: Tensor | None, nm: NM) -> Tensor:
    """What the op computes, by unpacking: the oracle of the kernels and of the function body."""
    weight = unpack(values, indices, torch.ones_like(scales), nm).to(x.dtype) * scales.to(x.dtype)[:, None]
    return torch.nn.functional.linear(quantise_tokens(x), weight, bias)


SCHEMA = register(NAME, {"values": "tensor(int8)", "indices": "tensor(uint8)", "scales": "tensor(float)"}, ["n", "m"])


def to_onnx(x: object, values: object, indices: object, scales: object, bias: object, n: int, m: int) -> object:
    """Write the torch op as one ONNX node, while ``torch.onnx`` translates the graph."""
    return Opset("sparsify", 1).linear_nm_int8(x, values, indices, scales, bias, n=n, m=m)
