"""The head is told by the graph: shape and pointwise work behind it, nothing else."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_models import FLOAT, build, dense, mlp, node, saved
from sparsify_export.passes.onnx.head import gives_output
from sparsify_export.passes.onnx.linears import find_linears
from sparsify_export.passes.onnx.view import read_model

W = dense(16, 16)


def heads(proto, tmp_path):
    model = read_model(saved(proto, tmp_path))
    return {x.path: gives_output(model, x) for x in find_linears(model)[0]}


def after(*nodes, outputs=("z",), **weights):
    """Two layers, a linear called head, and what comes behind it."""
    first = [node("MatMul", ["x", "w"], ["h"], name="layer"), node("Relu", ["h"], ["r"])]
    stored = {"w": W, "v": dense(16, 16, 1)} | weights
    return build(
        [*first, node("MatMul", ["r", "v"], ["y"], name="head"), *nodes], {"x": [3, 16]}, list(outputs), stored
    )


HEADS = {
    "nothing": after(node("Identity", ["y"], ["z"])),
    "bias, scale, Softmax": after(
        node("Add", ["b", "y"], ["a"]),
        node("Mul", ["a", "s"], ["m"]),
        node("Softmax", ["m"], ["z"]),
        b=W[0],
        s=np.float32(2),
    ),
    "Reshape": after(node("Reshape", ["y", "s"], ["z"]), s=np.array([1, 48])),
    "Squeeze": after(node("Unsqueeze", ["y", "s"], ["u"]), node("Squeeze", ["u"], ["z"]), s=np.array([0])),
    "Sub": after(node("Sub", ["y", "s"], ["z"]), s=np.float32(2)),
    "Concat": after(node("Neg", ["y"], ["n"]), node("Concat", ["y", "n"], ["z"], axis=1)),
    "ArgMax": after(node("ArgMax", ["y"], ["z"], axis=1)),
    "logits and their largest": after(node("ArgMax", ["y"], ["z"], axis=1), outputs=("y", "z")),
    "a computed constant": after(node("Exp", ["s"], ["e"]), node("Mul", ["y", "e"], ["z"]), s=np.float32(1)),
    "ZipMap": after(helper.make_node("ZipMap", ["y"], ["z"], domain="ai.onnx.ml", classlabels_int64s=list(range(16)))),
}
LAYERS = {
    "a residual": after(node("Add", ["r", "y"], ["z"])),
    "an activation": after(node("Relu", ["y"], ["z"])),
    "another product reads it too": after(
        node("Transpose", ["y"], ["t"], perm=[1, 0]), node("MatMul", ["y", "t"], ["z"]), outputs=("t", "z")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADS)
def test_shape_and_pointwise_work_makes_a_head(tmp_path, case):
    assert heads(HEADS[case], tmp_path) == {"layer": False, "head": True}


@pytest.mark.parametrize("case", LAYERS)
def test_anything_else_makes_a_layer(tmp_path, case):
    assert heads(LAYERS[case], tmp_path) == {"layer": False, "head": False}


def test_an_activation_makes_a_layer_of_the_last_linear_too(tmp_path):
    assert heads(mlp(dense(16, 8), dense(8, 4)), tmp_path) == {"fc0": False, "fc1": False}


def test_the_head_in_a_branch_is_one_and_the_end_of_a_loop_is_none(tmp_path):
    def body(kind, inputs=(), extra=()):
        nodes = [node("MatMul", [inputs[-1].name if inputs else "x", f"w{kind}"], [f"y{kind}"], name=kind), *extra]
        outs = [helper.make_tensor_value_info(f"go{kind}", TensorProto.BOOL, [])] if extra else []
        outs.append(helper.make_tensor_value_info(f"y{kind}", FLOAT, [3, 16]))
        return helper.make_graph(nodes, kind, list(inputs), outs, [numpy_helper.from_array(W, f"w{kind}")])

    carried = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("on", TensorProto.BOOL, []),
        helper.make_tensor_value_info("h", FLOAT, [3, 16]),
    ]
    looped = body("loop", carried, [node("Identity", ["on"], ["goloop"])])
    nodes = [
        node("If", ["c"], ["b"], then_branch=body("then"), else_branch=body("else")),
        node("Reshape", ["b", "s"], ["z"]),
        node("Loop", ["two", "", "x"], ["l"], body=looped),
    ]
    proto = build(nodes, {"x": [3, 16]}, ["z", "l"], {"s": np.array([48]), "two": np.array(2)})
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    onnx.checker.check_model(proto)
    assert heads(proto, tmp_path) == {"then": True, "else": True, "loop": False}
