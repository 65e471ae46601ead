"""sparsify_export._cuda and the torch ops on it, with the emulated kernels in the place of the GPU's."""

import importlib.util
from contextlib import contextmanager

import pytest
import torch
from cuda_emulated import PAIRS, assert_linear
from packing import scattered, sparse_nm
from sparsify_export.calibrate import gpu, ranked
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import gpu as linears
from sparsify_export.passes.dialect import linear_bitmask, linear_nm, linear_nm_int4

TWO_FOUR = NM(2, 4)


@pytest.fixture
def on_gpu(cuda, monkeypatch):
    """The torch ops find the emulated kernels, and the CPU's memory is the GPU's."""

    @contextmanager
    def emulated(tensor):
        yield cuda, 0

    monkeypatch.setattr(gpu, "kernels", emulated)
    monkeypatch.setattr(linears, "kernels", emulated)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("types", PAIRS)
@pytest.mark.parametrize("shape", [(3, 36), (2, 9, 64), (64,), (0, 8)])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.float16])
def test_linears(on_gpu, types, shape, bias):
    x, K = normal(*shape, dtype=types[0]), shape[-1]
    add = None if bias is None else normal(7, seed=1).to(bias)
    two_four, scatter = sparse_nm(7, K // 4, TWO_FOUR), scattered(7, K)
    for weight, y in (
        (two_four, linears.linear_24(x, *linear_nm.pack(two_four, TWO_FOUR, types[1]), add, 2, 4)),
        (scatter, linears.linear_bitmask(x, *linear_bitmask.pack(scatter, types[1]), add, K)),
    ):
        assert (y.shape, y.dtype) == ((*shape[:-1], 7), types[0])
        dense = weight.to(types[1]).double()
        assert_linear(y.reshape(-1, 7), x.reshape(-1, K), dense, None if add is None else add.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_int4_agrees_with_the_cpu(on_gpu, dtype):
    x, weight, bias = normal(2, 5, 68, dtype=dtype), sparse_nm(7, 17, TWO_FOUR), normal(7)
    packed = linear_nm_int4.pack(weight, TWO_FOUR, 32)
    y = linears.linear_24_int4(x, *packed, bias, 2, 4, 32, 68)
    wanted = linear_nm_int4.linear_nm_int4(x.float(), *packed, bias, 2, 4, 32, 68)
    torch.testing.assert_close(y, wanted.to(dtype))


def test_x_may_be_a_view_and_may_want_a_gradient(on_gpu):
    x, weight = normal(64, 3).requires_grad_(), sparse_nm(7, 16, TWO_FOUR)
    values, indices = linear_nm.pack(weight, TWO_FOUR, torch.float32)
    y = linears.linear_24(x.T, values, indices, normal(7).requires_grad_(), 2, 4)
    assert_linear(y, x.detach().T, weight.double(), normal(7))


@pytest.mark.parametrize("beta_rows", [4, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [torch.tensor([3]), torch.tensor([0, 40, 7, 20], dtype=torch.int32)])
def test_rate_mask_agrees_with_the_cpu(on_gpu, beta_rows, dtype, counts):
    weight, grad, rank = (
        normal(4, 40, dtype=dtype),
        normal(4, 40, dtype=dtype, seed=1),
        ranked.ranks(normal(4, 40, seed=2)),
    )
    beta = torch.rand(beta_rows, 11)
    assert torch.equal(ranked.rate_mask_gpu(weight, rank, beta, counts), ranked.rate_mask(weight, rank, beta, counts))
    for rows, for_weight in ((beta_rows, True), (0, True), (beta_rows, False)):
        given = (grad, weight, rank, counts, rows, 11, for_weight)
        for got, wanted in zip(ranked.rate_mask_backward_gpu(*given), ranked.rate_mask_backward(*given), strict=True):
            torch.testing.assert_close(
                got, wanted.to(got.dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
            )


def test_gather(cuda):
    x, index, y = normal(3, 9), torch.tensor([8, 0, 4]), torch.empty(3, 3)
    cuda.gather_channels(x, index, y, 0)
    assert torch.equal(y, x[:, index])


@pytest.mark.parametrize("version", ["readable", "decode", "few", "prefill"])
def test_versions(cuda, version):
    x, y = normal(9, 64, dtype=torch.float16), torch.empty(9, 7, dtype=torch.float16)
    weight = sparse_nm(7, 16, NM(2, 4))
    cuda.spmm_24(x, *linear_nm.pack(weight, NM(2, 4), torch.float16), None, y, 0, version)
    assert_linear(y, x, weight.half().double())
    if version != "few":
        weight = scattered(7, 64)
        cuda.spmm_bitmask(x, *linear_bitmask.pack(weight, torch.float16), None, y, 0, version)
        assert_linear(y, x, weight.half().double())


F16 = torch.float16


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"x": torch.zeros(3, 36, dtype=torch.int32)}, "x must be float32, float16 or bfloat16"),
        ({"x": torch.zeros(36, 3, dtype=F16).T}, "x must be contiguous"),
        ({"x": torch.zeros(36, dtype=F16)}, r"x must have two dimensions, got shape \[36\]"),
        ({"x": torch.zeros(3, 36)}, "y must have the type of x"),
        ({"values": torch.zeros(7, 18, dtype=torch.bfloat16)}, "no such combination of types and sizes"),
        ({"values": torch.zeros(7, 17, dtype=F16)}, r"values must have shape \[7, 18\], got \[7, 17\]"),
        ({"indices": torch.zeros(7, 5, dtype=torch.int8)}, "indices has the wrong element type"),
        ({"indices": torch.zeros(7, 4, dtype=torch.uint8)}, r"indices must have shape \[7, 5\], got \[7, 4\]"),
        ({"bias": torch.zeros(6)}, r"bias must have shape \[7\], got \[6\]"),
        ({"bias": torch.zeros(7, dtype=F16)}, "bias has the wrong element type"),
        ({"y": torch.zeros(3, 6, dtype=F16)}, r"y must have shape \[3, 7\], got \[3, 6\]"),
        ({"version": "fast"}, "version must be one of '', 'readable', 'decode', 'few', 'prefill', got 'fast'"),
    ],
)
def test_refusals(cuda, change, why):
    given = {
        "x": torch.zeros(3, 36, dtype=F16),
        "values": torch.zeros(7, 18, dtype=F16),
        "indices": torch.zeros(7, 5, dtype=torch.uint8),
        "bias": None,
        "y": torch.zeros(3, 7, dtype=F16),
        "stream": 0,
    }
    with pytest.raises(ValueError, match=why):
        cuda.spmm_24(**given | change)


def test_other_patterns_are_refused(on_gpu):
    with pytest.raises(ValueError, match="have the pattern 2:4, got 1:4"):
        linears.linear_24(torch.zeros(1, 4), torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.uint8), None, 1, 4)
    with pytest.raises(ValueError, match=r"x must have shape \[\.\.\., 8\] to match the weight, got \[1, 4\]"):
        linears.linear_24(torch.zeros(1, 4), torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.uint8), None, 2, 4)


def test_without_gpu_kernels():
    if importlib.util.find_spec("sparsify_export._cuda"):
        pytest.skip("this installation has GPU kernels")
    with pytest.raises(ImportError, match="SPARSIFY_CUDA=ON builds them"), gpu.kernels(torch.zeros(1)):
        pass


def test_torch_has_a_kernel_for_cuda_of_every_op():
    for name in ("linear_nm", "linear_nm_int4", "linear_bitmask", "rate_mask", "rate_mask_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsify::{name}", "CUDA"), name


def test_rate_mask_is_an_operator_by_torchs_own_check():
    weight, rank = normal(3, 8).requires_grad_(), ranked.ranks(normal(3, 8))
    beta, counts = torch.rand(3, 5, requires_grad=True), torch.tensor([3])
    torch.library.opcheck(ranked.rate_mask, (weight, rank, beta, counts))
    torch.library.opcheck(ranked.rate_mask_backward, (normal(3, 8), weight.detach(), rank, counts, 3, 5, True))
