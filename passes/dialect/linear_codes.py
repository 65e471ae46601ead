"""``sparsify::linear_codes``: a dense weight in codes of 8 or 4 bits, run by ONNX Runtime's own ``MatMulNBits``.

    y = x' W^T + bias       x [..., K] float32,  W [N, K],  bias [N] float32 or absent,  y [..., N] float32

It is what a sparse linear has to beat. The file holds the node ``com.microsoft.MatMulNBits`` with an accuracy level of
4: x' is x quantised to 8 bits, a block of columns at a time (storage.py: quantise_blocks). W is stored as two tensors:

``codes``    [N, B, block bits / 8]  uint8, B = ceil(K / block)
    ``W[n, k] = (code - 2^(bits-1)) * scales[n, k // block]``, of 4 bits two to a byte, the first in the lower half. We
    write ``code - 2^(bits-1)`` from -7 to 7 or -127 to 127. Columns behind the last are 0 (half 8, byte 128).

``scales``   [N, B]  float32
    int4: those of the groups of the grid, which are float16 numbers. int8: that of the row, B times.

With blocks of 32 that is 5 bits a weight of 4 bits. There is no function of standard ops in the file: who reads it
needs ONNX Runtime, or another runtime that knows this operator.
"""

import math

import onnx
import torch
from onnx.defs import OpSchema
from onnxscript.values import Opset
from torch import Tensor

from ...calibrate import grid as grids
from .storage import Storage, quantise_blocks

NAME = "linear_codes"
NODE, DOMAIN = "MatMulNBits", "com.microsoft"
TENSORS = ("codes", "scales")
BITS = {"int8": 8, "int4": 4}


def attributes(storage: Storage, out_features: int, in_features: int) -> dict[str, int]:
    """Those of the node that holds a weight stored so."""
    return {
        "K": in_features,
        "N": out_features,
        "bits": BITS[storage.kind],
        "block_size": storage.block_of(in_features),
        "accuracy_level": 4,
    }


def packed_bytes(out_features: int, in_features: int, storage: Storage) -> int:
    """Size of codes and scales together."""
    block = storage.block_of(in_features)
    return out_features * math.ceil(in_features / block) * (block * BITS[storage.kind] // 8 + 4)


def pack(weight: Tensor, storage: Storage, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantise a weight: codes to nearest, ties to even.

    Args:
        weight: ``[N, K]``, taken as float32.
        storage: int8 or int4, ``blocked``.
        scales: those of the grid to use instead of what fits the weight, ``[N]`` of int8, else ``[N, groups]``.

    Returns:
        ``codes`` and ``scales`` as described at the top of this file.

    Raises:
        ValueError: a weight is not finite, or a scale does not fit float16.
    """
    own, block, (rows, columns) = storage.grid, storage.block_of(weight.shape[1]), weight.shape
    exact = weight.detach().float()
    top = grids.largest(exact, own)
    scale = grids.scales(top, torch.ones_like(top), own) if scales is None else scales.float().reshape(rows, -1)
    steps = grids.spread(scale, columns, own)
    codes = (exact / torch.where(steps > 0, steps, 1.0)).round().clamp(-own.limit, own.limit)
    whole = torch.nn.functional.pad(codes, (0, -columns % block)) + 2 ** (BITS[storage.kind] - 1)
    stored = whole.to(torch.uint8).reshape(rows, -1, block)
    if storage.kind == "int4":
        stored = stored[..., 0::2] | (stored[..., 1::2] << 4)
    return stored.contiguous(), scale.expand(-1, stored.shape[1]).contiguous()


def unpack(codes: Tensor, scales: Tensor, bits: int, in_features: int) -> Tensor:
    """The dense weight ``[N, in_features]`` float32, code times scale."""
    halves = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2) if bits == 4 else codes
    exact: Tensor = (halves.float() - 2 ** (bits - 1)) * scales[..., None]
    return exact.flatten(1)[:, :in_features] + 0.0  # + 0.0 turns -0.0 into 0.0


@torch.library.custom_op("sparsify::linear_codes", mutates_args=())
def linear_codes(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int, block: int, in_features: int
) -> Tensor:
    """The op in torch; shapes and dtypes as at the top of this file."""
    return reference(x, codes, scales, bias, bits, block, in_features)


@linear_codes.register_fake
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int, block: int, in_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], codes.shape[0])


def reference(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, bits: int, block: int, in_features: int
) -> Tensor:
    """What the op computes, by unpacking."""
    weight = unpack(codes, scales, bits, in_features).to(x.dtype)
    return torch.nn.functional.linear(quantise_blocks(x, block), weight, bias)


def _register() -> None:
    """Make ONNX Runtime's operator known to ``torch.onnx``, as far as we write it."""
    formal, optional = OpSchema.FormalParameter, OpSchema.FormalParameterOption.Optional
    given = {"A": "tensor(float)", "B": "tensor(uint8)", "scales": "tensor(float)"}
    absent = {"zero_points": "tensor(uint8)", "g_idx": "tensor(int32)", "bias": "tensor(float)"}
    onnx.defs.register_schema(
        OpSchema(
            NODE,
            DOMAIN,
            1,
            inputs=[
                *(formal(name, kind) for name, kind in given.items()),
                *(formal(name, kind, param_option=optional) for name, kind in absent.items()),
            ],
            outputs=[formal("Y", "tensor(float)")],
            attributes=[
                OpSchema.Attribute(name, OpSchema.AttrType.INT, "")
                for name in ("K", "N", "bits", "block_size", "accuracy_level")
            ],
        )
    )


_register()


def to_onnx(
    x: object, codes: "object", scales: object, bias: object, bits: int, block: int, in_features: int
) -> object:
    """Write the torch op as one ONNX node, while ``torch.onnx`` translates the graph."""
    rows = codes.shape[0]  # type: ignore[attr-defined]
    return Opset(DOMAIN, 1).MatMulNBits(
        x, codes, scales, None, None, bias, K=in_features, N=int(rows), bits=bits, block_size=block, accuracy_level=4
    )
