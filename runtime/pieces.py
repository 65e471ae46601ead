"""Run a file piece by piece: without our kernels ONNX Runtime holds every weight several times over.

It computes what depends on weights alone before the first run, so the functions in the file unpack all of them, and
then keeps them in four forms (measured: 4.3 times the dense float32). A piece is a model of some neighbouring nodes of
the file, whose weights stay where they are; what is computed is the same, and what is open is one piece.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort  # type: ignore[import-untyped]

from ..passes.mapped import give_back
from ..passes.onnx.protos import nbytes, subgraphs
from .feeds import NUMPY
from .session import options_for

MOST = 64 << 20
"""Bytes that the weights of a piece take as dense float32; a node by itself may have more."""
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Piece:
    """Some nodes of a file as a model.

    Attributes:
        model: the model, serialised; its weights lie in the file's data.
        folder: where that is.
        inputs: names of what it reads: inputs of the file, and outputs of pieces before it.
        outputs: names of what it makes: for pieces behind it, and outputs of the file.
        crossing: those that pieces behind it read.
        dead: the inputs that no piece behind it reads.
    """

    model: bytes
    folder: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    crossing: frozenset[str]
    dead: tuple[str, ...]

    def open(self, *, kernels: bool) -> ort.InferenceSession:
        """A session of it alone."""
        options = options_for(kernels=kernels)
        options.add_session_config_entry(WEIGHTS_FOLDER, str(self.folder))
        return ort.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])


def cut(path: Path, most: int | None = None) -> list[Piece]:
    """The pieces of a file, first to last; none where it is one piece, or returns an input or a constant as it is.

    Args:
        path: the ``.onnx`` file.
        most: bytes, see ``MOST``.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path), load_external_data=False))
    graph = model.graph
    if any(True for node in graph.node for _ in subgraphs(node)):
        return []  # bodies read what lies outside of them
    values = {value.name: value for value in (*graph.value_info, *graph.input, *graph.output)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    results = [value.name for value in graph.output]
    made_of = _constants(graph.node, weights)
    others = [node for node in graph.node if node.output[0] not in made_of]
    groups = list(_groups(others, weights, values, made_of, most or MOST))
    if len(groups) < 2 or not {name for node in others for name in node.output}.issuperset(results):
        return []
    pieces = []
    for index, group in enumerate(groups):
        later = {name for other in groups[index + 1 :] for node in other for name in node.input if name}
        nodes = [*_ordered(made_of[name] for node in group for name in node.input if name in made_of), *group]
        made = [name for node in nodes for name in node.output]
        read = list(dict.fromkeys(name for node in nodes for name in node.input if name))
        inputs = [name for name in read if name not in made and name not in weights]
        outputs = [name for node in group for name in node.output if name in later or name in results]
        proto = _without_graph(model)
        proto.graph.name = f"{graph.name or 'graph'} {index}"
        proto.graph.node.extend(nodes)
        proto.graph.initializer.extend(weights[name] for name in read if name in weights)
        proto.graph.input.extend(values[name] for name in inputs)
        proto.graph.output.extend(values[name] for name in outputs)
        dead = tuple(name for name in inputs if name not in later and name not in results)
        crossing = frozenset(later.intersection(outputs))
        pieces.append(Piece(proto.SerializeToString(), path.parent, tuple(inputs), tuple(outputs), crossing, dead))
    return pieces


def run(
    pieces: Sequence[Piece], feeds: Iterable[Mapping[str, Any]], results: Sequence[str], *, kernels: bool
) -> list[list[Any]]:
    """Some outputs of the whole file for every feed; each piece is opened once.

    Args:
        pieces: of the file.
        feeds: arrays by the names of its inputs.
        results: the names of the outputs.
        kernels: with our kernels, or by the functions in the file.
    """
    every = [dict(feed) for feed in feeds]
    for piece in pieces:
        session = piece.open(kernels=kernels)
        types = {value.name: NUMPY[value.type] for value in session.get_inputs()}
        wanted = [name for name in piece.outputs if name in results or name in piece.crossing]
        for values in every:
            made = session.run(wanted, {name: values[name].astype(kind, copy=False) for name, kind in types.items()})
            values |= zip(wanted, made, strict=True)
            for name in piece.dead:
                values.pop(name, None)
        del session
        give_back()
    return [[values[name] for name in results] for values in every]


def _constants(nodes: Iterable[onnx.NodeProto], weights: Collection[str]) -> dict[str, list[onnx.NodeProto]]:
    """The nodes, in order, that make every value which depends on weights alone; each piece makes its own of them."""
    made_of: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        if all(not name or name in weights or name in made_of for name in node.input):
            before = _ordered(made_of[name] for name in node.input if name in made_of)
            made_of |= {name: [*before, node] for name in node.output if name}
    return made_of


def _ordered(chains: Iterable[list[onnx.NodeProto]]) -> list[onnx.NodeProto]:
    """The nodes of some chains, each once."""
    return list({node.output[0]: node for chain in chains for node in chain}.values())


def _groups(
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, onnx.TensorProto],
    values: Mapping[str, onnx.ValueInfoProto],
    made_of: Mapping[str, list[onnx.NodeProto]],
    most: int,
) -> Iterator[list[onnx.NodeProto]]:
    """The nodes in their order, cut where a group has enough weights and the types of all that crosses are known."""
    last = {name: index for index, node in enumerate(nodes) for name in node.input}
    group: list[onnx.NodeProto] = []
    size, made = 0, set[str]()
    for index, node in enumerate(nodes):
        more = _dense_bytes(node, weights, values, made_of)
        if group and size + more > most and all(name in values for name in made if last.get(name, -1) >= index):
            yield group
            group, size = [], 0
        group.append(node)
        size += more
        made |= set(node.output) - {""}
    yield group


def _dense_bytes(
    node: onnx.NodeProto,
    weights: Mapping[str, onnx.TensorProto],
    values: Mapping[str, onnx.ValueInfoProto],
    made_of: Mapping[str, list[onnx.NodeProto]],
) -> int:
    """What the weights of a node take, those of a sparse op as the dense matrix that its function makes."""
    below = [name for read in node.input for maker in made_of.get(read, []) for name in maker.input]
    stored = sum(nbytes(weights[name]) for name in {*node.input, *below} if name in weights)
    if node.domain != "sparsify":
        return stored
    wide = [_last(values.get(name)) for name in (node.input[0], node.output[0])]
    return 4 * math.prod(wide) if all(wide) else 8 * stored


def _last(value: onnx.ValueInfoProto | None) -> int:
    """The last size of a value; 0 where it is not known."""
    dims = value.type.tensor_type.shape.dim if value is not None else []
    return int(dims[-1].dim_value) if dims else 0


def _without_graph(model: onnx.ModelProto) -> onnx.ModelProto:
    """Versions and functions of a model."""
    bare = onnx.ModelProto(ir_version=model.ir_version)
    bare.opset_import.extend(model.opset_import)
    bare.functions.extend(model.functions)
    return bare
