"""Write products with a constant weight as ``aten.linear``, however the model's code spells them."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from ..mapped import mapped
from .replace import replace_node

aten = torch.ops.aten
MATRICES = {aten.matmul.default: 1, aten.mm.default: 1, aten.addmm.default: 2}
"""Products with a matrix, and where among their arguments the weight is."""
PAIR = re.compile(r"([a-zA-Z]+),([a-zA-Z]+)->([a-zA-Z]+)")


@dataclass(frozen=True)
class Turned:
    """How a parameter of the model lies in a linear's weight ``[out_features, in_features]``.

    Attributes:
        out: the parameter's axes that are features of the output, in their order there.
        into: those that are summed over, in the order of the input's features.
        shape: of the parameter.
    """

    out: tuple[int, ...]
    into: tuple[int, ...]
    shape: tuple[int, ...]

    def weight(self, parameter: Tensor) -> Tensor:
        """``[out_features, in_features]`` of a parameter."""
        rows = math.prod(self.shape[axis] for axis in self.out)
        return parameter.permute(*self.out, *self.into).reshape(rows, -1)

    def original(self, weight: Tensor) -> Tensor:
        """The parameter of a weight."""
        axes = (*self.out, *self.into)
        return weight.reshape([self.shape[axis] for axis in axes]).permute([axes.index(i) for i in range(len(axes))])


def products_to_linears(program: ExportedProgram, names: Mapping[str, str]) -> dict[str, Turned]:
    """Write products with a parameter that nothing else reads as linears.

    Before:  addmm(b, x, W), matmul(x, W)           W [in, out]          (GPT-2's Conv1D)
             conv1d(x, W, b)                        W [out, in, 1], one group: a linear at every place (SqueezeBERT)
             einsum("ibh,hnd->ibnd", x, W)          summed over axes of W that x has, the others in the result (XLNet)
    After:   linear(x, W', b), between transposes and reshapes of what it reads and returns; W' [out, in] takes the
             place of W in the program's state_dict
    Left alone: a weight that is not a parameter or is read by anything else; convolutions of more than one place, with
        a stride, padding or groups; an einsum that has an axis of both in the result.
    Numerics: the same products; the sum may run in another order.

    Args:
        program: a traced program.
        names: placeholder name to key of every parameter, buffer and constant.

    Returns:
        How each parameter that now lies otherwise was turned, by key.
    """
    turned: dict[str, Turned] = {}
    for node in list(program.graph_module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in MATRICES and not node.kwargs:
            weight = node.args[MATRICES[node.target]]
            if _replaceable(program, weight, names) and weight.meta["val"].dim() == 2:
                bias = node.args[0] if node.target is aten.addmm.default else None
                _turn(program, weight, names, turned, Turned((1,), (0,), tuple(weight.meta["val"].shape)))
                x = node.args[MATRICES[node.target] - 1]
                _replace(program, node, _call(node, aten.linear.default, x, weight, *([] if bias is None else [bias])))
        elif node.target is aten.conv1d.default and _is_pointwise(node) and _replaceable(program, node.args[1], names):
            x, weight, *bias = node.args[:3]
            _turn(program, weight, names, turned, Turned((0,), (1, 2), tuple(weight.meta["val"].shape)))
            rows = _call(node, aten.transpose.int, x, 1, 2)
            made = _call(node, aten.linear.default, rows, weight, *(b for b in bias if b is not None))
            _replace(program, node, _call(node, aten.transpose.int, made, 1, 2))
        elif node.target is aten.einsum.default and (match := PAIR.fullmatch(node.args[0].replace(" ", ""))):
            first, second = node.args[1]
            for x, weight, places in ((first, second, (1, 2, 3)), (second, first, (2, 1, 3))):
                letters: Any = match.group(*places)
                if _replaceable(program, weight, names) and _is_linear(*letters):
                    _replace(program, node, _contracted(program, node, x, weight, letters, names, turned))
                    break
    return turned


def _is_linear(its: str, of_weight: str, result: str) -> bool:
    """Whether an einsum sums over axes that its input and its weight share, and its result has all others."""
    rest = [a for a in its + of_weight if not (a in its and a in of_weight)]
    plain = all(len(set(each)) == len(each) for each in (its, of_weight, result))
    sums, keeps = set(its) & set(of_weight), set(of_weight) - set(its)
    return plain and bool(sums and keeps) and sorted(rest) == sorted(result)


def _contracted(
    program: ExportedProgram,
    node: Node,
    x: Node,
    weight: Node,
    letters: tuple[str, str, str],
    names: Mapping[str, str],
    turned: dict[str, Turned],
) -> Node:
    """An einsum as a linear: the summed axes last and in one, the weight's own out of one and where they belong."""
    its, of_weight, result = letters
    summed = [a for a in its if a in of_weight]
    free, own = [a for a in its if a not in summed], [a for a in of_weight if a not in its]
    shape = tuple(int(size) for size in weight.meta["val"].shape)
    axes = {a: of_weight.index(a) for a in of_weight}
    _turn(program, weight, names, turned, Turned(tuple(axes[a] for a in own), tuple(axes[a] for a in summed), shape))
    x = _ordered(node, x, its, [*free, *summed])
    if len(summed) > 1:
        x = _call(node, aten.flatten.using_ints, x, len(free), -1)
    made = _call(node, aten.linear.default, x, weight)
    if len(own) > 1:
        made = _call(node, aten.unflatten.int, made, -1, [shape[axes[a]] for a in own])
    return _ordered(node, made, [*free, *own], list(result))


def _ordered(at: Node, value: Node, axes: Any, wanted: list[str]) -> Node:
    order = [list(axes).index(a) for a in wanted]
    return value if order == sorted(order) else _call(at, aten.permute.default, value, order)


def _is_pointwise(node: Node) -> bool:
    """Whether a convolution reads one place at a time, all channels of it."""
    args: Any = node.args
    defaults: list[Any] = [None, [1], [0], [1], 1]
    stride, padding, _, groups = (list(args) + defaults[len(args) - 2 :])[3:7]
    plain = set(stride) == {1} and set(padding) == {0} and groups == 1 and not node.kwargs
    return plain and args[1].meta["val"].shape[2] == 1 and args[0].meta["val"].dim() == 3


def _replaceable(program: ExportedProgram, weight: Any, names: Mapping[str, str]) -> bool:
    return isinstance(weight, Node) and names.get(weight.name) in program.state_dict and len(weight.users) == 1


def _turn(
    program: ExportedProgram, holder: Node, names: Mapping[str, str], turned: dict[str, Turned], form: Turned
) -> None:
    key = names[holder.name]
    weight = form.weight(program.state_dict[key].detach())
    program.state_dict[key] = torch.nn.Parameter(mapped(weight), requires_grad=False)
    holder.meta["val"] = form.weight(holder.meta["val"]).contiguous()
    turned[key] = form


def _call(at: Node, target: Any, *args: Any) -> Node:
    """A new node in front of another, in the same module."""
    with at.graph.inserting_before(at):
        made = at.graph.call_function(target, args)
    values = [a.meta["val"] if isinstance(a, Node) else a for a in args]
    made.meta = {**at.meta, "val": target(*values)}
    return made


def _replace(program: ExportedProgram, old: Node, new: Node) -> None:
    new.meta["val"] = old.meta["val"]
    replace_node(program, old, new)
