"""The kernels against float64, for every op and type of values, at the edges of every tile.

Runs with the instruction set that this machine prefers; test_isa.py runs it again with the others.
"""

import numpy as np
import pytest
import torch
from closeness import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsify_export import _native

PATTERNS = [
    (1, 2),
    (2, 4),
    (1, 4),
    (3, 4),
    (2, 3),
    (4, 8),
    (1, 8),
    (5, 7),
    (8, 16),
    (1, 16),
    (2, 17),
    (16, 32),
    (3, 32),
]
TOKENS = [0, 1, 2, 3, 5, 8, 9, 15, 16, 17, 27, 28, 33, 127, 129]
DTYPES = ["f32", "f16", "bf16"]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_2_4(pack, dtype, tokens):
    rng = np.random.default_rng(tokens)
    for rows, cols in [(0, 8), (1, 4), (3, 32), (5, 28), (17, 36), (65, 544), (70, 1028)]:
        values, indices, dense = pack.nm(rng, rows, cols, 2, 4, dtype)
        x, bias = rng.standard_normal((tokens, cols), np.float32), rng.standard_normal(rows, np.float32)
        assert_close(_native.linear_nm(x, values, indices, 2, 4), x, dense, dtype=dtype)
        assert_close(_native.linear_nm(x, values, indices, 2, 4, bias), x, dense, bias, dtype=dtype)


@pytest.mark.parametrize("rows", [2050, 4099])
def test_2_4_with_so_many_rows_that_tasks_grow(pack, rows):
    rng = np.random.default_rng(rows)
    values, indices, dense = pack.nm(rng, rows, 548, 2, 4)
    for tokens in (3, 16, 21):
        x = rng.standard_normal((tokens, 548), np.float32)
        assert_close(_native.linear_nm(x, values, indices, 2, 4), x, dense)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_n_m(pack, n, m, dtype):
    rng = np.random.default_rng(n * 100 + m)
    for tokens in (1, 4, 7, 19, 130):
        for rows, groups in [(1, 1), (5, 3), (9, 33), (18, 128 // m * 5 + 1)]:
            values, indices, dense = pack.nm(rng, rows, groups * m, n, m, dtype)
            x = rng.standard_normal((tokens, groups * m), np.float32)
            assert_close(_native.linear_nm(x, values, indices, n, m), x, dense, dtype=dtype)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bitmask(pack, dtype, tokens):
    rng = np.random.default_rng(tokens)
    for rows, cols, density in [(0, 5, 0.5), (1, 1, 1.0), (3, 31, 0.5), (5, 32, 0.9), (17, 33, 0.5), (66, 1029, 0.3)]:
        keep = rng.random((rows, cols)) < density
        keep[rows // 2 :: 7] = False  # rows of zeros
        keep[1::7] = True  # dense rows
        values, mask, row_start, dense = pack.bitmask(rng, keep, dtype)
        x, bias = rng.standard_normal((tokens, cols), np.float32), rng.standard_normal(rows, np.float32)
        assert_close(_native.linear_bitmask(x, values, mask, row_start), x, dense, dtype=dtype)
        assert_close(_native.linear_bitmask(x, values, mask, row_start, bias), x, dense, bias, dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("kept", [False, True])
def test_bitmask_all_zero_and_all_dense(pack, kept, tokens):
    rng = np.random.default_rng(0)
    values, mask, row_start, dense = pack.bitmask(rng, np.full((37, 75), kept))
    x = rng.standard_normal((tokens, 75), np.float32)
    assert_close(_native.linear_bitmask(x, values, mask, row_start), x, dense)


@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 1.0])
def test_bitmask_with_long_rows(pack, density):
    rng = np.random.default_rng(0)
    values, mask, row_start, dense = pack.bitmask(rng, rng.random((33, 3001)) < density)
    for tokens in (1, 150):
        x = rng.standard_normal((tokens, 3001), np.float32)
        assert_close(_native.linear_bitmask(x, values, mask, row_start), x, dense)


def test_no_columns_gives_the_bias():
    bias = np.arange(3, dtype=np.float32)
    for tokens in (1, 20):
        x = np.empty((tokens, 0), np.float32)
        no_bytes, no_values = np.empty((3, 0), np.uint8), np.empty((3, 0), np.float32)
        want = np.tile(bias, (tokens, 1))
        assert np.array_equal(_native.linear_nm(x, no_values, no_bytes, 2, 4, bias), want)
        starts = np.zeros(4, np.int64)
        assert np.array_equal(_native.linear_bitmask(x, no_values.reshape(0), no_bytes, starts, bias), want)


def test_by_hand():
    values = np.array([[1, 2, 3, 4]], np.float32)  # columns 0 3 | 1 2 of two groups
    indices = np.array([[0b10_01_11_00]], np.uint8)
    x = np.array([[1, 10, 100, 1000, 10000, 100000, 1000000, 10000000]], np.float32)
    assert _native.linear_nm(x, values, indices, 2, 4).tolist() == [[1 + 2000 + 300000 + 4000000]]
    mask, starts = np.array([[0b0110_1001]], np.uint8), np.array([0, 4])
    assert _native.linear_bitmask(x, values[0], mask, starts).tolist() == [[1 + 2000 + 300000 + 4000000]]


def _not_finite_where_kept(y, x, keep):
    """For x of ones but for its infinities and NaNs: y is finite exactly where none of those meets a kept weight."""
    touched = (~np.isfinite(x)).astype(np.int64) @ keep.T.astype(np.int64)
    assert np.array_equal(np.isfinite(y), touched == 0)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("tokens", [1, 3, 8, 16, 130])
def test_inf_and_nan_reach_only_kept_weights(pack, bad, tokens):
    rng = np.random.default_rng(tokens)
    x = np.ones((tokens, 76), np.float32)
    x[rng.integers(0, tokens, 3), rng.integers(0, 76, 3)] = bad
    x[0, 75] = bad
    for n, m in [(2, 4), (1, 4), (1, 2)]:
        values, indices, dense = pack.nm(rng, 21, 76, n, m)
        _not_finite_where_kept(_native.linear_nm(x, values, indices, n, m), x, dense != 0)
    keep = rng.random((21, 76)) < 0.5
    values, mask, row_start, _ = pack.bitmask(rng, keep)
    _not_finite_where_kept(_native.linear_bitmask(x, values, mask, row_start), x, keep)


def test_every_half_converts_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    x = np.ones((1, 2), np.float32)
    indices = np.zeros((1 << 16, 1), np.uint8)
    for tokens in (1, 9):  # both kernels
        x = np.ones((tokens, 2), np.float32)
        for values, want in [
            (bits.view(np.float16), bits.view(np.float16).astype(np.float32)),
            (bits, (bits.astype(np.uint32) << 16).view(np.float32)),
        ]:
            y = _native.linear_nm(x, values.reshape(-1, 1), indices, 1, 2)
            want = want.copy()
            want[want == 0] = 0.0  # -0.0 + 0.0 is +0.0
            if values is bits and tokens > 2:  # bfloat16 instructions may take denormal numbers for 0
                want[(abs(want) < np.finfo(np.float32).tiny) & (y[0] == 0)] = 0.0
            assert np.array_equal(y[0], want, equal_nan=True)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("tokens", [2, 3, 40])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_pruned_column_does_not_see_what_is_not_finite(pack, dtype, tokens, bad):
    rng = np.random.default_rng(tokens)
    keep = rng.random((35, 96)) < 0.5
    keep[:, 7] = False
    values, indices, nm_dense = pack.nm(rng, 35, 96, 2, 4, dtype)
    b_values, mask, row_start, dense = pack.bitmask(rng, keep, dtype)
    x = rng.standard_normal((tokens, 96), np.float32)
    clean = x.copy()
    x[tokens // 2, 7], clean[tokens // 2, 7] = bad, 0
    assert_close(_native.linear_bitmask(x, b_values, mask, row_start), clean, dense, dtype=dtype)
    got, sees = _native.linear_nm(x, values, indices, 2, 4), nm_dense[:, 7] != 0
    assert not np.isfinite(got[tokens // 2, sees]).any()
    assert_close(got[:, ~sees], clean, nm_dense[~sees], dtype=dtype)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_many_blocks_of_columns_rows_and_tokens(pack, dtype):
    rng = np.random.default_rng(0)
    for tokens, rows, cols in [(40, 70, 8740), (136, 33, 4104), (600, 600, 1540), (530, 33, 2056)]:
        x = rng.standard_normal((tokens, cols), np.float32)
        values, indices, dense = pack.nm(rng, rows, cols, 2, 4, dtype)
        assert_close_sampled(_native.linear_nm(x, values, indices, 2, 4), x, dense, dtype)
        values, mask, row_start, dense = pack.bitmask(rng, rng.random((rows, cols)) < 0.4, dtype)
        assert_close_sampled(_native.linear_bitmask(x, values, mask, row_start), x, dense, dtype)


def assert_close_sampled(got, x, dense, dtype):
    """On 8 tokens and 40 rows, the last of each among them: the plain sum takes a while."""
    at = np.unique(np.linspace(0, len(x) - 1, 8).astype(int))
    rows = np.unique(np.linspace(0, len(dense) - 1, 40).astype(int))
    assert np.isfinite(got).all()
    assert_close(got[np.ix_(at, rows)], x[at], dense[rows], dtype=dtype)


def test_torch_tensors_of_every_type(pack):
    rng = np.random.default_rng(0)
    values, indices, _ = pack.nm(rng, 9, 64, 2, 4)
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    want = _native.linear_nm(x, values, indices, 2, 4)
    assert np.array_equal(_native.linear_nm(x, torch.from_numpy(values), torch.from_numpy(indices), 2, 4), want)
    half = torch.from_numpy(values).bfloat16()
    direct = _native.linear_nm(x, half, indices, 2, 4)
    assert np.array_equal(direct, _native.linear_nm(x, half.view(torch.uint16), indices, 2, 4))
    one = np.ascontiguousarray(x[:1])  # with more tokens, AVX-512 BF16 rounds them too
    assert np.array_equal(
        _native.linear_nm(one, half, indices, 2, 4), _native.linear_nm(one, half.float(), indices, 2, 4)
    )


def test_writes_out_and_nothing_around_it(pack):
    rng = np.random.default_rng(0)
    for tokens in (1, 3, 8, 9, 17, 130):
        for rows in (1, 3, 15, 17, 67):
            values, indices, dense = pack.nm(rng, rows, 36, 2, 4)
            keep = rng.random((rows, 36)) < 0.5
            b_values, mask, row_start, b_dense = pack.bitmask(rng, keep)
            x = rng.standard_normal((tokens, 36), np.float32)
            for run, want in [
                (lambda out, x=x, v=values, i=indices: _native.linear_nm(x, v, i, 2, 4, out=out), dense),
                (
                    lambda out, x=x, v=b_values, k=mask, r=row_start: _native.linear_bitmask(x, v, k, r, out=out),
                    b_dense,
                ),
            ]:
                guarded = np.full(tokens * rows + 128, 7.0, np.float32)
                y = guarded[64:-64].reshape(tokens, rows)
                y[:] = np.nan
                run(y)
                assert_close(y, x, want)
                assert (guarded[:64] == 7.0).all()
                assert (guarded[-64:] == 7.0).all()


def test_unaligned_inputs(pack):
    rng = np.random.default_rng(0)

    def shifted(array):
        raw = np.empty(array.nbytes + 1, np.uint8)
        raw[1:] = np.frombuffer(array.tobytes(), np.uint8)
        return raw[1:]

    values, indices, dense = pack.nm(rng, 19, 132, 2, 4)
    keep = rng.random((19, 131)) < 0.5
    b_values, mask, row_start, b_dense = pack.bitmask(rng, keep)
    for tokens in (1, 20):
        x = rng.standard_normal((tokens, 132), np.float32)
        moved = shifted(indices).reshape(indices.shape)
        assert_close(_native.linear_nm(x, values, moved, 2, 4), x, dense)
        moved = shifted(mask).reshape(mask.shape)
        x = np.ascontiguousarray(x[:, :131])
        assert_close(_native.linear_bitmask(x, b_values, moved, row_start), x, b_dense)


@pytest.mark.parametrize("tokens", [1, 7, 16, 200])
def test_result_does_not_depend_on_the_number_of_threads(pack, tokens):
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((tokens, 1024), np.float32)
    values, indices, _ = pack.nm(rng, 1000, 1024, 2, 4)
    keep = rng.random((1000, 1024)) < 0.5
    b_values, mask, row_start, _ = pack.bitmask(rng, keep)
    before = _native.num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            _native.set_num_threads(threads)
            assert _native.num_threads() == threads
            y = _native.linear_nm(x, values, indices, 2, 4), _native.linear_bitmask(x, b_values, mask, row_start)
            results.append(y)
    finally:
        _native.set_num_threads(before)
    for nm, bitmask in results[1:]:
        assert np.array_equal(nm, results[0][0])
        assert np.array_equal(bitmask, results[0][1])


@settings(deadline=None, max_examples=60)
@given(
    pattern=st.sampled_from(PATTERNS),
    rows=st.integers(0, 40),
    groups=st.integers(0, 20),
    tokens=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_nm_weight_equals_its_dense_form(pack, pattern, rows, groups, tokens, dtype, seed):
    rng = np.random.default_rng(seed)
    n, m = pattern
    values, indices, dense = pack.nm(rng, rows, groups * m, n, m, dtype)
    x = rng.integers(-4, 5, (tokens, groups * m)).astype(np.float32)
    assert_close(_native.linear_nm(x, values, indices, n, m), x, dense, dtype=dtype)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 100),
    tokens=st.integers(0, 20),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_bitmask_weight_equals_its_dense_form(pack, rows, cols, tokens, density, dtype, seed):
    rng = np.random.default_rng(seed)
    values, mask, row_start, dense = pack.bitmask(rng, rng.random((rows, cols)) < density, dtype)
    x = rng.integers(-4, 5, (tokens, cols)).astype(np.float32)
    assert_close(_native.linear_bitmask(x, values, mask, row_start), x, dense)
