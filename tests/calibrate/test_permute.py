import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.calibrate import assign
from sparsify_export.calibrate.assign import refine_place
from sparsify_export.calibrate.patterns import NM
from sparsify_export.calibrate.permute import find_order, retained_nm
from sparsify_export.calibrate.reallocate import reallocate

NMS = [NM(1, 2), NM(1, 4), NM(2, 4), NM(3, 4), NM(4, 8), NM(5, 7)]


def scores(rows, columns, seed=0):
    """Scores whose channels differ in size, as those of real layers do."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) * torch.rand(columns, generator=generator).mul(3).exp()


def planes(score, nm):
    """The identity order by place, row and group."""
    return score.reshape(len(score), -1, nm.m).permute(2, 0, 1).contiguous()


def test_snake_by_hand():
    score = torch.tensor([[7.0, 1, 6, 0, 5, 3, 2, 4]])  # ascending: 3 1 | 6 5 | 7 4 | 2 0
    assert reallocate(score, NM(2, 4)).T.tolist() == [[3, 5, 7, 0], [1, 6, 4, 2]]


@given(st.sampled_from(NMS), st.integers(1, 4), st.integers(0, 3), st.integers(0, 2**32))
def test_snake_matches_the_loop_even_with_ties(nm, groups, levels, seed):
    score = torch.randint(0, levels + 1, (3, groups * nm.m), generator=torch.Generator().manual_seed(seed)).float()
    assert reallocate(score, nm).T.tolist() == reference.snake(score.sum(0).tolist(), nm.m)


@pytest.mark.parametrize("nm", NMS, ids=str)
def test_growth_is_what_the_retained_score_grows_by(nm, monkeypatch):
    monkeypatch.setattr(assign, "BLOCK", 6)  # two rows at a time
    score = scores(5, 3 * nm.m)
    before = planes(score, nm)
    for place in range(nm.m):
        source, growth = refine_place(before, place, nm)
        assert sorted(source.tolist()) == [0, 1, 2]
        after = before.clone()
        after[place] = before[place][:, source]
        kept = [part.sort(dim=0).values[nm.m - nm.n :].double().sum().item() for part in (before, after)]
        assert kept[1] - kept[0] == pytest.approx(growth, rel=1e-5, abs=1e-6 * kept[0])


def test_an_outlier_pair_is_separated():
    # Two channels that matter to all rows share a group with a third; 1:2 can keep only one of each group.
    score = torch.tensor([[9.0, 8.0, 1.0, 2.0], [9.0, 8.0, 1.0, 2.0]])
    found = find_order(score, NM(1, 2))
    assert found.retained_before == pytest.approx(11 / 20)
    assert found.retained_after == pytest.approx(17 / 20)
    assert {frozenset(group) for group in found.order.reshape(2, 2).tolist()} in (
        {frozenset({0, 2}), frozenset({1, 3})},
        {frozenset({0, 3}), frozenset({1, 2})},
    )
    assert not found.is_identity


@given(st.sampled_from(NMS), st.integers(1, 5), st.integers(1, 6), st.sampled_from([1, 3, 1000]), st.integers(0, 2**32))
def test_an_order_is_a_permutation_that_does_not_lose(nm, groups, rows, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(0, levels + 1, (rows, groups * nm.m), generator=generator).float()
    found = find_order(score, nm)
    assert sorted(found.order.tolist()) == list(range(groups * nm.m))
    assert found.order.dtype == torch.int64
    assert found.retained_after >= found.retained_before
    assert found.retained_before == retained_nm(score, nm)
    assert found.retained_after == pytest.approx(retained_nm(score[:, found.order], nm), rel=1e-12)
    assert found.is_identity or found.retained_after > found.retained_before


@pytest.mark.parametrize("nm", NMS, ids=str)
def test_rounds_never_lose_and_start_from_the_snake(nm):
    score = scores(40, 16 * nm.m)
    kept = [find_order(score, nm, max_rounds=rounds, tolerance=0).retained_after for rounds in range(5)]
    assert kept == sorted(kept)
    assert kept[-1] > kept[0]
    snake = reallocate(score, nm).T.reshape(-1)
    assert kept[0] == pytest.approx(max(retained_nm(score[:, snake], nm), retained_nm(score, nm)), rel=1e-6)


def test_two_groups_come_close_to_the_best_of_all_orders():
    share = []
    for seed in range(30):
        score = scores(6, 8, seed)
        start, best = reference.retained_nm(score, 2, 4), reference.best_retained_nm(score, 2, 4)
        found = find_order(score, NM(2, 4), tolerance=0).retained_after
        assert start - 1e-6 <= found <= best + 1e-6
        share.append((found - start) / (best - start) if best - start > 1e-6 else 1.0)
    assert sum(share) / len(share) > 0.75


def test_channels_ascend_within_groups_and_groups_by_their_first():
    order = find_order(scores(9, 32), NM(2, 4)).order.reshape(-1, 4)
    assert (order.diff(dim=1) > 0).all()
    assert (order[:, 0].diff() > 0).all()


def test_shuffling_the_channels_first_makes_no_difference():
    score = scores(20, 64)
    shuffle = torch.randperm(64, generator=torch.Generator().manual_seed(5))
    expected = find_order(score, NM(2, 4)).retained_after
    assert find_order(score[:, shuffle], NM(2, 4)).retained_after == pytest.approx(expected, rel=1e-9)


def test_the_order_does_not_hang_on_the_number_of_threads():
    score = scores(200, 256)
    threads = torch.get_num_threads()
    try:
        orders = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            orders.append(find_order(score, NM(2, 4)).order)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


def test_an_order_that_cannot_be_bettered_is_left_alone():
    score = torch.tensor([[1.0, 1, 0, 0] * 4])
    found = find_order(score, NM(2, 4))
    assert found.is_identity
    assert found.retained_before == found.retained_after == 1.0


@pytest.mark.parametrize("score", [torch.rand(3, 4), torch.rand(0, 8), torch.rand(3, 0), torch.zeros(3, 8)])
def test_one_group_no_rows_no_channels_and_no_score_keep_the_order(score):
    found = find_order(score, NM(2, 4))
    assert found.is_identity
    assert found.rounds == 0
    assert found.retained_after == found.retained_before


def test_dead_rows_and_columns_do_no_harm():
    score = scores(8, 16)
    score[2] = 0
    score[:, 4:9] = 0
    assert find_order(score, NM(2, 4)).retained_after > retained_nm(score, NM(2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_and_stride(dtype):
    score = scores(16, 5).to(dtype).T
    expected = find_order(score.float().contiguous(), NM(2, 4))
    assert torch.equal(find_order(score, NM(2, 4)).order, expected.order)


def test_refuses_channels_that_do_not_divide():
    with pytest.raises(ValueError, match="in_features 10 is not a multiple of 4, as 2:4 wants"):
        find_order(torch.rand(2, 10), NM(2, 4))


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_refuses_scores_that_are_none(bad):
    score = torch.rand(2, 8)
    score[1, 3] = bad
    with pytest.raises(ValueError, match="score wants finite numbers, none negative and none NaN"):
        find_order(score, NM(2, 4))


@pytest.mark.parametrize("arguments", [{"tolerance": -1.0}, {"tolerance": float("nan")}, {"max_rounds": -1}])
def test_refuses_negative_limits(arguments):
    with pytest.raises(ValueError, match="tolerance and max_rounds want 0 or more"):
        find_order(torch.rand(2, 8), NM(2, 4), **arguments)
