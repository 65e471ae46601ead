"""The emulator itself: numbers, warps, and that it notices what a GPU would not forgive."""

import subprocess
import sys

import pytest
import torch
from cuda_emulated import ROOT, SUCCESS
from packing import scattered, sparse_nm
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_bitmask, linear_nm


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_numbers_are_those_of_torch(kernels, dtype):
    count = 1 << 16
    narrow = torch.arange(count, dtype=torch.int32).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 1 << 32, (count,), generator=generator)
    numbers = bits.to(torch.uint32).view(torch.float32).clone()
    numbers[: count // 2] = torch.randn(count // 2, generator=generator) * 2.0 ** torch.randint(
        -28, 18, (count // 2,), generator=generator
    )
    ties = narrow[:-1].float() / 2 + narrow[1:].float() / 2  # halfway between neighbours
    numbers[: len(ties) : 7] = ties[::7]
    wide, back = torch.empty(count), torch.empty(count, dtype=dtype)
    assert kernels.call("test_convert", dtype, narrow, wide, numbers, back, count) == SUCCESS
    assert torch.equal(wide.nan_to_num(0.125), narrow.float().nan_to_num(0.125))
    assert torch.equal(wide.isnan(), narrow.isnan())
    wanted = numbers.to(dtype)
    assert torch.equal(back.isnan(), wanted.isnan())
    number = ~wanted.isnan()
    assert torch.equal(back[number].view(torch.int16), wanted[number].view(torch.int16))


def test_shuffles_and_votes(kernels):
    numbers = torch.arange(32, dtype=torch.int32) * 3 - 30
    source = torch.arange(32, dtype=torch.int32).flip(0).contiguous()
    got = torch.empty(32, 5, dtype=torch.int32)
    assert kernels.call("test_warp", numbers, source, got) == SUCCESS
    lanes = torch.arange(32)
    assert torch.equal(got[:, 0], numbers.flip(0))
    assert torch.equal(got[:, 1], numbers[lanes ^ 5])
    assert torch.equal(got[:, 2], torch.where(lanes < 3, numbers, numbers[(lanes - 3).clamp(min=0)]))
    assert {vote & 0xFFFFFFFF for vote in got[:, 3].tolist()} == {0xFFFFF800}  # lanes 11 to 31
    assert set(got[:, 4].tolist()) == {1}


def test_every_thread_of_every_block_runs_once(kernels):
    total = torch.zeros(1, dtype=torch.int32)
    assert kernels.call("test_count", total) == SUCCESS
    assert total.item() == 3 * 2 * 2 * 64


def test_byte_permutation_and_dot_product(kernels):
    words = torch.zeros(32, 3, dtype=torch.int64)
    words[0] = torch.tensor([0x33221100, 0x77665544, 0x7610])
    words[1] = torch.tensor([0x01FF02FE, 0x037F0480, 100])  # 1 * 3 - 1 * 127 + 2 * 4 - 2 * -128
    permuted, products = (torch.empty(32, dtype=torch.int32) for _ in range(2))
    assert kernels.call("test_bytes", words.to(torch.uint32), permuted, products) == SUCCESS
    assert permuted[0].item() == 0x77661100
    assert products[1].item() == 100 + 3 - 127 + 8 + 256


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("wrong_leaves", "wait at a barrier that others never reach"),
        ("wrong_indices", "the two indices of a group do not ascend"),
        ("wrong_copy", "cp.async: an address that is not a multiple of its size"),
        ("wrong_matrix", "ldmatrix: an address that is not a multiple of 16"),
        ("wrong_block", "a block must be whole warps"),
    ],
)
def test_it_aborts_and_says_why(kernels, name, why):
    code = f"import ctypes; ctypes.CDLL({kernels.library._name!r}).sparsify_{name}()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode < 0
    assert why in done.stderr


def test_bank_conflicts_are_counted(kernels):
    """Rows of 64 bytes lie in two sets of banks, so four of eight wait in a row: three more turns for each matrix."""
    library = kernels.library
    counts = [library.sparsify_emulate_matrices, library.sparsify_emulate_conflicts]
    before = [count() for count in counts]
    assert library.sparsify_conflicts() == SUCCESS
    assert [count() - was for count, was in zip(counts, before, strict=True)] == [4, 12]


@pytest.mark.parametrize(
    ("name", "tokens"), [("24_few", 8), ("24_few", 16), ("24_few", 32), ("24_prefill", 64), ("bitmask_prefill", 64)]
)
def test_no_kernel_reads_matrices_with_bank_conflicts(kernels, name, tokens):
    x = torch.zeros(tokens, 512).half()
    if name == "bitmask_prefill":
        packed = linear_bitmask.pack(scattered(128, 512), torch.float16)
    else:
        packed = linear_nm.pack(sparse_nm(128, 128, NM(2, 4)), NM(2, 4), torch.float16)
    before = [kernels.library.sparsify_emulate_matrices(), kernels.library.sparsify_emulate_conflicts()]
    kernels.linear(f"spmm_{name}", x, packed, None, 128)
    assert kernels.library.sparsify_emulate_matrices() > before[0]
    assert kernels.library.sparsify_emulate_conflicts() == before[1]


@pytest.mark.parametrize(("tokens", "kib"), [(8, 52), (16, 68), (32, 75)])
def test_shared_memory_that_is_asked_for_is_what_the_docs_say_and_every_gpu_has(kernels, tokens, kib):
    packed = linear_nm.pack(sparse_nm(32, 64, NM(2, 4)), NM(2, 4), torch.float16)
    kernels.linear("spmm_24_few", torch.zeros(tokens, 256).half(), packed, None, 32)
    assert kernels.library.sparsify_emulate_dynamic_shared() == kib << 10
    assert kib <= 99
    page = (ROOT / "docs/gpu.md").read_text()
    assert "52, 68 or 75 KiB" in page


def test_a_block_that_is_too_large_is_an_error(kernels):
    assert kernels.library.sparsify_too_many_threads() == 9  # cudaErrorInvalidConfiguration
