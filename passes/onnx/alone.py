"""The linears of a model side by side, each with an input and an output of its own and nothing between them.

What a whole model returns hides what its last layers forget. A linear by itself has nowhere to hide: it is checked on
inputs that are known not to be zero, within a bound of its own size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import helper

from .protos import graphs, subgraphs
from .twin import End

FLOAT = onnx.TensorProto.FLOAT


@dataclass
class _Scope:
    """One graph: what it defines, and the graph around it."""

    number: int
    around: "_Scope | None"
    nodes: Mapping[str, onnx.NodeProto]
    tensors: Mapping[str, onnx.TensorProto]
    inputs: frozenset[str]

    def find(self, name: str) -> "_Scope":
        """The graph that ``name`` is defined in, by ONNX's rules.

        Raises:
            ValueError: none.
        """
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.nodes or name in scope.tensors or name in scope.inputs:
                return scope
            scope = scope.around
        raise ValueError(f"no graph defines {name!r}")


@dataclass
class _Cut:
    """What one linear takes over into the new model."""

    stem: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)


def alone(
    proto: onnx.ModelProto, linears: Sequence[End], features: Sequence[int], dtypes: Sequence[int]
) -> onnx.ModelProto:
    """A model with an input ``x{i}`` (float32 ``[tokens, K]``) and an output ``y{i}`` (float32) for every linear.

    Args:
        proto: the model that they are in.
        linears: where.
        features: K of each.
        dtypes: the ONNX type that each computes in.

    Returns:
        A model to be stored where ``proto`` would be: its weights are the same files.
    """
    scopes = list(_scopes(proto.graph))
    cuts = []
    for index, (end, dtype) in enumerate(zip(linears, dtypes, strict=True)):
        cut = _Cut(f"{index}.")
        x = scopes[end.graph].find(end.x).number, end.x
        made = {x: f"{cut.stem}x"}
        y = _take(scopes[end.graph], end.y, cut, made)
        first = helper.make_node("Cast", [f"x{index}"], [made[x]], to=dtype)
        cut.nodes = [first, *cut.nodes, helper.make_node("Cast", [y], [f"y{index}"], to=FLOAT)]
        cuts.append(cut)
    tokens = "tokens"
    graph = helper.make_graph(
        [node for cut in cuts for node in cut.nodes],
        "linears",
        [helper.make_tensor_value_info(f"x{i}", FLOAT, [tokens, k]) for i, k in enumerate(features)],
        [helper.make_tensor_value_info(f"y{i}", FLOAT, None) for i in range(len(linears))],
        [tensor for cut in cuts for tensor in cut.tensors],
    )
    model = helper.make_model(graph, opset_imports=proto.opset_import, functions=proto.functions)
    model.ir_version = proto.ir_version
    return model


def _scopes(graph: onnx.GraphProto) -> Iterator[_Scope]:
    """In the order of ``protos.graphs``."""
    kept = list(graphs(graph))
    numbers = {id(inner): number for number, inner in enumerate(kept)}
    around: dict[int, _Scope] = {}
    for number, inner in enumerate(kept):
        scope = _Scope(
            number,
            around.get(number),
            {name: node for node in inner.node for name in node.output if name},
            {tensor.name: tensor for tensor in inner.initializer},
            frozenset(value.name for value in inner.input),
        )
        for node in inner.node:
            for body in subgraphs(node):
                around[numbers[id(body)]] = scope
        yield scope


def _take(scope: _Scope, name: str, cut: _Cut, made: dict[tuple[int, str], str]) -> str:
    """Take over what makes ``name``, and say what it is called in the new model."""
    home = scope.find(name)
    key = home.number, name
    if key in made:
        return made[key]
    made[key] = f"{cut.stem}{home.number}.{name}"
    if name in home.nodes:
        node = onnx.NodeProto()
        node.CopyFrom(home.nodes[name])
        node.name = ""
        node.input[:] = [_take(home, x, cut, made) if x else "" for x in node.input]
        for x in node.output:
            made[home.number, x] = f"{cut.stem}{home.number}.{x}"
        node.output[:] = [made[home.number, x] if x else "" for x in node.output]
        cut.nodes.append(node)
    elif name in home.tensors:
        tensor = onnx.TensorProto()
        tensor.CopyFrom(home.tensors[name])
        tensor.name = made[key]
        cut.tensors.append(tensor)
    else:
        raise ValueError(f"{name!r} is an input of its graph")
    return made[key]
