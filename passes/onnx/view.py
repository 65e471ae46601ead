"""An ONNX model that another tool made: the file as it is, and onnx-graphsurgeon's view of it to find one's way in.

onnx-graphsurgeon shows who makes and who reads a tensor, subgraphs included. It cannot write a model back whole
(metadata, doc strings, some types and attributes get lost), so changes go into the file's own graph, node by node:
what nobody touched cannot differ.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs  # type: ignore[import-untyped]
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx_graphsurgeon.logger import G_LOGGER  # type: ignore[import-untyped]
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException  # type: ignore[import-untyped]

from ..errors import InputError
from .protos import graphs, is_external, location, nbytes

G_LOGGER.severity = G_LOGGER.CRITICAL  # it tells about every type that numpy does not have
STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Place:
    """Where a node stands: the number of its graph (0 is the main one) and its index there."""

    graph: int
    index: int


@dataclass
class Model:
    """A model as read.

    Attributes:
        path: the file.
        proto: what it holds; weights that lie beside it are not read.
        opset: version of the standard ops.
        valid: whether ONNX's checker accepts it. ONNX Runtime runs some models that it does not.
        constants: every initializer, and every tensor that a Constant node holds, by name.
        views: onnx-graphsurgeon's graphs, in the order of ``protos.graphs``.
        places: where each node of the views stands, by ``id``.
    """

    path: Path
    proto: onnx.ModelProto
    opset: int
    valid: bool
    constants: dict[str, onnx.TensorProto]
    views: list[gs.Graph]
    places: dict[int, Place] = field(repr=False)

    @property
    def folder(self) -> Path:
        """What external data is relative to."""
        return self.path.parent

    def nodes(self) -> Iterator[gs.Node]:
        """Every node of every graph, in order."""
        for view in self.views:
            yield from view.nodes

    def outputs(self) -> set[str]:
        """Every tensor that is an output of its graph."""
        return {tensor.name for view in self.views for tensor in view.outputs}

    def names(self) -> set[str]:
        """Every name of a tensor in use, so that new ones can differ."""
        protos = list(graphs(self.proto.graph))
        made = {name for graph in protos for node in graph.node for name in (*node.input, *node.output)}
        return made | {x.name for graph in protos for x in (*graph.initializer, *graph.input, *graph.output)}


def read_model(path: Path) -> Model:
    """Read a model and check that all of it is there.

    Raises:
        InputError: the file is not an ONNX model, is damaged, lacks a part of its weights, or is older than opset 11.
    """
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0] if str(error) else error!r}") from error
    if not proto.graph.node:
        raise InputError(f"{path} is not an ONNX model: it holds no graph")
    opset = next((entry.version for entry in proto.opset_import if entry.domain in STANDARD), 0)
    if opset < 11:
        raise InputError(f"{path} uses ONNX opset {opset}; want 11 or newer (onnx.version_converter raises it)")
    for tensor in external_tensors(proto):
        _check_data(tensor, path)
    if proto.ir_version < 4:  # every initializer had to be listed as an input; since then that means "may be replaced"
        stored = {tensor.name for tensor in proto.graph.initializer}
        kept = [value for value in proto.graph.input if value.name not in stored]
        del proto.graph.input[:]
        proto.graph.input.extend(kept)
    try:
        root = gs.import_onnx(proto)
    except (OnnxGraphSurgeonException, UnicodeDecodeError, KeyError, ValueError) as error:
        raise InputError(f"cannot read {path}: onnx-graphsurgeon says {str(error).splitlines()[0]}") from error
    views = list(_views(root))
    places = {id(n): Place(g, i) for g, view in enumerate(views) for i, n in enumerate(view.nodes)}
    return Model(path, proto, opset, _valid(path), _constants(proto), views, places)


def external_tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Every initializer that lies in a file of its own."""
    return [t for graph in graphs(proto.graph) for t in graph.initializer if is_external(t)]


def _views(view: gs.Graph) -> Iterator[gs.Graph]:
    """The same walk as ``protos.graphs``."""
    yield view
    for node in view.nodes:
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                yield from _views(value)


def _constants(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    found = {}
    for graph in graphs(proto.graph):
        for tensor in graph.initializer:
            found[tensor.name] = tensor
        for node in graph.node:
            if node.op_type == "Constant" and node.domain in STANDARD and node.attribute[0].HasField("t"):
                found[node.output[0]] = node.attribute[0].t
    return found


def _check_data(tensor: onnx.TensorProto, path: Path) -> None:
    """Weights that lie outside the model's folder are refused: a file from somewhere must not read another."""
    where = location(tensor)
    name = where.get("location", "")
    file = path.parent / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{path}: {tensor.name} lies in {name!r}; want a file beside the model")
    if not file.is_file():
        raise InputError(f"{path} lacks its weights: {file} does not exist")
    end = int(where.get("offset", 0)) + nbytes(tensor)
    if (size := file.stat().st_size) < end:
        raise InputError(f"{path} is damaged: {tensor.name} ends at byte {end} of {file}, which has {size}")
    length = int(where.get("length", nbytes(tensor)))
    if length != nbytes(tensor):
        kind = ir.DataType(tensor.data_type).name
        raise InputError(f"{path} is damaged: {tensor.name} {kind} {list(tensor.dims)} does not take {length} bytes")


def _valid(path: Path) -> bool:
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError:
        return False
    return True
