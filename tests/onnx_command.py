"""Runs the command on an ONNX model, to a report or to a refusal."""

import json

from sparsify_export.cli import main

WAYS = ["kernels", "functions", "kernels, each linear", "functions, each linear"]
"""How a result is compared with the model given."""


def compiled(source, out, *flags):
    assert main([str(source), *map(str, flags), "--quiet", "-o", str(out)]) == 0
    report = out / "report.json" if out.is_dir() else out.with_name(out.name + ".report.json")
    return json.loads(report.read_text())


def refused(capsys, out, *arguments):
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert main([*map(str, arguments), "--quiet", "-o", str(out)]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert sorted(out.parent.iterdir()) == before
    return said.removeprefix("sparsify-export: ")
