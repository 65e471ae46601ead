"""The 2:4 kernels against float64, emulated."""

import ctypes

import pytest
import torch
from cuda_emulated import (
    HALVES,
    INVALID_VALUE,
    PAIRS,
    SUCCESS,
    assert_linear,
    assert_not_finite_where_kept,
    shifted,
)
from packing import sparse_nm
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_nm

PATTERN = NM(2, 4)
F16 = HALVES[0]


def problem(M, N, K, x_type, w_type, seed=0):
    """Activations, a packed weight, its dense form in float64, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=generator).to(x_type)
    weight = sparse_nm(N, K // 4, PATTERN, seed, dead=0.1)
    if N > 2:
        weight[N // 2] = 0  # a row of nothing but zeros
    packed = linear_nm.pack(weight, PATTERN, w_type)
    return x, packed, weight.to(w_type).double(), torch.randn(N, generator=generator)


def check(kernels, name, M, N, K, types, bias=True, shift=0):
    x, packed, dense, add = problem(M, N, K, *types)
    add = add if bias else None
    if shift:
        x, packed = shifted(x, shift), tuple(shifted(t, shift) for t in packed)
    assert_linear(kernels.linear("spmm_24_" + name, x, packed, add, N), x, dense, add)


@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 5, 36), (3, 100, 8)])
def test_readable(kernels, types, shape):
    check(kernels, "readable", *shape, types)


@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 9])
def test_decode_shares_a_weight_among_any_number_of_tokens(kernels, types, M):
    check(kernels, "decode", M, 6, 544, types)


@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("K", [4, 8, 12, 16, 20, 28, 32, 36, 508, 512, 516])
def test_decode_columns_at_the_edges_of_a_lane_and_a_warp(kernels, types, K):
    check(kernels, "decode", 2, 5, K, types, bias=False)


@pytest.mark.parametrize("types", HALVES)
@pytest.mark.parametrize("K", [4, 8, 12, 16, 20, 60, 64, 68, 96, 100, 128, 192])
def test_prefill_columns_at_the_edges_of_a_tile(kernels, types, K):
    check(kernels, "prefill", 17, 30, K, types)


@pytest.mark.parametrize("types", HALVES)
@pytest.mark.parametrize("M", [1, 63, 64, 65])
@pytest.mark.parametrize("N", [1, 127, 128, 129])
def test_prefill_tokens_and_rows_at_the_edges_of_a_tile(kernels, types, M, N):
    check(kernels, "prefill", M, N, 96, types, bias=M != 64)


@pytest.mark.parametrize("types", HALVES)
@pytest.mark.parametrize("K", [4, 12, 16, 20, 32, 60, 64, 96, 224, 256, 288, 516, 1056, 1312])
def test_few_columns_at_the_edges_of_a_step_and_of_the_warps(kernels, types, K):
    """32 columns are half of a step, 256 one step of all four warps, 1024 all their stages."""
    check(kernels, "few", 5, 30, K, types)


@pytest.mark.parametrize("types", HALVES)
@pytest.mark.parametrize("M", [1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64])
@pytest.mark.parametrize("N", [1, 17, 31, 32, 33])
def test_few_tokens_and_rows_at_the_edges_of_a_tile(kernels, types, M, N):
    check(kernels, "few", M, N, 352, types, bias=M != 16)


@pytest.mark.parametrize("shift", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "types"), [("decode", F16), ("decode", PAIRS[2]), ("few", F16), ("few", HALVES[1]), ("prefill", F16)]
)
def test_arrays_may_begin_anywhere(kernels, name, types, shift):
    check(kernels, name, 9, 33, 96, types, shift=shift)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("K", [36, 96])
@pytest.mark.parametrize(
    ("name", "types"), [("readable", F16), ("decode", F16), ("decode", PAIRS[2]), ("few", F16), ("prefill", F16)]
)
def test_infinities_and_nan_reach_what_keeps_their_column(kernels, name, types, K, bad):
    x, packed, _, _ = problem(20, 40, K, *types)
    x[3, 5] = x[17, K - 1] = x[18, 0] = bad
    kept = linear_nm.unpack(torch.ones_like(packed[0]), packed[1], PATTERN) != 0
    got = kernels.linear("spmm_24_" + name, x, packed, None, 40)
    assert_not_finite_where_kept(got, x, kept)


@pytest.mark.parametrize("name", ["readable", "decode", "few", "prefill"])
def test_no_columns_give_the_bias(kernels, name):
    x, packed, _, bias = problem(3, 5, 0, *F16)
    assert torch.equal(kernels.linear("spmm_24_" + name, x, packed, bias, 5), bias.half().expand(3, 5))
    assert (kernels.linear("spmm_24_" + name, x, packed, None, 5) == 0).all()


@pytest.mark.parametrize("name", ["", "_readable", "_decode", "_few", "_prefill"])
@pytest.mark.parametrize(("M", "N"), [(0, 5), (5, 0)])
def test_no_tokens_or_rows_is_nothing_to_do(kernels, name, M, N):
    status = kernels.call("spmm_24" + name, *F16, None, None, None, None, None, M, N, 64)
    assert status == SUCCESS


@pytest.mark.parametrize("name", ["", "_readable", "_decode", "_few", "_prefill"])
@pytest.mark.parametrize(
    ("types", "sizes"),
    [
        (F16, (1, 1, 6)),
        (F16, (-1, 1, 4)),
        (F16, (1, -1, 4)),
        (F16, (1, 1, -4)),
        ((torch.float16, torch.bfloat16), (1, 1, 4)),
        ((torch.float16, torch.float32), (1, 1, 4)),
        ((ctypes.c_int32(3), ctypes.c_int32(3)), (1, 1, 4)),
    ],
)
def test_what_does_not_exist_is_refused(kernels, name, types, sizes):
    assert kernels.call("spmm_24" + name, *types, None, None, None, None, None, *sizes) == INVALID_VALUE


@pytest.mark.parametrize("name", ["few", "prefill"])
def test_tensor_cores_refuse_float32(kernels, name):
    assert kernels.call(f"spmm_24_{name}", *PAIRS[2], None, None, None, None, None, 1, 1, 4) == INVALID_VALUE


@pytest.mark.parametrize(
    ("M", "types", "name"),
    [
        (1, F16, "decode"),
        (2, F16, "few"),
        (64, F16, "few"),
        (65, F16, "prefill"),
        (9, PAIRS[3], "decode"),
    ],
)
def test_the_choice(kernels, M, types, name):
    x, packed, _, bias = problem(M, 8, 64, *types)
    chosen = kernels.linear("spmm_24", x, packed, bias, 8)
    assert torch.equal(chosen, kernels.linear("spmm_24_" + name, x, packed, bias, 8))
