"""Graphs and tensors of an ONNX file as they are stored: walked through, sized and read without loading the rest."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from torch import Tensor

from ..errors import InputError

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
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from graphs(inner)


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
    for graph in graphs(proto.graph):
        inside = (t for node in graph.node for a in node.attribute for t in (a.t, *a.tensors))
        for tensor in filter(is_external, (*graph.initializer, *inside)):
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
    """Bytes of the values as stored; strings count as nothing."""
    if tensor.data_type == onnx.TensorProto.STRING:
        return 0
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
