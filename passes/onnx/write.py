"""Write an ONNX model with its weights beside it, every tensor aligned, one tensor in memory at a time."""

import os
import shutil
from pathlib import Path

import onnx
import onnx_ir as ir
import psutil  # type: ignore[import-untyped]

from ..errors import InputError

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
    data = path.with_name(path.name + ".data")
    stage = path.with_name(f".{path.name}.partial")
    try:
        _check_space(model, path)
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        _write_data(model, stage / data.name, base=path.parent)
        proto = ir.to_proto(model)
        proto.functions.extend(functions)
        (stage / path.name).write_bytes(proto.SerializeToString())
        # By path, so that the external data is looked at too and 2 GB is no limit.
        onnx.checker.check_model(str(stage / path.name), full_check=False)
        (stage / data.name).replace(data)
        (stage / path.name).replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_space(model: ir.Model, path: Path) -> None:
    """Refuse before writing what cannot fit; a disk that fills up meanwhile still ends in an OSError."""
    need = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
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
            out.write(b"\0" * (-out.tell() % ALIGNMENT))
            offset = out.tell()
            # 1 MiB at a time: one giant write would be copied whole by the buffered writer.
            raw = memoryview(tensor.tobytes())
            for start in range(0, len(raw), 1 << 20):
                out.write(raw[start : start + (1 << 20)])
            value.const_value = ir.ExternalTensor(
                file.name,
                offset,
                len(raw),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=base,
            )
        out.flush()
        os.fsync(out.fileno())
