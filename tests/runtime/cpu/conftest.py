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


@pytest.fixture(scope="session")
def pack():
    """``pack.nm(rng, rows, cols, n, m, dtype)`` and ``pack.bitmask(rng, keep, dtype)``."""
    return SimpleNamespace(nm=_nm, bitmask=_bitmask, index_bits=_index_bits)
