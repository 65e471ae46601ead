"""What an ONNX file holds: every linear, the pattern of its weight, its bytes, and why it was left dense.

Weights are read one at a time from the mapped file, so a file larger than memory can be inspected.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs  # type: ignore[import-untyped]
import onnx_ir as ir
import torch
from rich.table import Table
from torch import Tensor

from ..calibrate.patterns import NM, Unstructured, find_pattern
from ..passes.dialect.experts import PREFIX, stored_by
from ..passes.dialect.packed import Packed
from ..passes.errors import InputError, VerificationError
from ..passes.onnx.left_out import LeftOut
from ..passes.onnx.linears import Linear, find_linears
from ..passes.onnx.plugin import from_words
from ..passes.onnx.protos import data_files, opened
from ..passes.onnx.view import Model, read_model
from .session import SPARSE_OPS, model_file

LEFT_DENSE = "left_dense"
"""What the metadata of our files call the reasons of linears that are left dense, by path."""


@dataclass(frozen=True)
class LinearInfo:
    """One linear of a file.

    Attributes:
        path: name of its node; in our files the module path.
        op: one of the dialect's (``linear_nm``, ``linear_bitmask_int4``, ...), or what the file calls it.
        shape: ``(out_features, in_features)``; a batch of matrices has more axes in front.
        pattern: the pattern found in the weight, ``2:4`` or ``50.0% zeros``; None for a dense weight.
        reason: why it was left dense; "" where it was lowered.
        dense_bytes: the weight in float32.
        stored_bytes: the weight as stored, with its indices or mask.
        weight: name of the stored weight; linears that share it share its bytes.
        bits: of a stored value.
    """

    path: str
    op: str
    shape: tuple[int, ...]
    pattern: str | None
    reason: str
    dense_bytes: int
    stored_bytes: int
    weight: str
    bits: int


@dataclass(frozen=True)
class PatternCount:
    """What was counted in the sparse weights of a file.

    Attributes:
        weights: sparse weights.
        groups: their groups along in_features, each with at most n non-zeros.
        full: groups with exactly n non-zeros; the others hold weights that were zero before pruning.
    """

    weights: int
    groups: int
    full: int


def inspect(path: Path) -> list[LinearInfo]:
    """Every linear of an ONNX file, in the file's order: what the compiler reads or leaves, and our sparse ops.

    Raises:
        InputError: the file is missing, damaged, or not ONNX.
    """
    return [info for info, _ in _linears(path, packed=False)]


def sparse_weights(path: Path) -> Iterator[tuple[LinearInfo, Tensor]]:
    """Every weight with a pattern, as ``[out_features, in_features]``: float32 where one of our ops stores it.

    Raises:
        InputError: the file is missing, damaged, or not ONNX.
    """
    for info, weight in weights(path):
        if info.pattern is not None:
            yield info, weight


def weights(path: Path) -> Iterator[tuple[LinearInfo, Tensor]]:
    """As ``sparse_weights``, with the dense ones too; what has more than two axes is left out.

    Raises:
        InputError: the file is missing, damaged, or not ONNX.
    """
    for info, weight in _linears(path, packed=True):
        if weight is not None:
            yield info, weight


def check_pattern(path: Path, nm: NM) -> PatternCount:
    """Count in the file that every sparse weight keeps at most n of every m neighbours along in_features.

    Raises:
        InputError: the file is missing, damaged, or not ONNX.
        VerificationError: a weight has another pattern, or the file has no sparse weight.
    """
    weights = groups = full = 0
    for info, weight in sparse_weights(path):
        if weight.shape[1] % nm.m:
            raise VerificationError(f"{info.path} has {weight.shape[1]} in_features, no multiple of {nm.m}")
        nonzero = (weight != 0).view(torch.uint8)
        counts = nonzero[:, :: nm.m].clone()
        for place in range(1, nm.m):  # m strided adds: a sum over an axis of length m is many times slower
            counts += nonzero[:, place :: nm.m]
        if (most := int(counts.max())) > nm.n:
            raise VerificationError(f"{info.path} is not {nm}: a group of {nm.m} holds {most} non-zeros")
        weights, groups, full = weights + 1, groups + counts.numel(), full + int((counts == nm.n).sum())
    if weights == 0:
        raise VerificationError(f"{path} has no sparse weight")
    return PatternCount(weights, groups, full)


def render(linears: list[LinearInfo]) -> Table:
    """The table that the command line shows."""
    table = Table("linear", "op", "shape", "pattern", "dense", "stored", "left dense because")
    table.columns[0].overflow = "fold"  # a path cut short names no layer ...
    table.columns[1].min_width = max((len(x.op) for x in linears), default=0)  # ... nor does an op
    for x in linears:
        shape = " x ".join(map(str, x.shape))
        table.add_row(x.path, x.op, shape, x.pattern or "-", _kib(x.dense_bytes), _kib(x.stored_bytes), x.reason)
    once = {x.weight: x for x in linears}.values()
    lowered = sum(not x.reason for x in linears)
    dense, stored = sum(x.dense_bytes for x in once), sum(x.stored_bytes for x in once)
    table.add_section()
    table.add_row(f"{lowered} of {len(linears)} lowered", "", "", "", _kib(dense), _kib(stored), "")
    return table


def _linears(path: Path, *, packed: bool) -> Iterator[tuple[LinearInfo, Tensor | None]]:
    """Every linear; its weight too where it was read (``packed``: unpack those of sparse ops as well)."""
    file = model_file(path)
    data_files(file)  # refuses what would be waited for, or lies elsewhere
    model = read_model(file)
    found, left = find_linears(model)
    lowerable = {linear.place: linear for linear in found}
    others: dict[str, list[LeftOut]] = {}
    for entry in left:
        others.setdefault(entry.path, []).append(entry)
    told = _told(model)
    for node in model.nodes():
        if node.domain == "sparsify" and node.op in SPARSE_OPS:
            yield _sparse(model, node, packed)
        elif (linear := lowerable.get(model.places[id(node)])) is not None:
            yield _dense(linear, told)
        elif entries := others.get(str(node.name or node.outputs[0].name), []):
            yield _left(entries.pop(0))
    for entries in others.values():  # those inside functions
        yield from (_left(entry) for entry in entries if entry.op not in SPARSE_OPS)


def _told(model: Model) -> dict[str, str]:
    """What the file says of linears that were left dense when it was made; nothing in files of other tools."""
    found = [entry.value for entry in model.proto.metadata_props if entry.key == f"sparsify.{LEFT_DENSE}"]
    try:
        told = json.loads(found[0]) if found else {}
    except (ValueError, RecursionError):
        return {}
    return {path: why for path, why in told.items() if isinstance(why, str)} if isinstance(told, dict) else {}


def _reason(path: str, weight: Tensor, told: Mapping[str, str]) -> str:
    """Why a weight without a pattern is dense; where linears became one product with several reasons, all of them."""
    if not bool(weight.any()):
        return "the weight is zero everywhere"
    reasons = {part: told.get(part, "the weight is dense") for part in parts_of(path)}
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{part}: {why}" for part, why in reasons.items())


def parts_of(path: str) -> list[str]:
    """The linears that a product was made of: ``a.q+k`` are ``a.q`` and ``a.k``; others are written out."""
    first, *others = path.partition("#")[0].split("+")  # a number tells apart what a module does more than once
    within = first.rpartition(".")[0]
    return [first, *(part if "." in part or not within else f"{within}.{part}" for part in others)]


def _dense(linear: Linear, told: Mapping[str, str]) -> tuple[LinearInfo, Tensor]:
    """A product that the compiler reads."""
    weight = linear.weight.read()
    pattern = find_pattern(weight)
    return LinearInfo(
        linear.path,
        linear.op,
        linear.weight.shape,
        _text(pattern),
        _reason(linear.path, weight, told) if pattern is None else f"the file uses a plain {linear.op}",
        4 * weight.numel(),
        linear.weight.stored_bytes,
        linear.weight.name,
        linear.weight.bits,
    ), weight


def _left(entry: LeftOut) -> tuple[LinearInfo, Tensor | None]:
    """A product that the compiler leaves, and why."""
    weight = entry.read()
    pattern = None if weight is None else find_pattern(weight)
    numbers = math.prod(entry.dims or entry.shape)
    return LinearInfo(
        entry.path,
        entry.op,
        entry.dims or entry.shape,
        _text(pattern),
        entry.reason,
        4 * numbers,
        entry.stored_bytes,
        entry.weight or entry.path,
        round(8 * entry.stored_bytes / numbers) if numbers else 0,
    ), weight


def _from_plugin(tensors: dict[str, ir.TensorProtocol], attributes: Mapping[str, int]) -> None:
    """The bytes of a mask or of indices where a file for TensorRT's plugins holds them in words."""
    name = "mask" if "mask" in tensors else "indices"
    words = tensors[name].numpy()
    if words.dtype != np.int32:
        return
    if name == "mask":
        rows, columns = tensors["row_start"].shape.numpy()[0] - 1, attributes["in_features"]
    else:
        rows, columns = tensors["values"].shape.numpy()[0], 2 * tensors["values"].shape.numpy()[1]
    tensors[name] = ir.Tensor(from_words(words, rows, columns))


def _sparse(model: Model, node: gs.Node, packed: bool) -> tuple[LinearInfo, Tensor | None]:
    """One of our ops, from its packed tensors."""
    names, first = stored_by(node.op)
    inputs = dict(zip(names, node.inputs[first : first + len(names)], strict=False))
    protos = {name: model.constants[value.name] for name, value in inputs.items() if value.name in model.constants}
    if len(protos) != len(names):
        raise InputError(f"{node.name}: the weight of a sparse op must be stored in the file")
    tensors = {name: opened(proto, model.folder) for name, proto in protos.items()}
    attributes = {name: value for name, value in node.attrs.items() if isinstance(value, int)}
    try:
        values = tensors["values"].numpy()  # mapped, not read
        _from_plugin(tensors, attributes)
        pattern: NM | Unstructured
        if "mask" in tensors:
            rows, columns = tensors["row_start"].shape.numpy()[0] - 1, attributes["in_features"]
            kept = int(np.bitwise_count(tensors["mask"].numpy()).sum())
            pattern = Unstructured(1 - kept / (rows * columns))
        else:
            pattern = NM(attributes["n"], attributes["m"])
            rows, columns = values.shape[0], attributes.get("in_features", values.shape[1] * pattern.m // pattern.n)
        weight = None
        if packed:
            stored = {name: _torch(tensor) for name, tensor in tensors.items()}
            weight = Packed(node.op.removeprefix(PREFIX), stored, attributes).unpack()
    except (ValueError, KeyError, IndexError, ZeroDivisionError, TypeError, OverflowError) as error:
        raise InputError(f"{node.name}: {error or type(error).__name__}; the file is damaged") from error
    size = sum(tensor.nbytes for tensor in tensors.values())
    info = LinearInfo(
        node.name or "?",
        node.op,
        (rows, columns),
        _text(pattern),
        "",
        4 * rows * columns,
        size,
        inputs["values"].name,
        int(tensors["values"].dtype.bitwidth),
    )
    return info, weight


def _torch(tensor: ir.TensorProtocol) -> Tensor:
    """A copy of a stored tensor; numpy has no bfloat16 of its own, so its bits are passed on."""
    array = tensor.numpy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def _text(pattern: NM | Unstructured | None) -> str | None:
    if isinstance(pattern, Unstructured):
        return f"{pattern.sparsity:.1%} zeros"
    return None if pattern is None else str(pattern)


def _kib(size: int) -> str:
    return f"{size / 1024:,.0f} KiB"
