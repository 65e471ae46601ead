"""Replace linears with sparse weights by the ops of the dialect, weights already packed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ...calibrate.patterns import Pattern, Unstructured, find_pattern
from ..cost import Worth
from ..dialect import packed
from ..dialect.packed import OnGrid, Packed
from ..dialect.storage import FP32, Storage
from ..errors import InputError
from .canonical import parameter_names
from .linears import Linear, find_linears
from .replace import drop_unused, place_beside, replace_node


@dataclass(frozen=True)
class Lowered:
    """What became of one linear of the graph.

    Attributes:
        linear: the linear.
        pattern: the pattern found in its weight, or None.
        op: one of the dialect's, or ``MatMul``.
        reason: why it stayed a ``MatMul``; "" where it was lowered.
        dense_bytes: its weight in float32.
        stored_bytes: its weight as stored.
        attributes: of the op.
    """

    linear: Linear
    pattern: str | None
    op: str
    reason: str
    dense_bytes: int
    stored_bytes: int
    attributes: Mapping[str, int] = field(default_factory=dict)


def lower_linears(
    program: ExportedProgram,
    *,
    storage: Storage = FP32,
    sparse: bool = True,
    worth: Worth | None = None,
    on_grid: Mapping[str, OnGrid] = MappingProxyType({}),
    patterns: Mapping[str, Pattern] = MappingProxyType({}),
    unpruned: Mapping[str, str] = MappingProxyType({}),
) -> list[Lowered]:
    """Rewrite every linear whose weight is sparse to a sparse op, in place.

    Before:  y = linear(x, W, b)                             W has N:M structure or enough zeros
    After:   y = sparsify.linear_nm(x, values, indices, b, n, m)
             y = sparsify.linear_bitmask(x, values, mask, row_start, b, in_features)
             or the int8 or int4 form of either, which has scales in front of b
    Left alone: dense weights, weights that something besides linears reads (tied embeddings), weights that are not in
        the state dict, and everything when ``sparse`` is False. A packed form that would not be smaller than the
        dense one is not made, nor one that ``worth`` has a reason against.
    Numerics: the same products; values are rounded once to the storage. With int8 and int4 weights the activations are
        quantised too, each token by itself.

    Args:
        program: a canonical program; its packed weights replace the dense ones in ``state_dict``.
        storage: how packed values are stored.
        sparse: False only reports.
        worth: asked for every weight that could be lowered; None lowers all of them.
        on_grid: the weights, by key, that were quantised before; all others are rounded to nearest here.
        patterns: what weights were pruned to, by key; the pattern of all others is found from their zeros.
        unpruned: why linears were not pruned, by path: of those whose weight is dense that is the reason.

    Raises:
        InputError: a weight does not fit the storage.
    """
    names = parameter_names(program)
    nodes = {node.name: node for node in program.graph_module.graph.nodes}
    results = []
    for linear in find_linears(program.graph_module.graph, names):
        node = nodes[linear.node]
        dense = linear.out_features * linear.in_features * 4
        weight = program.state_dict.get(linear.weight)
        if weight is None:
            results.append(Lowered(linear, None, "MatMul", "the weight is a constant, not a parameter", dense, dense))
            continue
        known = on_grid.get(linear.weight)
        pattern = _pattern(weight.detach(), known.pattern if known else patterns.get(linear.weight))
        reason = _why_dense(node, weight, pattern, storage, sparse, worth, unpruned.get(linear.path, ""))
        if reason or pattern is None:
            found = None if pattern is None else str(pattern)
            results.append(Lowered(linear, found, "MatMul", reason, dense, dense))
            continue
        try:
            stored = packed.pack(weight.detach(), pattern, storage, known.scales if known else None)
        except ValueError as error:
            raise InputError(f"{linear.path}: {error}; store the weights as fp32 or bf16") from error
        _replace(program, node, stored)
        results.append(Lowered(linear, str(pattern), stored.op, "", dense, stored.nbytes, stored.attributes))
    drop_unused(program)
    program.graph_module.recompile()
    return results


def stored_weights(program: ExportedProgram, lowered: Sequence[Lowered]) -> dict[str, Packed]:
    """The packed weights of a program that ``lower_linears`` has rewritten, by the key of the dense weight."""
    state = program.state_dict
    return {
        entry.linear.weight: Packed(
            entry.op,
            {name: state[f"{entry.linear.weight}.{name}"] for name in packed.TENSORS[entry.op]},
            entry.attributes,
        )
        for entry in lowered
        if not entry.reason
    }


def _pattern(weight: Tensor, given: Pattern | None) -> Pattern | None:
    """The pattern that a weight was given; without one that of its zeros. None for a weight of zeros only."""
    if given is None or not bool(weight.any()):
        return find_pattern(weight)
    if isinstance(given, Unstructured):  # training may have made more zeros
        return Unstructured(1 - int(weight.count_nonzero()) / weight.numel())
    return given


def _why_dense(
    node: Node,
    weight: Tensor,
    pattern: Pattern | None,
    storage: Storage,
    sparse: bool,
    worth: Worth | None,
    unpruned: str,
) -> str:
    """The reason why a linear must stay a MatMul, "" if it need not."""
    if pattern is None:
        return (unpruned or "the weight is dense") if bool(weight.any()) else "the weight is zero everywhere"
    if not sparse:
        return "--ops standard"
    holder = node.args[1]
    assert isinstance(holder, Node)
    if any(user.target is not torch.ops.aten.linear.default for user in holder.users):
        return "the weight is tied to something that is not a linear"
    rows, columns = weight.shape
    nonzeros = int(weight.count_nonzero())
    size = packed.packed_bytes(rows, columns, nonzeros, pattern, storage)
    if size >= weight.numel() * weight.element_size():
        return f"packed it would take {size} bytes, dense {weight.numel() * weight.element_size()}"
    return worth(pattern, rows, columns, nonzeros) if worth is not None else ""


def _replace(program: ExportedProgram, node: Node, stored: Packed) -> None:
    graph = program.graph_module.graph
    x, weight, *bias = node.args
    assert isinstance(weight, Node)
    key = parameter_names(program)[weight.name]
    holders = [place_beside(program, weight, f"{key}.{name}", tensor) for name, tensor in stored.tensors.items()]
    op = getattr(torch.ops.sparsify, stored.op).default
    with graph.inserting_before(node):
        new = graph.call_function(op, (x, *holders, bias[0] if bias else None, *stored.attributes.values()))
    new.meta = dict(node.meta)
    replace_node(program, node, new)
