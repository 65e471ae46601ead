"""The sweep and the descent onto a grid: against slow references, by what they promise, and at the edges."""

import pytest
import reference
import torch
from rounded_layer import layer, nearest, scale_of
from sparsify_export.calibrate.damping import damped_inverse, sweep_factor
from sparsify_export.calibrate.grid import Grid, largest, scales, spread
from sparsify_export.calibrate.quantise import descend, sweep
from sparsify_export.calibrate.update import relative_error

INT4 = Grid(7, 32, torch.float16)
INT8 = Grid(127, 0, torch.float32)


def damped(hessian):
    return hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(len(hessian), dtype=torch.float64)


def swept(weight, keep, hessian, scale, grid):
    return sweep(weight, sweep_factor(damped_inverse(hessian, 0.01).matrix), keep, scale, grid)


def test_the_sweep_by_hand():
    """The first weight is rounded down to 0, and half of that goes to the second one, whose input is half the same."""
    hessian = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    weight, keep = torch.tensor([[0.4, 1.4]]), torch.tensor([[True, True]])
    grid, scale = Grid(7, 2, torch.float32), torch.tensor([[1.0]])
    factor = sweep_factor(torch.linalg.inv(hessian.double()))
    # 0.4 becomes 0, and 1.4 + 0.5 * 0.4 becomes 2
    assert sweep(weight, factor, keep, scale, grid).tolist() == [[0.0, 2.0]]
    assert nearest(weight, scale, grid).tolist() == [[0.0, 1.0]]
    # where the second is pruned nothing can be made up for
    keep = torch.tensor([[True, False]])
    assert sweep(weight * keep, factor, keep, scale, grid).tolist() == [[0.0, 0.0]]


def test_the_descent_by_hand():
    """Input 2 is input 1 once more, so 0.6 and 0.6 are one weight of 1.2: not 1 and 1, but 1 and 0."""
    hessian, weight = torch.ones(2, 2), torch.tensor([[0.6, 0.6]])
    keep, grid, scale = torch.ones(1, 2, dtype=torch.bool), Grid(7, 2, torch.float32), torch.tensor([[1.0]])
    start = nearest(weight, scale, grid)
    assert start.tolist() == [[1.0, 1.0]]
    assert descend(weight, hessian, keep, scale, grid, start).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("grid", [INT4, INT8], ids=["int4", "int8"])
def test_both_against_slow_references(monkeypatch, grid, block):
    monkeypatch.setattr("sparsify_export.calibrate.quantise.BLOCK", block)
    weight, keep, hessian = layer(rows=3, columns=36)  # a group and a tail
    scale = scale_of(weight, hessian, grid)
    each = spread(scale, 36, grid)
    found = swept(weight, keep, hessian, scale, grid)
    wanted = reference.quantised_sweep(weight, damped(hessian), keep, each, grid.limit)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    found = descend(weight, hessian, keep, scale, grid, nearest(weight, scale, grid), passes=2)
    wanted = reference.quantised_descent(
        weight, hessian, keep, each, grid.limit, nearest(weight, scale, grid), passes=2
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("grid", [INT4, INT8], ids=["int4", "int8"])
def test_what_comes_out_is_on_the_grid_and_pruned_weights_stay_pruned(grid):
    weight, keep, hessian = layer(rows=9, columns=150)
    scale = scale_of(weight, hessian, grid)
    found = swept(weight, keep, hessian, scale, grid)
    for result in (found, descend(weight, hessian, keep, scale, grid, found)):
        assert torch.equal(nearest(result, scale, grid), result)
        assert result[~keep].eq(0).all()
        assert not torch.signbit(result[result == 0]).any()


@pytest.mark.parametrize("grid", [INT4, Grid(7, 128, torch.float16), INT8], ids=["int4", "int4 128", "int8"])
def test_less_error_than_rounding(grid):
    errors = []
    for seed in range(8):
        weight, keep, hessian = layer(rows=16, columns=160, seed=seed)
        ones = scales(largest(weight, grid), torch.ones_like(largest(weight, grid)), grid)
        scale = scale_of(weight, hessian, grid)
        one = swept(weight, keep, hessian, scale, grid)
        made = [nearest(weight, ones, grid), nearest(weight, scale, grid), one]
        made += [descend(weight, hessian, keep, scale, grid, one)]
        errors.append([relative_error(new, weight, hessian) for new in made])
        assert errors[-1][3] <= errors[-1][2] * (1 + 1e-5)  # no step of the descent raises it
    rtn, clipped, by_sweep, by_both = torch.tensor(errors).mean(dim=0).tolist()
    assert by_both < by_sweep < clipped
    assert by_both < 0.95 * clipped
    assert clipped <= rtn


def test_dead_inputs_zero_rows_and_a_single_weight():
    weight, keep, hessian = layer(rows=4, columns=40)
    hessian[5], hessian[:, 5] = 0.0, 0.0
    weight[0], keep[0] = 0.0, False
    weight[1], keep[1] = 0.0, False
    weight[1, 39], keep[1, 39] = 0.5, True
    scale = scale_of(weight, hessian, INT4)
    its = damped_inverse(hessian + torch.diag((hessian.diagonal() == 0).float()), 0.01)
    found = descend(weight, hessian, keep, scale, INT4, sweep(weight, sweep_factor(its.matrix), keep, scale, INT4))
    assert found.isfinite().all()
    assert found[0].eq(0).all()
    assert found[1, 39].item() == pytest.approx(0.5, rel=1e-3)


def test_the_number_of_threads_decides_nothing():
    weight, keep, hessian = layer(rows=40, columns=300)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            scale = scale_of(weight, hessian, INT4)
            found.append(descend(weight, hessian, keep, scale, INT4, swept(weight, keep, hessian, scale, INT4)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, found[0]) for other in found[1:])
