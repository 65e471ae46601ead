"""The linear layers of a canonical graph."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from ..frontend.trace import PREFIX


@dataclass(frozen=True)
class Linear:
    """One ``aten.linear`` whose weight is a parameter.

    Attributes:
        path: the module it came from, e.g. ``model.layers.0.mlp.down_proj``.
        node: name of the FX node.
        input: name of the FX node it reads; linears with the same input share one statistic.
        weight: parameter ``[out_features, in_features]``, its key in the state dict.
        bias: parameter ``[out_features]`` or None.
    """

    path: str
    node: str
    input: str
    weight: str
    bias: str | None
    out_features: int
    in_features: int


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
            )
        )
    return found


def module_path(node: Node) -> str:
    """The innermost module a node was traced in, without the tracing wrapper's prefix; "" outside the model."""
    stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1].removeprefix(PREFIX) if stack else ""


def module_paths(node: Node) -> list[str]:
    """Every module around a node, outermost first."""
    return [path.removeprefix(PREFIX) for path, _ in node.meta.get("nn_module_stack", {}).values()]
