"""Files in pieces: the same numbers as whole, every node once, and no weights that are handed on."""

import numpy as np
import onnx
import pytest
from sparsify_export.runtime import pieces
from sparsify_export.runtime.benchmark import compare_kernels
from sparsify_export.runtime.pieces import cut, run
from sparsify_export.runtime.session import open_session


@pytest.fixture
def feeds(tiny):
    rng = np.random.default_rng(0)
    return [
        {
            "input_ids": rng.integers(23, size=(2, tokens)),
            "attention_mask": np.ones((2, past + tokens), np.int64),
            **{f"past_key_values.0.{x}": rng.standard_normal((2, 1, past, 8), np.float32) for x in ("key", "value")},
        }
        for tokens, past in ((5, 0), (1, 4), (3, 7))
    ]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("most", [1, 300, 600])
def test_what_pieces_compute_is_what_the_file_computes(tiny, feeds, kernels, most):
    names = ["logits", "present.0.value"]
    found = run(cut(tiny.path, most), feeds, names, kernels=kernels)
    session = open_session(tiny.path, kernels=kernels)
    for feed, outputs in zip(feeds, found, strict=True):
        for one, other in zip(session.run(names, feed), outputs, strict=True):
            np.testing.assert_array_equal(one, other)


def test_pieces_share_out_the_nodes_and_hand_on_no_weights(tiny):
    whole = onnx.load(tiny.path, load_external_data=False).graph
    parts = [onnx.load_from_string(piece.model).graph for piece in cut(tiny.path, 4 * 8 * 8)]
    assert len(parts) == 4
    made = [node.output[0] for part in parts for node in part.node]
    assert sorted(made) == sorted(node.output[0] for node in whole.node)
    # The turned embedding is of weights alone: handed from piece to piece, every text would have one.
    assert not any("head" in value.name for part in parts for value in part.output)


def test_a_file_that_is_small_or_has_bodies_is_left_whole(tiny):
    assert cut(tiny.path) == []
    model = onnx.load(tiny.path)
    body = onnx.helper.make_graph([], "body", [], [onnx.helper.make_tensor_value_info("z", 1, None)])
    model.graph.node.append(onnx.helper.make_node("If", ["one"], ["w"], then_branch=body, else_branch=body))
    onnx.save(model, tiny.path.with_name("bodies.onnx"))
    assert cut(tiny.path.with_name("bodies.onnx"), 1) == []


CONSTANT = """
<ir_version: 10, opset_import: ["" : 23]>
g (float[n, 2] x) => (float[2, 2] c, float[n, 2] y) <float[2, 2] w = {1, 2, 3, 4}>
{
    c = Add (w, w)
    a = MatMul (x, w)
    y = MatMul (a, w)
}
"""


def test_a_file_that_returns_a_constant_is_left_whole(tmp_path):
    file = tmp_path / "constant.onnx"
    onnx.save(onnx.parser.parse_model(CONSTANT), file)
    assert cut(file, 1) == []
    onnx.save(onnx.parser.parse_model(CONSTANT.replace("c = Add (w, w)", "c = Add (x, x)")), file)
    feed = {"x": np.ones((2, 2), np.float32)}
    ((c, y),) = run(cut(file, 1), [feed], ["c", "y"], kernels=False)
    assert c.tolist() == [[2, 2], [2, 2]]
    assert y.tolist() == [[22, 32], [22, 32]]


def test_a_file_in_pieces_is_timed_as_one(tiny, monkeypatch):
    monkeypatch.setattr(pieces, "MOST", 300)
    rows = compare_kernels(tiny.path, repeats=2)
    assert [row.name for row in rows] == ["prefill 128", "decode 64"]
    assert all(row.ratio is not None and row.ratio > 0 and row.runs == 2 for row in rows)
