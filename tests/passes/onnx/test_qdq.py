"""Products of 8-bit codes: codes and scales by hand, what is shared, and ONNX Runtime's result on it."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from sparsify_export.calibrate.patterns import NM, find_pattern
from sparsify_export.passes.activations import Scaled
from sparsify_export.passes.dialect.packed import OnGrid
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.fx.linears import Linear
from sparsify_export.passes.onnx.qdq import Codes, QuantiseLinears, joined, quantise_weights
from sparsify_export.runtime.inspection import weights

KINDS = ["int8", "fp8"]
STORED = {"int8": onnx.TensorProto.INT8, "fp8": onnx.TensorProto.FLOAT8E4M3FN}


def linear(key, rows, columns):
    return Linear(key, key, "x", key, None, rows, columns)


def group(scale, **shapes):
    return Scaled(tuple(linear(key, *shape) for key, shape in shapes.items()), scale)


def test_int8_weights_by_hand():
    weight = torch.tensor([[1.27, -0.01, 0.0, 0.005], [0.0, 0.0, 0.0, 0.0], [-2.54, 0.03, 0.05, 0.01]])
    (codes,) = quantise_weights({"w": weight}, [group(0.5, w=(3, 4))], "int8", {}).values()
    assert codes.scale == 0.5
    assert codes.scales.dtype == torch.float16
    assert codes.scales.tolist() == [float(np.float16(0.01)), 1.0, float(np.float16(0.02))]  # none of them 0
    assert codes.of(weight).tolist() == [[127, -1, 0, 0], [0, 0, 0, 0], [-127, 1, 2, 0]]
    value = codes.value(weight)
    assert value.dtype == torch.float16
    assert value[0].tolist() == [float(np.float16(127 * np.float16(0.01).astype(np.float32))), value[0, 1], 0, 0]
    assert torch.equal(codes.of(value), codes.of(weight))


def test_int8_weights_that_are_on_a_grid_keep_their_codes():
    scales = torch.tensor([0.25, 0.0]).half()
    weight = torch.tensor([[1.0, -0.25, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    known = {"w": OnGrid(NM(2, 4), scales)}
    (codes,) = quantise_weights({"w": weight}, [group(0.5, w=(2, 4))], "int8", known).values()
    assert codes.scales.tolist() == [0.25, 1.0]
    assert codes.of(weight).tolist() == [[4, -1, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(codes.value(weight).float(), weight)


def test_float8_weights_of_the_same_input_have_one_scale():
    params = {"q": torch.tensor([[448.0, -1.0625]]), "k": torch.tensor([[-896.0, 1e-4]]), "o": torch.zeros(1, 2)}
    found = quantise_weights(params, [group(1.0, q=(1, 2), k=(1, 2)), group(1.0, o=(1, 2))], "fp8", {})
    assert {key: codes.scales.tolist() for key, codes in found.items()} == {"q": [2.0], "k": [2.0], "o": [2.0**-24]}
    assert found["q"].value(params["q"]).tolist() == [[448.0, -1.0]]  # -0.53125 is nearest to -0.5
    assert found["k"].of(params["k"]).view(torch.uint8).tolist() == [[0xFE, 0]]  # -448, and +0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5, 300.0])
def test_stored_codes_give_the_value_again_and_zeros_stay(kind, size):
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)) * size
    weight.reshape(16, 8, 4)[:, :, 1:3] = 0
    (codes,) = quantise_weights({"w": weight}, [group(1.0, w=(16, 32))], kind, {}).values()
    value = codes.value(weight)
    assert torch.equal(codes.value(value.float()), value)  # what the file holds is made from the value
    assert not bool(((value == 0) & value.signbit()).any())
    assert bool((codes.of(value).float()[weight == 0] == 0).all())
    assert str(find_pattern(codes.of(value).float())) == "2:4"


def test_rows_follow_each_other_when_linears_become_one():
    q, k = (Codes("int8", 0.5, torch.tensor(s).half()) for s in ([1.0, 2.0], [3.0]))
    f = [Codes("fp8", 0.5, torch.tensor([2.0]).half())] * 2
    found = joined({"q": q, "k": k, "a": f[0], "b": f[1], "o": q}, {"q+k": ["q", "k"], "a+b": ["a", "b"], "x": ["y"]})
    assert set(found) == {"q+k", "a+b", "o"}
    assert found["q+k"].scales.tolist() == [1, 2, 3]
    assert found["a+b"].scales.tolist() == [2]
    assert found["o"] is q


def example(kind):
    """Two quantised products of x and one that is not, all of them with 2:4 weights ``[K, N]``."""
    generator = torch.Generator().manual_seed(1)
    floats = {name: torch.randn(rows, 32, generator=generator) for name, rows in (("q", 8), ("k", 4), ("dense", 4))}
    for weight in floats.values():
        weight.reshape(-1, 8, 4)[:, :, :2] = 0
    scaled = [group(float(np.float16(0.03)), q=(8, 32), k=(4, 32))]
    quantised = quantise_weights({key: floats[key] for key in "qk"}, scaled, kind, {})
    values = {key: quantised[key].value(w) if key in quantised else w.half() for key, w in floats.items()}
    half = ir.TensorType(ir.DataType.FLOAT16)
    x = ir.Value(name="x", type=half, shape=ir.Shape(["B", 32]))
    nodes, outputs, held = [], [], []
    for name, value in values.items():
        tensor = ir.Tensor(value.T.contiguous().numpy(), name=name)
        held.append(ir.Value(name=name, type=half, shape=tensor.shape, const_value=tensor))
        outputs.append(ir.Value(name=f"y.{name}", type=half, shape=ir.Shape(["B", len(value)])))
        nodes.append(ir.Node("", "MatMul", [x, held[-1]], outputs=outputs[-1:], name=name))
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=held, opset_imports={"": 23}, name="g")
    return ir.Model(graph, ir_version=10), quantised, values


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_has_codes_and_onnx_runtime_computes_with_them(tmp_path, kind):
    model, quantised, values = example(kind)
    assert QuantiseLinears(quantised)(model).modified
    path = tmp_path / "m.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    proto = onnx.load(path)
    ops = [node.op_type for node in proto.graph.node]
    assert ops.count("QuantizeLinear") == 1  # both products read the same codes
    assert ops.count("DequantizeLinear") == 3
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    producers = {node.output[0]: node for node in proto.graph.node}
    dequantised = {}
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = (onnx.numpy_helper.to_array(stored[name]) for name in node.input[1:])
            assert scale.dtype == np.float16
            assert (scale > 0).all()
            assert stored[node.input[2]].data_type == STORED[kind]
            assert zero.shape == scale.shape
            assert not zero.astype(np.float32).any()
        if node.op_type == "QuantizeLinear":
            assert [(a.name, a.i) for a in node.attribute] == [("precision", onnx.TensorProto.FLOAT)]
        if node.op_type == "MatMul" and node.name != "dense":
            dequantised[node.name] = producers[node.input[1]]
            assert producers[producers[node.input[0]].input[0]].input[0] == "x"
    for name, node in dequantised.items():
        tensor = stored[node.input[0]]
        assert tensor.data_type == STORED[kind]
        own = np.frombuffer(tensor.raw_data, np.int8 if kind == "int8" else ml_dtypes.float8_e4m3fn)
        wanted = quantised[name].of(values[name].float()).float().T
        assert own.reshape(tensor.dims).astype(np.float32).tolist() == wanted.tolist()
        assert [(a.name, a.i) for a in node.attribute] == ([("axis", 1)] if kind == "int8" else [])
    assert next(node for node in proto.graph.node if node.name == "dense").input[0] == "x"

    for info, weight in weights(path):
        assert torch.equal(weight, values[info.path]), info.path
        assert info.pattern == "2:4"
        assert info.bits == (16 if info.path == "dense" else 8)
    # Many, so that some are so close to a half that a division in float16 gives the other code.
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(2)).half()
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for name, got in zip(values, session.run(None, {"x": x.numpy()}), strict=True):
        seen = quantised[name].activations(x) if name in quantised else x
        close = compare(torch.from_numpy(got), seen @ values[name].T, seen.double() @ values[name].double().T, factor=4)
        assert close.ok, (name, close)


def test_a_weight_that_no_product_reads_is_our_mistake():
    model, quantised, _ = example("int8")
    with pytest.raises(AssertionError, match=r"no product reads \['gone'\]"):
        QuantiseLinears(quantised | {"gone": quantised["q"]})(model)
