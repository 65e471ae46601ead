"""An ONNX model in: weights that are quantised already, and weights that come out quantised."""

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_command import WAYS, compiled, refused
from onnx_models import FORMS, MICROSOFT, build, dense, eights, node, quantised, rng, saved, sparse_kn
from sparsify_export import onnx_in
from sparsify_export.cli import main
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.onnx import sparse_linears
from sparsify_export.passes.onnx.own_storage import own_storage
from sparsify_export.runtime import verify_onnx
from sparsify_export.runtime.inspection import inspect


def entry_op(form):
    return {"DequantizeLinear": "Gemm", "Cast and Mul": "MatMul"}.get(form, form)


@pytest.mark.parametrize("form", [*FORMS, "Cast and Mul"])
def test_sparse_quantised_weights_are_lowered_where_that_is_smaller(tmp_path, form, capsys):
    nodes, weights = quantised(form)
    path = saved(build(nodes, {"x": ["t", 64]}, ["y"], weights), tmp_path)
    report = compiled(path, tmp_path / "o.onnx", "--dtype", "bf16")
    (entry,) = report["linears"]
    assert (entry["op"], entry["pattern"]) == ("linear_nm", "1:4")
    rounded = form not in ("MatMulNBits", "DequantizeLinear", "Cast and Mul")
    assert entry["reason"] == ("its activations are no longer rounded to 8 bits" if rounded else "")
    assert [n.op_type for n in onnx.load(str(tmp_path / "o.onnx")).graph.node] == ["linear_nm"]
    if form != "MatMulNBits":  # whose scales, one for every 32 numbers, take as much again
        report = compiled(path, tmp_path / "p.onnx", "--dtype", "fp32")
        assert report["linears"][0]["op"] == entry_op(form)
        assert report["linears"][0]["reason"] == (
            "packed it would take 2176 bytes, now 2176; --dtype int8 or int4 stores it as the model does"
        )


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
        node("Relu", ["d"], ["y"]),
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
    assert [entry["how"] for entry in report["verified"]] == WAYS
    errors = [entry["error"] for entry in report["verified"][:2]]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)  # both round the activations
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert "2 of 2" in capsys.readouterr().out


def test_weights_of_4_bits_stay_in_4_bits(tmp_path, capsys):
    path = nbits_model(tmp_path)
    assert main([str(path), "--nm", "1:8", "--dtype", "int4", "-o", str(tmp_path / "o.onnx")]) == 0
    assert "quantised to 8 bits" in capsys.readouterr().out
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
        node("Relu", ["m"], ["y"]),
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


def test_what_does_not_get_smaller_names_the_storage_that_would(tmp_path, capsys):
    """Of a file in 8 bits nothing gets smaller in fp32: the sentence names --dtype; one small linear is no success."""
    scale = np.full(32, 2.0**-9, np.float32)
    values = rng(3).integers(-100, 100, (64, 32)).astype(np.int8)
    nodes = [
        node("MatMul", ["x", "u"], ["h"], name="small"),
        node("DequantizeLinear", ["w", "s"], ["v"]),
        node("Gemm", ["x", "v"], ["g"], name="fc"),
        node("Relu", ["g"], ["y"]),
        node("Relu", ["h"], ["z"]),
    ]
    proto = build(nodes, {"x": ["t", 64]}, ["y", "z"], {"w": values, "s": scale, "u": dense(64, 1)})
    path = saved(proto, tmp_path)
    said = refused(capsys, tmp_path / "o.onnx", path, "--nm", "2:4", "--dtype", "fp32")
    assert "only 1 of 2 linears" in said
    assert "fc: packed it would take" in said
    assert "--dtype int8" in said
    report = compiled(path, tmp_path / "o.onnx", "--nm", "2:4", "--dtype", "int8")
    assert {e["path"]: e["op"] for e in report["linears"]}["fc"] == "linear_nm_int8"


def test_scales_that_are_no_numbers_are_refused(tmp_path, capsys):
    nodes, weights = quantised("DequantizeLinear")
    weights["s"] = weights["s"] * np.nan
    path = saved(build(nodes, {"x": ["t", 64]}, ["y"], weights), tmp_path)
    assert "fc: its weight holds NaN or infinity" in refused(capsys, tmp_path / "o.onnx", path, "--nm", "2:4")


def zero_scales(parts):
    parts.tensors["scales"].zero_()
    return parts


@pytest.mark.parametrize("flags", INTEGERS, ids=["int8", "int4"])
def test_scales_of_zero_are_found_where_they_are_made(given, tmp_path, flags, monkeypatch, capsys):
    pack = sparse_linears.pack
    monkeypatch.setattr(sparse_linears, "pack", lambda *arguments: zero_scales(pack(*arguments)))
    assert main([str(given), "--nm", "2:4", *flags, "--quiet", "-o", str(tmp_path / "o.onnx")]) == 4
    assert "fc0: its quantised weight is not the weight of given.onnx" in capsys.readouterr().err


def test_scales_of_zero_are_found_in_the_file_however_little_the_outputs_show(tmp_path, monkeypatch, capsys):
    """As if the outputs said nothing, which they do where rounding moves them a lot: the linears tell."""
    nodes, weights = quantised("MatMulInteger")
    path = saved(build(nodes, {"x": ["t", 64]}, ["y"], weights), tmp_path)
    write = onnx_in.write_proto

    def damaged(proto, *rest, **more):
        for tensor in proto.graph.initializer:
            if tensor.name.endswith(".scales"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tensor.dims[0], np.float32), tensor.name))
        write(proto, *rest, **more)

    monkeypatch.setattr(onnx_in, "write_proto", damaged)
    monkeypatch.setattr(verify_onnx, "_by_type", lambda got, dense, truth: [])
    monkeypatch.setattr(verify_onnx, "_matters", lambda way, comparison: False)
    assert main([str(path), "--dtype", "int8", "--quiet", "-o", str(tmp_path / "o.onnx")]) == 4
    assert "each linear" in capsys.readouterr().err


@pytest.mark.parametrize("op", ["Mul", "DequantizeLinear"])
def test_codes_that_two_scales_turn_into_weights_stay_as_they_are(tmp_path, op, capsys):
    """Pruned for one linear, with its scale, they would be the other's too: one of them would be wrong."""
    codes = ["w", "w"] if op == "DequantizeLinear" else ["f", "f"]
    nodes = [
        node("Cast", ["w"], ["f"], to=1),
        node(op, [codes[0], "s"], ["v"]),
        node(op, [codes[1], "t"], ["u"]),
        node("MatMul", ["x", "v"], ["a"], name="one"),
        node("MatMul", ["x", "u"], ["b"], name="two"),
        node("Add", ["a", "b"], ["h"]),
        node("Relu", ["h"], ["y"]),
    ][op == "DequantizeLinear" :]
    scale = np.full(32, 2.0**-9, np.float32)
    path = saved(build(nodes, {"x": ["t", 64]}, ["y"], {"w": eights(), "s": scale, "t": 2 * scale}), tmp_path)
    said = refused(capsys, tmp_path / "o.onnx", path, "--nm", "2:4", "--dtype", "int8")
    assert "two reads the same codes through another scale" in said


@pytest.mark.parametrize(("form", "bits"), [("DequantizeLinear", 8), ("Cast and Mul", 8), ("MatMulNBits", 4)])
def test_a_pruned_file_stores_its_weights_as_the_given_one_does_and_does_not_grow(tmp_path, form, bits, capsys):
    if form == "MatMulNBits":
        path = nbits_model(tmp_path)
    else:
        nodes, weights = quantised(form)
        path = saved(build(nodes, {"x": ["t", 64]}, ["y"], weights), tmp_path)
    assert main([str(path), "--nm", "2:4", "-o", str(tmp_path / "o.onnx")]) == 0
    assert f"int{bits}, as the file stores its weights" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "o.onnx.report.json").read_text())
    assert {entry["op"] for entry in report["linears"]} == {f"linear_nm_int{bits}"}
    assert report["settings"]["group"] == (32 if bits == 4 else None)
    given = {info.path: info.stored_bytes for info in inspect(path)}
    assert all(entry["stored_bytes"] < given[entry["path"]] for entry in report["linears"])


@pytest.mark.parametrize(
    ("form", "block", "group"),
    [
        ("MatMulNBits", 16, 128),
        ("MatMulNBits", 32, 32),
        ("MatMulNBits", 64, 64),
        ("along K", 32, 32),
        ("along N", 32, 128),
    ],
)
def test_groups_of_4_bits_are_those_of_the_file_where_our_ops_have_them(form, block, group, tmp_path):
    if form == "MatMulNBits":
        attributes = {"K": 64, "N": 64, "bits": 4, "block_size": block, "domain": MICROSOFT}
        weights = {"w": rng().integers(0, 256, (64, 64 // block, block // 2)).astype(np.uint8)}
        nodes = [node("MatMulNBits", ["x", "w", "s"], ["y"], **attributes)]
        proto = build(nodes, {"x": ["t", 64]}, ["y"], weights | {"s": np.ones((64, 64 // block), np.float32)})
    else:
        axis = 0 if form == "along K" else 1
        shape = [64, 64]
        shape[axis] //= block
        nodes = [node("DequantizeLinear", ["w", "s"], ["v"], axis=axis, block_size=block)]
        nodes += [node("MatMul", ["x", "v"], ["y"])]
        proto = build(nodes, {"x": ["t", 64]}, ["y"], {"s": np.ones(shape, np.float32)}, opset=21, ir=10)
        proto.graph.initializer.append(helper.make_tensor("w", TensorProto.INT4, [64, 64], np.ones(64 * 64, np.int8)))
    assert own_storage(saved(proto, tmp_path)) == Storage("int4", group)
