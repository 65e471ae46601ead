"""Which inputs of a model choose rows of a table, and how many rows there are: token ids, positions, segments."""

import onnx_graphsurgeon as gs  # type: ignore[import-untyped]

from .view import STANDARD, Model

_SAME_NUMBERS = ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice")


def index_bounds(model: Model) -> dict[str, int]:
    """The number of rows of the smallest table that each input indexes, by the input's name."""
    bounds: dict[str, int] = {}
    for value in model.views[0].inputs:
        tensors = [value]
        while tensors:
            tensor = tensors.pop()
            for node in tensor.outputs:
                if node.op in _SAME_NUMBERS and (node.domain or "") in STANDARD and node.inputs[0] is tensor:
                    tensors += node.outputs
                rows = _rows(model, node, tensor)
                if rows:
                    bounds[value.name] = min(rows, bounds.get(value.name, rows))
    return bounds


def _rows(model: Model, node: gs.Node, tensor: gs.Tensor) -> int:
    """The rows of the table that a node looks ``tensor`` up in; 0 if it does not."""
    op, inputs = node.op, node.inputs
    if op == "EmbedLayerNormalization":  # com.microsoft: word, position and segment tables behind the ids
        pairs = [(0, 2), (1, 4)]
    elif op in ("Gather", "GatherBlockQuantized") and not node.attrs.get("gather_axis", node.attrs.get("axis")):
        pairs = [(1, 0)]
    else:
        return 0
    for index, table in pairs:
        if len(inputs) > max(index, table) and inputs[index] is tensor and inputs[table].name in model.constants:
            return int(model.constants[inputs[table].name].dims[0])
    return 0
