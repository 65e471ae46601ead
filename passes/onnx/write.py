"""Write an ONNX model with its weights beside it, every tensor aligned, one tensor in memory at a time."""

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
import psutil  # type: ignore[import-untyped]

from ..errors import InputError
from .protos import external, graphs, is_external, nbytes, opened

ALIGNMENT = 64  # a cache line, and the widest vector register; ONNX Runtime maps the file as it is
INLINE = 1024  # smaller tensors stay in the model file, where shape inference can read them


def write_model(model: ir.Model, path: Path, functions: list[onnx.FunctionProto]) -> None:
    """Write ``path`` and ``path.data``, or neither.

    Both are written into a folder beside them and moved when they are whole and the checker accepts them; until then
    what was there before stays as it was.

    Args:
        model: the model; its weights may be lazy, each is asked for once. They are pointed at the file afterwards.
        path: the ``.onnx`` file; what is there is replaced.
        functions: bodies of the sparse ops, for runtimes without our library.

    Raises:
        InputError: the folder cannot be written, or its disk is full.
        onnx.checker.ValidationError: the model is not valid ONNX, which is our mistake.
    """

    def write(data: Path) -> onnx.ModelProto:
        _write_data(model, data, base=path.parent)
        proto = ir.to_proto(model)
        proto.functions.extend(functions)
        return proto

    sizes = (v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    _publish(path, sizes, write, check=True)


def write_proto(proto: onnx.ModelProto, path: Path, *, base: Path, check: bool) -> None:
    """Write a model that another tool made, as ``path`` and ``path.data`` or neither; see ``write_model``.

    Whatever the model holds besides its initializers is written as it is. Initializers of the main graph and of
    subgraphs go into the data file; they are read one at a time, so the model may be larger than 2 GB and than memory.

    Args:
        proto: the model; its initializers are pointed at the file.
        path: the ``.onnx`` file; what is there is replaced.
        base: the folder that external data of ``proto`` is relative to.
        check: run ONNX's checker over the result. Some models that ONNX Runtime runs never pass it.

    Raises:
        InputError: the folder cannot be written, or its disk is full.
        onnx.checker.ValidationError: the result is not valid ONNX, which is our mistake.
    """
    tensors = [tensor for graph in graphs(proto.graph) for tensor in graph.initializer]

    def write(data: Path) -> onnx.ModelProto:
        with data.open("wb") as out:
            for tensor in tensors:
                if tensor.data_type == onnx.TensorProto.STRING:
                    continue  # the format allows strings in the model file only
                if nbytes(tensor) >= INLINE:
                    offset, length = _append(out, opened(tensor, base))
                    tensor.CopyFrom(external(tensor, data.name, offset, length))
                elif is_external(tensor):
                    tensor.CopyFrom(_inline(tensor, base))
            _flush(out)
        return proto

    _publish(path, (nbytes(tensor) for tensor in tensors), write, check=check)


def _publish(path: Path, sizes: Iterable[int], write: Callable[[Path], onnx.ModelProto], *, check: bool) -> None:
    """Run ``write`` on the name of the data file, then move the data and the model it returned into place."""
    data = path.with_name(path.name + ".data")
    stage = path.with_name(f".{path.name}.partial")
    try:
        _check_space(sum(sizes), path)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        proto = write(stage / data.name)
        (stage / path.name).write_bytes(proto.SerializeToString())
        if check:  # by path, so that the external data is looked at too and 2 GB is no limit
            onnx.checker.check_model(str(stage / path.name), full_check=False)
        (stage / data.name).replace(data)
        (stage / path.name).replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_space(need: int, path: Path) -> None:
    """Refuse before writing what cannot fit; a disk that fills up meanwhile still ends in an OSError."""
    free = psutil.disk_usage(str(path.parent)).free
    if need > free:
        raise InputError(f"cannot write {path}: it takes {need} bytes and the disk has {free} left")


def _write_data(model: ir.Model, file: Path, *, base: Path) -> None:
    """Write the large tensors and point the model at them, as if ``file`` lay in ``base`` already."""
    with file.open("wb") as out:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < INLINE:
                continue
            offset, length = _append(out, tensor)
            value.const_value = ir.ExternalTensor(
                file.name,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=base,
            )
        _flush(out)


def _append(out: BinaryIO, tensor: ir.TensorProtocol) -> tuple[int, int]:
    """Add one tensor at the next aligned place; returns its offset and length."""
    out.write(b"\0" * (-out.tell() % ALIGNMENT))
    offset = out.tell()
    # 1 MiB at a time: one giant write would be copied whole by the buffered writer.
    raw = memoryview(tensor.tobytes())
    for start in range(0, len(raw), 1 << 20):
        out.write(raw[start : start + (1 << 20)])
    return offset, len(raw)


def _inline(tensor: onnx.TensorProto, base: Path) -> onnx.TensorProto:
    raw = opened(tensor, base).tobytes()
    return onnx.TensorProto(
        name=tensor.name,
        data_type=tensor.data_type,
        dims=tensor.dims,
        raw_data=raw,
        doc_string=tensor.doc_string,
        metadata_props=tensor.metadata_props,
    )


def _flush(out: BinaryIO) -> None:
    out.flush()
    os.fsync(out.fileno())
