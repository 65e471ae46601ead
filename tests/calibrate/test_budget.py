"""The choice of forms against all choices there are, and at the edges."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.calibrate.budget import Option, choose, frontier, totals

OPTION = st.builds(
    Option, seconds=st.integers(0, 9).map(lambda n: n * 1e-4), nbytes=st.integers(0, 9), damage=st.integers(0, 20)
)


def total(groups, picks, name):
    return sum(getattr(group[pick], name) for group, pick in zip(groups, picks, strict=True))


@given(
    st.lists(st.lists(OPTION, min_size=1, max_size=3), min_size=1, max_size=4), st.integers(0, 30), st.integers(0, 30)
)
def test_no_choice_within_the_limits_does_less_damage(groups, time, size):
    limits = {"seconds": time * 1e-4 + 1e-9, "nbytes": size}
    every = itertools.product(*(range(len(group)) for group in groups))
    within = [p for p in every if all(total(groups, p, name) <= limit for name, limit in limits.items())]
    picked = choose(groups, **limits)
    if not within:
        assert picked is None
        return
    assert tuple(picked) in within
    assert total(groups, picked, "damage") == min(total(groups, p, "damage") for p in within)


def test_without_a_limit_nothing_is_damaged():
    groups = [[Option(1.0, 8, 0.0), Option(0.5, 4, 1.0)]] * 3
    assert choose(groups) == [0, 0, 0]
    assert choose([]) == []
    assert choose(groups, seconds=1.4) is None


def test_by_hand_the_cheapest_damage_buys_the_time():
    dense = Option(1.0, 8, 0.0)
    groups = [[dense, Option(0.5, 4, damage)] for damage in (3.0, 1.0, 2.0)]
    assert choose(groups, seconds=2.5) == [0, 1, 0]
    assert choose(groups, seconds=2.0) == [0, 1, 1]
    assert choose(groups, nbytes=12) == [1, 1, 1]


@pytest.mark.parametrize("groups", [[[]], [[Option(math.nan, 1, 0)]], [[Option(1, -1, 0)]], [[Option(1, 1, math.inf)]]])
def test_figures_that_say_nothing_are_refused(groups):
    with pytest.raises(ValueError, match="every group wants an option"):
        choose(groups)


def test_the_fastest_within_a_budget_of_damage():
    dense = Option(1.0, 8, 0.0)
    groups = [[dense, Option(0.5, 4, damage), Option(0.1, 2, 9.0)] for damage in (3.0, 1.0, 2.0)]
    assert choose(groups, damage=3.0, least="seconds") in ([0, 1, 1], [1, 0, 0])
    assert totals(groups, choose(groups, damage=3.0, least="seconds")).seconds == pytest.approx(2.0)
    assert choose(groups, least="seconds") == [2, 2, 2]
    assert choose(groups, least="nbytes", damage=0.5) == [0, 0, 0]


def test_the_frontier_goes_from_the_least_damage_to_the_least_time():
    groups = [[Option(1.0, 8, 0.0), Option(0.5, 4, damage)] for damage in (3.0, 1.0, 2.0)]
    assert frontier(groups, 4) == [[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 1, 1]]
