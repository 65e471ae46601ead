"""The bitmask layout byte for byte, by hand; test_packed.py has the rest."""

import pytest
import torch
from sparsify_export.passes.dialect import linear_bitmask

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_the_example_of_the_docstring():
    a, c, e = 1.0, 2.0, 3.0
    values, mask, row_start = linear_bitmask.pack(torch.tensor([[a, 0, c, 0, e]]), torch.float32)
    assert values.tolist() == [a, c, e]
    assert mask.tolist() == [[0b000_10101]]
    assert row_start.tolist() == [0, 3]
    assert (values.dtype, mask.dtype, row_start.dtype) == (torch.float32, torch.uint8, torch.int64)


def test_columns_behind_a_byte_and_empty_rows_by_hand():
    weight = torch.zeros(4, 10)
    weight[1, 7], weight[1, 8], weight[3, 9] = 5, 6, 7
    values, mask, row_start = linear_bitmask.pack(weight, torch.float32)
    assert values.tolist() == [5, 6, 7]
    assert mask.tolist() == [[0, 0], [0x80, 0x01], [0, 0], [0, 0x02]]
    assert row_start.tolist() == [0, 0, 2, 2, 3]


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_is_never_stored(dtype):
    below = -torch.finfo(torch.float32).smallest_normal / 2**20  # rounds to zero in 16 bits
    values, mask, _ = linear_bitmask.pack(torch.tensor([[-0.0, 1.0, below]]), dtype)
    assert mask.tolist() == [[0b110]]
    assert not torch.signbit(values[values == 0]).any()


def test_refuses_a_number_that_the_storage_cannot_hold():
    weight = torch.tensor([[1.0, -70000.0, 0.0]])
    with pytest.raises(ValueError, match=r"-70000 does not fit float16, which ends at 65504"):
        linear_bitmask.pack(weight, torch.float16)
    assert linear_bitmask.pack(weight, torch.bfloat16)[0].isfinite().all()


def test_unpacked_in_the_dtype_of_the_values():
    weight = torch.tensor([[0.0, 1, 0], [0, 0, 0], [3, 0, 4]])
    for dtype in DTYPES:
        dense = linear_bitmask.unpack(*linear_bitmask.pack(weight, dtype), 3)
        assert dense.dtype == dtype
        assert torch.equal(dense.float(), weight)


def test_unpacking_refuses_a_mask_that_does_not_fit():
    packed = linear_bitmask.pack(torch.tensor([[0.0, 1, 0], [3, 0, 4]]), torch.float32)
    with pytest.raises(ValueError, match="bits set behind column K = 2 in row 1"):
        linear_bitmask.unpack(*packed, 2)
    with pytest.raises(ValueError, match="mask must have 2 bytes a row for K = 9, got 1"):
        linear_bitmask.unpack(*packed, 9)
