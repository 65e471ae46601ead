"""Keep tensors in mapped files, so that they take no memory that the kernel could not take back.

The files have no names: their space is free as soon as nothing reads the tensor any more, however the process ends.
They lie in the folder that TMPDIR names, else in /var/tmp, which is on a disk where /tmp may be memory.
"""

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .errors import InputError

LEAST = 1 << 16
"""Bytes of a tensor that is worth a file."""
PIECE = 1 << 20
"""Bytes that are written at a time: one giant write would be copied whole by a buffered writer."""


def mapped(tensor: Tensor) -> Tensor:
    """The same numbers, contiguous, in a mapped file; a small tensor, or one that is mapped, stays where it is.

    It may be written to: what is changed is memory of the process from then on.

    Raises:
        InputError: the disk is full.
    """
    own = tensor.detach()
    if own.numel() * own.element_size() < LEAST:
        return own.contiguous()
    if is_mapped(own) and own.is_contiguous():
        return own
    folder = _folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _append(cast(BinaryIO, file), own)
            file.flush()
            name = f"/proc/self/fd/{file.fileno()}"  # opens it again, though it has none in any folder
            return torch.from_file(name, shared=False, size=own.numel(), dtype=own.dtype).view(own.shape)
    except OSError as error:
        raise InputError(
            f"weights cannot be kept in {folder}: {error.strerror or error}; TMPDIR names another folder"
        ) from error


def is_mapped(tensor: Tensor) -> bool:
    """Whether torch mapped a tensor's file. What safetensors mapped is not told, and may begin at any byte."""
    return tensor.untyped_storage().is_shared()


def give_back() -> None:
    """Hand memory that was freed to the kernel; glibc's malloc keeps what lay in blocks of less than 32 MiB."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:  # other libraries give it back at once
        trim(0)


@contextmanager
def parameters_mapped() -> Iterator[None]:
    """Inside, what becomes a parameter of a module, of any module, goes into a mapped file."""

    def move(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        if parameter.device.type == "cpu":
            parameter.data = mapped(parameter)

    hook = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        hook.remove()


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's memory."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _append(file: BinaryIO, tensor: Tensor) -> None:
    """Write a tensor's memory; one that is not contiguous is copied some rows at a time."""
    size = tensor[0].numel() * tensor.element_size()
    rows = len(tensor) if tensor.is_contiguous() else max(1, PIECE // size)
    for part in torch.split(tensor, rows):
        raw = as_bytes(part)
        for start in range(0, len(raw), PIECE):
            file.write(raw[start : start + PIECE])


def _folder() -> Path:
    kept = Path("/var/tmp")
    if "TMPDIR" not in os.environ and os.access(kept, os.W_OK):
        return kept
    return Path(tempfile.gettempdir())
