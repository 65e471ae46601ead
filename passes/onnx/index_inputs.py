"""What a model expects of its inputs besides their declared shapes: rows of tables that ids choose, sizes of heads."""

from collections.abc import Mapping, Sequence

import onnx_graphsurgeon as gs  # type: ignore[import-untyped]

from .linears import Linear
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


def head_sizes(model: Model, linears: Sequence[Linear]) -> dict[str, int]:
    """The size of an attention head, by the name that a KV cache gives to its last axis where it leaves that open.

    onnxruntime-genai's builder does. The size follows from the linear in front of GroupQueryAttention.
    """
    features = {linear.y.name: linear.weight.shape[0] for linear in linears}
    sizes: dict[str, int] = {}
    for node in model.nodes():
        if node.op != "GroupQueryAttention":
            continue
        made = _features(node.inputs[0], features)
        heads = node.attrs["num_heads"]
        if not node.inputs[1].name:  # query, key and value are packed into one
            heads += 2 * node.attrs["kv_num_heads"]
        for past in node.inputs[3:5]:
            if made and past.name and past.shape and isinstance(past.shape[-1], str):
                sizes[past.shape[-1]] = made // heads
    return sizes


def _features(tensor: gs.Tensor, features: Mapping[str, int]) -> int:
    """The outputs of the linear that ``tensor`` comes from, through biases, norms and reshapes; 0 for none."""
    for _ in range(8):
        if tensor.name in features:
            return features[tensor.name]
        if not tensor.inputs or not tensor.inputs[0].inputs:
            break
        tensor = tensor.inputs[0].inputs[0]
    return 0
