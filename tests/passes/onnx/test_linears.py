"""Every form of linear is found and read right; everything else is named with its reason."""

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_models import MICROSOFT, build, dense, mlp, node, rng, saved
from sparsify_export.passes.onnx.linears import find_linears
from sparsify_export.passes.onnx.view import read_model

W = dense(16, 8)  # [K, N]


def find(proto, tmp_path):
    model = read_model(saved(proto, tmp_path))
    return find_linears(model)


def only(proto, tmp_path):
    found, left = find(proto, tmp_path)
    assert (len(found), left) == (1, [])
    return found[0]


def reason(proto, tmp_path):
    found, left = find(proto, tmp_path)
    assert found == []
    return [entry.reason for entry in left]


def one(op, inputs=("x", "w"), weights=None, before=(), after=(), out="y", opset=18, **attributes):
    nodes = [*before, node(op, list(inputs), ["y"], name="fc", **attributes), *after]
    return build(nodes, {"x": [3, 16]}, [out], {"w": W} if weights is None else weights, opset=opset)


def constant(name, array):
    return node("Constant", [], [name], value=numpy_helper.from_array(array))


FORMS = {
    "MatMul": one("MatMul"),
    "Gemm": one("Gemm"),
    "Gemm with transB": one("Gemm", weights={"w": W.T.copy()}, transB=1),
    "FusedMatMul": one("FusedMatMul", domain=MICROSOFT),
    "FusedMatMul with transB": one("FusedMatMul", weights={"w": W.T.copy()}, transB=1, domain=MICROSOFT),
    "Constant node": one("MatMul", weights={}, before=[constant("w", W)]),
    "Identity": one("MatMul", ["x", "v"], before=[node("Identity", ["w"], ["v"])]),
    "Transpose": one(
        "MatMul", ["x", "v"], weights={"w": W.T.copy()}, before=[node("Transpose", ["w"], ["v"], perm=[1, 0])]
    ),
    "Transpose twice": one(
        "Gemm",
        ["x", "v"],
        weights={"w": W},
        before=[node("Transpose", ["w"], ["v"])],
        transB=1,
    ),
}


@pytest.mark.parametrize("proto", FORMS.values(), ids=FORMS)
def test_the_weight_is_read_as_rows_of_outputs(proto, tmp_path):
    linear = only(proto, tmp_path)
    assert linear.path == "fc"
    assert linear.weight.shape == (8, 16)
    assert torch.equal(linear.weight.read(), torch.from_numpy(W.T.copy()))
    assert (linear.x.name, linear.y.name, linear.alpha, linear.bias) == ("x", "y", 1.0, None)


def test_factors_and_bias_of_gemm(tmp_path):
    bias = np.ones(8, np.float32)
    linear = only(one("Gemm", ["x", "w", "c"], {"w": W, "c": bias}, alpha=0.5, beta=3.0), tmp_path)
    assert (linear.alpha, linear.bias.factor, list(linear.bias.proto.dims)) == (0.5, 3.0, [8])


@pytest.mark.parametrize("through", ["", "Identity"])
def test_an_add_of_one_number_an_output_is_the_bias(tmp_path, through):
    name = "b" if not through else "c"
    before = [node("Identity", ["b"], ["c"])] if through else []
    add = node("Add", [name, "y"], ["z"])
    linear = only(one("MatMul", weights={"w": W, "b": W[0]}, before=before, after=[add], out="z"), tmp_path)
    assert (linear.y.name, linear.bias.proto.name, len(linear.nodes)) == ("z", "b", 2)


@pytest.mark.parametrize("shape", [(1,), (3, 8), (1, 8)])
def test_an_add_of_another_shape_stays(tmp_path, shape):
    add = node("Add", ["b", "y"], ["z"])
    weights = {"w": W, "b": np.ones(shape, np.float32)}
    linear = only(one("MatMul", weights=weights, after=[add], out="z"), tmp_path)
    assert (linear.y.name, linear.bias) == ("y", None)


def test_an_add_after_a_result_that_something_else_reads_stays(tmp_path):
    after = [node("Add", ["b", "y"], ["z"]), node("Relu", ["y"], ["r"])]
    proto = one("MatMul", weights={"w": W, "b": W[0]}, after=after, out="z")
    assert only(proto, tmp_path).bias is None
    proto = one("MatMul", weights={"w": W, "b": W[0]}, after=after[:1], out="z")
    proto.graph.output.append(helper.make_tensor_value_info("y", 1, None))
    assert only(proto, tmp_path).bias is None


LEFT = {
    "transA": (one("Gemm", ["v", "w"], before=[node("Transpose", ["x"], ["v"])], transA=1), "transA"),
    "C of rows": (one("Gemm", ["x", "w", "c"], {"w": W, "c": np.ones((3, 1), np.float32)}), "its C is not"),
    "rank 3": (one("MatMul", weights={"w": W[None]}), "its weight has rank 3"),
    "rank 1": (one("MatMul", weights={"w": W[:, 0].copy()}), "its weight has rank 1"),
    "left": (one("MatMul", ["v", "x"], {"v": dense(4, 3)}), "its constant is the left operand"),
    "computed": (one("MatMul", ["x", "v"], before=[node("Abs", ["w"], ["v"])]), "its weight comes through Abs"),
    "transBatch": (one("FusedMatMul", transBatchB=1, domain=MICROSOFT), "transBatchB"),
    "tied": (
        one("MatMul", after=[node("Gather", ["w", "i"], ["e"], name="look")], weights={"w": W, "i": np.array([1])}),
        "Gather look reads the same weight",
    ),
    "both ways": (
        build(
            [
                node("MatMul", ["x", "w"], ["h"], name="a"),
                node("Gemm", ["h", "w"], ["y"], name="b", transB=1),
            ],
            {"x": [3, 16]},
            ["y"],
            {"w": W},
        ),
        "reads its weight the other way round",
    ),
}


@pytest.mark.parametrize(("proto", "why"), LEFT.values(), ids=LEFT)
def test_what_is_left_out_says_why(proto, why, tmp_path):
    reasons = reason(proto, tmp_path)
    assert reasons
    assert all(why in text for text in reasons), reasons


def test_products_of_activations_are_no_linears(tmp_path):
    found, left = find(one("MatMul", ["x", "v"], {}, before=[node("Transpose", ["x"], ["v"])]), tmp_path)
    assert (found, left) == ([], [])


def test_double_and_integer_weights_are_left(tmp_path):
    proto = build([node("MatMul", ["x", "w"], ["y"])], {"x": [3, 16]}, ["y"], {"w": W.astype(np.float64)}, kind=11)
    assert reason(proto, tmp_path) == ["its weight is double"]
    proto = build([node("MatMul", ["x", "w"], ["y"])], {"x": [3, 16]}, ["y"], {"w": W.astype(np.int32)}, kind=6)
    assert reason(proto, tmp_path) == ["its weight holds int32"]


def test_a_weight_that_the_caller_may_replace_is_left_but_not_before_ir_4(tmp_path):
    for ir, known in ((8, False), (3, True)):
        proto = mlp(W, ir=ir)
        proto.graph.input.append(helper.make_tensor_value_info("w0", TensorProto.FLOAT, W.shape))
        proto.graph.input.append(helper.make_tensor_value_info("b0", TensorProto.FLOAT, [8]))
        if known:
            assert only(proto, tmp_path).weight.name == "w0"
        else:
            assert reason(proto, tmp_path) == ["the caller may replace its weight, which is an input of the model"]


def test_linears_that_share_a_weight_are_both_found(tmp_path):
    square = dense(16, 16)
    nodes = [node("MatMul", ["x", "w"], ["h"], name="a"), node("MatMul", ["h", "w"], ["y"], name="b")]
    found, left = find(build(nodes, {"x": [3, 16]}, ["y"], {"w": square}), tmp_path)
    assert ([x.path for x in found], left) == (["a", "b"], [])


def test_linears_in_branches_and_functions(tmp_path):
    def branch(name):
        out = helper.make_tensor_value_info(name, 1, None)
        return helper.make_graph([node("MatMul", ["x", "w"], [name], name=f"in_{name}")], name, [], [out])

    choice = node("If", ["c"], ["y"], then_branch=branch("t"), else_branch=branch("e"))
    proto = build([choice], {"x": [3, 16]}, ["y"], {"w": W})
    proto.graph.input.append(helper.make_tensor_value_info("c", TensorProto.BOOL, []))
    body = [node("MatMul", ["a", "b"], ["c"], name="inner")]
    imports = [helper.make_opsetid("", 18)]
    proto.functions.append(helper.make_function("own", "mine", ["a", "b"], ["c"], body, imports))
    found, left = find(proto, tmp_path)
    # helper.make_node sorts attributes by name, so the else branch comes first
    assert [(x.path, x.place.graph, x.place.index) for x in found] == [("in_e", 1, 0), ("in_t", 2, 0)]
    assert [(x.path, x.reason) for x in left] == [("mine/inner", "it is inside a function")]


def test_quantize_dynamic_is_recognised_and_its_neighbours_are_not(tmp_path):
    values = rng().integers(-100, 100, (16, 8)).astype(np.int8)
    scale = np.full(8, 0.01, np.float32)
    head = node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    product = node("MatMulInteger", ["q", "w", "z"], ["i"], name="fc")
    cast = node("Cast", ["i"], ["f"], to=1)
    tail = [node("Mul", ["s", "ws"], ["both"]), node("Mul", ["f", "both"], ["y"])]
    weights = {"w": values, "ws": scale}
    proto = build([head, product, cast, *tail], {"x": [3, 16]}, ["y"], weights)
    linear = only(proto, tmp_path)
    assert (linear.x.name, linear.y.name, [n.op for n in linear.nodes]) == ("x", "y", ["MatMulInteger", "Cast", "Mul"])
    assert np.array_equal(linear.weight.read().numpy(), (values * scale).T)
    assert "no longer rounded" in linear.note
    proto = build([head, product, cast], {"x": [3, 16]}, ["f"], {"w": values})
    assert "quantize_dynamic" in reason(proto, tmp_path)[0]


def test_integer_products_of_given_integers_are_left(tmp_path):
    values = rng().integers(-100, 100, (16, 8)).astype(np.int8)
    names = ["x", "w", "s", "ws"]
    product = node("MatMulIntegerToFloat", names, ["y"], name="fc", domain=MICROSOFT)
    weights = {"w": values, "ws": np.float32(0.1), "s": np.float32(0.1)}
    proto = build([product], {"x": [3, 16]}, ["y"], weights)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT8
    assert "exists in 8 bits only" in reason(proto, tmp_path)[0]


def test_g_idx_is_left(tmp_path):
    names = ["x", "w", "s", "", "g"]
    product = node("MatMulNBits", names, ["y"], K=16, N=8, bits=4, block_size=16, domain=MICROSOFT)
    weights = {"w": np.zeros((8, 1, 8), np.uint8), "s": np.ones(8, np.float32), "g": np.zeros(16, np.int32)}
    assert reason(build([product], {"x": [3, 16]}, ["y"], weights), tmp_path) == ["its groups are ordered by g_idx"]


def test_a_deep_model_is_walked_without_recursion(tmp_path):
    nodes = [node("Abs", [f"x{i}"], [f"x{i + 1}"]) for i in range(3000)]
    nodes.append(node("MatMul", ["x3000", "w"], ["y"], name="fc"))
    proto = build(nodes, {"x0": [3, 16]}, ["y"], {"w": W})
    assert only(proto, tmp_path).path == "fc"


def test_a_convolution_is_named_with_the_matrix_that_it_is(tmp_path):
    proto = build([node("Conv", ["x", "w"], ["y"], name="c")], {"x": [1, 4, 8, 8]}, ["y"], {})
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((6, 4, 3, 3), np.float32), "w"))
    (entry,) = find(proto, tmp_path)[1]
    assert (entry.path, entry.shape, entry.reason) == ("c", (6, 36), "the op Conv is left as it is")
