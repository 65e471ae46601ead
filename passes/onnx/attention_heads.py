"""Let the Attention op split and join heads itself, instead of transposing around it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import onnx_ir as ir


class SplitHeadsInAttention(ir.passes.InPlacePass):
    """Give Attention its inputs with all heads side by side, the way linears write them.

    Before:  q = Rotary(Transpose(Reshape(x)))          x [B, S, H D] -> [B, S, H, D] -> [B, H, S, D]
             k, v likewise, each with or without the rotary embedding
             y = Reshape(Transpose(Attention(q, k, v)))                                -> [B, S, H D]
    After:   y = Attention(Rotary(x), ..., q_num_heads = H, kv_num_heads = KV)         [B, S, H D]
             and where each head is normalised, on either side of the Transpose: Rotary(Reshape(Norm(Reshape(x))))
    Left alone: attention with an input or the output in another form, or of a size that is not known.
    Numerics: the same products on the same numbers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every Attention node of the main graph; what it no longer needs stays behind unused."""
        attentions = [node for node in model.graph if node.op_type == "Attention" and node.domain == ""]
        return ir.passes.PassResult(model, any([_rewrite(node) for node in attentions]))


@dataclass(frozen=True)
class _Heads:
    """How an input of Attention comes about.

    Attributes:
        split: ``[B, S, heads, size]``, which is transposed.
        norm: the norm of every head behind the Transpose, or None.
        rotary: the rotary embedding behind that, or None.
        heads: how many.
        size: of each.
    """

    split: ir.Value
    norm: ir.Node | None
    rotary: ir.Node | None
    heads: int
    size: int


def _rewrite(node: ir.Node) -> bool:
    q, k, v = (_heads(value) for value in node.inputs[:3])
    joined = _joined_outputs(node.outputs[0])
    if q is None or k is None or v is None or not joined:
        return False
    for index, heads in enumerate((q, k, v)):
        node.replace_input_with(index, _side_by_side(node, heads))
    node.attributes["q_num_heads"] = ir.AttrInt64("q_num_heads", q.heads)
    node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", k.heads)
    y = node.outputs[0]
    y.shape = joined[0].shape
    for value in joined:
        value.replace_all_uses_with(y)
    return True


def _heads(value: ir.Value | None) -> _Heads | None:
    """Walk from an input of Attention back to the Transpose; None if it is of another form."""
    producer = value.producer() if value is not None else None
    rotary = norm = None
    if _is(producer, "RotaryEmbedding"):
        rotary, producer = producer, _producer(producer)
    if _is(producer, "RMSNormalization") and producer.attributes.get_int("axis", -1) in (-1, 3):
        norm, producer = producer, _producer(producer)
    split = producer.inputs[0] if producer is not None and _swaps_heads(producer) else None
    if split is None or split.shape is None:
        return None
    heads, size = split.shape[2:]
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    return _Heads(split, norm, rotary, heads, size)


def _joined_outputs(value: ir.Value) -> list[ir.Value]:
    """The values [B, S, H D] that the output of Attention becomes; none if something else reads it on the way."""
    consumers = list(value.consumers())
    if value.is_graph_output() or len(consumers) != 1 or not _swaps_heads(consumers[0]):
        return []
    split = consumers[0].outputs[0]
    readers = list(split.consumers())
    joined = [reader.outputs[0] for reader in readers]
    fits = all(_is(reader, "Reshape") and _is_joined(reader.outputs[0], split) for reader in readers)
    return joined if fits and not any(output.is_graph_output() for output in (split, *joined)) else []


def _side_by_side(node: ir.Node, q: _Heads) -> ir.Value:
    """The same input as [B, S, H D], computed in front of ``node``."""
    assert q.split.shape is not None
    shape = ir.Shape([*q.split.shape[:2], q.heads * q.size])
    x, reshape = q.split, q.split.producer()
    if q.norm is not None:
        x = _insert(node, "RMSNormalization", [x, *q.norm.inputs[1:]], q.norm.attributes, shape=q.split.shape)
    whole = reshape.inputs[0] if reshape is not None and _is(reshape, "Reshape") else None
    if q.norm is None and whole is not None and _is_joined(whole, q.split):
        x = whole
    else:
        x = _insert(node, "Reshape", [x, _constant(node, [0, 0, q.heads * q.size])], {}, shape=shape)
    if q.rotary is not None:
        attributes = {**q.rotary.attributes, "num_heads": ir.AttrInt64("num_heads", q.heads)}
        x = _insert(node, "RotaryEmbedding", [x, *q.rotary.inputs[1:]], attributes, shape=shape)
    return x


def _insert(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, ir.Attr],
    *,
    shape: ir.Shape,
) -> ir.Value:
    """A new op in front of ``node``; its output has the type of its first input."""
    assert inputs[0] is not None
    assert node.graph is not None
    output = ir.Value(type=inputs[0].type, shape=shape)
    node.graph.insert_before(node, ir.Node("", op_type, inputs, list(attributes.values()), outputs=[output]))
    return output


def _constant(node: ir.Node, numbers: Sequence[int]) -> ir.Value:
    """The output of a Constant in front of ``node``."""
    tensor = ir.tensor(np.array(numbers, np.int64))
    constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
    value = constant.outputs[0]
    value.type, value.shape, value.const_value = ir.TensorType(tensor.dtype), ir.Shape([len(numbers)]), tensor
    assert node.graph is not None
    node.graph.insert_before(node, constant)
    return value


def _is(node: ir.Node | None, op_type: str) -> TypeGuard[ir.Node]:
    return node is not None and node.op_type == op_type and node.domain == ""


def _producer(node: ir.Node) -> ir.Node | None:
    return node.inputs[0].producer() if node.inputs[0] is not None else None


def _swaps_heads(node: ir.Node) -> bool:
    return _is(node, "Transpose") and list(node.attributes.get_ints("perm", [])) == [0, 2, 1, 3]


def _is_joined(joined: ir.Value, split: ir.Value) -> bool:
    """Whether the recorded shapes prove that they are [B, S, H D] and [B, S, H, D] of the same numbers."""
    if joined.shape is None or split.shape is None or len(joined.shape) != 3 or len(split.shape) != 4:
        return False
    known = all(isinstance(dim, int) or dim.value is not None for dim in joined.shape)
    *outer, heads, size = split.shape
    static = isinstance(heads, int) and isinstance(size, int)
    return known and static and list(joined.shape) == [*outer, heads * size]
