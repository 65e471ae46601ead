"""Find which channels of a traced network may be reordered for free, by dataflow alone.

No model name, module name or layer pattern is known here: the graph says what depends on what. Pinned, and
so not found: the channels that rotary embedding pairs up, the residual stream of a single block (it enters
and leaves the graph), whatever an operation without a rule touches.
"""

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node

from .channel_atoms import Atoms
from .channel_ops import apply, tensors
from .channel_shapes import Result
from .channel_values import Parameter, ParameterAtoms, Shape, Size, Unknown, Value, spread, still


@dataclass(frozen=True)
class ChannelRange:
    """``size`` consecutive entries along one dimension of a parameter, in the order of the space's channels.

    Attributes:
        param: fully qualified parameter name.
        dim: 0 for the rows of a weight and for vectors, 1 for the columns of a weight.
        start: first entry.
        size: number of entries.
    """

    param: str
    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class ChannelSpace:
    """Channels that may be put in any order, as long as every range gets the same order.

    Attributes:
        size: number of channels.
        producers: where the channels are made: rows of weights, biases, gains, columns of embeddings.
        consumers: where they are summed: columns of weights. A tied embedding is among both.
    """

    size: int
    producers: tuple[ChannelRange, ...]
    consumers: tuple[ChannelRange, ...]

    @property
    def name(self) -> str:
        """Short description, such as ``layers.0.mlp.down_proj columns 0..1535``; unique in its model."""
        first = self.consumers[0]
        same = [r for r in self.consumers if r.param == first.param]
        where = ", ".join(f"{r.start}..{r.start + r.size - 1}" for r in same)
        more = len({r.param for r in self.consumers}) - 1
        return f"{first.param.removesuffix('.weight')} columns {where}" + (f" and {more} more" if more else "")


def find_channel_spaces(
    graph_module: GraphModule,
    params: Mapping[str, str],
    cache: Mapping[str, str] | Iterable[tuple[str, str]] = (),
) -> list[ChannelSpace]:
    """Find every set of channels that may be reordered without changing what the graph computes.

    Args:
        graph_module: a graph of ATen ops as ``torch.export`` traces it, not decomposed: a whole model or one
            block. Every tensor node has ``meta["val"]``; dimensions that vary (tokens, batch) are symbolic.
        params: fully qualified parameter name of each placeholder that is a parameter. Two placeholders with
            one name are one tied parameter. Leave out whatever code outside this graph reads as well (another
            block with the same weight): what is not named here cannot move. Integers and booleans never move.
        cache: placeholder that holds past keys or values, and node that is returned as the present ones, in
            pairs. Such a pair is state that nobody looks into, so its channels may be reordered as well; a
            cache filled before a fold is not valid after it. Any other input or output is left as it is.

    Returns:
        The spaces with at least one producer, one consumer and two channels, by first consumer in the order
        of ``params``. They are disjoint and independent: any of them may be folded, in any order.

    Raises:
        ValueError: ``cache`` names a node that the graph does not have, or a tensor node has no ``meta["val"]``.
    """
    cache = dict(cache)
    nodes = {node.name: node for node in graph_module.graph.nodes}
    if missing := sorted({*cache, *cache.values()} - nodes.keys()):
        raise ValueError(f"cache names nodes that the graph does not have: {', '.join(missing)}")
    walk = _Walk(graph_module, params, cache)
    for node in graph_module.graph.nodes:
        walk.visit(node)
    return _read_out(walk.params, list(dict.fromkeys(params.values())))


class _Walk:
    """One pass over the graph, node by node."""

    def __init__(self, graph_module: GraphModule, names: Mapping[str, str], cache: Mapping[str, str]) -> None:
        self.graph_module = graph_module
        self.atoms = Atoms()
        self.params = ParameterAtoms(self.atoms)
        self.names = names
        self.cache = cache
        self.values: dict[Node, Result] = {}

    def visit(self, node: Node) -> None:
        if node.op == "output":
            self._output(node)
            return
        content = self._content(node)
        shapes = _shapes(content)
        if node.name in self.names and isinstance(content, torch.Tensor) and content.is_floating_point():
            sizes = tuple(content.shape)
            self.values[node] = Parameter(self.names[node.name], sizes, tuple(range(len(sizes))))
        elif node.op == "placeholder" and node.name in self.cache and isinstance(shapes, tuple):
            tracked = tuple(size if isinstance(size, int) else 1 for size in shapes)
            self.values[node] = Value(shapes, self.atoms.fresh(tracked))
        elif node.op == "call_function":
            self._call(node, shapes)
        elif shapes is not None:
            self.values[node] = self._still(shapes)

    def _content(self, node: Node) -> object:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.graph_module)
        schema = getattr(node.target, "_schema", None)
        if "val" not in node.meta and (node.op == "placeholder" or (schema is not None and schema.returns)):
            raise ValueError(f"node {node.name} has no meta['val']; trace the graph with torch.export")
        return node.meta.get("val")

    def _call(self, node: Node, shapes: Shape | list[Shape] | None) -> None:
        if node.target is operator.getitem and isinstance(source := self._operand(node.args[0]), tuple):
            self.values[node] = source[node.args[1]]  # type: ignore[index]
            return
        arguments = _by_name(node, self._operand)
        operands = tensors(arguments)
        if shapes is None:
            if not str(node.target).startswith(("aten.sym_", "aten._assert_")):  # these look at shapes and dtypes only
                self._pin(operands)
        elif all(isinstance(operand, Value) and self.atoms.pinned(operand.atoms) for operand in operands):
            self.values[node] = self._still(shapes)
        else:
            try:
                self.values[node] = apply(self.params, node.target, arguments, shapes)
            except Unknown:
                self._pin(operands)
                self.values[node] = self._still(shapes)

    def _output(self, node: Node) -> None:
        pasts = {present: past for past, present in self.cache.items()}
        values = {n.name: value for n, value in self.values.items()}
        for returned in _nodes(node.args):
            value = self.values.get(returned)
            past = values[pasts.pop(returned.name)] if returned.name in pasts else None
            if isinstance(value, Value) and isinstance(past, Value) and len(value.shape) == len(past.shape):
                present = spread(self.atoms, value, [i for i in range(len(value.shape)) if past.tracked(i)])
                if present.atoms.shape == past.atoms.shape:
                    self.atoms.tie(present.atoms, past.atoms)
                    continue
            self._pin(tensors(value))
        for past_name in pasts.values():  # never returned, so not state
            self._pin(tensors(values.get(past_name)))

    def _operand(self, argument: object) -> object:
        if isinstance(argument, Node):
            return self.values.get(argument, argument.meta.get("val"))
        if isinstance(argument, (list, tuple)):
            return [self._operand(item) for item in argument]
        return argument

    def _pin(self, operands: Iterable[Value | Parameter]) -> None:
        for operand in operands:
            if isinstance(operand, Parameter):
                self.params.pin(operand)
            else:
                self.atoms.pin(operand.atoms)

    def _still(self, shapes: Shape | list[Shape]) -> Result:
        if isinstance(shapes, list):
            return tuple(still(self.atoms, shape) for shape in shapes)
        return still(self.atoms, shapes)


def _read_out(params: ParameterAtoms, order: list[str]) -> list[ChannelSpace]:
    """Turn the symmetry of the atoms into ranges of parameters."""
    symmetry = params.atoms.symmetry()
    keys = sorted((key for key in params.along), key=lambda key: (order.index(key[0]), key[1]))
    entries: dict[int, dict[tuple[int, int], list[tuple[int, int]]]] = {}
    for number, key in enumerate(keys):
        along = params.along[key]
        movable = np.flatnonzero(symmetry.kind[along] >= 0)
        for index, atom in zip(movable.tolist(), along[movable].tolist(), strict=True):
            parts = entries.setdefault(int(symmetry.kind[atom]), {})
            part = parts.setdefault((number, int(symmetry.colour[atom])), [])
            part.append((int(symmetry.component[atom]), index))
    spaces = []
    for parts in entries.values():
        ranges = _ranges([(keys[number], dict(part)) for (number, _), part in parts.items()], params.consumers)
        producers = tuple(r for r in ranges if (r.param, r.dim) in params.producers)
        consumers = tuple(r for r in ranges if (r.param, r.dim) in params.consumers)
        if producers and consumers and producers[0].size >= 2:
            spaces.append(ChannelSpace(producers[0].size, producers, consumers))
    return sorted(spaces, key=lambda s: (order.index(s.consumers[0].param), s.consumers[0].start))


def _ranges(parts: list[tuple[tuple[str, int], dict[int, int]]], consumers: set[tuple[str, int]]) -> list[ChannelRange]:
    """Ranges in the order of the first consumer; none if a part is not consecutive in that order.

    Each part is a parameter dimension, with the index of every component (channel) along it.
    """
    first = next((places for key, places in parts if key in consumers), None)
    if first is None:
        return []
    channels = sorted(first, key=lambda component: first[component])
    ranges = []
    for (param, dim), places in parts:
        indices = [places[component] for component in channels]
        if indices != list(range(indices[0], indices[0] + len(indices))):
            return []
        ranges.append(ChannelRange(param, dim, indices[0], len(indices)))
    return ranges


def _by_name(node: Node, operand: Callable[[object], object]) -> dict[str, Any]:
    """The arguments of a call by their name in the operation's schema, defaults included."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {"args": operand(node.args), "kwargs": operand(tuple(node.kwargs.values()))}
    schema = node.target._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False)) | node.kwargs
    return {a.name: operand(given.get(a.name, a.default_value)) for a in schema}


def _shapes(value: object) -> Shape | list[Shape] | None:
    """Shape of a tensor, shapes of a list of tensors, None of anything else."""
    if isinstance(value, torch.Tensor):
        return tuple(_size(size) for size in value.shape)
    if isinstance(value, (list, tuple)) and any(isinstance(item, torch.Tensor) for item in value):
        return [tuple(_size(size) for size in item.shape) if isinstance(item, torch.Tensor) else () for item in value]
    return None


def _size(size: Size) -> Size:
    """A symbolic size that is a number after all becomes one."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size.node.expr)
    return size


def _nodes(argument: object) -> Iterator[Node]:
    if isinstance(argument, Node):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _nodes(item)
