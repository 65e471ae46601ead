"""Damaged weights: refused, or computed as the format reads them now. Sound ones: never refused.

The format is read here once more, value by value, apart from the product's packing and from what the fixtures pack.
What is accepted with another meaning is another weight, which a file cannot tell from the first: single fields of a
file that change its meaning unseen are values, scales and, rarely, positions.
"""

from collections import Counter

import numpy as np
import pytest
from closeness import assert_close
from sparsify_export import _native

KINDS = ["f32", "f16", "bf16", "i8", "i4"]
CASES = 250


def bits_of(row):
    return np.unpackbits(row, bitorder="little")


def number(weight, row, index, column, kind):
    """One stored value; ``index`` counts from the start of ``row``, an array of values or bytes."""
    if kind == "i4":
        code = int(row[index // 2]) >> (4 * (index % 2)) & 15
        return (code - 8) * float(weight["scale_row"][column // weight["group"]])
    if kind == "i8":
        return int(row[index]) * float(weight["scale_row"])
    if kind == "bf16":
        return float(np.array([int(row[index]) << 16], np.uint32).view(np.float32)[0])
    return float(row[index])


def read_nm(weight, cols, kind, index_bits):
    n, m = weight["n"], weight["m"]
    dense = np.zeros((len(weight["values"]), cols))
    for r, (values, packed) in enumerate(zip(weight["values"], weight["indices"], strict=True)):
        here = {**weight, "scale_row": weight["scales"][r] if "scales" in weight else None}
        bits, each = bits_of(packed), index_bits(m)
        for i in range(cols // m * n):
            position = int(bits[i * each : (i + 1) * each] @ (1 << np.arange(each)))
            column = i // n * m + position
            dense[r, column] = number(here, values, i, column, kind)
    return dense


def read_bitmask(weight, cols, kind):
    dense = np.zeros((len(weight["mask"]), cols))
    width = 64 if kind == "i4" else cols  # where values begin a new byte
    for r, packed in enumerate(weight["mask"]):
        here = {**weight, "scale_row": weight["scales"][r] if "scales" in weight else None}
        at = int(weight["row_start"][r])
        for first in range(0, cols, width):
            kept = first + np.flatnonzero(bits_of(packed)[:cols][first : first + width])
            for index, column in enumerate(kept):
                dense[r, column] = number(here, weight["values"][at:], index, column, kind)
            at += -(-len(kept) // 2) if kind == "i4" else len(kept)
    return dense


def sound(pack, rng, op, kind):
    rows, cols = int(rng.integers(1, 12)), 4 * int(rng.integers(1, 40))
    group = int(rng.choice([32, 64, 128])) if kind == "i4" else 0
    if op == "linear_nm":
        n, m = [(2, 4), (1, 4), (1, 2), (3, 4)][rng.integers(4)]
        if kind in ("i8", "i4"):
            weight, dense = pack.quantised_nm(rng, rows, cols, n, m, kind, group)
        else:
            values, indices, dense = pack.nm(rng, rows, cols, n, m, kind)
            weight = {"values": values, "indices": indices, "n": n, "m": m}
    else:
        keep = rng.random((rows, cols)) < 0.5
        if kind in ("i8", "i4"):
            weight, dense = pack.quantised_bitmask(rng, keep, kind, group)
        else:
            values, mask, row_start, dense = pack.bitmask(rng, keep, kind)
            weight = {"values": values, "mask": mask, "row_start": row_start}
    return weight, dense


def damaged(weight, rng):
    """One field changed, and its name."""
    field = str(rng.choice(list(weight)))
    value = weight[field]
    if isinstance(value, int):
        return field, {
            **weight,
            field: int(rng.choice([0, 1, 2, 3, 4, 8, 16, 32, 33, 64, 128, -1, value + 1, 2 * value])),
        }
    raw = bytearray(value.tobytes())
    for _ in range(int(rng.integers(1, 4))):
        if raw:
            raw[int(rng.integers(len(raw)))] ^= 1 << int(rng.integers(8))
    return field, {**weight, field: np.frombuffer(bytes(raw), value.dtype).reshape(value.shape)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["linear_nm", "linear_bitmask"])
def test_sound_weights_are_right_and_damaged_ones_refused_or_right(pack, op, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    run = getattr(_native, op)
    changed = Counter()

    def check(weight, dense, x):
        got = run(x, **weight)
        if np.isfinite(dense).all() and np.abs(dense).max(initial=0) < 1e30:
            assert_close(got, x, dense, dtype=kind)

    for _ in range(CASES):
        weight, dense = sound(pack, rng, op, kind)
        cols = dense.shape[1]
        x = rng.integers(-127, 128, (int(rng.choice([1, 3, 12])), cols)).astype(np.float32)
        x[:, 0] = 127  # a step of 1: the codes of int8 activations are these numbers
        check(weight, dense, x)
        field, other = damaged(weight, rng)
        try:
            run(x, **other)
        except (ValueError, TypeError):
            continue
        read = read_nm(other, cols, kind, pack.index_bits) if op == "linear_nm" else read_bitmask(other, cols, kind)
        check(other, read, x)
        if not np.array_equal(read, dense, equal_nan=True):
            changed[field] += 1
    assert set(changed) <= {"values", "scales", "indices", "mask", "m", "n"}, changed
    assert changed["n"] + changed["m"] + changed["mask"] <= CASES / 20, changed
