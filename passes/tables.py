"""Embedding tables as 8-bit codes with one scale a row: which are worth it, and what they hold."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..calibrate import grid
from .dialect.storage import Storage
from .errors import InputError

GRID = Storage("int8").grid
LEAST_SAVED = 1 << 20
"""A table that saves less stays as it is: caches hold it, and four nodes read it slower than one.

Measured on a Zen 4, one thread, of ONNX Runtime's ops alone, 128 and 512 tokens: 512 x 384 takes 22 and 62 us as codes
and 11 and 28 us as floats; 30,522 x 384 takes 28 and 82 us as codes and 30 and 93 us as floats; 30,000 x 2,048 is
quicker as codes as well.
"""
TIED = "it is tied to something that is no lookup, such as the head"
PIECE = 1 << 14
"""How many rows are rounded at a time, so that a large table is in memory once."""


@dataclass(frozen=True)
class Table:
    """A table as it is stored: ``codes`` int8 ``[rows, width]`` and ``scales`` float32 ``[rows, 1]``."""

    codes: Tensor
    scales: Tensor

    @property
    def nbytes(self) -> int:
        """Size of both."""
        return self.codes.nbytes + self.scales.nbytes

    def unpack(self) -> Tensor:
        """The float32 table ``[rows, width]``."""
        return self.codes.float() * self.scales


@dataclass(frozen=True)
class Embedding:
    """What became of one embedding table.

    Attributes:
        path: the module, e.g. ``embeddings.word_embeddings``.
        weight: its key in the state dict.
        shape: ``(rows, width)``.
        reason: why it stays in float; "" where it is stored as codes.
        dense_bytes: in float32.
        stored_bytes: as stored.
        error: squared error of all rows over their squared norm, 0 where it stays.
    """

    path: str
    weight: str
    shape: tuple[int, int]
    reason: str
    dense_bytes: int
    stored_bytes: int
    error: float = 0.0


def as_it_is(path: str, weight: str, shape: tuple[int, int], reason: str) -> Embedding:
    """A table in float, with a reason where it is to stay so: the one given, or that it would save too little."""
    rows, width = shape
    dense = rows * width * 4
    saved = dense - rows * (width + 4)
    if not reason and saved < LEAST_SAVED:
        reason = f"8-bit codes would save {max(0, saved)} bytes"
    return Embedding(path, weight, shape, reason, dense, dense)


def quantise(entry: Embedding, weight: Tensor) -> tuple[Embedding, Table]:
    """The codes of a table, and what they save and cost.

    Raises:
        InputError: it holds NaN or infinity.
    """
    try:
        table = coded(weight)
    except ValueError as error:
        raise InputError(f"{entry.path}: {error}") from error
    return replace(entry, stored_bytes=table.nbytes, error=_error(weight, table)), table


def coded(table: Tensor) -> Table:
    """The codes and scales of a float table ``[rows, width]``; a row of zeros has a scale of 0.

    Raises:
        ValueError: it holds NaN or infinity.
    """
    codes, scales = torch.empty(table.shape, dtype=torch.int8), torch.empty(len(table), 1)
    for begin in range(0, len(table), PIECE):
        rows = table[begin : begin + PIECE].float()
        top = grid.largest(rows, GRID)
        scale = grid.scales(top, torch.ones_like(top), GRID)
        scales[begin : begin + PIECE] = scale
        codes[begin : begin + PIECE] = (rows / torch.where(scale > 0, scale, 1.0)).round().clamp(-127, 127)
    return Table(codes, scales)


def _error(weight: Tensor, table: Table) -> float:
    """The squared error of all rows over their squared norm."""
    wrong = whole = 0.0
    for begin in range(0, len(weight), PIECE):
        rows, codes, scales = (x[begin : begin + PIECE].double() for x in (weight, table.codes, table.scales))
        wrong += float((codes * scales - rows).square().sum())
        whole += float(rows.square().sum())
    return wrong / whole if whole else 0.0
