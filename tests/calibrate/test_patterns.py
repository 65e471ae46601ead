import pytest
import torch
from sparsify_export.calibrate.masks import fraction_keep_mask, nm_keep_mask
from sparsify_export.calibrate.patterns import NM, Unstructured, find_pattern, fits, largest_group_count


def test_two_of_four_is_two_kept_of_four():
    nm = NM.parse("2:4")
    assert nm == NM(n=2, m=4)
    assert nm.sparsity == 0.5
    assert str(nm) == "2:4"


def test_one_of_four_is_three_quarters_zeros():
    assert NM(1, 4).sparsity == 0.75


@pytest.mark.parametrize(
    "text", ["2-4", "2:4:8", "", ":", "2:", "-2:4", " 2:4", "2:4\n", "2.0:4", "²:4", "99999:100000"]
)
def test_refuses_text_that_is_not_a_pattern(text):
    with pytest.raises(ValueError, match="wants two whole numbers like 2:4"):
        NM.parse(text)


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "1:1", "0:0", "2:33"])
def test_refuses_patterns_out_of_range(text):
    with pytest.raises(ValueError, match=rf"0 < n < m <= 32, got {text}"):
        NM.parse(text)


@pytest.mark.parametrize("text", ["1:2", "31:32", "16:32"])
def test_accepts_the_limits(text):
    assert str(NM.parse(text)) == text


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.5, 1.5, float("nan"), float("inf")])
def test_refuses_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match="between 0 and 1, both excluded, got"):
        Unstructured(sparsity)


def test_sparsity_reads_as_a_number():
    assert str(Unstructured(0.5)) == "0.5"


def test_counts_the_fullest_group():
    weight = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 3, 0, 4, 5]])
    assert largest_group_count(weight, 4) == 3
    assert largest_group_count(weight, 2) == 2
    assert fits(weight, NM(3, 4))
    assert not fits(weight, NM(2, 4))
    assert fits(weight != 0, NM(3, 8))


def test_a_full_group_of_32_is_counted():
    assert largest_group_count(torch.ones(2, 64), 32) == 32


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_an_empty_weight_fits(shape):
    assert fits(torch.ones(shape), NM(2, 4))


def test_nan_counts_as_non_zero_and_minus_zero_does_not():
    assert largest_group_count(torch.tensor([[float("nan"), -0.0, 0.0, 1.0]]), 4) == 2


def test_refuses_a_ragged_last_group():
    with pytest.raises(ValueError, match="in_features 6 is not a multiple of the group length 4"):
        fits(torch.ones(2, 6), NM(2, 4))


@pytest.mark.parametrize("nm", [NM(1, 4), NM(2, 4), NM(3, 4), NM(4, 8), NM(3, 8), NM(1, 16), NM(9, 32)], ids=str)
def test_finds_the_pattern_that_a_weight_was_pruned_to(nm):
    weight = torch.randn(48, 96)
    assert find_pattern(weight * nm_keep_mask(weight.abs(), nm)) == nm


def test_one_of_two_is_reported_as_two_of_four():
    weight = torch.randn(8, 16)
    assert find_pattern(weight * nm_keep_mask(weight.abs(), NM(1, 2))) == NM(2, 4)


def test_dead_rows_do_not_hide_a_pattern():
    weight = torch.randn(16, 32)
    weight *= nm_keep_mask(weight.abs(), NM(4, 8))
    weight[3:] = 0
    assert find_pattern(weight) == NM(4, 8)


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9, 0.99])
def test_zeros_anywhere_are_a_fraction(sparsity):
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    weight *= fraction_keep_mask(weight.abs(), sparsity, per="matrix")
    found = find_pattern(weight)
    assert isinstance(found, Unstructured)
    assert found.sparsity == pytest.approx(sparsity, abs=1e-4)


def test_a_few_zeros_are_a_dense_weight():
    weight = torch.ones(10, 10)
    weight[0] = 0
    assert find_pattern(weight) is None
    assert find_pattern(weight, min_sparsity=0.1) == Unstructured(0.1)


@pytest.mark.parametrize("weight", [torch.ones(4, 8), torch.zeros(4, 8), torch.ones(0, 8), torch.ones(4, 0)])
def test_dense_zero_and_empty_weights_have_no_pattern(weight):
    assert find_pattern(weight) is None
