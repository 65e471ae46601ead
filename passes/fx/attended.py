"""Linears whose outputs attention averages over tokens, and what they are then to be fitted to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ...calibrate.matmul import product
from .partition import Part

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default
VIEWS = (aten.view.default, aten.reshape.default, aten.expand.default)
COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default)


@dataclass(frozen=True)
class Attended:
    """A linear that makes the values of one attention, and nothing else.

    Attributes:
        node: name of the FX node of the linear.
        input: name of the FX node it reads, ``[batch, tokens, C]``.
        attention: name of the FX node of the attention.
    """

    node: str
    input: str
    attention: str


def find_attended(part: Part) -> dict[str, Attended]:
    """The linears of a block whose outputs go to an attention as its values, by the name of their node.

    Found by following the axis of the tokens through what only moves entries around. The KV cache, which a value may
    be joined to and leave by, does not count as a reader.
    """
    nodes = {node.name: node for node in part.module.graph.nodes}
    found = {}
    for linear in part.linears:
        node, x = nodes[linear.node], nodes[linear.input]
        readers = _readers(node, 1) if x.meta["val"].dim() == 3 else None
        if readers and len(readers) == 1:
            (attention,) = readers
            args: Any = attention.args
            values = args[2].meta["val"]
            if values.dim() == 4 and statically_known_true(values.shape[0] == x.meta["val"].shape[0]):
                found[linear.node] = Attended(linear.node, linear.input, attention.name)
    return found


def averages(args: Sequence[Any], kwargs: Mapping[str, Any], x: Tensor, queries: Tensor | None) -> Tensor:
    r"""What the attention makes of the inputs of the linear that makes its values.

    With A the weights that a head gives to the tokens, the values X Wᵀ leave it as

    .. math:: A_h (X W^\top) = (A_h X) W^\top, \qquad
              A_h = \text{softmax}\bigl(s\, Q_h K_h^\top + \text{mask}\bigr)

    so W is fitted to the rows of all A_h X, not to those of X. A token that every query looks at, such as the first of
    a text, then counts for as much as it does in the model. Kim et al. 2024, "BoA: Attention-aware Post-training
    Quantization without Backpropagation", section 3; here all heads share one second moment, and of h heads each
    shows every h-th query, so that there are as many rows as tokens.

    Args:
        args: of the node of the attention: queries and keys ``[batch, heads, tokens, d]``, values, mask, ...
        kwargs: of the same.
        x: ``[batch, tokens, C]``, the input of the linear.
        queries: bool ``[batch, tokens]``, those that count; None for all.

    Returns:
        float32 ``[rows, C]``.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    query, key, mask = given["query"], given["key"], given.get("attn_mask")
    batch, heads, tokens, width = query.shape
    scale = given.get("scale")
    scale = 1 / math.sqrt(width) if scale is None else scale
    if given.get("is_causal"):
        mask = torch.ones(tokens, key.shape[2], dtype=torch.bool).tril()
    if mask is not None:
        mask = mask.expand(batch, heads, tokens, key.shape[2])
    rows = []
    for b in range(batch):
        # Counted from the last token of the text, so that padding on either side chooses the same.
        places = torch.arange(tokens) if queries is None else queries[b].nonzero().flatten()
        counted = places[(len(places) - 1) % heads :: heads]
        attention = []
        for h in range(heads):
            scores = product(query[b, h, counted].float() * scale, key[b, h * key.shape[1] // heads].float().mT)
            if mask is not None:
                own = mask[b, h, counted]
                scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
            attention.append(scores.softmax(dim=-1))
        rows.append(product(torch.cat(attention), x[b].float()))
    return torch.cat(rows)


def _readers(node: Node, axis: int) -> set[Node] | None:
    """The attentions that read a node as values; None if something else reads it. ``axis`` is that of the tokens."""
    found: set[Node] = set()
    for user in node.users:
        if user.op == "output":
            continue
        if user.target is ATTENTION:
            if node in user.args[:2] or user.args[2] is not node or axis != node.meta["val"].dim() - 2:
                return None
            found.add(user)
            continue
        moved = _moved(node, user, axis)
        further = None if moved is None else _readers(user, moved)
        if further is None:
            return None
        found |= further
    return found


def _moved(node: Node, user: Node, axis: int) -> int | None:
    """Where the axis is in a result that holds the same entries; None where that is not known."""
    old = node.meta["val"]
    args: Any = user.args
    if user.target in COPIES:
        return axis
    if user.target in VIEWS:
        return _viewed(old.shape, user.meta["val"].shape, axis)
    if user.target is aten.transpose.int:
        swap = [int(d) % old.dim() for d in args[1:3]]
        return swap[1 - swap.index(axis)] if axis in swap else axis
    if user.target is aten.permute.default:
        return next(place for place, d in enumerate(args[1]) if int(d) % old.dim() == axis)
    if user.target is aten.unsqueeze.default:
        return axis + 1 if int(args[1]) % (old.dim() + 1) <= axis else axis
    if user.target is aten.cat.default:
        joined = int(args[1]) % old.dim() if len(args) > 1 else 0
        inputs = all(other is node or other.op == "placeholder" for other in args[0])
        return axis if joined == axis and inputs else None
    return None


def _viewed(old: Sequence[int], new: Sequence[int], axis: int) -> int | None:
    """An axis stays where all axes up to it keep their sizes, and moves with the last axis where all from it on do."""
    after = len(old) - axis
    if all(statically_known_true(a == b) for a, b in zip(old[: axis + 1], new[: axis + 1], strict=False)):
        return axis if len(new) > axis else None
    if len(new) >= after and all(statically_known_true(a == b) for a, b in zip(old[axis:], new[-after:], strict=True)):
        return len(new) - after
    return None
