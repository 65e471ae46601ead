"""The layout of N:M weights in int4, by hand; test_packed.py has the rest."""

import pytest
import torch
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_nm_int4


def test_the_example_of_the_docstring():
    values, indices, scales = linear_nm_int4.pack(torch.tensor([[7.0, 0, 0, -1, 0, 3, 1, 0]]), NM(2, 4), 32)
    assert values.tolist() == [[0x7F, 0x9B]]
    assert indices.tolist() == [[0b10_01_11_00]]
    assert scales.tolist() == [[1.0]]
    assert (values.dtype, scales.dtype) == (torch.uint8, torch.float16)


def test_an_odd_number_of_values_ends_in_half_a_byte_of_zero():
    values, _, _ = linear_nm_int4.pack(torch.tensor([[7.0, 0, 0, 0, -7, 0, 0, 0, 0, 0, 0, 2]]), NM(1, 4), 32)
    assert values.tolist() == [[(7 + 8) | (-7 + 8) << 4, 2 + 8]]


def test_groups_have_their_own_scales_and_a_group_of_m_may_lie_in_two():
    weight = torch.zeros(1, 35)
    weight[0, 30], weight[0, 34] = 7, 70  # both in the seventh group of 5: columns 30 to 34
    values, _, scales = linear_nm_int4.pack(weight, NM(2, 5), 32)
    assert scales.tolist() == [[1.0, 10.0]]
    assert values.tolist() == [[0x88] * 6 + [0xFF]]


def test_codes_are_made_with_the_rounded_scale():
    weight = torch.tensor([[1.0, 0.4999, 0, 0]])
    values, indices, scales = linear_nm_int4.pack(weight, NM(2, 4), 32)
    assert scales.item() == torch.tensor(1 / 7).half().item() != 1 / 7
    assert values.tolist() == [[(7 + 8) | (4 + 8) << 4]]  # over 1 / 7 it would be 3.4993
    dense = linear_nm_int4.unpack(values, indices, scales, NM(2, 4), 32, 4)
    assert torch.equal(dense, torch.tensor([[7.0, 4, 0, 0]]) * scales.float())


def test_scales_at_the_ends_of_float16():
    smallest = 2.0**-24
    values, _, scales = linear_nm_int4.pack(torch.tensor([[smallest, -1e-30, 0, 0]]), NM(2, 4), 32)
    assert scales.tolist() == [[smallest]]
    assert values.tolist() == [[9 | 8 << 4]]
    with pytest.raises(ValueError, match="500000 in row 0 is too large for int4: a seventh of it, the scale, does not"):
        linear_nm_int4.pack(torch.tensor([[0, 5e5, 0, 0]]), NM(2, 4), 32)
