"""Kernels that are broken on purpose must fail the checks that the real ones pass."""

import cuda_emulated
import pytest
import torch
from cuda_emulated import ROOT, assert_linear
from packing import scattered, sparse_nm
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_bitmask, linear_nm

KERNELS = ("24_prefill", "24_few", "bitmask_prefill")
FILES = [ROOT / "tests/cuda/emulator.cu", *(ROOT / f"cuda/spmm_{name}.cu" for name in KERNELS)]
FAILS = r"max error|the order of the threads matters"


def build(what):
    return cuda_emulated.build(FILES, ["-O0", "-include", str(ROOT / f"tests/cuda/broken_{what}.h")])


def check(kernels, name):
    """Three steps of a tile, or of a warp, in fp16."""
    x = torch.randn(17, 768, generator=torch.Generator().manual_seed(0)).half()
    if name.startswith("24"):
        weight = sparse_nm(30, 192, NM(2, 4))
        packed = linear_nm.pack(weight, NM(2, 4), torch.float16)
    else:
        weight = scattered(30, 768)
        packed = linear_bitmask.pack(weight, torch.float16)
    got = kernels.linear(f"spmm_{name}", x, packed, None, 30)
    assert_linear(got, x, weight.half().double())


@pytest.mark.parametrize("name", KERNELS)
def test_the_check_passes_what_is_not_broken(kernels, name):
    check(kernels, name)


def test_two_metadata_positions_swapped():
    broken = build("metadata")
    for name in ("24_prefill", "24_few"):
        with pytest.raises(AssertionError, match="max error"):
            check(broken, name)
    check(broken, "bitmask_prefill")


@pytest.mark.parametrize("what", ["wait", "barrier"])
def test_nobody_waits(what):
    broken = build(what)
    for name in KERNELS:
        with pytest.raises(AssertionError, match=FAILS):
            check(broken, name)


def test_lanes_do_not_wait():
    """Only one kernel's warps work by themselves."""
    broken = build("warp")
    with pytest.raises(AssertionError, match=FAILS):
        check(broken, "24_few")
    check(broken, "24_prefill")
