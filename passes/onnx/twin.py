"""The dense model that a sparse one must equal: the user's own file, with nothing but its weights exchanged.

It is built from the bytes of the file and not from the result, and finds its way by the number of a graph and the
place in it, never by a name: whatever was misread (whose weight it is, a transposition, a factor, a bias) shows as a
difference, since ONNX Runtime reads the names here by its own rules.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import Tensor

from ..dialect.functions import QUANTISE_TOKENS
from ..equivalence import grid_step, on_grid
from ..errors import VerificationError
from .fit import digest
from .functions import function_for
from .protos import ONNX, TORCH, graphs, is_external, location, read_float, remove, tensors
from .replace import IR_WITH_FUNCTIONS
from .sparse_linears import Sparse
from .spool import Spool
from .unfold import unfold
from .view import Model, Place

DOUBLE, FLOAT, BFLOAT16 = onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT, onnx.TensorProto.BFLOAT16


@dataclass(frozen=True)
class Stored:
    """Where a weight is held: the number of a graph, and which of its initializers or else of its nodes gives it."""

    graph: int
    index: int
    initializer: bool


@dataclass(frozen=True)
class Twin:
    """One linear of the twin, by places in the file.

    Attributes:
        first: its product.
        others: the rest of it, the last one making its result.
        x: a node that reads its input, and the number of that input.
        weight: what gives its weight in float; None for a product of integers.
        bias: the number of the input of ``first`` that is a bias; None for none.
        sparse: what became of it.
    """

    first: Place
    others: tuple[Place, ...]
    x: tuple[Place, int]
    weight: Stored | None
    bias: int | None
    sparse: Sparse

    @property
    def last(self) -> Place:
        """The node that makes its result."""
        return (self.first, *self.others)[-1]


@dataclass(frozen=True)
class End:
    """One linear of a model on its own, for ``alone``: the graph it is in, what it reads and what it makes there."""

    graph: int
    x: str
    y: str


def twins(model: Model, sparse: Sequence[Sparse]) -> list[Twin]:
    """Note down where every linear stands, before ``replace_linears`` takes the model apart."""
    held: dict[str, Stored] = {}
    for number, graph in enumerate(graphs(model.proto.graph)):
        held |= {node.output[0]: Stored(number, i, False) for i, node in enumerate(graph.node)}
        held |= {tensor.name: Stored(number, i, True) for i, tensor in enumerate(graph.initializer)}
    result = []
    for entry in sparse:
        first, *others = entry.linear.nodes
        bias = entry.linear.bias
        own = None if bias is None else next((i for i, x in enumerate(first.inputs) if x.name == bias.name), None)
        reader = next(node for node in entry.linear.x.outputs if id(node) in model.places)
        x = model.places[id(reader)], next(i for i, x in enumerate(reader.inputs) if x is entry.linear.x)
        places = tuple(model.places[id(node)] for node in others)
        value = entry.linear.weight.value
        result.append(Twin(model.places[id(first)], places, x, held[value] if value else None, own, entry))
    return result


def link_data(proto: onnx.ModelProto, source: Path, folder: Path) -> None:
    """Let ``folder`` hold the data files of the model in ``source``, by hard links where the disk has them."""
    for name in {location(tensor)["location"] for tensor in tensors(proto) if is_external(tensor)}:
        file, link = (source.parent / name).resolve(), folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        try:
            os.link(file, link)
        except OSError:  # another disk, or one without links
            shutil.copyfile(file, link)


def zeroed(path: Path, linears: Sequence[Twin], spool: Spool) -> dict[Stored, onnx.TensorProto]:
    """The user's own weights with the zeros of ``linears``, by where they are held.

    The numbers are read from the given file again, at that place, so that a weight that was taken for another shows;
    only the zeros are ours, and the storage that they are rounded to. Where weights were fitted to their inputs the
    numbers are ours too, and what they were made from must be what is read at that place, bit for bit. Weights that are
    integers in the given file are those that the result holds; what the result holds in integers must be the given
    weights, or the fitted ones, to a step of their grid.

    Raises:
        VerificationError: a fitted weight was made from another one, or a quantised one is not what was quantised.
    """
    proto = read_raw(path)
    scopes = list(graphs(proto.graph))
    values: dict[Stored, onnx.TensorProto] = {}
    checked: set[str] = set()
    for twin in linears:
        stored, sparse, weight = twin.weight, twin.sparse, twin.sparse.linear.weight
        if stored in values or sparse.dense.name in checked:
            continue
        ours = read_float(sparse.dense, spool.file.parent)
        tensor = None if stored is None or weight.quantised else _tensor(scopes[stored.graph], stored)
        given = None if tensor is None else read_float(tensor, path.parent)
        if sparse.fitted is not None:
            there = weight.read() if given is None else given if weight.rows_first else given.T
            if not _was(there, sparse.fitted.origin):
                raise VerificationError(f"{sparse.linear.path}: its weight was not made from that of {path.name}")
            given = sparse.fitted.read() if weight.rows_first else sparse.fitted.read().T
        if sparse.storage.quantised:
            own = weight.read() if given is None else given if weight.rows_first else given.T
            if not _quantised(ours if weight.rows_first else ours.T, own.float(), sparse):
                raise VerificationError(f"{sparse.linear.path}: its quantised weight is not the weight of {path.name}")
        if stored is None or tensor is None or sparse.storage.quantised:
            checked.add(sparse.dense.name)
            if stored is not None:
                values[stored] = beside(sparse.dense)
            continue
        assert given is not None
        own = given
        rounded = own.to(sparse.storage.dtype).to(own.dtype) if sparse.packed else own
        values[stored] = spool.add(tensor.name, torch.where(ours != 0, rounded, 0.0))
    return values


def _was(stored: Tensor, origin: str) -> bool:
    """Whether a weight is the one with this digest, as it is or rounded by a cast on the way to its product."""
    types = (stored.dtype, torch.float16, torch.bfloat16)
    return any(digest(stored.to(dtype).to(stored.dtype)) == origin for dtype in types)


def _quantised(ours: Tensor, own: Tensor, sparse: Sparse) -> bool:
    """Whether ``ours`` is ``own`` with zeros in it, on a grid: no more zeros than were made and than rounding makes."""
    bits = 8 if sparse.storage.kind == "int8" else 4
    small = int((own.abs() < grid_step(own, bits)).sum())
    kept = round((1 - sparse.sparsity) * own.numel())
    return int(ours.count_nonzero()) >= kept - small and on_grid(ours, torch.where(ours != 0, own, 0.0), bits)


def _tensor(graph: onnx.GraphProto, stored: Stored) -> onnx.TensorProto | None:
    """The stored weight; None where a DequantizeLinear or a Mul makes it."""
    tensor: onnx.TensorProto | None = None
    if stored.initializer:
        tensor = graph.initializer[stored.index]
    elif graph.node[stored.index].op_type == "Constant":
        tensor = graph.node[stored.index].attribute[0].t
    return tensor


def read_raw(path: Path) -> onnx.ModelProto:
    """The file as it is, but that its initializers are no inputs (before IR 4 all had to be), and unfolded."""
    proto = onnx.load(str(path), load_external_data=False)
    stored = {tensor.name for tensor in proto.graph.initializer}
    if proto.ir_version < 4:
        remove(proto.graph.input, lambda value: value.name in stored)
    unfold(proto)
    return proto


def ends(proto: onnx.ModelProto, linears: Sequence[Twin]) -> list[End]:
    """What the linears are called in the user's own file."""
    scopes = list(graphs(proto.graph))
    result = []
    for twin in linears:
        reader, index = twin.x
        x = scopes[reader.graph].node[reader.index].input[index]
        y = scopes[twin.last.graph].node[twin.last.index].output[0]
        result.append(End(twin.first.graph, x, y))
    return result


def dense_twin(
    path: Path, linears: Sequence[Twin], values: Mapping[Stored, onnx.TensorProto], *, opset: int, exact: bool
) -> onnx.ModelProto:
    """The given model with the weights of ``linears`` exchanged.

    Args:
        path: the given model.
        linears: see ``twins``.
        values: see ``zeroed``.
        opset: of the given model.
        exact: compute these linears in float64; only their results are rounded. Otherwise activations are rounded
            where the ops round them (runtime/verify.py: expect says why).

    Returns:
        A model to be stored beside the spool of dense weights and what ``link_data`` linked.
    """
    proto = read_raw(path)
    scopes = list(graphs(proto.graph))
    named = ends(proto, linears)
    insert: dict[Place, list[onnx.NodeProto]] = {}
    gone: set[Place] = set()
    for twin, end in zip(linears, named, strict=True):
        node = scopes[twin.first.graph].node[twin.first.index]
        if twin.weight is None:
            dense = beside(twin.sparse.dense)
            dense.name = f"sparsify.{twin.first.graph}.{twin.first.index}.weight"
            scopes[twin.first.graph].initializer.append(dense)
            insert[twin.first] = list(_in_floats(twin, end, node, dense.name, scopes, exact=exact))
            gone.update((twin.first, *_scaling(twin)))
            continue
        if exact or _rounds(twin.sparse):
            insert[twin.first] = list(_on_copies(node, twin.sparse, exact=exact))
            gone.add(twin.first)
    for stored, dense in values.items():
        if stored.initializer:
            tensor = scopes[stored.graph].initializer[stored.index]
            name = tensor.name
            tensor.CopyFrom(dense)
        else:
            gone.add(Place(stored.graph, stored.index))
            name = scopes[stored.graph].node[stored.index].output[0]
            tensor = scopes[stored.graph].initializer.add()
            tensor.CopyFrom(dense)
        tensor.name = name
    for number in reversed(range(len(scopes))):
        graph = scopes[number]
        for index in reversed(range(len(graph.node))):
            place = Place(number, index)
            if place in gone:
                del graph.node[index]
            for new in reversed(insert.get(place, [])):
                graph.node.insert(index, new)
    if any(twin.sparse.storage.quantised for twin in linears):
        for graph in graphs(proto.graph):  # exchanged weights are float32, whatever the model noted down
            remove(graph.value_info, lambda value: value.type.tensor_type.elem_type in TORCH)
        if not exact:
            _add_quantiser(proto, opset=opset)
    return proto


def mute(proto: onnx.ModelProto, linears: Sequence[End]) -> None:
    """Let every linear of a twin give zeros: what its outputs are then, they are whatever the weights."""
    scopes = list(graphs(proto.graph))
    for end in linears:
        nodes = scopes[end.graph].node
        index = next(i for i, node in enumerate(nodes) if end.y in node.output)
        loud = f"sparsify.{end.graph}.{end.y}.loud"
        nodes[index].output[:] = [loud if name == end.y else name for name in nodes[index].output]
        nodes.insert(index + 1, helper.make_node("Sub", [loud, loud], [end.y]))


def beside(dense: onnx.TensorProto) -> onnx.TensorProto:
    """A tensor of the spool, found by a model that lies beside it."""
    tensor = onnx.TensorProto()
    tensor.CopyFrom(dense)
    for entry in tensor.external_data:
        if entry.key == "location":
            entry.value = Path(entry.value).name
    return tensor


def _add_quantiser(proto: onnx.ModelProto, *, opset: int) -> None:
    """Let the model call ``quantise_tokens``."""
    remove(proto.functions, lambda function: function.domain == "sparsify" and function.name == QUANTISE_TOKENS.name)
    proto.functions.append(function_for(QUANTISE_TOKENS, opset, {}))
    proto.ir_version = max(proto.ir_version, IR_WITH_FUNCTIONS)
    if all(entry.domain != "sparsify" for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("sparsify", 1))


def _scaling(twin: Twin) -> tuple[Place, ...]:
    """The nodes that turn an integer product into floats; an Add of the bias stays."""
    kinds = [node.op for node in twin.sparse.linear.nodes[1:]]
    return tuple(place for place, kind in zip(twin.others, kinds, strict=True) if kind != "Add")


def _rounds(sparse: Sparse) -> bool:
    """Whether the sparse op may round the activations that the model has."""
    return sparse.storage.quantised or (sparse.storage.kind == "bf16" and sparse.linear.weight.dtype is torch.float32)


def _copy(x: str, y: str, sparse: Sparse, *, exact: bool) -> Iterator[onnx.NodeProto]:
    """The activations in float64; or in float32, rounded as the sparse op rounds them."""
    if exact or not _rounds(sparse):
        yield helper.make_node("Cast", [x], [y], to=DOUBLE if exact else FLOAT)
        return
    if sparse.storage.quantised:
        yield helper.make_node("Cast", [x], [f"{y}.float"], to=FLOAT)
        yield helper.make_node(QUANTISE_TOKENS.name, [f"{y}.float"], [y], domain="sparsify")
    else:
        yield helper.make_node("Cast", [x], [f"{y}.short"], to=BFLOAT16)
        yield helper.make_node("Cast", [f"{y}.short"], [y], to=FLOAT)


def _in_floats(
    twin: Twin,
    end: End,
    product: onnx.NodeProto,
    weight: str,
    scopes: Sequence[onnx.GraphProto],
    *,
    exact: bool,
) -> Iterator[onnx.NodeProto]:
    """Cast -> MatMul -> Cast (-> Add) for a product of integers; its weight is float32 ``[K, N]``."""
    scaled = _scaling(twin)
    y = scopes[scaled[-1].graph].node[scaled[-1].index].output[0] if scaled else product.output[0]
    kind = DOUBLE if exact else FLOAT
    stem = f"sparsify.{twin.first.graph}.{twin.first.index}"
    yield from _copy(end.x, f"{stem}.x", twin.sparse, exact=exact)
    yield from _after(end.x, weight, f"{stem}.late")
    yield helper.make_node("Cast", [f"{stem}.late"], [f"{stem}.w"], to=kind)
    yield helper.make_node("MatMul", [f"{stem}.x", f"{stem}.w"], [f"{stem}.y"])
    out = y if twin.bias is None else f"{stem}.rounded"
    yield helper.make_node("Cast", [f"{stem}.y"], [out], to=ONNX[twin.sparse.linear.weight.dtype])
    if twin.bias is not None:
        yield helper.make_node("Add", [out, product.input[twin.bias]], [y])


def _on_copies(node: onnx.NodeProto, sparse: Sparse, *, exact: bool) -> Iterator[onnx.NodeProto]:
    """MatMul, Gemm or FusedMatMul on float64 or float32 copies of its inputs."""
    kind = DOUBLE if exact else FLOAT
    place = sparse.linear.place
    stem = f"sparsify.{place.graph}.{place.index}"
    inputs = [f"{stem}.{index}" if name else "" for index, name in enumerate(node.input)]
    yield from _after(node.input[0], node.input[1], f"{stem}.late")
    yield from _copy(node.input[0], inputs[0], sparse, exact=exact)
    for name, copy in zip(node.input[1:], inputs[1:], strict=True):
        if name:
            late = f"{stem}.late" if name == node.input[1] else name
            yield helper.make_node("Cast", [late], [copy], to=kind)
    y = f"{stem}.y"
    if node.op_type == "FusedMatMul":  # ONNX Runtime has it in float only
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if attributes.get("transB"):
            yield helper.make_node("Transpose", [inputs[1]], [f"{stem}.t"], perm=[1, 0])
            inputs[1] = f"{stem}.t"
        alpha = helper.make_tensor("", kind, [], [attributes.get("alpha", 1.0)])
        yield helper.make_node("Constant", [], [f"{stem}.alpha"], value=alpha)
        yield helper.make_node("MatMul", inputs, [f"{stem}.product"])
        yield helper.make_node("Mul", [f"{stem}.product", f"{stem}.alpha"], [y])
    else:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        copy.input[:], copy.output[:] = inputs, [y]
        yield copy
    yield helper.make_node("Cast", [y], [node.output[0]], to=ONNX[sparse.linear.weight.dtype])


def _after(x: str, weight: str, output: str) -> Iterator[onnx.NodeProto]:
    """``weight`` once ``x`` is there: else all float64 copies are made first, and are in memory together."""
    for name, values in (("zero", [0]), ("same", [0, 0])):
        tensor = helper.make_tensor("", onnx.TensorProto.INT64, [len(values)], values)
        yield helper.make_node("Constant", [], [f"{output}.{name}"], value=tensor)
    yield helper.make_node("Shape", [x], [f"{output}.shape"])
    yield helper.make_node("Slice", [f"{output}.shape", f"{output}.zero", f"{output}.zero"], [f"{output}.none"])
    yield helper.make_node("Concat", [f"{output}.none", f"{output}.same"], [f"{output}.dims"], axis=0)
    yield helper.make_node("Reshape", [weight, f"{output}.dims"], [output])
