"""Predicted times and the decisions that follow, with made-up machines."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.cost import TOKENS, Speed, fit, format_name, why_dense
from sparsify_export.passes.dialect.storage import Storage

DENSE = Speed(1e-6, (1e-10, 2e-10, 20e-10), (1e-10, 2e-10, 20e-10))
SPARSE = Speed(2e-6, (0.2e-10, 2e-10, 10e-10), (1.2e-10, 4e-10, 30e-10))
SQUARE = {"out_features": 1000, "in_features": 1000}


def test_seconds_by_hand():
    assert SPARSE.seconds(1000, 1000, 0.5, 1) == pytest.approx(2e-6 + 1e6 * 0.7e-10)
    assert SPARSE.seconds(1000, 1000, 0.0, 16) == pytest.approx(2e-6 + 1e6 * 2e-10)
    # 8.5 is half way from 1 to 16, 512 is twice 256
    assert DENSE.seconds(1000, 1000, 1.0, 8.5) == pytest.approx(1e-6 + 1e6 * 1.5e-10)
    assert DENSE.seconds(1000, 1000, 1.0, 512) == pytest.approx(1e-6 + 1e6 * 40e-10)


@pytest.mark.parametrize(
    ("density", "tokens", "sparse_is_faster"),
    [(0.5, 1, True), (0.9, 1, False), (0.5, 16, False), (0.1, 256, True), (0.5, 256, False), (0.1, 4096, True)],
)
def test_decisions_on_a_made_up_machine(density, tokens, sparse_is_faster):
    reason = why_dense(SPARSE, DENSE, density=density, tokens=tokens, **SQUARE)
    assert (reason == "") == sparse_is_faster


def test_the_reason_says_both_times():
    assert why_dense(SPARSE, DENSE, density=0.9, tokens=1, **SQUARE) == (
        "sparse would take 112.0 us for 1 token here, dense 101.0 us"
    )
    assert "for 16 tokens here" in why_dense(SPARSE, DENSE, density=0.9, tokens=16, **SQUARE)


def test_a_tie_is_lowered_since_it_is_smaller():
    assert why_dense(DENSE, DENSE, density=1.0, tokens=1, **SQUARE) == ""


def test_overhead_decides_for_a_tiny_weight():
    assert why_dense(SPARSE, DENSE, out_features=8, in_features=8, density=0.1, tokens=1) != ""


def test_fit_goes_through_two_densities_and_is_flat_for_one():
    speed = fit(1e-6, {0.5: (3.0, 3.0, 3.0), 0.25: (2.0, 2.0, 2.0)})
    assert speed.empty == pytest.approx((1.0,) * 3)
    assert speed.full == pytest.approx((5.0,) * 3)
    assert fit(0.0, {0.5: (3.0, 4.0, 5.0)}) == Speed(0.0, (3.0, 4.0, 5.0), (3.0, 4.0, 5.0))


def test_fit_is_flat_where_noise_falls_and_never_below_zero():
    assert fit(0.0, {0.5: (2.0,) * 3, 0.25: (4.0,) * 3}) == Speed(0.0, (3.0,) * 3, (3.0,) * 3)
    assert fit(0.0, {0.5: (8.0,) * 3, 0.25: (2.0,) * 3}).empty == (0.0,) * 3


FIGURES = st.tuples(*[st.floats(0, 1e-6)] * len(TOKENS))


@given(FIGURES, FIGURES)
def test_what_was_fitted_is_a_speed(low, high):
    fit(1e-6, {0.2: low, 0.5: high})


@given(
    st.lists(st.floats(0, 1e-6), min_size=3, max_size=3).map(sorted),
    st.lists(st.floats(0, 1e-6), min_size=3, max_size=3).map(sorted),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(1, 2000),
    st.integers(1, 2000),
)
def test_more_kept_or_more_tokens_never_cost_less(empty, kept, one, other, few, many):
    (one, other), (few, many) = sorted((one, other)), sorted((few, many))
    full = [e + k for e, k in zip(empty, kept, strict=True)]
    speed = Speed(1e-6, tuple(empty), tuple(full))
    room = 1 + 1e-9  # float sums
    assert speed.seconds(64, 64, one, few) <= speed.seconds(64, 64, other, few) * room
    assert speed.seconds(64, 64, one, few) <= speed.seconds(64, 64, one, many) * room
    assert speed.seconds(64, 64, one, few) <= speed.seconds(64, 65, one, few) * room


@pytest.mark.parametrize(
    ("overhead", "empty", "full", "why"),
    [
        (0.0, (1.0, 1.0), (1.0, 1.0, 1.0), "wants 3 figures, got 2 and 3"),
        (-1.0, (1.0,) * 3, (1.0,) * 3, "finite figures of 0 or more"),
        (0.0, (1.0, math.nan, 1.0), (1.0,) * 3, "finite figures of 0 or more"),
        (0.0, (1.0,) * 3, (1.0, math.inf, 1.0), "finite figures of 0 or more"),
        (0.0, (2.0,) * 3, (1.0,) * 3, "cannot cost less"),
    ],
)
def test_refusals(overhead, empty, full, why):
    with pytest.raises(ValueError, match=why):
        Speed(overhead, empty, full)


def test_formats_have_names_of_their_own():
    storages = [Storage(), Storage("bf16"), Storage("int8"), Storage("int4", 32), Storage("int4", 128)]
    names = {format_name(p, s) for p in (NM(2, 4), NM(1, 4), Unstructured(0.5)) for s in storages}
    assert len(names) == 15
    assert format_name(NM(2, 4), Storage("int4", 32)) == "linear_nm_int4 2:4 int4 group 32"
    assert (
        format_name(Unstructured(0.5), Storage()) == format_name(Unstructured(0.7), Storage()) == "linear_bitmask fp32"
    )
