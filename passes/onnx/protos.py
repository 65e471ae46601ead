"""Graphs and tensors of an ONNX file as they are stored: walked through, sized and read without loading the rest."""

import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import Tensor

from ..errors import InputError

KINDS = frozenset(kind.value for kind in ir.DataType) - {ir.DataType.UNDEFINED.value}
"""The types of ONNX that ``onnx_ir`` can size."""

TORCH: dict[int, torch.dtype] = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.DOUBLE: torch.float64,
}
"""The float types that a linear may compute in."""

ONNX: dict[torch.dtype, int] = {dtype: kind for kind, dtype in TORCH.items()} | {
    torch.uint8: onnx.TensorProto.UINT8,
    torch.int8: onnx.TensorProto.INT8,
    torch.int64: onnx.TensorProto.INT64,
}


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and every subgraph inside it (bodies of If, Loop and Scan), always in the same order."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The bodies that a node holds."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a model stores: initializers, and what nodes hold, in every graph and function."""
    for graph in graphs(proto.graph):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from held(graph.node)
    for function in proto.functions:
        yield from held(function.node)
        for node in function.node:
            for body in subgraphs(node):
                for graph in graphs(body):
                    yield from graph.initializer
                    yield from held(graph.node)


def held(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """The tensors that are attributes of nodes, such as the value of a Constant."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for sparse in (
                *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
                *attribute.sparse_tensors,
            ):
                yield from (sparse.values, sparse.indices)


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the values lie in a file of their own."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def location(tensor: onnx.TensorProto) -> dict[str, str]:
    """Where an external tensor lies: ``location``, ``offset`` and ``length`` as text, those that are given."""
    return {entry.key: entry.value for entry in tensor.external_data}


def data_files(path: Path) -> list[Path]:
    """The files beside an ONNX file that its tensors lie in, whatever holds these: initializers or attributes.

    Raises:
        InputError: the file cannot be read as ONNX; or it names a file outside its folder, a pipe or a device, which
            would be read, or waited for without end.
    """
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0] if str(error) else error!r}") from error
    names: dict[str, None] = {}  # a set that keeps its order
    for tensor in filter(is_external, tensors(proto)):
        names[location(tensor).get("location", "")] = None
    for name in filter(None, names):
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise InputError(f"{path}: its weights lie in {name!r}; want a file beside the model")
    files = [path.parent / name for name in names if name]
    for file in files:
        if file.exists() and not file.is_file():
            raise InputError(f"{path}: {file} is not a regular file")
    return files


def nbytes(tensor: onnx.TensorProto) -> int:
    """Bytes of the values as stored; strings count as nothing.

    Raises:
        InputError: the type is none that ONNX has, or a length is negative.
    """
    if tensor.data_type == onnx.TensorProto.STRING:
        return 0
    if tensor.data_type not in KINDS or any(length < 0 for length in tensor.dims):
        raise InputError(f"{tensor.name!r} has data type {tensor.data_type} and lengths {list(tensor.dims)}: damaged")
    itemsize: float = ir.DataType(tensor.data_type).itemsize  # below 1 for 4 bits
    elements: int = math.prod(tensor.dims)
    return math.ceil(elements * itemsize)


def external(tensor: onnx.TensorProto, file: str, offset: int, length: int) -> onnx.TensorProto:
    """The same tensor with its values elsewhere: ``length`` bytes of ``file`` from ``offset``."""
    moved = onnx.TensorProto(
        name=tensor.name,
        data_type=tensor.data_type,
        dims=tensor.dims,
        doc_string=tensor.doc_string,
        metadata_props=tensor.metadata_props,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        moved.external_data.add(key=key, value=str(value))
    return moved


def opened(tensor: onnx.TensorProto, base: Path) -> ir.TensorProtocol:
    """The tensor with its values within reach: mapped from the file beside ``base``, or as they are in the model.

    The file may be a link, as in the cache of the Hugging Face hub.
    """
    if not is_external(tensor):
        return ir.serde.deserialize_tensor(tensor)
    where = location(tensor)
    file = (base / where["location"]).resolve()
    if file.stat().st_nlink > 1:  # onnx_ir takes a file of two names for an attack; package managers make them
        with file.open("rb") as data:
            data.seek(int(where.get("offset", 0)))
            raw = data.read(nbytes(tensor))
        return ir.serde.deserialize_tensor(onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=raw))
    return ir.ExternalTensor(
        file.name,
        int(where.get("offset", 0)),
        nbytes(tensor),
        ir.DataType(tensor.data_type),
        shape=ir.Shape(tensor.dims),
        name=tensor.name,
        base_dir=file.parent,
    )


def read_float(tensor: onnx.TensorProto, base: Path) -> Tensor:
    """A copy of a float tensor in its own type, of any other tensor in float32; shape as stored."""
    array = opened(tensor, base).numpy()
    if tensor.data_type == onnx.TensorProto.BFLOAT16:  # numpy has no bfloat16, so its bits are passed on
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    if tensor.data_type in TORCH:
        return torch.from_numpy(array.copy())
    return torch.from_numpy(array.astype("float32"))


def remove(field: Any, unwanted: Callable[[Any], bool]) -> None:
    """Delete entries of a repeated field where they are: large tensors are not copied."""
    for index in reversed(range(len(field))):
        if unwanted(field[index]):
            del field[index]
