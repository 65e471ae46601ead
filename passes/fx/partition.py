"""Cut a traced graph into prologue, repeated blocks and epilogue."""

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

INDEXED = re.compile(r"(?P<list>.+?)\.(?P<index>\d+)(\.|$)")


@dataclass(frozen=True)
class Part:
    """One submodule of the partitioned graph.

    Attributes:
        path: ``model.layers.3`` for a block, "" for the prologue and the epilogue.
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
        parts: prologue (may be missing), blocks, epilogue (may be missing).
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

    A node outside the layers belongs to the prologue if it depends on no layer, to the epilogue if it depends on the
    last one, and otherwise to the layer it depends on.

    Raises:
        InputError: the model has no repeated layers.
    """
    layers = _repeated_layers(program.graph_module)
    number = {path: i + 1 for i, path in enumerate(layers)}
    last = len(layers)
    place: dict[Node, int] = {}
    for node in program.graph_module.graph.nodes:
        if node.op in ("placeholder", "output"):
            place[node] = 0
            continue
        own = max((number[p] for p in module_paths(node) if p in number), default=None)
        before = max((place[n] for n in node.all_input_nodes), default=0)
        place[node] = own if own is not None and own >= before else min(before + (before == last), last + 1)
    params = parameter_names(program)
    outer = split_module(
        program.graph_module,
        program.graph_module,
        lambda node: place[node],
        keep_original_order=True,
        keep_original_node_name=True,
    )
    _refuse_expert_weights(program.graph_module, place, params, last)
    paths = {f"submod_{i}": path for path, i in number.items()}
    stored = {name: key for name, key in params.items() if key in program.state_dict}
    calls = [node for node in outer.graph.nodes if node.op == "call_module"]
    parts = tuple(part_of(outer, node, paths.get(str(node.target), ""), stored, str) for node in calls)
    user = tuple(str(spec.arg.name) for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT")
    results: Any = outer.graph.output_node().args[0]
    return Partition(parts, params, user, tuple(str(result.name) for result in results))


def _repeated_layers(module: GraphModule) -> list[str]:
    """Paths of the repeated layers in execution order: the numbered module list that holds most of the linears."""
    lists: Counter[str] = Counter()
    members: dict[str, list[str]] = {}
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is torch.ops.aten.linear.default:
            paths = module_paths(node)
            if paths and (match := INDEXED.match(paths[-1])):
                lists[match["list"]] += 1
                layer = f"{match['list']}.{match['index']}"
                if layer not in members.setdefault(match["list"], []):
                    members[match["list"]].append(layer)
    if not lists:
        convolutions = sum("conv" in str(node.target) for node in module.graph.nodes if node.op == "call_function")
        other = f" ({convolutions} convolutions, which stay as they are)" if convolutions else ""
        raise InputError(f"this model has no repeated layers with linear weights{other}, so there is nothing to prune")
    return members[lists.most_common(1)[0][0]]


def _refuse_expert_weights(module: GraphModule, place: dict[Node, int], params: dict[str, str], last: int) -> None:
    """Mixture-of-experts weights are stacks of matrices behind a grouped product, not linears.

    Pruning the rest of such a model would leave most of it dense and call it done, so the model is refused.
    """
    for node in module.graph.nodes:
        if node.op != "call_function" or not 0 < place[node] <= last or "conv" in str(node.target):
            continue
        for holder in node.all_input_nodes:
            value = holder.meta.get("val")
            if holder.name in params and isinstance(value, torch.Tensor) and value.dim() >= 3 and min(value.shape) > 1:
                name = params[holder.name].removeprefix(PREFIX)
                raise InputError(
                    f"{name} {list(value.shape)} is a stack of expert matrices "
                    f"read by {node.target}; only linear layers can be pruned, and most of this model is there"
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
