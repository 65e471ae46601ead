"""What "close" accepts and what it rejects; every other test relies on it."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.passes.equivalence import CEILING, FLOOR, compare, compare_model, compare_unproven, on_grid


def product(seed: int = 0, rows: int = 16, dtype: torch.dtype = torch.float32):
    """A matrix product in ``dtype`` and the same in float64."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rows, rows, generator=generator).to(dtype) for _ in range(2))
    return a @ b, a.double() @ b.double()


def test_the_budget_by_hand():
    exact = torch.tensor([4.0, -8.0], dtype=torch.float64)
    baseline = torch.tensor([4.5, -8.0])
    got = torch.tensor([4.0, -9.0])
    close = compare(got, baseline, exact)
    assert close.error == 1.0
    assert close.budget == 2 * 0.5 + torch.finfo(torch.float32).eps * 8
    assert close.ok
    assert not compare(got, baseline, exact, factor=1.9).ok
    assert str(close) == "max error 1.000e+00, allowed 1.000e+00"


def test_accepts_the_exact_result():
    baseline, exact = product()
    close = compare(exact.float(), baseline, exact)
    assert close.ok
    assert close.error <= close.budget / 2


@given(st.integers(0, 100), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_accepts_what_is_as_wrong_as_the_baseline(seed, dtype):
    baseline, exact = product(seed, dtype=dtype)
    assert compare(baseline, baseline, exact).ok
    assert compare(2 * exact - baseline.double(), baseline, exact).ok  # as far off, on the other side


@pytest.mark.parametrize(
    "spoil",
    [
        lambda y: y * 1.01,
        lambda y: y * 0,
        lambda y: y * 50,
        lambda y: y.T,
        lambda y: y.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(math.nan)),
        lambda y: y.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(math.inf)),
    ],
    ids=["x1.01", "x0", "x50", "transposed", "one NaN", "one infinity"],
)
def test_rejects(spoil):
    baseline, exact = product()
    assert not compare(spoil(baseline.clone()), baseline, exact).ok


def test_an_exact_baseline_leaves_one_rounding_step():
    exact = torch.tensor([1.0, 0.25], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    assert compare(torch.tensor([1.0 + eps, 0.25]), exact.float(), exact).ok
    assert not compare(torch.tensor([1.0 + 2 * eps, 0.25]), exact.float(), exact).ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_same_nan_everywhere_is_still_not_close(value):
    bad = torch.full((2,), value)
    assert not compare(bad, bad, bad.double()).ok


def test_nan_in_the_baseline_or_the_truth_never_passes():
    good, bad = torch.ones(2), torch.tensor([1.0, math.nan])
    assert not compare(good, bad, good.double()).ok
    assert not compare(good, good, bad.double()).ok


def test_an_infinite_baseline_does_not_make_everything_close():
    good, bad = torch.ones(2), torch.tensor([1.0, math.inf])
    assert not compare(good * 50, bad, good.double()).ok


def test_refuses_shapes_that_broadcast():
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"shapes differ: got \(1, 3\), baseline \(3,\), exact \(3,\)"):
        compare(x[None], x, x.double())


def test_nothing_equals_nothing():
    assert compare(torch.ones(0, 4), torch.ones(0, 4), torch.ones(0, 4).double()).ok


EPS = torch.finfo(torch.float32).eps


def test_a_model_has_a_floor_where_its_baseline_is_right_by_luck():
    exact = torch.tensor([0.05], dtype=torch.float64)
    lucky = exact.float()
    assert not compare(exact.float() + 4e-8, lucky, exact, factor=4).ok
    close = compare_model(exact.float() + 4e-8, lucky, exact)
    assert close.ok
    assert close.budget == pytest.approx(FLOOR * EPS * 0.05)
    assert not compare_model(exact.float() * 1.001, lucky, exact).ok


def test_a_model_has_a_ceiling_where_its_baseline_is_wrong():
    exact = torch.tensor([4.0, -8.0], dtype=torch.float64)
    wrong = torch.tensor([40.0, 8.0])
    assert compare(torch.zeros(2), wrong, exact).ok  # any multiple of a wrong baseline is too much
    assert compare_model(torch.zeros(2), wrong, exact) == compare_model(torch.zeros(2), -wrong, exact)
    assert compare_model(torch.zeros(2), wrong, exact).budget == CEILING * 8
    assert not compare_model(torch.zeros(2), wrong, exact).ok


@pytest.mark.parametrize(("terms", "seed"), [(k, s) for k in (64, 1024, 4096) for s in range(4)])
def test_one_number_from_many_terms_is_within_the_floor_in_any_order(terms, seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(2, 64, terms, generator=generator)
    exact = (x.double() * w.double()).sum(1)
    one_by_one = torch.zeros(64)
    for k in range(terms):
        one_by_one += x[:, k] * w[:, k]
    assert compare_model(one_by_one, exact.float(), exact).ok
    assert not compare_model(exact.float() + 1e-3 * exact.abs().max().float(), exact.float(), exact).ok


def test_without_a_truth_more_is_allowed_but_no_wrong_result():
    other = torch.tensor([4.0, -8.0])
    assert compare_unproven(other * (1 + 1e-4), other).ok
    assert not compare_unproven(other * 1.001, other).ok
    assert not compare_unproven(other.bfloat16() * 2, other.bfloat16()).ok
    assert not compare_unproven(other * torch.inf, other).ok


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_weight_lies_within_a_step_of_the_weight(bits):
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    step = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded = (weight / step).round() * step
    assert on_grid(rounded, weight, bits)
    assert not on_grid(torch.zeros_like(weight), weight, bits)
    assert not on_grid(rounded.roll(1, 0), weight, bits)
    assert not on_grid(rounded * 1.2 if bits == 4 else rounded * 1.01, weight, bits)
