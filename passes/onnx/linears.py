"""The linears of an ONNX model: every op that multiplies with a constant matrix, and why some of them stay as they are.

``MatMul``, ``Gemm``, and of ONNX Runtime's own ops ``FusedMatMul``, ``MatMulNBits``, ``MatMulIntegerToFloat``,
``DynamicQuantizeMatMul`` and the group of ops that ``quantize_dynamic`` writes around ``MatMulInteger``.
"""

from dataclasses import dataclass, replace

import onnx
import onnx_graphsurgeon as gs  # type: ignore[import-untyped]

from ..dialect import experts
from ..dialect.packed import OPS
from .bias import Bias, bias_of, own_bias
from .left_out import (
    CONTRIB,
    LeftOut,
    already_sparse,
    constant_expressions,
    inside_functions,
    left_out,
    other_product,
    path_of,
    sparse_tensors,
)
from .unfold import MICROSOFT
from .view import STANDARD, Model, Place
from .weights import NoWeight, Weight, blocks, codes, integer, passes_on, plain, root, stored

UNROUNDED = "its activations are no longer rounded to 8 bits"


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


def find_linears(model: Model) -> tuple[list[Linear], list[LeftOut]]:
    """Every linear of a model that can be lowered, and every other product with a constant.

    A linear whose weight is also read by something else, or by another linear the other way round, is left out: the
    file would hold the weight twice, and pruning it would change more than the linear.
    """
    outputs, constants, sparse = model.outputs(), constant_expressions(model), sparse_tensors(model)
    found: list[Linear] = []
    left: list[LeftOut] = []
    for node in model.nodes():
        if node.domain == "sparsify" and (node.op in OPS or node.op in experts.OPS):
            left.append(already_sparse(model, node))
            continue
        if not _is_product(node):
            left += other_product(node, constants)
            continue
        try:
            linear = _linear(model, node, outputs)
        except NoWeight as reason:
            if any(x.name in sparse for x in node.inputs):
                left.append(LeftOut(path_of(node), node.op, (0, 0), 0, "its weight is stored as a sparse tensor"))
                continue
            operands = [constants[x.name] for x in (node.inputs[1], node.inputs[0]) if x.name in constants]
            if operands:
                left.append(left_out(node, operands[0], str(reason)))
            continue
        found.append(linear)
    found, shared = _without_shared(model, found, outputs)
    return found, [*left, *shared, *inside_functions(model)]


def _is_product(node: gs.Node) -> bool:
    domain = node.domain or ""
    if domain in STANDARD:
        return node.op in ("MatMul", "Gemm", "MatMulInteger")
    return domain == MICROSOFT and node.op in CONTRIB


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
    return Linear(path_of(node), model.called(node), model.places[id(node)], x=x, weight=weight, **values)


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
        bias = bias_of(model, node.inputs[2], weight.shape[0], float(node.attrs.get("beta", 1.0)))
        if bias is None:
            raise NoWeight("its C is not a constant with one number for each output")
    return _make(model, node, node.inputs[0], weight, alpha=float(node.attrs.get("alpha", 1.0)), bias=bias)


def _nbits(model: Model, node: gs.Node) -> Linear:
    weight = blocks(model, node)
    return _make(model, node, node.inputs[0], weight, bias=own_bias(model, _optional(node, 5), weight.shape[0]))


def _integer_to_float(model: Model, node: gs.Node) -> Linear:
    x, scale, point = node.inputs[0], node.inputs[2], _optional(node, 4)
    quantiser = _dynamic_quantiser(x, scale, point)
    weight = integer(model, node.inputs[1], node.inputs[3], _optional(node, 5))
    bias = own_bias(model, _optional(node, 6), weight.shape[0])
    return _make(model, node, quantiser.inputs[0], weight, bias=bias, note=UNROUNDED)


def _dynamic(model: Model, node: gs.Node) -> Linear:
    weight = integer(model, node.inputs[1], node.inputs[2], _optional(node, 3))
    return _make(
        model, node, node.inputs[0], weight, bias=own_bias(model, _optional(node, 4), weight.shape[0]), note=UNROUNDED
    )


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
    bias = bias_of(model, _other(add, linear.y), linear.weight.shape[0], 1.0)
    if bias is None or list(bias.proto.dims) != [linear.weight.shape[0]]:
        return linear
    return replace(linear, nodes=(*linear.nodes, add), y=add.outputs[0], bias=bias)


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
