"""A file for TensorRT as ONNX Runtime's CPU provider takes it: no bfloat16, and our ops in the place of plugins."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from ...passes.dialect import linear_bitmask, linear_nm
from ...passes.dialect.functions import with_shared
from ...passes.onnx.plugin import BITMASK, PACKED, PLUGINS, ROW_START, TWO_FOUR, VALUES, from_words

FUNCTIONS = {BITMASK: linear_bitmask.FUNCTION, TWO_FOUR: linear_nm.FUNCTION}
BFLOAT16, FLOAT = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT


def wants_twin(path: Path) -> bool:
    """Whether a file holds what ONNX Runtime's CPU provider does not know."""
    graph = onnx.load(str(path), load_external_data=False).graph
    return any(t.data_type == BFLOAT16 for t in graph.initializer) or any(_is_plugin(node) for node in graph.node)


def write_twin(path: Path, twin: Path) -> None:
    """Write ``path`` as ``twin`` in the same folder, for ONNX Runtime on the CPU.

    What is bfloat16 becomes float32: the weights are the same numbers, activations are not rounded to bfloat16 any
    more. A node of a plugin becomes our op, between casts, with the bytes of its mask's or indices' words as they are;
    the file gets the op's function of standard ops too. It proves the graph and every stored weight, not how the GPU
    rounds, and not the plugin's own code. Weights that stay as they are are read from the data file of ``path``.
    """
    model = onnx.load(str(path), load_external_data=False)
    _unpack_plugins(model, path.parent)
    for tensor in model.graph.initializer:
        if tensor.data_type == BFLOAT16:
            bits = np.frombuffer(_load(tensor, path.parent).raw_data, np.uint16)
            array = bits.view(ml_dtypes.bfloat16).astype(np.float32).reshape(tuple(tensor.dims))
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == BFLOAT16:
            value.type.tensor_type.elem_type = FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == BFLOAT16:
                attribute.i = FLOAT
    onnx.save(model, str(twin), save_as_external_data=True, location=f"{twin.name}.data", size_threshold=1024)


def _unpack_plugins(model: onnx.ModelProto, folder: Path) -> None:
    """Put our ops, which compute in float32, where the nodes of the plugins are."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    nodes: list[onnx.NodeProto] = []
    unpacked, used = {}, set()
    for node in graph.node:
        if not _is_plugin(node):
            nodes.append(node)
            continue
        used.add(node.op_type)
        words = tensors[node.input[PACKED]]
        if words.name not in unpacked:
            if node.op_type == BITMASK:
                columns = helper.get_node_attr_value(node, "in_features")
                rows = tensors[node.input[ROW_START]].dims[0] - 1
            else:
                rows, kept = tensors[node.input[VALUES]].dims
                columns = 2 * kept
            unpacked[words.name] = from_words(numpy_helper.to_array(_load(words, folder)), rows, columns)
        x, y = f"{node.output[0]}.x", f"{node.output[0]}.y"
        nodes.append(helper.make_node("Cast", [node.input[0]], [x], to=FLOAT))
        nodes.append(node)
        nodes.append(helper.make_node("Cast", [y], [node.output[0]], to=types[node.output[0]]))
        node.input[0], node.output[0] = x, y
    if not used:
        return
    for name, packed in unpacked.items():
        tensors[name].CopyFrom(numpy_helper.from_array(packed, name))
    told = [value for value in graph.value_info if value.name not in unpacked]  # the types of the words, where told
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.value_info.extend(told)
    model.functions.extend(with_shared(FUNCTIONS[op] for op in sorted(used)))


def _is_plugin(node: onnx.NodeProto) -> bool:
    return bool(node.domain == "sparsify" and node.op_type in PLUGINS)


def _load(tensor: onnx.TensorProto, folder: Path) -> onnx.TensorProto:
    """The tensor with its bytes inside the model."""
    if uses_external_data(tensor):
        load_external_data_for_tensor(tensor, str(folder))
        tensor.ClearField("external_data")
        tensor.data_location = onnx.TensorProto.DEFAULT
    return tensor
