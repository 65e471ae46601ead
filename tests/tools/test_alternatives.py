"""The table of alternatives: what it is made of, and the sentence below it."""

import json

import numpy as np
import pytest
from markupsafe import escape
from sparsify_export.alternatives import Alternative, Compared, of_form, uniform, workload_of
from sparsify_export.budget import Choice, Group
from sparsify_export.calibrate.budget import Option
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.calibrate.search import Measured, Try
from sparsify_export.cli import main
from sparsify_export.html_report import read_view, render_html
from sparsify_export.passes.dialect.storage import FP32, Storage
from sparsify_export.passes.form import Form
from sparsify_export.passes.fx.linears import Linear
from sparsify_export.passes.recipe import Quantise, Recipe
from sparsify_export.runtime.workload import Workload
from sparsify_export.settings import Budget, Settings

INT8, INT4 = Storage("int8"), Storage("int4", 32)
FREE = Budget(2.0, None, Workload(1, 64), pattern=False)


def row(name, ms, perplexity, failed=""):
    return Alternative(name, ms, 1.0, 1, perplexity, failed)


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (
            [("dense int4", 4.0, 20.0)],
            "Dense int4 is better here: 4.00 ms at a perplexity of 20.00, this file 5.00 ms at",
        ),
        ([("dense int4", 5.1, 20.0)], "Dense int4 is better here"),  # as fast, within noise
        ([("dense int4", 4.0, 22.05)], "Dense int4 is better here"),  # as close
        ([("dense int4", 5.0, 22.05)], "Dense int4 is as good here"),
        ([("dense fp32", 9.0, 18.0)], "Nothing in the table is as fast."),
        ([("dense fp32", 9.0, 18.0), ("all 2:4 int8", 4.0, 30.0)], "Nothing in the table is as fast and loses less."),
    ],
)
def test_the_verdict_follows_from_times_and_losses(others, said):
    compared = Compared("decode:64", row("this file", 5.0, 22.0), tuple(row(*each) for each in others))
    assert compared.verdict.startswith(said)


def test_what_was_not_measured_is_not_judged():
    result = row("this file", 5.0, None)
    assert "what it costs was not measured" in Compared("run", result, (row("dense", 9.0, None),)).verdict
    assert Compared("run", result, (row("dense", 3.0, None),)).verdict.startswith("Dense is faster")
    failed = Alternative("dense int8", None, None, None, None, "no such node")
    assert Compared("run", row("this file", 5.0, 22.0), (failed,)).verdict == "Nothing in the table is as fast."


def choice(*forms):
    """Of groups of one linear each."""
    groups = [
        Group(
            ((((0, f"n{i}"), Linear(f"l{i}", f"n{i}", "x", f"w{i}", None, 8, 8)),),),
            (Form(), form),
            (Option(1, 1, 0), Option(0.5, 1, 1)),
        )
        for i, form in enumerate(forms)
    ]
    return Choice(FREE, tuple(groups), Measured(1, 1), (Try((1,) * len(groups), 0, 0, 1, Measured(1, 1)),))


def test_a_mix_is_compared_with_the_forms_that_most_of_it_has():
    made = choice(
        *[Form(NM(2, 4), INT8)] * 2,
        *[Form(None, Storage("int4", 32, blocked=True))] * 9,
        *[Form(NM(6, 8))] * 3,
        *[Form(NM(4, 8))] * 4,
        Form(Unstructured(0.5)),
    )
    settings = Settings(Recipe(NM(2, 4)), budget=FREE)
    assert list(map(str, uniform(settings, made))) == ["4:8 fp32", "6:8 fp32", "2:4 int8"]
    assert uniform(settings, None) == []
    named = Settings(Recipe(NM(1, 4)), storage=INT8, budget=Budget(2.0, None, Workload(1, 64)))
    assert uniform(named, made) == [Form(NM(1, 4), INT8)]


def test_a_uniform_recipe_is_the_same_with_one_form():
    recipe = Recipe(NM(2, 4), quantise=Quantise(INT4, "sweep"), forms=(("a", Form(NM(2, 4))),), update="alps")
    made = of_form(Settings(recipe, budget=FREE, alternatives=True), Form(Unstructured(0.7), INT8))
    assert made.recipe.pattern == Unstructured(0.7)
    assert (made.recipe.permute, made.recipe.update, made.recipe.quantise) == ("none", "alps", Quantise(INT8, "sweep"))
    assert (made.storage, made.budget, made.alternatives) == (INT8, None, False)
    floats = of_form(Settings(recipe, budget=FREE), Form(NM(2, 4)))
    assert (floats.recipe.quantise, floats.storage, floats.recipe.permute) == (None, FP32, "fold")


def test_the_workload_is_what_was_said_or_suits_the_model():
    class Model:
        kind, inputs = "causal", ("input_ids",)

    settings = Settings(None)
    assert workload_of(Model, settings) == Workload(1, 64)
    assert workload_of(Model, Settings(None, workload=Workload(9))) == Workload(9)
    Model.kind = "encoder"
    assert workload_of(Model, settings) == Workload(128)
    Model.inputs = ("pixel_values",)
    assert workload_of(Model, settings) == Workload(0)


def test_the_command_makes_measures_and_tells_them(images, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    np.savez(tmp_path / "in" / "0.npz", pixel_values=pixels)
    flags = ["--nm", "2:4", "--effort", "fast", "--calibration-inputs", str(tmp_path / "in"), "--bytes", "0.8"]
    out = tmp_path / "m.onnx"
    assert main([str(images), *flags, "--alternatives", "-o", str(out)]) == 0
    said = capsys.readouterr().out
    compared = json.loads((tmp_path / "m.onnx.report.json").read_text())["alternatives"]
    rows = {each["name"]: each for each in compared["rows"]}
    assert list(rows) == [
        "this file",
        "dense fp32",
        "dense int8, ONNX Runtime's",
        "dense int4, ONNX Runtime's",
        "all 2:4 fp32",
    ]
    sizes = {name: each["nbytes"] for name, each in rows.items()}
    data = sum(path.stat().st_size for path in tmp_path.glob("m.onnx*") if "report" not in path.name)
    assert sizes["this file"] == data
    assert sizes["dense fp32"] > sizes["this file"] > sizes["all 2:4 fp32"] > sizes["dense int4, ONNX Runtime's"]
    assert all(each["ms"] > 0 and not each["failed"] for each in rows.values())
    assert compared["workload"] == "run"
    assert "was not measured" in compared["verdict"]
    assert "Alternatives" in said
    assert "dense int8, ONNX" in said
    page = render_html([read_view(out)])
    assert "alternative: dense int8" in page
    assert str(escape(compared["verdict"])) in page
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--nm", "2:4", "--alternatives", "--ops", "standard"], "cannot be had with --ops standard"),
        (["--nm", "2:4", "--alternatives", "--workload", "walk"], "is none"),
    ],
)
def test_alternatives_that_cannot_be_are_refused(flags, why, folder, tmp_path, capsys):
    assert main([str(folder), *flags, "-o", str(tmp_path / "m.onnx")]) == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert main(["m.onnx", "--nm", "2:4", "--alternatives", "-o", str(tmp_path / "n.onnx")]) == 2
    assert "cannot be had with m.onnx, an .onnx file" in " ".join(capsys.readouterr().err.split())
