"""An ONNX model in: weights that are quantised already, and weights that come out quantised."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx_command import compiled
from onnx_models import MICROSOFT, build, dense, node, rng, saved, sparse_kn
from sparsify_export.cli import main


def eights(k=64, n=32):
    """Small integers, int8 ``[K, N]``, one of four neighbours along K kept."""
    values = rng().integers(1, 100, (k, n)).astype(np.int8)
    values[np.arange(k) % 4 != 0] = 0
    return values


def entry_op(form):
    return "Gemm" if form == "DequantizeLinear" else form


def quantised(form):
    """One linear of 64 to 32 whose quantised weight is 1:4."""
    scale = np.full(32, 2.0**-9, np.float32)
    bias = dense(1, 32)[0]
    if form == "MatMulNBits":
        packed = (eights().T.astype(np.int16) + 128).astype(np.uint8).reshape(32, 2, 32)
        attributes = {"K": 64, "N": 32, "bits": 8, "block_size": 32, "domain": MICROSOFT}
        weights = {"w": packed, "s": np.full((32, 2), 2.0**-9, np.float32), "b": bias}
        nodes = [node("MatMulNBits", ["x", "w", "s", "", "", "b"], ["y"], name="fc", **attributes)]
        return nodes, weights
    if form == "DequantizeLinear":
        nodes = [node("DequantizeLinear", ["w", "s"], ["v"]), node("Gemm", ["x", "v", "b"], ["y"], name="fc")]
        return nodes, {"w": eights(), "s": scale, "b": bias}
    if form == "DynamicQuantizeMatMul":
        nodes = [node("DynamicQuantizeMatMul", ["x", "w", "s", "", "b"], ["y"], name="fc", domain=MICROSOFT)]
        return nodes, {"w": eights(), "s": scale, "b": bias}
    quantise = node("DynamicQuantizeLinear", ["x"], ["q", "xs", "xz"])
    if form == "MatMulIntegerToFloat":
        names = ["q", "w", "xs", "s", "xz", "", "b"]
        nodes = [quantise, node("MatMulIntegerToFloat", names, ["y"], name="fc", domain=MICROSOFT)]
    else:
        nodes = [
            quantise,
            node("MatMulInteger", ["q", "w", "xz"], ["i"], name="fc"),
            node("Cast", ["i"], ["f"], to=1),
            node("Mul", ["xs", "s"], ["both"]),
            node("Mul", ["f", "both"], ["m"]),
            node("Add", ["m", "b"], ["y"]),
        ]
    return nodes, {"w": eights(), "s": scale, "b": bias}


@pytest.mark.parametrize(
    "form", ["MatMulNBits", "DequantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger"]
)
def test_sparse_quantised_weights_are_lowered_where_that_is_smaller(tmp_path, form, capsys):
    nodes, weights = quantised(form)
    path = saved(build(nodes, {"x": ["t", 64]}, ["y"], weights), tmp_path)
    report = compiled(path, tmp_path / "o.onnx", "--dtype", "bf16")
    (entry,) = report["linears"]
    assert (entry["op"], entry["pattern"]) == ("linear_nm", "1:4")
    rounded = form not in ("MatMulNBits", "DequantizeLinear")
    assert entry["reason"] == ("its activations are no longer rounded to 8 bits" if rounded else "")
    assert [n.op_type for n in onnx.load(str(tmp_path / "o.onnx")).graph.node] == ["linear_nm"]
    if form != "MatMulNBits":  # whose scales, one for every 32 numbers, take as much again
        report = compiled(path, tmp_path / "p.onnx")
        assert report["linears"][0]["op"] == entry_op(form)
        assert report["linears"][0]["reason"] == "packed it would take 2176 bytes, now 2176"


def four_bits(n, seed):
    """The weight of a MatMulNBits of 4 bits, ``[n, 64]`` in groups of 32, and its scales."""
    values = rng(seed).integers(0, 256, (n, 2, 16)).astype(np.uint8)
    return values, (0.02 * rng(seed + 1).random((n, 2))).astype(np.float32)


def nbits_model(folder):
    """Two linears of 4 bits, a SiLU between them and nothing that looks like a head behind."""
    (w, s), (v, t) = four_bits(64, 1), four_bits(32, 3)
    attributes = {"K": 64, "bits": 4, "block_size": 32, "domain": MICROSOFT}
    nodes = [
        node("MatMulNBits", ["x", "w", "s"], ["h"], name="up", N=64, **attributes),
        node("Sigmoid", ["h"], ["g"]),
        node("Mul", ["h", "g"], ["m"]),
        node("MatMulNBits", ["m", "v", "t"], ["d"], name="down", N=32, **attributes),
        node("Exp", ["d"], ["y"]),
    ]
    return saved(build(nodes, {"x": ["t", 64]}, ["y"], {"w": w, "s": s, "v": v, "t": t}), folder, "nbits.onnx")


INTEGERS = [["--dtype", "int8"], ["--dtype", "int4", "--group", "32"]]


@pytest.mark.parametrize("flags", INTEGERS, ids=["int8", "int4"])
@pytest.mark.parametrize("pattern", [["--nm", "2:4"], ["--sparsity", "0.75"]], ids=["2:4", "0.75"])
def test_integer_storage(given, tmp_path, flags, pattern, capsys):
    out = tmp_path / "o.onnx"
    report = compiled(given, out, *pattern, *flags)
    family = "linear_nm" if pattern[0] == "--nm" else "linear_bitmask"
    assert {e["op"] for e in report["linears"]} == {f"{family}_{flags[1]}"}
    assert [entry["how"] for entry in report["verified"]] == ["kernels", "functions"]
    errors = [entry["error"] for entry in report["verified"]]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)  # both round the activations
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "2 of 2" in capsys.readouterr().out


def test_weights_of_4_bits_stay_in_4_bits(tmp_path, capsys):
    path = nbits_model(tmp_path)
    assert main([str(path), "--nm", "1:8", "--dtype", "int4", "-o", str(tmp_path / "o.onnx")]) == 0
    assert "quantised to 8 bits, each token by itself" in capsys.readouterr().out
    report = json.loads((tmp_path / "o.onnx.report.json").read_text())
    assert {e["op"] for e in report["linears"]} == {"linear_nm_int4"}
    assert report["stored_linear_bytes"] < (64 + 32) * (32 + 8) / 2


@pytest.mark.parametrize("flags", INTEGERS, ids=["int8", "int4"])
def test_half_precision_weights_are_quantised_if_that_is_asked_for(tmp_path, flags):
    weights = {"w": dense(64, 32).astype(np.float16), "v": dense(32, 64, 1).astype(np.float16)}
    nodes = [
        node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        node("Gemm", ["x", "wt"], ["h"], name="fc", transB=1, alpha=0.3),
        node("MatMul", ["h", "v"], ["m"], name="fc1"),
        node("Exp", ["m"], ["y"]),
    ]
    proto = build(nodes, {"x": ["t", 64]}, ["y"], weights, kind=TensorProto.FLOAT16)
    report = compiled(saved(proto, tmp_path), tmp_path / "o.onnx", "--nm", "2:4", *flags)
    assert {e["op"] for e in report["linears"]} == {f"linear_nm_{flags[1]}"}


def test_dynamic_quantisation_becomes_ours(tmp_path):
    nodes, weights = quantised("MatMulInteger")
    path = saved(build(nodes, {"x": ["t", 64]}, ["y"], weights), tmp_path)
    (entry,) = compiled(path, tmp_path / "o.onnx", "--dtype", "int8")["linears"]
    assert (entry["op"], entry["pattern"]) == ("linear_nm_int8", "1:4")
    assert entry["reason"] == "its activations are rounded to 8 bits token by token, no longer all together"


def test_weights_scaled_in_two_ways_are_not_quantised(tmp_path):
    nodes = [
        node("Gemm", ["x", "w"], ["a"], name="one", alpha=2.0),
        node("Gemm", ["x", "w"], ["b"], name="two", alpha=3.0),
        node("Add", ["a", "b"], ["y"]),
    ]
    path = saved(build(nodes, {"x": ["t", 64]}, ["y"], {"w": sparse_kn(64, 32)}), tmp_path)
    report = compiled(path, tmp_path / "o.onnx", "--dtype", "int8")
    assert {e["reason"] for e in report["linears"]} == {
        "the linears that share its weight scale it differently, which int8 cannot store"
    }
