"""Let the Attention op join the KV cache and the new keys and values itself."""

import onnx_ir as ir


class JoinCacheInAttention(ir.passes.InPlacePass):
    """Give Attention the past instead of the joined keys and values.

    Before:  keys = Concat(past_k, k), values = Concat(past_v, v)       [B, kv, T, D], along T
             y = Attention(q, keys, values, mask)
    After:   y, keys, values = Attention(q, k, v, mask, past_k, past_v)
    Left alone: causal attention, which counts positions differently when it knows the past; joined keys or values
        that another op reads too (outputs of the model are fine); attention that has a past or further outputs.
    Numerics: the same products on the same numbers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every Attention node of the main graph."""
        attentions = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
        return ir.passes.PassResult(model, any([_join(node) for node in attentions]))


def _join(node: ir.Node) -> bool:
    if node.attributes.get_int("is_causal", 0) or any(node.inputs[4:]) or len(node.outputs) != 1:
        return False
    keys, values = node.inputs[1:3]
    if keys is None or values is None or keys is values:
        return False
    parts = [_parts(joined, node) for joined in (keys, values)]
    if parts[0] is None or parts[1] is None:
        return False
    (past_k, k), (past_v, v) = parts[0], parts[1]
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    old = [node.outputs[0], keys, values]
    outputs = [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in old]
    inputs = [node.inputs[0], k, v, mask, past_k, past_v]
    new = ir.Node("", "Attention", inputs, node.attributes, outputs=outputs, name=node.name)
    assert node.graph is not None
    node.graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(old, outputs, replace_graph_outputs=True)
    node.graph.remove([node, *(producer for joined in (keys, values) if (producer := joined.producer()))], safe=True)
    return True


def _parts(joined: ir.Value, reader: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Past and new part of keys or values that only ``reader`` reads, or None if they were not joined like that."""
    producer = joined.producer()
    if producer is None or producer.op_type != "Concat" or len(producer.inputs) != 2:
        return None
    if producer.attributes.get_int("axis") not in (2, -2) or set(joined.consumers()) != {reader}:
        return None
    past, new = producer.inputs
    if past is None or new is None or joined.shape is None or len(joined.shape) != 4:
        return None
    return past, new
