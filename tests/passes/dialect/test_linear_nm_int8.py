"""The layout of N:M weights in int8, by hand; test_packed.py has the rest."""

import torch
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_nm_int8


def test_by_hand():
    weight = torch.tensor([[2.54, 0, 0, -1.0, 0, 0.005, 0.03, 0], [0.0] * 8, [0, -127, 0, 63.5, 0, 0, 0, 0]])
    values, indices, scales = linear_nm_int8.pack(weight, NM(2, 4))
    assert torch.equal(scales, torch.tensor([2.54 / 127, 0.0, 1.0]))
    # 0.005 / 0.02 rounds to code 0 and stays; 63.5 is a tie and goes to the even 64
    assert values.tolist() == [[127, -50, 0, 2], [0, 0, 0, 0], [-127, 64, 0, 0]]
    assert indices.tolist() == [[0b10_01_11_00], [0b01_00_01_00], [0b01_00_11_01]]
    assert (values.dtype, indices.dtype, scales.dtype) == (torch.int8, torch.uint8, torch.float32)


def test_a_row_whose_scale_would_be_zero_gets_the_smallest_one():
    smallest = 2.0**-149
    values, _, scales = linear_nm_int8.pack(torch.tensor([[0, 3 * smallest, -smallest, 0]]), NM(2, 4))
    assert scales.tolist() == [smallest]
    assert values.tolist() == [[3, -1]]
