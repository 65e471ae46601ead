"""Each instruction of cuda/ptx.cuh against fragments worked out by hand from the tables of the PTX ISA.

A lane is 4 g + j. Entries are (lane, register, half) of an operand and (lane, element) of D.
"""

import ctypes

import pytest
import torch
from cuda_emulated import HALVES, SUCCESS

TYPES = [types[0] for types in HALVES]
FIRST_TWO = 0x44444444
"""Metadata in which every group keeps its places 0 and 1."""


def halves(dtype, entries, registers):
    """Registers of a warp ``[32, registers]`` with numbers at (lane, register, half), 0 elsewhere."""
    numbers = torch.zeros(32, registers, 2, dtype=dtype)
    for lane, register, half, number in entries:
        numbers[lane, register, half] = number
    return numbers.view(torch.int32).reshape(32, registers)


def only(lane, element, number, rest=0.5):
    """D with one number, and what C was elsewhere."""
    wanted = torch.full((32, 4), rest)
    wanted[lane, element] = number
    return wanted


# A [row, k] = 2, B [k, column] = 3, and so D [row, column] = 6 + C.
MMA = [
    # row 0, k 0, column 0
    ((0, 0, 0), (0, 0, 0), (0, 0)),
    # row 0, k 1, column 1: the upper half of the same registers; column 1 begins the second quad of B
    ((0, 0, 1), (4, 0, 1), (0, 1)),
    # row 9 = 1 + 8: register 1; k 5 = 2 * 2 + 1: j = 2; column 6: quad 6 of B, and j = 3 of D
    ((6, 1, 1), (26, 0, 1), (7, 2)),
    # row 7, k 8: register 2, j = 0; B's second register; column 2 = 2 * 1
    ((28, 2, 0), (8, 1, 0), (29, 0)),
    # row 15, k 15, column 7: the last of everything
    ((31, 3, 1), (31, 1, 1), (31, 3)),
]

# The same with the position in a group that the metadata gives: k = 4 group + position.
# A's slot, (lane whose metadata, shift, code), B's slot, D's slot.
MMA_SP = [
    # row 0, kept 0 = first of group 0, at 2: k 2 = 2 * 1, column 0
    ((0, 0, 0), (0, 0, 0b1110), (1, 0, 0), (0, 0)),
    # row 0, kept 1 = second of group 0, at 3: k 3, column 4: quad 4 of B, j = 2 of D
    ((0, 0, 1), (0, 0, 0b1110), (17, 0, 1), (2, 0)),
    # row 9, kept 4 (register 1, j = 2) = first of group 2, at 1: k 9 = 8 + 2 * 0 + 1; column 3
    # row 9 is in the upper 16 bits of quad 1, group 2 in its bits 8 .. 11
    ((6, 1, 0), (4, 24, 0b1101), (12, 1, 1), (5, 3)),
    # row 2, kept 9 (register 2, j = 0) = second of group 4, at 2: k 18 = 16 + 2 * 1, column 7
    # group 4 is in columns 16 .. 31: the quad's second lane, its first bits
    ((8, 2, 1), (9, 0, 0b1001), (29, 2, 0), (11, 1)),
    # row 15, kept 15 = second of group 7, at 3: k 31, column 7: the last of everything
    ((31, 3, 1), (29, 28, 0b1100), (31, 3, 1), (31, 3)),
]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("a", "b", "d"), MMA)
def test_mma(kernels, dtype, a, b, d):
    c = torch.full((32, 4), 0.5)
    operands = halves(dtype, [(*a, 2.0)], 4), halves(dtype, [(*b, 3.0)], 2)
    assert kernels.call("test_mma", dtype, *operands, c) == SUCCESS
    assert torch.equal(c, only(*d, 6.5))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("selector", [0, 1])
@pytest.mark.parametrize(("a", "place", "b", "d"), MMA_SP)
def test_mma_sp(kernels, dtype, selector, a, place, b, d):
    lane, shift, code = place
    metadata = torch.zeros(32, dtype=torch.int64)  # nobody may look at the lanes that are not selected
    metadata.view(8, 4)[:, 2 * selector : 2 * selector + 2] = FIRST_TWO
    metadata[lane + 2 * selector] = FIRST_TWO & ~(15 << shift) | code << shift
    c = torch.full((32, 4), 0.5)
    operands = halves(dtype, [(*a, 2.0)], 4), halves(dtype, [(*b, 3.0)], 4)
    metadata = torch.where(metadata < 1 << 31, metadata, metadata - (1 << 32)).int()
    assert kernels.call("test_mma_sp", dtype, ctypes.c_int32(selector), *operands, metadata, c) == SUCCESS
    assert torch.equal(c, only(*d, 6.5))


def manual_a(matrix):
    """Fragments of A as the manual writes it: element i of 8 is at this row and column."""
    result = torch.empty(32, 8, dtype=matrix.dtype)
    for lane in range(32):
        for i in range(8):
            row = lane // 4 + (0 if i < 2 or 4 <= i < 6 else 8)
            column = lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)
            result[lane, i] = matrix[row, column]
    return result.view(torch.int32)


def manual_b(matrix):
    """Fragments of B ``[16 or 32, 8]``."""
    count = len(matrix) // 4
    result = torch.empty(32, count, dtype=matrix.dtype)
    for lane in range(32):
        for i in range(count):
            result[lane, i] = matrix[lane % 4 * 2 + (i & 1) + i // 2 * 8, lane // 4]
    return result.view(torch.int32)


def manual_d(fragments):
    matrix = torch.empty(16, 8)
    for lane in range(32):
        for i in range(4):
            matrix[lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)] = fragments[lane, i]
    return matrix


@pytest.mark.parametrize("dtype", TYPES)
def test_whole_products(kernels, dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, shape, generator=generator).to(dtype) for shape in [(16, 16), (16, 8)])
    d = torch.zeros(32, 4)
    assert kernels.call("test_mma", dtype, manual_a(a), manual_b(b), d) == SUCCESS
    assert torch.equal(manual_d(d), a.float() @ b.float())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("selector", [0, 1])
def test_whole_sparse_products(kernels, dtype, selector):
    generator = torch.Generator().manual_seed(1)
    b = torch.randint(-8, 9, (32, 8), generator=generator).to(dtype)
    dense, kept = torch.zeros(16, 32, dtype=dtype), torch.zeros(16, 16, dtype=dtype)
    metadata = [0] * 32
    for row in range(16):
        for group in range(8):
            first, second = sorted(torch.randperm(4, generator=generator)[:2].tolist())
            numbers = torch.randint(-8, 9, (2,), generator=generator).to(dtype)
            kept[row, 2 * group : 2 * group + 2] = numbers
            dense[row, 4 * group + first], dense[row, 4 * group + second] = numbers
            lane = row % 8 * 4 + 2 * selector + group // 4
            metadata[lane] |= (first | second << 2) << (16 * (row // 8) + group % 4 * 4)
    words = torch.tensor(metadata).to(torch.uint32).view(torch.int32)
    d = torch.zeros(32, 4)
    status = kernels.call("test_mma_sp", dtype, ctypes.c_int32(selector), manual_a(kept), manual_b(b), words, d)
    assert status == SUCCESS
    assert torch.equal(manual_d(d), dense.float() @ b.float())


def test_ldmatrix(kernels):
    rows = torch.empty(32, 8, dtype=torch.int16)
    for lane in range(32):
        for i in range(8):
            rows[lane, i] = 0x100 * (lane // 8) + 0x10 * (lane % 8) + i  # matrix, row, column
    r = torch.empty(32, 4, dtype=torch.int32)
    assert kernels.call("test_ldmatrix", rows, r) == SUCCESS
    by_hand = {
        0: [0x0001_0000, 0x0101_0100, 0x0201_0200, 0x0301_0300],  # row 0, columns 0 and 1
        5: [0x0013_0012, 0x0113_0112, 0x0213_0212, 0x0313_0312],  # row 1, columns 2 and 3
        18: [0x0045_0044, 0x0145_0144, 0x0245_0244, 0x0345_0344],  # row 4, columns 4 and 5
        31: [0x0077_0076, 0x0177_0176, 0x0277_0276, 0x0377_0376],  # row 7, columns 6 and 7
    }
    assert {lane: r[lane].tolist() for lane in by_hand} == by_hand


def test_cp_async_waits_for_its_group_and_fills_with_zeros(kernels):
    memory = torch.arange(1, 133, dtype=torch.int32)
    begin = -(memory.data_ptr() // 4) % 4
    source = memory[begin : begin + 128]
    first, second = (torch.empty(32, 4, dtype=torch.int32) for _ in range(2))
    assert kernels.call("test_cp_async", source, first, second) == SUCCESS
    wanted = source.view(32, 4)
    assert torch.equal(first, wanted)
    assert torch.equal(second[::2], wanted[::2])
    assert (second[1::2] == 0).all()
