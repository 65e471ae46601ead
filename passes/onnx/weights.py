"""Constant weights of ONNX linears, in every form that other tools store them: which tensors, and how to read them.

Whatever the form, ``Weight.read`` gives the float matrix ``[out_features, in_features]``.
"""

from collections.abc import Callable
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs  # type: ignore[import-untyped]
import onnx_ir as ir
import torch
from torch import Tensor

from .protos import TORCH, nbytes, read_float
from .quantised import dequantise, dequantise_blocks
from .view import STANDARD, Model

CODES = frozenset(getattr(onnx.TensorProto, name) for name in ("INT8", "UINT8", "INT4", "UINT4"))
"""The types of quantised numbers that every float type holds as they are."""


class NoWeight(Exception):
    """Why a tensor is not the weight of a linear; the message goes into the report."""


@dataclass(frozen=True)
class Weight:
    """One weight.

    Attributes:
        name: the tensor that holds its values.
        value: the tensor that gives the same values in float: itself, or the output of DequantizeLinear or of a Mul
            with the scale; "" where there is none.
        shape: ``(out_features, in_features)``.
        rows_first: whether ``value`` is ``[out_features, in_features]`` rather than transposed.
        dtype: the float type that the linear sees.
        quantised: whether the values are stored as integers.
        stored_bytes: all parts in the file.
        bits: of one stored number.
        read: reads ``[out_features, in_features]`` in the type of ``value``, float32 where there is none.
        group: neighbours along in_features that share a scale; 0 where there are no such groups.
    """

    name: str
    value: str
    shape: tuple[int, int]
    rows_first: bool
    dtype: torch.dtype
    quantised: bool
    stored_bytes: int
    bits: int
    read: Callable[[], Tensor]
    group: int = 0


@dataclass(frozen=True)
class Root:
    """Where a tensor comes from, through nodes that only pass it on.

    Attributes:
        tensor: the first one.
        transposed: whether it was transposed on the way.
        casts: the float types it was cast to, in order.
    """

    tensor: gs.Tensor
    transposed: bool
    casts: tuple[torch.dtype, ...]

    def dtype(self, stored: int) -> torch.dtype:
        """The type at the end, of a tensor stored as ``stored``."""
        return self.casts[-1] if self.casts else TORCH[stored]

    def rounded(self, values: Tensor) -> Tensor:
        """What the casts make of ``values``, in the type of ``values``: each may round."""
        cast = values
        for dtype in self.casts:
            cast = cast.to(dtype)
        return cast.to(values.dtype)


def root(tensor: gs.Tensor) -> Root:
    """Follow Identity, Transpose of a matrix, and Cast between float types backwards."""
    transposed, casts = False, list[torch.dtype]()
    while isinstance(tensor, gs.Variable) and len(tensor.inputs) == 1 and passes_on(tensor.inputs[0]):
        node = tensor.inputs[0]
        transposed ^= node.op == "Transpose"
        if node.op == "Cast":
            casts.insert(0, TORCH[int(node.attrs["to"])])
        tensor = node.inputs[0]
    return Root(tensor, transposed, tuple(casts))


def passes_on(node: gs.Node) -> bool:
    """Whether a node gives on a matrix as it is, transposed, or in another float type."""
    if (node.domain or "") not in STANDARD:
        return False
    if node.op == "Transpose":
        return bool(node.attrs.get("perm") in (None, [1, 0]))
    return node.op == "Identity" or (node.op == "Cast" and node.attrs["to"] in TORCH)


def plain(model: Model, tensor: gs.Tensor, *, rows_first: bool) -> Weight:
    """The weight that ``tensor`` holds, in float or through DequantizeLinear.

    Args:
        model: where it is from.
        tensor: what the linear reads.
        rows_first: whether the linear wants ``[out_features, in_features]``; most want it transposed.

    Raises:
        NoWeight: it is computed, not a float matrix, or may be replaced by the caller.
    """
    origin = root(tensor)
    producer = origin.tensor.inputs[0] if isinstance(origin.tensor, gs.Variable) and origin.tensor.inputs else None
    if producer is not None and producer.op == "DequantizeLinear":
        return _dequantised(model, producer, origin, rows_first=rows_first ^ origin.transposed)
    if producer is not None and (side := codes(model, producer)) is not None:
        return _scaled(model, producer, side, origin, rows_first=rows_first ^ origin.transposed)
    proto = stored(model, origin.tensor)
    if proto.data_type not in TORCH:
        raise NoWeight(f"its weight holds {kind(proto)}")
    dtype = origin.dtype(proto.data_type)
    if torch.float64 in (dtype, TORCH[proto.data_type]):
        raise NoWeight("its weight is double")
    _check_casts(origin, TORCH[proto.data_type])
    lying = rows_first ^ origin.transposed
    shape = _matrix(proto, lying)
    name = origin.tensor.name

    def read() -> Tensor:
        matrix = origin.rounded(read_float(proto, model.folder))
        return matrix if lying else matrix.T.contiguous()

    return Weight(name, name, shape, lying, dtype, False, nbytes(proto), _bits(proto), read)


def _dequantised(model: Model, node: gs.Node, origin: Root, *, rows_first: bool) -> Weight:
    """The weight behind a DequantizeLinear: one scale, one a row or column, or one a block."""
    tensors = [root(x).tensor for x in node.inputs if x.name]
    protos = [stored(model, x) for x in tensors]
    shape = _matrix(protos[0], rows_first)
    if any(root(x).transposed for x in node.inputs if x.name):
        raise NoWeight("its quantised weight is transposed before it is dequantised")
    if protos[1].data_type not in TORCH:
        raise NoWeight(f"its scale holds {kind(protos[1])}")
    _check_casts(origin, TORCH[protos[1].data_type])
    axis, block = node.attrs.get("axis", 1), node.attrs.get("block_size", 0)

    def read() -> Tensor:
        parts = [read_float(proto, model.folder).float() for proto in protos]
        matrix = origin.rounded(dequantise(*parts, axis=axis, block_size=block).to(TORCH[protos[1].data_type]))
        return matrix if rows_first else matrix.T.contiguous()

    dtype = origin.dtype(protos[1].data_type)
    value = node.outputs[0].name
    size = sum(map(nbytes, protos))
    group = block if axis % 2 == int(rows_first) else 0
    return Weight(tensors[0].name, value, shape, rows_first, dtype, True, size, _bits(protos[0]), read, group)


def codes(model: Model, node: gs.Node) -> int | None:
    """Which input of ``Mul(Cast(codes), scale)`` the codes are: integers of 8 bits or fewer; None for another node."""
    if node.op != "Mul" or (node.domain or "") not in STANDARD:
        return None
    for side, tensor in enumerate(node.inputs):
        proto = model.constants.get(root(tensor).tensor.name)
        if proto is not None and proto.data_type in CODES:
            return side
    return None


def _scaled(model: Model, node: gs.Node, side: int, origin: Root, *, rows_first: bool) -> Weight:
    """The weight of ``Mul(Cast(codes), scale)``: one scale, or one for each row or column."""
    values, scale = root(node.inputs[side]), root(node.inputs[1 - side])
    protos = [stored(model, part.tensor) for part in (values, scale)]
    shape = _matrix(protos[0], rows_first ^ values.transposed)
    if protos[1].data_type not in TORCH:
        raise NoWeight(f"its scale holds {kind(protos[1])}")
    held = scale.dtype(protos[1].data_type)
    dtype = origin.casts[-1] if origin.casts else held
    if torch.float64 in (held, dtype):
        raise NoWeight("its weight is double")
    wanted = shape if rows_first else shape[::-1]
    dims = [1, 1, *protos[1].dims][-2:]
    if scale.transposed or len(protos[1].dims) > 2 or any(x not in (1, y) for x, y in zip(dims, wanted, strict=True)):
        raise NoWeight("its scale is not one number, nor one for each row or column")
    _check_casts(origin, held)

    def read() -> Tensor:
        numbers, factors = (read_float(proto, model.folder).float() for proto in protos)
        numbers, factors = values.rounded(numbers), scale.rounded(factors)
        product = (numbers.T if values.transposed else numbers) * factors  # exact in float32 for 16 bits
        matrix = origin.rounded(product.to(held))
        return matrix if rows_first else matrix.T.contiguous()

    size, value = sum(map(nbytes, protos)), node.outputs[0].name
    return Weight(values.tensor.name, value, shape, rows_first, dtype, True, size, _bits(protos[0]), read)


def integer(model: Model, values: gs.Tensor, scale: gs.Tensor, zero_point: gs.Tensor | None) -> Weight:
    """The weight ``[K, N]`` of an integer matrix product: one scale and zero point, or one for each output.

    Raises:
        NoWeight: a part is computed or has another shape.
    """
    tensors = [x for x in (values, scale, zero_point) if x is not None and x.name]
    protos = [stored(model, x) for x in tensors]
    shape = _matrix(protos[0], rows_first=False)
    if any(len(proto.dims) > 1 or (list(proto.dims) not in ([], [1], [shape[0]])) for proto in protos[1:]):
        raise NoWeight("its scale or zero point is not one number, nor one for each output")

    def read() -> Tensor:
        parts = [read_float(proto, model.folder).float() for proto in protos]
        return dequantise(*parts, axis=1, block_size=0).T.contiguous()

    return Weight(values.name, "", shape, False, torch.float32, True, sum(map(nbytes, protos)), _bits(protos[0]), read)


def blocks(model: Model, node: gs.Node) -> Weight:
    """The weight of com.microsoft MatMulNBits.

    Raises:
        NoWeight: it is ordered by g_idx, or in a width we do not read.
    """
    inputs = [x if x.name else None for x in node.inputs] + [None] * 6
    if inputs[4] is not None:
        raise NoWeight("its groups are ordered by g_idx")
    bits, block = int(node.attrs.get("bits", 4)), int(node.attrs["block_size"])
    if bits not in (4, 8):
        raise NoWeight(f"its weight has {bits} bits; 4 and 8 are read")
    shape = (int(node.attrs["N"]), int(node.attrs["K"]))
    tensors = [x for x in (inputs[1], inputs[2], inputs[3]) if x is not None]
    protos = [stored(model, x) for x in tensors]
    if protos[1].data_type not in TORCH:
        raise NoWeight(f"its scale holds {kind(protos[1])}")
    packed_points = len(protos) > 2 and protos[2].data_type == onnx.TensorProto.UINT8

    def read() -> Tensor:
        parts = [read_float(proto, model.folder).float() for proto in protos]
        return dequantise_blocks(*parts, shape=shape, bits=bits, block_size=block, packed_points=packed_points)

    dtype = TORCH[protos[1].data_type]
    return Weight(tensors[0].name, "", shape, False, dtype, True, sum(map(nbytes, protos)), bits, read, block)


def stored(model: Model, tensor: gs.Tensor) -> onnx.TensorProto:
    """The stored tensor behind a name.

    Raises:
        NoWeight: it is computed, or an input of the model.
    """
    proto = model.constants.get(tensor.name)
    if proto is None:
        raise NoWeight("its weight is computed")
    if any(value.name == tensor.name for value in model.proto.graph.input):
        raise NoWeight("the caller may replace its weight, which is an input of the model")
    return proto


def _check_casts(origin: Root, held: torch.dtype) -> None:
    """What the casts make of a weight must be a number of the type it is stored in, where the zeros are put.

    Raises:
        NoWeight: float16 becomes bfloat16 on the way, or the other way round.
    """
    short = {dtype for dtype in (held, *origin.casts) if dtype.itemsize == 2}
    if held.itemsize == 2 and len(short) > 1:
        raise NoWeight("its weight is cast from one type of 16 bits to the other")


def _bits(proto: onnx.TensorProto) -> int:
    return int(ir.DataType(proto.data_type).bitwidth)


def kind(proto: onnx.TensorProto) -> str:
    """The name of a tensor's type."""
    return str(onnx.TensorProto.DataType.Name(proto.data_type)).lower()


def _matrix(proto: onnx.TensorProto, rows_first: bool) -> tuple[int, int]:
    if len(proto.dims) != 2:
        raise NoWeight(f"its weight has rank {len(proto.dims)}")
    first, second = proto.dims
    return (first, second) if rows_first else (second, first)
