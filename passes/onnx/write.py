"""Write an ONNX model with its weights beside it, every tensor aligned, one tensor in memory at a time."""

import os
from pathlib import Path

import onnx
import onnx_ir as ir
import psutil

from ..errors import InputError

ALIGNMENT = 64  # a cache line, and the widest vector register; ONNX Runtime maps the file as it is
INLINE = 1024  # smaller tensors stay in the model file, where shape inference can read them


def write_model(model: ir.Model, path: Path, functions: list[onnx.FunctionProto]) -> None:
    """Write ``path`` and ``path.data``, or neither.

    Both are written beside their final names and renamed when they are whole and the checker accepts them.

    Args:
        model: the model; its weights may be lazy, each is asked for once. They are pointed at the file afterwards.
        path: the ``.onnx`` file; what is there is replaced.
        functions: bodies of the sparse ops, for runtimes without our library.

    Raises:
        InputError: the folder cannot be written, or its disk is full.
        onnx.checker.ValidationError: the model is not valid ONNX, which is our mistake.
    """
    data = path.with_name(path.name + ".data")
    beside = [path.with_name(f".{path.name}.partial"), data.with_name(f".{data.name}.partial")]
    try:
        _check_space(model, path)
        _write_data(model, beside[1], data.name)
        proto = ir.to_proto(model)
        proto.functions.extend(functions)
        beside[0].write_bytes(proto.SerializeToString())
        beside[1].replace(data)
        _check(proto, beside[0])
        beside[0].replace(path)
    except OSError as error:
        data.unlink(missing_ok=True)
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    except BaseException:
        data.unlink(missing_ok=True)
        raise
    finally:
        for file in beside:
            file.unlink(missing_ok=True)


def _check(proto: onnx.ModelProto, file: Path) -> None:
    # By path, so that the external data is looked at too and 2 GB is no limit.
    onnx.checker.check_model(str(file), full_check=False)


def _check_space(model: ir.Model, path: Path) -> None:
    """Refuse before writing what cannot fit; a disk that fills up meanwhile still ends in an OSError."""
    need = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    free = psutil.disk_usage(str(path.parent)).free
    if need > free:
        raise InputError(f"cannot write {path}: it takes {need} bytes and the disk has {free} left")


def _write_data(model: ir.Model, file: Path, location: str) -> None:
    with file.open("wb") as out:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < INLINE:
                continue
            out.write(b"\0" * (-out.tell() % ALIGNMENT))
            offset = out.tell()
            # 1 MiB at a time: one giant write would be copied whole by the buffered writer.
            raw = memoryview(tensor.tobytes())
            for start in range(0, len(raw), 1 << 20):
                out.write(raw[start : start + (1 << 20)])
            value.const_value = ir.ExternalTensor(
                location, offset, len(raw), tensor.dtype, shape=tensor.shape, name=value.name or "", base_dir=file.parent
            )
        out.flush()
        os.fsync(out.fileno())
