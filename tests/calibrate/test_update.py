"""Weight updates: against slow references, by what they promise, and at the edges."""

import itertools
import math

import hypothesis
import pytest
import reference
import torch
from hypothesis import strategies as st
from sparsify_export.calibrate import damping
from sparsify_export.calibrate.admm import admm
from sparsify_export.calibrate.alps import alps
from sparsify_export.calibrate.damping import damped_inverse, damped_spectrum, sweep_factor
from sparsify_export.calibrate.masked_cg import masked_cg
from sparsify_export.calibrate.masks import keep_mask, nm_keep_mask
from sparsify_export.calibrate.patterns import NM, RowCounts, Unstructured, fits
from sparsify_export.calibrate.sparsegpt import sweep
from sparsify_export.calibrate.update import DAMPING, prepare, relative_error, update

METHODS = ["sparsegpt", "admm", "cg", "admm-cg", "alps"]
TARGETS = [NM(2, 4), NM(1, 4), NM(3, 8), Unstructured(0.5), Unstructured(0.7)]


def layer(rows=6, columns=16, tokens=64, seed=0):
    """A weight, and the Hessian of correlated inputs of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) + 2 * torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix * torch.logspace(-1, 1, columns)
    return torch.randn(rows, columns, generator=generator), (2 / tokens) * x.mT @ x


def magnitude_mask(weight, target):
    return keep_mask(weight.abs(), target, "matrix")


def close(got, wanted):
    torch.testing.assert_close(got.double(), wanted, rtol=1e-3, atol=1e-3)


def test_the_sweep_with_a_mask_against_obs():
    weight, hessian = layer(columns=20)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    found, same = sweep(weight, sweep_factor(damped_inverse(hessian, 0.01).matrix), keep)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(20, dtype=torch.float64)
    close(found, reference.obs_sweep(weight, damped, keep))
    assert torch.equal(same, keep)


@pytest.mark.parametrize("block", [4, 8, 128])
@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (3, 4)])
def test_the_sweep_chooses_groups_as_obs_does(monkeypatch, nm, block):
    monkeypatch.setattr("sparsify_export.calibrate.sparsegpt.BLOCK", block)
    weight, hessian = layer(columns=24)
    found, keep = sweep(weight, sweep_factor(damped_inverse(hessian, 0.01).matrix), NM(*nm))
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(24, dtype=torch.float64)
    wanted = reference.obs_sweep(weight, damped, nm=nm)
    assert torch.equal(keep, wanted != 0)
    close(found, wanted)


def test_an_unstructured_sweep_counts_over_128_columns_and_is_right_to_the_weight():
    weight, hessian = layer(rows=7, columns=300, tokens=900)
    _, keep = sweep(weight, sweep_factor(damped_inverse(hessian, 0.01).matrix), Unstructured(0.3))
    assert int((~keep).sum()) == int(0.3 * weight.numel() + 0.5)
    for start, end in ((0, 128), (128, 256), (256, 300)):
        assert abs(int((~keep[:, start:end]).sum()) - 0.3 * 7 * (end - start)) <= 1


def test_the_sweep_refuses_features_that_are_no_groups():
    weight, hessian = layer(columns=18)
    with pytest.raises(ValueError, match="in_features 18 is not a multiple of 4, as 2:4 wants"):
        sweep(weight, sweep_factor(damped_inverse(hessian, 0.01).matrix), NM(2, 4))


def test_admm_with_a_mask_against_its_definition():
    weight, hessian = layer()
    hessian = hessian / hessian.diagonal().mean()
    keep = magnitude_mask(weight, NM(2, 4))
    found, same = admm(weight, hessian, damped_inverse(hessian, 0.0, shift=1.0).matrix.float(), keep)
    close(found, reference.admm(weight, hessian, [keep] * 20))
    assert torch.equal(same, keep)


def test_admm_prunes_by_a_cubic_schedule_and_spares_the_best_of_a_group():
    weight, hessian = layer(rows=4, columns=8)
    hessian = hessian / hessian.diagonal().mean()
    inverse = damped_inverse(hessian, 0.0, shift=1.0).matrix.float()
    first, keep = admm(weight, hessian, inverse, NM(2, 4), iterations=1, gradual=2)
    assert int((~keep).sum()) == int(32 * 0.5 * (1 - 0.5**3))
    spared = nm_keep_mask(weight.abs(), NM(2, 4))
    assert bool((keep | ~spared).all())
    assert weight.abs()[~keep].max() <= weight.abs()[keep & ~spared].min()
    close(first, reference.admm(weight, hessian, [keep]))
    _, keep = admm(weight, hessian, inverse, Unstructured(0.25), iterations=1, gradual=2)
    assert int((~keep).sum()) == int(32 * 0.25 * (1 - 0.5**3))


def test_admm_chooses_what_rows_lose_whose_counts_are_given():
    weight, hessian = layer(rows=4, columns=8)
    hessian = hessian / hessian.diagonal().mean()
    inverse = damped_inverse(hessian, 0.0, shift=1.0).matrix.float()
    counts = torch.tensor([0, 3, 5, 8])
    first, keep = admm(weight, hessian, inverse, RowCounts(counts), iterations=1, gradual=2)
    assert (~keep).sum(dim=1).tolist() == [int(n * (1 - 0.5**3)) for n in (0, 3, 5, 8)]
    for row, kept in zip(weight.abs(), keep, strict=True):
        assert kept.all() or row[~kept].max() <= row[kept].min()
    close(first, reference.admm(weight, hessian, [keep]))
    found, keep = admm(weight, hessian, inverse, RowCounts(counts))
    assert (~keep).sum(dim=1).tolist() == (found == 0).sum(dim=1).tolist() == [0, 3, 5, 8]


@pytest.mark.parametrize("iterations", [1, 3, 7, 10, 30])
def test_alps_against_its_definition(iterations):
    weight, hessian = layer(rows=16, columns=32, tokens=300)
    scale = hessian.diagonal().sqrt()
    weight, hessian = weight * scale, hessian / scale / scale[:, None]
    found, keep = alps(weight, hessian, damped_spectrum(hessian, 0.0), NM(2, 4), iterations=iterations)
    wanted, _ = reference.alps(weight, hessian, (2, 4), iterations)
    assert torch.equal(keep, wanted != 0)
    assert torch.equal(found != 0, keep)
    close(found, wanted)


def test_the_penalty_of_alps_grows_with_the_changes_of_the_mask_and_it_ends_when_there_are_none():
    weight, hessian = layer(rows=16, columns=32, tokens=300)
    scale = hessian.diagonal().sqrt()
    weight, hessian = weight * scale, hessian / scale / scale[:, None]
    spectrum = damped_spectrum(hessian, 0.0)
    wanted, penalties = reference.alps(weight, hessian, (2, 4), 300)
    assert penalties[:6] == [0.1] * 6  # two masks three steps apart are known after six
    assert {round(b / a, 6) for a, b in itertools.pairwise(penalties)} == {1.0, 1.1, 1.2, 1.3}
    assert len(penalties) < 300
    found, keep = alps(weight, hessian, spectrum, NM(2, 4), iterations=300)
    ended, _ = alps(weight, hessian, spectrum, NM(2, 4), iterations=len(penalties))
    assert torch.equal(found, ended)
    close(found, wanted)
    given, same = alps(weight, hessian, spectrum, keep, iterations=300)
    six, _ = alps(weight, hessian, spectrum, keep, iterations=6)
    assert torch.equal(given, six)
    assert torch.equal(same, keep)


@pytest.mark.parametrize(
    "target", [NM(2, 4), Unstructured(0.5), RowCounts(torch.arange(24) * 2)], ids=lambda target: type(target).__name__
)
def test_alps_beats_admm_where_inputs_are_correlated(target):
    ratios = []
    for seed in range(8):
        weight, hessian = layer(rows=24, columns=64, tokens=500, seed=seed)
        found = {method: update(weight, prepare(hessian, method), target, per="row")[0] for method in METHODS[-2:]}
        before, after = (relative_error(w, weight, hessian) for w in found.values())
        ratios.append(math.log(after / before))
        if isinstance(target, RowCounts):
            assert torch.equal((found["alps"] == 0).sum(dim=1), target.pruned)
    assert sum(ratios) / len(ratios) < math.log(0.95)


@pytest.mark.parametrize("method", ["admm", "admm-cg", "alps"])
def test_a_mask_that_is_chosen_beats_one_that_is_given_with_the_same_counts(method):
    weight, hessian = layer(rows=8, columns=24, tokens=200)
    given = magnitude_mask(weight, Unstructured(0.5))
    inputs = prepare(hessian, method)
    fixed, _ = update(weight, inputs, given, per="row")
    chosen, keep = update(weight, inputs, RowCounts((~given).sum(dim=1)), per="row")
    assert torch.equal(keep.sum(dim=1), given.sum(dim=1))
    assert relative_error(chosen, weight, hessian) < relative_error(fixed, weight, hessian)


def test_conjugate_gradients_reach_the_best_weights():
    weight, hessian = layer(columns=12, tokens=200)
    keep = magnitude_mask(weight, NM(2, 4))
    scale = hessian.diagonal().sqrt()
    found = masked_cg(weight * scale, hessian / scale / scale[:, None], keep, weight * scale, iterations=50) / scale
    close(found, reference.best_weight(weight, hessian, keep))
    assert torch.equal(found != 0, keep)


@hypothesis.given(st.integers(0, 1000), st.sampled_from(TARGETS), st.integers(0, 12))
@hypothesis.settings(max_examples=30)
def test_a_step_of_conjugate_gradients_never_loses(seed, target, iterations):
    weight, hessian = layer(seed=seed)
    keep = magnitude_mask(weight, target)
    start = torch.where(keep, weight, 0.0)
    found = masked_cg(weight, hessian, keep, start, iterations=iterations)
    before, after = (relative_error(w, weight, hessian) for w in (start, found))
    assert after <= before * (1 + 1e-4)
    assert bool((found[~keep] == 0).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_method_beats_the_mask_alone_and_makes_the_pattern(method, target):
    weight, hessian = layer(rows=24, columns=64, tokens=500)
    mask = magnitude_mask(weight * hessian.diagonal().sqrt(), target)
    inputs = prepare(hessian, method)
    masked = relative_error(torch.where(mask, weight, 0.0), weight, hessian)
    for wanted in [mask] if method == "cg" else [mask, target]:
        found, keep = update(weight, inputs, wanted, per="matrix")
        assert relative_error(found, weight, hessian) < masked
        assert torch.equal(found != 0, keep)
        assert not bool(torch.signbit(found[~keep]).any())
        if wanted is mask:
            assert torch.equal(keep, mask)
        elif isinstance(target, NM):
            assert fits(keep, target)
        assert int(keep.sum()) == int(mask.sum())


@pytest.mark.parametrize("method", METHODS)
def test_dead_features_and_dead_rows_stay_finite(method):
    weight, hessian = layer(rows=4, columns=16)
    weight[2] = 0.0
    for dead in ([5], [4, 5, 6, 7], list(range(16))):
        own = hessian.clone()
        own[dead], own[:, dead] = 0.0, 0.0
        target = magnitude_mask(weight, NM(2, 4)) if method == "cg" else NM(2, 4)
        found, keep = update(weight, prepare(own, method), target, per="matrix")
        assert bool(found.isfinite().all())
        assert fits(keep, NM(2, 4))
        assert not bool(found[2].any())
        kept = torch.where(keep, weight, 0.0)
        assert torch.equal(found[:, dead], kept[:, dead])  # neither shrunk nor moved


@pytest.mark.parametrize("method", ["admm", "admm-cg", "alps"])
def test_dead_features_change_nothing_for_the_others(method):
    """As many again that are never seen: under a mask, the seen half is fitted as it is alone."""
    weight, hessian = layer(rows=8, columns=16)
    wider = torch.zeros(32, 32)
    wider[:16, :16] = hessian
    keep = magnitude_mask(weight, NM(2, 4))
    alone, _ = update(weight, prepare(hessian, method), keep, per="matrix")
    both = torch.cat([weight, weight], dim=1)
    found, _ = update(both, prepare(wider, method), torch.cat([keep, keep], dim=1), per="matrix")
    torch.testing.assert_close(found[:, :16], alone, rtol=1e-4, atol=1e-5)


def test_damping_rises_until_the_matrix_is_positive_definite():
    x = torch.ones(3, 8)
    hessian = (2 / 3) * x.mT @ x
    found = damped_inverse(hessian, 0.0)
    assert found.damping >= 1e-4
    damped = hessian.double() + found.damping * 2 * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(found.matrix @ damped, torch.eye(8, dtype=torch.float64))
    assert damped_inverse(hessian, 0.05).damping == 0.05
    assert prepare(hessian, "sparsegpt", 0.0).raised == found.damping
    assert prepare(hessian, "sparsegpt").raised == 0.0
    assert prepare(hessian, "admm", 0.0).raised == 0.0  # the identity is added in any case


def test_a_spectrum_is_that_of_the_damped_matrix():
    _, hessian = layer(columns=12)
    found = damped_spectrum(hessian, 0.05)
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(12)
    torch.testing.assert_close(found.vectors * found.values @ found.vectors.mT, damped, rtol=1e-4, atol=1e-3)
    assert found.damping == 0.05
    singular = damped_spectrum(torch.full((8, 8), 3.0) - torch.diag(torch.full((8,), 1e-5)), 0.0)
    assert singular.damping == 1e-4
    assert float(singular.values[0]) > 0


def test_a_matrix_without_a_spectrum_is_refused():
    with pytest.raises(ValueError, match=r"not positive definite with any damping from 0\.01 to 10"):
        damped_spectrum(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 0.01)
    with pytest.raises(ValueError, match="damping wants 0 or more, got -1"):
        damped_spectrum(torch.eye(2), -1.0)
    with pytest.raises(ValueError, match="the Hessian is not finite; look for infinities"):
        damped_spectrum(torch.tensor([[1.0, 0.5], [0.5, torch.inf]]), 0.01)


def test_damping_that_cannot_help_is_refused():
    with pytest.raises(ValueError, match=r"not positive definite with any damping from 0\.01 to 10"):
        damped_inverse(torch.tensor([[1.0, 50.0], [50.0, 1.0]]), 0.01)
    with pytest.raises(ValueError, match="damping wants 0 or more, got -1"):
        damped_inverse(torch.eye(2), -1.0)


def test_one_thread_inside_and_as_many_as_before_after():
    threads = torch.get_num_threads()
    with damping.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("method", METHODS)
def test_the_number_of_threads_decides_nothing(method):
    weight, hessian = layer(rows=96, columns=192, tokens=400)
    threads, found = torch.get_num_threads(), []
    target = magnitude_mask(weight, NM(2, 4)) if method == "cg" else NM(2, 4)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(update(weight, prepare(hessian, method), target, per="matrix"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][i], other[i]) for other in found for i in (0, 1))


def test_relative_error_by_hand():
    weight, hessian = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    assert relative_error(torch.tensor([[1.0, 0.0]]), weight, hessian) == pytest.approx(4.0 / 8.0)
    assert relative_error(weight, weight, hessian) == 0.0
    assert relative_error(weight, torch.zeros(1, 2), hessian) == 0.0


def test_every_method_has_its_damping():
    assert list(DAMPING) == METHODS
