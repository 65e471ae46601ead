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


@pytest.fixture(params=["i8", "i4"])
def quantised_nm(pack, request):
    weight, _ = pack.quantised_nm(np.random.default_rng(0), 5, 76, 1, 4, request.param, 32 * (request.param == "i4"))
    return {"x": np.ones((2, 76), np.float32), **weight}


@pytest.fixture(params=["i8", "i4"])
def quantised_bitmask(pack, request):
    rng = np.random.default_rng(0)
    weight, _ = pack.quantised_bitmask(rng, rng.random((5, 76)) < 0.5, request.param, 32 * (request.param == "i4"))
    return {"x": np.ones((2, 76), np.float32), **weight}


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


@pytest.mark.parametrize(("groups", "at"), [(1, 1), (2, 3), (9, 17)])  # the last of a byte, and of an odd row
def test_linear_nm_refuses_indices_that_do_not_ascend(groups, at):
    x, values = np.ones((1, 4 * groups), np.float32), np.ones((1, 2 * groups), np.float32)
    indices = np.full((1, (groups + 1) // 2), 0b1001_1001, np.uint8)  # 1 and 2 in every group
    if groups % 2:
        indices[0, -1] &= 15
    indices[0, -1] ^= 0b0100 << (4 if groups % 2 == 0 else 0)  # 2 becomes 3
    _native.linear_nm(x, values, indices, 2, 4)
    indices[0, -1] ^= 0b1000 << (4 if groups % 2 == 0 else 0)  # and then 1
    with pytest.raises(ValueError, match=f"indices must ascend inside a group, got 1 after 1 in row 0 at value {at}"):
        _native.linear_nm(x, values, indices, 2, 4)


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


def test_quantised_ops_refuse_scales_that_do_not_fit(quantised_nm, quantised_bitmask):
    for op, weight in ((_native.linear_nm, quantised_nm), (_native.linear_bitmask, quantised_bitmask)):
        scales = weight["scales"]
        op(**weight)
        with pytest.raises(ValueError, match=r"quantised values need scales of shape \[5.*\], got none"):
            op(**{**weight, "scales": None})
        with pytest.raises(ValueError, match=r"scales must have shape \[5.*\], got \[4"):
            op(**{**weight, "scales": np.ascontiguousarray(scales[:4])})
        with pytest.raises(ValueError, match=r"scales must be float32|scales of int4 values must be float16"):
            op(**{**weight, "scales": scales.astype(np.float64)})
        for bad in (np.nan, np.inf, -np.inf):
            damaged = scales.copy()
            damaged[3] = bad
            with pytest.raises(ValueError, match="scales must be finite, got an infinity or NaN in row 3"):
                op(**{**weight, "scales": damaged})
        for group in (0, 16, 256, -32):
            if weight["values"].dtype == np.uint8:
                with pytest.raises(ValueError, match=f"group must be 32, 64 or 128, got {group}"):
                    op(**{**weight, "group": group})
            elif group:
                with pytest.raises(ValueError, match=f"group is for 4-bit values only, got {group}"):
                    op(**{**weight, "group": group})


def test_float_ops_refuse_scales(nm, bitmask):
    for op, weight in ((_native.linear_nm, nm), (_native.linear_bitmask, bitmask)):
        with pytest.raises(ValueError, match=r"scales are for 8-bit and 4-bit values only, got \[5\]"):
            op(**weight, scales=np.ones(5, np.float32))
        with pytest.raises(ValueError, match="group is for 4-bit values only, got 32"):
            op(**weight, group=32)


def test_quantised_nm_refuses_sizes_that_disagree(quantised_nm):
    kept = quantised_nm["values"].shape[1]
    fewer = np.ascontiguousarray(quantised_nm["values"][:, 1:])
    with pytest.raises(ValueError, match=rf"must have shape .*got \[.*({kept - 1}|5|76)|padding bits"):
        _native.linear_nm(**{**quantised_nm, "values": fewer})
    with pytest.raises(ValueError, match=r"must have shape|must be a multiple of m = 4, got 75"):
        _native.linear_nm(**{**quantised_nm, "x": np.ones((2, 75), np.float32)})


def test_quantised_bitmask_refuses_sizes_that_disagree(quantised_bitmask):
    values, starts = quantised_bitmask["values"], quantised_bitmask["row_start"]
    with pytest.raises(ValueError, match=f"row_start must end with the number of values {len(values) - 1}"):
        _native.linear_bitmask(**{**quantised_bitmask, "values": values[:-1]})
    moved = starts.copy()
    moved[2] += 1
    with pytest.raises(ValueError, match=rf"row_start\[2\] must be {starts[2]} .* got {starts[2] + 1}"):
        _native.linear_bitmask(**{**quantised_bitmask, "row_start": moved})


def test_rows_whose_sums_could_overflow_are_refused():
    most = 1 << 17
    x, indices = np.ones((1, 2 * most + 2), np.float32), np.zeros((1, most // 8 + 1), np.uint8)
    why = f"a quantised row may keep at most {most} values, got {most + 1} in row 0"
    with pytest.raises(ValueError, match=why):
        _native.linear_nm(x, np.zeros((1, most + 1), np.int8), indices, 1, 2, scales=np.ones(1, np.float32))
    keep = np.ones((1, most + 1), bool)
    mask, starts = np.packbits(keep, axis=1, bitorder="little"), np.array([0, most + 1])
    x, values = np.ones((1, most + 1), np.float32), np.zeros(most + 1, np.int8)
    with pytest.raises(ValueError, match=why):
        _native.linear_bitmask(x, values, mask, starts, scales=np.ones(1, np.float32))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dtype": "int2"}, "dtype must be fp32, fp16, bf16, int8 or int4, got int2"),
        ({"weight": np.ones(8, np.float32)}, r"weight must be 2-d \[N, K\], got \[8\]"),
        ({"n": 5}, r"n:m must have 1 <= n <= m and 2 <= m <= 32, got 5:4"),
        ({"n": 0, "m": 0}, r"got 0:0"),
        ({"weight": np.zeros((2, 6), np.float32)}, "in_features must be a multiple of m = 4, got 6"),
        ({"dtype": "int4"}, "group must be 32, 64 or 128, got 0"),
        ({"dtype": "int8", "group": 32}, "group is for 4-bit values only, got 32"),
        ({"scales": np.ones(2, np.float32)}, "scales are for 8-bit and 4-bit values only"),
    ],
)
def test_packing_refuses(change, why):
    with pytest.raises(ValueError, match=why):
        _native.pack_nm(**{"weight": np.zeros((2, 8), np.float32), "n": 2, "m": 4, "dtype": "fp32", **change})
    if not {"n", "m"} & set(change) and "multiple" not in why:
        with pytest.raises(ValueError, match=why):
            _native.pack_bitmask(**{"weight": np.zeros((2, 8), np.float32), "dtype": "fp32", **change})


def test_unpacking_refuses_what_the_ops_refuse(nm, bitmask):
    with pytest.raises(ValueError, match=r"indices must have shape \[5, 4\], got \[5, 3\]"):
        _native.unpack_nm(nm["values"], np.zeros((5, 3), np.uint8), 2, 4)
    with pytest.raises(ValueError, match="bits set behind column K = 25"):
        _native.unpack_bitmask(bitmask["values"], bitmask["mask"], bitmask["row_start"], 25)
    with pytest.raises(ValueError, match="in_features must be between 0 and 2147483647, got -1"):
        _native.unpack_bitmask(bitmask["values"], bitmask["mask"], bitmask["row_start"], -1)


def test_refuses_less_than_one_thread():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        _native.set_num_threads(0)


def test_pairwise_max_sum_refuses_different_rows():
    with pytest.raises(ValueError, match=r"same number of rows, got \[2, 3\] and \[3, 3\]"):
        _native.pairwise_max_sum(np.ones((2, 3), np.float32), np.ones((3, 3), np.float32))
