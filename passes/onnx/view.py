"""An ONNX model that another tool made: the file as it is, and onnx-graphsurgeon's view of it to find one's way in.

onnx-graphsurgeon shows who makes and who reads a tensor, subgraphs included. It cannot write a model back whole
(metadata, doc strings, some types and attributes get lost), so changes go into the file's own graph, node by node:
what nobody touched cannot differ.
"""

import re
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
from .names import make_names_unique
from .protos import graphs, is_external, location, nbytes, tensors
from .unfold import Unfolded, unfold

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
        proto: what it holds, every name made unique, see ``unfolded``; weights that lie beside it are not read.
        opset: version of the standard ops.
        valid: whether ONNX's checker accepts it. ONNX Runtime runs some models that it does not.
        constants: every initializer, and every tensor that a Constant node holds, by name.
        views: onnx-graphsurgeon's graphs, in the order of ``protos.graphs``.
        places: where each node of the views stands, by ``id``.
        unfolded: the products of 8-bit activations that ``proto`` and the views have written out in float.
    """

    path: Path
    proto: onnx.ModelProto
    opset: int
    valid: bool
    constants: dict[str, onnx.TensorProto]
    views: list[gs.Graph]
    places: dict[int, Place] = field(repr=False)
    unfolded: list[Unfolded] = field(repr=False)

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

    def called(self, node: gs.Node) -> str:
        """What the file calls a product."""
        before = (x.node.op_type for x in self.unfolded if x.product == node.outputs[0].name)
        return next(before, str(node.op))

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
    for tensor in tensors(proto):
        _check_data(tensor, path)
    if proto.ir_version < 4:  # every initializer had to be listed as an input; since then that means "may be replaced"
        stored = {tensor.name for tensor in proto.graph.initializer}
        kept = [value for value in proto.graph.input if value.name not in stored]
        del proto.graph.input[:]
        proto.graph.input.extend(kept)
    try:
        make_names_unique(proto)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    _check_nodes(proto, path)
    unfolded = unfold(proto)
    try:
        root = gs.import_onnx(proto)
    except (OnnxGraphSurgeonException, UnicodeDecodeError, KeyError, ValueError) as error:
        raise InputError(f"cannot read {path}: onnx-graphsurgeon says {str(error).splitlines()[0]}") from error
    views = list(_views(root))
    places = {id(n): Place(g, i) for g, view in enumerate(views) for i, n in enumerate(view.nodes)}
    return Model(path, proto, opset, _valid(path), _constants(proto), views, places, unfolded)


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
                found[node.output[0]] = node.attribute[0].t  # _check_nodes saw that both are there
    return found


def _check_data(tensor: onnx.TensorProto, path: Path) -> None:
    """Weights that lie outside the model's folder are refused: a file from somewhere must not read another."""
    try:
        size = nbytes(tensor)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if not is_external(tensor):
        return
    where = location(tensor)
    name = where.get("location", "")
    file = path.parent / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(f"{path}: {tensor.name} lies in {name!r}; want a file beside the model")
    if not file.is_file():
        raise InputError(f"{path} lacks its weights: {file} does not exist")
    for key in ("offset", "length"):
        if not re.fullmatch(r"[0-9]{1,18}", where.get(key, "0")):
            raise InputError(f"{path} is damaged: the {key} of {tensor.name} is {where[key]!r}; want a number of bytes")
    end = int(where.get("offset", 0)) + size
    if (there := file.stat().st_size) < end:
        raise InputError(f"{path} is damaged: {tensor.name} ends at byte {end} of {file}, which has {there}")
    length = int(where.get("length", size))
    if length != size:
        kind = ir.DataType(tensor.data_type).name
        raise InputError(f"{path} is damaged: {tensor.name} {kind} {list(tensor.dims)} does not take {length} bytes")


_LEAST = {"MatMul": 2, "Gemm": 2, "MatMulInteger": 2, "Cast": 1, "Transpose": 1, "Identity": 1, "DequantizeLinear": 2}
_LEAST |= {"FusedMatMul": 2, "MatMulNBits": 3, "MatMulIntegerToFloat": 4, "DynamicQuantizeMatMul": 3}
_LEAST |= {"DynamicQuantizeLinear": 1, "Add": 2, "Mul": 2, "Gather": 2, "GroupQueryAttention": 5}
_LEAST |= {"QLinearMatMul": 8, "QGemm": 6}
"""How many inputs the ops that are looked into have at least; onnx-graphsurgeon does not ask."""


def _check_nodes(proto: onnx.ModelProto, path: Path) -> None:
    """What is looked into must have the parts that are looked at."""
    for graph in graphs(proto.graph):
        for node in graph.node:
            name = f"{path}: {node.op_type} {node.name or (node.output[0] if node.output else '')!r}"
            if not any(node.output):
                raise InputError(f"{name} has no output; the file is damaged")
            if len(node.input) < _LEAST.get(node.op_type, 0) and node.domain in (*STANDARD, "com.microsoft"):
                raise InputError(f"{name} has {len(node.input)} inputs; want {_LEAST[node.op_type]} or more")
            if node.domain in STANDARD and node.op_type in ("Constant", "Cast") and not node.attribute:
                raise InputError(f"{name} has no attribute; the file is damaged")


def _valid(path: Path) -> bool:
    try:
        onnx.checker.check_model(str(path), full_check=False)
    except onnx.checker.ValidationError:
        return False
    return True
