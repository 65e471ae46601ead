"""Products of 8-bit activations: written out they are what ONNX Runtime computes, and fold back to what they were."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper
from onnx_command import compiled
from onnx_models import MICROSOFT, build, dense, node, rng, saved
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.onnx.linears import find_linears
from sparsify_export.passes.onnx.unfold import NOT_UNFOLDED, fold_back, unfold
from sparsify_export.passes.onnx.view import read_model

K, N = 64, 48
PARTS = ["a", "sa", "za", "b", "sb", "zb"]
QLINEAR = node("QLinearMatMul", [*PARTS, "sy", "zy"], ["y"], name="fc")


def qgemm(*more, **attributes):
    return node("QGemm", [*PARTS, *more], ["y"], name="fc", domain=MICROSOFT, **attributes)


EACH = {"sb": rng(5).uniform(0.5, 2, N).astype(np.float32) / 500, "zb": np.zeros(N, np.int8)}
FORMS = {
    "QLinearMatMul": (QLINEAR, {}),
    "a scale for each output": (QLINEAR, EACH),
    "unsigned weight": (QLINEAR, {"b": rng(6).integers(0, 256, (K, N)).astype(np.uint8), "zb": np.uint8(131)}),
    "QGemm": (qgemm("c", "sy", "zy"), {}),
    "QGemm without a bias": (qgemm("", "sy", "zy"), {}),
    "QGemm with alpha": (qgemm("c", "sy", "zy", alpha=0.5), {}),
    "QGemm with transB": (
        qgemm("c", "sy", "zy", transB=1),
        {"b": rng(7).integers(-127, 128, (N, K)).astype(np.int8), **EACH},
    ),
    "QGemm to float": (qgemm("c"), {}),
}  # fmt: skip


def model(form):
    """One product of 8-bit activations, which are an input of the model."""
    product, more = FORMS[form]
    weights = {
        "sa": np.float32(0.02), "za": np.uint8(120), "sb": np.float32(0.004), "zb": np.int8(3),
        "b": rng(1).integers(-127, 128, (K, N)).astype(np.int8), "c": rng(2).integers(-9000, 9000, N).astype(np.int32),
        "sy": np.float32(0.03), "zy": np.uint8(128),
    } | more  # fmt: skip
    stored = {name: value for name, value in weights.items() if name in product.input}
    proto = build([product], {"a": ["t", K]}, ["y"], stored, kind=TensorProto.UINT8)
    if "sy" not in product.input:
        proto.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT
    return proto


def codes():
    return rng(3).integers(0, 256, (200, K)).astype(np.uint8)


def run(proto):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # which would fold it back itself
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"a": codes()})[0]


@pytest.mark.parametrize("form", FORMS)
def test_written_out_it_is_what_onnxruntime_computes(form):
    """Codes but for those half-way between two (a sum of floats rounds, one of integers does not); floats closely."""
    proto = model(form)
    wanted = run(proto)
    before = proto.SerializeToString()
    done = unfold(proto)
    assert [n.op_type for n in proto.graph.node if n.domain] == []
    got = run(proto)
    if got.dtype == np.uint8:
        off = np.abs(got.astype(int) - wanted.astype(int))
        assert len(np.unique(got)) > 200, "too few codes to tell"
        assert off.max() <= 1
        assert (off > 0).mean() < 0.001
    else:
        stored = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in proto.graph.initializer}
        exact = (codes() - stored["za"]) @ (stored["b"] - stored["zb"]) + stored["c"]
        exact = torch.from_numpy(exact * stored["sa"] * stored["sb"])
        close = compare(torch.from_numpy(got), torch.from_numpy(wanted), exact, factor=4.0)
        assert close.ok, close
    fold_back(proto, done)
    assert proto.SerializeToString() == before


@pytest.mark.parametrize("why", ["scale that is computed", "scale for each row", "weight that is computed"])
def test_what_is_not_stored_whole_stays_and_says_why(why, tmp_path):
    proto = model("QLinearMatMul")
    name = "b" if why.startswith("weight") else "sa"
    index = next(i for i, tensor in enumerate(proto.graph.initializer) if tensor.name == name)
    if why == "scale for each row":
        proto.graph.initializer[index].CopyFrom(onnx.numpy_helper.from_array(np.full(7, 0.02, np.float32), name))
    else:
        proto.graph.initializer[index].name = "before"
        proto.graph.node.insert(0, helper.make_node("Identity", ["before"], [name]))
    before = proto.SerializeToString()
    assert unfold(proto) == []
    assert proto.SerializeToString() == before
    found, left = find_linears(read_model(saved(proto, tmp_path)))
    assert (found, [entry.reason for entry in left]) == ([], [NOT_UNFOLDED])


class Random(CalibrationDataReader):
    """Four batches."""

    def __init__(self):
        self.left = [{"x": rng(i).standard_normal((16, K)).astype(np.float32)} for i in range(4)]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.fixture(scope="module")
def static(tmp_path_factory):
    """A model of three linears in both formats of ONNX Runtime's static quantiser, a scale for each output."""
    folder = tmp_path_factory.mktemp("static")
    nodes = [
        node("MatMul", ["x", "w0"], ["m"], name="up"),
        node("Relu", ["m"], ["r"]),
        node("Gemm", ["r", "w1", "b1"], ["d"], name="down"),
        node("Relu", ["d"], ["s"]),
        node("Gemm", ["s", "w2", "b2"], ["y"], name="head"),
    ]
    weights = {"w0": dense(K, 96, 1), "w1": dense(96, K, 2), "w2": dense(K, 32, 3)}
    weights |= {f"b{i}": rng(i).standard_normal(weights[f"w{i}"].shape[1]).astype(np.float32) for i in (1, 2)}
    path = saved(build(nodes, {"x": ["t", K]}, ["y"], weights), folder, "float.onnx")
    for name in ("QDQ", "QOperator"):
        quantize_static(
            str(path), str(folder / f"{name}.onnx"), Random(), quant_format=QuantFormat[name], per_channel=True,
            weight_type=QuantType.QInt8,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("name", ["QDQ", "QOperator"])
def test_a_statically_quantised_model_is_pruned_and_lowered_in_its_own_8_bits(static, name, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    np.savez(inputs / "0.npz", x=rng(9).standard_normal((32, K)).astype(np.float32))
    report = compiled(static / f"{name}.onnx", tmp_path / "o.onnx", "--nm", "2:4", "--calibration-inputs", inputs)
    ops = {entry["path"].removesuffix("_quant"): (entry["op"], entry["reason"]) for entry in report["linears"]}
    kept = "it gives the model's output, which is not pruned"
    assert ops == {
        "up": ("linear_nm_int8", ""),
        "down": ("linear_nm_int8", ""),
        "head": ("QGemm" if name == "QOperator" else "Gemm", kept),
    }
    written, given = (onnx.load(str(path)).graph for path in (tmp_path / "o.onnx", static / f"{name}.onnx"))
    assert [n.op_type for n in written.node].count("linear_nm_int8") == 2
    assert [n for n in written.node if n.op_type == "QGemm"] == [n for n in given.node if n.name == "head_quant"]
    read = {x for n in written.node for x in n.input}
    assert {tensor.name for tensor in written.initializer} <= read, "what nothing reads"
