"""Names mean something within a graph: two bodies with equal names are two bodies, in the result and in its proof."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_command import compiled, refused
from onnx_models import FLOAT, build, dense, node, rng, saved, sparse_kn
from sparsify_export import onnx_in
from sparsify_export.cli import main
from sparsify_export.passes.onnx.protos import graphs

X = rng(9).standard_normal((3, 64)).astype(np.float32)


def body(weight, *, name="fc", initializer=True):
    """``y = x w``, every name the same in every body."""
    nodes = [node("MatMul", ["x", "w"], ["y"], name=name)]
    stored = [numpy_helper.from_array(weight, "w")]
    if not initializer:
        nodes, stored = [node("Constant", [], ["w"], value=stored[0]), *nodes], []
    return helper.make_graph(nodes, "body", [], [helper.make_tensor_value_info("y", FLOAT, [3, None])], stored)


def loop(weight, x, y):
    """Two rounds of ``h = h w``, starting at ``x``; every name the same in every loop."""
    graph = helper.make_graph(
        [node("MatMul", ["h", "w"], ["z"], name="fc"), node("Identity", ["on"], ["go"])],
        "loop",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", FLOAT, [3, 64]),
        ],
        [helper.make_tensor_value_info("go", TensorProto.BOOL, []), helper.make_tensor_value_info("z", FLOAT, [3, 64])],
        [numpy_helper.from_array(weight, "w")],
    )
    return node("Loop", ["two", "", x], [y], body=graph)


def choice(then, otherwise, **more):
    proto = build([node("If", ["c"], ["out"], then_branch=then, else_branch=otherwise)], {"x": [3, 64]}, ["out"], more)
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    return proto


def loops():
    first, second = loop(dense(64, 64, 1), "x", "one"), loop(dense(64, 64, 2), "one", "out")
    return build([first, second], {"x": [3, 64]}, ["out"], {"two": np.array(2)})


CASES = {
    "two loops": loops(),
    "two branches": choice(body(dense(64, 32, 1)), body(dense(64, 32, 2))),
    "two branches of constants": choice(
        body(dense(64, 32, 1), initializer=False), body(dense(64, 32, 2), initializer=False)
    ),
    "branches of two widths": choice(body(dense(64, 32, 1)), body(dense(64, 48, 2))),
    "a body that takes an outer name for its input": build(
        [
            node("Exp", ["x"], ["h"]),
            loop(dense(64, 64, 1), "x", "one"),
            node("MatMul", ["h", "v"], ["g"], name="g"),
            node("Add", ["g", "one"], ["sum"]),
            node("Exp", ["sum"], ["out"]),
        ],
        {"x": [3, 64]},
        ["out"],
        {"two": np.array(2), "v": dense(64, 64, 3)},
    ),
}


def run(path, **feed):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)[0]


def pruned(proto):
    """The same with the two smaller of every four weights along K set to zero, by position and not by name."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)

    def zero(tensor):
        weight = numpy_helper.to_array(tensor).copy()
        if weight.ndim == 2:
            # RIA without activations: a weight's share of its row and of its column
            share = np.abs(weight) / np.abs(weight).sum(0, keepdims=True)
            share += np.abs(weight) / np.abs(weight).sum(1, keepdims=True)
            groups = share.T.reshape(weight.shape[1], -1, 4)
            rank = np.argsort(np.argsort(-groups, axis=2), axis=2)
            weight[(rank >= 2).reshape(weight.shape[1], -1).T] = 0
            tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))

    def walk(graph):
        for tensor in graph.initializer:
            zero(tensor)
        for n in graph.node:
            for attribute in n.attribute:
                if attribute.HasField("t"):
                    zero(attribute.t)
                if attribute.HasField("g"):
                    walk(attribute.g)

    walk(copy.graph)
    return copy


@pytest.mark.parametrize("case", CASES)
def test_namesakes_keep_their_own_weights(tmp_path, case):
    given, out = saved(CASES[case], tmp_path, "given.onnx"), tmp_path / "o.onnx"
    report = compiled(given, out, "--nm", "2:4")
    assert [e["op"] for e in report["linears"]] == ["linear_nm"] * 2
    want = saved(pruned(CASES[case]), tmp_path, "want.onnx")
    switch = "c" in {value.name for value in CASES[case].graph.input}
    for feed in [{"c": np.array(value)} for value in (True, False)] if switch else [{}]:
        np.testing.assert_allclose(run(out, x=X, **feed), run(want, x=X, **feed), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", ["two loops", "two branches", "two branches of constants"])
def test_the_proof_finds_weights_that_were_mixed_up(tmp_path, case, monkeypatch, capsys):
    """As they were when weights were looked up by their names alone."""
    find = onnx_in.find_linears

    def mixed(model):
        (first, second), left = find(model)
        return [first, replace(second, weight=replace(second.weight, read=first.weight.read))], left

    monkeypatch.setattr(onnx_in, "find_linears", mixed)
    given, out = saved(CASES[case], tmp_path, "given.onnx"), tmp_path / "o.onnx"
    assert main([str(given), "--nm", "2:4", "--quiet", "-o", str(out)]) == 4
    assert "differs from the dense model" in capsys.readouterr().err
    assert not out.exists()


def test_reasons_are_not_swapped_between_namesakes(tmp_path):
    """Nodes of one name in two bodies; one is no multiple of 4 wide."""

    def reading(k, name):
        nodes = [node("MatMul", [name, "w"], ["y"], name="fc")]
        out = helper.make_tensor_value_info("y", FLOAT, [3, None])
        return helper.make_graph(nodes, "body", [], [out], [numpy_helper.from_array(dense(k, 32, k), "w")])

    proto = choice(reading(64, "x"), reading(66, "x66"))
    proto.graph.input.append(helper.make_tensor_value_info("x66", FLOAT, [3, 66]))
    report = compiled(saved(proto, tmp_path), tmp_path / "o.onnx", "--nm", "2:4")
    assert {tuple(e["shape"]): (e["op"], e["reason"]) for e in report["linears"]} == {
        (32, 64): ("linear_nm", ""),
        (32, 66): ("MatMul", "in_features 66 is not a multiple of 4"),
    }


def test_a_weight_that_hides_one_around_it_is_refused(tmp_path, capsys):
    """ONNX forbids it; onnx.checker lets it pass, and ONNX Runtime 1.32 reads the outer one."""
    outer = helper.make_graph(
        [node("MatMul", ["x", "w"], ["v"])], "outer", [], [helper.make_tensor_value_info("v", FLOAT, [3, None])]
    )
    given = saved(choice(body(dense(64, 32, 1)), outer, w=dense(64, 32, 2)), tmp_path)
    assert "stores a weight 'w', which the graph around" in refused(capsys, tmp_path / "o.onnx", given, "--nm", "2:4")


def test_a_name_that_stands_for_two_tensors_is_refused(tmp_path, capsys):
    proto = build([node("MatMul", ["x", "w"], ["out"])], {"x": [3, 64]}, ["out"], {"w": dense(64, 32)})
    proto.graph.initializer.append(numpy_helper.from_array(sparse_kn(64, 32), "w"))
    said = refused(capsys, tmp_path / "o.onnx", saved(proto, tmp_path), "--nm", "2:4")
    assert "defines 'w' twice" in said


@pytest.mark.parametrize("large", [True, False])
def test_weights_of_constant_nodes_may_lie_in_a_file_of_their_own(tmp_path, large):
    """At offset 0, where the result's own data begins: with the old place it would read another weight."""
    tail = dense(32, 8 if large else 4, 3)
    constant = numpy_helper.from_array(tail, "c")
    nodes = [
        node("Constant", [], ["c"], value=constant),
        node("MatMul", ["x", "w"], ["h"], name="fc"),
        node("MatMul", ["h", "c"], ["out"], name="tail"),
    ]
    proto = build(nodes, {"x": [3, 64]}, ["out"], {"w": sparse_kn(64, 32)})
    folder = tmp_path / "given"
    folder.mkdir()
    onnx.save(proto, str(folder / "m.onnx"), save_as_external_data=True, location="o.onnx.data", size_threshold=0,
              convert_attribute=True)  # fmt: skip
    raw = onnx.load(str(folder / "m.onnx"), load_external_data=False)
    assert raw.graph.node[0].attribute[0].t.data_location == TensorProto.EXTERNAL
    compiled(folder / "m.onnx", tmp_path / "o.onnx")
    want = X @ sparse_kn(64, 32) @ tail
    np.testing.assert_allclose(run(tmp_path / "o.onnx", x=X), want, rtol=1e-4, atol=1e-5)


def test_branches_that_share_weights_share_the_packed_ones(tmp_path):
    """A merged decoder: one copy in the file, where the dense one was, and no dense one left."""

    def decoder(name):
        nodes = [
            node("MatMul", ["x", "w"], ["h" + name], name=f"up_{name}"),
            node("Relu", ["h" + name], ["r" + name]),
            node("MatMul", ["r" + name, "v"], ["y" + name], name=f"down_{name}"),
            node("Relu", ["y" + name], ["z" + name]),
        ]
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info("z" + name, FLOAT, [3, 64])])

    weights = {"w": dense(64, 256, 1), "v": dense(256, 64, 2)}
    given = saved(choice(decoder("first"), decoder("past"), **weights), tmp_path, "given.onnx")
    report = compiled(given, tmp_path / "o.onnx", "--nm", "2:4")
    assert {e["op"] for e in report["linears"]} == {"linear_nm"}
    assert report["file_bytes"] < 0.63 * given.stat().st_size  # 0.531 of the weights, and the bodies of the ops
    (outer, *inner) = [g for g in graphs(onnx.load(str(tmp_path / "o.onnx"), load_external_data=False).graph)]
    assert {t.name for t in outer.initializer} == {"w.values", "w.indices", "v.values", "v.indices"}
    assert not any(graph.initializer for graph in inner)
    assert report["stored_linear_bytes"] == 2 * 64 * 256 * 17 // 8
