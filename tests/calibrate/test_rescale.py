"""Scales that suit given codes: by hand, against a solver, by what they promise, and at the edges."""

import numpy as np
import pytest
import torch
from rounded_layer import layer, nearest, scale_of
from sparsify_export.calibrate import rescale as rescaling
from sparsify_export.calibrate.grid import Grid, quantise, spread
from sparsify_export.calibrate.rescale import rescale
from sparsify_export.calibrate.update import relative_error

EXACT = Grid(7, 32, torch.float32)
GRIDS = [EXACT, Grid(7, 32, torch.float16), Grid(127, 0, torch.float32)]


def on_grid(columns=80, grid=EXACT, rows=6, seed=0):
    """A pruned weight, its Hessian, what rounding makes of it and the scales of that."""
    weight, _, hessian = layer(rows=rows, columns=columns, seed=seed)
    scale = scale_of(weight, hessian, grid)
    return weight, hessian, nearest(weight, scale, grid), scale


def codes_of(value, scale, grid):
    return (value / spread(scale, value.shape[1], grid).clamp_min(1e-30)).round()  # a group of zeros has no scale


def with_scales(value, old, new, grid):
    """The same codes on other scales."""
    return codes_of(value, old, grid) * spread(new, value.shape[1], grid)


def test_by_hand():
    """Codes 1 and 2 for 1.2 and 2.0: s is (1.2 + 2 * 2.0) / 5. The other group reads other inputs."""
    weight, value = torch.tensor([[1.2, 2.0, 3.0, 0.0]]), torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    grid, scale = Grid(7, 2, torch.float32), torch.tensor([[1.0, 2.0]])
    torch.testing.assert_close(rescale(weight, torch.eye(4), value, scale, grid), torch.tensor([[1.04, 3.0]]))
    # Where input 3 is input 1 once more, the second group makes up for what the first cannot reach.
    hessian = torch.eye(4)
    hessian[0, 2] = hessian[2, 0] = 0.5
    a, b = np.array([[5.0, 0.5], [0.5, 1.0]]), np.array([1.2 + 4.0 + 1.5, 0.6 + 3.0])
    wanted = torch.tensor(np.linalg.solve(a, b)[None], dtype=torch.float32)
    torch.testing.assert_close(rescale(weight, hessian, value, scale, grid), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("columns", [31, 32, 33, 80])
def test_against_least_squares(monkeypatch, columns):
    """With H = X^T X they are a regression of what w makes of X on what each group's codes make of it."""
    monkeypatch.setattr(rescaling, "ROWS", 4)
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(400, columns, generator=generator, dtype=torch.float64)
    weight = layer(rows=6, columns=columns)[0]
    hessian = (x.mT @ x).float()
    scale = scale_of(weight, hessian, EXACT)
    value = nearest(weight, scale, EXACT)
    found = rescale(weight, hessian, value, scale, EXACT)
    codes = codes_of(value, scale, EXACT).double()
    for row in range(len(weight)):
        made = torch.stack([x[:, g : g + 32] @ codes[row, g : g + 32] for g in range(0, columns, 32)], dim=1)
        there = made.any(dim=0)  # the last group may be a single weight, and that pruned
        wanted = np.linalg.lstsq(made[:, there].numpy(), (x @ weight[row].double()).numpy(), rcond=None)[0]
        assert found[row, there].numpy() == pytest.approx(wanted, rel=1e-4)
        assert torch.equal(found[row, ~there], scale[row, ~there])


@pytest.mark.parametrize("grid", GRIDS, ids=["int4 exact", "int4", "int8"])
def test_no_row_gets_worse_and_most_get_better(grid):
    for seed in range(4):
        weight, hessian, value, scale = on_grid(grid=grid, rows=20, seed=seed)
        found = rescale(weight, hessian, value, scale, grid)
        assert torch.equal(found.to(grid.dtype).float(), found)
        moved = with_scales(value, scale, found, grid)
        before, after = (
            torch.tensor([relative_error(q[None], w[None], hessian) for q, w in zip(qs, weight, strict=True)])
            for qs in (value, moved)
        )
        assert (after <= before * (1 + 1e-5)).all()
        assert (after < before).float().mean() > 0.8
        again = rescale(weight, hessian, moved, found, grid)
        torch.testing.assert_close(again, found, rtol=max(1e-4, 2 * torch.finfo(grid.dtype).eps), atol=0)
        if grid.dtype == torch.float32:
            assert relative_error(moved, weight, hessian) < 0.97 * relative_error(value, weight, hessian)


def test_groups_without_codes_dead_inputs_and_negative_scales_keep_theirs():
    weight, hessian, value, scale = on_grid()
    weight[0], value[0], scale[0] = 0.0, 0.0, 0.0  # a row of zeros
    value[1, :32] = 0.0  # a group whose codes are all 0
    hessian[64:], hessian[:, 64:] = 0.0, 0.0  # inputs that are never there
    found = rescale(weight, hessian, value, scale, EXACT)
    assert found[0].eq(0).all()
    assert found[1, 0] == scale[1, 0]
    assert torch.equal(found[:, 2], scale[:, 2])
    assert not torch.equal(found[2:, :2], scale[2:, :2])
    # Codes of the wrong sign want a scale below 0.
    grid, scale = Grid(7, 2, torch.float32), torch.tensor([[1.0]])
    assert rescale(-torch.ones(1, 2), torch.eye(2), torch.ones(1, 2), scale, grid).item() == 1.0
    assert rescale(torch.empty(0, 2), torch.eye(2), torch.empty(0, 2), torch.empty(0, 1), grid).shape == (0, 1)


def test_a_hessian_of_less_rank_than_groups_moves_nothing_far():
    weight, _, value, scale = on_grid()
    x = torch.randn(1, 80, generator=torch.Generator().manual_seed(1))
    found = rescale(weight, x.mT @ x, value, scale, EXACT)
    assert found.isfinite().all()
    assert (found > 0).all()
    error = (with_scales(value, scale, found, EXACT) - weight) @ x[0]
    assert (error.abs() <= ((value - weight) @ x[0]).abs() * (1 + 1e-5)).all()


def test_the_number_of_threads_decides_nothing():
    weight, hessian, value, scale = on_grid(columns=300, rows=40)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(rescale(weight, hessian, value, scale, EXACT))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found[1:])


def test_what_is_on_its_grid_already_stays():
    _, hessian, value, scale = on_grid()
    assert torch.equal(rescale(value, hessian, value, scale, EXACT), scale)
    assert torch.equal(quantise(value, spread(scale, 80, EXACT), EXACT), value)
