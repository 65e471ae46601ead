"""What TensorRT's parser would refuse, rewritten or refused, on graphs from text."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.onnx.tensorrt import DOCUMENTED, SuitTensorRT, check_tensorrt

HEAD = '<ir_version: 10, opset_import: ["" : 23]> g '
COUNTS = """(int64[B, S] x) => (int64[B, S] y)
<int64 axis = {1}, int64 low = {2}, int64 high = {4}>
{
    sums = CumSum (x, axis)
    y = Clip (sums, low, high)
}"""
NORM = """(float16[B, 4] x) => (float16[B, 4] y)
<float[4] scale = {0.5, 1.0, 2.0, 3.0}>
{
    y = RMSNormalization <axis = -1, epsilon = 1e-5> (x, scale)
}"""
ATTENTION = """(float[B, 2, S, 8] q, float[B, 2, S, 8] k) => (float[B, 2, S, 8] y)
{
    y = Attention <softcap = 0.0, qk_matmul_output_mode = 0, scale = 0.5> (q, k, k)
}"""


def suited(text: str) -> ir.Model:
    model = ir.from_onnx_text(HEAD + text)
    for node in model.graph:  # as the exporter leaves it
        for value in node.outputs:
            value.type = value.type or ir.TensorType(ir.DataType.INT64)
    SuitTensorRT()(model)
    return model


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]


def test_integers_are_summed_in_float_and_clipped_by_min_and_max():
    model = suited(COUNTS)
    assert ops(model) == ["Cast", "CumSum", "Cast", "Max", "Min"]
    x = np.array([[1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0]])
    np.testing.assert_array_equal(run(model, {"x": x}), np.clip(x.cumsum(1), 2, 4))
    check_tensorrt(model)


def test_clip_without_an_upper_bound_is_a_max():
    assert ops(suited(COUNTS.replace("low, high)", "low)"))) == ["Cast", "CumSum", "Cast", "Max"]


def test_a_norm_with_a_float32_scale_computes_in_float32():
    model = suited(NORM)
    assert ops(model) == ["Cast", "RMSNormalization", "Cast"]
    x = np.array([[1, 2, 3, 4]], np.float16)
    wide = x.astype(np.float32)
    wanted = wide / np.sqrt((wide**2).mean() + 1e-5) * np.array([0.5, 1, 2, 3], np.float32)
    got = run(model, {"x": x})
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, wanted.astype(np.float16))


def test_what_suits_stays():
    for text in (NORM.replace("float16", "float"), COUNTS.replace("int64[B, S]", "float[B, S]")):
        model = ir.from_onnx_text(
            HEAD + text.replace("int64 low = {2}, int64 high = {4}", "float low={2}, float high={4}")
        )
        before = ops(model)
        for node in model.graph:
            for value in node.outputs:
                value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        assert not SuitTensorRT()(model).modified
        assert ops(model) == before


def test_attributes_that_mean_nothing_are_dropped_and_others_refused():
    model = suited(ATTENTION)
    (attention,) = model.graph
    assert set(attention.attributes) == {"scale"}
    check_tensorrt(model)
    with pytest.raises(InputError, match="does not take attention with softcap"):
        check_tensorrt(suited(ATTENTION.replace("softcap = 0.0", "softcap = 30.0")))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("(float[2] x) => (float[2] y) { y = Det (x) }", "does not list the op Det"),
        ("(float[2] x) => (float[2] y) { y = sparsify.linear_nm_int8 (x) }", "the op sparsify.linear_nm_int8"),
        (
            ATTENTION.replace("(q, k, k)", "(q, k, k, , k, k)"),
            "attention that joins the KV cache itself",
        ),
        (
            ATTENTION.replace("2, S, 8]", "S, 16]").replace("scale =", "q_num_heads = 2, kv_num_heads = 2, scale ="),
            "4 axes",
        ),
    ],
)
def test_what_tensorrt_would_refuse_is_refused_by_name(text, said):
    with pytest.raises(InputError, match=said):
        check_tensorrt(suited(text))


def test_the_list_holds_what_the_table_says_and_no_more():
    assert {"Attention", "RMSNormalization", "RotaryEmbedding", "MatMul", "TensorScatter"} <= DOCUMENTED
    assert not {"BitShift", "Det", "MatMulInteger", "Unique", "DynamicQuantizeLinear"} & DOCUMENTED
    assert {name for name in DOCUMENTED if not onnx.defs.has(name)} == set()
