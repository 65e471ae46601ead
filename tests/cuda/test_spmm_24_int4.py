"""The 2:4 kernels of 4-bit weights and the quantisation of their activations, emulated."""

import ctypes

import pytest
import torch
from cuda_emulated import INVALID_VALUE, SUCCESS, Output, shifted
from packing import sparse_nm
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_nm_int4
from sparsify_export.passes.dialect.storage import quantise_tokens
from sparsify_export.passes.equivalence import compare

PATTERN = NM(2, 4)
TYPES = [torch.float16, torch.bfloat16, torch.float32]


def pitch(K):
    return -(-K // 16) * 16


def quantised(kernels, x):
    """Codes and steps of the kernel."""
    codes, steps = Output((len(x), pitch(x.shape[1])), torch.int8), Output((len(x),), torch.float32)
    return kernels.run("quantise_tokens", x.dtype, x, codes, steps, *x.shape)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("K", [1, 15, 16, 17, 255, 256, 257])
def test_tokens_are_quantised_as_the_dialect_says(kernels, dtype, K):
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(K)).to(dtype)
    x[2] = 0
    x[3, K // 2] = 1000
    codes, steps = quantised(kernels, x)
    assert (codes[:, K:] == 0).all()
    assert torch.equal(codes[:, :K].double() * steps.double()[:, None], quantise_tokens(x.double()))


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", TYPES)
def test_a_token_that_is_not_finite_has_the_step_nan(kernels, dtype, bad):
    x = torch.ones(3, 300, dtype=dtype)
    x[1, 299] = bad
    codes, steps = quantised(kernels, x)
    assert steps.isnan().tolist() == [False, True, False]
    assert (codes[1] == 0).all()


def test_steps_below_the_normal_numbers_count_as_zero(kernels):
    tiny = torch.finfo(torch.float32).tiny
    x = torch.tensor([[tiny * 126], [tiny * 128]])
    codes, steps = quantised(kernels, x)
    assert steps.tolist() == [0.0, float(x[1, 0] / 127)]
    assert codes[:, 0].tolist() == [0, 127]


def test_quantising_nothing(kernels):
    assert kernels.call("quantise_tokens", torch.float16, None, None, None, 0, 5) == SUCCESS
    _, steps = quantised(kernels, torch.empty(2, 0))
    assert steps.tolist() == [0.0, 0.0]
    assert kernels.call("quantise_tokens", torch.float16, None, None, None, -1, 5) == INVALID_VALUE
    assert kernels.call("quantise_tokens", ctypes.c_int32(3), None, None, None, 1, 5) == INVALID_VALUE


def check(kernels, name, M, N, K, group, dtype, bias=True, shift=0):
    generator = torch.Generator().manual_seed(2)
    weight = sparse_nm(N, K // 4, PATTERN, dead=0.1)
    if N > 2:
        weight[N // 2] = 0
    packed = linear_nm_int4.pack(weight, PATTERN, group)
    dense = linear_nm_int4.unpack(*packed, PATTERN, group, K).double()
    x = torch.randn(M, K, generator=generator).to(dtype)
    add = torch.randn(N, generator=generator) if bias else None
    codes, steps = quantised(kernels, x)
    values, indices, scales = packed
    if shift:
        codes, values, indices = shifted(codes, 0), shifted(values, shift), shifted(indices, shift)
    y = Output((M, N), dtype)
    got = kernels.run(name, dtype, codes, steps, values, indices, scales, add, y, M, N, K, ctypes.c_int32(group))
    tokens = quantise_tokens(x.double())
    exact, plain = tokens @ dense.T, tokens.float() @ dense.float().T
    if bias:
        exact, plain = exact + add, plain + add
    closeness = compare(got, plain.to(dtype), exact)
    assert closeness.ok, str(closeness)


@pytest.mark.parametrize("name", ["spmm_24_int4", "spmm_24_int4_readable"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("K", [4, 28, 32, 36, 160, 1024, 1060])
def test_columns_at_the_edges_of_a_lane_a_group_and_a_warp(kernels, name, dtype, group, K):
    check(kernels, name, 2, 5, K, group, dtype)


@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 9])
@pytest.mark.parametrize("dtype", TYPES)
def test_decode_shares_a_weight_among_any_number_of_tokens(kernels, M, dtype):
    check(kernels, "spmm_24_int4", M, 6, 192, 64, dtype, bias=M != 3)


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_arrays_may_begin_anywhere(kernels, shift):
    check(kernels, "spmm_24_int4", 9, 6, 192, 32, torch.float16, shift=shift)


@pytest.mark.parametrize("name", ["spmm_24_int4", "spmm_24_int4_readable"])
def test_a_token_that_is_not_finite_gives_nan_in_every_row(kernels, name):
    packed = linear_nm_int4.pack(sparse_nm(7, 16, PATTERN), PATTERN, 32)
    x = torch.ones(4, 64)
    x[2, 63] = float("inf")
    codes, steps = quantised(kernels, x)
    y = Output((4, 7), torch.float32)
    got = kernels.run(name, torch.float32, codes, steps, *packed, None, y, 4, 7, 64, ctypes.c_int32(32))
    assert got.isnan().all(dim=1).tolist() == [False, False, True, False]
    assert got[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("name", ["spmm_24_int4", "spmm_24_int4_readable"])
@pytest.mark.parametrize(
    ("sizes", "group", "status"),
    [
        ((0, 5, 32), 32, SUCCESS),
        ((5, 0, 32), 32, SUCCESS),
        ((1, 1, 6), 32, INVALID_VALUE),
        ((1, 1, 32), 16, INVALID_VALUE),
        ((-1, 1, 32), 32, INVALID_VALUE),
    ],
)
def test_sizes_and_groups(kernels, name, sizes, group, status):
    nothing = [None] * 7
    assert kernels.call(name, torch.float16, *nothing, *sizes, ctypes.c_int32(group)) == status
