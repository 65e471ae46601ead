"""A bfloat16 model in float32 with the same weights, for ONNX Runtime, whose CPU provider has no bfloat16."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

BFLOAT16, FLOAT = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT


def write_float32_twin(path: Path, twin: Path) -> None:
    """Write ``path`` as ``twin``, everything that is bfloat16 made float32.

    The weights are the same numbers; activations are not rounded to bfloat16 any more. It proves the graph and the
    weights, not how the runtime rounds.
    """
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        if uses_external_data(tensor):
            load_external_data_for_tensor(tensor, str(path.parent))
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
        if tensor.data_type == BFLOAT16:
            bits = np.frombuffer(tensor.raw_data, np.uint16)
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
