import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsify_export.calibrate.choice import choose, keep_codes, kept, prune, sparsities, start_near
from sparsify_export.calibrate.masks import nm_keep_mask
from sparsify_export.calibrate.patterns import NM

PATTERNS = (NM(4, 8), NM(2, 4), NM(1, 4), None)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def test_codes_hold_the_mask_of_every_pattern():
    score = torch.rand(5, 16, generator=generator(0))
    codes = keep_codes(score, PATTERNS)
    for d, pattern in enumerate(PATTERNS):
        wanted = torch.ones(5, 16, dtype=torch.bool) if pattern is None else nm_keep_mask(score, pattern)
        assert torch.equal(kept(codes, d), wanted)
    assert sparsities(PATTERNS) == [0.5, 0.5, 0.75, 0.0]


def test_value_and_gradient_match_the_mixture_written_out():
    score = torch.rand(3, 8, generator=generator(1))
    codes = keep_codes(score, PATTERNS)
    weight = torch.randn(3, 8, generator=generator(2), requires_grad=True)
    beta = torch.tensor([[0.1, 0.2, 0.4, 0.3]], requires_grad=True)
    masks = torch.stack([kept(codes, d).float() for d in range(4)])
    soft = (beta[0, :, None, None] * masks).sum(0)
    wanted = weight * (masks[2] + (soft - soft.detach()))
    got = prune(weight, codes, beta)
    torch.testing.assert_close(got, wanted)
    loss = torch.randn(3, 8, generator=generator(3))
    for a, b in zip(
        torch.autograd.grad((got * loss).sum(), (weight, beta)),
        torch.autograd.grad((wanted * loss).sum(), (weight, beta)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_starts_with_the_patterns_next_to_the_target():
    assert start_near(PATTERNS, 0.5).argmax().item() == 0  # of equals the first
    assert start_near(PATTERNS, 0.7).argmax().item() == 2
    assert start_near(PATTERNS, 0.1).argmax().item() == 3


@settings(max_examples=50)
@given(st.integers(1, 4), st.integers(0, 2**32), st.integers(0, 40))
def test_the_choice_is_the_best_of_all(count, seed, target):
    likelihood = torch.randn(count, 3, generator=generator(seed), dtype=torch.float64).tolist()
    prunes = torch.randint(0, 9, (count, 3), generator=generator(seed)).tolist()
    everything = list(itertools.product(range(3), repeat=count))
    enough = [picks for picks in everything if sum(c[d] for c, d in zip(prunes, picks, strict=True)) >= target]
    if not enough:
        with pytest.raises(ValueError, match=f"no choice of patterns prunes {target} weights"):
            choose(likelihood, prunes, target)
        return
    found = choose(likelihood, prunes, target)
    best = max(enough, key=lambda picks: sum(row[d] for row, d in zip(likelihood, picks, strict=True)))
    assert found == list(best)


def test_refuses():
    with pytest.raises(ValueError, match="the learned probabilities hold NaN"):
        choose([[float("nan")]], [[1]], 0)
    with pytest.raises(ValueError, match="at most 8 patterns"):
        keep_codes(torch.rand(1, 4), [None] * 9)
    with pytest.raises(ValueError, match="score holds NaN"):
        keep_codes(torch.full((1, 8), float("nan")), PATTERNS)
