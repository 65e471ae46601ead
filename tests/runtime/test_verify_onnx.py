"""What counts as the same: floats by their error, infinities and integers by being the same."""

from pathlib import Path

import numpy as np
import pytest
from onnx_models import build, dense, node, saved
from sparsify_export.passes.errors import VerificationError
from sparsify_export.runtime import child
from sparsify_export.runtime.verify_onnx import Sides, verify_onnx

CHILD = Path(child.__file__)
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
    return verify_onnx("got.onnx", Sides(got, base, exact(tmp_path, tail)), None, [X], ways=(("stock", False),))


def test_rounding_is_allowed_and_a_slightly_wrong_weight_is_not(tmp_path):
    (verified,) = check(tmp_path, model(tmp_path, "got.onnx"))
    assert verified.how == "stock"
    assert 0 < verified.closeness.error <= verified.closeness.budget < 2e-5
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


def test_nothing_finite_to_compare_is_no_success(tmp_path):
    tail = (node("Sub", ["h", "h"], ["o"]), node("Div", ["o", "o"], ["y"]))
    nothing = (tail[0], tail[1])
    base = build([node("MatMul", ["x", "w"], ["h"]), *nothing], {"x": ["t", 64]}, ["y"], {"w": W})
    path = saved(base, tmp_path, "base.onnx")
    with pytest.raises(VerificationError, match="no finite number"):
        verify_onnx("got.onnx", Sides(path, path, path), None, [X], ways=(("stock", False),))


def test_a_linear_that_the_outputs_forget_is_found_by_itself(tmp_path):
    """The whole model is right on its inputs, which are zeros; the linear by itself is not."""
    whole, zeros = model(tmp_path, "whole.onnx"), {"x": np.zeros_like(X["x"])}
    linears = [saved(linear_model(weight), tmp_path, f"{name}.onnx") for name, weight in (("w", W * 0), ("b", W))]
    assert verify_onnx("got.onnx", Sides(whole, whole, whole), None, [zeros], ways=(("stock", False),))
    with pytest.raises(VerificationError, match="each linear"):
        verify_onnx(
            "got.onnx",
            Sides(whole, whole, whole),
            Sides(linears[0], linears[1], linears[1]),
            [zeros],
            ways=(("stock", False),),
        )


def linear_model(weight):
    return build([node("MatMul", ["x0", "w"], ["y0"])], {"x0": ["t", 64]}, ["y0"], {"w": weight})


def test_a_truth_that_does_not_run_in_float64_is_replaced_by_float32_and_that_is_said(tmp_path):
    base = model(tmp_path, "base.onnx")
    broken = saved(build([node("MatMul", ["x", "x"], ["h"])], {"x": ["t", 64]}, ["h"], {}), tmp_path, "broken.onnx")
    (verified,) = verify_onnx("got.onnx", Sides(base, base, broken), None, [X], ways=(("stock", False),))
    assert "against float32, as float64 does not run" in verified.how
    for factor, ok in ((1.00001, True), (1.001, False)):
        got = model(tmp_path, "got.onnx", W * np.float32(factor))
        if ok:
            verify_onnx("got.onnx", Sides(got, base, broken), None, [X], ways=(("stock", False),))
            continue
        with pytest.raises(VerificationError):
            verify_onnx("got.onnx", Sides(got, base, broken), None, [X], ways=(("stock", False),))


def test_a_crash_of_onnx_runtime_is_a_sentence(tmp_path, monkeypatch):
    """The child really dies of a signal while it opens one of the files; the others are run all the same."""
    monkeypatch.setattr(child, "__file__", str(dying(tmp_path, "got.onnx")))
    base = model(tmp_path, "base.onnx")
    with pytest.raises(VerificationError, match=r"got.onnx does not run.*died of .*SIGSEGV"):
        verify_onnx("got.onnx", Sides(model(tmp_path, "got.onnx"), base, base), None, [X], ways=(("stock", False),))
    monkeypatch.setattr(child, "__file__", str(dying(tmp_path, "exact.onnx")))
    (verified,) = verify_onnx("got.onnx", Sides(base, base, exact(tmp_path)), None, [X], ways=(("stock", False),))
    assert "float64 does not run: ONNX Runtime died" in verified.how


def test_a_file_that_dies_of_the_optimisations_alone_is_found(tmp_path, monkeypatch):
    base, got = model(tmp_path, "base.onnx"), model(tmp_path, "got.onnx")
    monkeypatch.setattr(child, "__file__", str(dying(tmp_path, "got.onnx", only="job.optimise")))
    with pytest.raises(VerificationError, match=r"all optimisations of ONNX Runtime: .*SIGSEGV"):
        verify_onnx("got.onnx", Sides(got, base, base), None, [X], ways=(("stock", False),))
    (tmp_path / "scratch").mkdir()
    assert "SIGSEGV" in child.kills(child.Job(str(got), "", optimise=True), tmp_path / "scratch")
    (tmp_path / "other").mkdir()
    assert child.kills(child.Job(str(base), "", optimise=True), tmp_path / "other") == ""


def dying(folder, name, only="True"):
    """The child's file, but that it kills itself when it is to open ``name``."""
    source = CHILD.read_text()
    begin = "    options = ort.SessionOptions()"
    death = "__import__('os').kill(__import__('os').getpid(), 11)"
    marked = source.replace(begin, f"    if job.model.endswith({name!r}) and {only}:\n        {death}\n{begin}")
    assert marked != source
    file = folder / "child.py"
    file.write_text(marked)
    return file


def test_where_rounding_drowns_the_outputs_the_linears_are_the_proof(tmp_path):
    """The dense model itself is off by half of its outputs: these prove nothing, and a wrong linear is found."""
    whole, drowned = model(tmp_path, "whole.onnx"), model(tmp_path, "drowned.onnx", W * np.float32(1.5))
    good, bad = (saved(linear_model(weight), tmp_path, f"{name}.onnx") for name, weight in (("g", W), ("b", W * 0)))
    sides = Sides(model(tmp_path, "got.onnx", -W), drowned, whole)
    (verified,) = verify_onnx("got.onnx", sides, Sides(good, good, good), [X], ways=(("stock", False),))
    assert verified.how == "stock, each linear (its rounding alone moves the outputs by 50%, so they prove nothing)"
    with pytest.raises(VerificationError, match="each linear"):
        verify_onnx("got.onnx", sides, Sides(bad, good, good), [X], ways=(("stock", False),))
    with pytest.raises(VerificationError, match="cannot be compared"):
        verify_onnx("got.onnx", sides, None, [X], ways=(("stock", False),))
