"""Kernels that are broken on purpose must fail the checks that the real ones pass."""

import cuda_emulated
import pytest
import torch
from cuda_emulated import ROOT, assert_linear
from packing import scattered, sparse_nm
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_bitmask, linear_nm

FILES = [ROOT / "tests/cuda/emulator.cu", *(ROOT / f"cuda/spmm_{name}_prefill.cu" for name in ("24", "bitmask"))]
FAILS = r"max error|the order of the threads matters"


def build(what):
    return cuda_emulated.build(FILES, ["-O0", "-include", str(ROOT / f"tests/cuda/broken_{what}.h")])


def check(kernels, name):
    """Three steps of a tile, in fp16."""
    x = torch.randn(17, 192, generator=torch.Generator().manual_seed(0)).half()
    if name == "24":
        weight = sparse_nm(30, 48, NM(2, 4))
        packed = linear_nm.pack(weight, NM(2, 4), torch.float16)
    else:
        weight = scattered(30, 192)
        packed = linear_bitmask.pack(weight, torch.float16)
    got = kernels.linear(f"spmm_{name}_prefill", x, packed, None, 30)
    assert_linear(got, x, weight.half().double())


@pytest.mark.parametrize("name", ["24", "bitmask"])
def test_the_check_passes_what_is_not_broken(kernels, name):
    check(kernels, name)


def test_two_metadata_positions_swapped():
    broken = build("metadata")
    with pytest.raises(AssertionError, match="max error"):
        check(broken, "24")
    check(broken, "bitmask")


@pytest.mark.parametrize("what", ["wait", "barrier"])
def test_nobody_waits(what):
    broken = build(what)
    for name in ("24", "bitmask"):
        with pytest.raises(AssertionError, match=FAILS):
            check(broken, name)
