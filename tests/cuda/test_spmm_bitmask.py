"""The bitmask kernels against float64, emulated."""

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
from packing import scattered
from sparsify_export.passes.dialect import linear_bitmask

F16 = HALVES[0]


def problem(M, N, K, x_type, w_type, density=0.5):
    """Activations, a packed weight, its dense form in float64, and a bias."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(M, K, generator=generator).to(x_type)
    weight = scattered(N, K, density)
    if N > 2:
        weight[N // 2] = 0
        weight[N // 2 - 1] = torch.randn(K, generator=generator)  # a row without zeros
    packed = linear_bitmask.pack(weight, w_type)
    return x, packed, weight.to(w_type).double(), torch.randn(N, generator=generator)


def check(kernels, name, M, N, K, types, bias=True, shift=0, density=0.5):
    x, packed, dense, add = problem(M, N, K, *types, density)
    add = add if bias else None
    if shift:
        values, mask, row_start = packed
        x, packed = shifted(x, shift), (shifted(values, shift), shifted(mask, shift), row_start)
    assert_linear(kernels.linear("spmm_bitmask_" + name, x, packed, add, N), x, dense, add)


@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 37), (3, 100, 8)])
def test_readable(kernels, types, shape):
    check(kernels, "readable", *shape, types)


@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 9])
def test_decode_shares_a_weight_among_any_number_of_tokens(kernels, types, M):
    check(kernels, "decode", M, 6, 288, types)


@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("K", [1, 7, 8, 9, 31, 32, 33, 255, 256, 257])
def test_decode_columns_at_the_edges_of_a_lane_and_a_warp(kernels, types, K):
    check(kernels, "decode", 2, 5, K, types, bias=False)


@pytest.mark.parametrize("types", HALVES)
@pytest.mark.parametrize("K", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 128, 192])
def test_prefill_columns_at_the_edges_of_a_tile(kernels, types, K):
    check(kernels, "prefill", 17, 30, K, types)


@pytest.mark.parametrize("types", HALVES)
@pytest.mark.parametrize("M", [1, 63, 64, 65])
@pytest.mark.parametrize("N", [1, 63, 64, 65])
def test_prefill_tokens_and_rows_at_the_edges_of_a_tile(kernels, types, M, N):
    check(kernels, "prefill", M, N, 96, types, bias=M != 64)


@pytest.mark.parametrize("density", [0.0, 0.1, 0.9, 1.0])
@pytest.mark.parametrize(("name", "types"), [("decode", F16), ("decode", PAIRS[2]), ("prefill", F16)])
def test_any_density(kernels, name, types, density):
    check(kernels, name, 5, 9, 130, types, density=density)


@pytest.mark.parametrize("shift", [1, 2, 4])
@pytest.mark.parametrize(("name", "types"), [("decode", F16), ("decode", PAIRS[2]), ("prefill", F16)])
def test_arrays_may_begin_anywhere(kernels, name, types, shift):
    check(kernels, name, 9, 33, 96, types, shift=shift)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("K", [37, 96])
@pytest.mark.parametrize(("name", "types"), [("readable", F16), ("decode", F16), ("decode", PAIRS[2])])
def test_infinities_and_nan_reach_what_keeps_their_column(kernels, name, types, K, bad):
    x, packed, dense, _ = problem(6, 40, K, *types)
    x[3, 5] = x[4, K - 1] = x[5, 0] = bad
    assert_not_finite_where_kept(kernels.linear("spmm_bitmask_" + name, x, packed, None, 40), x, dense != 0)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("K", [37, 96])
def test_prefill_multiplies_zeros_as_the_dense_product_does(kernels, K, bad):
    x, packed, dense, _ = problem(20, 40, K, *F16)
    x[3, 5] = x[17, K - 1] = x[18, 0] = bad
    got = kernels.linear("spmm_bitmask_prefill", x, packed, None, 40)
    assert torch.equal(got.isfinite(), (x.double() @ dense.T).isfinite())


@pytest.mark.parametrize("name", ["readable", "decode", "prefill"])
def test_no_columns_give_the_bias(kernels, name):
    x, packed, _, bias = problem(3, 2, 0, *F16)
    assert torch.equal(kernels.linear("spmm_bitmask_" + name, x, packed, bias, 2), bias.half().expand(3, 2))


@pytest.mark.parametrize("name", ["", "_readable", "_decode", "_prefill"])
@pytest.mark.parametrize(
    ("types", "sizes", "status"),
    [
        (F16, (0, 5, 9), SUCCESS),
        (F16, (5, 0, 9), SUCCESS),
        (F16, (-1, 1, 4), INVALID_VALUE),
        (F16, (1, -1, 4), INVALID_VALUE),
        (F16, (1, 1, -4), INVALID_VALUE),
        ((torch.bfloat16, torch.float16), (1, 1, 4), INVALID_VALUE),
    ],
)
def test_sizes_and_types(kernels, name, types, sizes, status):
    assert kernels.call("spmm_bitmask" + name, *types, None, None, None, None, None, None, *sizes) == status


@pytest.mark.parametrize(("M", "types", "name"), [(8, F16, "decode"), (9, F16, "prefill"), (9, PAIRS[3], "decode")])
def test_the_choice(kernels, M, types, name):
    x, packed, _, bias = problem(M, 8, 64, *types)
    chosen = kernels.linear("spmm_bitmask", x, packed, bias, 8)
    assert torch.equal(chosen, kernels.linear("spmm_bitmask_" + name, x, packed, bias, 8))
