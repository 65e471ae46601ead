"""Write an ONNX model with its weights beside it, every tensor aligned, one tensor in memory at a time."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
import psutil  # type: ignore[import-untyped]
import torch

from ..errors import InputError
from ..mapped import as_bytes
from .checksums import add_checksums
from .protos import external, graphs, is_external, nbytes, opened, tensors

ALIGNMENT = 64  # a cache line, and the widest vector register; ONNX Runtime maps the file as it is
INLINE = 1024  # smaller tensors stay in the model file, where shape inference can read them
DIGITS = 12
"""Of the hash in the name of a data file: 48 bits, and the files to tell apart are those written to one name."""


def write_model(model: ir.Model, path: Path, functions: list[onnx.FunctionProto]) -> None:
    """Write ``path`` and, beside it, its weights in ``path.HASH.data``; or neither.

    The data file is named by what it holds, so that it never takes the place of another one: until the model file is
    renamed, which is the last step, an older model reads the older weights, and from then on the new one reads its
    own. Where no tensor is large there is no data file. An older data file stays: whoever replaces a model knows
    whether it may go.

    Args:
        model: the model; its weights may be lazy, each is asked for once. They are pointed at the file afterwards.
        path: the ``.onnx`` file; what is there is replaced.
        functions: bodies of the sparse ops, for runtimes without our library.

    Raises:
        InputError: the folder cannot be written, or its disk is full.
        onnx.checker.ValidationError: the model is not valid ONNX, which is our mistake.
    """
    values = [v for v in model.graph.initializers.values() if v.const_value is not None]

    def write(data: Data) -> onnx.ModelProto:
        places = []
        for value in values:
            tensor = value.const_value
            assert tensor is not None
            if tensor.nbytes >= INLINE:
                places.append((value, tensor.dtype, tensor.shape.numpy(), *data.append(tensor)))
        data.close()
        for value, dtype, shape, offset, length in places:
            value.const_value = ir.ExternalTensor(
                data.name, offset, length, dtype, shape=ir.Shape(shape), name=value.name or "", base_dir=path.parent
            )
        proto = ir.to_proto(model)
        proto.functions.extend(functions)
        return proto

    _publish(path, (v.const_value.nbytes for v in values if v.const_value is not None), write, check=True)


def write_proto(proto: onnx.ModelProto, path: Path, *, base: Path, check: bool) -> None:
    """Write a model that another tool made, as ``path`` and its data file or neither; see ``write_model``.

    Whatever the model holds besides its weights is written as it is. Initializers of the main graph and of subgraphs,
    and tensors inside nodes that lay in a file of their own, go into the data file; they are read one at a time, so
    the model may be larger than 2 GB and than memory.

    Args:
        proto: the model; its tensors are pointed at the file.
        path: the ``.onnx`` file; what is there is replaced.
        base: the folder that external data of ``proto`` is relative to.
        check: run ONNX's checker over the result. Some models that ONNX Runtime runs never pass it.

    Raises:
        InputError: the folder cannot be written, or its disk is full.
        onnx.checker.ValidationError: the result is not valid ONNX, which is our mistake.
    """
    stored = [tensor for graph in graphs(proto.graph) for tensor in graph.initializer]
    ours = {id(tensor) for tensor in stored}
    stored += [tensor for tensor in tensors(proto) if id(tensor) not in ours and is_external(tensor)]

    def write(data: Data) -> onnx.ModelProto:
        places = []
        for tensor in stored:
            if tensor.data_type == onnx.TensorProto.STRING:
                continue  # the format allows strings in the model file only
            if nbytes(tensor) >= INLINE:
                places.append((tensor, *data.append(opened(tensor, base))))
            elif is_external(tensor):
                tensor.CopyFrom(_inline(tensor, base))
        data.close()
        for tensor, offset, length in places:
            tensor.CopyFrom(external(tensor, data.name, offset, length))
        return proto

    _publish(path, (nbytes(tensor) for tensor in stored), write, check=check)


class Data:
    """A data file while it is written: tensors one behind the other, and a hash over all of it."""

    def __init__(self, file: BinaryIO, path: Path, model: str) -> None:
        """Begin with the empty ``file`` at ``path``, which belongs to the model file called ``model``."""
        self._file, self._path, self._model = file, path, model
        self._hash = hashlib.blake2b()
        self.name = ""
        """What it is called once it is closed; "" where nothing was written."""

    def append(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        """Add one tensor at the next aligned place; returns its offset and length."""
        self._write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        # 1 MiB at a time: one giant write would be copied whole by the buffered writer.
        held = getattr(tensor, "raw", None)  # of a tensor of torch, whose bytes would be a copy
        raw = as_bytes(held) if isinstance(held, torch.Tensor) else memoryview(tensor.tobytes())
        for start in range(0, len(raw), 1 << 20):
            self._write(raw[start : start + (1 << 20)])
        return offset, len(raw)

    def _write(self, raw: bytes | memoryview) -> None:
        self._file.write(raw)
        self._hash.update(raw)

    def close(self) -> None:
        """Flush it to the disk and name it."""
        size = self._file.tell()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        if size:
            self.name = f"{self._model}.{self._hash.hexdigest()[:DIGITS]}.data"
            self._path.rename(self._path.with_name(self.name))


def _publish(path: Path, sizes: Iterable[int], write: Callable[[Data], onnx.ModelProto], *, check: bool) -> None:
    """Let ``write`` fill a data file, then move it and after it the model that was returned into place."""
    stage = None
    try:
        _check_space(sum(sizes), path)
        stage = Path(tempfile.mkdtemp(prefix=f".{path.name[:80]}.", suffix=".partial", dir=path.parent))
        with (stage / "data").open("wb") as file:
            data = Data(file, stage / "data", path.name)
            proto = write(data)
        # A given file's damaged ops were refused when it was opened: what cannot be read back here we wrote wrong.
        add_checksums(proto, stage)
        with (stage / path.name).open("wb") as out:
            out.write(proto.SerializeToString())
            out.flush()
            os.fsync(out.fileno())
        if check:  # by path, so that the external data is looked at too and 2 GB is no limit
            onnx.checker.check_model(str(stage / path.name), full_check=False)
        if data.name:
            (stage / data.name).replace(path.with_name(data.name))
        (stage / path.name).replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)


def _check_space(need: int, path: Path) -> None:
    """Refuse before writing what cannot fit; a disk that fills up meanwhile still ends in an OSError."""
    free = psutil.disk_usage(str(path.parent)).free
    if need > free:
        raise InputError(f"cannot write {path}: it takes {need} bytes and the disk has {free} left")


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
