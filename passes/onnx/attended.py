"""Linears of an ONNX model whose outputs attention averages over tokens, and what they are then to be fitted to.

The same as `fx.attended`, which says why, where the attention is written out in plain ops.
"""

import onnx_graphsurgeon as gs  # type: ignore[import-untyped]
import torch
from torch import Tensor

from ...calibrate.matmul import product
from ..parts import Axes
from .linears import Linear
from .parts import ints, moved
from .view import STANDARD, Model

HEADS = (-3, -1)
"""Where the outputs of a linear stand in the values of an attention ``[batch, heads, tokens, width]``."""
BETWEEN = ("Cast", "Dropout", "Identity", "Where")
"""What exporters put between a Softmax and the product: Where takes NaN out of rows that see nothing."""


def attention_of(model: Model, linear: Linear) -> str:
    """The tensor of what each query gives to each token, where it averages a linear's outputs; "" where none does.

    Found by following the outputs through what only moves them, past a cache that they are joined to and through the
    repetition of heads that several queries share, to the second operand of a MatMul whose first one comes from a
    Softmax. What is an output of the model too, as the KV cache is, may be read by others behind it.
    """
    found: set[str] = set()
    todo = [(linear.y, Axes((linear.weight.shape[0],), (-1,)))]
    while todo:
        value, axes = todo.pop()
        for node in value.outputs:
            if _is_product(node) and node.inputs[1] is value and node.inputs[0] is not value:
                if axes.places != HEADS or not _from_softmax(node.inputs[0]):
                    return ""
                found.add(node.inputs[0].name)
                continue
            if node.op in ("Shape", "Size"):  # how exporters count the tokens
                continue
            after = (node.outputs[0], axes) if _joins_cache(model, node, axes) else moved(model, node, value, axes)
            after = after or _repeated(model, node, axes)
            if after is None:
                return ""
            todo.append(after)
    return found.pop() if len(found) == 1 else ""


def averages(attention: Tensor, x: Tensor, queries: Tensor | None) -> Tensor | None:
    r"""What the attention makes of the inputs of the linear that makes its values; see `fx.attended.averages`.

    .. math:: A_h X \quad\text{for every head, of h heads each every h-th query}

    Args:
        attention: A, ``[batch, heads, queries, tokens]``.
        x: ``[batch, tokens, C]``, the input of the linear.
        queries: bool ``[batch, tokens]``, those that count; None for all.

    Returns:
        float32 ``[rows, C]``; None where the shapes are others: the tokens of x are not those that it averages.
    """
    if attention.dim() != 4 or x.dim() != 3 or attention.shape[::3] != x.shape[:2]:
        return None
    heads, tokens = attention.shape[1:3]
    if tokens != x.shape[1]:
        return None
    rows = []
    for b in range(len(x)):
        places = torch.arange(tokens) if queries is None else queries[b].nonzero().flatten()
        each = [attention[b, h, places[(len(places) - 1) % heads :: heads]] for h in range(heads)]
        rows.append(product(torch.cat(each).float(), x[b].float()))
    return torch.cat(rows)


def _is_product(node: gs.Node) -> bool:
    return node.op == "MatMul" and (node.domain or "") in STANDARD


def _joins_cache(model: Model, node: gs.Node, axes: Axes) -> bool:
    """Whether a node puts values behind those of a cache, which is empty in calibration."""
    inputs = {tensor.name for tensor in model.views[0].inputs}
    along = node.op == "Concat" and axes.places == HEADS and node.attrs["axis"] in (-2, 2)
    return along and sum(x.name not in inputs for x in node.inputs) == 1


def _repeated(model: Model, node: gs.Node, axes: Axes) -> tuple[gs.Tensor, Axes] | None:
    """Behind Unsqueeze, Expand and Reshape, which give each head of the values to several of the queries."""
    follow = [node]
    while len(follow) < 3 and len(follow[-1].outputs[0].outputs) >= 1:
        readers = [reader for reader in follow[-1].outputs[0].outputs if reader.op not in ("Shape", "Size")]
        if len(readers) != 1:
            return None
        follow.append(readers[0])
    if axes.places != HEADS or [each.op for each in follow] != ["Unsqueeze", "Expand", "Reshape"]:
        return None
    where = node.attrs.get("axes") or (ints(model, node.inputs[1]) if len(node.inputs) > 1 else None)
    heads = follow[2].outputs[0]
    if where not in ([2], [-3]) or any((each.domain or "") not in STANDARD for each in follow):
        return None
    return heads, Axes(axes.sizes, HEADS)


def _from_softmax(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a Softmax's, but for rounding and for numbers that are none."""
    while tensor.inputs:
        maker = tensor.inputs[0]
        if (maker.domain or "") not in STANDARD:
            return False
        if maker.op == "Softmax":
            return True
        if maker.op not in BETWEEN:
            return False
        tensor = maker.inputs[-1] if maker.op == "Where" else maker.inputs[0]
    return False
