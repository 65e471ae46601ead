"""The layout of unstructured weights in int8, by hand; test_packed.py has the rest."""

import torch
from sparsify_export.passes.dialect import linear_bitmask_int8


def test_by_hand():
    weight = torch.tensor([[2.54, 0, -1.0, 0, 0.005], [0.0] * 5, [0, -127, 0, 0, 63.5]])
    values, mask, row_start, scales = linear_bitmask_int8.pack(weight)
    assert torch.equal(scales, torch.tensor([2.54 / 127, 0.0, 1.0]))
    assert values.tolist() == [127, -50, 0, -127, 64]  # code 0 stays: the mask keeps it
    assert mask.tolist() == [[0b10101], [0], [0b10010]]
    assert row_start.tolist() == [0, 3, 3, 5]
    assert (values.dtype, scales.dtype) == (torch.int8, torch.float32)
