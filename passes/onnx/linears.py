"""The linears of an ONNX model: every op that multiplies with a constant matrix, and why some of them stay as they are.

``MatMul``, ``Gemm``, and of ONNX Runtime's own ops ``FusedMatMul``, ``MatMulNBits``, ``MatMulIntegerToFloat``,
``DynamicQuantizeMatMul`` and the group of ops that ``quantize_dynamic`` writes around ``MatMulInteger``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx
import onnx_graphsurgeon as gs  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ..dialect.packed import OPS, TENSORS
from .protos import TORCH, graphs, nbytes, read_float
from .unfold import MICROSOFT, NOT_UNFOLDED
from .view import STANDARD, Model, Place
from .weights import NoWeight, Weight, blocks, codes, integer, passes_on, plain, root, stored

UNROUNDED = "its activations are no longer rounded to 8 bits"


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


@dataclass(frozen=True)
class Linear:
    """``y = alpha x W^T + bias`` in the graph.

    Attributes:
        path: the node's name, or that of its output where it has none.
        op: what the file calls it.
        place: where the node stands.
        nodes: the nodes that make it up: the product, and where there are such the Add of the bias or the ops that
            quantise and scale.
        x: what it reads.
        y: what it makes.
        weight: its weight.
        alpha: factor of the product.
        bias: what is added, or None.
        note: what besides the weight changes when it is lowered; "" for nothing.
    """

    path: str
    op: str
    place: Place
    nodes: tuple[gs.Node, ...]
    x: gs.Tensor
    y: gs.Tensor
    weight: Weight
    alpha: float = 1.0
    bias: Bias | None = None
    note: str = ""


@dataclass(frozen=True)
class LeftOut:
    """A product with a constant that is not lowered, and the reason.

    Attributes:
        path: as in ``Linear``.
        op: what the file calls it.
        shape: ``(out_features, in_features)`` as far as it has such.
        stored_bytes: its constant in the file.
        reason: why not.
        dims: of its constant, where that is no matrix: batches in front of ``shape``.
        weight: the name of its constant; "" for one that is not known.
        read: its weight ``[out_features, in_features]``, where it can be read.
    """

    path: str
    op: str
    shape: tuple[int, int]
    stored_bytes: int
    reason: str
    dims: tuple[int, ...] = ()
    weight: str = ""
    read: Callable[[], Tensor | None] = lambda: None


def find_linears(model: Model) -> tuple[list[Linear], list[LeftOut]]:
    """Every linear of a model that can be lowered, and every other product with a constant.

    A linear whose weight is also read by something else, or by another linear the other way round, is left out: the
    file would hold the weight twice, and pruning it would change more than the linear.
    """
    outputs, constants, sparse = model.outputs(), _constant_expressions(model), _sparse_tensors(model)
    found: list[Linear] = []
    left: list[LeftOut] = []
    for node in model.nodes():
        if node.domain == "sparsify" and node.op in OPS:
            left.append(_already_sparse(model, node))
            continue
        if not _is_product(node):
            left += _other_product(node, constants)
            continue
        try:
            linear = _linear(model, node, outputs)
        except NoWeight as reason:
            if any(x.name in sparse for x in node.inputs):
                left.append(LeftOut(_path(node), node.op, (0, 0), 0, "its weight is stored as a sparse tensor"))
                continue
            operands = [constants[x.name] for x in (node.inputs[1], node.inputs[0]) if x.name in constants]
            if operands:
                left.append(_left_out(node, operands[0], str(reason)))
            continue
        found.append(linear)
    found, shared = _without_shared(model, found, outputs)
    return found, [*left, *shared, *_inside_functions(model)]


_CONTRIB = ("FusedMatMul", "MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
_OTHER_PRODUCTS = """
    Attention Conv ConvInteger ConvTranspose DecoderAttention DynamicQuantizeLSTM Einsum FusedConv FusedGemm
    FusedMatMulActivation GRU GemmFastGelu GemmFloat8 LSTM MatMulBnb4 MatMulFpQ4 MoE NhwcConv
    QAttention QGemm QLinearConv QLinearMatMul QMoE QOrderedMatMul RNN SparseToDenseMatMul
"""
OTHER_PRODUCTS = frozenset(_OTHER_PRODUCTS.split())
"""Ops that multiply with a weight and are not read: they are named, so that what is left is known."""


def _other_product(node: gs.Node, constants: dict[str, onnx.TensorProto]) -> list[LeftOut]:
    """A product of another kind, if one of its operands is a constant with two axes or more."""
    if node.op not in OTHER_PRODUCTS or (node.domain or "") not in (*STANDARD, MICROSOFT):
        return []
    stored_ = [constants[x.name] for x in node.inputs if x.name in constants]
    weights = [proto for proto in stored_ if len(proto.dims) > 1]
    if not weights:
        return []
    why = NOT_UNFOLDED if node.op in ("QLinearMatMul", "QGemm") else f"the op {node.op} is left as it is"
    left = _left_out(node, largest := max(weights, key=nbytes), why)
    if "Conv" in node.op:  # [out, in, side, side]: a linear on the numbers that the window covers
        left = replace(left, shape=(largest.dims[0], math.prod(largest.dims[1:])), dims=())
    return [left]


def _already_sparse(model: Model, node: gs.Node) -> LeftOut:
    """One of our own ops, as in a file that we wrote."""
    names = TENSORS[node.op]
    inputs = zip(names, node.inputs[1:], strict=False)
    protos = {name: model.constants[x.name] for name, x in inputs if x.name in model.constants}
    shape = (0, 0)
    if set(protos) == set(names) and protos["values"].dims:
        rows = protos["row_start"].dims[0] - 1 if "row_start" in protos else protos["values"].dims[0]
        n, m = node.attrs.get("n", 1), node.attrs.get("m", 1)
        shape = rows, node.attrs.get("in_features", protos["values"].dims[-1] * m // max(1, n))
    return LeftOut(_path(node), node.op, shape, sum(map(nbytes, protos.values())), "it is a sparse op already")


def _is_product(node: gs.Node) -> bool:
    domain = node.domain or ""
    if domain in STANDARD:
        return node.op in ("MatMul", "Gemm", "MatMulInteger")
    return domain == MICROSOFT and node.op in _CONTRIB


def _linear(model: Model, node: gs.Node, outputs: set[str]) -> Linear:
    """Read one product.

    Raises:
        NoWeight: it is not a linear that can be lowered.
    """
    read = {
        "MatMul": _matmul,
        "FusedMatMul": _fused,
        "Gemm": _gemm,
        "MatMulNBits": _nbits,
        "MatMulIntegerToFloat": _integer_to_float,
        "DynamicQuantizeMatMul": _dynamic,
        "MatMulInteger": _integer,
    }[node.op]
    linear = read(model, node)
    if linear.bias is None:
        linear = _with_add(model, linear, outputs)
    inner = [x for n in linear.nodes[:-1] for x in n.outputs if x is not linear.y]
    if any(x.name in outputs for x in inner):
        raise NoWeight("a result in the middle of it is an output of the model")
    return linear


def _make(model: Model, node: gs.Node, x: gs.Tensor, weight: Weight, **more: object) -> Linear:
    values = {"nodes": (node,), "y": node.outputs[0], **more}
    return Linear(_path(node), model.called(node), model.places[id(node)], x=x, weight=weight, **values)


def _matmul(model: Model, node: gs.Node) -> Linear:
    return _make(model, node, node.inputs[0], plain(model, node.inputs[1], rows_first=False))


def _fused(model: Model, node: gs.Node) -> Linear:
    for name in ("transA", "transBatchA", "transBatchB"):
        if node.attrs.get(name):
            raise NoWeight(f"it transposes ({name})")
    weight = plain(model, node.inputs[1], rows_first=bool(node.attrs.get("transB")))
    return _make(model, node, node.inputs[0], weight, alpha=float(node.attrs.get("alpha", 1.0)))


def _gemm(model: Model, node: gs.Node) -> Linear:
    if node.attrs.get("transA"):
        raise NoWeight("it transposes its input (transA)")
    weight = plain(model, node.inputs[1], rows_first=bool(node.attrs.get("transB")))
    bias = None
    if len(node.inputs) > 2 and node.inputs[2].name:
        bias = _bias(model, node.inputs[2], weight, float(node.attrs.get("beta", 1.0)))
        if bias is None:
            raise NoWeight("its C is not a constant with one number for each output")
    return _make(model, node, node.inputs[0], weight, alpha=float(node.attrs.get("alpha", 1.0)), bias=bias)


def _nbits(model: Model, node: gs.Node) -> Linear:
    weight = blocks(model, node)
    return _make(model, node, node.inputs[0], weight, bias=_own_bias(model, node, 5, weight))


def _integer_to_float(model: Model, node: gs.Node) -> Linear:
    x, scale, point = node.inputs[0], node.inputs[2], _optional(node, 4)
    quantiser = _dynamic_quantiser(x, scale, point)
    weight = integer(model, node.inputs[1], node.inputs[3], _optional(node, 5))
    bias = _own_bias(model, node, 6, weight)
    return _make(model, node, quantiser.inputs[0], weight, bias=bias, note=UNROUNDED)


def _dynamic(model: Model, node: gs.Node) -> Linear:
    weight = integer(model, node.inputs[1], node.inputs[2], _optional(node, 3))
    return _make(model, node, node.inputs[0], weight, bias=_own_bias(model, node, 4, weight), note=UNROUNDED)


def _integer(model: Model, node: gs.Node) -> Linear:
    """DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul(x_scale * w_scale), as ``quantize_dynamic`` writes it."""
    stored(model, node.inputs[1])
    unknown = NoWeight("what scales its result is not what quantize_dynamic writes")
    cast = _only_reader(node.outputs[0], "Cast")
    scaled = None if cast is None else _only_reader(cast.outputs[0], "Mul")
    if cast is None or scaled is None or cast.attrs["to"] != onnx.TensorProto.FLOAT:
        raise unknown
    scales = _other(scaled, cast.outputs[0])
    if not scales.inputs or scales.inputs[0].op != "Mul":
        raise unknown
    first, second = scales.inputs[0].inputs
    x_scale, w_scale = (second, first) if first.name in model.constants else (first, second)
    quantiser = _dynamic_quantiser(node.inputs[0], x_scale, _optional(node, 2))
    weight = integer(model, node.inputs[1], w_scale, _optional(node, 3))
    nodes = (node, cast, scaled)
    return _make(model, node, quantiser.inputs[0], weight, nodes=nodes, y=scaled.outputs[0], note=UNROUNDED)


def _dynamic_quantiser(x: gs.Tensor, scale: gs.Tensor, point: gs.Tensor | None) -> gs.Node:
    """The DynamicQuantizeLinear that made the three, so that what it read can be used as it was."""
    makers = [t.inputs[0] if t is not None and t.inputs else None for t in (x, scale, point)]
    first = makers[0]
    if first is None or first.op != "DynamicQuantizeLinear" or any(maker is not first for maker in makers):
        raise NoWeight("its input is not quantised by a DynamicQuantizeLinear, so it exists in 8 bits only")
    return first


def _with_add(model: Model, linear: Linear, outputs: set[str]) -> Linear:
    """The same linear together with the Add that follows it, if that adds one constant number to each output."""
    add = _only_reader(linear.y, "Add")
    if add is None or linear.y.name in outputs:
        return linear
    bias = _bias(model, _other(add, linear.y), linear.weight, 1.0)
    if bias is None or list(bias.proto.dims) != [linear.weight.shape[0]]:
        return linear
    return replace(linear, nodes=(*linear.nodes, add), y=add.outputs[0], bias=bias)


def _bias(model: Model, tensor: gs.Tensor, weight: Weight, factor: float) -> Bias | None:
    """A constant float bias: one number for each output, or one for all; or codes of it, as static quantisers write."""
    origin = root(tensor)  # exporters let equal biases share one tensor through Identity
    maker = origin.tensor.inputs[0] if origin.tensor.inputs else None
    if maker is not None and maker.op == "DequantizeLinear" and not origin.casts and factor == 1.0:
        return _coded_bias(model, tensor, maker, weight.shape[0])
    try:
        proto = stored(model, origin.tensor)
    except NoWeight:
        return None
    if any(dtype.itemsize < torch.float32.itemsize for dtype in origin.casts) and proto.data_type in TORCH:
        held = read_float(proto, model.folder)
        if not torch.equal(origin.rounded(held), held):
            return None  # a cast on the way rounds it
    rows = weight.shape[0]
    fits = list(proto.dims) in ([rows], [1, rows], [], [1], [1, 1])
    return Bias(tensor.name, proto, factor) if fits and proto.data_type in TORCH else None


def _coded_bias(model: Model, tensor: gs.Tensor, node: gs.Node, rows: int) -> Bias | None:
    """A bias behind a DequantizeLinear: 32-bit codes, one scale or one for each output, zero points of 0."""
    try:
        codes_, scale, *point = (stored(model, x) for x in node.inputs if x.name)
    except NoWeight:
        return None
    if (
        codes_.data_type != onnx.TensorProto.INT32
        or list(codes_.dims) != [rows]
        or list(scale.dims) not in ([], [1], [rows])
    ):
        return None
    if scale.data_type != onnx.TensorProto.FLOAT or any(bool(read_float(x, model.folder).any()) for x in point):
        return None
    return Bias(tensor.name, codes_, read_float(scale, model.folder).reshape(-1))


def _own_bias(model: Model, node: gs.Node, index: int, weight: Weight) -> Bias | None:
    tensor = _optional(node, index)
    if tensor is None:
        return None
    bias = _bias(model, tensor, weight, 1.0)
    if bias is None:
        raise NoWeight("its bias is computed")
    return bias


def _optional(node: gs.Node, index: int) -> gs.Tensor | None:
    return node.inputs[index] if index < len(node.inputs) and node.inputs[index].name else None


def _only_reader(tensor: gs.Tensor, op: str) -> gs.Node | None:
    """The node that reads a tensor, if it is the only one and of this kind."""
    readers = list(tensor.outputs)
    if len(readers) == 1 and readers[0].op == op and (readers[0].domain or "") in STANDARD:
        return readers[0]
    return None


def _other(node: gs.Node, tensor: gs.Tensor) -> gs.Tensor:
    return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]


def _without_shared(model: Model, linears: list[Linear], outputs: set[str]) -> tuple[list[Linear], list[LeftOut]]:
    """Leave out every linear whose weight something else reads as well, until none is left."""
    left: list[LeftOut] = []
    while True:
        readers = {id(linear.nodes[0]): linear for linear in linears}
        keep = []
        for linear in linears:
            reason = _other_reader(model, linear, readers, outputs)
            if reason:
                weight = linear.weight
                left.append(
                    LeftOut(
                        linear.path,
                        linear.op,
                        weight.shape,
                        weight.stored_bytes,
                        reason,
                        weight=weight.name,
                        read=weight.read,
                    )
                )
            else:
                keep.append(linear)
        if len(keep) == len(linears):
            return keep, left
        linears = keep


def _other_reader(model: Model, linear: Linear, linears: dict[int, Linear], outputs: set[str]) -> str:
    """Why the weight cannot change for this linear alone; "" if it can."""
    tensors = [_origin(model, linear)]
    while tensors:
        tensor = tensors.pop()
        if tensor.name in outputs:
            return "its weight is an output of the model"
        for node in tensor.outputs:
            other = linears.get(id(node))
            if other is not None and other.weight.name == linear.weight.name:
                if other.weight.rows_first != linear.weight.rows_first:
                    return f"{other.path} reads its weight the other way round"
                if other.weight.value != linear.weight.value:
                    return f"{other.path} reads the same codes through another scale"
                if root(other.nodes[0].inputs[1]).casts != root(linear.nodes[0].inputs[1]).casts:
                    return f"{other.path} reads its weight through other casts"
            elif passes_on(node) or (linear.weight.quantised and node.op in ("DequantizeLinear", "Mul")):
                tensors += node.outputs
            else:
                return f"{node.op} {node.name or node.outputs[0].name} reads the same weight"
    return ""


def _origin(model: Model, linear: Linear) -> gs.Tensor:
    """The tensor that holds the weight's values."""
    origin = root(linear.nodes[0].inputs[1]).tensor
    if not origin.inputs:
        return origin
    maker = origin.inputs[0]
    side = 0 if maker.op == "DequantizeLinear" else codes(model, maker)
    return origin if side is None else root(maker.inputs[side]).tensor


def _constant_expressions(model: Model) -> dict[str, onnx.TensorProto]:
    """Every tensor that is a constant or computed from nothing but constants, with the largest of those."""
    found = dict(model.constants)
    for node in model.nodes():
        inputs = [x.name for x in node.inputs if x.name]
        if inputs and all(name in found for name in inputs):
            largest = max((found[name] for name in inputs), key=nbytes)
            found.update((x.name, largest) for x in node.outputs)
    return found


def _sparse_tensors(model: Model) -> set[str]:
    """The names of constants that the format stores by their non-zeros."""
    found = set()
    for graph in graphs(model.proto.graph):
        found |= {tensor.values.name for tensor in graph.sparse_initializer}
        found |= {n.output[0] for n in graph.node if any(a.HasField("sparse_tensor") for a in n.attribute)}
    return found


def _left_out(node: gs.Node, constant: onnx.TensorProto, reason: str) -> LeftOut:
    if reason == "its weight is computed":
        right = node.inputs[1].inputs
        reason = f"its weight comes through {right[0].op}" if right else "its constant is the left operand"
    dims = [1, 1, *constant.dims]
    shape = dims[-1], dims[-2]
    whole = (*constant.dims[:-2], *shape) if len(constant.dims) > 2 else ()
    return LeftOut(_path(node), node.op, shape, nbytes(constant), reason, whole, constant.name)


def _inside_functions(model: Model) -> list[LeftOut]:
    """Products inside model-local functions: what they multiply with may differ from call to call."""
    products = ("MatMul", "Gemm", *_CONTRIB, "MatMulInteger", *OTHER_PRODUCTS)
    return [
        LeftOut(f"{function.name}/{node.name or node.output[0]}", node.op_type, (0, 0), 0, "it is inside a function")
        for function in model.proto.functions
        if function.domain != "sparsify"
        for node in function.node
        if node.domain in (*STANDARD, MICROSOFT) and node.op_type in products
    ]


def _path(node: gs.Node) -> str:
    return str(node.name or node.outputs[0].name)
