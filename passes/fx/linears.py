"""The linear layers of a canonical graph."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch.fx import Graph, Node

from ..frontend.trace import PREFIX
from ..parts import ONE, Axes, Parts, Reader, find_parts
from .experts import BY_TOKEN

aten = torch.ops.aten
VIEWS = (aten.view.default, aten.reshape.default)
COPIES = (aten.alias.default, aten.clone.default, aten.contiguous.default)
SPLITS = (aten.split.Tensor, aten.split.default, aten.split_with_sizes.default, aten.chunk.default)
RANKINGS = (aten.topk.default, aten.sort.default, aten.sort.stable)
CUTS = {**dict.fromkeys(SPLITS, 2), aten.unbind.int: 1, aten.select.int: 1, aten.slice.Tensor: 1}
"""Ops that take ranges of an axis, and where among their arguments they say which axis."""


@dataclass(frozen=True)
class Linear:
    """One ``aten.linear`` whose weight is a parameter.

    Attributes:
        path: the module it came from, e.g. ``model.layers.0.mlp.down_proj``.
        node: name of the FX node.
        input: name of the FX node it reads; linears with the same input share one statistic.
        weight: parameter ``[out_features, in_features]``, its key in the state dict.
        bias: parameter ``[out_features]`` or None.
        parts: the linears that it is made of, such as q, k and v.
        router: its results choose the experts of the graph.
    """

    path: str
    node: str
    input: str
    weight: str
    bias: str | None
    out_features: int
    in_features: int
    parts: Parts = ONE
    router: bool = False


def find_linears(graph: Graph, params: Mapping[str, str]) -> list[Linear]:
    """Every linear of ``graph`` with a parameter as weight, and as bias if it has one, in execution order.

    Args:
        graph: a canonical graph.
        params: placeholder name to parameter key.
    """
    found = []
    routers = _routers(graph)
    for node in graph.nodes:
        if node.op != "call_function" or node.target is not torch.ops.aten.linear.default:
            continue
        x, weight = node.args[:2]
        bias = node.args[2] if len(node.args) > 2 else None
        if weight.op != "placeholder" or weight.name not in params:
            continue
        if bias is not None and bias.name not in params:
            continue  # computed, as WavLM's is: a fold could not move its rows with those of the weight
        out_features, in_features = weight.meta["val"].shape
        found.append(
            Linear(
                path=module_path(node),
                node=node.name,
                input=x.name,
                weight=params[weight.name],
                bias=params[bias.name] if bias is not None else None,
                out_features=out_features,
                in_features=in_features,
                parts=find_parts(node, out_features, _readers),
                router=node in routers,
            )
        )
    return found


def _routers(graph: Graph) -> set[Node]:
    """The linears that choose experts: the last ones before what stacks of experts are told to take.

    Where a stack takes all of them, and reads zeros for those that were not chosen, it is a ranking that chose.
    """
    ahead: list[Node] = [node.args[1] for node in graph.nodes if node.target is BY_TOKEN]
    if not ahead:
        return set()
    ahead += [node for node in graph.nodes if node.target in RANKINGS]
    seen: set[Node] = set()
    found = set()
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target is aten.linear.default:
            found.add(node)
        elif node.target is not aten.sym_size.int:  # how many rows there are chooses nothing
            ahead.extend(node.all_input_nodes)
    return found


def _readers(value: Node, axes: Axes) -> Iterator[Reader[Node]]:
    """What reads a value that holds the outputs of a linear; see ``find_parts``."""
    rank = value.meta["val"].dim()
    for user in value.users:
        args: Any = user.args
        if user.target in COPIES or user.target is BY_TOKEN:
            yield user, axes
        elif user.target in VIEWS:
            after = axes.reshaped(user.meta["val"].shape)
            yield None if after is None else (user, after)
        elif user.target is aten.transpose.int:
            order = list(range(rank))
            first, second = (axis % rank for axis in args[1:])
            order[first], order[second] = second, first
            yield user, axes.permuted(order)
        elif user.target is aten.permute.default:
            yield user, axes.permuted(args[1])
        elif user.target in CUTS:
            place = _axis(user, CUTS[user.target], rank) - rank
            ranges = _ranges(user, value.meta["val"].shape[place]) if place in axes.places else None
            yield from [None] if ranges is None else [axes.cut(place, begin, end) for begin, end in ranges]
        else:
            yield None


def _ranges(user: Node, size: int) -> list[tuple[int, int]] | None:
    """What a reader takes of an axis of ``size``, from and to; None where that is no range."""
    args: Any = user.args
    made = user.meta["val"]
    if user.target in SPLITS:
        axis = _axis(user, CUTS[user.target], made[0].dim())
        ends = list(accumulate(int(piece.shape[axis]) for piece in made))
        return list(zip([0, *ends[:-1]], ends, strict=True))
    if user.target is aten.unbind.int:
        return [(index, index + 1) for index in range(size)]
    if user.target is aten.select.int:
        return [(args[2] % size, args[2] % size + 1)]
    given: list[Any] = list(args[2:])
    begin, end, step = given + [None, None, 1][len(given) :]
    if step != 1 or not all(isinstance(x, int | None) for x in (begin, end)):
        return None
    return [slice(begin, end).indices(size)[:2]]


def _axis(node: Node, place: int, rank: int) -> int:
    axis: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return int(axis) % rank


def module_path(node: Node) -> str:
    """The innermost module a node was traced in, without the tracing wrapper's prefix; "" outside the model."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1].removeprefix(PREFIX) if stack else ""


def module_paths(node: Node) -> list[str]:
    """Every module around a node, outermost first."""
    return [path.removeprefix(PREFIX) for path, _ in node.meta.get("nn_module_stack", {}).values()]
