import pytest
import torch
from sparsify_export.calibrate.rates import distribution, initial_logits, mean_rate, reachable, staircase


def test_starts_uniform_as_published_or_as_a_bell_around_the_rate():
    uniform = distribution(initial_logits(3, 0.7))
    assert torch.equal(uniform, torch.full((3, 101), 1 / 101))
    assert mean_rate(uniform).tolist() == pytest.approx([0.5] * 3)
    for rate in (0.3, 0.5, 0.7):
        bell = distribution(initial_logits(2, rate, width=0.05))
        assert mean_rate(bell).tolist() == pytest.approx([rate] * 2, abs=1e-6)
        assert bell.argmax(dim=1).tolist() == [round(100 * rate)] * 2


@pytest.mark.parametrize("rate", [0.0, 1.0])
def test_a_narrow_bell_at_the_edge(rate):
    assert mean_rate(distribution(initial_logits(1, rate, width=1e-3))).item() == pytest.approx(rate)


def test_plain_softmax_reaches_every_rate_and_the_bounded_one_does_not():
    extreme = torch.linspace(-1e4, 1e4, 101)[None]
    assert mean_rate(distribution(extreme)).item() == pytest.approx(1.0)
    assert mean_rate(distribution(-extreme)).item() == pytest.approx(0.0)
    low, high = reachable()
    assert (low, high) == (pytest.approx(0.3763, abs=1e-4), pytest.approx(0.6237, abs=1e-4))
    splits = torch.where(torch.arange(101) >= torch.arange(102)[:, None], 1e4, -1e4)
    assert mean_rate(distribution(splits, bounded=True)).max().item() == pytest.approx(high)
    noise = 30 * torch.randn(500, 101, generator=torch.Generator().manual_seed(0))
    rates = mean_rate(distribution(noise + torch.linspace(-60, 60, 101), bounded=True))
    assert low - 1e-6 <= rates.min() <= rates.max() <= high + 1e-6


def test_staircase_by_hand():
    assert staircase(8, 4).tolist() == [0, 2, 4, 6, 8]
    assert staircase(3, 4).tolist() == [0, 0, 1, 2, 3]  # whole weights, rounded down
    # in whole numbers: 0.29 * 100 is 28.999... in floating point
    assert staircase(100, 100).tolist() == list(range(101))


@pytest.mark.parametrize("wrong", [{"rate": 1.5}, {"rate": float("nan")}, {"steps": 0}, {"width": 0.0}])
def test_refuses(wrong):
    with pytest.raises(ValueError, match="want a rate between 0 and 1 and positive steps and width, got rate"):
        initial_logits(1, **{"rate": 0.5, **wrong})
