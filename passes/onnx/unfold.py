"""Products of 8-bit activations and weights, written out as the float products that they stand for, and back.

What a static quantiser writes as one op (its format QOperator) reads activations that exist in 8 bits only. Written
out, what was one op is the other format of the same tool (QDQ), which ONNX Runtime computes as the one op again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .protos import graphs, is_external

MICROSOFT = "com.microsoft"
FLOAT = onnx.TensorProto.FLOAT
EIGHT_BITS = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
SINGLE: tuple[list[int], list[int]] = ([], [1])
"""Shapes of one number."""
NOT_UNFOLDED = "its weight, scales and zero points are not all stored with one number, or one for each output"
"""Why one of the products stays as it is."""
PER_AXIS_SINCE = 13
"""The opset whose DequantizeLinear takes a scale for each output."""


@dataclass(frozen=True)
class Unfolded:
    """One product that was written out.

    Attributes:
        node: as it was.
        made: what its parts make: its input, its weight, its bias where there is one, and its result, in float.
        scale: the name of the bias's scale, which was added to the graph; "" for none.
    """

    node: onnx.NodeProto
    made: tuple[str, ...]
    scale: str

    @property
    def product(self) -> str:
        """The float result of the product."""
        return self.made[-1]


def unfold(proto: onnx.ModelProto) -> list[Unfolded]:
    """Write out every product of stored 8-bit weights in the main graph, in place.

    Before:  y = QLinearMatMul(a, sa, za, b, sb, zb, sy, zy)
             y = QGemm(a, sa, za, b, sb, zb, c, sy, zy)          alpha; c int32 in steps of alpha sa sb
    After:   y = QuantizeLinear(MatMul(DequantizeLinear(a, sa, za), DequantizeLinear(b, sb, zb)), sy, zy)
             and Gemm with DequantizeLinear(c, alpha sa sb) likewise; without sy its result is y
    Left alone: scales of rows of a, weights and scales that are not initializers of the main graph, subgraphs.
    Numerics: those of the op's definition; its sum is of integers, the written out one of floats, which differs by a
        code where a result lies half-way between two. What is not lowered is folded back.

    Returns:
        What was written out, in the order of the graph.
    """
    graph = proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    inputs = {value.name for value in graph.input}
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    taken = {name for inner in graphs(graph) for node in inner.node for name in (*node.input, *node.output)} | set(
        stored
    )
    done: list[Unfolded] = []
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if not _is_product(node) or not _fits(node, stored, inputs, opset):
            continue
        original = onnx.NodeProto()
        original.CopyFrom(node)
        entry, nodes = _written_out(original, stored, taken, graph)
        del graph.node[index]
        for new in reversed(nodes):
            graph.node.insert(index, new)
        done.insert(0, entry)
    return done


def fold_back(proto: onnx.ModelProto, kept: Sequence[Unfolded]) -> None:
    """Put products back as they were, in place; all of them, or those that were not lowered."""
    graph = proto.graph
    for entry in kept:
        own = {*entry.made, *entry.node.output}
        places = [index for index, node in enumerate(graph.node) if own & set(node.output)]
        original = onnx.NodeProto()
        original.CopyFrom(entry.node)
        graph.node.insert(places[-1] + 1, original)
        for index in reversed(places):
            del graph.node[index]
        for index in reversed(range(len(graph.initializer))):
            if graph.initializer[index].name == entry.scale:
                del graph.initializer[index]


def _is_product(node: onnx.NodeProto) -> bool:
    return (node.op_type == "QLinearMatMul" and node.domain in ("", "ai.onnx")) or (
        node.op_type == "QGemm" and node.domain == MICROSOFT
    )


def _fits(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto], inputs: set[str], opset: int) -> bool:
    """Whether everything but the activations is stored, in the shapes that DequantizeLinear takes."""
    names = [*node.input, *[""] * 9][:9]
    _, a_scale, a_point, b, b_scale, b_point, *rest = names
    bias, y = ("", rest[:2]) if node.op_type == "QLinearMatMul" else (rest[0], rest[1:])
    if any(name not in stored or name in inputs for name in (*filter(None, names[1:]), a_scale, b, b_scale)):
        return False
    if stored[b].data_type not in EIGHT_BITS or len(stored[b].dims) != 2:
        return False
    if any(stored[name].data_type != FLOAT or is_external(stored[name]) for name in (a_scale, b_scale)):
        return False
    if any(list(stored[name].dims) not in SINGLE for name in (a_scale, a_point, *y) if name):
        return False
    rows = stored[b].dims[_axis(node)]
    if bias and (list(stored[bias].dims) != [rows] or stored[bias].data_type != onnx.TensorProto.INT32):
        return False
    parts = [list(stored[name].dims) for name in (b_scale, b_point) if name]
    each = opset >= PER_AXIS_SINCE and all(dims == [rows] for dims in parts)
    return each or all(dims in SINGLE for dims in parts)


def _axis(node: onnx.NodeProto) -> int:
    """Which axis of the stored weight the outputs are."""
    return 0 if any(entry.name == "transB" and entry.i for entry in node.attribute) else 1


def _written_out(
    node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto], taken: set[str], graph: onnx.GraphProto
) -> tuple[Unfolded, list[onnx.NodeProto]]:
    """The nodes that stand for a product; the scale of its bias is added to the graph."""
    a, a_scale, a_point, b, b_scale, b_point, *rest = [*node.input, *[""] * 9][:9]
    bias, (y_scale, y_point) = ("", rest[:2]) if node.op_type == "QLinearMatMul" else (rest[0], rest[1:])
    stem, number = node.output[0], 0
    while any(name.startswith(f"{stem}.float") for name in taken):
        stem, number = f"{node.output[0]}.{number}", number + 1
    x, w, c, y = (f"{stem}.float.{part}" for part in ("x", "w", "bias", "y"))
    y = y if y_scale else node.output[0]
    nodes = [
        helper.make_node("DequantizeLinear", [a, a_scale, a_point], [x]),
        helper.make_node("DequantizeLinear", [b, b_scale, b_point], [w], axis=_axis(node)),
    ]
    scale = ""
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    if bias:
        scale = f"{stem}.float.scale"
        step = numpy_helper.to_array(stored[a_scale]) * numpy_helper.to_array(stored[b_scale])
        step = (attributes.get("alpha", 1.0) * step).astype(np.float32)
        graph.initializer.append(
            numpy_helper.from_array(step.reshape(-1) if step.size > 1 else step.reshape(()), scale)
        )
        nodes.append(helper.make_node("DequantizeLinear", [bias, scale], [c], axis=0))
    op = "MatMul" if node.op_type == "QLinearMatMul" else "Gemm"
    product = helper.make_node(op, [x, w, *([c] if bias else [])], [y], name=node.name, **attributes)
    product.doc_string = node.doc_string
    product.metadata_props.extend(node.metadata_props)
    nodes.append(product)
    if y_scale:
        nodes.append(helper.make_node("QuantizeLinear", [y, y_scale, y_point], [node.output[0]]))
    for each in nodes:
        while each.input and not each.input[-1]:
            del each.input[-1]
    return Unfolded(node, (x, w, *([c] if bias else []), y), scale), nodes
