"""The table of what updates cost: every step measured, with the formula beside it."""

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent.parent / "tools"))  # behind the installed package

import bench_updates


def test_every_step_is_measured_for_every_size(capsys):
    bench_updates.main(sizes="16,32", tokens=64, json=True)
    costs = json.loads(capsys.readouterr().out)
    found = {(cost["step"], cost["rows"], cost["columns"]) for cost in costs}
    assert found == {(step, r, c) for step in bench_updates.FORMULAS for r in (16, 32) for c in (16, 32)}
    assert all(cost["seconds"] > 0 and cost["bytes"] >= 0 for cost in costs)
    (admm,) = [c["operations"] for c in costs if (c["step"], c["rows"], c["columns"]) == ("admm", 16, 32)]
    assert admm == pytest.approx(21 * 2 * 16 * 32 * 32)
    assert {cost["tokens"] for cost in costs if cost["step"] == "Hessian"} == {32, 64}


def test_the_table_names_steps_and_formulas(capsys):
    bench_updates.main(sizes="16", tokens=64)
    shown = capsys.readouterr().out
    assert all(step in shown and formula in shown for step, (formula, *_) in bench_updates.FORMULAS.items())
