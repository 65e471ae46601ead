"""Cut a traced graph into prologue, repeated blocks, and what follows each stack of them."""

import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.fx.passes.split_module import split_module

from ..errors import InputError
from ..frontend.trace import PREFIX
from .canonical import parameter_names
from .linears import Linear, find_linears, module_paths

SMALL = 10
"""How many times smaller than its linears the stacks of matrices of a layer are that are no experts."""
INDEXED = re.compile(r"(?P<list>.+?)\.(?P<index>\d+)(\.|$)")


@dataclass(frozen=True)
class Part:
    """One submodule of the partitioned graph.

    Attributes:
        path: ``model.layers.3`` for a block, "" for what lies outside of the layers.
        module: its graph; weights are arguments like everything else.
        inputs: name in the outer graph of each argument: a parameter's placeholder, a user input, another part's value.
        outputs: name in the outer graph of each value it returns.
        linears: the prunable linears; empty outside blocks.
    """

    path: str
    module: GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Partition:
    """A traced graph as parts in execution order.

    Attributes:
        parts: prologue (may be missing), blocks, what follows each stack of blocks (may be missing).
        params: outer placeholder name to parameter key.
        inputs: names of the user inputs, in order.
        outputs: names of the values the model returns, in order.
    """

    parts: tuple[Part, ...]
    params: dict[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def blocks(self) -> tuple[Part, ...]:
        """The repeated layers."""
        return tuple(part for part in self.parts if part.path)


def partition(program: ExportedProgram) -> Partition:
    """Split a canonical program at its repeated layers, found from the module stack of its linears.

    A model may have several stacks of layers, as one for text and one for pictures. A node outside the layers belongs
    to the prologue if it depends on no layer, to what follows a stack if it depends on its last layer, and otherwise to
    the layer it depends on.

    Raises:
        InputError: the model has no repeated layers.
    """
    layers, ends = _repeated_layers(program.graph_module)
    number = {path: 2 * i + 1 for i, path in enumerate(layers)}  # what follows the last layer of a stack lies between
    last = {number[path] for path in ends}
    own = {node: _own(node, number) for node in program.graph_module.graph.nodes}
    ahead: dict[Node, float] = {}
    for node in reversed(program.graph_module.graph.nodes):
        ahead[node] = min((min(ahead[user], own[user] or math.inf) for user in node.users), default=math.inf)
    place: dict[Node, int] = {}
    for node in program.graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            place[node] = 0
            continue
        before = max((place[n] for n in node.all_input_nodes), default=0)
        if (mine := own[node]) is not None and mine >= before:
            place[node] = mine
        else:  # what a layer still reads is in it, though it was made outside of its modules
            place[node] = before + (before in last and ahead[node] > before)
    params = parameter_names(program)
    outer = split_module(
        program.graph_module,
        program.graph_module,
        lambda node: place[node],
        keep_original_order=True,
        keep_original_node_name=True,
    )
    _refuse_expert_weights(program.graph_module, place, params)
    paths = {f"submod_{i}": path for path, i in number.items()}
    stored = {name: key for name, key in params.items() if key in program.state_dict}
    calls = [node for node in outer.graph.nodes if node.op == "call_module"]
    parts = tuple(part_of(outer, node, paths.get(str(node.target), ""), stored, str) for node in calls)
    user = tuple(str(spec.arg.name) for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT")
    results: Any = outer.graph.output_node().args[0]
    return Partition(parts, params, user, tuple(str(result.name) for result in results))


def _repeated_layers(module: GraphModule) -> tuple[list[str], list[str]]:
    """Paths of the repeated layers in execution order, and of those that are the last of their stack.

    A stack is a numbered list of modules that hold linears. Linears that are numbered themselves, as those of a head
    are, make one only where there is no other.
    """
    found: dict[str, str] = {}
    numbered: dict[str, str] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.linear.default:
            paths = module_paths(node)
            if paths and (layer := _layer(paths[-1])):
                (numbered if layer == paths[-1] else found)[layer] = layer.rpartition(".")[0]
    layers = found or numbered
    if not layers:
        convolutions = sum("conv" in str(node.target) for node in module.graph.nodes if node.op == "call_function")
        other = f" ({convolutions} convolutions, which stay as they are)" if convolutions else ""
        raise InputError(f"this model has no repeated layers with linear weights{other}, so there is nothing to prune")
    return list(layers), list({stack: layer for layer, stack in layers.items()}.values())


def _own(node: Node, number: Mapping[str, int]) -> int | None:
    """The number of the layer that a node was traced in; None outside."""
    return max((number[path] for path in map(_layer, module_paths(node)) if path in number), default=None)


def _layer(path: str) -> str:
    """The first numbered module around a module, or itself, whether its forward was called or what is in it."""
    match = INDEXED.match(path)
    return f"{match['list']}.{match['index']}" if match else ""


def _refuse_expert_weights(module: GraphModule, place: dict[Node, int], params: dict[str, str]) -> None:
    """Mixture-of-experts weights are stacks of matrices behind a grouped product, not linears.

    Pruning the rest of such a model would leave most of it dense and call it done, so a model is refused whose layers
    have such stacks; small ones, as tables that attention reads, are no experts.
    """
    linears = Counter[int]()
    stacks: dict[int, dict[str, tuple[list[int], str]]] = {}
    for node in module.graph.nodes:
        if node.op != "call_function" or place[node] % 2 == 0 or "conv" in str(node.target):
            continue
        for holder in node.all_input_nodes:
            value = holder.meta.get("val")
            if holder.name not in params or not isinstance(value, torch.Tensor):
                continue
            if node.target is torch.ops.aten.linear.default:
                linears[place[node]] += value.numel() if value.dim() > 1 else 0
            elif value.dim() >= 3 and min(value.shape) > 1:
                name = params[holder.name].removeprefix(PREFIX)
                stacks.setdefault(place[node], {})[name] = list(value.shape), str(node.target)
    for layer, found in stacks.items():
        if SMALL * sum(math.prod(shape) for shape, _ in found.values()) > linears[layer]:
            name, (shape, reader) = next(iter(found.items()))
            raise InputError(
                f"{name} {shape} is a stack of expert matrices "
                f"read by {reader}; only linear layers can be pruned, and most of this model is there"
            )


def part_of(outer: GraphModule, node: Node, path: str, stored: Mapping[str, str], name: Callable[[str], str]) -> Part:
    """One part of a split graph.

    Args:
        outer: the graph that calls the submodules.
        node: the call of one.
        path: of the block; "" outside.
        stored: outer name to key of the parameters that can be replaced, which constants cannot.
        name: gives a node of ``outer`` its outer name.
    """
    module: GraphModule = getattr(outer, str(node.target))
    arguments: Any = node.args
    inner = [n for n in module.graph.nodes if n.op == "placeholder"]
    inputs = tuple(name(str(argument.name)) for argument in arguments)
    results = module.graph.output_node().args[0]
    if isinstance(results, tuple | list):
        picks = {user.args[1]: name(user.name) for user in node.users if user.target is operator.getitem}
        outputs: tuple[str, ...] = tuple(picks.get(i, "") for i in range(len(results)))
    else:
        outputs = (name(node.name),)
    own = {n.name: stored[given] for n, given in zip(inner, inputs, strict=True) if given in stored}
    linears = tuple(find_linears(module.graph, own)) if path else ()
    return Part(path, module, inputs, outputs, linears)
