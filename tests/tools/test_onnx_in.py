"""An ONNX model in: what the command writes and proves."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from commands import names
from onnx import TensorProto, helper
from onnx_command import WAYS, compiled, refused
from onnx_models import build, dense, genai, mlp, node, rng, saved, sparse_kn
from sparsify_export.cli import main
from sparsify_export.passes.cost import Speed
from sparsify_export.runtime import machine


def test_prune_lower_verify_and_inspect(given, tmp_path, capsys):
    out = tmp_path / "sparse.onnx"
    report = compiled(given, out, "--nm", "2:4")
    assert names(tmp_path) == {
        "given.onnx",
        "sparse.onnx",
        "sparse.onnx.data",
        "sparse.onnx.report.json",
    }
    assert [(e["path"], e["op"], e["reason"]) for e in report["linears"]] == [
        ("fc0", "linear_nm", ""),
        ("fc1", "linear_nm", ""),
    ]
    assert report["stored_linear_bytes"] < 0.54 * report["dense_linear_bytes"]
    assert [entry["how"] for entry in report["verified"]] == WAYS
    assert all(entry["error"] <= entry["allowed"] for entry in report["verified"])
    assert report["latency"][0]["ratio"] > 0
    assert report["given_bytes"] == given.stat().st_size
    assert main(["inspect", str(out)]) == 0
    assert "2:4" in capsys.readouterr().out


def test_the_terminal_shows_it(given, tmp_path, capsys):
    assert main([str(given), "--sparsity", "0.6", "-o", str(tmp_path / "o.onnx")]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2" in shown
    assert "the model given" in shown
    assert "calibration" not in shown


def test_weights_that_are_sparse_already_are_lowered_as_they_are(tmp_path):
    given = saved(mlp(sparse_kn(64, 64), dense(64, 32)), tmp_path, "given.onnx")
    report = compiled(given, tmp_path / "o.onnx")
    assert [(e["op"], e["pattern"], e["reason"], e["sparsity"]) for e in report["linears"]] == [
        ("linear_nm", "2:4", "", None),
        ("MatMul", None, "the weight is dense", None),
    ]


def test_auto_leaves_dense_what_this_machine_runs_slower(tmp_path, monkeypatch):
    quick, slow = (Speed(0.0, (figure,) * 3, (figure,) * 3) for figure in (1e-9, 2e-9))
    monkeypatch.setattr(machine, "measure_dense", lambda: quick)
    monkeypatch.setattr(machine, "measure_sparse", lambda pattern, storage: slow)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = saved(mlp(sparse_kn(64, 64), dense(64, 32)), tmp_path, "given.onnx")
    report = compiled(given, tmp_path / "o.onnx", "--lower", "auto", "--lower-for", "16")
    assert [entry["op"] for entry in report["linears"]] == ["MatMul", "MatMul"]
    assert any("for 16 tokens here" in entry["reason"] for entry in report["linears"])
    assert report["machine"]["threads"] >= 1


def test_a_dense_model_comes_out_dense_and_what_came_out_goes_in_again(given, tmp_path):
    report = compiled(given, tmp_path / "dense.onnx")
    assert {e["op"] for e in report["linears"]} == {"MatMul"}
    compiled(given, tmp_path / "sparse.onnx", "--nm", "2:4")
    report = compiled(tmp_path / "sparse.onnx", tmp_path / "again.onnx")
    assert {(e["op"], e["reason"]) for e in report["linears"]} == {("linear_nm", "it is a sparse op already")}
    assert [(entry["how"], entry["error"]) for entry in report["verified"]] == [("kernels", 0), ("functions", 0)]
    first, again = (onnx.load(str(tmp_path / name)) for name in ("sparse.onnx", "again.onnx"))
    assert first.graph == again.graph
    assert first.functions == again.functions


def test_standard_ops_keep_every_op_and_hold_zeros(given, tmp_path):
    compiled(given, tmp_path / "o.onnx", "--nm", "2:4", "--ops", "standard")
    result, before = onnx.load(str(tmp_path / "o.onnx")), onnx.load(str(given))
    assert result.graph.node == before.graph.node
    report = compiled(tmp_path / "o.onnx", tmp_path / "p.onnx")
    assert {e["pattern"] for e in report["linears"]} == {"2:4"}


def test_a_folder_can_be_the_output_and_the_file_itself_cannot(given, tmp_path, capsys):
    compiled(given, tmp_path / "folder", "--nm", "2:4")
    assert names(tmp_path / "folder") == {"model.onnx", "model.onnx.data", "report.json"}
    held = given.read_bytes()
    assert "would overwrite" in refused(capsys, given, given, "--nm", "2:4", "--overwrite")
    assert given.read_bytes() == held
    inside = tmp_path / "folder" / "model.onnx"  # as does the folder that its model lies in
    assert "would overwrite" in refused(capsys, tmp_path / "folder", inside, "--nm", "2:4", "--overwrite")
    assert inside.is_file()


def test_calibration_inputs_change_what_is_kept(given, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    x = rng().standard_normal((50, 64)).astype(np.float32)
    x[:, ::4] *= 1e-3  # the first of every group hardly matters
    np.savez(inputs / "a.npz", x=x)
    flags = ["--nm", "2:4", "--effort", "fast", "--ops", "standard", "--calibration-inputs", inputs]
    report = compiled(given, tmp_path / "o.onnx", *flags, "--score", "wanda")
    assert report["settings"]["score"] == "wanda"
    result = onnx.load(str(tmp_path / "o.onnx"))
    weight = next(onnx.numpy_helper.to_array(t) for t in result.graph.initializer if t.name == "w0")
    assert np.count_nonzero(weight[::4]) < 0.02 * np.count_nonzero(weight)
    compiled(given, tmp_path / "p.onnx", *flags, "--samples", "1")


def test_models_of_onnxruntime_genai_stay_runnable(tmp_path):
    report = compiled(genai(tmp_path), tmp_path / "o.onnx", "--nm", "2:4")
    assert {e["path"]: e["op"] for e in report["linears"]} == {
        "/attn/qkv_proj/MatMul": "linear_nm",
        "/attn/o_proj/MatMul": "linear_nm",
        "/mlp/up_proj/MatMul": "linear_nm",
        "/mlp/down_proj/MatMul": "linear_nm",
        "/lm_head/MatMul": "MatMul",
    }


def test_weights_behind_links_are_read(given, tmp_path):
    blobs, shown = tmp_path / "blobs", tmp_path / "shown"
    blobs.mkdir()
    shown.mkdir()
    onnx.save(onnx.load(str(given)), str(blobs / "m.onnx"), save_as_external_data=True, location="m.data")
    for name in ("m.onnx", "m.data"):
        (shown / name).symlink_to(Path("..") / "blobs" / name)
    compiled(shown / "m.onnx", tmp_path / "o.onnx", "--nm", "2:4")
    (tmp_path / "hard.data").hardlink_to(blobs / "m.data")
    compiled(shown / "m.onnx", tmp_path / "p.onnx", "--nm", "2:4")


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16])
def test_half_precision_models_stay_in_half_precision(tmp_path, kind):
    weight = helper.make_tensor("w", kind, [64, 32], dense(64, 32).reshape(-1))
    proto = build([node("MatMul", ["x", "w"], ["y"], name="fc")], {"x": ["t", 64]}, ["y"], {}, kind=kind)
    proto.graph.initializer.append(weight)
    report = compiled(saved(proto, tmp_path), tmp_path / "o.onnx", "--nm", "2:4")
    assert report["linears"][0]["stored_bytes"] == 64 * 32 * 2 * 9 // 16


def test_axes_without_a_name_stay_unknown_to_onnx_runtime(tmp_path):
    nodes = [
        node("MatMul", ["x", "w"], ["h"], name="fc"),
        node("Shape", ["h"], ["s"]),
        node("Reshape", ["h", "s"], ["y"]),  # ONNX Runtime reads lengths of -1 here if it is told any
    ]
    proto = build(nodes, {"x": [None, None, 64]}, ["y"], {"w": dense(64, 8)})
    proto.graph.output[0].type.tensor_type.shape.dim.add()
    np.savez(tmp_path / "a.npz", x=np.ones((2, 3, 64)))
    flags = ["--nm", "2:4", "--calibration-inputs", tmp_path]
    compiled(saved(proto, tmp_path), tmp_path / "o.onnx", *flags)
