"""The main graph of an ONNX model as a sequence of steps that can be cut anywhere: every stretch is a model of its own.

A model is so run once from its inputs to its last linear, though its weights change on the way: what lives at a cut is
kept, and the next stretch goes on from there.
"""

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper

from ..errors import InputError
from .linears import Linear
from .protos import graphs, subgraphs
from .seeds import RANDOM
from .view import Model


@dataclass(frozen=True)
class Step:
    """What runs together: one node, or all nodes of a linear whose weight no float tensor holds.

    Attributes:
        nodes: the nodes.
        linear: the linear that they are, where that is to be exchanged as a whole; else None.
        reads: the tensors that it takes from outside.
        makes: the tensors that it makes.
    """

    nodes: tuple[onnx.NodeProto, ...]
    linear: Linear | None
    reads: frozenset[str]
    makes: frozenset[str]


@dataclass(frozen=True)
class Flow:
    """The steps of a model.

    Attributes:
        model: the model.
        steps: whatever depends on the model's inputs or on chance, in an order in which it can run.
        place: of every node of the main graph that is part of a step, by its index: which step.
        made: of every tensor that a step makes: which step.
        constant: the node that makes it, by the name of a tensor that depends on stored tensors alone.
        weights: the name of the weight, by the float tensor that gives its values.
    """

    model: Model
    steps: tuple[Step, ...]
    place: Mapping[int, int]
    made: Mapping[str, int]
    constant: Mapping[str, onnx.NodeProto]
    weights: Mapping[str, str]

    def position(self, linear: Linear) -> int:
        """The step of a linear's product."""
        return self.place[self.model.places[id(linear.nodes[0])].index]

    def known_after(self, name: str) -> int:
        """How many steps must have run before a tensor is there."""
        return self.made[name] + 1 if name in self.made else 0

    def live(self, position: int, wanted: Collection[str] = ()) -> set[str]:
        """The tensors in front of a step that it or a later one reads, and those that are wanted, as far as made."""
        read = set(wanted).union(*(step.reads for step in self.steps[position:]))
        inputs = {value.name for value in self.model.proto.graph.input}
        return {name for name in read if name in inputs or self.made.get(name, position) < position}


def flow_of(model: Model, linears: Sequence[Linear]) -> Flow:
    """Order the nodes of a model's main graph.

    Args:
        model: the model.
        linears: the linears of the main graph whose weights will be exchanged.

    Raises:
        InputError: the nodes go round in a circle, or a linear reads nothing but stored numbers.
    """
    graph = model.proto.graph
    defined = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    stored = set(defined)
    defined |= {value.name for value in graph.input} | {name for node in graph.node for name in node.output}
    for linear in linears:
        if linear.x.name in stored:
            raise InputError(f"{linear.path} reads the stored tensor {linear.x.name}; give --skip {linear.path!r}")
    whole: dict[int, Linear] = {}  # linears that are exchanged with all of their nodes
    for linear in linears:
        if not linear.weight.value:
            whole |= {model.places[id(node)].index: linear for node in linear.nodes}
    running = {linear.x.name for linear in linears}
    running |= {node.outputs[0].name for linear in linears for node in linear.nodes}
    constant = _constants(graph.node, stored, defined, running)
    nodes: dict[int, list[int]] = {}  # by the index of the last node
    for index, node in enumerate(graph.node):
        if not all(name in constant for name in node.output if name):
            last = index
            if index in whole:
                last = max(place for place, linear in whole.items() if linear is whole[index])
            nodes.setdefault(last, []).append(index)
    steps = {last: _step([graph.node[i] for i in own], whole.get(last), defined) for last, own in nodes.items()}
    order = _sorted(steps, model)
    return Flow(
        model,
        tuple(steps[last] for last in order),
        {index: place for place, last in enumerate(order) for index in nodes[last]},
        {name: place for place, last in enumerate(order) for name in steps[last].makes},
        constant,
        {linear.weight.value: linear.weight.name for linear in linears if linear.weight.value},
    )


def stretch(
    flow: Flow,
    begin: int,
    end: int,
    outputs: Iterable[str],
    given: Mapping[str, Any],
    exchanged: Mapping[str, onnx.TensorProto],
) -> onnx.ModelProto:
    """Some steps as a model.

    Before:  a -> step -> step -> MatMul(x, W) -> y -> step -> ...
    After:   x -> MatMul(x, W') -> y                       x and y are inputs and outputs
    Left alone: every other step between the two, functions, opset imports, the nodes that make constants; stored
        tensors are taken along where they are read.
    Numerics: those of the model with the weights exchanged.

    Args:
        flow: the model.
        begin: the first step.
        end: behind the last step.
        outputs: the tensors to return.
        given: an array for each tensor that is live at ``begin``, which tells its type.
        exchanged: new weights by ``Weight.name``, in the type and the way round of ``Weight.value``; for weights that
            no float tensor holds ``[in_features, out_features]`` in the linear's type.

    Returns:
        The model; its stored tensors lie where the model's and the new weights do.
    """
    model, graph = flow.model, flow.model.proto.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    sparse = {tensor.values.name: tensor for tensor in graph.sparse_initializer}
    made = onnx.GraphProto(name=graph.name)
    held: set[str] = set()

    def take(names: Iterable[str]) -> None:
        """Take along what is there before the first step runs."""
        for name in names:
            if name in held or begin <= flow.made.get(name, -1) < end:
                continue
            held.add(name)
            if flow.weights.get(name, "") in exchanged:
                made.initializer.append(_named(exchanged[flow.weights[name]], name))
            elif name in given:
                kind = helper.np_dtype_to_tensor_dtype(given[name].dtype)
                made.input.append(helper.make_tensor_value_info(name, kind, [None] * given[name].ndim))
            elif name in stored:
                made.initializer.append(stored[name])
            elif name in sparse:
                made.sparse_initializer.append(sparse[name])
            elif name in flow.constant:
                node = flow.constant[name]
                take(_reads(node, flow.constant.keys() | stored.keys() | sparse.keys()))
                held.update(node.output)
                made.node.append(node)

    for step in flow.steps[begin:end]:
        if step.linear is not None and step.linear.weight.name in exchanged:
            weight = f"sparsify.{step.linear.weight.name}"
            if weight not in held:
                held.add(weight)
                made.initializer.append(_named(exchanged[step.linear.weight.name], weight))
            nodes = _in_float(step.linear, weight)
            take(name for node in nodes for name in node.input if name not in (weight, nodes[0].output[0]))
            made.node.extend(nodes)
        else:
            take(step.reads)
            made.node.extend(step.nodes)
    wanted = list(outputs)
    take(wanted)
    made.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    result = helper.make_model(made, opset_imports=model.proto.opset_import, functions=model.proto.functions)
    result.ir_version = model.proto.ir_version
    return result


def _in_float(linear: Linear, weight: str) -> list[onnx.NodeProto]:
    """A linear that reads codes as a product of floats: its input as it was before it was quantised."""
    y = linear.y.name
    if linear.bias is None:
        return [helper.make_node("MatMul", [linear.x.name, weight], [y])]
    product = f"sparsify.{y}"
    return [
        helper.make_node("MatMul", [linear.x.name, weight], [product]),
        helper.make_node("Add", [product, linear.bias.name], [y]),
    ]


def _named(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _reads(node: onnx.NodeProto, defined: Collection[str]) -> set[str]:
    """The tensors of the main graph that a node reads, those that graphs inside it read included."""
    names = set(filter(None, node.input))
    for body in subgraphs(node):
        for inner in graphs(body):
            names.update(value.name for value in inner.output)
            names.update(name for each in inner.node for name in each.input)
    return names.intersection(defined)


def _step(nodes: Sequence[onnx.NodeProto], linear: Linear | None, defined: Collection[str]) -> Step:
    makes = {name for node in nodes for name in node.output if name}
    reads = set().union(*(_reads(node, defined) for node in nodes)) - makes
    return Step(tuple(nodes), linear, frozenset(reads | ({linear.x.name} if linear else set())), frozenset(makes))


def _constants(
    nodes: Sequence[onnx.NodeProto], stored: set[str], defined: set[str], running: set[str]
) -> dict[str, onnx.NodeProto]:
    """The nodes that depend on stored tensors alone, by what they make; none of them makes what is ``running``."""
    found: dict[str, onnx.NodeProto] = {}
    before = -1
    while len(found) > before:  # nodes that are sorted, as they should be, take one round and one to see that
        before = len(found)
        for node in nodes:
            names = [name for name in node.output if name]
            if names[0] in found or node.op_type in RANDOM or running.intersection(names):
                continue
            if all(name in stored or name in found for name in _reads(node, defined)):
                found |= dict.fromkeys(names, node)
    return found


def _sorted(steps: Mapping[int, Step], model: Model) -> list[int]:
    """The keys of the steps so that each runs after those whose results it reads; as they are, where that will do."""
    maker = {name: key for key, step in steps.items() for name in step.makes}
    waits = {key: {maker[name] for name in step.reads if name in maker} - {key} for key, step in steps.items()}
    readers: dict[int, list[int]] = {key: [] for key in steps}
    for key, before in waits.items():
        for other in before:
            readers[other].append(key)
    ready = [key for key, before in waits.items() if not before]
    heapq.heapify(ready)
    order = []
    while ready:
        order.append(key := heapq.heappop(ready))
        for reader in readers[key]:
            waits[reader].remove(key)
            if not waits[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(steps):
        stuck = next(step for key, step in steps.items() if waits[key]).nodes[0]
        raise InputError(f"{model.path}: {stuck.op_type} {stuck.name or stuck.output[0]!r} waits for its own result")
    return order
