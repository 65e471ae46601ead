"""Budgets: what is chosen, measured and chosen again, with files that a clock of the test's own times."""

import pytest
from sparsify_export.calibrate.budget import Option
from sparsify_export.calibrate.search import Goal, Measured, OutOfReachError, search, tightened

DENSE = Measured(1000, 1.0, 20.0, 20.0)
"""Ten groups take 1 ms each of it, and half of that pruned, as the machine predicts; and 60 bytes, of which 30 stay."""
GROUPS = [[Option(1e-3, 60, 0.0), Option(0.5e-3, 30, float(i + 1))] for i in range(10)]


def run(goal, worth=1.0):
    """Search with files that gain so much of what is predicted; the tries, and what was measured."""
    seen = []

    def measure(picks):
        seen.append(tuple(picks))
        ms = 20.0 - worth * 0.5 * sum(picks)
        nbytes = 1000 - 30 * sum(picks)
        return Measured(nbytes, nbytes / 1000, 20.0, ms, 20.0 / ms)

    return search(GROUPS, goal, DENSE, measure), seen


def test_the_least_damage_is_pruned():
    tries, seen = run(Goal(speedup=20 / 17.5))
    assert seen == [(1,) * 5 + (0,) * 5]
    assert tries[0].damage == 15.0
    assert tries[0].ms == pytest.approx(tries[0].measured.ms)


@pytest.mark.parametrize(("worth", "pruned"), [(0.6, 8), (2.0, 3)])
def test_what_linears_gain_is_corrected_by_what_was_measured(worth, pruned):
    """Predicted to gain 0.5 ms each, of which 2.5 ms are wanted."""
    tries, seen = run(Goal(speedup=20 / 17.5), worth)
    assert abs(tries[-1].measured.speedup / (20 / 17.5) - 1) <= 0.05
    assert tries[-1].measured.ms == pytest.approx(tries[-1].ms)
    assert sum(tries[-1].picks) in (pruned, pruned + 1)
    assert len(seen) == len(tries) > 1


def test_bytes_are_met_without_a_clock():
    tries, _ = run(Goal(size=0.9), worth=0.0)
    assert sum(tries[-1].picks) == 4
    assert len(tries) == 1
    assert tries[0].measured.size == pytest.approx(tries[0].size) == pytest.approx(0.88)


def test_a_budget_of_damage_finds_the_fastest():
    tries, _ = run(Goal(damage=10.0))
    assert tries[0].picks == (1,) * 4 + (0,) * 6
    assert len(tries) == 1


@pytest.mark.parametrize(
    ("goal", "worth", "nearest"),
    [(Goal(speedup=2), 1.0, 1.33), (Goal(speedup=1.2), -1.0, 0.85), (Goal(size=0.5), 1, 0.7)],
)
def test_what_cannot_be_met_says_the_nearest_that_can(goal, worth, nearest):
    with pytest.raises(OutOfReachError) as caught:
        run(goal, worth)
    assert caught.value.nearest == pytest.approx(nearest, abs=0.01)


def test_a_loss_that_was_underestimated_tightens_the_budget_of_damage():
    assert tightened(Goal(damage=0.02), predicted=0.02, measured=0.04).damage == pytest.approx(0.01)
    assert tightened(Goal(damage=0.02), predicted=0.0199, measured=0.0201).damage == pytest.approx(0.018)
