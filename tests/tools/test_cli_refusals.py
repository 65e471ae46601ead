"""The command line: one sentence and exit code 2 for everything a user can get wrong, and nothing left behind."""

import os
import resource

import numpy as np
import pytest
from commands import SHORT, refused
from safetensors.torch import load_file, save_file
from sparsify_export.cli import main

HALF = ["--sparsity", "0.5"]
BESA = [*HALF, "--allocate", "besa-row"]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--nm", "4:4"], "0 < n < m"),
        (["--nm", "0:4"], "0 < n < m"),
        (["--nm", "two:4"], "two whole numbers"),
        (["--sparsity", "0"], "between 0 and 1"),
        (["--sparsity", "1.5"], "between 0 and 1"),
        (["--nm", "2:4", "--sparsity", "0.5"], "at most one"),
        (["--nm", "2:4", "--samples", "0"], "--samples 0"),
        (["--nm", "2:4", "--ria-power", "-1"], "negative"),
        (["--nm", "2:4", "--effort", "huge"], "huge"),
        (["--nm", "2:4", "--damping", "2"], "--damping 2 is out of range; want 0 to 1"),
        (
            ["--nm", "2:4", "--effort", "fast", "--hessian", "inputs"],
            "--hessian inputs has no effect without an update",
        ),
        (["--nm", "2:4", "--effort", "fast", "--damping", "0.1"], "--damping 0.1 has no effect without an update"),
        (["--nm", "2:4", "--update", "none", "--mask-from", "score"], "--mask-from score has no effect without"),
        (["--nm", "2:4", "--update", "cg", "--mask-from", "update"], "--update cg does not choose a mask"),
        (["--update", "cg"], "--update has no effect without --nm"),
        (["--nm", "2:4", "--skip", "*.no_such_layer"], "matches none of the 14 linears"),
        (["--nm", "3:7"], "64 is not a multiple of 7"),
        (["--score", "wanda"], "has no effect without --nm"),
        (["--ria-power", "0.3"], "--ria-power has no effect without --nm"),
        (["--calibration", "self"], "--calibration has no effect without --nm"),
        (["--nm", "2:4", "--score", "magnitude"], "--score magnitude does not choose what goes: --update alps does"),
        (["--nm", "2:4", "--dtype", "int8", "--ops", "standard"], "--dtype int8 has no effect with --ops standard"),
        (["--dtype", "bf16", "--ops", "standard"], "--dtype bf16 has no effect with --ops standard"),
        (["--nm", "2:4", "--window", "64"], "--window 64 has no effect without --eval"),
        (["--nm", "2:4", "--windows", "2"], "--windows 2 has no effect without --eval"),
        (
            ["--nm", "2:4", "--calibration-inputs", "x", "--calibration", "y.txt"],
            "--calibration y.txt has no effect beside --calibration-inputs",
        ),
        (
            ["--nm", "2:4", "--calibration-inputs", "x", "--seq-len", "9"],
            "--seq-len 9 has no effect beside --calibration-inputs",
        ),
        (["--nm", "2:4", "--group", "64"], "--group 64 has no effect without --dtype int4"),
        (["--nm", "2:4", "--dtype", "int8", "--group", "64"], "--group 64 has no effect without --dtype int4"),
        (["--nm", "2:4", "--dtype", "int4", "--group", "16"], "16"),
        (["--nm", "2:4", "--dtype", "int2"], "int2"),
        (["--nm", "2:4", "--quantise", "rtn"], "--quantise rtn has no effect without --dtype int8 or --dtype int4"),
        (["--dtype", "int4", "--quantise", "sweep"], "--quantise has no effect without --nm or --sparsity"),
        (
            ["--nm", "2:4", "--dtype", "int4", "--quantise", "joint"],
            "--quantise joint learns with --tune, --distil or --allocate; give one of them, or take sweep",
        ),
        (
            ["--nm", "2:4", "--dtype", "int4", "--quantise", "rtn", "--ops", "standard"],
            "--quantise rtn has no effect with --ops standard, which writes floats",
        ),
        (["--nm", "2:4", "--no-such-flag"], "no-such-flag"),
        (["--nm", "2:4", "--lower", "auto", "--ops", "standard"], "--lower auto has no effect with --ops standard"),
        (["--nm", "2:4", "--lower-for", "16"], "--lower-for 16 has no effect without --lower auto"),
        (["--nm", "2:4", "--lower", "auto", "--lower-for", "0"], "--lower-for 0 is too small"),
        (["--allocate", "besa-row"], "--allocate has no effect without --nm or --sparsity"),
        (["--nm", "2:4", "--allocate", "besa-row"], "--allocate besa-row wants --sparsity"),
        (
            [*HALF, "--besa-epochs", "2"],
            "--besa-epochs 2 has no effect without --allocate besa-row",
        ),
        ([*BESA, "--besa-epochs", "0"], "--besa-epochs 0 is too small"),
        ([*BESA, "--besa-rate-step", "0.03"], "--besa-rate-step 0.03 wants a fraction like 0.01"),
        ([*BESA, "--mask-from", "update", "--update", "sparsegpt"], "over all rows, which undoes --allocate; want"),
        (
            ["--sparsity", "0.7", "--allocate", "besa-row", "--besa-logits", "sigmoid"],
            "--besa-logits sigmoid reaches rates from 0.376 to 0.624, not 0.7",
        ),
    ],
)
def test_bad_flags(folder, tmp_path, capsys, flags, why):
    short = [] if "--samples" in flags else SHORT[:2] if "--seq-len" in flags else SHORT[:4]
    assert why in refused(capsys, tmp_path / "model.onnx", folder, *flags, *short)


def test_missing_model(tmp_path, capsys):
    assert "does not exist" in refused(capsys, tmp_path / "model.onnx", tmp_path / "nothing", "--nm", "2:4")


def test_folder_and_file_that_are_no_model(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")
    assert "no config.json" in refused(capsys, tmp_path / "m.onnx", tmp_path / "empty")
    assert "is not a model" in refused(capsys, tmp_path / "m.onnx", tmp_path / "notes.txt")


def test_damaged_gguf(tmp_path, capsys):
    (tmp_path / "a.gguf").write_bytes(b"nonsense")
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + bytes(20))
    assert "is not a GGUF file" in refused(capsys, tmp_path / "m.onnx", tmp_path / "a.gguf")
    assert "holds no tensors" in refused(capsys, tmp_path / "m.onnx", tmp_path / "b.gguf")
    (tmp_path / "c.gguf").write_bytes(b"GGUF" + bytes([3, 0, 0, 0, 1, 0, 0, 0]) + bytes(12))
    assert "cannot load" in refused(capsys, tmp_path / "m.onnx", tmp_path / "c.gguf")


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the model that a test may damage."""
    path = tmp_path / "copy"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_damaged_safetensors(copy, tmp_path, capsys):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "cannot load" in refused(capsys, tmp_path / "m.onnx", copy, "--nm", "2:4")


def test_nan_in_weights_names_the_layer(copy, tmp_path, capsys):
    weights = load_file(copy / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "layers.1.mlp.up_proj.weight holds NaN" in refused(capsys, tmp_path / "m.onnx", copy, "--nm", "2:4", *SHORT)


def test_activations_that_overflow_name_the_layer(copy, text, tmp_path, capsys):
    weights = load_file(copy / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.1.mlp.{name}.weight"].fill_(3e37)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    said = refused(capsys, tmp_path / "m.onnx", copy, "--nm", "2:4", "--calibration", text, *SHORT)
    assert "layers.1.mlp.down_proj: activations hold NaN or infinity" in said


@pytest.mark.parametrize(("content", "why"), [("", "is empty"), ("  \n", "is empty"), ("w1", "holds 1 tokens")])
def test_calibration_text_that_is_no_text(folder, tmp_path, capsys, content, why):
    file = tmp_path / "text.txt"
    file.write_text(content)
    assert why in refused(capsys, tmp_path / "m.onnx", folder, "--nm", "2:4", "--calibration", file)


def test_calibration_file_that_is_missing_or_no_jsonl(folder, tmp_path, capsys):
    assert "cannot read" in refused(capsys, tmp_path / "m.onnx", folder, "--nm", "2:4", "--calibration", tmp_path / "x")
    bad = tmp_path / "text.jsonl"
    bad.write_text('{"content": "no text field"}\n')
    assert "JSONL" in refused(capsys, tmp_path / "m.onnx", folder, "--nm", "2:4", "--calibration", bad)


def test_calibration_inputs_without_files_or_with_the_wrong_arrays(folder, tmp_path, capsys):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    arguments = [folder, "--nm", "2:4", "--calibration-inputs", inputs]
    assert "holds no .npz file" in refused(capsys, tmp_path / "m.onnx", *arguments)
    np.savez(inputs / "a.npz", input_ids=np.ones((1, 8), np.int64))
    assert "lacks attention_mask" in refused(capsys, tmp_path / "m.onnx", *arguments)


def test_existing_output_stays_unless_overwritten(images, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    out.write_text("precious")
    assert "exists already" in refused(capsys, out, images)
    assert out.read_text() == "precious"
    assert main([str(images), "--quiet", "--overwrite", "-o", str(out)]) == 0
    assert out.stat().st_size > 1000


def test_overwrite_never_removes_a_folder_of_somebody_else(folder, tmp_path, capsys):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    assert "was not written by sparsify-export" in refused(capsys, tmp_path / "home", folder, "--overwrite")


def test_output_that_cannot_be_written(folder, tmp_path, capsys):
    assert "ends in .pt" in refused(capsys, tmp_path / "model.pt", folder)
    assert "is not a folder" in refused(capsys, tmp_path / "no" / "model.onnx", folder)
    if os.geteuid():  # root may write anywhere
        tmp_path.chmod(0o500)
        assert "no permission" in refused(capsys, tmp_path / "model.onnx", folder)


def test_disk_that_fills_up_while_writing_leaves_nothing(images, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # the next write beyond it fails as a full disk does
    try:
        assert "cannot write" in refused(capsys, tmp_path / "model.onnx", images)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_disk_that_is_too_small_is_refused_before_writing(images, tmp_path, capsys, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("sparsify_export.passes.onnx.write.psutil.disk_usage", lambda path: usage)
    assert "the disk has 1000 left" in refused(capsys, tmp_path / "model.onnx", images)
