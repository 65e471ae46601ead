import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.calibrate.repair import exact_counts

MATRIX = st.tuples(st.integers(1, 12), st.lists(st.integers(0, 64).map(lambda k: k / 64), min_size=1, max_size=5))


def test_by_hand():
    # 10 weights a row: 5.4, 4.6, 2.0 round to 5 + 5 + 2 = 12; the nearest to one more is 5.4, to one less 4.6.
    rates = [torch.tensor([0.54, 0.46, 0.2], dtype=torch.float64)]
    assert exact_counts(rates, [10], 12)[0].tolist() == [5, 5, 2]
    assert exact_counts(rates, [10], 13)[0].tolist() == [6, 5, 2]
    assert exact_counts(rates, [10], 11)[0].tolist() == [5, 4, 2]


def test_where_all_rates_are_equal_the_first_rows_move_first():
    counts = exact_counts([torch.full((4,), 0.5), torch.full((3,), 0.5)], [8, 8], 30)
    assert [c.tolist() for c in counts] == [[5, 5, 4, 4], [4, 4, 4]]


@given(st.lists(MATRIX, min_size=1, max_size=4), st.data())
def test_the_total_is_exact_and_what_moved_lay_nearest(matrices, data):
    widths = [width for width, _ in matrices]
    rates = [torch.tensor(row, dtype=torch.float64) for _, row in matrices]
    everything = sum(width * len(row) for width, row in matrices)
    target = data.draw(st.integers(0, everything))
    counts = exact_counts(rates, widths, target)
    assert sum(int(c.sum()) for c in counts) == target
    # Row i has count k or more from the shift (k - 1/2) / C - alpha on: the target smallest shifts are taken.
    taken, left = [], []
    for width, alpha, count in zip(widths, rates, counts, strict=True):
        assert ((count >= 0) & (count <= width)).all()
        for a, n in zip(alpha.tolist(), count.tolist(), strict=True):
            taken += [(k - 0.5) / width - a for k in range(1, n + 1)]
            left += [(k - 0.5) / width - a for k in range(n + 1, width + 1)]
    assert not taken or not left or max(taken) <= min(left) + 1e-12


@pytest.mark.parametrize("target", [0, 24])
def test_edges(target):
    counts = exact_counts([torch.tensor([0.1, 0.9, 0.5])], [8], target)
    assert counts[0].tolist() == [target // 3] * 3


@pytest.mark.parametrize(
    ("rates", "target", "why"),
    [
        ([0.5, float("nan")], 4, "the learned rates hold NaN or lie outside 0 to 1"),
        ([0.5, 1.5], 4, "outside 0 to 1"),
        ([0.5, 0.5], 9, "cannot prune 9 of 8 weights"),
        ([0.5, 0.5], -1, "cannot prune -1 of 8 weights"),
    ],
)
def test_refuses(rates, target, why):
    with pytest.raises(ValueError, match=why):
        exact_counts([torch.tensor(rates)], [4], target)
