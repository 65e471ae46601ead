"""The gather against indexing, emulated."""

import ctypes

import pytest
import torch
from cuda_emulated import INVALID_VALUE, SUCCESS, Output


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("M", "K_in", "K_out"), [(1, 1, 1), (3, 255, 256), (2, 300, 257), (5, 7, 3), (4, 9, 0), (0, 9, 9)]
)
def test_bits_are_copied(kernels, dtype, M, K_in, K_out):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, K_in, generator=generator).to(dtype)
    x[:1, :1] = float("nan")
    index = torch.randint(0, K_in, (K_out,), generator=generator)
    y = Output((M, K_out), dtype)
    got = kernels.run("gather_channels", ctypes.c_int32(dtype.itemsize), x, index, y, M, K_in, K_out)
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert torch.equal(got.view(bits), x[:, index].view(bits))


@pytest.mark.parametrize(
    ("width", "sizes", "status"),
    [(1, (1, 1, 1), INVALID_VALUE), (2, (-1, 1, 1), INVALID_VALUE), (2, (1, 0, 0), SUCCESS)],
)
def test_sizes(kernels, width, sizes, status):
    assert kernels.call("gather_channels", ctypes.c_int32(width), None, None, None, *sizes) == status
