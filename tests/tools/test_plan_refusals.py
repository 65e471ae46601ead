"""``-o model.plan``: what an engine cannot have, and flags that want one."""

import pytest
from sparsify_export.cli import main


@pytest.mark.parametrize("command", [["bench"], ["eval", "--exact"], ["generate", "--prompt", "w1"]])
def test_an_engine_is_not_run_without_tensorrt(tmp_path, capsys, command):
    file = tmp_path / "model.plan"
    file.write_bytes(b"engine")
    assert main([command[0], str(file), *command[1:]]) == 3
    said = capsys.readouterr().err.strip()
    assert said == (
        f"sparsify-export: {file} cannot be run: TensorRT is not installed here; it wants TensorRT 10.15 or newer and "
        "an NVIDIA GPU"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--dtype", "int4"], "--dtype int4 cannot be had in an engine; want fp16, bf16, fp32, int8 or fp8"),
        (["--dtype", "int8"], "--dtype int8 of an engine is for the linears that are pruned; give --nm, e.g. 2:4"),
        (["--dtype", "fp8", "--sparsity", "0.5"], "--dtype fp8 cannot be had with zeros anywhere: their plugin takes"),
        (
            ["--dtype", "fp8", "--nm", "2:4", "--quantise", "rtn"],
            "--quantise rtn has no effect with --dtype fp8, which",
        ),
        (["--nm", "2:4", "--quantise", "rtn"], "--quantise rtn has no effect on an engine without --dtype int8"),
        (["--ops", "sparse", "--nm", "2:4", "--dtype", "fp8"], "--ops sparse cannot be had with --dtype fp8: the plug"),
        (["--lower", "auto"], "--lower auto has no effect on an engine"),
        (["--batch", "2,1,3"], "--batch 2,1,3 contradicts itself"),
        (["--seq", "1,2"], "--seq 1,2 is not a range"),
        (["--context", "4096"], "--context 4096 is longer than the 128 tokens that the model takes"),
        (["--seq", "1,8,64", "--context", "32"], "more than the context of 32"),
        (["--context", "1"], "--context 1 is too small"),
        (["--workspace", "0"], "--workspace 0 is too small"),
    ],
)
def test_what_an_engine_cannot_have_is_refused(folder, tmp_path, capsys, arguments, said):
    assert main([str(folder), *arguments, "--quiet", "-o", str(tmp_path / "m.plan")]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flag", [["--batch", "1,1,1"], ["--seq", "1,1,1"], ["--context", "8"], ["--workspace", "9"], ["--level", "5"]]
)
def test_flags_of_an_engine_want_one(folder, tmp_path, capsys, flag):
    assert main([str(folder), *flag, "-o", str(tmp_path / "m.onnx")]) == 2
    assert f"{flag[0]} has no effect without an engine" in capsys.readouterr().err


def test_fp8_is_for_engines(folder, tmp_path, capsys):
    assert main([str(folder), "--nm", "2:4", "--dtype", "fp8", "-o", str(tmp_path / "m.onnx")]) == 2
    assert "--dtype fp8 is for engines; want an output ending in .plan" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "or int8 or fp8, for engines only, with --nm" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_an_onnx_model_and_texts_of_images_are_refused(images, given, tmp_path, capsys):
    assert main([str(given), "--nm", "2:4", "-o", str(tmp_path / "m.plan")]) == 2
    assert "cannot become an engine; give the pretrained model it was exported from" in capsys.readouterr().err
    assert main([str(images), "--seq", "1,2,3", "-o", str(tmp_path / "m.plan")]) == 2
    assert "--seq has no effect" in capsys.readouterr().err
