"""The layout of unstructured weights in int4, by hand; test_packed.py has the rest."""

import torch
from sparsify_export.passes.dialect import linear_bitmask_int4


def test_the_example_of_the_docstring():
    values, mask, row_start, scales = linear_bitmask_int4.pack(torch.tensor([[7.0, 0, -1, 0, 3]]), 32)
    assert values.tolist() == [0x7F, 0x0B]
    assert mask.tolist() == [[0b000_10101]]
    assert row_start.tolist() == [0, 2]
    assert scales.tolist() == [[1.0]]
    assert (values.dtype, scales.dtype) == (torch.uint8, torch.float16)


def test_every_64_columns_begin_a_byte():
    weight = torch.zeros(2, 130)
    weight[0, [0, 63, 64, 65, 66, 129]] = 7
    weight[1, 128] = -7
    values, mask, row_start, scales = linear_bitmask_int4.pack(weight, 128)
    assert values.tolist() == [0xFF, 0xFF, 0x0F, 0x0F, 0x01]
    assert row_start.tolist() == [0, 4, 5]
    assert scales.tolist() == [[1, 1], [0, 1]]
    assert torch.equal(linear_bitmask_int4.unpack(values, mask, row_start, scales, 128, 130), weight)
