"""Put sparse ops where linears were, in the file's own graph; everything else stays as another tool wrote it."""

import json
from collections.abc import Mapping, Sequence

import onnx
import onnx_graphsurgeon as gs  # type: ignore[import-untyped]
import torch
from onnx import helper, numpy_helper

from .bias import Bias
from .functions import functions_for
from .linears import Linear
from .protos import ONNX, graphs, read_float, remove
from .sparse_linears import Sparse
from .view import Model, Place

IR_WITH_FUNCTIONS = 8


def replace_linears(model: Model, sparse: Sequence[Sparse]) -> None:
    """Write the sparse ops into the model.

    Before:  MatMul(x, W) -> Add(b)                 or Gemm, FusedMatMul, MatMulNBits, ...
    After:   linear_nm(x, values, indices, b)       Cast around it where the model computes in 16 bits
    Left alone: names of everything that is still read, metadata, doc strings, functions, opset imports, types, and
        every node that is not part of a lowered linear. What nothing reads any more (the dense weight, a Transpose
        in front of it, the quantisation of an input) goes.
    Numerics: as ``make_sparse`` says.

    Args:
        model: changed in place; its view cannot be used afterwards.
        sparse: the linears and their packed weights.

    Raises:
        InputError: the model's opset cannot hold our ops.
    """
    protos = list(graphs(model.proto.graph))
    names = model.names()
    new: dict[Place, list[onnx.NodeProto]] = {}
    gone: set[Place] = set()
    homes = {name: graph for graph in protos for name in _stored(graph)}
    renamed: dict[str, str] = {}
    for entry in sparse:
        scope = entry.linear.place.graph
        parts = []
        for tensor in entry.packed:
            if tensor.name not in renamed:
                renamed[tensor.name] = unused(tensor.name, names)
                # Where the dense weight was: every linear that reads it, in whatever branch, sees this graph.
                initializer = homes[entry.linear.weight.name].initializer.add()
                initializer.CopyFrom(tensor)
                initializer.name = renamed[tensor.name]
            parts.append(renamed[tensor.name])
        bias = _bias(model, protos[scope], entry.linear, names)
        places = [model.places[id(node)] for node in entry.linear.nodes]
        # At the last of its nodes: what made the bias may stand between the product and the Add.
        new[places[-1]] = _nodes(entry, [*parts, *([bias] if bias else [])], names, protos[scope].node[places[0].index])
        gone.update(places)
    dead_nodes, dead_tensors = _unread(model, [entry.linear for entry in sparse])
    gone |= dead_nodes
    for scope, graph in enumerate(protos):
        _exchange_nodes(graph, scope, new, gone)
    for graph in protos:  # when no branch inside it reads the old weights any more
        _drop(graph, dead_tensors)
    _import_ops(model.proto, opset=model.opset)


def exchange_weights(model: Model, sparse: Sequence[Sparse]) -> None:
    """Put the pruned weights where the dense ones were; every op stays.

    Args:
        model: changed in place.
        sparse: made without sparse ops.
    """
    for scope in graphs(model.proto.graph):
        for entry in sparse:
            for tensor in scope.initializer:
                if tensor.name == entry.dense.name:
                    tensor.CopyFrom(entry.dense)
            for index, node in enumerate(scope.node):
                if node.op_type == "Constant" and node.output[0] == entry.dense.name:
                    del scope.node[index]
                    scope.initializer.append(entry.dense)
                    break


def describe(model: Model, metadata: Mapping[str, object]) -> None:
    """Add to the model's metadata what was done, as JSON strings; the rest of it stays."""
    fields = {f"sparsify.{key}": json.dumps(value) for key, value in metadata.items()}
    remove(model.proto.metadata_props, lambda entry: entry.key in fields)
    for key, value in fields.items():
        model.proto.metadata_props.add(key=key, value=value)


def _nodes(entry: Sparse, constants: Sequence[str], names: set[str], origin: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The sparse op in place of a linear, with what the file said about it."""
    linear = entry.linear
    x, y = linear.x.name, linear.y.name
    dtype = linear.weight.dtype
    if dtype is torch.float32:
        nodes = [_sparse_op(entry, [x, *constants], y)]
    else:
        x32, y32 = unused(f"{linear.path}.x", names), unused(f"{linear.path}.y", names)
        nodes = [
            helper.make_node("Cast", [x], [x32], name=f"{linear.path}.to_float", to=onnx.TensorProto.FLOAT),
            _sparse_op(entry, [x32, *constants], y32),
            helper.make_node("Cast", [y32], [y], name=f"{linear.path}.from_float", to=ONNX[dtype]),
        ]
    for node in nodes:
        if node.domain == "sparsify":
            node.name = linear.path
            node.doc_string = origin.doc_string
            node.metadata_props.extend(origin.metadata_props)
    return nodes


def _sparse_op(entry: Sparse, inputs: Sequence[str], output: str) -> onnx.NodeProto:
    node = helper.make_node(entry.op, inputs, [output], domain="sparsify")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in entry.attributes.items())
    return node


def _bias(model: Model, graph: onnx.GraphProto, linear: Linear, names: set[str]) -> str:
    """The name of the bias, in float32 with one number for each output; "" for none."""
    bias: Bias | None = linear.bias
    if bias is None:
        return ""
    rows = linear.weight.shape[0]
    constant = next((n for n, t in model.constants.items() if t is bias.proto), "")
    if bias.is_read_as_stored(rows):
        return constant
    values = bias.factor * read_float(bias.proto, model.folder).float().reshape(-1).expand(rows)
    name = unused(f"{constant}.bias", names)
    graph.initializer.append(numpy_helper.from_array(values.numpy(), name))
    return name


def _unread(model: Model, linears: Sequence[Linear]) -> tuple[set[Place], set[str]]:
    """The nodes and tensors that were there for the linears only; takes the linears out of the view."""
    outputs = model.outputs()
    suspects: list[gs.Tensor] = []
    kept = {linear.y.name for linear in linears}
    dead: set[str] = set()
    for linear in linears:
        for node in linear.nodes:
            suspects += node.inputs
            dead |= {x.name for x in node.outputs if x.name not in kept}
    # The bias, where it is used as it is, and what the sparse op reads now are read by the new node.
    alive = {linear.x.name for linear in linears} | outputs
    read = [x.bias.proto for x in linears if x.bias is not None and x.bias.is_read_as_stored(x.weight.shape[0])]
    alive |= {name for name, t in model.constants.items() if any(t is proto for proto in read)}
    for linear in linears:
        for node in linear.nodes:
            node.inputs.clear()
    places: set[Place] = set()
    while suspects:
        tensor = suspects.pop()
        if not tensor.name or tensor.outputs or tensor.name in alive:
            continue
        if not tensor.inputs:
            if tensor.name in model.constants:
                dead.add(tensor.name)
            continue
        maker = tensor.inputs[0]
        if all(not x.outputs and x.name not in alive for x in maker.outputs):
            places.add(model.places[id(maker)])
            dead |= {x.name for x in maker.outputs}
            suspects += maker.inputs
            maker.inputs.clear()
    return places, dead


def _exchange_nodes(
    graph: onnx.GraphProto, scope: int, new: Mapping[Place, list[onnx.NodeProto]], gone: set[Place]
) -> None:
    for index in reversed(range(len(graph.node))):
        place = Place(scope, index)
        if place in gone:
            del graph.node[index]
        for node in reversed(new.get(place, [])):
            graph.node.insert(index, node)


def _drop(graph: onnx.GraphProto, dead: set[str]) -> None:
    """Remove what nothing reads any more, and what the model says about it."""
    read = {name for inner in graphs(graph) for node in inner.node for name in node.input}
    remove(graph.initializer, lambda tensor: tensor.name in dead and tensor.name not in read)
    remove(graph.value_info, lambda value: value.name in dead)
    remove(graph.quantization_annotation, lambda entry: entry.tensor_name in dead)


def _import_ops(proto: onnx.ModelProto, *, opset: int) -> None:
    """Say what the model needs now: our domain, and bodies for runtimes without our library."""
    nodes = [n for graph in graphs(proto.graph) for n in graph.node]
    nodes += [n for function in proto.functions if function.domain != "sparsify" for n in function.node]
    own = [node for node in nodes if node.domain == "sparsify"]
    if not own:
        return
    remove(proto.functions, lambda function: function.domain == "sparsify")
    proto.functions.extend(functions_for(own, opset))
    proto.ir_version = max(proto.ir_version, IR_WITH_FUNCTIONS)
    if all(entry.domain != "sparsify" for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("sparsify", 1))


def _stored(graph: onnx.GraphProto) -> list[str]:
    """The names of a graph's own constants."""
    return [
        *(tensor.name for tensor in graph.initializer),
        *(n.output[0] for n in graph.node if n.op_type == "Constant"),
    ]


def unused(name: str, names: set[str]) -> str:
    """``name``, or with a number behind it where it is taken; taken from now on."""
    found, number = name, 1
    while found in names:
        number += 1
        found = f"{name}.{number}"
    names.add(found)
    return found
