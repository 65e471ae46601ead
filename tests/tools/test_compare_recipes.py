"""The table of recipes: what a cell measures, what is planned, and that finished cells are not run again."""

import csv
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import read_windows
from sparsify_export.passes.frontend.load import load
from sparsify_export.passes.recipe import LinearReport, Recipe
from sparsify_export.runtime.evaluate import perplexity, torch_logits

TOOLS = Path(__file__).parent.parent.parent / "tools"
sys.path.append(str(TOOLS))  # behind the installed package, as the tool does it

import compare_recipes  # noqa: E402
from recipe_table.cells import DENSE, METHODS, PATTERNS, Cell, plan, recipe_of  # noqa: E402
from recipe_table.learned import learned  # noqa: E402
from recipe_table.measure import measure  # noqa: E402


@pytest.fixture
def base(folder, text):
    return Cell(str(folder), str(text), str(text), DENSE, "", 2, 32, 48, 3)


def test_every_method_is_a_recipe_and_every_pattern_one(base):
    for pattern in PATTERNS:
        for method in METHODS:
            recipe = recipe_of(replace(base, method=method, pattern=pattern))
            assert isinstance(recipe, Recipe)
            assert (recipe.quantise is not None) == ("int4" in pattern)


def test_quantisers_are_those_of_the_effort_unless_the_method_says(base):
    found = {m: recipe_of(replace(base, method=m, pattern="2:4+int4g32")).quantise for m in METHODS}
    assert {quantise.storage for quantise in found.values()} == {Storage("int4", 32)}
    methods = {"ria": "rtn", "balanced": "sweep", "balanced+rtn": "rtn", "best": "joint", "best+sweep": "sweep"}
    assert {m: found[m].method for m in methods} == methods
    named = [m for m in METHODS if "quantise" in METHODS[m]]
    assert [cell.method for cell in plan(base, named, ["2:4", "0.5+int8"], None, None)] == [DENSE, *named]


def test_dense_is_the_model_itself(base, folder, text):
    found = measure(base)
    pretrained = load(str(folder))
    windows = read_windows(text, pretrained.tokenizer, samples=3, length=48)
    truth = perplexity(torch_logits(pretrained.model), windows)
    assert found["perplexity"] == pytest.approx(truth.perplexity, rel=1e-5)
    assert (found["zeros"], found["error"], found["learned"], found["seconds"]) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("method", "pattern", "zeros", "learned"),
    [
        pytest.param("wanda", "2:4", 0.5, 0, marks=pytest.mark.slow),
        ("cg+fold", "2:4", 0.5, 0.5),
        ("ria", "0.75+int4", 0.75, 0),
    ],
)
def test_a_cell_is_pruned_and_says_what_it_took(base, method, pattern, zeros, learned):
    cell = replace(base, method=method, pattern=pattern)
    found = measure(cell)
    weights = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    assert found["zeros"] == zeros
    assert found["learned"] == learned * weights
    assert found["perplexity"] > 1
    assert 0 < found["error"] < 1
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 1e7
    if "int4" in pattern:
        plain = measure(replace(cell, pattern="0.75"))
        assert plain["error"] != found["error"]  # the blocks run with what is stored
        assert plain["perplexity"] != found["perplexity"]


@pytest.mark.parametrize(
    ("method", "pattern", "varied", "value", "wanted"),
    [
        ("ria", "2:4", "", None, 0),
        ("cg+fold", "2:4", "", None, 400),
        ("best", "2:4", "", None, 400),  # solved for and trained: once
        ("wanda+besa-row", "0.5", "", None, 10 * 101),
        ("wanda+besa-row", "0.5", "rate-step", 0.1, 10 * 11),
        ("wanda+besa-row", "0.5", "granularity", "layer", 101),
        ("wanda+besa-row+cg", "0.5", "", None, 400 + 10 * 101),
        ("best", "2:4+int4g32", "", None, 400 + 10 * 3),  # 80 columns are three groups
        ("best", "2:4+int8", "", None, 400 + 10),
    ],
)
def test_what_is_learned_by_hand(base, method, pattern, varied, value, wanted):
    recipe = recipe_of(replace(base, method=method, pattern=pattern, varied=varied, value=value))
    linears = [LinearReport("a", (10, 80), "2:4", "", sparsity=0.5), LinearReport("b", (10, 80), None, "skipped")]
    assert learned(recipe, linears) == wanted


def test_a_plan_has_every_pattern_method_and_value(base):
    cells = plan(base, ["ria", "wanda"], ["2:4", "0.5"], None, None)
    assert [(cell.method, cell.pattern) for cell in cells] == [
        (DENSE, ""), ("ria", "2:4"), ("wanda", "2:4"), ("ria", "0.5"), ("wanda", "0.5")
    ]  # fmt: skip
    powers = plan(base, ["ria"], ["2:4"], "ria-power", "0,0.5")
    assert [(cell.varied, cell.value, cell.samples) for cell in powers[1:]] == [
        ("ria-power", 0, 2),
        ("ria-power", 0.5, 2),
    ]
    samples = plan(base, ["ria"], ["2:4"], "samples", "1,5")
    assert [(cell.varied, cell.value, cell.samples) for cell in samples[1:]] == [("samples", 1, 1), ("samples", 5, 5)]


def test_linears_can_stay_dense(base):
    assert recipe_of(replace(base, method="ria", pattern="2:4")).skip == ()
    some = recipe_of(replace(base, method="ria", pattern="2:4", skip="model.layers.0.*,*.down_proj"))
    assert some.skip == ("model.layers.0.*", "*.down_proj")


def test_what_besa_learns_can_be_varied(base):
    def learned(vary, values=None):
        cells = plan(base, ["ria", "wanda+besa-row"], ["0.5"], vary, values)
        assert {cell.method for cell in cells[1:]} == {"wanda+besa-row"}
        return [recipe_of(cell).allocation for cell in cells[1:]]

    assert [learning.epochs for learning in learned("epochs", "1,3")] == [1, 3]
    assert [(learning.per, learning.reference) for learning in learned("granularity")] == [
        ("row", "pruned"),
        ("layer", "dense"),
    ]
    assert [learning.rate_steps for learning in learned("rate-step", "0.1,0.02")] == [10, 50]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((["nonsense"], ["2:4"], None, None), "--methods nonsense is not known; want some of magnitude"),
        ((["ria"], ["half"], None, None), "--patterns half: want N:M or a fraction"),
        ((["ria"], ["2:4+int3"], None, None), "int3 is no storage"),
        ((["ria"], ["4:2"], None, None), "0 < n < m"),
        ((["ria"], ["2:4"], "moon", None), "--vary moon is not known; want one of samples, ria-power"),
        ((["ria"], ["2:4"], None, "1"), "--values has no effect without --vary"),
        ((["ria"], ["2:4"], "samples", "1,x"), "--values 1,x: want numbers"),
        ((["ria"], ["0.5"], "epochs", None), "--vary epochs wants a method that learns rates, such as wanda"),
        ((["wanda+besa-row"], ["0.5"], "epochs", "0"), "--vary epochs cannot be 0: epochs"),
        ((["wanda+besa-row"], ["0.5"], "rate-step", "0"), "--vary rate-step cannot be 0.0: want 0.001 to 0.5"),
        ((["wanda+besa-row"], ["0.5"], "granularity", "block"), "granularity cannot be block: want row or layer"),
    ],
)
def test_what_is_not_known_is_refused(base, arguments, said):
    with pytest.raises(InputError, match=said):
        plan(base, *arguments)


def test_finished_cells_are_read_and_others_run(base, tmp_path, monkeypatch, capsys):
    figures = {"mean_nll": 3.0, "perplexity": 20.1, "exact": {"copying": 0.5, "brackets": 0.25, "arithmetic": 0}}
    figures |= {"error": 0.1, "zeros": 0.5, "learned": 0, "seconds": 1.0, "peak_bytes": 10**9, "windows": 3}
    older = {name: value for name, value in asdict(base).items() if name != "skip"}  # a field that came later
    lines = [json.dumps({"cell": older, **figures}), '{"cell": {"mod']  # the second was cut short
    (tmp_path / "cells.jsonl").write_text("\n".join(lines))
    ran = []

    def run(line, **_):
        cell = json.loads(line[-1])
        ran.append(cell["method"])
        if cell["method"] == "ria":
            return subprocess.CompletedProcess(line, 2, "", "the model is damaged\n")
        return subprocess.CompletedProcess(line, 0, json.dumps({"cell": cell, **figures, "mean_nll": 3.5}))

    monkeypatch.setattr(compare_recipes, "subprocess", SimpleNamespace(run=run))  # matplotlib has use for the real one
    settings = {"calibration": Path(base.calibration), "text": Path(base.text), "out": tmp_path, "patterns": "2:4"}
    settings |= {"samples": 2, "seq_len": 32, "window": 48, "windows": 3, "methods": "ria,wanda"}
    assert compare_recipes.main(base.model, **settings) == 1
    assert ran == ["ria", "wanda"]
    assert "failed: ria 2:4: the model is damaged" in capsys.readouterr().out
    assert compare_recipes.main(base.model, **settings | {"methods": "wanda"}) == 0
    assert ran == ["ria", "wanda"]
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(row["method"], row["dln"]) for row in rows] == [("dense", 0.0), ("wanda", 0.5)]
    with (tmp_path / "table.csv").open() as file:
        assert [line["dln"] for line in csv.DictReader(file)] == ["0.0", "0.5"]


def test_a_cell_by_itself(base, capsys):
    assert compare_recipes.cell_command(json.dumps(asdict(replace(base, model="nowhere/at/all")))) == 2
    assert "nowhere/at/all" in capsys.readouterr().err


def test_learned_rates_are_left_out_where_the_pattern_fixes_them(base):
    cells = plan(base, ["wanda", "wanda+besa-row"], ["2:4", "0.5"], None, None)[1:]
    assert [(c.method, c.pattern) for c in cells] == [("wanda", "2:4"), ("wanda", "0.5"), ("wanda+besa-row", "0.5")]


def test_a_missing_matplotlib_is_said_before_anything_runs(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare_recipes.importlib.util, "find_spec", lambda name: None)
    paths = {"calibration": Path(base.calibration), "text": Path(base.text), "out": tmp_path / "out"}
    assert compare_recipes.main(base.model, **paths) == 2
    assert "matplotlib is not installed" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
