"""Which op stores a weight, and the weight as that op stores it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import _native
from ...calibrate.patterns import NM, Pattern
from . import (
    linear_bitmask,
    linear_bitmask_int4,
    linear_bitmask_int8,
    linear_codes,
    linear_nm,
    linear_nm_int4,
    linear_nm_int8,
)
from .storage import Storage, tensor

OPS = {
    op.NAME: op
    for op in (
        linear_nm, linear_nm_int8, linear_nm_int4, linear_bitmask, linear_bitmask_int8, linear_bitmask_int4
    )
}  # fmt: skip
"""The sparse ops of the dialect by name."""

TENSORS = {name: tuple(i.name for i in op.SCHEMA.inputs if i.name not in ("x", "bias")) for name, op in OPS.items()}
"""What each op stores, in the order of its inputs."""
TENSORS[linear_codes.NAME] = linear_codes.TENSORS


@dataclass(frozen=True)
class Packed:
    """A weight as an op stores it.

    Attributes:
        op: name of the op.
        tensors: by input name, in the order of the inputs.
        attributes: of the node, in the order of the op's arguments.
    """

    op: str
    tensors: Mapping[str, Tensor]
    attributes: Mapping[str, int]

    @property
    def nbytes(self) -> int:
        """Size of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def unpack(self) -> Tensor:
        """The dense weight ``[out_features, in_features]`` float32.

        Raises:
            ValueError: the tensors do not fit each other; see the op's file.
        """
        t, a = self.tensors, self.attributes
        if self.op == linear_codes.NAME:
            return linear_codes.unpack(t["codes"], t["scales"], a["bits"], a["in_features"])
        scales, group = t.get("scales"), a.get("group", 0)
        if "mask" in t:
            dense = _native.unpack_bitmask(
                t["values"], t["mask"], t["row_start"], a["in_features"], scales=scales, group=group
            )
        else:
            dense = _native.unpack_nm(
                t["values"], t["indices"], a["n"], a["m"],
                scales=scales, group=group, in_features=a.get("in_features", 0),
            )  # fmt: skip
        return tensor(dense)


@dataclass(frozen=True)
class OnGrid:
    """What packing has to know of a weight that was put on the grid of its storage before.

    Attributes:
        pattern: of its mask, which keeps weights whose code became 0; None where nothing was pruned.
        scales: as the op stores them.
    """

    pattern: Pattern | None
    scales: Tensor


def pack(weight: Tensor, pattern: Pattern | None, storage: Storage, scales: Tensor | None = None) -> Packed:
    """Store a weight ``[out_features, in_features]``; quantised storage takes ``scales`` or finds its own.

    Without a pattern it is dense, and its storage ``blocked``.

    Raises:
        ValueError: it does not have the pattern, or does not fit the storage; see the op's file.
    """
    if pattern is None:
        codes = linear_codes.pack(weight, storage, scales)
        own = {
            "bits": linear_codes.BITS[storage.kind],
            "block": storage.block_of(weight.shape[1]),
            "in_features": weight.shape[1],
        }
        return Packed(linear_codes.NAME, dict(zip(linear_codes.TENSORS, codes, strict=True)), own)
    name = op_name(pattern, storage)
    every = {"in_features": weight.shape[1], "group": storage.group}
    tensors: tuple[Tensor, ...]
    if isinstance(pattern, NM):
        every |= {"n": pattern.n, "m": pattern.m}
        if storage.kind == "int8":
            tensors = linear_nm_int8.pack(weight, pattern, scales)
        elif storage.kind == "int4":
            tensors = linear_nm_int4.pack(weight, pattern, storage.group, scales)
        else:
            tensors = linear_nm.pack(weight, pattern, storage.dtype)
    elif storage.kind == "int8":
        tensors = linear_bitmask_int8.pack(weight, scales)
    elif storage.kind == "int4":
        tensors = linear_bitmask_int4.pack(weight, storage.group, scales)
    else:
        tensors = linear_bitmask.pack(weight, storage.dtype)
    order = [a for a in ("n", "m", "group", "in_features") if a in OPS[name].SCHEMA.attributes]
    return Packed(name, dict(zip(TENSORS[name], tensors, strict=True)), {key: every[key] for key in order})


def stack(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Join the tensors of several weights of one op, with the same attributes and in_features, row below row.

    Every layout of the dialect is a sequence of rows, and only ``row_start`` says where in another tensor a row lies.
    """
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if name != "row_start"}
    if "row_start" in parts[0]:
        ends = torch.tensor([0, *(int(part["row_start"][-1]) for part in parts)]).cumsum(0)
        shifted = [part["row_start"][1:] + end for part, end in zip(parts, ends[:-1], strict=True)]
        joined["row_start"] = torch.cat([ends[:1], *shifted])
    return {name: joined[name] for name in parts[0]}


def op_name(pattern: Pattern, storage: Storage) -> str:
    """Name of the op that stores this pattern so."""
    family = linear_nm.NAME if isinstance(pattern, NM) else linear_bitmask.NAME
    return f"{family}_{storage.kind}" if storage.quantised else family


def packed_bytes(out_features: int, in_features: int, nonzeros: int, pattern: Pattern, storage: Storage) -> int:
    """Size that a weight with so many non-zeros takes when stored (``linear_bitmask_int4``: at most)."""
    if isinstance(pattern, NM):
        if storage.kind == "int8":
            return linear_nm_int8.packed_bytes(out_features, in_features, pattern)
        if storage.kind == "int4":
            return linear_nm_int4.packed_bytes(out_features, in_features, pattern, storage.group)
        return linear_nm.packed_bytes(out_features, in_features, pattern, storage.dtype)
    if storage.kind == "int8":
        return linear_bitmask_int8.packed_bytes(out_features, in_features, nonzeros)
    if storage.kind == "int4":
        return linear_bitmask_int4.packed_bytes(out_features, in_features, nonzeros, storage.group)
    return linear_bitmask.packed_bytes(out_features, in_features, nonzeros, storage.dtype)
