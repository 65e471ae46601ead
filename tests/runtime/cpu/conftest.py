"""Packing written as plain numpy, apart from the product's, so that a mistake in one shows in the other."""

from types import SimpleNamespace

import numpy as np
import pytest


def _index_bits(m):
    return 1 if m == 2 else 2 if m <= 4 else 4 if m <= 16 else 8


def _stored(values, dtype):
    """The array the kernels take, and the numbers it holds in float64."""
    if dtype == "bf16":  # round to nearest even on the bits; numpy has no bfloat16
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        half = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return half, (half.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    stored = values.astype({"f32": np.float32, "f16": np.float16}[dtype])
    return stored, stored.astype(np.float64)


def _nm(rng, rows, cols, n, m, dtype="f32"):
    """A random n:m weight: values, indices, and the same weight dense in float64."""
    groups = cols // m
    position = np.sort(rng.permuted(np.tile(np.arange(m), (rows, groups, 1)), axis=-1)[..., :n], axis=-1)
    values, exact = _stored(rng.standard_normal((rows, groups, n)), dtype)
    dense = np.zeros((rows, groups, m))
    np.put_along_axis(dense, position, exact, axis=-1)
    bits = _index_bits(m)
    each = position.reshape(rows, groups * n, 1) >> np.arange(bits) & 1
    indices = np.packbits(each.reshape(rows, groups * n * bits).astype(np.uint8), axis=1, bitorder="little")
    return values.reshape(rows, groups * n), indices, dense.reshape(rows, cols)


def _bitmask(rng, keep, dtype="f32"):
    """A random weight kept where ``keep``: values, mask, row_start, and the same weight dense in float64."""
    values, exact = _stored(rng.standard_normal(int(keep.sum())), dtype)
    dense = np.zeros(keep.shape)
    dense[keep] = exact
    mask = np.packbits(keep, axis=1, bitorder="little")
    return values, mask, np.concatenate([[0], keep.sum(axis=1).cumsum()]).astype(np.int64), dense


def _pairs(codes):
    """Two int4 codes a byte, along the last axis; the half behind an odd number is 0."""
    halves = (codes + 8).astype(np.uint8)
    halves = np.pad(halves, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return halves[..., ::2] | halves[..., 1::2] << 4


def _scales(rng, rows, cols, dtype, group):
    """Scales as they are stored, and for every weight in float64."""
    if dtype == "i8":
        scales = rng.uniform(0.5, 2, rows).astype(np.float32)
        return scales, np.repeat(scales.astype(np.float64)[:, None], cols, axis=1)
    scales = rng.uniform(0.5, 2, (rows, -(-cols // group))).astype(np.float16)
    return scales, np.repeat(scales.astype(np.float64), group, axis=1)[:, :cols]


def _quantised_nm(rng, rows, cols, n, m, dtype, group=0):
    """A random n:m weight in int8 or int4: what ``linear_nm`` takes besides x, and the weight dense in float64."""
    most = 127 if dtype == "i8" else 7
    _, indices, pattern = _nm(rng, rows, cols, n, m)
    dense = np.where(pattern != 0, rng.integers(-most, most + 1, pattern.shape), 0)
    codes = dense[pattern != 0].reshape(rows, cols // m * n)
    scales, each = _scales(rng, rows, cols, dtype, group)
    values = codes.astype(np.int8) if dtype == "i8" else _pairs(codes)
    weight = {"values": values, "indices": indices, "n": n, "m": m, "scales": scales, "group": group}
    return weight, dense * each


def _quantised_bitmask(rng, keep, dtype, group=0):
    """A random weight in int8 or int4 kept where ``keep``: what ``linear_bitmask`` takes, and the weight in float64."""
    most = 127 if dtype == "i8" else 7
    dense = np.where(keep, rng.integers(-most, most + 1, keep.shape), 0)
    width = 64 if dtype == "i4" else max(keep.shape[1], 1)
    rows = []
    for codes, kept in zip(dense, keep, strict=True):
        chunks = [codes[k : k + width][kept[k : k + width]] for k in range(0, len(kept), width)]
        stored = [chunk.astype(np.int8) if dtype == "i8" else _pairs(chunk) for chunk in chunks]
        rows.append(np.concatenate([np.empty(0, np.int8 if dtype == "i8" else np.uint8), *stored]))
    values = np.concatenate([np.empty(0, np.int8 if dtype == "i8" else np.uint8), *rows])
    starts = np.cumsum([0, *[len(row) for row in rows]]).astype(np.int64)
    scales, each = _scales(rng, *keep.shape, dtype, group)
    mask = np.packbits(keep, axis=1, bitorder="little")
    weight = {"values": values, "mask": mask, "row_start": starts, "scales": scales, "group": group}
    return weight, dense * each


@pytest.fixture(scope="session")
def pack():
    """``pack.nm(rng, rows, cols, n, m, dtype)`` and ``pack.bitmask(rng, keep, dtype)``, and both quantised."""
    return SimpleNamespace(
        nm=_nm,
        bitmask=_bitmask,
        quantised_nm=_quantised_nm,
        quantised_bitmask=_quantised_bitmask,
        index_bits=_index_bits,
    )
