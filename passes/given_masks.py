"""Keep masks that came from somewhere else, such as learned ones: read, checked and matched with the weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..calibrate.patterns import NM, Pattern, Unstructured
from .errors import InputError
from .files import check_regular
from .fx.linears import Linear


@dataclass(frozen=True)
class GivenMasks:
    """The masks of one file.

    Attributes:
        file: where they were read.
        keep: bool ``[out_features, in_features]`` by module path; True survives.
    """

    file: Path
    keep: Mapping[str, Tensor]

    @property
    def pattern(self) -> Unstructured:
        """The fraction of zeros over all masks."""
        kept = sum(int(mask.sum()) for mask in self.keep.values())
        return Unstructured(1 - kept / sum(mask.numel() for mask in self.keep.values()))


def read_masks(file: Path) -> GivenMasks:
    """Read a ``.safetensors`` file of bool or uint8 (0 and 1) masks, named by module path with or without ``.weight``.

    Raises:
        InputError: the file cannot be read, holds something else, or its masks keep everything or nothing of a weight.
    """
    check_regular(file)
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {file}: {error}") from error
    keep: dict[str, Tensor] = {}
    for name, mask in stored.items():
        path = name.removesuffix(".weight")
        if mask.dtype not in (torch.bool, torch.uint8) or (mask.numel() and int(mask.view(torch.uint8).max()) > 1):
            kind = str(mask.dtype).removeprefix("torch.")
            raise InputError(f"{file}: {name} holds {kind}; want bool, or uint8 0 and 1")
        if mask.numel() and not bool(mask.any()):
            raise InputError(f"{file}: {name} keeps nothing; want at least one weight")
        if path in keep:
            raise InputError(f"{file} has two masks for {path}")
        keep[path] = mask.bool()
    if not keep or all(bool(mask.all()) for mask in keep.values()):
        raise InputError(f"{file} holds no mask that prunes anything")
    return GivenMasks(file, keep)


def masks_by_weight(given: GivenMasks, linears: Sequence[Linear], pattern: Pattern) -> dict[str, Tensor]:
    """The masks by the key of the weight they belong to; linears without a mask have none here.

    Raises:
        InputError: a mask names no linear, has another shape than its weight, or does not fit an N:M ``pattern``.
    """
    by_path = {linear.path: linear for linear in linears}
    found = {}
    for path, keep in given.keep.items():
        if path not in by_path:
            raise InputError(f"{given.file}: {path} is none of the {len(linears)} linears, e.g. {linears[0].path}")
        linear = by_path[path]
        shape = (linear.out_features, linear.in_features)
        if keep.shape != shape:
            raise InputError(f"{given.file}: {path} has shape {list(keep.shape)}, its weight {list(shape)} (out, in)")
        if isinstance(pattern, NM):
            _check(f"{given.file}: {path}", keep, pattern)
        found[linear.weight] = keep
    return found


def _check(name: str, keep: Tensor, nm: NM) -> None:
    if keep.shape[1] % nm.m:
        raise InputError(f"{name} is not {nm}: its {keep.shape[1]} in_features are no multiple of {nm.m}")
    counts = keep.reshape(len(keep), -1, nm.m).sum(dim=2)
    if bool((wrong := counts > nm.n).any()):
        row, group = (int(x) for x in wrong.nonzero()[0])
        columns = f"columns {group * nm.m} to {group * nm.m + nm.m - 1}"
        raise InputError(f"{name} is not {nm}: it keeps {int(counts[row, group])} in row {row}, {columns}")
