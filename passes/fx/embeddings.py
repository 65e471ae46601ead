"""Store embedding tables as 8-bit codes with one scale a row, read by standard ops."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from ...calibrate import grid
from ..dialect.storage import Storage
from ..errors import InputError
from .canonical import parameter_names
from .linears import module_path
from .replace import drop_unused, place_beside, replace_node

aten = torch.ops.aten
GRID = Storage("int8").grid
CODES, SCALES = "codes", "scales"
LEAST_SAVED = 1 << 20
"""A table that saves less stays as it is: caches hold it, and four nodes read it slower than one.

Measured on a Zen 4, one thread, of ONNX Runtime's ops alone, 128 and 512 tokens: 512 x 384 takes 22 and 62 us as codes
and 11 and 28 us as floats; 30,522 x 384 takes 28 and 82 us as codes and 30 and 93 us as floats; 30,000 x 2,048 is
quicker as codes as well.
"""
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


def quantise_embeddings(program: ExportedProgram) -> list[Embedding]:
    r"""Rewrite every lookup in a large float table as one in a table of codes, in place.

    .. math:: s_r = \max_j |W_{rj}| / 127 \qquad W_{rj} \approx s_r \lfloor W_{rj} / s_r \rceil

    Before:  y = embedding(W, ids)
    After:   y = mul(to(embedding(codes, ids), float32), embedding(scales, ids))
    Left alone: a table that something else reads as well (the head it is tied with), one that is no
        parameter, and one that would save less than ``LEAST_SAVED`` bytes.
    Numerics: every number moves by half a step of its row at most; the product is rounded once.

    Args:
        program: a canonical program; codes and scales replace the tables in ``state_dict``.

    Returns:
        Every table, in the order of the program.

    Raises:
        InputError: a table holds NaN or infinity.
    """
    names = parameter_names(program)
    found: dict[str, Embedding] = {}
    tables: dict[str, Table] = {}
    for node in list(program.graph_module.graph.nodes):
        if node.op != "call_function" or node.target is not aten.embedding.default:
            continue
        key = names.get(node.args[0].name, "")
        if key not in program.state_dict:
            continue  # a constant of the model's code
        if key not in found:
            entry = _as_it_is(program, node, key)
            if not entry.reason:
                weight = program.state_dict[key].detach()
                try:
                    tables[key] = coded(weight)
                except ValueError as error:
                    raise InputError(f"{entry.path}: {error}") from error
                entry = replace(entry, stored_bytes=tables[key].nbytes, error=_error(weight, tables[key]))
            found[key] = entry
        if key in tables:
            _replace(program, node, key, tables[key])
    drop_unused(program)
    program.graph_module.recompile()
    return list(found.values())


def stored_tables(program: ExportedProgram, embeddings: list[Embedding]) -> Mapping[str, Table]:
    """The tables of a program that ``quantise_embeddings`` has rewritten, by the key of the float table."""
    state = program.state_dict
    return {
        entry.weight: Table(state[f"{entry.weight}.{CODES}"], state[f"{entry.weight}.{SCALES}"])
        for entry in embeddings
        if not entry.reason
    }


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


def _as_it_is(program: ExportedProgram, node: Node, key: str) -> Embedding:
    """A table in float, with the reason if it is to stay so."""
    holder = node.args[0]
    assert isinstance(holder, Node)
    rows, width = program.state_dict[key].shape
    saved = rows * width * 4 - rows * (width + 4)
    reason = ""
    if any(user.target is not aten.embedding.default or user.args[0] is not holder for user in holder.users):
        reason = "it is tied to something that is no lookup, such as the head"
    elif saved < LEAST_SAVED:
        reason = f"8-bit codes would save {max(0, saved)} bytes"
    return Embedding(module_path(node), key, (rows, width), reason, rows * width * 4, rows * width * 4)


def _error(weight: Tensor, table: Table) -> float:
    """The squared error of all rows over their squared norm."""
    wrong = whole = 0.0
    for begin in range(0, len(weight), PIECE):
        rows, codes, scales = (x[begin : begin + PIECE].double() for x in (weight, table.codes, table.scales))
        wrong += float((codes * scales - rows).square().sum())
        whole += float(rows.square().sum())
    return wrong / whole if whole else 0.0


def _replace(program: ExportedProgram, node: Node, key: str, table: Table) -> None:
    """Put the two lookups, the cast and the product in place of a lookup in floats."""
    graph = program.graph_module.graph
    weight, ids = node.args[:2]
    assert isinstance(weight, Node)
    value = node.meta["val"]
    codes = place_beside(program, weight, f"{key}.{CODES}", table.codes)
    scales = place_beside(program, weight, f"{key}.{SCALES}", table.scales)

    def step(op: OpOverload, args: tuple[object, ...], made: Tensor) -> Node:
        new: Node = graph.call_function(op, args)
        new.meta = {**node.meta, "val": made}
        return new

    with graph.inserting_before(node):
        picked = step(aten.embedding.default, (codes, ids), value.to(torch.int8))
        floats = step(aten.to.dtype, (picked, torch.float32), value)
        scale = step(aten.embedding.default, (scales, ids), value[..., :1])
        product = step(aten.mul.Tensor, (floats, scale), value)
    replace_node(program, node, product)
