"""``--dry-run``: the frontier as a table, and nothing written."""

import pytest
from sparsify_export import dry_run
from sparsify_export.budget import Group
from sparsify_export.budgeted import Weighed
from sparsify_export.calibrate.budget import Option
from sparsify_export.calibrate.patterns import NM
from sparsify_export.calibrate.search import Measured
from sparsify_export.cli import main
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.form import Form
from sparsify_export.passes.fx.linears import Linear
from sparsify_export.runtime.machine import Machine
from sparsify_export.runtime.workload import Workload
from sparsify_export.settings import Budget

CODED, PRUNED = Form(None, Storage("int8", blocked=True)), Form(NM(2, 4), Storage("int8"))


def weighed(*options):
    """Two groups, of one and of two linears, dense in 2 ms and 100 bytes each."""
    groups = []
    for place, count in enumerate((1, 2)):
        linears = [Linear(f"l{place}{i}", f"n{place}{i}", "x", f"w{place}{i}", None, 8, 8) for i in range(count)]
        op = tuple(((place, linear.node), linear) for linear in linears)
        groups.append(Group((op,), (Form(), CODED, PRUNED), (Option(2e-3, 100, 0.0), *options)))
    return Weighed(groups, Measured(1000, 1.0, 10.0, 10.0), None)


def frontier(budget, *options):
    return dry_run._frontier(weighed(*options), budget, "logits")


def test_the_frontier_and_the_uniform_forms():
    found = frontier(Budget(None, None, Workload(1, 64)), Option(1e-3, 25, 0.01), Option(0.5e-3, 20, 0.1))
    assert (found.dense.ms, found.dense.speedup, found.dense.size) == (10.0, 1.0, 1.0)
    assert [(each.name, each.ms) for each in found.uniform] == [("all dense int8", 8.0), ("all 2:4 int8", 7.0)]
    assert found.uniform[0].size == pytest.approx(0.85)
    damages = [each.damage for each in found.mixed]
    assert damages == sorted(damages)
    assert [each.ms for each in found.mixed] == sorted((each.ms for each in found.mixed), reverse=True)
    assert found.mixed[-1].ms == 7.0
    assert found.mixed[-1].pruned == 3
    assert (
        dry_run.verdict(found)
        == f"Pruning is predicted to pay from {10 / 7.5:.2f}x on; below that dense weights do less damage."
    )
    assert found.chosen is None


def test_where_pruning_does_not_pay_that_is_said():
    slower = frontier(Budget(None, None, Workload(1, 64)), Option(1e-3, 25, 0.01), Option(1.5e-3, 20, 0.1))
    assert dry_run.verdict(slower).startswith("Pruning is predicted not to pay here")
    nothing = frontier(Budget(None, None, Workload(1, 64)), Option(3e-3, 25, 0.01), Option(2.5e-3, 20, 0.1))
    assert dry_run.verdict(nothing) == "Nothing is predicted to be faster than dense float32 here."


def test_the_budget_has_a_row_of_its_own():
    options = Option(1e-3, 25, 0.01), Option(0.5e-3, 20, 0.1)
    met = frontier(Budget(1.25, None, Workload(1, 64)), *options)
    assert met.reached
    assert met.chosen.name == "3 dense int8"
    assert not frontier(Budget(2.0, None, Workload(1, 64)), *options).reached


def test_the_command_prints_it_and_writes_nothing(folder, tmp_path, capsys, monkeypatch):
    """By a clock for which time is bytes."""
    monkeypatch.setattr(Machine, "seconds", lambda self, form, rows, columns, **kw: 1e-8 * form.nbytes(rows, columns))
    monkeypatch.chdir(tmp_path)
    flags = ["--samples", "2", "--seq-len", "16", "--workload", "decode:8"]
    assert main([str(folder), "--dry-run", *flags]) == 0
    said = capsys.readouterr().out
    assert "Predicted, before any update of weights" in said
    assert "decode:8" in said
    assert "all dense int4 g32" in said
    assert "predicted" in said.splitlines()[-1] or "predicted" in said.splitlines()[-2]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--dry-run", "-o", "out"], "-o out has no effect with --dry-run"),
        (["--dry-run", "--overwrite"], "--overwrite has no effect with --dry-run"),
        (["--dry-run", "--alternatives"], "cannot be had with --dry-run"),
        (["--dry-run", "--eval", "text"], "--eval has no effect with --dry-run"),
        (["--dry-run", "--workload", "run", "--samples", "2", "--seq-len", "16"], "want decode:PAST or prefill:TOKENS"),
        (["--nm", "2:4"], "-o OUT is missing"),
    ],
)
def test_what_has_no_effect_is_refused(flags, why, folder, capsys):
    assert main([str(folder), *flags]) == 2
    assert why in " ".join(capsys.readouterr().err.split())
