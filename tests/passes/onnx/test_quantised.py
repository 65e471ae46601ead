"""Dequantised weights are those that ONNX Runtime computes with."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from onnx_models import MICROSOFT, build, node, rng, saved
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.onnx.linears import find_linears
from sparsify_export.passes.onnx.view import read_model


def read_and_run(proto, tmp_path, k):
    """The weight as read, and as ONNX Runtime shows it when it multiplies the identity."""
    path = saved(proto, tmp_path)
    (linear,), left = find_linears(read_model(path))
    assert left == []
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL  # which would compute in 8 bits
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": np.eye(k, dtype=np.float32)})
    return linear.weight.read(), torch.from_numpy(y.T.copy())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("points", ["none", "packed", "float"])
@pytest.mark.parametrize("k", [64, 40])
def test_blocks(tmp_path, bits, points, k):
    n, block = 6, 16
    blocks = -(-k // block)
    weights = {
        "w": rng().integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8),
        "s": rng(1).uniform(0.5, 2, (n, blocks)).astype(np.float32),
    }
    if points == "packed":
        weights["z"] = rng(2).integers(0, 256, (n, -(-blocks * bits // 8))).astype(np.uint8)
    if points == "float":
        weights["z"] = rng(2).uniform(0, 15, (n, blocks)).astype(np.float32)
    names = ["x", *weights]
    product = node("MatMulNBits", names, ["y"], K=k, N=n, bits=bits, block_size=block, domain=MICROSOFT)
    if bits == 8 and points == "float":
        pytest.skip("ONNX Runtime 1.32 does not run it")
    got, want = read_and_run(build([product], {"x": ["t", k]}, ["y"], weights), tmp_path, k)
    close = compare(want, got, got.double())
    assert close.ok, close


@pytest.mark.parametrize(
    ("scale", "attributes", "opset"),
    [
        (np.float32(0.1), {}, 18),
        (rng(1).uniform(0.5, 2, 6).astype(np.float32), {}, 18),
        (rng(1).uniform(0.5, 2, 32).astype(np.float32), {"axis": 0}, 18),
        (rng(1).uniform(0.5, 2, (2, 6)).astype(np.float32), {"axis": 0, "block_size": 16}, 21),
    ],
    ids=["one", "columns", "rows", "blocks"],
)
@pytest.mark.parametrize("zero", [False, True])
def test_dequantize_linear(tmp_path, scale, attributes, opset, zero):
    weights = {"w": rng().integers(0, 256, (32, 6)).astype(np.uint8), "s": scale}
    if zero:
        weights["z"] = rng(3).integers(0, 256, np.shape(scale)).astype(np.uint8)
    nodes = [node("DequantizeLinear", list(weights), ["v"], **attributes), node("MatMul", ["x", "v"], ["y"])]
    got, want = read_and_run(build(nodes, {"x": ["t", 32]}, ["y"], weights, opset=opset, ir=10), tmp_path, 32)
    assert torch.equal(got, want)


def test_four_bit_dequantize_linear(tmp_path):
    values = helper.make_tensor("w", 22, [32, 6], rng().integers(-8, 8, 192))
    nodes = [node("DequantizeLinear", ["w", "s"], ["v"]), node("MatMul", ["x", "v"], ["y"])]
    proto = build(nodes, {"x": ["t", 32]}, ["y"], {"s": np.float32(0.5)}, opset=21, ir=10)
    proto.graph.initializer.append(values)
    got, want = read_and_run(proto, tmp_path, 32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (1, 6), (32, 1)], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["codes first", "scale first"])
def test_cast_and_mul(tmp_path, shape, first):
    weights = {"w": rng().integers(-128, 128, (32, 6)).astype(np.int8)}
    weights["s"] = rng(1).uniform(0.5, 2, shape).astype(np.float32)
    nodes = [node("Cast", ["w"], ["f"], to=1), node("Mul", ["f", "s"] if first else ["s", "f"], ["v"])]
    proto = build([*nodes, node("MatMul", ["x", "v"], ["y"])], {"x": ["t", 32]}, ["y"], weights)
    got, want = read_and_run(proto, tmp_path, 32)
    assert torch.equal(got, want)


@pytest.mark.parametrize("late", [True, False], ids=["after the scale", "before the scale"])
def test_cast_and_mul_in_half_precision_of_a_transposed_weight(tmp_path, late):
    """As PyTorch stores it, ``[N, K]`` with a scale for each row of it; the product is rounded once to float16."""
    weights = {"w": rng().integers(0, 256, (6, 32)).astype(np.uint8)}
    weights["s"] = rng(1).uniform(0.5, 2, (6, 1) if late else 6).astype(np.float16)
    cast, transpose, scale = (
        node("Cast", ["w" if late else "t"], ["f"], to=10),
        node("Transpose", ["m" if late else "w"], ["g" if late else "t"], perm=[1, 0]),
        node("Mul", ["f", "s"], ["m"]),
    )
    # Without the Identity ONNX Runtime leaves out the rounding to float16 in front of the last Cast.
    order = [cast, scale, transpose] if late else [transpose, cast, scale, node("Identity", ["m"], ["g"])]
    nodes = [*order, node("Cast", ["g"], ["v"], to=1), node("MatMul", ["x", "v"], ["y"])]
    got, want = read_and_run(build(nodes, {"x": ["t", 32]}, ["y"], weights), tmp_path, 32)
    assert torch.equal(got.float(), want)


def test_dynamic_quantisation_keeps_the_weight(tmp_path):
    values = rng().integers(-100, 100, (32, 6)).astype(np.int8)
    scale = rng(1).uniform(0.01, 0.02, 6).astype(np.float32)
    product = node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain=MICROSOFT)
    got, want = read_and_run(build([product], {"x": ["t", 32]}, ["y"], {"w": values, "s": scale}), tmp_path, 32)
    assert torch.equal(got, torch.from_numpy((values * scale).T.copy()))
    assert (got - want).abs().max() <= got.abs().max() / 255  # ONNX Runtime rounds the identity to 8 bits
