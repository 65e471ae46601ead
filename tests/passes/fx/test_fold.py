"""Moving the entries of a space, on literals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.passes.fx.channels import ChannelRange, ChannelSpace
from sparsify_export.passes.fx.fold import aligned, apply_fold, permute_statistic, stack_scores

# A fused producer (two ranges of one weight), a bias, and a consumer read at two places.
SPACE = ChannelSpace(
    3,
    (ChannelRange("up.weight", 0, 0, 3), ChannelRange("up.weight", 0, 4, 3), ChannelRange("up.bias", 0, 4, 3)),
    (ChannelRange("down.weight", 1, 0, 3), ChannelRange("down.weight", 1, 3, 3)),
)
TIED = ChannelSpace(3, (ChannelRange("table", 1, 0, 3),), (ChannelRange("table", 1, 0, 3), ChannelRange("q", 1, 0, 3)))
ORDER = torch.tensor([2, 0, 1])


def small():
    return {
        "up.weight": torch.arange(7.0)[:, None].repeat(1, 2),
        "up.bias": torch.arange(7.0),
        "down.weight": torch.arange(6.0).repeat(2, 1),
        "other": torch.zeros(3),
    }


def test_new_channel_j_is_old_channel_order_j():
    params = small()
    apply_fold(SPACE, ORDER, params)
    assert params["up.weight"][:, 0].tolist() == [2, 0, 1, 3, 6, 4, 5]
    assert params["up.bias"].tolist() == [0, 1, 2, 3, 6, 4, 5]
    assert params["down.weight"][0].tolist() == [2, 0, 1, 5, 3, 4]


def test_replaces_what_it_touches_and_writes_into_nothing():
    params, before = small(), small()
    held = dict(params)
    apply_fold(SPACE, ORDER, params)
    assert params["other"] is held["other"]
    assert all(torch.equal(held[name], before[name]) for name in before)
    assert all(params[name] is not held[name] for name in ("up.weight", "up.bias", "down.weight"))


def test_a_tied_range_moves_once():
    params = {"table": torch.arange(3.0)[None], "q": torch.arange(3.0)[None]}
    apply_fold(TIED, ORDER, params)
    assert params["table"][0].tolist() == params["q"][0].tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    ("order", "why"),
    [
        (torch.tensor([0, 1]), r"order must have shape \(3,\), got \(2,\)"),
        (torch.tensor([[0, 1, 2]]), r"order must have shape \(3,\)"),
        (torch.tensor([0, 1, 1]), r"not a permutation of 0\.\.2"),
        (torch.tensor([1, 2, 3]), "not a permutation"),
        (torch.tensor([0.0, 1.0, 2.0]), "not a permutation"),
    ],
)
def test_refuses_what_is_no_permutation(order, why):
    params = small()
    with pytest.raises(ValueError, match=f"down columns 0..2, 3..5: .*{why}"):
        apply_fold(SPACE, order, params)
    with pytest.raises(ValueError, match=why):
        permute_statistic(SPACE, order, torch.zeros(6), "down.weight")


def test_refuses_missing_and_small_parameters_before_it_moves_anything():
    params = small()
    del params["down.weight"]
    held = dict(params)
    with pytest.raises(ValueError, match=r"parameter down\.weight is missing"):
        apply_fold(SPACE, ORDER, params)
    params["down.weight"] = torch.zeros(2, 5)
    with pytest.raises(ValueError, match=r"down.weight has shape \(2, 5\), need 6 entries along dimension 1"):
        apply_fold(SPACE, ORDER, params)
    assert all(params[name] is held[name] for name in held)


def test_scores_of_some_weights_can_move_alone():
    scores = {"down.weight": small()["down.weight"]}
    apply_fold(SPACE, ORDER, scores, only_present=True)
    assert list(scores) == ["down.weight"]
    assert scores["down.weight"][0].tolist() == [2, 0, 1, 5, 3, 4]


@given(st.permutations(range(3)), st.permutations(range(3)))
def test_orders_compose(first, second):
    params, once = small(), small()
    apply_fold(SPACE, torch.tensor(first), params)
    apply_fold(SPACE, torch.tensor(second), params)
    apply_fold(SPACE, torch.tensor(first)[torch.tensor(second)], once)
    assert all(torch.equal(params[name], once[name]) for name in once)


def test_statistics_follow_the_columns():
    norms = torch.arange(6.0)
    assert permute_statistic(SPACE, ORDER, norms, "down.weight").tolist() == [2, 0, 1, 5, 3, 4]
    assert permute_statistic(SPACE, ORDER, norms, "elsewhere").tolist() == norms.tolist()
    hessian = norms[:, None] * 10 + norms
    assert permute_statistic(SPACE, ORDER, hessian, "down.weight").diagonal().tolist() == [22, 0, 11, 55, 33, 44]


@pytest.mark.parametrize("shape", [(5,), (6, 5), (), (6, 6, 6)])
def test_refuses_a_statistic_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"down\.weight: "):
        permute_statistic(SPACE, ORDER, torch.zeros(shape), "down.weight")


def test_scores_are_stacked_by_channel():
    scores = {"down.weight": torch.tensor([[0, 1, 2, 10, 11, 12]], dtype=torch.float16)}
    stacked = stack_scores(SPACE, scores)
    assert stacked.dtype == torch.float32
    assert stacked.tolist() == [[0, 1, 2], [10, 11, 12]]
    apply_fold(SPACE, ORDER, scores, only_present=True)
    assert torch.equal(stack_scores(SPACE, scores), stacked[:, ORDER])


def test_consumers_without_a_score_have_no_say():
    assert stack_scores(TIED, {"q": torch.ones(2, 3)}).shape == (2, 3)
    with pytest.raises(ValueError, match="no score for any consumer"):
        stack_scores(TIED, {})


@pytest.mark.parametrize(("size", "start", "m", "yes"), [(8, 16, 4, True), (8, 18, 4, False), (6, 0, 4, False)])
def test_aligned_means_whole_groups(size, start, m, yes):
    space = ChannelSpace(size, (), (ChannelRange("w", 1, 0, size), ChannelRange("w", 1, start, size)))
    assert aligned(space, m) is yes
