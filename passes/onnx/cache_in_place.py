"""Let attention write the new keys and values into the KV cache, instead of returning a longer copy of it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ..errors import InputError

KEY = "sparsify.cache"
"""The metadata of a file whose cache stays in place; see `is_in_place`."""
IN_PLACE = "in place"
DOMAIN = "com.microsoft"
HIDDEN = np.float32(-1e30)
"""What is added to a score that the mask hides: finite, so that a row of which it hides all (padding) is no NaN."""


class KeepCacheInPlace(ir.passes.InPlacePass):
    """Make ONNX Runtime's GroupQueryAttention of every attention that joins the KV cache.

    Before:  y, keys, values = Attention(q, k, v, mask, past_k, past_v)                  q [B, S, H D]
             P = Shape(past_k)[2]                                                        tokens in the cache
    After:   y, keys, values = GroupQueryAttention(q, k, v, past_k, past_v, T - 1, T, bias)
             bias = Where(mask, 0, -1e30), or Max(mask, -1e30) of one that is added      [B, 1, S, T]
             T = Shape(attention_mask)[1], P = T - Shape(input_ids)[1]
        The caller may give past and present the same buffer, longer than T: then nothing is copied, and the new keys
        are written behind the P old ones. So nothing may take P from the shape of that buffer.
    Left alone: nothing. All caches of a model have one length, so an attention that cannot be such an op is refused.
    Numerics: the same products on the same numbers, in the order of another kernel. That one is causal by itself, as
        the mask is; it reads a text behind others (S > 1, P > 0) for a batch of one only.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the main graph; what it no longer needs stays behind unused.

        Raises:
            InputError: the model is no decoder of tokens, or an attention of it cannot be such an op.
        """
        inputs = {value.name or "": value for value in model.graph.inputs}
        caches = [value for name, value in inputs.items() if name.startswith("past_key_values.")]
        if not caches or not {"input_ids", "attention_mask"} <= inputs.keys():
            raise InputError("a cache in place needs a decoder with input_ids, attention_mask and a KV cache")
        attentions = [
            node for node in model.graph if node.op_type == "Attention" and set(node.inputs[4:6]) & set(caches)
        ]
        _check(caches, attentions)
        lengths = _lengths(model.graph, inputs["input_ids"], inputs["attention_mask"])
        for shape in [node for cache in caches for node in cache.consumers() if node.op_type == "Shape"]:
            if _covers_length(shape):
                shape.outputs[0].replace_all_uses_with(lengths.past)
        masks = dict.fromkeys(mask for node in attentions if (mask := node.inputs[3]) is not None)
        biases = {mask: _bias(mask, attentions) for mask in masks}
        for node in attentions:
            _replace(node, lengths, biases)
        model.graph.opset_imports.setdefault(DOMAIN, 1)
        model.metadata_props[KEY] = IN_PLACE
        return ir.passes.PassResult(model, True)


def is_in_place(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of a file say that it keeps its cache in place."""
    return metadata.get(KEY) == IN_PLACE


@dataclass(frozen=True)
class _Lengths:
    """Lengths that the op and the graph are told.

    Attributes:
        past: P, int64 ``[1]``.
        last: T - 1 for every text, int32 ``[B]``.
        total: T, int32 ``[]``.
    """

    past: ir.Value
    last: ir.Value
    total: ir.Value


def _check(caches: Collection[ir.Value], attentions: Sequence[ir.Node]) -> None:
    """Refuse what GroupQueryAttention cannot do."""
    for node in attentions:
        heads = [node.attributes.get_int(name, 0) for name in ("q_num_heads", "kv_num_heads")]
        sizes = {cache.shape[3] for cache in node.inputs[4:6] if cache is not None and cache.shape is not None}
        why = ""
        if not all(heads) or any(value is None for value in node.inputs[:6]):
            why = "its heads are split outside of it"
        elif len(sizes) != 1:
            why = f"its keys and values are of different sizes, {' and '.join(sorted(map(str, sizes)))}"
        elif len(node.outputs) > 3:
            why = "its scores are read as well"
        if why:
            raise InputError(f"{node.name} cannot keep its cache in place: {why}")
    joined = {value for node in attentions for value in node.inputs[4:6]}
    for cache in caches:
        readers = [node for node in cache.consumers() if node not in attentions]
        strange = [n for n in readers if n.op_type != "Shape" or (_covers_length(n) and not _is_length(n))]
        if cache not in joined or strange:
            by = strange[0].op_type if strange else "no attention"
            raise InputError(f"{cache.name} cannot stay in place: it is read by {by}")


def _span(shape: ir.Node) -> range:
    rank = 4
    begin, end, _ = slice(shape.attributes.get_int("start", 0), shape.attributes.get_int("end", rank)).indices(rank)
    return range(begin, end)


def _covers_length(shape: ir.Node) -> bool:
    return 2 in _span(shape)


def _is_length(shape: ir.Node) -> bool:
    return _span(shape) == range(2, 3)


def _lengths(graph: ir.Graph, ids: ir.Value, mask: ir.Value) -> _Lengths:
    """P and T from the inputs, computed in front of everything."""
    one = ir.Value(name="cache.one", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT32))
    one.const_value = ir.tensor(np.ones(1, np.int32), name=one.name)
    graph.register_initializer(one)
    total = ir.node("Shape", [mask], {"start": 1, "end": 2})
    new = ir.node("Shape", [ids], {"start": 1, "end": 2})
    batch = ir.node("Shape", [ids], {"start": 0, "end": 1})
    past = ir.node("Sub", [total.outputs[0], new.outputs[0]])
    narrow = ir.node("Cast", [total.outputs[0]], {"to": ir.DataType.INT32})
    last = ir.node("Sub", [narrow.outputs[0], one])
    each = ir.node("Expand", [last.outputs[0], batch.outputs[0]])
    scalar = ir.node("Squeeze", [narrow.outputs[0]])
    _insert(graph, [total, new, batch, past, narrow, last, each, scalar], before=next(iter(graph)))
    return _Lengths(past.outputs[0], each.outputs[0], scalar.outputs[0])


def _bias(mask: ir.Value, attentions: Iterable[ir.Node]) -> ir.Value:
    """What is added to the scores in place of a mask, in front of the first attention that reads it."""
    first = next(node for node in attentions if node.inputs[3] is mask)
    assert first.graph is not None
    low = _constant(HIDDEN)
    if mask.dtype == ir.DataType.BOOL:
        zero = _constant(np.float32(0))
        made = ir.node("Where", [mask, zero.outputs[0], low.outputs[0]])
        _insert(first.graph, [zero, low, made], before=first)
    else:
        made = ir.node("Max", [mask, low.outputs[0]])
        _insert(first.graph, [low, made], before=first)
    return made.outputs[0]


def _replace(node: ir.Node, lengths: _Lengths, biases: dict[ir.Value, ir.Value]) -> None:
    q, k, v, mask, past_k, past_v = node.inputs[:6]
    assert node.graph is not None
    bias = None if mask is None else biases[mask]
    attributes = {
        "num_heads": node.attributes["q_num_heads"].as_int(),
        "kv_num_heads": node.attributes["kv_num_heads"].as_int(),
        "scale": node.attributes.get_float("scale", 0.0),
        "softcap": node.attributes.get_float("softcap", 0.0),
    }
    inputs = [q, k, v, past_k, past_v, lengths.last, lengths.total, None, None, None, bias]
    outputs = [ir.Value(name=old.name, type=old.type, shape=old.shape) for old in node.outputs]
    new = ir.node("GroupQueryAttention", inputs, attributes, domain=DOMAIN, outputs=outputs, name=node.name)
    node.graph.insert_before(node, new)
    ir.convenience.replace_all_uses_with(list(node.outputs), outputs, replace_graph_outputs=True)
    node.graph.remove(node)


def _constant(number: np.float32) -> ir.Node:
    return ir.node("Constant", [], {"value": ir.tensor(np.array(number))})


def _insert(graph: ir.Graph, nodes: Sequence[ir.Node], *, before: ir.Node) -> None:
    for node in nodes:
        graph.insert_before(before, node)
