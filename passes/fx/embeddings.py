"""Store embedding tables as 8-bit codes with one scale a row, read by standard ops."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from ..tables import TIED, Embedding, Table, as_it_is, quantise
from .canonical import parameter_names
from .linears import module_path
from .replace import drop_unused, place_beside, replace_node

aten = torch.ops.aten
CODES, SCALES = "codes", "scales"


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
                entry, tables[key] = quantise(entry, program.state_dict[key].detach())
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


def _as_it_is(program: ExportedProgram, node: Node, key: str) -> Embedding:
    """A table in float, with the reason if it is to stay so."""
    holder = node.args[0]
    assert isinstance(holder, Node)
    rows, width = program.state_dict[key].shape
    tied = any(user.target is not aten.embedding.default or user.args[0] is not holder for user in holder.users)
    return as_it_is(module_path(node), key, (rows, width), TIED if tied else "")


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
