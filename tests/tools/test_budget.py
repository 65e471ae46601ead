"""The whole command with a budget, on tiny models; and what cannot be is refused."""

import json

import numpy as np
import onnx
import pytest
import torch
from families import partitioned, random_model
from sparsify_export import budget as module
from sparsify_export.budget import Group, candidates, make_groups, told_mix
from sparsify_export.calibrate.budget import Option
from sparsify_export.calibrate.patterns import NM
from sparsify_export.cli import main
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.form import Form
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.recipe import Recipe
from sparsify_export.passes.sensitivity import Witness
from sparsify_export.runtime.machine import Machine
from sparsify_export.runtime.workload import Workload
from sparsify_export.settings import SILENT
from toys import export, stack, weights

FAST = ["--effort", "fast", "--samples", "4", "--seq-len", "32", "--quiet"]
RECIPE = Recipe(NM(2, 4))


def read(path):
    return json.loads(path.read_text())


def test_a_size_asks_nothing_of_a_model_that_takes_no_text(images, tmp_path):
    """It has no workload: the default, decoding, is nothing that a model of images could run."""
    (tmp_path / "in").mkdir()
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32), np.float32)
    np.savez(tmp_path / "in" / "0.npz", pixel_values=pixels)
    np.savez(tmp_path / "in" / "1.npz", pixel_values=pixels[::-1])
    flags = ["--nm", "2:4", "--effort", "fast", "--calibration-inputs", str(tmp_path / "in"), "--quiet"]
    assert main([str(images), *flags, "--bytes", "0.8", "-o", str(tmp_path / "m.onnx")]) == 0
    choice = read(tmp_path / "m.onnx.report.json")["choice"]
    assert abs(choice["tries"][-1]["measured"]["size"] / 0.8 - 1) <= 0.05


@pytest.mark.slow
def test_linears_get_the_pattern_or_stay_dense(folder, tmp_path):
    assert main([str(folder), "--nm", "2:4", *FAST, "--bytes", "0.8", "-o", str(tmp_path / "half")]) == 0
    report = read(tmp_path / "half" / "report.json")
    left = [x["path"] for x in report["linears"] if x["reason"] == "the budget leaves it dense"]
    groups = report["choice"]["groups"]
    assert sorted(left) == sorted(path for g in groups if g["form"] == "dense fp32" for path in g["linears"])
    assert 0 < len(left) < 14
    assert {each["form"] for g in groups for each in g["forms"]} == {"dense fp32", "2:4 fp32"}
    graph = onnx.load(tmp_path / "half" / "model.onnx", load_external_data=False).graph
    assert sum(node.op_type == "linear_nm" for node in graph.node) == sum(g["form"] == "2:4 fp32" for g in groups)
    assert not list(tmp_path.glob(".*"))


def test_every_linear_gets_the_form_that_was_chosen_for_it(folder, tmp_path, monkeypatch):
    """Each group another form, said by a stand-in for the solver; the file is verified as always."""
    wanted = ["dense int8", "2:4 int4 g32", "0.5 bf16", "dense int4 g32", "8:16 int8", "dense fp32", "6:8 fp32"]

    def search(groups, goal, dense, measure, tell):
        names = [[str(form) for form in each] for each in seen]
        picks = tuple(names[i].index(wanted[i % len(wanted)]) for i in range(len(groups)))
        return [module.Try(picks, 0.0, 0.0, 0.5, measure(picks))]

    seen, choose_forms = [], module.choose_forms

    def noted(groups, *rest):
        seen.extend(group.forms for group in groups)
        return choose_forms(groups, *rest)

    monkeypatch.setattr(module, "search", search)
    monkeypatch.setattr("sparsify_export.budgeted.choose_forms", noted)
    monkeypatch.setattr(module, "_better", lambda *forms, timed: False)
    out = tmp_path / "mix"
    effort = ["--effort", "balanced", *FAST[2:]]
    assert main([str(folder), *effort, "--bytes", "0.5", "-o", str(out)]) == 0
    report = read(out / "report.json")
    forms = [g["form"] for g in report["choice"]["groups"]]
    assert forms == [wanted[i % len(wanted)] for i in range(8)]
    ops = {
        "dense fp32": "MatMul",
        "dense int8": "MatMulNBits",
        "dense int4 g32": "MatMulNBits",
        "0.5 bf16": "linear_bitmask",
    }
    nodes = onnx.load(out / "model.onnx", load_external_data=False).graph.node
    found = [node for node in nodes if node.op_type.startswith(("linear_", "MatMul"))]
    kinds = {"2:4 int4 g32": "linear_nm_int4", "8:16 int8": "linear_nm_int8", "6:8 fp32": "linear_nm"}
    assert [node.op_type for node in found] == [*[{**ops, **kinds}[form] for form in forms], "MatMul"]
    bits = [a.i for node in found if node.op_type == "MatMulNBits" for a in node.attribute if a.name == "bits"]
    assert bits == [8, 4, 8]
    linears = {x["path"]: x for x in report["linears"]}
    for group in report["choice"]["groups"]:
        pattern = group["form"].split()[0]
        for path in group["linears"]:
            assert linears[path]["pattern"] == (None if pattern == "dense" else pattern)
            coded = "int" in group["form"]
            assert (linears[path]["quantiser"] == "sweep") == coded
    assert {x["reason"] for x in report["linears"]} == {
        "",
        "dense, in 8 bits",
        "dense, in 4 bits",
        "the budget leaves it dense",
        "outside the repeated layers",
    }


def test_a_weight_that_several_linears_share_is_one_group_and_counted_once():
    """Two blocks of which the second runs the layers of the first."""
    model = stack(layers=3)
    model.layers[1].up, model.layers[1].down = model.layers[0].up, model.layers[0].down
    program = export(model, torch.randn(2, 8))
    parts, params = partition(program), weights(program)
    sites = {(place, x.node): x for place, part in enumerate(parts.blocks) for x in part.linears}
    assert len({x.weight for x in sites.values()}) < len(sites)
    drawn = torch.Generator().manual_seed(5)
    seen = Witness(
        {site: site for site in sites},
        {site: torch.randn(64, x.in_features, generator=drawn) for site, x in sites.items()},
        {site: torch.randn(64, x.out_features, generator=drawn) for site, x in sites.items()},
        {site: torch.ones(x.in_features) for site, x in sites.items()},
    )
    forms = candidates(RECIPE, Storage("int8"), chosen=True)
    groups = make_groups(parts, params, seen, RECIPE, forms, Machine({}), None, SILENT)
    dense = {x.weight: x.out_features * x.in_features * 4 for x in sites.values()}
    assert sum(group.options[0].nbytes for group in groups) == sum(dense.values())
    keys = [key for group in groups for key in group.weights]
    assert sorted(keys) == sorted(dense)
    assert sorted(site for group in groups for op in group.ops for site, _ in op) == sorted(sites)


def test_forms_that_another_beats_in_everything_are_not_looked_at(monkeypatch):
    """A clock for which codes take a half, of 4 bits and of 8, and every pattern half as long again as none."""

    def seconds(self, form, rows, columns, *, tokens, weights, bias):
        return (0.5 if form.storage.kind in ("int8", "int4") else 1.0) * (1.0 if form.pattern is None else 1.5)

    monkeypatch.setattr(Machine, "seconds", seconds)
    parts, params = (
        partitioned("llama"),
        {f"model.{n}": x.detach() for n, x in random_model("llama").named_parameters()},
    )
    sites = {(place, x.node): x for place, part in enumerate(parts.blocks) for x in part.linears}
    drawn = torch.Generator().manual_seed(5)
    seen = Witness(
        {site: site for site in sites},
        {site: torch.randn(64, x.in_features, generator=drawn) for site, x in sites.items()},
        {site: torch.randn(64, x.out_features, generator=drawn) for site, x in sites.items()},
        {site: torch.ones(x.in_features) for site, x in sites.items()},
    )
    forms = candidates(RECIPE, None, chosen=False)
    assert len(forms) == 1 + 2 + 4 * len(module.PATTERNS)
    groups = make_groups(parts, params, seen, RECIPE, forms, Machine({}), Workload(1, 64), SILENT)
    assert {tuple(map(str, group.forms)) for group in groups} == {("dense fp32", "dense int8", "dense int4 g32")}
    assert all(option.damage > 0 for group in groups for option in group.options[1:])


def test_a_mix_is_told_by_how_many_linears_have_which_form():
    forms = (Form(), Form(NM(2, 4), Storage("int8")))
    groups = [
        Group(((((0, "n"), linear),),), forms, (Option(0, 0, 0),) * 2)
        for linear in partitioned("llama").blocks[0].linears
    ]
    assert told_mix(groups, [0, 1, 1, 0, 1, 1, 1]) == "5 2:4 int8, 2 dense fp32"


@pytest.mark.slow
def test_a_loss_is_held_against_the_perplexity(folder, text, tmp_path, monkeypatch):
    """By a clock for which time is bytes."""
    monkeypatch.setattr(Machine, "seconds", lambda self, form, rows, columns, **kw: 1e-9 * form.nbytes(rows, columns))
    flags = ["--max-loss", "5%", "--workload", "decode:8", "--eval", str(text), "--window", "32", "--windows", "2"]
    assert main([str(folder), *FAST, *flags, "-o", str(tmp_path / "m")]) == 0
    report = read(tmp_path / "m" / "report.json")
    found = report["evaluation"]["result"]["perplexity"] / report["evaluation"]["dense"]["perplexity"] - 1
    assert report["choice"]["losses"][-1] == pytest.approx(found, abs=1e-3)
    assert report["choice"]["losses"][-1] <= 0.05
    assert report["choice"]["tries"][-1]["damage"] <= np.log(1.05)
    assert all(group["form"] != "dense fp32" for group in report["choice"]["groups"])


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--nm", "2:4", "--speedup", "2", "--bytes", "0.5"], "were both given"),
        (["--nm", "2:4", "--speedup", "1"], "out of range"),
        (["--nm", "2:4", "--bytes", "1"], "out of range"),
        (["--max-loss", "0"], "out of range"),
        (["--max-loss", "much"], "out of range"),
        (["--max-loss", "2%"], "want --eval FILE"),
        (["--nm", "2:4", "--workload", "decode:64"], "no effect without --speedup"),
        (["--nm", "2:4", "--speedup", "2", "--workload", "walk"], "is none"),
        (["--nm", "2:4", "--bytes", "0.5", "--lower", "auto"], "cannot be had with --lower auto"),
        (["--nm", "2:4", "--bytes", "0.5", "--ops", "standard"], "cannot be had with --ops standard"),
        (["--nm", "2:4", "--bytes", "0.5", "--checkpoint", "ck"], "cannot be had with --checkpoint"),
        (["--sparsity", "0.5", "--bytes", "0.5", "--allocate", "besa-nm"], "learns several"),
        (["--nm", "2:4", "--bytes", "0.01", *FAST], "out of reach: with every linear that gains as 2:4 fp32, it is 0."),
        (["--nm", "2:4", "--speedup", "2", "--workload", "run", *FAST], "want decode:PAST or prefill:TOKENS"),
    ],
)
def test_budgets_that_cannot_be_are_refused(flags, why, folder, tmp_path, capsys):
    assert main([str(folder), *flags, "-o", str(tmp_path / "m.onnx")]) == 2
    assert why in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_engines_and_onnx_files_are_refused(folder, tmp_path, capsys):
    for model, out in ((str(folder), "m.plan"), ("m.onnx", "n.onnx")):
        assert main([model, "--nm", "2:4", "--bytes", "0.5", "-o", str(tmp_path / out)]) == 2
    assert capsys.readouterr().err.count("cannot be had with") == 2
