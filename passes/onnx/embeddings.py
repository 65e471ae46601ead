"""Store the embedding tables of an ONNX model as 8-bit codes with one scale a row, read by standard ops."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs  # type: ignore[import-untyped]
from onnx import helper

from ..equivalence import on_grid
from ..errors import VerificationError
from ..tables import TIED, Embedding, as_it_is, quantise
from .protos import read_float, remove
from .replace import unused
from .spool import Spool
from .twin import Stored, beside, read_raw
from .view import STANDARD, Model

FLOAT = onnx.TensorProto.FLOAT


@dataclass(frozen=True)
class Coded:
    """One table of the main graph.

    Attributes:
        entry: what became of it.
        index: which initializer of the given file it is.
        parts: its codes and scales, in the spool of what the result holds; none where it stays.
        dense: the table that these stand for, in the spool of what it is compared with; None where it stays.
    """

    entry: Embedding
    index: int
    parts: tuple[onnx.TensorProto, ...] = ()
    dense: onnx.TensorProto | None = None


def code_embeddings(model: Model, *, packed: Spool, dense: Spool) -> list[Coded]:
    """Every float32 table that the main graph looks rows up in, those as codes that are worth it.

    Left alone: a table that something else reads as well (the head it is tied with), one that the caller may replace,
        and one that would save less than ``LEAST_SAVED`` bytes.

    Raises:
        InputError: a table holds NaN or infinity.
    """
    fixed = {value.name for value in (*model.proto.graph.input, *model.proto.graph.output)}
    tensors = {tensor.name: tensor for tensor in model.views[0].tensors().values()}
    done = []
    for index, proto in enumerate(model.proto.graph.initializer):
        readers = list(tensors[proto.name].outputs) if proto.name in tensors else []
        lookups = [node for node in readers if _looks_up(model, node, proto.name)]
        if proto.data_type != FLOAT or len(proto.dims) != 2 or not lookups:
            continue
        reason = "the caller may replace it" if proto.name in fixed else TIED if len(lookups) < len(readers) else ""
        entry = as_it_is(proto.name, proto.name, (proto.dims[0], proto.dims[1]), reason)
        if entry.reason:
            done.append(Coded(entry, index))
            continue
        entry, table = quantise(entry, read_float(proto, model.folder))
        parts = packed.add(f"{proto.name}.codes", table.codes), packed.add(f"{proto.name}.scales", table.scales)
        done.append(Coded(entry, index, parts, dense.add(proto.name, table.unpack())))
    return done


def replace_embeddings(model: Model, coded: Sequence[Coded]) -> None:
    """Write the codes into the model, which need not be the given one any more.

    Before:  y = Gather(table, ids)
    After:   y = Mul(Cast(Gather(codes, ids)), Gather(scales, ids))
    Left alone: every other node, and the tables that ``code_embeddings`` left.
    Numerics: every number moves by half a step of its row at most; the product is rounded once.

    Args:
        model: changed in place; its view cannot be used afterwards.
        coded: the tables.
    """
    graph, names = model.proto.graph, model.names()
    changed = [table for table in coded if table.parts]
    for table in changed:
        stored = []
        for part in table.parts:
            tensor = graph.initializer.add()
            tensor.CopyFrom(part)
            tensor.name = unused(part.name, names)
            stored.append(tensor.name)
        for index in reversed(range(len(graph.node))):
            node = graph.node[index]
            if node.op_type != "Gather" or node.input[0] != table.entry.weight:
                continue
            made = [unused(f"{node.output[0]}.{part}", names) for part in ("codes", "floats", "scales")]
            new = [
                helper.make_node("Gather", [stored[0], node.input[1]], made[:1], name=node.name),
                helper.make_node("Cast", made[:1], made[1:2], to=FLOAT),
                helper.make_node("Gather", [stored[1], node.input[1]], made[2:]),
                helper.make_node("Mul", made[1:], [node.output[0]]),
            ]
            del graph.node[index]
            for each in reversed(new):
                graph.node.insert(index, each)
    gone = {table.entry.weight for table in changed}
    remove(graph.initializer, lambda tensor: tensor.name in gone)


def rounded_tables(source: Path, coded: Sequence[Coded]) -> dict[Stored, onnx.TensorProto]:
    """What the tables of the given file are exchanged for, where it is compared with the result.

    Raises:
        VerificationError: the codes are not those of the given table to a step of its rows.
    """
    proto = read_raw(source)
    values = {}
    for table in coded:
        if table.dense is not None:
            own = read_float(proto.graph.initializer[table.index], source.parent)
            if not on_grid(read_float(table.dense, source.parent), own, 8):
                raise VerificationError(f"{table.entry.path}: its 8-bit codes are not the table of {source.name}")
            values[Stored(0, table.index, True)] = beside(table.dense)
    return values


def _looks_up(model: Model, node: gs.Node, name: str) -> bool:
    """Whether a node of the main graph takes whole rows of a table."""
    return (
        node.op == "Gather"
        and (node.domain or "") in STANDARD
        and node.inputs[0].name == name
        and node.attrs.get("axis", 0) == 0
        and model.places[id(node)].graph == 0
    )
