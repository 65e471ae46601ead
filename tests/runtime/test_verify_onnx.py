"""What counts as the same: floats by their error, infinities and integers by being the same."""

import numpy as np
import pytest
from onnx_models import build, dense, node, saved
from sparsify_export.passes.errors import VerificationError
from sparsify_export.runtime.verify_onnx import verify_onnx

X = {"x": np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)}
W = dense(64, 32)


def model(folder, name, weight=W, tail=()):
    nodes = [node("MatMul", ["x", "w"], ["h"]), *tail]
    outputs = [n.output[0] for n in tail] or ["h"]
    proto = build(nodes, {"x": ["t", 64]}, outputs, {"w": weight})
    for value, n in zip(proto.graph.output, tail, strict=False):
        if n.op_type == "ArgMax":
            value.type.tensor_type.elem_type = 7
    return saved(proto, folder, name)


def exact(folder, tail=()):
    """The same with the product in float64."""
    cast = [node("Cast", ["x"], ["x64"], to=11), node("Cast", ["w"], ["w64"], to=11)]
    nodes = [*cast, node("MatMul", ["x64", "w64"], ["h64"]), node("Cast", ["h64"], ["h"], to=1), *tail]
    outputs = [n.output[0] for n in tail] or ["h"]
    proto = build(nodes, {"x": ["t", 64]}, outputs, {"w": W})
    for value, n in zip(proto.graph.output, tail, strict=False):
        if n.op_type == "ArgMax":
            value.type.tensor_type.elem_type = 7
    return saved(proto, folder, "exact.onnx")


def check(tmp_path, got, tail=()):
    base = model(tmp_path, "base.onnx", tail=tail)
    return verify_onnx(got, base, exact(tmp_path, tail), X, ways=(("stock", False),))


def test_rounding_is_allowed_and_a_slightly_wrong_weight_is_not(tmp_path):
    (verified,) = check(tmp_path, model(tmp_path, "got.onnx"))
    assert verified.how == "stock"
    assert 0 < verified.closeness.error <= verified.closeness.budget < 1e-5
    with pytest.raises(VerificationError, match=r"differs from the dense model \(stock\)"):
        check(tmp_path, model(tmp_path, "got.onnx", W * np.float32(1.0001)))


def test_every_output_counts(tmp_path):
    tail = (node("Identity", ["h"], ["y"]), node("Softmax", ["h"], ["z"]))
    assert check(tmp_path, model(tmp_path, "got.onnx", tail=tail), tail)
    wrong = (tail[0], node("Softmax", ["h"], ["z"], axis=0))
    with pytest.raises(VerificationError):
        check(tmp_path, model(tmp_path, "got.onnx", tail=wrong), tail)


def test_infinities_must_be_the_same(tmp_path):
    tail = (node("Log", ["h"], ["y"]),)  # NaN for every negative number
    assert check(tmp_path, model(tmp_path, "got.onnx", tail=tail), tail)
    with pytest.raises(VerificationError):
        check(tmp_path, model(tmp_path, "got.onnx", -W, tail=tail), tail)


def test_integers_decide_where_there_are_no_floats(tmp_path):
    tail = (node("ArgMax", ["h"], ["y"], axis=1, keepdims=0),)
    (verified,) = check(tmp_path, model(tmp_path, "got.onnx", W * np.float32(2), tail=tail), tail)
    assert verified.closeness.error == 0
    with pytest.raises(VerificationError):
        check(tmp_path, model(tmp_path, "got.onnx", -W, tail=tail), tail)
