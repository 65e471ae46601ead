"""Replace linears with sparse weights by the ops of the dialect, weights already packed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ...calibrate.patterns import Pattern, Unstructured, find_pattern
from ..cost import Worth
from ..dialect import experts, packed
from ..dialect.packed import OnGrid, Packed
from ..dialect.storage import FP32, Storage
from ..errors import InputError
from ..form import Form
from .canonical import parameter_names
from .experts import Stack, find_stacks, join_experts
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
        expert: its number, where one op stores it with the other experts of its stack.
    """

    linear: Linear
    pattern: str | None
    op: str
    reason: str
    dense_bytes: int
    stored_bytes: int
    attributes: Mapping[str, int] = field(default_factory=dict)
    expert: int | None = None


@dataclass(frozen=True)
class _Found:
    """A linear, and what is to become of it.

    Attributes:
        linear: the linear.
        weight: its weight; None where that is no parameter.
        pattern: of the weight.
        reason: why it stays dense, or "".
        storage: of its values, or of dense codes.
    """

    linear: Linear
    weight: Tensor | None
    pattern: Pattern | None
    reason: str
    storage: Storage = FP32

    @property
    def dense_bytes(self) -> int:
        """Its weight in float32."""
        return self.linear.out_features * self.linear.in_features * 4

    def left(self) -> Lowered:
        """What is said of it where it stays dense."""
        pattern = None if self.pattern is None else str(self.pattern)
        return Lowered(self.linear, pattern, "MatMul", self.reason, self.dense_bytes, self.dense_bytes)

    def stored(self, known: OnGrid | None, pattern: Pattern | None) -> Packed:
        """Its weight, packed."""
        assert self.weight is not None
        try:
            return packed.pack(self.weight.detach(), pattern, self.storage, known.scales if known else None)
        except ValueError as error:
            raise InputError(f"{self.linear.path}: {error}; store the weights as fp32 or bf16") from error


def lower_linears(
    program: ExportedProgram,
    *,
    storage: Storage = FP32,
    sparse: bool = True,
    worth: Worth | None = None,
    on_grid: Mapping[str, OnGrid] = MappingProxyType({}),
    patterns: Mapping[str, Pattern] = MappingProxyType({}),
    forms: Mapping[str, Form] = MappingProxyType({}),
    unpruned: Mapping[str, str] = MappingProxyType({}),
) -> list[Lowered]:
    """Rewrite every linear whose weight is sparse to a sparse op, in place.

    Before:  y = linear(x, W, b)                             W has N:M structure or enough zeros
    After:   y = sparsify.linear_nm(x, values, indices, b, n, m)
             y = sparsify.linear_bitmask(x, values, mask, row_start, b, in_features)
             or the int8 or int4 form of either, which has scales in front of b; a stack of experts by one op that
             stores all of them so (``dialect/experts.py``)
             sparsify.linear_codes(x, codes, scales, b, bits, block, in_features)     where a form says dense codes
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
        forms: what weights are stored as, by key, where that is not ``storage``.
        unpruned: why linears were not pruned, by path: of those whose weight is dense that is the reason.

    Raises:
        InputError: a weight does not fit the storage.
    """
    names = parameter_names(program)
    nodes = {node.name: node for node in program.graph_module.graph.nodes}
    found: dict[str, _Found] = {}
    for linear in find_linears(program.graph_module.graph, names):
        weight = program.state_dict.get(linear.weight)
        if weight is None:
            found[linear.node] = _Found(linear, None, None, "the weight is a constant, not a parameter")
            continue
        known = on_grid.get(linear.weight)
        form = forms.get(linear.weight)
        its = form.storage if form else storage
        if its.blocked and bool(weight.any()):
            found[linear.node] = _Found(linear, weight, None, _why_not_alone(nodes[linear.node]), its)
            continue
        pattern = _pattern(weight.detach(), known.pattern if known else patterns.get(linear.weight))
        unless = unpruned.get(linear.path, "")
        reason = _why_dense(nodes[linear.node], weight, pattern, its, sparse, worth, unless)
        found[linear.node] = _Found(linear, weight, pattern, reason, its)
    stacks = find_stacks(program.graph_module.graph)
    results = {name: each.left() for name, each in found.items()}
    for stack in stacks:
        own = [found[linear.name] for linear in stack.linears if linear.name in found]
        results |= _lower_stack(program, stack, own, on_grid)
    alone = found.keys() - {linear.name for stack in stacks for linear in stack.linears}
    for name, each in found.items():
        if name in alone and not each.reason and (each.pattern is not None or each.storage.blocked):
            stored = each.stored(on_grid.get(each.linear.weight), each.pattern)
            _replace(program, nodes[name], stored)
            pattern_name = None if each.pattern is None else str(each.pattern)
            results[name] = Lowered(
                each.linear, pattern_name, stored.op, "", each.dense_bytes, stored.nbytes, stored.attributes
            )
    drop_unused(program)
    program.graph_module.recompile()
    return [*results.values()]


def stored_weights(program: ExportedProgram, lowered: Sequence[Lowered]) -> dict[str, Packed]:
    """The packed weights of a program that ``lower_linears`` has rewritten, by the key of the dense weight."""
    state, found = program.state_dict, {}
    for entry in lowered:
        if entry.reason:
            continue
        op, key = entry.op, entry.linear.weight
        if entry.expert is not None:
            op, key = op.removeprefix(experts.PREFIX), key.rpartition(".")[0]
        tensors: Mapping[str, Tensor] = {name: state[f"{key}.{name}"] for name in packed.TENSORS[op]}
        if entry.expert is not None:
            begin = entry.expert * entry.linear.out_features
            tensors = experts.rows_of(tensors, begin, begin + entry.linear.out_features)
        found[entry.linear.weight] = Packed(op, tensors, entry.attributes)
    return found


def _lower_stack(
    program: ExportedProgram,
    stack: Stack,
    own: Sequence[_Found],
    on_grid: Mapping[str, OnGrid],
) -> dict[str, Lowered]:
    """Store the experts of a stack as one op, by the node of each; all of them stay dense where one has to.

    An expert of zeros only goes with the others. Where they were pruned to different patterns, a bitmask stores all.
    """
    names = parameter_names(program)
    wanted = {str(each.pattern): each.pattern for each in own if each.pattern is not None}
    left = [each for each in own if each.reason and each.pattern is not None]
    left += [each for each in own if each.weight is None or (each.pattern is None and bool(each.weight.any()))]
    if len(own) < len(stack.linears) or left or not wanted:
        told = f"it is stored with {left[0].linear.path}, which stays dense" if left else ""
        return {each.linear.node: replace(each, reason=each.reason or told).left() for each in own}
    pattern = next(iter(wanted.values())) if len(wanted) == 1 else Unstructured(0.5)
    stored = [each.stored(on_grid.get(each.linear.weight), pattern) for each in own]
    op, attributes = experts.PREFIX + stored[0].op, stored[0].attributes
    done = {
        each.linear.node: Lowered(
            each.linear, str(each.pattern or pattern), op, "", each.dense_bytes, its.nbytes, attributes, expert
        )
        for expert, (each, its) in enumerate(zip(own, stored, strict=True))
    }
    tall = packed.stack([its.tensors for its in stored])
    numbers = [*attributes.values(), len(own)]
    join_experts(program, stack, names, tall, getattr(torch.ops.sparsify, op).default, numbers)
    return done


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
    if reason := _why_not_alone(node):
        return reason
    rows, columns = weight.shape
    nonzeros = int(weight.count_nonzero())
    size = packed.packed_bytes(rows, columns, nonzeros, pattern, storage)
    if size >= weight.numel() * weight.element_size():
        return f"packed it would take {size} bytes, dense {weight.numel() * weight.element_size()}"
    return worth(pattern, rows, columns, nonzeros) if worth is not None else ""


def _why_not_alone(node: Node) -> str:
    """Whether something besides linears reads the weight, as a reason; "" where nothing does."""
    holder = node.args[1]
    assert isinstance(holder, Node)
    tied = any(user.target is not torch.ops.aten.linear.default for user in holder.users)
    return "the weight is tied to something that is not a linear" if tied else ""


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
