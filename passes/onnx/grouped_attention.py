"""Let the Attention op share key and value heads itself, instead of copying them for every query head."""

import onnx_ir as ir


class ShareAttentionHeads(ir.passes.InPlacePass):
    """Remove the repetition of key and value heads in front of grouped-query attention.

    Before:  k [B, kv, T, D] -> Unsqueeze(axis 2) -> Expand [B, kv, g, T, D] -> Reshape [B, kv g, T, D]
             y = Attention(q, k', v')
    After:   y = Attention(q, k, v)         opset 23: query head h reads key head h // g
    Left alone: keys and values that are not both such a repetition, and attention that also reads a past.
    Numerics: the same products on the same numbers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every Attention node of the main graph."""
        modified = False
        for node in model.graph:
            if node.op_type != "Attention" or node.domain != "" or any(node.inputs[4:6]):
                continue
            keys, values = _repeated(node.inputs[1]), _repeated(node.inputs[2])
            if keys is not None and values is not None:
                node.replace_input_with(1, keys)
                node.replace_input_with(2, values)
                modified = True
        return ir.passes.PassResult(model, modified)


def _repeated(value: ir.Value | None) -> ir.Value | None:
    """The value before its heads (axis 1) were repeated, or None if it was not made like that."""
    chain = []
    for op_type in ("Reshape", "Expand", "Unsqueeze"):
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != op_type:
            return None
        chain.append(producer)
        value = producer.inputs[0]
    axis = chain[2].inputs[1]
    axes = None if axis is None else ir.convenience.get_const_tensor(axis)
    if value is None or axes is None or axes.numpy().reshape(-1).tolist() != [2]:
        return None
    shapes = [tuple(v.shape or ()) for v in (value, chain[1].outputs[0], chain[0].outputs[0])]
    if [len(shape) for shape in shapes] != [4, 5, 4]:  # or not known
        return None
    (_, heads, _, width), (_, kept, times, _, across), (_, repeated, _, last) = shapes
    # Only the new axis may grow, and only into the heads: the length stays, named or not.
    same = kept == heads and isinstance(times, int) and repeated == heads * times and across == last == width
    return value if same else None
