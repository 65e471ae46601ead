"""Let the Attention op split and join heads itself, instead of transposing around it."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

ROTARY = "RotaryEmbedding"


class SplitHeadsInAttention(ir.passes.InPlacePass):
    """Give Attention its inputs with all heads side by side, the way linears write them.

    Before:  q = Rotary(Transpose(Reshape(x)))          x [B, S, H D] -> [B, S, H, D] -> [B, H, S, D]
             k, v likewise, each with or without the rotary embedding
             y = Reshape(Transpose(Attention(q, k, v)))                                -> [B, S, H D]
    After:   y = Attention(Rotary(x), ..., q_num_heads = H, kv_num_heads = KV)         [B, S, H D]
    Left alone: attention with an input or the output in another form, or of a size that is not known. Where an op
        works on [B, S, H, D] between Reshape and Transpose (a norm of each head), a Reshape follows it.
    Numerics: the same products on the same numbers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every Attention node of the main graph."""
        attentions = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
        return ir.passes.PassResult(model, any([_rewrite(node) for node in attentions]))


def _rewrite(node: ir.Node) -> bool:
    """Rewrite one Attention node; what it no longer needs stays behind unused."""
    split = [_before_transpose(value) for value in node.inputs[:3]]
    readers = _after_transpose(node.outputs[0])
    if readers is None or any(value is None for value in split):
        return False
    q, k, v = (value for value in split if value is not None)
    for index, value in enumerate((q, k, v)):
        node.replace_input_with(index, _side_by_side(node, node.inputs[index], value))
    for name, value in (("q_num_heads", q), ("kv_num_heads", k)):
        node.attributes[name] = ir.AttrInt64(name, _heads(value))
    y = node.outputs[0]
    y.shape = readers[0].outputs[0].shape
    for reader in readers:
        reader.outputs[0].replace_all_uses_with(y)
    return True


def _before_transpose(value: ir.Value | None) -> ir.Value | None:
    """The value [B, S, H, D] that was transposed to this one, [B, H, S, D], and perhaps turned by a rotary embedding."""
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == ROTARY and producer.domain == "" and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    if producer is None or not _swaps_heads(producer):
        return None
    before = producer.inputs[0]
    known = before is not None and before.shape is not None and all(isinstance(d, int) for d in before.shape[2:])
    return before if known else None


def _after_transpose(value: ir.Value) -> Sequence[ir.Node] | None:
    """The Reshapes to [B, S, H D] behind the transposition of this value; None if anything else reads it."""
    consumers = list(value.consumers())
    if value.is_graph_output() or len(consumers) != 1 or not _swaps_heads(consumers[0]):
        return None
    split = consumers[0].outputs[0]
    readers = list(split.consumers())
    joined = [reader.op_type == "Reshape" and _is_joined(reader.outputs[0], split) for reader in readers]
    outputs = [split, *(reader.outputs[0] for reader in readers)]
    if not readers or not all(joined) or any(output.is_graph_output() for output in outputs):
        return None
    return readers


def _side_by_side(node: ir.Node, old: ir.Value | None, split: ir.Value) -> ir.Value:
    """What Attention reads in place of ``old``: ``split`` as [B, S, H D], turned as ``old`` is."""
    assert old is not None and split.shape is not None
    producer, reshape = old.producer(), split.producer()
    joined = reshape.inputs[0] if reshape is not None and reshape.op_type == "Reshape" else None
    shape = ir.Shape([*split.shape[:2], _width(split)])
    if joined is None or not _is_joined(joined, split):
        target = ir.Value(
            name=f"{split.name}_joined", const_value=ir.tensor(np.array([0, 0, _width(split)]), name=f"{split.name}_joined")
        )
        assert node.graph is not None
        node.graph.register_initializer(target)
        joined = _insert(node, "Reshape", [split, target], {}, like=split, shape=shape)
    if producer is None or producer.op_type != ROTARY:
        return joined
    attributes = dict(producer.attributes) | {"num_heads": ir.AttrInt64("num_heads", _heads(split))}
    return _insert(node, ROTARY, [joined, *producer.inputs[1:]], attributes, like=old, shape=shape)


def _insert(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, ir.Attr],
    *,
    like: ir.Value,
    shape: ir.Shape,
) -> ir.Value:
    """A new op in front of ``node``; its output has the type of ``like``."""
    output = ir.Value(name=f"{like.name}_heads", type=like.type, shape=shape)
    assert node.graph is not None
    node.graph.insert_before(node, ir.Node("", op_type, inputs, attributes, outputs=[output]))
    return output


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == [0, 2, 1, 3]


def _is_joined(joined: ir.Value, split: ir.Value) -> bool:
    """Whether the shapes are [B, S, H D] and [B, S, H, D], as far as recorded sizes prove it."""
    if joined.shape is None or split.shape is None or len(joined.shape) != 3 or len(split.shape) != 4:
        return False
    *outer, width = joined.shape
    named = all(isinstance(dim, int) or dim.value is not None for dim in outer)
    static = all(isinstance(dim, int) for dim in split.shape[2:])
    return named and static and list(split.shape[:2]) == outer and width == _width(split)


def _heads(split: ir.Value) -> int:
    assert split.shape is not None
    return int(split.shape[2])  # type: ignore[arg-type]  # known, or it would have been left alone


def _width(split: ir.Value) -> int:
    assert split.shape is not None
    return _heads(split) * int(split.shape[3])  # type: ignore[arg-type]
