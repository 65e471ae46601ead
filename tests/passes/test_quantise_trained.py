"""Weights put on their grids after training: what stays, what the report says, and in which order it is done."""

import pytest
import torch
from sparsify_export.calibrate.besa import Learning
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.calibrate.update import relative_error
from sparsify_export.passes.dialect.packed import pack
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.distil import distil
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.pipeline import prune
from sparsify_export.passes.quantise import for_packing
from sparsify_export.passes.quantise_trained import quantise_trained
from sparsify_export.passes.recipe import Distil, Quantise, Recipe, Timings, Tune
from sparsify_export.passes.sparsify import sparsify
from sparsify_export.passes.tune import warm_up_and_cosine
from toys import export, stack, weights

TWO_OF_FOUR, INT4 = NM(2, 4), Storage("int4", 32)
UP, DOWN = "model.layers.0.up.weight", "model.layers.0.down.weight"
SECOND = "model.layers.1.up.weight"


def inputs(count=9):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(48, 48, generator=generator)
    return [Batch((torch.randn(4, 10, 48, generator=generator) @ mix,), None) for _ in range(count)]


def swept(skip=()):
    """A stack pruned as floats, and then quantised; returns the reports, and the weights before and after."""
    program = export(stack(width=48, hidden=96), torch.randn(3, 5, 48))
    parts, params, batches, grids = partition(program), weights(program), inputs(), {}
    recipe = Recipe(TWO_OF_FOUR, skip=skip, permute="none", update="alps", mask_from="update")
    patterns = {}
    reports = prune(parts, params, recipe, batches, patterns=patterns)
    floats = dict(params)
    recipe = Recipe(TWO_OF_FOUR, skip=skip, quantise=Quantise(INT4, "joint"))
    told = {"progress": lambda *args: None, "note": lambda text: None, "timings": Timings()}
    after = quantise_trained(parts, params, reports, recipe, batches, quantised=grids, patterns=patterns, **told)
    return reports, after, floats, params, grids, batches


def test_weights_are_on_their_grids_with_the_same_zeros_and_nothing_else_changes():
    _, _, floats, params, grids, _ = swept(skip=("layers.1.down",))
    assert len(grids) == 3
    for key, weight in params.items():
        if key in grids:
            its = for_packing(grids[key], TWO_OF_FOUR)
            assert torch.equal(pack(weight, its.pattern, INT4, its.scales).unpack(), weight)
            assert torch.equal(grids[key].exact, floats[key])
            assert (weight[floats[key] == 0] == 0).all()
        else:
            assert weight is floats[key]


def test_the_errors_reported_are_against_the_floats_on_what_quantised_blocks_hand_on():
    reports, after, floats, params, _, batches = swept(skip=("layers.1.down",))
    x = torch.cat([batch.inputs[0] for batch in batches]).flatten(0, 1)
    first = torch.nn.functional.linear(x, floats["model.first.weight"], floats["model.first.bias"])
    hidden = torch.nn.functional.linear(first, floats[UP], floats["model.layers.0.up.bias"]).relu()
    made = torch.nn.functional.linear(first, params[UP], floats["model.layers.0.up.bias"]).relu() @ params[DOWN].T
    found = {linear.path: linear for report in after for linear in report.linears}
    for path, key, seen in (
        ("layers.0.up", UP, first),
        ("layers.0.down", DOWN, hidden),  # of the block as it was, as everywhere
        ("layers.1.up", SECOND, first + made),
    ):
        assert found[path].quantiser == "joint"
        wanted = relative_error(params[key], floats[key], seen.T @ seen)
        assert found[path].error_quantised == pytest.approx(wanted, rel=1e-3)
    left = found["layers.1.down"]
    assert (left.quantiser, left.error_quantised, left.reason) == (None, None, "skipped by --skip")
    before = [linear.error_after for report in reports for linear in report.linears]
    assert [linear.error_after for report in after for linear in report.linears] == before


def test_a_weight_on_a_grid_is_moved_half_as_far_as_a_float():
    """AdamW's first step moves every weight by its learning rate, whatever the gradient is."""
    _, _, _, params, grids, batches = swept(skip=("layers.1.down",))
    dense = weights(export(stack(width=48, hidden=96), torch.randn(3, 5, 48)))
    down = "model.layers.1.down.weight"  # a float, pruned by hand
    params[down] = torch.where(torch.arange(96) % 4 < 2, dense[down], 0.0)
    before = {key: grids[key].near(params[key]) if key in grids else params[key] for key in (*grids, down)}
    parts = partition(export(stack(width=48, hidden=96), torch.randn(3, 5, 48)))
    settings = Distil(epochs=1, rate=0.01, tokens_per_step=10**6)
    report = distil(parts, dense, params, list(before), batches, settings, output="values", quantised=grids)
    assert report.after < report.before
    for key, weight in before.items():
        after = grids[key].exact if key in grids else params[key]
        size = float(weight[weight != 0].square().mean().sqrt())
        moved = (after - weight)[weight != 0].abs() / (warm_up_and_cosine(0.5) * 0.01 * size)
        assert float(moved.quantile(0.9)) == pytest.approx(0.5 if key in grids else 1.0, rel=1e-3)


def trained(pattern=TWO_OF_FOUR, **recipe):
    program = export(stack(width=48, hidden=96), torch.randn(3, 5, 48))
    told = []
    done = sparsify(
        partition(program),
        weights(program),
        Recipe(pattern, **{"update": "alps", "mask_from": "update", **recipe}),
        inputs(),
        output="values",
        progress=lambda stage, *args: told.append(stage),
    )
    return done, list(dict.fromkeys(stage for stage in told if not stage.startswith("tuning")))


DISTIL = Distil(epochs=2, rate=0.01, tokens_per_step=1)


@pytest.mark.parametrize("tune", [None, Tune(epochs=1, tokens_per_step=40)], ids=["", "tuned"])
def test_joint_distils_floats_then_quantises_then_distils_on_the_grid(tune):
    done, told = trained(quantise=Quantise(INT4, "joint"), distil=DISTIL, tune=tune)
    assert told == ["pruning", "distilling", "quantising"]
    floats, on_grid = done.distilled
    alone = trained(distil=DISTIL, tune=tune)[0]
    assert (floats,) == alone.distilled
    assert on_grid.after <= on_grid.before
    assert len(done.on_grid) == 4


def test_joint_after_learned_rates_does_the_same():
    done, told = trained(Unstructured(0.5), quantise=Quantise(INT4, "joint"), distil=DISTIL, allocation=Learning())
    assert [stage for stage in told if not stage.startswith("learning")] == ["pruning", "distilling", "quantising"]
    assert len(done.distilled) == 2
    assert len(done.on_grid) == 4


def test_a_sweep_is_done_first_and_trained_on_its_grid():
    done, told = trained(quantise=Quantise(INT4, "sweep"), distil=DISTIL)
    assert "quantising" not in told
    assert len(done.distilled) == 1
    assert len(done.on_grid) == 4
