"""Tensors that were made and are not yet in their final file: kept on disk, so that a model may exceed memory."""

from pathlib import Path

import onnx
import torch
from torch import Tensor

from ..errors import InputError
from .protos import ONNX, external


class Spool:
    """A file that tensors are appended to; each is handed back as an ONNX tensor that points into it."""

    def __init__(self, file: Path, *, near: bool) -> None:
        """Start an empty file.

        Args:
            file: where.
            near: whether the model that will hold the tensors lies in the same folder; otherwise they are found by
                the whole path.
        """
        self.file = file
        self._name = file.name if near else str(file.resolve())
        file.write_bytes(b"")

    def add(self, name: str, tensor: Tensor) -> onnx.TensorProto:
        """Append one tensor of a type in ``ONNX``.

        Raises:
            InputError: the disk is full.
        """
        raw = tensor.detach().contiguous()
        data = raw.reshape(-1).view(torch.uint8).numpy()
        try:
            with self.file.open("ab") as out:
                out.write(b"\0" * (-out.tell() % 64))
                offset = out.tell()
                data.tofile(out)
        except OSError as error:
            raise InputError(f"cannot write {self.file}: {error.strerror or error}") from error
        proto = onnx.TensorProto(name=name, data_type=ONNX[tensor.dtype], dims=list(tensor.shape))
        return external(proto, self._name, offset, data.nbytes)
