"""Give linears that read the same input one weight, so that they run as one op."""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from ..dialect import linear_codes
from ..dialect.packed import OPS, stack
from ..frontend.trace import PREFIX
from ..mapped import mapped
from .canonical import parameter_names
from .linears import module_path
from .replace import drop_unused, replace_node

aten = torch.ops.aten

LINEAR = {aten.linear.default, *(getattr(torch.ops.sparsify, name).default for name in (*OPS, linear_codes.NAME))}


@dataclass(frozen=True)
class _Linear:
    """A linear that owns its weight and bias: nothing else reads them.

    Attributes:
        node: the FX node.
        holders: the placeholders of its weight, by the names of the op's arguments.
        bias: the placeholder of its bias, or None.
        rows: out_features.
    """

    node: Node
    holders: Mapping[str, Node]
    bias: Node | None
    rows: int


def merge_linears(program: ExportedProgram, apart: Collection[str] = ()) -> dict[str, list[str]]:
    """Merge every set of linears with the same input, op, pattern and dtypes, in place.

    Before:  q = linear(x, Wq, bq)      k = linear(x, Wk, bk)      v = linear(x, Wv)
    After:   y = linear(x, [Wq; Wk; Wv], [bq; bk; 0])
             q, k, v = split(y)
             and the same for the sparse ops, whose packed tensors are joined as they are
    Left alone: weights and biases that something else reads too (tied), or that are not in the state dict, and a
        linear whose pattern (N:M), op or dtypes no other linear of that input has. Bitmask weights of different
        sparsity do merge: their rows carry their own lengths.
    Numerics: every row is its own sum, of the same products. Kernels work on several rows at once and may sum those
        at the end of a matrix in another order, so a row that moves away from there can differ by float error.

    Args:
        program: a canonical program in which sparse linears are already sparse ops: what each weight is stored as
            was decided for the weight alone.
        apart: keys of dense weights that merge with each other only.

    Returns:
        The keys of the weights that were joined, by the key they have together.
    """
    names = parameter_names(program)
    groups: dict[Hashable, list[_Linear]] = {}
    for node in program.graph_module.graph.nodes:
        if node.op == "call_function" and node.target in LINEAR:
            key, linear = _read(program, node, names)
            if linear is not None:
                is_apart = any(names[holder.name] in apart for holder in linear.holders.values())
                groups.setdefault((key, is_apart), []).append(linear)
    merged: dict[str, list[str]] = {}
    for same in groups.values():
        if len(same) > 1:
            merged |= _merge(program, same, names)
    drop_unused(program)
    program.graph_module.recompile()
    return merged


def _read(program: ExportedProgram, node: Node, names: dict[str, str]) -> tuple[Hashable, _Linear | None]:
    """What a linear has to have in common with another to be merged, and the linear; None if it must stay."""
    given = _arguments(node)
    bias = given.pop("bias", None)
    x = given.pop("input", None) or given.pop("x")
    holders = {name: value for name, value in given.items() if isinstance(value, Node)}
    attributes = tuple(value for value in given.values() if not isinstance(value, Node))
    owned = [*holders.values(), *([] if bias is None else [bias])]
    if any(set(h.users) != {node} or names.get(h.name) not in program.state_dict for h in owned):
        return None, None
    dtypes = tuple(program.state_dict[names[h.name]].dtype for h in holders.values())
    return (x, node.target, attributes, dtypes), _Linear(node, holders, bias, int(node.meta["val"].shape[-1]))


def _arguments(node: Node) -> dict[str, Any]:
    """The arguments of a call by the names in the op's schema; those left to their default are absent."""
    assert isinstance(node.target, OpOverload)
    names = [argument.name for argument in node.target._schema.arguments]
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def _merge(program: ExportedProgram, linears: list[_Linear], names: dict[str, str]) -> dict[str, list[str]]:
    graph, state = program.graph_module.graph, program.state_dict
    first = linears[0]
    assert isinstance(first.node.target, OpOverload)
    keys = [{name: names[holder.name] for name, holder in linear.holders.items()} for linear in linears]
    joined = stack([{name: state[key].detach() for name, key in part.items()} for part in keys])
    for name, tensor in joined.items():
        _refill(program, first.holders[name], tensor, [part[name] for part in keys])
    bias = next((linear.bias for linear in linears if linear.bias is not None), None)
    if bias is not None:
        given = [names[linear.bias.name] for linear in linears if linear.bias is not None]
        like = state[given[0]]
        filled = [
            like.new_zeros(linear.rows) if linear.bias is None else state[names[linear.bias.name]].detach()
            for linear in linears
        ]
        _refill(program, bias, torch.cat(filled), given)

    sizes = [linear.rows for linear in linears]
    val = first.node.meta["val"]
    with graph.inserting_before(first.node):
        merged = graph.call_function(first.node.target, _arguments_with(first.node, bias))
        merged.meta = dict(first.node.meta) | {"val": val.new_empty((*val.shape[:-1], sum(sizes)))}
        _name(merged, [linear.node for linear in linears])
        split = graph.call_function(aten.split_with_sizes.default, (merged, sizes, -1))
        split.meta = dict(merged.meta) | {"val": [linear.node.meta["val"] for linear in linears]}
        outputs = [graph.call_function(getitem, (split, index)) for index in range(len(linears))]
    for linear, output in zip(linears, outputs, strict=True):
        output.meta = dict(linear.node.meta)
        replace_node(program, linear.node, output)
    parts = [[part[name] for part in keys] for name in joined]
    return {_joined(part): part for part in parts}


def _arguments_with(node: Node, bias: Node | None) -> tuple[Any, ...]:
    """The arguments of a call with another bias, by position."""
    assert isinstance(node.target, OpOverload)
    given = _arguments(node) | ({} if bias is None else {"bias": bias})
    return tuple(given[argument.name] for argument in node.target._schema.arguments if argument.name in given)


def _refill(program: ExportedProgram, holder: Node, tensor: Tensor, parts: Sequence[str]) -> None:
    """Let a placeholder hold the joined ``tensor`` under a joined name; the tensors it came from are freed."""
    is_parameter = isinstance(program.state_dict[parts[0]], torch.nn.Parameter)
    for key in parts:
        del program.state_dict[key]
    key, tensor = _joined(parts), mapped(tensor)
    (spec,) = [spec for spec in program.graph_signature.input_specs if spec.arg.name == holder.name]
    spec.target = key
    holder.meta["val"] = holder.meta["val"].fake_mode.from_tensor(tensor, static_shapes=True)
    program.state_dict[key] = torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor


def _name(merged: Node, nodes: Sequence[Node]) -> None:
    """Tell the file, where every weight is named by its module, which modules this one is."""
    stack = dict(merged.meta.get("nn_module_stack", {}))
    if all(module_path(node) for node in nodes):
        last = next(reversed(stack))
        paths = [next(reversed(node.meta["nn_module_stack"].values()))[0] for node in nodes]
        if not _siblings(paths):  # the tracing wrapper's prefix is taken from the front only of what is written out
            paths[1:] = [path.removeprefix(PREFIX) for path in paths[1:]]
        stack[last] = (_joined(paths), stack[last][1])
        merged.meta["nn_module_stack"] = stack


def _siblings(names: Sequence[str]) -> bool:
    """Whether names differ in one of their words only, so that one name can hold them all."""
    words = [name.split(".") for name in names]
    if len({len(word) for word in words}) > 1:
        return False
    return sum(len(set(column)) > 1 for column in zip(*words, strict=True)) <= 1


def _joined(names: Sequence[str]) -> str:
    """One name for several: ``a.q.weight`` and ``a.k.weight`` are ``a.q+k.weight``; others are all written out."""
    if not _siblings(names):
        return "+".join(names)
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join("+".join(dict.fromkeys(column)) for column in columns)
