"""What a report says of updates: in its JSON for every linear, and in its tables where a user must know."""

import json

import onnx
import pytest
import torch
from rich.console import Console
from sparsify_export.calibrate.patterns import NM
from sparsify_export.calibrate.update import update
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.rewrite import Lowered
from sparsify_export.passes.pipeline import prune
from sparsify_export.passes.recipe import Recipe
from sparsify_export.report import build_report, render
from toys import export, stack, weights

WORSE = "would make its layer worse with any damping, so the weights that its mask keeps stay as they were"
DAMPED = "made its layer worse below a damping of 0.1"
SEEN = 3


def bad(weight, inputs, target, **options):
    """Of `update`, but for the upper linears worse in any case, and for the lower ones where nothing is added."""
    new, keep = update(weight, inputs, target, **options)
    return (3 * new if weight.shape[0] > weight.shape[1] or not options["cautious"] else new), keep


@pytest.fixture(scope="module", params=["as it is", "worse"])
def reported(request, tmp_path_factory):
    """The JSON and the text of a report of a pruned stack, and whether its updates were made worse.

    Which they are on three tokens again and again; else they are as they are, on 300 tokens.
    """
    worse = request.param == "worse"
    parts = partition(program := export(stack(width=64, hidden=128), torch.randn(3, 5, 64)))
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(SEEN if worse else 300, 64, generator=generator)
    batches = [Batch((tokens.repeat(1, 300 // len(tokens), 1),), None) for _ in range(2)]
    recipe = Recipe(NM(2, 4), update="alps", mask_from="update", permute="none")
    with pytest.MonkeyPatch.context() as patch:
        if worse:
            patch.setattr("sparsify_export.passes.update.update", bad)
        blocks = prune(parts, weights(program), recipe, batches)
    folder = tmp_path_factory.mktemp("report")
    graph = onnx.helper.make_graph([], "empty", [], [])
    onnx.save(onnx.helper.make_model(graph), folder / "m.onnx")
    linears = [linear for part in parts.blocks for linear in part.linears]
    report = build_report(
        source="a toy",
        settings={"ops": "sparse", "dtype": "fp32"},
        blocks=blocks,
        lowered=[Lowered(linear, "2:4", "LinearNM", "", 4 * 64 * 128, 2 * 64 * 128) for linear in linears],
        embeddings=(),
        verified=[],
        evaluation=None,
        latency=[],
        stages=[],
        machine=None,
        pruning_seconds={},
        distilled=(),
        model=folder / "m.onnx",
        uncrossed=(),
    )
    report.save(folder / "m.json", files=["m.onnx"])
    shown = Console(width=240)
    with shown.capture() as text:
        shown.print(render(report))
    return json.loads((folder / "m.json").read_text())["linears"], text.get(), worse


def test_the_json_says_of_every_linear_what_became_of_its_update(reported):
    linears, _, worse = reported
    assert [entry["path"] for entry in linears] == [f"layers.{i}.{name}" for i in (0, 1) for name in ("up", "down")]
    for entry in linears:
        wanted = (WORSE if entry["path"].endswith("up") else DAMPED) if worse else ""
        assert entry["refused"] == wanted
        same = entry["error_after"] == entry["error_before"]
        assert same == (wanted == WORSE)


def test_the_json_says_how_many_directions_the_inputs_have_been_seen_in(reported):
    """As many as there are different tokens, or as the inputs have (a norm or a bias may cost or hide one)."""
    linears, _, worse = reported
    for entry in linears[:2]:
        assert (
            entry["directions"] == SEEN if worse else entry["shape"][1] - 2 <= entry["directions"] <= entry["shape"][1]
        )


def test_the_tables_name_what_was_refused_and_nothing_where_all_is_well(reported):
    linears, text, worse = reported
    assert ("Updates that made a layer worse" in text) == worse
    for entry in linears:
        (row,) = [line for line in text.splitlines() if entry["path"] in line and "layer worse" in line] or [""]
        if worse:
            assert entry["refused"] in row
            assert f"{entry['error_before']:.3f}" in row
            assert f"{entry['error_after']:.3f}" in row


def test_the_tables_say_where_calibration_shows_the_fewest_directions(reported):
    linears, text, worse = reported
    fewest = min(linears, key=lambda entry: entry["directions"] / entry["shape"][1])
    wanted = f"{fewest['directions']} of {fewest['shape'][1]} for {fewest['path']}, the fewest"
    assert wanted in text
    assert not worse or wanted == "3 of 128 for layers.0.down, the fewest"
