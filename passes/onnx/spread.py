"""Spread what ONNX Runtime's RotaryEmbedding and Attention do not broadcast themselves: rotary tables and masks."""

import numpy as np
import onnx_ir as ir


class SpreadRotaryTables(ir.passes.InPlacePass):
    """Repeat the tables of one text for every text of the batch.

    Encoders count positions from 0 in every text, so torch makes one table and broadcasts it.

    Before:  y = RotaryEmbedding(x [B, heads, S, D], cos [1, S, D/2], sin [1, S, D/2])
    After:   y = RotaryEmbedding(x, Expand(cos, [B, 1, 1]), Expand(sin, [B, 1, 1]))       B read from x
    Left alone: tables made from the numbers of an input, as from the mask of a decoder, which have its batch.
    Numerics: the same numbers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every RotaryEmbedding of the main graph."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "RotaryEmbedding" or node.domain != "" or any(node.inputs[3:]):
                continue
            x, *tables = node.inputs[:3]
            if any(_reads_an_input(table) for table in tables):
                continue
            for place in (1, 2):
                _spread(model, node, place, like=x, axis=0, rank=3)
            modified = True
        return ir.passes.PassResult(model, modified)


class SpreadMasks(ir.passes.InPlacePass):
    """Repeat a mask that is the same for every query.

    Before:  y = Attention(q [B, heads, S, D], k, v, mask [B, 1, 1, T])
    After:   y = Attention(q, k, v, Expand(mask, [1, 1, S, 1]))
    Left alone: masks with a row for every query.
    Numerics: the same numbers.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite every Attention of the main graph."""
        modified = False
        for node in list(model.graph):
            mask = node.inputs[3] if node.op_type == "Attention" and len(node.inputs) > 3 else None
            shape = None if mask is None else mask.shape
            if shape is not None and len(shape) == 4 and shape[2] == 1:
                _spread(model, node, 3, like=node.inputs[0], axis=2, rank=4)
                modified = True
        return ir.passes.PassResult(model, modified)


def _spread(model: ir.Model, node: ir.Node, place: int, *, like: ir.Value | None, axis: int, rank: int) -> None:
    """Expand an input of a node along an axis to the size that another value has there."""
    size = ir.node("Shape", [like], {"start": axis, "end": axis + 1})
    one = ir.node("Constant", [], {"value": ir.tensor(np.ones(1, np.int64))})
    sizes = [size.outputs[0] if i == axis else one.outputs[0] for i in range(rank)]
    shape = ir.node("Concat", sizes, {"axis": 0})
    wide = ir.node("Expand", [node.inputs[place], shape.outputs[0]])
    model.graph.insert_before(node, [size, one, shape, wide])
    node.replace_input_with(place, wide.outputs[0])


def _reads_an_input(value: ir.Value | None) -> bool:
    """Whether a value depends on what a graph input holds, and not only on how large it is."""
    todo, seen = [value], set()
    while todo:
        value = todo.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if value.is_graph_input() and not value.is_initializer():
            return True
        if producer is not None and producer.op_type not in ("Shape", "Size"):
            todo.extend(producer.inputs)
    return False
