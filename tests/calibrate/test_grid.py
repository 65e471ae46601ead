"""The grid of stored integer weights: by hand, against packing, and at the edges."""

import hypothesis
import pytest
import reference
import torch
from hypothesis import strategies as st
from sparsify_export.calibrate.grid import Grid, largest, quantise, scales, search_strengths, spread
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect.packed import pack
from sparsify_export.passes.dialect.storage import Storage

HAND = Grid(7, 2, torch.float16)
STORAGES = [Storage("int8"), Storage("int4", 32), Storage("int4", 64), Storage("int4", 128)]


def nearest(weight, grid, strength=1.0):
    top = largest(weight, grid)
    return quantise(weight, spread(scales(top, torch.full_like(top, strength), grid), weight.shape[1], grid), grid)


def sparse(rows, columns, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return weight * torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(columns // 4)


def test_by_hand():
    weight = torch.tensor([[7.0, -1.4, 0.0, 0.35, 0.35]])
    top = largest(weight, HAND)
    assert top[0].tolist() == pytest.approx([7.0, 0.35, 0.35])
    scale = scales(top, torch.ones_like(top), HAND)
    assert torch.equal(scale, torch.tensor([[1.0, 0.05, 0.05]]).half().float())
    found = quantise(weight, spread(scale, 5, HAND), HAND)
    assert found[0].tolist() == pytest.approx([7.0, -1.0, 0.0, 0.35, 0.35], rel=1e-3)
    half = scales(top, torch.tensor([[0.5, 1.0, 1.0]]), HAND)
    assert quantise(weight, spread(half, 5, HAND), HAND)[0, :2].tolist() == [3.5, -1.5]  # clipped, and nearer


@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_strengths_of_1_are_what_packing_does(storage):
    weight = torch.randn(5, 200, generator=torch.Generator().manual_seed(1)) * torch.logspace(-9, 3, 5)[:, None]
    weight[weight < 0.2] = 0.0
    weight[0, 32:64] = 0.0
    stored = pack(weight, Unstructured(0.5), storage)
    assert torch.equal(nearest(weight, storage.grid), stored.unpack())
    top = largest(weight, storage.grid)
    mine = scales(top, torch.ones_like(top), storage.grid)
    assert torch.equal(mine.reshape(stored.tensors["scales"].shape), stored.tensors["scales"].float())


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(0.5)], ids=str)
@pytest.mark.parametrize("storage", STORAGES, ids=str)
def test_packing_with_the_scales_reproduces_every_weight(storage, pattern):
    weight = sparse(6, 200)
    for strength in (0.43, 0.7, 1.0, 1.7):
        top = largest(weight, storage.grid)
        scale = scales(top, torch.full_like(top, strength), storage.grid)
        value = quantise(weight, spread(scale, 200, storage.grid), storage.grid)
        kept = scale.to(storage.grid.dtype)
        stored = pack(value, pattern, storage, kept if storage.group else kept[:, 0])
        assert torch.equal(stored.unpack(), value)


@hypothesis.given(st.integers(0, 10**6), st.sampled_from(STORAGES), st.floats(0.1, 1.5), st.integers(1, 70))
@hypothesis.settings(max_examples=40, deadline=None)
def test_codes_are_the_nearest_within_the_limit(seed, storage, strength, columns):
    weight = torch.randn(2, columns, generator=torch.Generator().manual_seed(seed))
    weight[weight.abs() < 0.3] = 0.0
    grid = storage.grid
    top = largest(weight, grid)
    scale = spread(scales(top, torch.full_like(top, strength), grid), columns, grid)
    found = quantise(weight, scale, grid)
    for value, step, got in zip(
        weight.flatten().tolist(), scale.flatten().tolist(), found.flatten().tolist(), strict=True
    ):
        assert (
            abs(got - reference.on_grid(value, step, grid.limit)) <= 1e-6 * abs(got)
            or abs(abs(value / step) % 1 - 0.5) < 1e-4
        )  # a tie in float32 is none in float64
    assert found[weight == 0].eq(0).all()
    assert not torch.signbit(found[found == 0]).any()


def test_gradients_are_straight_through():
    weight = torch.tensor([[1.3, -0.2, 4.0, 0.0]], requires_grad=True)
    scale = torch.tensor([[0.5, 0.5, 0.5, 0.0]], requires_grad=True)
    grid = Grid(7, 1, torch.float32)
    found = quantise(weight, scale, grid)
    assert found.tolist() == [[1.5, 0.0, 3.5, 0.0]]
    found.sum().backward()
    assert weight.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    assert scale.grad[0, :3].tolist() == pytest.approx([3 - 2.6, 0.4, 7.0])
    strengths = torch.tensor([[0.9, 0.8]], requires_grad=True)
    scales(torch.tensor([[7.0, 14.0]]), strengths, HAND).sum().backward()
    assert strengths.grad.tolist() == [[1.0, 2.0]]


def test_the_strengths_found_are_the_best_of_those_tried():
    weight, importance = sparse(7, 72, seed=3), torch.rand(72, generator=torch.Generator().manual_seed(4))
    grid = Storage("int4", 32).grid
    found = search_strengths(weight, importance, grid)
    assert found.shape == (7, 3)
    errors = []
    for step in range(20):
        wrong = (nearest(weight, grid, 1 - 0.03 * step) - weight).double().square() * importance
        errors.append(torch.stack([part.sum(dim=1) for part in wrong.split(32, dim=1)], dim=1))
    best = 1 - 0.03 * torch.stack(errors).argmin(dim=0)
    torch.testing.assert_close(found.double(), best.double())
    assert found.min() < 1


def test_groups_of_zeros_and_single_weights():
    weight = torch.zeros(2, 70)
    weight[1, 69] = -0.3
    grid = Storage("int4", 32).grid
    assert search_strengths(weight, torch.ones(70), grid)[0].tolist() == [1.0, 1.0, 1.0]
    assert torch.equal(nearest(weight, grid)[0], torch.zeros(70))
    assert nearest(weight, grid)[1, 69].item() == pytest.approx(-0.3, rel=1e-3)
    assert scales(largest(weight, grid), torch.ones(2, 3), grid)[0].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    weight = torch.ones(2, 4)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="the weight holds NaN or infinity"):
        largest(weight, HAND)


def test_a_scale_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="a scale of 142857 does not fit float16"):
        scales(torch.tensor([[1e6]]), torch.ones(1, 1), HAND)
