"""The linears of an ONNX model: every op that multiplies with a constant matrix, and why some of them stay as they are.

``MatMul``, ``Gemm``, and of ONNX Runtime's own ops ``FusedMatMul``, ``MatMulNBits``, ``MatMulIntegerToFloat``,
``DynamicQuantizeMatMul`` and the group of ops that ``quantize_dynamic`` writes around ``MatMulInteger``.
"""

from dataclasses import dataclass, replace

import onnx
import onnx_graphsurgeon as gs  # type: ignore[import-untyped]

from .protos import TORCH, nbytes
from .view import STANDARD, Model, Place
from .weights import NoWeight, Weight, blocks, integer, passes_on, plain, root, stored

MICROSOFT = "com.microsoft"
UNROUNDED = "its activations are no longer rounded to 8 bits"


@dataclass(frozen=True)
class Bias:
    """A constant ``[N]`` (or one number for all) that is added, times a factor; read as ``name``."""

    name: str
    proto: onnx.TensorProto
    factor: float


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
    """

    path: str
    op: str
    shape: tuple[int, int]
    stored_bytes: int
    reason: str


def find_linears(model: Model) -> tuple[list[Linear], list[LeftOut]]:
    """Every linear of a model that can be lowered, and every other product with a constant.

    A linear whose weight is also read by something else, or by another linear the other way round, is left out: the
    file would hold the weight twice, and pruning it would change more than the linear.
    """
    outputs, constants = model.outputs(), _constant_expressions(model)
    found: list[Linear] = []
    left: list[LeftOut] = []
    for node in model.nodes():
        if not _is_product(node):
            continue
        try:
            linear = _linear(model, node, outputs)
        except NoWeight as reason:
            operands = [constants[x.name] for x in (node.inputs[1], node.inputs[0]) if x.name in constants]
            if operands:
                left.append(_left_out(node, operands[0], str(reason)))
            continue
        found.append(linear)
    found, shared = _without_shared(model, found, outputs)
    return found, [*left, *shared, *_inside_functions(model)]


def gives_output(linear: Linear, outputs: set[str]) -> bool:
    """Whether a model's output is what the linear makes, but for a bias, a scale, a squashing function or a cast."""
    tensors = [linear.y]
    while tensors:
        tensor = tensors.pop()
        if tensor.name in outputs:
            return True
        for node in tensor.outputs:
            if (node.domain or "") in STANDARD and node.op in _AFTER_THE_HEAD:
                others = [x for x in node.inputs if x is not tensor]
                if all(isinstance(x, gs.Constant) or (x.inputs and x.inputs[0].op == "Constant") for x in others):
                    tensors += node.outputs
    return False


_AFTER_THE_HEAD = ("Add", "Mul", "Div", "Cast", "Identity", "Tanh", "Sigmoid", "Softmax", "LogSoftmax")


def _is_product(node: gs.Node) -> bool:
    domain = node.domain or ""
    if domain in STANDARD:
        return node.op in ("MatMul", "Gemm", "MatMulInteger")
    products = ("FusedMatMul", "MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
    return domain == MICROSOFT and node.op in products


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
    return Linear(_path(node), node.op, model.places[id(node)], x=x, weight=weight, **values)


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
    """A constant float bias: one number for each output, or one for all."""
    try:
        proto = stored(model, root(tensor).tensor)  # exporters let equal biases share one tensor through Identity
    except NoWeight:
        return None
    rows = weight.shape[0]
    fits = list(proto.dims) in ([rows], [1, rows], [], [1], [1, 1])
    return Bias(tensor.name, proto, factor) if fits and proto.data_type in TORCH else None


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
            reason = _other_reader(linear, readers, outputs)
            if reason:
                bytes_, shape = linear.weight.stored_bytes, linear.weight.shape
                left.append(LeftOut(linear.path, linear.op, shape, bytes_, reason))
            else:
                keep.append(linear)
        if len(keep) == len(linears):
            return keep, left
        linears = keep


def _other_reader(linear: Linear, linears: dict[int, Linear], outputs: set[str]) -> str:
    """Why the weight cannot change for this linear alone; "" if it can."""
    tensors = [_origin(linear)]
    while tensors:
        tensor = tensors.pop()
        if tensor.name in outputs:
            return "its weight is an output of the model"
        for node in tensor.outputs:
            other = linears.get(id(node))
            if other is not None and other.weight.name == linear.weight.name:
                if other.weight.rows_first != linear.weight.rows_first:
                    return f"{other.path} reads its weight the other way round"
            elif passes_on(node) or (linear.weight.quantised and node.op == "DequantizeLinear"):
                tensors += node.outputs
            else:
                return f"{node.op} {node.name or node.outputs[0].name} reads the same weight"
    return ""


def _origin(linear: Linear) -> gs.Tensor:
    """The tensor that holds the weight's values."""
    origin = root(linear.nodes[0].inputs[1]).tensor
    if origin.inputs and origin.inputs[0].op == "DequantizeLinear":
        origin = root(origin.inputs[0].inputs[0]).tensor
    return origin


def _constant_expressions(model: Model) -> dict[str, onnx.TensorProto]:
    """Every tensor that is a constant or computed from nothing but constants, with the largest of those."""
    found = dict(model.constants)
    for node in model.nodes():
        inputs = [x.name for x in node.inputs if x.name]
        if inputs and all(name in found for name in inputs):
            largest = max((found[name] for name in inputs), key=nbytes)
            found.update((x.name, largest) for x in node.outputs)
    return found


def _left_out(node: gs.Node, constant: onnx.TensorProto, reason: str) -> LeftOut:
    if reason == "its weight is computed":
        right = node.inputs[1].inputs
        reason = f"its weight comes through {right[0].op}" if right else "its constant is the left operand"
    dims = [1, 1, *constant.dims]
    return LeftOut(_path(node), node.op, (dims[-1], dims[-2]), nbytes(constant), reason)


def _inside_functions(model: Model) -> list[LeftOut]:
    """Products inside model-local functions: what they multiply with may differ from call to call."""
    return [
        LeftOut(f"{function.name}/{node.name or node.output[0]}", node.op_type, (0, 0), 0, "it is inside a function")
        for function in model.proto.functions
        if function.domain != "sparsify"
        for node in function.node
        if node.domain in STANDARD and node.op_type in ("MatMul", "Gemm")
    ]


def _path(node: gs.Node) -> str:
    return str(node.name or node.outputs[0].name)
