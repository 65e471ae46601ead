"""Quantisation inside the pipeline: what it promises of weights, scales and reports, and what it leaves alone."""

import pytest
import torch
from sparsify_export.calibrate.besa import Learning
from sparsify_export.calibrate.grid import spread
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.dialect.packed import pack
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.rewrite import lower_linears, stored_weights
from sparsify_export.passes.pipeline import prune
from sparsify_export.passes.quantise import for_packing
from sparsify_export.passes.recipe import Quantise, Recipe, Tune
from toys import export, stack, weights

TWO_OF_FOUR, HALF = NM(2, 4), Unstructured(0.5)
INT4, INT8 = Storage("int4", 32), Storage("int8")
UP, DOWN = "model.layers.0.up.weight", "model.layers.0.down.weight"
WIDE = {"width": 48, "hidden": 96}  # 32 columns and a tail


def inputs(count=8, rows=8, tokens=20, width=48):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(width, width, generator=generator)
    return [Batch((torch.randn(rows, tokens, width, generator=generator) @ mix,), None) for _ in range(count)]


def pruned(pattern=TWO_OF_FOUR, *, storage=None, method="sweep", **recipe):
    program = export(stack(**WIDE), torch.randn(3, 5, 48))
    params, gridded, patterns = weights(program), {}, {}
    quantise = Quantise(storage, method) if storage else None
    recipe = Recipe(pattern, quantise=quantise, **{"update": "alps", "mask_from": "update", **recipe})
    reports = prune(partition(program), params, recipe, inputs(), quantised=gridded, patterns=patterns)
    return params, {key: for_packing(its, patterns[key]) for key, its in gridded.items()}, reports, program


TUNE = Tune(epochs=6, tokens_per_step=160)
LEARN = Learning()
RECIPES = {
    "rtn": {"method": "rtn"},
    "rtn, no update": {"method": "rtn", "update": "none", "mask_from": "score"},
    "sweep": {},
    "sweep, tuned": {"tune": TUNE},
    "joint": {"method": "joint", "tune": TUNE},
    "joint rates": {"method": "joint", "allocation": LEARN, "mask_from": "score"},
    "joint rates, no update": {"method": "joint", "allocation": LEARN, "update": "none", "mask_from": "score"},
}


@pytest.mark.parametrize(
    ("name", "storage"), [*((name, INT4) for name in RECIPES), ("sweep", INT8), ("joint", INT8)], ids=str
)
def test_every_weight_packs_to_what_the_next_block_saw(name, storage):
    pattern = HALF if "rates" in name else TWO_OF_FOUR
    params, on_grid, reports, program = pruned(pattern, storage=storage, **RECIPES[name])
    assert on_grid.keys() == {key for key in params if "layers" in key and key.endswith("weight")}
    for key, its in on_grid.items():
        zero = params[key] == 0
        assert torch.equal(pack(params[key], its.pattern, storage, its.scales).unpack(), params[key])
        assert zero.float().mean() >= (0.3 if "rates" in name else 0.5)
        assert not torch.signbit(params[key][zero]).any()
    for report in reports:
        for linear in report.linears:
            assert linear.quantiser == RECIPES[name].get("method", "sweep")
            assert (linear.error_quantised is None) == (name == "rtn, no update")
    state = program.state_dict
    state.update({key: params[key] for key in on_grid})
    stored = stored_weights(program, lower_linears(program, storage=storage, on_grid=on_grid))
    assert all(torch.equal(stored[key].unpack(), params[key]) for key in on_grid)


def test_the_sweep_leaves_less_error_than_rounding():
    errors = {}
    for name, recipe in {"floats": {}, **{m: {"storage": INT4, "method": m} for m in ("rtn", "sweep")}}.items():
        reports = pruned(**recipe)[2]
        errors[name] = sum(report.error for report in reports)
        if name != "floats":
            errors[f"{name} of linears"] = sum(x.error_quantised for r in reports for x in r.linears)
    assert errors["floats"] < errors["sweep"] < errors["rtn"]
    assert errors["sweep of linears"] < errors["rtn of linears"]


def test_the_mask_is_that_of_floats():
    """Only the first block: the second one sees what the first one's quantisation left."""
    floats, swept = pruned()[0], pruned(storage=INT4)[0]
    for key in (UP, DOWN):
        assert swept[key][floats[key] == 0].eq(0).all()


def test_training_jointly_goes_on_from_the_sweep_and_moves_strengths(monkeypatch):
    tune = Tune(epochs=12, tokens_per_step=640)
    fitted = pruned(storage=INT4, method="joint", tune=tune)[2][0].tuned[1]
    monkeypatch.setattr("sparsify_export.passes.quantise.TURNS", 0)  # which leave nothing to gain in layers this small
    swept, joint = (pruned(storage=INT4, method=method, tune=tune) for method in ("sweep", "joint"))
    floats, on_grid = joint[2][0].tuned
    assert floats.after < fitted.after <= fitted.before < on_grid.before
    assert (floats,) == swept[2][0].tuned
    assert on_grid.linears == floats.linears
    assert floats.after < on_grid.after < on_grid.before
    assert on_grid.epochs <= 3
    assert joint[2][0].error < swept[2][0].error
    assert not torch.equal(joint[1][DOWN].scales, swept[1][DOWN].scales)


def test_strengths_are_learned_with_the_rates():
    found = {}
    for method in ("rtn", "joint"):
        recipe = {"method": method, "allocation": LEARN, "update": "none", "mask_from": "score", "storage": INT4}
        reports = pruned(HALF, **recipe)[2]
        found[method] = sum(report.error for report in reports)
        assert sum(round(x.sparsity * x.shape[0] * x.shape[1]) for r in reports for x in r.linears) == 2 * 48 * 96
    assert found["joint"] < found["rtn"]


def test_patterns_are_learned_with_strengths():
    learning = Learning("pattern", patterns=(NM(2, 4), NM(1, 4), None))
    _, on_grid, reports, _ = pruned(HALF, storage=INT4, method="joint", allocation=learning, mask_from="score")
    assert {str(its.pattern) for its in on_grid.values()} <= {"2:4", "1:4"}
    assert all(x.quantiser == "joint" for r in reports for x in r.linears if x.pattern != "0.000")


def test_what_stays_dense_or_is_not_asked_for_stays_as_it_is():
    floats = pruned(skip=("*.up",))[0]
    params, on_grid, reports, _ = pruned(storage=INT4, skip=("*.up",))
    assert torch.equal(params[UP], floats[UP])
    assert UP not in on_grid
    assert reports[0].linears[0].quantiser is None
    assert pruned()[1] == {}


def test_what_packing_would_not_make_smaller_is_not_quantised():
    """Rows of 4: codes, mask, scale and the row's place take more than 16 bytes. Rows of 8 gain."""
    program = export(stack(width=4, hidden=8), torch.randn(3, 5, 4))
    params, on_grid = weights(program), {}
    recipe = Recipe(Unstructured(0.2), quantise=Quantise(INT8, "rtn"))
    reports = prune(partition(program), params, recipe, inputs(width=4), quantised=on_grid)
    assert {key.split(".")[-2] for key in on_grid} == {"down"}
    assert [linear.quantiser for linear in reports[0].linears] == [None, "rtn"]


def test_a_pattern_with_many_codes_of_0_is_still_the_pattern():
    _, on_grid, _, _ = pruned(NM(4, 8), storage=Storage("int4", 128), method="rtn")
    assert {str(its.pattern) for its in on_grid.values()} == {"4:8"}


def test_a_weight_too_large_for_int4_is_refused():
    program = export(stack(**WIDE), torch.randn(3, 5, 48))
    params = weights(program)
    params[UP] = params[UP] * 1e9
    recipe = Recipe(TWO_OF_FOUR, quantise=Quantise(INT4, "rtn"))
    with pytest.raises(
        InputError, match=r"layers\.0\.up: a scale of .* does not fit float16; store the weights as fp32"
    ):
        prune(partition(program), params, recipe, inputs())


@pytest.mark.parametrize("storage", [INT4, INT8], ids=str)
def test_what_calibration_never_saw_is_rounded_and_not_forgotten(storage):
    """Columns of the first linear that reads zeros: each weight is the nearest on the grid that the row got."""
    program = export(stack(**WIDE), torch.randn(3, 5, 48))
    params, gridded, dead = weights(program), {}, slice(10, 20)
    params["model.first.weight"] = params["model.first.weight"].clone()
    params["model.first.weight"][dead], params["model.first.bias"] = 0.0, params["model.first.bias"].clone()
    params["model.first.bias"][dead] = 0.0
    recipe = Recipe(NM(2, 4), quantise=Quantise(storage, "sweep"), permute="none")
    prune(partition(program), params, recipe, inputs(), quantised=gridded)
    exact, scale = gridded[UP].exact[:, dead], spread(gridded[UP].scales(), 48, storage.grid)[:, dead]
    nearest = (exact / scale).round().clamp(-storage.grid.limit, storage.grid.limit) * scale
    assert int((exact != 0).sum()) > 0
    torch.testing.assert_close(params[UP][:, dead], nearest)
    assert (nearest - exact).norm() < 0.2 * exact.norm()
