"""Arrays of ``.npz`` files, which may come from anywhere: checked before room is made for them, never unpickled."""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..files import check_regular

LARGEST_ARRAYS = 16 << 30
"""Bytes of all arrays in a file: more is a mistake, or an archive made to fill the memory."""
READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def load_npz(file: Path) -> dict[str, Tensor]:
    """The arrays of one ``.npz`` file as tensors; floats become float32, integers and bools int64. Never unpickles.

    Raises:
        InputError: the file cannot be read, or an array holds something else than numbers.
    """
    check_regular(file)
    try:
        _check_members(file)
        with file.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    for name, array in loaded.items():
        if array.dtype.kind not in "fiub":
            raise InputError(f"{file}: {name} holds {array.dtype}; want floats, integers or booleans")
    kinds = {name: np.float32 if array.dtype.kind == "f" else np.int64 for name, array in loaded.items()}
    return {name: torch.from_numpy(np.array(array, kinds[name], order="C")) for name, array in loaded.items()}


def _check_members(file: Path) -> None:
    """Refuse arrays that are not what they say, before room is made for them.

    Raises:
        ValueError: a member is no array, or is longer or shorter than its header says; or all of them together are
            larger than ``LARGEST_ARRAYS``. What else numpy and zipfile raise on damaged files may come too.
    """
    with zipfile.ZipFile(file) as members:
        total = sum(member.file_size for member in members.infolist())
        if total > LARGEST_ARRAYS:
            raise ValueError(f"its arrays have {total} bytes; want {LARGEST_ARRAYS} at most")
        for member in members.infolist():
            with members.open(member) as raw:
                version = np.lib.format.read_magic(raw)
                if version not in READERS:
                    raise ValueError(f"{member.filename} has version {version} of the format")
                shape, _, dtype = READERS[version](raw)
                if dtype.hasobject:
                    raise ValueError(f"{member.filename} holds Python objects")
                if raw.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
                    raise ValueError(f"{member.filename} is not as long as {dtype} {list(shape)} takes")
