import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.calibrate import masks, sums
from sparsify_export.calibrate.masks import fraction_keep_mask, nm_keep_mask, retained
from sparsify_export.calibrate.patterns import NM


@pytest.fixture
def small_blocks(monkeypatch):
    """Make blocks of 7 elements, so that small matrices take many."""
    monkeypatch.setattr(sums, "BLOCK", 7)
    monkeypatch.setattr(masks, "BLOCK", 7)


def levels(rows, columns, count, seed):
    """Scores with few levels, hence many ties."""
    return torch.randint(0, count + 1, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


def test_two_of_four_by_hand():
    keep = nm_keep_mask(torch.tensor([[1.0, 4, 3, 2, 0, 0, 9, 0]]), NM(2, 4))
    assert keep.int().tolist() == [[0, 1, 1, 0, 1, 0, 1, 0]]


def test_one_of_four_keeps_one_not_three():
    assert nm_keep_mask(torch.rand(3, 8), NM(1, 4)).float().mean() == 0.25


NMS = st.integers(2, 9).flatmap(lambda m: st.builds(NM, st.integers(1, m - 1), st.just(m)))


@given(st.integers(0, 5), st.integers(0, 4), NMS, st.integers(0, 3), st.integers(0, 2**32))
def test_nm_matches_the_loop_even_with_ties(rows, groups, nm, count, seed):
    score = levels(rows, groups * nm.m, count, seed)
    keep = nm_keep_mask(score, nm)
    assert torch.equal(keep, reference.nm_keep_mask(score, nm.n, nm.m))
    assert (keep.reshape(rows, groups, nm.m).sum(-1) == nm.n).all()


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 3), st.floats(0.01, 0.99), st.integers(0, 2**32))
@pytest.mark.parametrize("per", ["row", "matrix"])
def test_fraction_matches_the_loop_even_with_ties(per, rows, columns, count, sparsity, seed):
    score = levels(rows, columns, count, seed)
    competing = columns if per == "row" else rows * columns
    pruned = math.floor(sparsity * competing + 0.5)
    keep = fraction_keep_mask(score, sparsity, per)
    assert torch.equal(keep, reference.fraction_keep_mask(score, pruned, per))


@pytest.mark.parametrize("per", ["row", "matrix"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (2, 8), (9, 3), (5, 20)])
def test_blocks_do_not_show(shape, per, small_blocks):
    score = levels(*shape, 2, seed=3)
    competing = shape[1] if per == "row" else score.numel()
    expected = reference.fraction_keep_mask(score, math.floor(0.4 * competing + 0.5), per)
    assert torch.equal(fraction_keep_mask(score, 0.4, per), expected)
    wide = levels(shape[0], shape[1] * 4, 2, seed=4)
    assert torch.equal(nm_keep_mask(wide, NM(2, 4)), reference.nm_keep_mask(wide, 2, 4))
    assert retained(wide, nm_keep_mask(wide, NM(2, 4))) == pytest.approx(reference.retained_nm(wide, 2, 4))


@pytest.mark.parametrize(("sparsity", "pruned"), [(0.5, 2), (0.49, 1), (0.16, 0), (0.9, 3), (0.1, 0)])
def test_half_a_weight_is_pruned(sparsity, pruned):
    assert (~fraction_keep_mask(torch.rand(1, 3), sparsity, "row")).sum() == pruned


def test_ties_keep_the_lower_index_and_prune_no_more_than_asked():
    assert fraction_keep_mask(torch.zeros(2, 4), 0.5, "row").int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    assert fraction_keep_mask(torch.zeros(2, 4), 0.5, "matrix").int().tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert nm_keep_mask(torch.tensor([[0.0, -0.0, 0.0, 0.0]]), NM(2, 4)).int().tolist() == [[1, 1, 0, 0]]


def test_rows_compete_only_within_themselves():
    score = torch.tensor([[1.0, 2.0], [30.0, 40.0]])
    assert fraction_keep_mask(score, 0.5, "row").int().tolist() == [[0, 1], [0, 1]]
    assert fraction_keep_mask(score, 0.5, "matrix").int().tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_and_stride(dtype):
    score = levels(8, 6, 2, seed=1).to(dtype).T
    assert torch.equal(nm_keep_mask(score, NM(2, 4)), reference.nm_keep_mask(score, 2, 4))
    assert torch.equal(fraction_keep_mask(score, 0.5, "matrix"), reference.fraction_keep_mask(score, 24, "matrix"))
    assert torch.equal(fraction_keep_mask(score, 0.5, "row"), reference.fraction_keep_mask(score, 4, "row"))


def test_scores_that_float32_cannot_tell_apart_are_ties():
    score = torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64)
    assert fraction_keep_mask(score, 0.5, "row").tolist() == [[True, False]]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty_scores_give_empty_masks(shape):
    score = torch.ones(shape)
    for keep in (nm_keep_mask(score, NM(2, 4)), *(fraction_keep_mask(score, 0.5, per) for per in ("row", "matrix"))):
        assert keep.shape == shape
        assert retained(score, keep) == 1.0


def test_infinite_scores_are_always_kept():
    score = torch.tensor([[float("inf"), 1.0, -float("inf"), 2.0]])
    assert nm_keep_mask(score, NM(2, 4)).tolist() == [[True, False, False, True]]
    assert fraction_keep_mask(score, 0.5, "matrix").tolist() == [[True, False, False, True]]


def test_retained_by_hand():
    score = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert retained(score, torch.tensor([[False, True], [False, True]])) == 0.6
    assert retained(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bool)) == 1.0


@pytest.mark.parametrize("mask", [lambda s: nm_keep_mask(s, NM(2, 4)), lambda s: fraction_keep_mask(s, 0.5, "row")])
def test_refuses_nan_and_vectors(mask):
    score = torch.rand(3, 8)
    score[2, 5] = float("nan")
    with pytest.raises(ValueError, match="score holds NaN"):
        mask(score)
    with pytest.raises(ValueError, match=r"score wants shape \[out_features, in_features\], got \(8,\)"):
        mask(torch.rand(8))


def test_refuses_a_ragged_last_group():
    with pytest.raises(ValueError, match="in_features 6 is not a multiple of 4, as 2:4 wants"):
        nm_keep_mask(torch.rand(2, 6), NM(2, 4))


@pytest.mark.parametrize("sparsity", [0, 1, float("nan")])
def test_refuses_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match="between 0 and 1, both excluded"):
        fraction_keep_mask(torch.rand(2, 4), sparsity, "row")


def test_refuses_a_mask_of_another_shape():
    with pytest.raises(ValueError, match=r"keep wants the score's shape \(2, 4\), got \(4, 2\)"):
        retained(torch.rand(2, 4), torch.ones(4, 2, dtype=torch.bool))
