"""Make a name stand for one tensor in a whole ONNX file.

A name means something within its graph and the graphs inside that. Two loops may use the same name for different
tensors, and a body may hide a name of the graph around it. Everything else in this folder looks tensors up by name.
"""

from collections.abc import Mapping

import onnx

from ..errors import InputError
from .protos import subgraphs


def make_names_unique(proto: onnx.ModelProto) -> None:
    """Give every tensor of a subgraph whose name is used elsewhere in the file a name of its own.

    Before:  Loop(body: y = MatMul(x, w)), Loop(body: y = MatMul(x, w))        two tensors w, two y
    After:   Loop(body: y = MatMul(x, w)), Loop(body: y.2 = MatMul(x.2, w.2))
    Left alone: names of the main graph, and so the model's inputs and outputs; inputs and outputs of a subgraph are
        told apart by their order. Functions, which see no names but their own.
    Numerics: none change.

    Args:
        proto: changed in place.

    Raises:
        InputError: a graph defines a name twice, or stores a weight under a name of the graph around it: ONNX forbids
            it, and ONNX Runtime reads the outer one.
    """
    _rename(proto.graph, {}, set(_everywhere(proto.graph)), set())


def _everywhere(graph: onnx.GraphProto) -> list[str]:
    """Every name that any graph defines; new names must differ from them."""
    found = _defined(graph)
    for node in graph.node:
        for inner in subgraphs(node):
            found += _everywhere(inner)
    return found


def _rename(graph: onnx.GraphProto, around: Mapping[str, str], taken: set[str], used: set[str]) -> None:
    """Rename in one graph and those inside it.

    Args:
        graph: changed in place.
        around: what the names of the graphs around it are called now.
        taken: names that no tensor may be given any more.
        used: names that stand for a tensor already.
    """
    names = dict(around)
    if hidden := next((tensor.name for tensor in graph.initializer if tensor.name in around), ""):
        raise InputError(f"the graph {graph.name!r} stores a weight {hidden!r}, which the graph around it has too")
    for name in _defined(graph):
        names[name] = name
        if name in used:
            number = 2
            while (unused := f"{name}.{number}") in taken:
                number += 1
            names[name] = unused
            taken.add(unused)
        used.add(names[name])
    if names.items() - {(name, name) for name in names}:
        _apply(graph, names)
    for node in graph.node:
        for inner in subgraphs(node):
            _rename(inner, names, taken, used)


def _defined(graph: onnx.GraphProto) -> list[str]:
    """The names that a graph itself defines; an initializer of an input's name is that input's default value."""
    made = [value.name for value in graph.input]
    stored = [tensor.name for tensor in graph.initializer]
    stored += [tensor.values.name for tensor in graph.sparse_initializer]
    outputs = [name for node in graph.node for name in node.output if name]
    for names in ([*made, *outputs], [*stored, *outputs]):
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise InputError(
                    f"the graph {graph.name or '(no name)'!r} defines {name!r} twice; want one tensor a name"
                )
            seen.add(name)
    return list(dict.fromkeys([*made, *stored, *outputs]))


def _apply(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Put new names where a graph, without those inside it, defines or reads a tensor."""
    for field in (graph.input, graph.output, graph.value_info, graph.initializer):
        for entry in field:
            entry.name = names.get(entry.name, entry.name)
    for tensor in graph.sparse_initializer:
        tensor.values.name = names.get(tensor.values.name, tensor.values.name)
    for node in graph.node:
        for field in (node.input, node.output):
            for index, name in enumerate(field):
                if name and names.get(name, name) != name:
                    field[index] = names[name]
    for note in graph.quantization_annotation:
        note.tensor_name = names.get(note.tensor_name, note.tensor_name)
        for entry in note.quant_parameter_tensor_names:
            entry.value = names.get(entry.value, entry.value)
