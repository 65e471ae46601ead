"""Give rotary tables the batch of what they rotate: RotaryEmbedding does not broadcast them."""

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
            batch = ir.node("Shape", [x], {"start": 0, "end": 1})
            ones = ir.node("Constant", [], {"value": ir.tensor(np.ones(2, np.int64))})
            size = ir.node("Concat", [batch.outputs[0], ones.outputs[0]], {"axis": 0})
            spread = [ir.node("Expand", [table, size.outputs[0]]) for table in tables]
            for place, new in enumerate(spread, start=1):
                node.replace_input_with(place, new.outputs[0])
            model.graph.insert_before(node, [batch, ones, size, *spread])
            modified = True
        return ir.passes.PassResult(model, modified)


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
