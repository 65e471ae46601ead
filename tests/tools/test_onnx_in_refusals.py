"""An ONNX model in: what the command refuses, and that nothing is left behind when it fails."""

import signal

import numpy as np
import onnx
import pytest
from onnx_command import compiled, refused
from onnx_models import build, dense, mlp, node, saved
from sparsify_export import onnx_in
from sparsify_export.cli import main
from sparsify_export.passes.onnx import sparse_linears

FLAGS = {
    "--permute fold": "cannot be had for an .onnx file",
    "--effort balanced": "--effort balanced goes by what the linears of an .onnx file read; give --calibration-inputs",
    "--effort best": "an .onnx file takes --effort fast or balanced",
    "--update admm": "--update admm goes by what the linears of an .onnx file read; give --calibration-inputs",
    "--score hessian": "--score hessian goes by what the linears",
    "--dtype int8 --quantise sweep": "--quantise sweep goes by what the linears",
    "--dtype int8 --quantise joint": "--quantise joint needs the traced model",
    "--tune halves": "--tune halves needs the traced model",
    "--distil 2": "--distil 2 needs the traced model",
    "--hessian inputs": "--hessian inputs has no effect without an update",
    "--damping 0.1": "--damping 0.1 has no effect without an update",
    "--score wanda": "give --calibration-inputs",
    "--ria-power 0.3": "has no effect without --calibration-inputs",
    "--calibration text.txt": "give --calibration-inputs",
    "--eval text.txt": "--eval has no meaning",
    "--windows 3": "--windows has no meaning",
    "--trust-remote-code": "--trust-remote-code has no meaning",
    "--checkpoint kept": "--checkpoint kept has no meaning for an .onnx file",
    "--seq-len 64": "--seq-len has no effect on an .onnx file without --calibration TEXT",
    "--tokens 64": "--tokens has no effect on an .onnx file without --calibration TEXT",
    "--calibration self": "--calibration self has no meaning for an .onnx file",
    "--no-bos": "--no-bos has no effect on an .onnx file",
    "--calibration text.txt --calibration-inputs x": "--calibration text.txt has no effect beside --calibration-inputs",
    "--samples 4": "--samples has no effect without",
    "--skip nothing": "matches none of the 2 linears",
    "--calibration-inputs nowhere": "holds no .npz file",
}


@pytest.mark.parametrize(("flags", "why"), FLAGS.items(), ids=FLAGS)
def test_flags_without_a_meaning_are_refused(given, tmp_path, capsys, flags, why):
    assert why in refused(capsys, tmp_path / "o.onnx", given, "--nm", "2:4", *flags.split())


def test_files_that_are_no_models_are_refused(tmp_path, capsys, given):
    out = tmp_path / "o.onnx"
    assert "does not exist" in refused(capsys, out, tmp_path / "none.onnx")
    for name, content, why in (
        ("text.onnx", b"this is text\n" * 20, "cannot read"),
        ("empty.onnx", b"", "holds no graph"),
        ("half.onnx", given.read_bytes()[:500], "cannot read"),
    ):
        (tmp_path / name).write_bytes(content)
        assert why in refused(capsys, out, tmp_path / name)
    old = mlp(dense(8, 8), opset=9)
    assert "uses ONNX opset 9; want 11" in refused(capsys, out, saved(old, tmp_path, "old.onnx"))


def test_external_data_that_lies_or_is_missing_is_refused(tmp_path, capsys, given):
    out = tmp_path / "o.onnx"
    onnx.save(onnx.load(str(given)), str(tmp_path / "e.onnx"), save_as_external_data=True, location="e.data")
    data = tmp_path / "e.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-8])
    assert "is damaged" in refused(capsys, out, tmp_path / "e.onnx")
    data.unlink()
    assert "lacks its weights" in refused(capsys, out, tmp_path / "e.onnx")
    proto = onnx.load(str(tmp_path / "e.onnx"), load_external_data=False)
    for location in ("../e.data", "/etc/passwd", ""):
        proto.graph.initializer[0].external_data[0].value = location
        path = tmp_path / "bad.onnx"
        path.write_bytes(proto.SerializeToString())
        assert "want a file beside the model" in refused(capsys, out, path)


def test_the_weights_of_the_given_model_are_not_overwritten(tmp_path, capsys, given):
    compiled(given, tmp_path / "o.onnx", "--nm", "2:4")
    (tmp_path / "e.onnx").write_bytes((tmp_path / "o.onnx").read_bytes())  # its data goes where o.onnx is replaced
    said = refused(capsys, tmp_path / "o.onnx", tmp_path / "e.onnx", "--overwrite")
    assert "would overwrite" in said
    assert "which holds weights of" in said


def test_inputs_that_cannot_be_made_up_are_asked_for(tmp_path, capsys):
    nodes = [node("Reshape", ["x", "shape"], ["r"]), node("MatMul", ["r", "w"], ["y"])]
    proto = build(nodes, {"x": ["batch", "any"]}, ["y"], {"shape": np.array([5, 64]), "w": dense(64, 8)})
    path = saved(proto, tmp_path)
    assert "give --calibration-inputs FOLDER" in refused(capsys, tmp_path / "o.onnx", path, "--nm", "2:4")
    (tmp_path / "inputs").mkdir()
    np.savez(tmp_path / "inputs" / "a.npz", x=np.ones((10, 32)))
    compiled(path, tmp_path / "o.onnx", "--nm", "2:4", "--calibration-inputs", tmp_path / "inputs")


def test_a_linear_that_is_misread_fails_the_verification(given, tmp_path, monkeypatch, capsys):
    pack = sparse_linears.pack
    monkeypatch.setattr(sparse_linears, "pack", lambda weight, *rest: pack(weight * 1.001, *rest))
    out = tmp_path / "o.onnx"
    assert main([str(given), "--nm", "2:4", "--quiet", "-o", str(out)]) == 4
    assert "differs from the dense model (kernels)" in capsys.readouterr().err
    assert {f.name for f in tmp_path.iterdir()} == {"given.onnx", "o.onnx.failed"}


@pytest.mark.parametrize("step", ["make_sparse", "write_proto", "verify_onnx", "compare_files"])
def test_an_interruption_leaves_nothing(given, tmp_path, monkeypatch, step):
    def interrupt(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(onnx_in, step, interrupt)
    assert main([str(given), "--nm", "2:4", "--quiet", "-o", str(tmp_path / "o.onnx")]) == 130
    assert [f.name for f in tmp_path.iterdir()] == ["given.onnx"]
