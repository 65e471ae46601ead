"""What an ONNX file holds: every linear, the pattern of its weight, its bytes, and why it was left dense.

Weights are read one at a time from the mapped file, so a file larger than memory can be inspected.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from rich.table import Table
from torch import Tensor

from ..calibrate.patterns import NM, Unstructured, find_pattern
from ..passes.dialect.packed import TENSORS, Packed
from ..passes.errors import InputError, VerificationError
from ..passes.onnx.plugin import from_words
from ..passes.onnx.protos import data_files
from ..passes.onnx.quantised import dequantise
from .session import SPARSE_OPS, model_file


@dataclass(frozen=True)
class LinearInfo:
    """One linear of a file.

    Attributes:
        path: name of its node; in our files the module path.
        op: one of the dialect's (``linear_nm``, ``linear_bitmask_int4``, ...), ``MatMul`` or ``Gemm``.
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
    """Every linear of an ONNX file, in the file's order: MatMul and Gemm with a constant weight, and our sparse ops.

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
    try:
        model = ir.load(file)
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            if node.domain == "sparsify" and node.op_type in SPARSE_OPS:
                yield _sparse(node, packed)
            elif node.domain == "" and node.op_type in ("MatMul", "Gemm"):
                value, transposed, scaling = _constant(node.inputs[1])
                if value is not None:
                    yield _dense(node, value, transposed, scaling)
    except (OSError, DecodeError, ValueError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path}: {str(error).splitlines()[0] if str(error) else error!r}") from error


def _constant(value: ir.Value | None) -> tuple[ir.Value | None, bool, ir.Node | None]:
    """The initializer a weight is read from, and whether it is transposed on the way; None if it is computed.

    The last is the DequantizeLinear behind it, or None.
    """
    transposed = False
    while value is not None and value.const_value is None:
        producer = value.producer()
        if producer is not None and producer.op_type == "DequantizeLinear":
            stored = all(given is None or given.const_value is not None for given in producer.inputs)
            return (producer.inputs[0], transposed, producer) if stored else (None, False, None)
        if producer is None or producer.op_type not in ("Transpose", "Identity", "Cast"):
            return None, False, None
        transposed ^= producer.op_type == "Transpose"
        value = producer.inputs[0]
    return value, transposed, None


def _dense(
    node: ir.Node, value: ir.Value, transposed: bool, scaling: ir.Node | None
) -> tuple[LinearInfo, Tensor | None]:
    """A standard op; MatMul wants ``[K, N]``, Gemm too unless transB says ``[N, K]``."""
    tensor = value.const_value
    assert tensor is not None
    rows_first = transposed ^ bool(node.op_type == "Gemm" and node.attributes.get_int("transB", 0))
    shape = tuple(tensor.shape.numpy())
    if not rows_first:
        shape = (*shape[:-2], *reversed(shape[-2:]))
    pattern, weight = None, None
    if len(shape) == 2:
        stored = _torch(tensor) if scaling is None else _dequantised(scaling)
        weight = stored if rows_first else stored.T
        pattern = find_pattern(weight)
    read = value if scaling is None else scaling.outputs[0]
    others = sorted({user.op_type for user in read.consumers()} - {"MatMul", "Gemm", "Transpose"})
    if len(shape) != 2:
        reason = f"its weight has rank {len(shape)}"
    elif pattern is None:
        reason = "the weight is dense"
    else:
        reason = f"{others[0]} reads the same weight" if others else f"the file uses a plain {node.op_type}"
    name = value.name or "?"
    size = tensor.nbytes if scaling is None else sum(given.nbytes for given in _given(scaling))
    info = LinearInfo(
        node.name or name,
        node.op_type,
        shape,
        _text(pattern),
        reason,
        4 * tensor.size,
        size,
        name,
        int(tensor.dtype.bitwidth),
    )
    return info, weight


def _given(node: ir.Node) -> list[ir.TensorProtocol]:
    """The stored tensors that a node reads."""
    return [value.const_value for value in node.inputs if value is not None and value.const_value is not None]


def _dequantised(node: ir.Node) -> Tensor:
    """What DequantizeLinear makes of stored codes, in the type of its scale."""
    parts = [torch.from_numpy(given.numpy().astype(np.float32)) for given in _given(node)]
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    return dequantise(*parts, axis=axis, block_size=block).to(_torch(_given(node)[1]).dtype)


def _sparse(node: ir.Node, packed: bool) -> tuple[LinearInfo, Tensor | None]:
    """One of our ops, from its packed tensors."""
    names = TENSORS[node.op_type]
    inputs = dict(zip(names, node.inputs[1 : 1 + len(names)], strict=False))
    tensors = {name: value.const_value for name, value in inputs.items() if value is not None and value.const_value}
    if len(tensors) != len(names):
        raise InputError(f"{node.name}: the weight of a sparse op must be stored in the file")
    attributes = {name: value.as_int() for name, value in node.attributes.items()}
    values = tensors["values"].numpy()  # mapped, not read
    pattern: NM | Unstructured
    if "mask" in tensors:
        rows, columns = tensors["row_start"].shape[0] - 1, attributes["in_features"]
        mask = tensors["mask"].numpy()
        if mask.dtype == np.int32:  # for the plugin of TensorRT
            mask = from_words(mask, rows, columns)
            tensors["mask"] = ir.Tensor(mask)
        pattern = Unstructured(1 - int(np.bitwise_count(mask).sum()) / (rows * columns))
    else:
        pattern = NM(attributes["n"], attributes["m"])
        rows, columns = values.shape[0], attributes.get("in_features", values.shape[1] * pattern.m // pattern.n)
    weight = None
    if packed:
        stored = {name: _torch(tensor) for name, tensor in tensors.items()}
        try:
            weight = Packed(node.op_type, stored, attributes).unpack()
        except ValueError as error:
            raise InputError(f"{node.name}: {error}; the file is damaged") from error
    size = sum(tensor.nbytes for tensor in tensors.values())
    name = inputs["values"].name
    info = LinearInfo(
        node.name or "?",
        node.op_type,
        (rows, columns),
        _text(pattern),
        "",
        4 * rows * columns,
        size,
        name or "?",
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
