"""int8 and int4 weights against float64 on quantised tokens, at the edges of every tile.

Runs with the instruction set that this machine prefers; test_isa.py runs it again with the others.
"""

import numpy as np
import pytest
from closeness import assert_close, quantised_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsify_export import _native

PATTERNS = [(1, 2), (2, 4), (1, 4), (3, 4), (2, 3), (4, 8), (5, 7), (8, 16), (2, 17), (16, 32), (3, 32)]
TOKENS = [0, 1, 2, 3, 5, 8, 9, 15, 16, 17, 33, 127, 129]
STORED = [("i8", 0), ("i4", 32), ("i4", 64), ("i4", 128)]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("dtype", "group"), STORED)
def test_2_4(pack, dtype, group, tokens):
    rng = np.random.default_rng(tokens)
    for rows, cols in [(0, 8), (1, 4), (3, 32), (5, 28), (17, 36), (65, 544), (70, 1028)]:
        weight, dense = pack.quantised_nm(rng, rows, cols, 2, 4, dtype, group)
        x, bias = rng.standard_normal((tokens, cols), np.float32), rng.standard_normal(rows, np.float32)
        assert_close(_native.linear_nm(x, **weight), quantised_tokens(x), dense)
        assert_close(_native.linear_nm(x, **weight, bias=bias), quantised_tokens(x), dense, bias)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize(("dtype", "group"), STORED)
def test_every_n_m(pack, n, m, dtype, group):
    rng = np.random.default_rng(n * 100 + m)
    for tokens in (1, 4, 19):
        for rows, groups in [(1, 1), (5, 3), (18, 128 // m * 5 + 1)]:
            weight, dense = pack.quantised_nm(rng, rows, groups * m, n, m, dtype, group)
            x = rng.standard_normal((tokens, groups * m), np.float32)
            assert_close(_native.linear_nm(x, **weight), quantised_tokens(x), dense)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("dtype", "group"), STORED)
def test_bitmask(pack, dtype, group, tokens):
    rng = np.random.default_rng(tokens)
    for rows, cols, density in [(0, 5, 0.5), (1, 1, 1.0), (3, 63, 0.5), (5, 64, 0.9), (17, 65, 0.5), (66, 1029, 0.3)]:
        keep = rng.random((rows, cols)) < density
        keep[rows // 2 :: 7] = False  # rows of zeros
        keep[1::7] = True  # dense rows
        weight, dense = pack.quantised_bitmask(rng, keep, dtype, group)
        x, bias = rng.standard_normal((tokens, cols), np.float32), rng.standard_normal(rows, np.float32)
        assert_close(_native.linear_bitmask(x, **weight), quantised_tokens(x), dense)
        assert_close(_native.linear_bitmask(x, **weight, bias=bias), quantised_tokens(x), dense, bias)


def test_no_columns_gives_the_bias():
    bias, x, starts = np.arange(3, dtype=np.float32), np.empty((2, 0), np.float32), np.zeros(4, np.int64)
    no_bytes = np.empty((3, 0), np.uint8)
    for values, scales, group in [
        (np.empty((3, 0), np.int8), np.ones(3, np.float32), 0),
        (no_bytes, np.empty((3, 0), np.float16), 32),
    ]:
        given_scales = {"scales": scales, "group": group}
        by_nm = _native.linear_nm(x, values, no_bytes, 2, 4, bias, **given_scales)
        by_mask = _native.linear_bitmask(x, values.reshape(0), no_bytes, starts, bias, **given_scales)
        assert np.array_equal(by_nm, np.tile(bias, (2, 1)))
        assert np.array_equal(by_mask, np.tile(bias, (2, 1)))


def test_by_hand():
    x = np.array([[127, 1, 2, 3.5, -4, 5, 6, 7]], np.float32)  # a step of 1; 3.5 is a tie and goes to the even 4
    values = np.array([[1, -2, 3, 4]], np.int8)  # columns 0 3 | 1 2 of two groups
    indices = np.array([[0b10_01_11_00]], np.uint8)
    scales = np.array([0.5], np.float32)
    assert _native.linear_nm(x, values, indices, 2, 4, scales=scales).tolist() == [[0.5 * (127 - 8 + 15 + 24)]]
    mask, starts = np.array([[0b0110_1001]], np.uint8), np.array([0, 4])
    assert _native.linear_bitmask(x, values[0], mask, starts, scales=scales).tolist() == [[0.5 * (127 - 8 + 15 + 24)]]


@pytest.mark.parametrize("tokens", [1, 6, 40])
@pytest.mark.parametrize(("dtype", "group"), STORED[:2])
def test_the_largest_sums_are_exact(dtype, group, tokens):
    cols, most = 1 << 17, 127 if dtype == "i8" else 7
    x = np.ones((tokens, cols), np.float32)
    values = np.full(cols, most, np.int8) if dtype == "i8" else np.full(cols // 2, 0xFF, np.uint8)
    scales = np.ones(1, np.float32) if dtype == "i8" else np.ones((1, cols // 32), np.float16)
    mask, starts = np.full((1, cols // 8), 255, np.uint8), np.array([0, values.size])
    y = _native.linear_bitmask(x, values, mask, starts, scales=scales, group=group)
    step, exact = float(np.float32(1) / np.float32(127)), 127 * most * cols
    # 8 bits are summed as integers; sums of groups of 4 bits are float32, and a plain float32 sum is off as well
    plain = np.cumsum(np.full(cols, 127 * most, np.float32), dtype=np.float32)[-1]
    allowed = 2 * np.finfo(np.float32).eps + (2 * abs(float(plain) / exact - 1) if dtype == "i4" else 0)
    assert abs(y / (step * exact) - 1).max() <= allowed


@pytest.mark.parametrize(("dtype", "group"), STORED)
def test_many_blocks_of_columns_rows_and_tokens(pack, dtype, group):
    rng = np.random.default_rng(0)
    for tokens, rows, cols in [(40, 70, 17476), (136, 33, 4104), (600, 600, 1540), (530, 33, 4104)]:
        x = rng.standard_normal((tokens, cols), np.float32)
        at, those = [0, tokens // 2, tokens - 1], [0, rows // 2, rows - 1]
        weight, dense = pack.quantised_nm(rng, rows, cols, 2, 4, dtype, group)
        assert_close(_native.linear_nm(x, **weight)[np.ix_(at, those)], quantised_tokens(x[at]), dense[those])
        weight, dense = pack.quantised_bitmask(rng, rng.random((rows, cols)) < 0.4, dtype, group)
        assert_close(_native.linear_bitmask(x, **weight)[np.ix_(at, those)], quantised_tokens(x[at]), dense[those])


@pytest.mark.parametrize("tokens", [1, 3, 8, 17, 130])
@pytest.mark.parametrize(("dtype", "group"), STORED[:2])
def test_tokens_that_are_zero_tiny_or_not_finite_keep_to_themselves(pack, dtype, group, tokens):
    rng = np.random.default_rng(tokens)
    weight, dense = pack.quantised_nm(rng, 21, 76, 2, 4, dtype, group)
    keep = rng.random((21, 76)) < 0.5
    keep[3] = False
    bitmask, b_dense = pack.quantised_bitmask(rng, keep, dtype, group)
    bias = rng.standard_normal(21, np.float32)
    for place, value in [(0, np.nan), (75, np.inf), (40, -np.inf), (None, 0.0), (None, 1e-37)]:
        x = rng.standard_normal((tokens, 76), np.float32)
        row = tokens // 2
        if place is None:
            x[row] *= np.float32(value)
        else:
            x[row, place] = value
        others = np.arange(tokens) != row
        for y, w in (
            (_native.linear_nm(x, **weight, bias=bias), dense),
            (_native.linear_bitmask(x, **bitmask, bias=bias), b_dense),
        ):
            assert np.isnan(y[row]).all() if place is not None else np.array_equal(y[row], bias)
            assert_close(y[others], quantised_tokens(x[others]), w, bias)


def test_writes_out_and_nothing_around_it(pack):
    rng = np.random.default_rng(0)
    for dtype, group in STORED[:2]:
        for tokens in (1, 3, 8, 9, 17, 130):
            for rows in (1, 3, 15, 17, 67):
                nm, dense = pack.quantised_nm(rng, rows, 36, 2, 4, dtype, group)
                bitmask, b_dense = pack.quantised_bitmask(rng, rng.random((rows, 36)) < 0.5, dtype, group)
                x = rng.standard_normal((tokens, 36), np.float32)
                for op, weight, want in [(_native.linear_nm, nm, dense), (_native.linear_bitmask, bitmask, b_dense)]:
                    guarded = np.full(tokens * rows + 128, 7.0, np.float32)
                    y = guarded[64:-64].reshape(tokens, rows)
                    y[:] = np.nan
                    op(x, **weight, out=y)
                    assert_close(y, quantised_tokens(x), want)
                    assert (guarded[:64] == 7.0).all()
                    assert (guarded[-64:] == 7.0).all()


@pytest.mark.parametrize("tokens", [1, 7, 16, 200])
@pytest.mark.parametrize(("dtype", "group"), STORED[:2])
def test_result_does_not_depend_on_the_number_of_threads(pack, dtype, group, tokens):
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, 1024), np.float32)
    nm, _ = pack.quantised_nm(rng, 1000, 1024, 2, 4, dtype, group)
    bitmask, _ = pack.quantised_bitmask(rng, rng.random((1000, 1024)) < 0.5, dtype, group)
    before, results = _native.num_threads(), []
    try:
        for threads in (1, 2, 3):
            _native.set_num_threads(threads)
            results.append((_native.linear_nm(x, **nm), _native.linear_bitmask(x, **bitmask)))
    finally:
        _native.set_num_threads(before)
    for by_nm, by_mask in results[1:]:
        assert np.array_equal(by_nm, results[0][0])
        assert np.array_equal(by_mask, results[0][1])


@settings(deadline=None, max_examples=60)
@given(
    pattern=st.sampled_from(PATTERNS),
    rows=st.integers(0, 40),
    groups=st.integers(0, 20),
    tokens=st.integers(0, 20),
    stored=st.sampled_from(STORED),
    seed=st.integers(0, 1000),
)
def test_any_nm_weight_equals_its_dense_form(pack, pattern, rows, groups, tokens, stored, seed):
    rng = np.random.default_rng(seed)
    weight, dense = pack.quantised_nm(rng, rows, groups * pattern[1], *pattern, *stored)
    x = rng.standard_normal((tokens, groups * pattern[1]), np.float32)
    assert_close(_native.linear_nm(x, **weight), quantised_tokens(x), dense)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 200),
    tokens=st.integers(0, 20),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    stored=st.sampled_from(STORED),
    seed=st.integers(0, 1000),
)
def test_any_bitmask_weight_equals_its_dense_form(pack, rows, cols, tokens, density, stored, seed):
    rng = np.random.default_rng(seed)
    weight, dense = pack.quantised_bitmask(rng, rng.random((rows, cols)) < density, *stored)
    x = rng.standard_normal((tokens, cols), np.float32)
    assert_close(_native.linear_bitmask(x, **weight), quantised_tokens(x), dense)
