"""Random layers: our packed weights, and the dense ones of ONNX Runtime.

The layouts of our weights are described in runtime/cpu/kernels.h. They are packed here in numpy once more, so that the
benchmark depends on nothing but the ops themselves.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from kernel_bench.rows import Row
from onnx import NodeProto, TensorProto, helper

KINDS = {
    "f32": TensorProto.FLOAT,
    "f16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "i8": TensorProto.INT8,
    "i4": TensorProto.UINT8,
}
NIBBLE_COLUMNS = 64  # columns of a bitmask row whose 4-bit values begin on a byte of their own


@dataclass(frozen=True)
class Tensor:
    """An initializer: its bytes may mean a type that numpy lacks."""

    name: str
    kind: int
    array: np.ndarray


@dataclass(frozen=True)
class Layer:
    """Nodes that make y [M, N] of x [M, K], and the weights they read."""

    nodes: tuple[NodeProto, ...]
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.array.nbytes for tensor in self.tensors)


def random_weight(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """A weight [N, K] float32 and which of it is kept, bool [N, K]; the rest is 0."""
    return _random_weight(row.rows, row.cols, row.nm if row.format == "nm" else None, row.sparsity)


@lru_cache(maxsize=1)  # the rows of one weight come one after the other
def _random_weight(rows: int, cols: int, nm: tuple[int, int] | None, sparsity: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    if nm is None:
        keep = rng.random((rows, cols), np.float32) >= sparsity
    else:
        n, m = nm
        groups = rng.random((4096, m)).argsort(axis=1) < n  # random patterns to choose from: faster than a sort each
        keep = groups[rng.integers(len(groups), size=rows * cols // m)].reshape(rows, cols)
    return rng.standard_normal((rows, cols), np.float32) * keep, keep


def sparse(row: Row) -> Layer:
    """Our layer: one op of the domain ``sparsify``."""
    weight, keep = random_weight(row)
    values, scales = encode(weight, keep, row.type, row.group)
    if row.format == "nm":
        n, m = row.nm
        attributes = {"n": n, "m": m}
        values = values.reshape(row.rows, -1)
        if row.type == "i4":
            values = nibbles(values)
        where = [Tensor("indices", TensorProto.UINT8, nm_indices(keep, m))]
    else:
        attributes = {"in_features": row.cols}
        mask, row_start = np.packbits(keep, axis=1, bitorder="little"), starts(keep.sum(axis=1))
        if row.type == "i4":
            values, row_start = nibble_chunks(values, keep)
        where = [Tensor("mask", TensorProto.UINT8, mask), Tensor("row_start", TensorProto.INT64, row_start)]
    name = f"linear_{row.format}"
    if row.type == "i8":
        name += "_int8"
        where.append(Tensor("scales", TensorProto.FLOAT, scales))
    elif row.type == "i4":
        name += "_int4"
        where.append(Tensor("scales", TensorProto.FLOAT16, scales))
        attributes |= {"group": row.group, "in_features": row.cols}
    tensors = (Tensor("values", KINDS[row.type], values), *where)
    names = ["x", *(tensor.name for tensor in tensors)]
    return Layer((helper.make_node(name, names, ["y"], domain="sparsify", **attributes),), tensors)


def encode(weight: np.ndarray, keep: np.ndarray, type: str, group: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Kept values in the stored type, row after row, and the scales of 8 and 4 bits. 4-bit codes stay one a byte."""
    values = weight[keep]
    if type == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16), None  # cut, not rounded: good enough for timing
    if type in ("f32", "f16"):
        return values.astype(np.float32 if type == "f32" else np.float16), None
    rows, cols = weight.shape
    width, top = (cols, 127) if type == "i8" else (group, 7)
    padded = np.pad(np.abs(weight), ((0, 0), (0, -cols % width)))
    scales = (padded.reshape(rows, -1, width).max(axis=2) / top).astype(np.float32 if type == "i8" else np.float16)
    step = np.repeat(scales.astype(np.float32), width, axis=1)[:, :cols][keep]
    codes = np.rint(values / np.where(step > 0, step, 1)).clip(-top, top).astype(np.int8)
    return (codes, scales[:, 0]) if type == "i8" else (codes.view(np.uint8) + np.uint8(8), scales)


def nm_indices(keep: np.ndarray, m: int) -> np.ndarray:
    """Positions of the kept weights in their groups of m, lowest bits first: uint8 [N, bytes]."""
    bits = 1 if m <= 2 else 2 if m <= 4 else 4 if m <= 16 else 8
    position = np.nonzero(keep.reshape(-1, m))[1].astype(np.uint8).reshape(len(keep), -1)
    return pack_fields(position, bits)


def nibbles(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte along the last axis, the first in the lower half."""
    return pack_fields(codes, 4)


def pack_fields(fields: np.ndarray, bits: int) -> np.ndarray:
    """Small numbers [N, count] in bytes [N, ceil(count * bits / 8)], the first in the lowest bits."""
    per_byte = 8 // bits
    padded = np.pad(fields, ((0, 0), (0, -fields.shape[1] % per_byte))).reshape(len(fields), -1, per_byte)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(padded << shifts, axis=2)


def nibble_chunks(codes: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes in two a byte, each 64 columns of a row on bytes of their own; and the first byte of each row."""
    padded = np.pad(keep, ((0, 0), (0, -keep.shape[1] % NIBBLE_COLUMNS)))
    counts = padded.reshape(len(keep), -1, NIBBLE_COLUMNS).sum(axis=2)
    chunk_bytes = (counts + 1) // 2
    per_chunk = counts.ravel()
    rank = np.arange(len(codes)) - np.repeat(starts(per_chunk)[:-1], per_chunk)  # of a code in its chunk
    byte = np.repeat(starts(chunk_bytes.ravel())[:-1], per_chunk) + rank // 2
    packed = np.zeros(chunk_bytes.sum(), np.uint8)
    low = rank % 2 == 0
    packed[byte[low]] = codes[low]
    packed[byte[~low]] |= codes[~low] << np.uint8(4)
    return packed, starts(chunk_bytes.sum(axis=1))


def starts(counts: np.ndarray) -> np.ndarray:
    """Where each of several neighbouring runs begins, and where the last ends: int64."""
    return np.r_[0, counts.cumsum()].astype(np.int64)


def opponent(name: str, rows: int, cols: int) -> Layer:
    """ONNX Runtime's own layer of that shape: "dense", "int8", "int4-32" or "int4-128"."""
    rng = np.random.default_rng(0)
    if name == "dense":
        weight = Tensor("w", TensorProto.FLOAT, rng.standard_normal((cols, rows), np.float32))
        return Layer((helper.make_node("MatMul", ["x", "w"], ["y"]),), (weight,))
    if name == "int8":
        tensors = (
            Tensor("w", TensorProto.INT8, rng.integers(-127, 128, (cols, rows), np.int8)),
            Tensor("scales", TensorProto.FLOAT, rng.random(rows, np.float32)),
        )
        quantise = helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "step", "zero"])
        names = ["codes", "w", "step", "scales", "zero"]
        multiply = helper.make_node("MatMulIntegerToFloat", names, ["y"], domain="com.microsoft")
        return Layer((quantise, multiply), tensors)
    block = int(name.removeprefix("int4-"))
    blocks = -(-cols // block)
    tensors = (
        Tensor("w", TensorProto.UINT8, rng.integers(0, 256, (rows, blocks, block // 2), np.uint8)),
        Tensor("scales", TensorProto.FLOAT, rng.random((rows, blocks), np.float32)),
    )
    sizes = {"K": cols, "N": rows, "bits": 4, "block_size": block, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "scales"], ["y"], domain="com.microsoft", **sizes)
    return Layer((node,), tensors)


def pruned_dense(row: Row) -> Layer:
    """The row's weight as a dense float32 MatMul full of zeros: what DeepSparse reads."""
    weight = Tensor("w", TensorProto.FLOAT, np.ascontiguousarray(random_weight(row)[0].T))
    return Layer((helper.make_node("MatMul", ["x", "w"], ["y"]),), (weight,))
