"""The N:M layout byte for byte, by hand; test_packed.py has the rest."""

import pytest
import torch
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.dialect import linear_nm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def test_the_example_of_the_docstring():
    a, d, f, g = 1.0, 2.0, 3.0, 4.0
    values, indices = linear_nm.pack(torch.tensor([[a, 0, 0, d, 0, f, g, 0]]), NM(2, 4), torch.float32)
    assert values.tolist() == [[a, d, f, g]]
    assert indices.tolist() == [[0b10_01_11_00]]
    assert (values.dtype, indices.dtype) == (torch.float32, torch.uint8)


@pytest.mark.parametrize(
    ("nm", "row", "wanted"),
    [
        (NM(1, 2), [0, 5, 6, 0, 0, 7], [0b1_0_1]),
        (NM(3, 4), [5, 0, 6, 7], [0b11_10_00]),
        (NM(2, 8), [0, 0, 0, 5, 0, 0, 0, 6], [0x73]),
        (NM(3, 5), [0, 5, 6, 0, 7], [0x21, 0x04]),
        (NM(1, 17), [0] * 16 + [5], [16]),
    ],
)
def test_indices_by_hand(nm, row, wanted):
    values, indices = linear_nm.pack(torch.tensor([row], dtype=torch.float32), nm, torch.float32)
    assert values.tolist() == [[v for v in row if v]]
    assert indices.tolist() == [wanted]


def test_every_row_starts_on_a_byte():
    weight = torch.tensor([[0.0, 1, 0, 2], [3, 0, 0, 4]])
    assert linear_nm.pack(weight, NM(2, 4), torch.float32)[1].tolist() == [[0b11_01], [0b11_00]]


def test_spare_slots_are_plus_zero_at_the_lowest_free_positions():
    weight = torch.tensor([[0, 0, 0, 7.0, 0, 0, 0, 0, 0, 8.0, 0, 0]])
    values, indices = linear_nm.pack(weight, NM(2, 4), torch.float32)
    assert values.tolist() == [[0, 7, 0, 0, 0, 8]]
    assert indices.tolist() == [[0b01_00_11_00, 0b01_00]]
    assert not torch.signbit(values).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_minus_zero_is_never_stored(dtype):
    below = -torch.finfo(torch.float32).smallest_normal / 2**20  # rounds to zero in 16 bits
    weight = torch.tensor([[-0.0, 1.0, -0.0, -0.0, below, -0.0, 2.0, -0.0]])
    values, _ = linear_nm.pack(weight, NM(2, 4), dtype)
    assert not torch.signbit(values[values == 0]).any()


def test_refuses_a_number_that_the_storage_cannot_hold():
    weight = torch.tensor([[1.0, 70000.0, 0.0, 0.0]])
    with pytest.raises(ValueError, match=r"70000 does not fit float16"):
        linear_nm.pack(weight, NM(2, 4), torch.float16)
    assert linear_nm.pack(weight, NM(2, 4), torch.bfloat16)[0].isfinite().all()


def test_refuses_what_is_not_the_pattern():
    with pytest.raises(ValueError, match="a group of 4 holds 3 non-zeros, at most 2 can be packed as 2:4"):
        linear_nm.pack(torch.tensor([[1.0, 1, 1, 0]]), NM(2, 4), torch.float32)
    with pytest.raises(ValueError, match="in_features must be a multiple of m = 4, got 6"):
        linear_nm.pack(torch.zeros(2, 6), NM(2, 4), torch.float32)


@pytest.mark.parametrize(("m", "bits"), [(2, 1), (3, 2), (4, 2), (5, 4), (16, 4), (17, 8), (32, 8)])
def test_index_bits(m, bits):
    assert linear_nm.index_bits(m) == bits


def test_two_values_in_one_place_are_refused():
    values, indices = linear_nm.pack(torch.tensor([[0.0, 1, 0, 2], [3, 0, 0, 4]]), NM(2, 4), torch.float32)
    indices[1] = 0
    with pytest.raises(ValueError, match="indices must ascend inside a group, got 0 after 0 in row 1 at value 1"):
        linear_nm.unpack(values, indices, NM(2, 4))


def test_unpacked_in_the_dtype_of_the_values():
    weight = torch.tensor([[0.0, 1, 0, 2], [3, 0, 0, 4]])
    for dtype in DTYPES:
        dense = linear_nm.unpack(*linear_nm.pack(weight, NM(2, 4), dtype), NM(2, 4))
        assert dense.dtype == dtype
        assert torch.equal(dense.float(), weight)
