"""Products of an ONNX model that are not lowered, each with its reason: what is left is known."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import onnx
import onnx_graphsurgeon as gs  # type: ignore[import-untyped]
from torch import Tensor

from ..dialect.experts import stored_by
from .protos import graphs, nbytes
from .unfold import MICROSOFT, NOT_UNFOLDED
from .view import STANDARD, Model

CONTRIB = ("FusedMatMul", "MatMulNBits", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
"""The ops of ONNX Runtime's own that are read."""
_OTHER_PRODUCTS = """
    Attention Conv ConvInteger ConvTranspose DecoderAttention DynamicQuantizeLSTM Einsum FusedConv FusedGemm
    FusedMatMulActivation GRU GemmFastGelu GemmFloat8 LSTM MatMulBnb4 MatMulFpQ4 MoE NhwcConv
    QAttention QGemm QLinearConv QLinearMatMul QMoE QOrderedMatMul RNN SparseToDenseMatMul
"""
OTHER_PRODUCTS = frozenset(_OTHER_PRODUCTS.split())
"""Ops that multiply with a weight and are not read: they are named, so that what is left is known."""


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


def other_product(node: gs.Node, constants: dict[str, onnx.TensorProto]) -> list[LeftOut]:
    """A product of another kind, if one of its operands is a constant with two axes or more."""
    if node.op not in OTHER_PRODUCTS or (node.domain or "") not in (*STANDARD, MICROSOFT):
        return []
    held = [constants[x.name] for x in node.inputs if x.name in constants]
    weights = [proto for proto in held if len(proto.dims) > 1]
    if not weights:
        return []
    why = NOT_UNFOLDED if node.op in ("QLinearMatMul", "QGemm") else f"the op {node.op} is left as it is"
    left = left_out(node, largest := max(weights, key=nbytes), why)
    if "Conv" in node.op:  # [out, in, side, side]: a linear on the numbers that the window covers
        left = replace(left, shape=(largest.dims[0], math.prod(largest.dims[1:])), dims=())
    return [left]


def already_sparse(model: Model, node: gs.Node) -> LeftOut:
    """One of our own ops, as in a file that we wrote."""
    names, first = stored_by(node.op)
    inputs = zip(names, node.inputs[first:], strict=False)
    protos = {name: model.constants[x.name] for name, x in inputs if x.name in model.constants}
    shape = (0, 0)
    if set(protos) == set(names) and protos["values"].dims:
        rows = protos["row_start"].dims[0] - 1 if "row_start" in protos else protos["values"].dims[0]
        n, m = node.attrs.get("n", 1), node.attrs.get("m", 1)
        shape = rows, node.attrs.get("in_features", protos["values"].dims[-1] * m // max(1, n))
    return LeftOut(path_of(node), node.op, shape, sum(map(nbytes, protos.values())), "it is a sparse op already")


def constant_expressions(model: Model) -> dict[str, onnx.TensorProto]:
    """Every tensor that is a constant or computed from nothing but constants, with the largest of those."""
    found = dict(model.constants)
    for node in model.nodes():
        inputs = [x.name for x in node.inputs if x.name]
        if inputs and all(name in found for name in inputs):
            largest = max((found[name] for name in inputs), key=nbytes)
            found.update((x.name, largest) for x in node.outputs)
    return found


def sparse_tensors(model: Model) -> set[str]:
    """The names of constants that the format stores by their non-zeros."""
    found = set()
    for graph in graphs(model.proto.graph):
        found |= {tensor.values.name for tensor in graph.sparse_initializer}
        found |= {n.output[0] for n in graph.node if any(a.HasField("sparse_tensor") for a in n.attribute)}
    return found


def left_out(node: gs.Node, constant: onnx.TensorProto, reason: str) -> LeftOut:
    """A product with a constant, and why it is not lowered."""
    if reason == "its weight is computed":
        right = node.inputs[1].inputs
        reason = f"its weight comes through {right[0].op}" if right else "its constant is the left operand"
    dims = [1, 1, *constant.dims]
    shape = dims[-1], dims[-2]
    whole = (*constant.dims[:-2], *shape) if len(constant.dims) > 2 else ()
    return LeftOut(path_of(node), node.op, shape, nbytes(constant), reason, whole, constant.name)


def inside_functions(model: Model) -> list[LeftOut]:
    """Products inside model-local functions: what they multiply with may differ from call to call."""
    products = ("MatMul", "Gemm", *CONTRIB, "MatMulInteger", *OTHER_PRODUCTS)
    return [
        LeftOut(f"{function.name}/{node.name or node.output[0]}", node.op_type, (0, 0), 0, "it is inside a function")
        for function in model.proto.functions
        if function.domain != "sparsify"
        for node in function.node
        if node.domain in (*STANDARD, MICROSOFT) and node.op_type in products
    ]


def path_of(node: gs.Node) -> str:
    """The node's name, or that of its output where it has none."""
    return str(node.name or node.outputs[0].name)
