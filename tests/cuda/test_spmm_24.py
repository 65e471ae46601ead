"""The 2:4 kernels against float64, emulated."""

import pytest
import torch
from cuda_emulated import INVALID_VALUE, SUCCESS, Output, shifted
from packing import sparse_nm
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_nm
from sparsify_export.passes.equivalence import compare

PATTERN = NM(2, 4)
PAIRS = [
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
]
HALVES = PAIRS[:2]


def problem(M, N, K, x_type, w_type, seed=0):
    """Activations, a packed weight, its dense form in float64, and a bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(M, K, generator=generator).to(x_type)
    weight = sparse_nm(N, K // 4, PATTERN, seed, dead=0.1)
    if N > 2:
        weight[N // 2] = 0  # a row of nothing but zeros
    packed = linear_nm.pack(weight, PATTERN, w_type)
    return x, packed, weight.to(w_type).double(), torch.randn(N, generator=generator)


def assert_linear(got, x, dense, bias):
    """At most twice as wrong as the plain product in x's dtype with float32 sums."""
    exact = x.double() @ dense.T
    plain = x.float() @ dense.float().T
    if bias is not None:
        exact, plain = exact + bias, plain + bias
    closeness = compare(got, plain.to(x.dtype), exact)
    assert closeness.ok, str(closeness)


def check(kernels, name, M, N, K, types, bias=True, shift=0):
    x, packed, dense, add = problem(M, N, K, *types)
    add = add if bias else None
    if shift:
        x, packed = shifted(x, shift), tuple(shifted(t, shift) for t in packed)
    assert_linear(kernels.linear(name, x, packed, add, N), x, dense, add)


@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 5, 36)])
def test_readable(kernels, types, shape):
    check(kernels, "spmm_24_readable", *shape, types)


@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 9])
def test_decode_tokens(kernels, types, M):
    check(kernels, "spmm_24_decode", M, 6, 544, types)


@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("K", [4, 8, 12, 16, 20, 28, 32, 36, 508, 512, 516])
def test_decode_columns(kernels, types, K):
    check(kernels, "spmm_24_decode", 2, 5, K, types, bias=False)


@pytest.mark.parametrize("types", HALVES)
@pytest.mark.parametrize("K", [4, 8, 12, 16, 20, 60, 64, 68, 96, 100, 128, 192])
def test_prefill_columns(kernels, types, K):
    check(kernels, "spmm_24_prefill", 17, 30, K, types)


@pytest.mark.parametrize("types", HALVES)
@pytest.mark.parametrize("M", [1, 63, 64, 65])
@pytest.mark.parametrize("N", [1, 127, 128, 129])
def test_prefill_tile_edges(kernels, types, M, N):
    check(kernels, "spmm_24_prefill", M, N, 96, types, bias=M != 64)


@pytest.mark.parametrize("shift", [1, 2, 4])
@pytest.mark.parametrize(("name", "types"), [("decode", PAIRS[0]), ("decode", PAIRS[2]), ("prefill", PAIRS[0])])
def test_arrays_that_begin_anywhere(kernels, name, types, shift):
    check(kernels, f"spmm_24_{name}", 9, 33, 96, types, shift=shift)
