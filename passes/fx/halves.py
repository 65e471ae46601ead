"""Cut a block where the residual stream passes an add: the attention half, then the MLP half."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.passes.split_module import split_module

from .partition import Part, part_of

aten = torch.ops.aten


def split_halves(part: Part, names: Mapping[str, str]) -> tuple[Part, ...]:
    """Cut a block into parts that run one after the other and together compute what the block does.

    The residual stream is the chain of adds that leads from the block's hidden input to its hidden output. Everything
    an add of the chain depends on, and no earlier one does, belongs to that add; what no add depends on comes last.
    Adds whose linears do not read the sum before them (attention and MLP side by side) are one half.

    Before:  y = x + mlp(x + attention(x))
    After:   z = x + attention(x)                 y = z + mlp(z)
    Left alone: a block without such a chain, or with one add: it is returned as it is.
    Numerics: the same operations in the same order.

    Args:
        part: a block.
        names: outer placeholder name to parameter key.

    Returns:
        The halves in execution order. Values that cross a cut are named ``PATH/NODE``, other names are the block's.
    """
    graph = part.module.graph
    holders = [node for node in graph.nodes if node.op == "placeholder"]
    weights = {node for node, name in zip(holders, part.inputs, strict=True) if name in names}
    ends = _ends(part, weights)
    if len(ends) < 2:
        return (part,)
    place = dict.fromkeys(graph.nodes, len(ends) - 1)
    for index in reversed(range(len(ends) - 1)):
        place |= dict.fromkeys(_sources(ends[index]), index)
    outer = split_module(
        part.module,
        part.module,
        lambda node: place[node],
        keep_original_order=True,
        keep_original_node_name=True,
    )
    return _parts(part, outer, names)


def residual_adds(graph_module: GraphModule, weights: set[Node]) -> list[Node]:
    """The adds of the longest residual stream from an input to an output of the graph, in execution order.

    The stream is followed backwards from an output: at an add of two tensors, one of which comes from the input past
    no linear and the other only through linears, along the former; elsewhere along what comes past no linear.

    Args:
        graph_module: a block; its placeholders are its inputs.
        weights: the placeholders that hold parameters.
    """
    nodes = graph_module.graph.nodes
    linears = {n for n in nodes if n.target is aten.linear.default and weights & set(n.all_input_nodes[1:])}
    longest: list[Node] = []
    for output in graph_module.graph.output_node().all_input_nodes:
        for hidden in nodes:
            if hidden.op != "placeholder" or hidden in weights or not _same_shape(hidden, output):
                continue
            free = {hidden}  # what the input reaches past no linear
            for node in nodes:
                if node not in linears and free & set(node.all_input_nodes):
                    free.add(node)
            chain = _chain(output, hidden, free) if output in free else []
            longest = max(longest, chain, key=len)
    return longest


def _chain(output: Node, hidden: Node, free: set[Node]) -> list[Node]:
    """The adds on the way from an output back to the hidden input, in execution order."""
    chain = []
    node = output
    while node is not hidden:
        skips = [source for source in node.all_input_nodes if source in free]
        two = node.target is aten.add.Tensor and len(node.all_input_nodes) == 2
        if two and len(skips) == 1 and all(_same_shape(node, source) for source in node.all_input_nodes):
            chain.append(node)
        node = skips[0]
    return chain[::-1]


def _ends(part: Part, weights: set[Node]) -> list[Node]:
    """The last add of every half. The sum before it is read by a linear that none of the earlier adds depends on."""
    chain = residual_adds(part.module, weights)
    linears = {linear.node for linear in part.linears}
    ends: list[Node] = []
    seen: set[Node] = set()
    for add in chain:
        sources = _sources(add)
        own = [node for node in sources - seen if node.name in linears]
        if ends and not any(ends[-1] in _sources(node) for node in own):
            ends[-1] = add
        else:
            ends.append(add)
        seen = sources
    return ends


def _sources(node: Node) -> set[Node]:
    """The node and everything it depends on."""
    found: set[Node] = set()
    ahead = [node]
    while ahead:
        current = ahead.pop()
        if current not in found:
            found.add(current)
            ahead.extend(current.all_input_nodes)
    return found


def _parts(part: Part, outer: GraphModule, names: Mapping[str, str]) -> tuple[Part, ...]:
    """The submodules of a split block, their values by the names that the block uses."""
    results = outer.graph.output_node().args[0]
    results = results if isinstance(results, tuple | list) else (results,)
    holders = [node for node in outer.graph.nodes if node.op == "placeholder"]
    known = {node.name: name for node, name in zip(holders, part.inputs, strict=True)}
    known |= {node.name: name for node, name in zip(results, part.outputs, strict=True) if name}
    parts = []
    for node in outer.graph.nodes:
        if node.op == "call_module":
            parts.append(part_of(outer, node, part.path, names, lambda name: known.get(name, f"{part.path}/{name}")))
    return tuple(parts)


def _same_shape(one: Node, other: Node) -> bool:
    a, b = one.meta.get("val"), other.meta.get("val")
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dim() != b.dim() or not a.is_floating_point():
        return False
    return all(statically_known_true(x == y) for x, y in zip(a.shape, b.shape, strict=True))
