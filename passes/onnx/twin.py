"""The dense model that a sparse one must equal: the file as it was given, with nothing but its weights exchanged.

It is built from the given file and not from the result, so a linear that was misread (a transposition, a factor, a
bias) shows as a difference.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import helper

from ..dialect.functions import QUANTISE_TOKENS
from .functions import function_for
from .protos import ONNX, TORCH, graphs, is_external, opened, remove
from .replace import IR_WITH_FUNCTIONS
from .sparse_linears import Sparse
from .view import Model, Place, read_model

DOUBLE, FLOAT, BFLOAT16 = onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16


@dataclass(frozen=True)
class Twin:
    """One linear of the twin.

    Attributes:
        first: where its product stands in the given file.
        others: where the rest of it stands, the last one making its result.
        sparse: what became of it.
        own_bias: the bias that a quantised product adds itself; "" for none.
    """

    first: Place
    others: tuple[Place, ...]
    sparse: Sparse
    own_bias: str


def twins(model: Model, sparse: Sequence[Sparse]) -> list[Twin]:
    """Note down where every linear stands, before ``replace_linears`` takes the model apart."""
    result = []
    for entry in sparse:
        first, *others = entry.linear.nodes
        bias = entry.linear.bias
        own = bias.name if bias is not None and any(x.name == bias.name for x in first.inputs) else ""
        places = tuple(model.places[id(node)] for node in others)
        result.append(Twin(model.places[id(first)], places, entry, own))
    return result


def dense_twin(path: Path, written: onnx.ModelProto, linears: Sequence[Twin], *, exact: bool) -> onnx.ModelProto:
    """The given model with the weights of ``linears`` exchanged.

    Args:
        path: the given model.
        written: the result, as written; tensors that both have are read from its file.
        linears: see ``twins``.
        exact: compute these linears in float64; only their results are rounded. Otherwise activations are rounded
            where the ops round them (runtime/verify.py: expect says why).

    Returns:
        A model to be stored beside the result and the spool of dense weights.
    """
    model = read_model(path)
    proto = model.proto
    moved = {t.name: t for graph in graphs(written.graph) for t in graph.initializer}
    dense = {twin.sparse.dense.name: twin.sparse.dense for twin in linears if twin.sparse.packed}
    at = {twin.first: twin for twin in linears}
    dropped = {place for twin in linears if not twin.sparse.linear.weight.value for place in _scaling(twin)}
    for scope, graph in enumerate(list(graphs(proto.graph))):
        for index in reversed(range(len(graph.node))):
            place, node = Place(scope, index), graph.node[index]
            if place in dropped or (node.op_type in ("Constant", "DequantizeLinear") and node.output[0] in dense):
                del graph.node[index]
            elif place in at:
                new = list(_product(node, at[place], exact=exact))
                del graph.node[index]
                for other in reversed(new):
                    graph.node.insert(index, other)
    for graph in graphs(proto.graph):
        _exchange(graph, model.folder, moved, dense)
    stored = {tensor.name for graph in graphs(proto.graph) for tensor in graph.initializer}
    scopes = list(graphs(proto.graph))
    for twin in linears:
        name = twin.sparse.dense.name
        if name in dense and name not in stored:
            stored.add(name)
            scopes[twin.first.graph].initializer.append(dense[name])
    if any(twin.sparse.storage.quantised for twin in linears):
        for graph in graphs(proto.graph):  # exchanged weights are float32, whatever the model noted down
            remove(graph.value_info, lambda value: value.type.tensor_type.elem_type in TORCH)
        if not exact:
            _add_quantiser(proto, opset=model.opset)
    return proto


def _add_quantiser(proto: onnx.ModelProto, *, opset: int) -> None:
    """Let the model call ``quantise_tokens``."""
    remove(proto.functions, lambda function: function.domain == "sparsify" and function.name == QUANTISE_TOKENS.name)
    proto.functions.append(function_for(QUANTISE_TOKENS, opset, {}))
    proto.ir_version = max(proto.ir_version, IR_WITH_FUNCTIONS)
    if all(entry.domain != "sparsify" for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("sparsify", 1))


def _scaling(twin: Twin) -> tuple[Place, ...]:
    """The nodes that turn an integer product into floats; an Add of the bias stays."""
    kinds = [node.op for node in twin.sparse.linear.nodes[1:]]
    return tuple(place for place, kind in zip(twin.others, kinds, strict=True) if kind != "Add")


def _product(node: onnx.NodeProto, twin: Twin, *, exact: bool) -> Iterator[onnx.NodeProto]:
    """The same product on the exchanged weight."""
    linear = twin.sparse.linear
    if not linear.weight.value:
        yield from _in_floats(twin, exact=exact)
    elif exact or _rounds(twin.sparse):
        yield from _on_copies(node, twin.sparse, exact=exact)
    else:
        yield node


def _rounds(sparse: Sparse) -> bool:
    """Whether the sparse op may round the activations that the model has."""
    return sparse.storage.quantised or (sparse.storage.kind == "bf16" and sparse.linear.weight.dtype is torch.float32)


def _copy(x: str, y: str, sparse: Sparse, *, exact: bool) -> Iterator[onnx.NodeProto]:
    """The activations in float64; or in float32, rounded as the sparse op rounds them."""
    if exact or not _rounds(sparse):
        yield helper.make_node("Cast", [x], [y], to=DOUBLE if exact else FLOAT)
        return
    if sparse.storage.quantised:
        yield helper.make_node("Cast", [x], [f"{y}.float"], to=FLOAT)
        yield helper.make_node(QUANTISE_TOKENS.name, [f"{y}.float"], [y], domain="sparsify")
    else:
        yield helper.make_node("Cast", [x], [f"{y}.short"], to=BFLOAT16)
        yield helper.make_node("Cast", [f"{y}.short"], [y], to=FLOAT)


def _in_floats(twin: Twin, *, exact: bool) -> Iterator[onnx.NodeProto]:
    """Cast -> MatMul -> Cast (-> Add) for a product of integers; its weight is float32 ``[K, N]``."""
    linear, weight = twin.sparse.linear, twin.sparse.dense.name
    scaled = [node for node in linear.nodes[1:] if node.op != "Add"]
    y = (scaled[-1] if scaled else linear.nodes[0]).outputs[0].name
    kind = DOUBLE if exact else onnx.TensorProto.FLOAT
    stem = f"{linear.path}.twin"
    yield from _copy(linear.x.name, f"{stem}.x", twin.sparse, exact=exact)
    yield from _after(linear.x.name, weight, f"{stem}.late")
    yield helper.make_node("Cast", [f"{stem}.late"], [f"{stem}.w"], to=kind)
    yield helper.make_node("MatMul", [f"{stem}.x", f"{stem}.w"], [f"{stem}.y"])
    out = f"{stem}.rounded" if twin.own_bias else y
    yield helper.make_node("Cast", [f"{stem}.y"], [out], to=ONNX[linear.weight.dtype])
    if twin.own_bias:
        yield helper.make_node("Add", [out, twin.own_bias], [y])


def _on_copies(node: onnx.NodeProto, sparse: Sparse, *, exact: bool) -> Iterator[onnx.NodeProto]:
    """MatMul, Gemm or FusedMatMul on float64 or float32 copies of its inputs."""
    kind = DOUBLE if exact else FLOAT
    stem = f"{node.output[0]}.twin"
    inputs = [f"{stem}.{index}" if name else "" for index, name in enumerate(node.input)]
    yield from _after(node.input[0], node.input[1], f"{stem}.late")
    yield from _copy(node.input[0], inputs[0], sparse, exact=exact)
    for name, copy in zip(node.input[1:], inputs[1:], strict=True):
        if name:
            late = f"{stem}.late" if name == node.input[1] else name
            yield helper.make_node("Cast", [late], [copy], to=kind)
    y = f"{stem}.y"
    if node.op_type == "FusedMatMul":  # ONNX Runtime has it in float only
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if attributes.get("transB"):
            yield helper.make_node("Transpose", [inputs[1]], [f"{stem}.t"], perm=[1, 0])
            inputs[1] = f"{stem}.t"
        alpha = helper.make_tensor("", kind, [], [attributes.get("alpha", 1.0)])
        yield helper.make_node("Constant", [], [f"{stem}.alpha"], value=alpha)
        yield helper.make_node("MatMul", inputs, [f"{stem}.product"])
        yield helper.make_node("Mul", [f"{stem}.product", f"{stem}.alpha"], [y])
    else:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        copy.input[:], copy.output[:] = inputs, [y]
        yield copy
    yield helper.make_node("Cast", [y], [node.output[0]], to=ONNX[sparse.linear.weight.dtype])


def _after(x: str, weight: str, output: str) -> Iterator[onnx.NodeProto]:
    """``weight`` once ``x`` is there: else all float64 copies are made first, and are in memory together."""
    for name, values in (("zero", [0]), ("same", [0, 0])):
        tensor = helper.make_tensor("", onnx.TensorProto.INT64, [len(values)], values)
        yield helper.make_node("Constant", [], [f"{output}.{name}"], value=tensor)
    yield helper.make_node("Shape", [x], [f"{output}.shape"])
    yield helper.make_node("Slice", [f"{output}.shape", f"{output}.zero", f"{output}.zero"], [f"{output}.none"])
    yield helper.make_node("Concat", [f"{output}.none", f"{output}.same"], [f"{output}.dims"], axis=0)
    yield helper.make_node("Reshape", [weight, f"{output}.dims"], [output])


def _exchange(
    graph: onnx.GraphProto, folder: Path, moved: Mapping[str, onnx.TensorProto], dense: Mapping[str, onnx.TensorProto]
) -> None:
    """Point initializers at the result's file or at the exchanged weights; drop those that nothing reads."""
    read = {name for inner in graphs(graph) for node in inner.node for name in node.input}
    read |= {value.name for value in graph.output}
    remove(graph.initializer, lambda tensor: tensor.name not in read)
    for tensor in graph.initializer:
        if tensor.name in dense:
            tensor.CopyFrom(dense[tensor.name])
        elif tensor.name in moved:
            tensor.CopyFrom(moved[tensor.name])
        elif is_external(tensor):  # a bias or a scale, which the result holds in another form
            raw = opened(tensor, folder).tobytes()
            inline = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=raw)
            tensor.CopyFrom(inline)
