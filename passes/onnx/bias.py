"""The constants that linears of an ONNX model add, in the forms that other tools store them."""

from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs  # type: ignore[import-untyped]
import torch
from torch import Tensor

from .protos import TORCH, read_float
from .view import Model
from .weights import NoWeight, root, stored


@dataclass(frozen=True)
class Bias:
    """A constant ``[N]`` (or one number for all) that is added, times a factor; read as ``name``.

    Codes of 32 bits have their scale as the factor, one number or ``[N]``.
    """

    name: str
    proto: onnx.TensorProto
    factor: float | Tensor

    def is_read_as_stored(self, rows: int) -> bool:
        """Whether a sparse op of so many outputs can read the constant itself."""
        unscaled = isinstance(self.factor, float) and self.factor == 1.0
        return unscaled and self.proto.data_type == onnx.TensorProto.FLOAT and list(self.proto.dims) == [rows]


def bias_of(model: Model, tensor: gs.Tensor, rows: int, factor: float) -> Bias | None:
    """A constant bias: one number for each of ``rows`` outputs, or one for all; or codes, as static quantisers write.

    None where it is another thing; ``factor`` is what the op multiplies it by.
    """
    origin = root(tensor)  # exporters let equal biases share one tensor through Identity
    maker = origin.tensor.inputs[0] if origin.tensor.inputs else None
    if maker is not None and maker.op == "DequantizeLinear" and not origin.casts and factor == 1.0:
        return _coded(model, tensor, maker, rows)
    try:
        proto = stored(model, origin.tensor)
    except NoWeight:
        return None
    if any(dtype.itemsize < torch.float32.itemsize for dtype in origin.casts) and proto.data_type in TORCH:
        held = read_float(proto, model.folder)
        if not torch.equal(origin.rounded(held), held):
            return None  # a cast on the way rounds it
    fits = list(proto.dims) in ([rows], [1, rows], [], [1], [1, 1])
    return Bias(tensor.name, proto, factor) if fits and proto.data_type in TORCH else None


def _coded(model: Model, tensor: gs.Tensor, node: gs.Node, rows: int) -> Bias | None:
    """A bias behind a DequantizeLinear: 32-bit codes, one scale or one for each output, zero points of 0."""
    try:
        codes, scale, *point = (stored(model, x) for x in node.inputs if x.name)
    except NoWeight:
        return None
    if (
        codes.data_type != onnx.TensorProto.INT32
        or list(codes.dims) != [rows]
        or list(scale.dims) not in ([], [1], [rows])
    ):
        return None
    if scale.data_type != onnx.TensorProto.FLOAT or any(bool(read_float(x, model.folder).any()) for x in point):
        return None
    return Bias(tensor.name, codes, read_float(scale, model.folder).reshape(-1))


def own_bias(model: Model, tensor: gs.Tensor | None, rows: int) -> Bias | None:
    """The bias that an op has among its inputs, where it has one.

    Raises:
        NoWeight: it is computed.
    """
    if tensor is None:
        return None
    found = bias_of(model, tensor, rows, 1.0)
    if found is None:
        raise NoWeight("its bias is computed")
    return found
