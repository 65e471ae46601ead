"""The linear layers of a canonical graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch.fx import Graph, Node

from ..frontend.trace import PREFIX

aten = torch.ops.aten
SAME = (aten.view.default, aten.reshape.default, aten.alias.default, aten.clone.default, aten.contiguous.default)
SPLITS = (aten.split.Tensor, aten.split.default, aten.split_with_sizes.default, aten.chunk.default)


@dataclass(frozen=True)
class Linear:
    """One ``aten.linear`` whose weight is a parameter.

    Attributes:
        path: the module it came from, e.g. ``model.layers.0.mlp.down_proj``.
        node: name of the FX node.
        input: name of the FX node it reads; linears with the same input share one statistic.
        weight: parameter ``[out_features, in_features]``, its key in the state dict.
        bias: parameter ``[out_features]`` or None.
        parts: sizes of the ranges of outputs that the graph takes apart, such as q, k and v; empty for one range.
    """

    path: str
    node: str
    input: str
    weight: str
    bias: str | None
    out_features: int
    in_features: int
    parts: tuple[int, ...] = ()

    @property
    def rows(self) -> tuple[int, ...]:
        """How many outputs each of the linears has that this one was made of, as far as the graph tells them apart."""
        return self.parts or (self.out_features,)


def find_linears(graph: Graph, params: Mapping[str, str]) -> list[Linear]:
    """Every linear of ``graph`` with a parameter as weight, and as bias if it has one, in execution order.

    Args:
        graph: a canonical graph.
        params: placeholder name to parameter key.
    """
    found = []
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
                parts=_parts(node),
            )
        )
    return found


def _parts(node: Node) -> tuple[int, ...]:
    """The sizes of the ranges that a linear's last axis is cut into; empty if something reads across a cut."""
    ranges = _ranges(node, int(node.meta["val"].shape[-1]))
    if ranges is None or len(ranges) < 2:
        return ()
    ordered = sorted(ranges)
    ends = [0, *(end for _, end in ordered)]
    if [begin for begin, _ in ordered] != ends[:-1] or ends[-1] != node.meta["val"].shape[-1]:
        return ()
    return tuple(end - begin for begin, end in ordered)


def _ranges(value: Node, size: int) -> set[tuple[int, int]] | None:
    """What the readers of a value take of its last axis, from and to; None if one of them takes all of it."""
    found: set[tuple[int, int]] = set()
    for user in value.users:
        made = user.meta.get("val")
        last = value.meta["val"].dim() - 1
        if user.target in SAME and made is not None and made.shape[-1] == size:
            inner = _ranges(user, size)
            if inner is None:
                return None
            found |= inner
        elif user.target in SPLITS and made is not None and _axis(user, 2, last) == last:
            ends = list(accumulate(int(piece.shape[-1]) for piece in made))
            found |= set(zip([0, *ends[:-1]], ends, strict=True))
        elif user.target is aten.slice.Tensor and _axis(user, 1, last) == last and len(user.args) < 5:
            begin, end = (user.args[2] or 0, user.args[3]) if len(user.args) == 4 else (0, size)
            if not isinstance(begin, int) or not isinstance(end, int | None):
                return None
            begin, end, _ = slice(begin, end).indices(size)
            found.add((begin, end))
        else:
            return None
    return found


def _axis(node: Node, place: int, last: int) -> int:
    axis = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return axis % (last + 1) if isinstance(axis, int) else -1


def module_path(node: Node) -> str:
    """The innermost module a node was traced in, without the tracing wrapper's prefix; "" outside the model."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1].removeprefix(PREFIX) if stack else ""


def module_paths(node: Node) -> list[str]:
    """Every module around a node, outermost first."""
    return [path.removeprefix(PREFIX) for path, _ in node.meta.get("nn_module_stack", {}).values()]
