"""What the kernels refuse, and that they say what was got and wanted."""

import numpy as np
import pytest
from sparsify_export import _native


@pytest.fixture
def nm(pack):
    values, indices, _ = pack.nm(np.random.default_rng(0), 5, 32, 2, 4)
    return {"x": np.ones((2, 32), np.float32), "values": values, "indices": indices, "n": 2, "m": 4}


@pytest.fixture
def bitmask(pack):
    rng = np.random.default_rng(0)
    values, mask, row_start, _ = pack.bitmask(rng, rng.random((5, 30)) < 0.5)
    return {"x": np.ones((2, 30), np.float32), "values": values, "mask": mask, "row_start": row_start}


def three_of_m(m):
    """Indices of a 1:m weight [1, 2m], the second of which is m itself: one too many."""
    return np.array([[m << 2 if m == 3 else m << 4]] if m < 17 else [[0, m]], np.uint8)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n": 0}, r"n:m must have 1 <= n <= m and 2 <= m <= 32, got 0:4"),
        ({"n": 5}, r"got 5:4"),
        ({"n": 1, "m": 1}, r"got 1:1"),
        ({"n": 16, "m": 33}, r"got 16:33"),
        ({"n": 3}, r"whole groups of n = 3 a row, got shape \[5, 16\]"),
        ({"values": np.ones(16, np.float32)}, r"values must have shape \[N, K \* n / m\], got \[16\]"),
        ({"values": np.ones((5, 16), np.float64)}, r"values must be float32, float16, bfloat16"),
        ({"indices": np.zeros((5, 3), np.uint8)}, r"indices must have shape \[5, 4\], got \[5, 3\]"),
        ({"indices": np.zeros((4, 4), np.uint8)}, r"indices must have shape \[5, 4\], got \[4, 4\]"),
        ({"bias": np.ones(4, np.float32)}, r"bias must have shape \[5\], got \[4\]"),
        ({"x": np.ones((2, 31), np.float32)}, r"x must have shape \[\.\.\., 32\] to match the weight, got \[2, 31\]"),
        ({"x": np.ones(32, np.float32)}, r"x must be 2-d \[tokens, K\], got \[32\]"),
        ({"out": np.ones((2, 6), np.float32)}, r"out must have shape \[2, 5\], got \[2, 6\]"),
    ],
)
def test_linear_nm_refuses(nm, change, why):
    with pytest.raises(ValueError, match=why):
        _native.linear_nm(**{**nm, **change})


@pytest.mark.parametrize("m", [3, 5, 15, 17, 31])
def test_linear_nm_refuses_an_index_outside_its_group(m):
    x, values = np.ones((1, 2 * m), np.float32), np.ones((1, 2), np.float32)
    why = rf"indices must be below m = {m}, got {m} in row 0 at value 1"
    with pytest.raises(ValueError, match=why):
        _native.linear_nm(x, values, three_of_m(m), 1, m)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"mask": np.zeros(4, np.uint8)}, r"mask must have shape \[N, ceil\(K / 8\)\], got \[4\]"),
        ({"values": np.ones((5, 2), np.float32)}, r"values must have shape \[nnz\], got \[5, 2\]"),
        ({"row_start": np.zeros(5, np.int64)}, r"row_start must have shape \[6\], got \[5\]"),
        ({"row_start": np.arange(1, 7)}, r"row_start must begin with 0, got 1"),
        ({"row_start": np.zeros(6, np.int64)}, r"row_start\[1\] must be \d+ .* got 0"),
        ({"row_start": np.array([0, -(2**63), 0, 0, 0, 0])}, r"row_start\[1\] must be \d+ .* got -9223372036854775808"),
        ({"values": np.ones(3, np.float32)}, r"row_start must end with the number of values 3, got \d+"),
        ({"bias": np.ones(4, np.float32)}, r"bias must have shape \[5\], got \[4\]"),
        ({"x": np.ones((2, 33), np.float32)}, r"mask must have 5 bytes a row for K = 33, got 4"),
        ({"x": np.ones((2, 25), np.float32)}, r"bits set behind column K = 25"),
        ({"x": np.ones((30,), np.float32)}, r"x must be 2-d \[tokens, K\], got \[30\]"),
    ],
)
def test_linear_bitmask_refuses(bitmask, change, why):
    with pytest.raises(ValueError, match=why):
        _native.linear_bitmask(**{**bitmask, **change})


def test_refuses_less_than_one_thread():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        _native.set_num_threads(0)


def test_pairwise_max_sum_refuses_different_rows():
    with pytest.raises(ValueError, match=r"same number of rows, got \[2, 3\] and \[3, 3\]"):
        _native.pairwise_max_sum(np.ones((2, 3), np.float32), np.ones((3, 3), np.float32))
