"""Shadows of sparse weights: the gradient behind zeros, and masks chosen again, against plain loops."""

import pytest
import torch
from sparsify_export.calibrate.patterns import NM, RowCounts
from sparsify_export.calibrate.shadow import choose, masked


def test_zeros_have_the_gradient_of_what_they_stand_for():
    shadow = torch.tensor([[1.0, -2.0, 3.0]], requires_grad=True)
    keep = torch.tensor([[True, False, True]])
    made = masked(shadow, keep)
    assert made.tolist() == [[1, 0, 3]]
    (made * torch.tensor([[5.0, 7.0, 11.0]])).sum().backward()
    assert shadow.grad.tolist() == [[5, 7, 11]]


def weights(rows=6, columns=16):
    generator = torch.Generator().manual_seed(5)
    shadow = torch.randn(rows, columns, generator=generator)
    shadow[0, :4] = 1.0  # a tie, which the first win
    return shadow, torch.rand(rows, columns, generator=generator)


def best(scores, count):
    """The places of the largest, of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
    return set(order[:count])


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("nm", [NM(2, 4), NM(1, 4), NM(3, 8)], ids=str)
def test_groups_keep_their_best(nm, fisher):
    shadow, moment = weights()
    found = choose(shadow, nm, moment if fisher else None)
    for row in range(len(shadow)):
        for begin in range(0, shadow.shape[1], nm.m):
            scores = [
                abs(float(shadow[row, j])) * (float(moment[row, j]) ** 0.5 if fisher else 1)
                for j in range(begin, begin + nm.m)
            ]
            kept = best(scores, nm.n)
            assert [place in kept for place in range(nm.m)] == found[row, begin : begin + nm.m].tolist()


@pytest.mark.parametrize("fisher", [False, True])
def test_rows_keep_as_many_as_they_did(fisher):
    shadow, moment = weights()
    pruned = torch.tensor([0, 3, 8, 15, 16, 9])
    found = choose(shadow, RowCounts(pruned), moment if fisher else None)
    for row, count in enumerate(pruned.tolist()):
        scores = (shadow[row].abs() * (moment[row].sqrt() if fisher else 1)).tolist()
        kept = best(scores, 16 - count)
        assert [place in kept for place in range(16)] == found[row].tolist()


def test_weights_that_nothing_depends_on_are_ranked_by_magnitude():
    shadow, _ = weights()
    assert torch.equal(choose(shadow, NM(2, 4), torch.zeros_like(shadow)), choose(shadow, NM(2, 4)))
    dead = torch.ones_like(shadow)
    dead[3] = 0.0
    assert torch.equal(choose(shadow, NM(2, 4), dead), choose(shadow, NM(2, 4)))


def test_what_is_not_a_number_is_refused():
    shadow, _ = weights()
    with pytest.raises(ValueError, match="NaN"):
        choose(shadow * torch.nan, NM(2, 4))
