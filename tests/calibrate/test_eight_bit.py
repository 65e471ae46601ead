"""8-bit codes by hand and against every code there is, and the scale that loses least."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from sparsify_export.calibrate.eight_bit import LARGEST, STRENGTHS, Magnitudes, codes, rounded

KINDS = ["int8", "fp8"]


def seen(x, mask=None):
    magnitudes = Magnitudes()
    magnitudes.update(torch.as_tensor(x, dtype=torch.float32).reshape(-1, 1), mask)
    return magnitudes


def test_codes_by_hand():
    x = torch.tensor([0.0, 0.25, 0.75, -1.25, 63.5, 64.0, 1e4, -1e4])
    assert codes(x, 0.5, "int8").tolist() == [0, 0, 2, -2, 127, 127, 127, -128]  # ties to even
    # From 8 to 16 float8 has every whole number, from 16 to 32 every second; below 2^-6 steps of 2^-9.
    x = torch.tensor([0.0, 8.5, 9.5, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 1e4, -1e4])
    got = codes(x, 1.0, "fp8")
    assert got.dtype == torch.float8_e4m3fn
    assert got.float().tolist() == [0, 8, 10, 16, 20, 0, 2 * 2.0**-9, 448, -448]


@pytest.mark.parametrize("kind", KINDS)
def test_what_becomes_zero_is_not_negative(kind):
    got = codes(torch.tensor([-0.0, -1e-9, 1e-9]), 1.0, kind)
    assert got.view(torch.uint8).tolist() == [0, 0, 0]


@given(st.floats(-700, 700, width=16), st.floats(2.0**-7, 3, width=16), st.sampled_from(KINDS))
def test_the_nearest_code(x, scale, kind):
    got = rounded(torch.tensor([x], dtype=torch.float64), scale, kind)
    # The quotient is rounded to float32, which can move it to a tie and no further.
    assert float(got) in [reference.eight_bit(x * (1 + e), scale, kind) for e in (-1e-7, 0, 1e-7)]


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_twice_changes_nothing(kind):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).half()
    once = rounded(x, float(np.float16(0.013)), kind)
    assert once.dtype == torch.float16
    assert torch.equal(rounded(once, float(np.float16(0.013)), kind), once)


@pytest.mark.parametrize("kind", KINDS)
def test_the_scale_reaches_to_the_largest_where_nothing_is_gained_by_clipping(kind):
    assert seen([LARGEST[kind] / 4, -2.0, 0.0]).scale(kind) == 0.25


def test_the_scale_clips_one_outlier_among_many():
    """At a scale of 100/127 a million ones are wrong by 0.21 each, which is more than 100 clipped to less."""
    x = [1.0] * 1_000_000 + [100.0]
    errors = {}
    for strength in STRENGTHS:
        scale = float(np.float16(100 * strength / 127))
        wrong = [reference.eight_bit(value, scale, "int8") - value for value in (1.0, 100.0)]
        errors[scale] = wrong[0] ** 2 * 1e6 + wrong[1] ** 2
    best = seen(x).scale("int8")
    assert errors[best] == min(errors.values())
    assert 127 * best < 100
    assert seen(x).scale("int8", (1.0,)) == float(np.float16(100 / 127))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_in_any_order_and_size_give_the_same_scale(kind):
    x = torch.randn(7, 3, 5, generator=torch.Generator().manual_seed(0)) ** 3
    whole, parts = Magnitudes(), Magnitudes()
    whole.update(x)
    for batch in reversed(x.split(2)):
        parts.update(-batch)
    assert whole.scale(kind) == parts.scale(kind)


def test_padding_does_not_count():
    x = torch.tensor([[[1.27], [math.nan]], [[-1.0], [500.0]]])
    magnitudes = Magnitudes()
    magnitudes.update(x, torch.tensor([[1, 0], [1, 0]]))
    assert magnitudes.scale("int8", (1.0,)) == float(np.float16(np.float16(1.27) / 127))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 65520.0])
def test_what_float16_cannot_hold_is_refused_and_not_counted(bad):
    magnitudes = seen([1.0])
    with pytest.raises(ValueError, match="1 activations are NaN, infinite, or more than the 65504"):
        magnitudes.update(torch.tensor([[2.0, bad]]))
    assert magnitudes.scale("int8", (1.0,)) == float(np.float16(1 / 127))


@pytest.mark.parametrize("kind", KINDS)
def test_no_scale_of_nothing(kind):
    with pytest.raises(ValueError, match="no calibration token reached this layer"):
        Magnitudes().scale(kind)
    with pytest.raises(ValueError, match="all zero on the calibration batches"):
        seen([0.0, -0.0, 1e-9]).scale(kind)  # the last is none in float16


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_is_a_positive_float16(kind):
    scale = seen([2.0**-24]).scale(kind)
    assert scale == 2.0**-24
