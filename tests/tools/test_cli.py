"""The command line: what it writes, and what it leaves behind where it is stopped."""

import contextlib
import json
import math
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from commands import SHORT, names, refused
from families import VOCABULARY, random_model
from safetensors.torch import load_file, save_file
from sparsify_export import cli
from sparsify_export.calibrate import besa
from sparsify_export.cli import main
from sparsify_export.passes.cost import Speed
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.onnx.protos import data_files
from sparsify_export.runtime import machine
from sparsify_export.runtime.inspection import inspect, sparse_weights
from sparsify_export.settings import USUAL


@pytest.fixture(scope="session")
def exported(folder, text, tmp_path_factory):
    """A folder written by the command line."""
    out = tmp_path_factory.mktemp("out") / "sparse"
    arguments = [str(folder), "--nm", "2:4", "--calibration", str(text), "--eval", str(text), "--window", "32", *SHORT]
    assert main([*arguments, "-o", f"{out}/"]) == 0
    return out


def test_folder_holds_everything_that_serving_needs(exported):
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "report.json"} <= names(exported)
    report = json.loads((exported / "report.json").read_text())
    assert set(report["files"]) == {file.name for file in exported.iterdir()}
    assert report["settings"]["pattern"] == "2:4"
    assert report["settings"]["threads"] == torch.get_num_threads()
    assert report["stored_linear_bytes"] <= 0.56 * report["dense_linear_bytes"]
    assert report["evaluation"]["result"]["window"] == 32
    assert {entry["how"] for entry in report["verified"]} >= {"kernels", "functions"}
    assert {row["name"] for row in report["latency"]} == {"prefill 128", "decode 64"} or report["latency"]
    assert all(entry["error"] <= entry["allowed"] for entry in report["verified"])


def test_onnx_name_writes_the_file_and_its_data(folder, tmp_path):
    out = tmp_path / "model.onnx"
    assert (
        main(
            [
                str(folder),
                "--sparsity",
                "0.5",
                "--effort",
                "fast",
                "--score",
                "wanda",
                "--quiet",
                *SHORT[:4],
                "-o",
                str(out),
            ]
        )
        == 0
    )
    assert names(tmp_path) == {"model.onnx", "model.onnx.data", "model.onnx.report.json"}


@pytest.mark.slow
def test_rates_and_patterns_that_besa_learns_are_lowered(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(besa, "LEAST_STEPS", 4)
    given = [str(folder), "--sparsity", "0.5", "--calibration", str(text), "--effort", "fast", *SHORT]
    assert main([*given, "--allocate", "besa-row", "--besa-epochs", "2", "-o", str(tmp_path / "row.onnx")]) == 0
    report = json.loads((tmp_path / "row.onnx.report.json").read_text())
    assert report["settings"]["allocation"]["epochs"] == 2
    found = [(entry["sparsity"], math.prod(entry["shape"])) for entry in report["linears"] if entry["sparsity"]]
    assert sum(rate * size for rate, size in found) == pytest.approx(sum(size for _, size in found) / 2)
    assert len(set(found)) > 2
    assert main([*given, "--allocate", "besa-nm", "--besa-patterns", "2:4,dense", "-o", str(tmp_path / "nm.onnx")]) == 0
    report = json.loads((tmp_path / "nm.onnx.report.json").read_text())
    pruned = [entry for entry in report["linears"] if entry["pattern"] == "2:4"]
    assert len(pruned) == 14  # half of everything is 2:4 everywhere
    assert {entry["op"] for entry in pruned} == {"linear_nm"}


def test_auto_leaves_dense_what_this_machine_runs_slower(folder, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli.terminal, "width", 200)
    quick, slow = (Speed(0.0, (figure,) * 3, (figure,) * 3) for figure in (1e-9, 2e-9))
    monkeypatch.setattr(machine, "measure_dense", lambda: quick)
    monkeypatch.setattr(machine, "measure_sparse", lambda pattern, storage: slow)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "model.onnx"
    arguments = [str(folder), "--nm", "2:4", "--calibration", str(text), *SHORT[:4], "-o", str(out)]
    assert main([*arguments, "--lower", "auto", "--lower-for", "16"]) == 0
    report = json.loads((tmp_path / "model.onnx.report.json").read_text())
    assert report["settings"]["lower"] == "auto, for 16 tokens a call"
    assert report["machine"]["threads"] >= 1
    pruned = [entry for entry in report["linears"] if entry["pattern"] == "2:4"]
    assert len(pruned) == 14
    assert {entry["op"] for entry in pruned} == {"MatMul"}
    assert all("for 16 tokens here" in entry["reason"] for entry in pruned)
    assert "lowered where it is faster on" in capsys.readouterr().out


def test_eval_bench_inspect_and_generate_take_what_was_written(exported, text, capsys):
    assert main(["eval", str(exported), "--text", str(text), "--window", "32"]) == 0
    assert "18 windows of 32 tokens" in capsys.readouterr().out
    assert main(["eval", str(exported)]) == 2
    assert "give --text FILE, --exact, both, or --retrieval FOLDER" in capsys.readouterr().err
    assert main(["inspect", str(exported)]) == 0
    assert "2:4" in capsys.readouterr().out
    assert main(["generate", str(exported), "--prompt", "w1 w2 w3", "--max-new-tokens", "5"]) == 0
    assert "tokens/s" in capsys.readouterr().out
    assert main(["bench", str(exported), "--repeats", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"]


def test_simulate_takes_folders_and_files(folder, exported, capsys, monkeypatch):
    monkeypatch.setattr(cli.terminal, "width", 200)
    found = {}
    for model in (folder, exported):
        assert main(["simulate", str(model), "--json", "--tokens", "1000"]) == 0
        found[model] = {entry["path"]: entry for entry in json.loads(capsys.readouterr().out)}
    path = "model.layers.1.mlp.down_proj"
    assert found[folder][path] == {"path": path, "shape": [64, 128], "zeros": 0.0, "dense": 2000, "sparse": 2000}
    assert found[exported][path]["zeros"] == 0.5
    assert found[exported][path]["dense"] == 2000
    assert main(["simulate", str(exported), "--paper-compat"]) == 0
    assert "model.layers.*.mlp.down_proj" in capsys.readouterr().out
    assert main(["simulate", str(exported), "--paper-compat", "--tokens", "2"]) == 2
    assert "--tokens 2 cannot be had with --paper-compat" in capsys.readouterr().err


def test_eval_of_torch_and_of_its_dense_export_agree(folder, text, tmp_path, capsys):
    out = tmp_path / "dense.onnx"
    assert main([str(folder), "--quiet", "-o", str(out)]) == 0
    found = []
    for model in (folder, out):
        flags = ["--text", str(text), "--exact", "--window", "64", "--tokenizer", str(folder), "--json"]
        assert main(["eval", str(model), *flags]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["perplexity"] == pytest.approx(found[1]["perplexity"], rel=1e-5)
    assert found[0]["exact"] == found[1]["exact"]
    assert found[0]["exact"]["scores"].keys() == {"copying", "brackets", "arithmetic"}


@pytest.mark.parametrize(
    ("flags", "op", "group", "quantiser"),
    [
        (["--nm", "2:4", "--dtype", "int8", "--effort", "fast"], "linear_nm_int8", None, "rtn"),
        (["--nm", "2:4", "--dtype", "int4"], "linear_nm_int4", 128, "sweep"),
        pytest.param(
            ["--sparsity", "0.5", "--dtype", "int4", "--group", "32", "--quantise", "joint", "--tune", "block"],
            "linear_bitmask_int4",
            32,
            "joint",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_integers_are_stored_verified_and_shown(
    folder, text, tmp_path, capsys, monkeypatch, flags, op, group, quantiser
):
    monkeypatch.setattr(cli.terminal, "width", 200)  # a slow run makes another cell wide, and this one wrap
    out = tmp_path / "model.onnx"
    assert main([str(folder), *flags, "--calibration", str(text), *SHORT[:4], "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "quantised to 8 bits" in shown
    assert (f"quantised ({quantiser})" in shown) == (quantiser != "rtn")  # fast looks at no Hessian, which errors need
    report = json.loads((tmp_path / "model.onnx.report.json").read_text())
    assert report["settings"]["dtype"] == flags[3]
    assert report["settings"]["group"] == group
    assert report["settings"]["quantise"] == quantiser
    assert {entry["quantiser"] for entry in report["linears"] if entry["op"] == op} == {quantiser}
    assert all((e["error_quantised"] is None) == (quantiser == "rtn") for e in report["linears"] if e["op"] == op)
    assert sum(entry["op"] == op for entry in report["linears"]) == 14
    assert report["stored_linear_bytes"] < 0.25 * report["dense_linear_bytes"]
    assert main(["inspect", str(out)]) == 0
    assert op in capsys.readouterr().out


def test_best_distils_says_so_and_a_flag_changes_how(folder, text, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    given = [str(folder), "--nm", "2:4", "--calibration", str(text), *SHORT[:4], "-o", str(out), "--overwrite"]
    losses = []
    for flags, epochs, rate in ((["--effort", "best"], 3, USUAL), (["--distil", "2", "--distil-lr", "0.01"], 2, 0.01)):
        assert main([*given, *flags]) == 0
        assert "distilled" in capsys.readouterr().out
        report = json.loads((tmp_path / "model.onnx.report.json").read_text())
        assert (report["settings"]["distil"], report["settings"]["distil_lr"]) == (epochs, rate)
        (distilled,) = report["distilled"]
        assert distilled["after"] <= distilled["before"]
        assert report["pruning_seconds"]["distil"] > 0
        losses.append(distilled["after"])
    assert losses[0] != losses[1]


@pytest.mark.slow
def test_best_of_a_fraction_learns_rates_and_is_the_target_to_the_weight(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(besa, "LEAST_STEPS", 4)
    out = tmp_path / "model.onnx"
    given = [str(folder), "--sparsity", "0.5", "--effort", "best", "--calibration", str(text), *SHORT[:4]]
    assert main([*given, "--quiet", "-o", str(out)]) == 0
    report = json.loads((tmp_path / "model.onnx.report.json").read_text())
    assert report["settings"]["allocation"]["per"] == "row"
    assert (report["settings"]["score"], report["settings"]["mask_from"]) == ("wanda", "update")
    assert len(report["distilled"]) == 1
    pruned = [linear for linear in report["linears"] if linear["sparsity"] is not None]
    sizes = [rows * columns for rows, columns in (linear["shape"] for linear in pruned)]
    zeros = sum(size * linear["sparsity"] for size, linear in zip(sizes, pruned, strict=True))
    assert zeros == pytest.approx(sum(sizes) // 2)


def test_images_are_calibrated_from_npz_files(images, tmp_path, capsys):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.savez(inputs / f"{name}.npz", pixel_values=rng.standard_normal((2, 3, 32, 32), np.float32))
    arguments = [str(images), "--nm", "2:4", "--quiet", "-o", str(tmp_path / "out")]
    assert "does not take text; give --calibration-inputs" in refused(capsys, tmp_path / "out", *arguments[:4])
    assert main([*arguments, "--calibration-inputs", str(inputs)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(entry["op"] == "linear_nm" for entry in report["linears"]) == 12
    assert [row["name"] for row in report["latency"]] == ["batch 1"]
    left = [(entry["path"], entry["reason"]) for entry in report["linears"] if entry["op"] == "MatMul"]
    assert left == [("classifier", "outside the repeated layers")]
    found = inspect(tmp_path / "out")
    assert [(info.path, info.reason) for info in found if info.op == "MatMul"] == left


def test_text_encoders_are_calibrated_from_padded_npz_batches(tmp_path, capsys):
    random_model("bert").save_pretrained(tmp_path / "bert")
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (4, 20))
    mask = (np.arange(20) < np.array([[20], [7], [12], [1]])).astype(np.int64)
    np.savez(inputs / "a.npz", input_ids=ids, attention_mask=mask, token_type_ids=np.zeros_like(ids))
    arguments = [tmp_path / "bert", "--nm", "2:4"]
    assert "give --calibration FILE" in refused(capsys, tmp_path / "m.onnx", *arguments)
    files = [*map(str, arguments), "--calibration-inputs", str(inputs), "--quiet", "-o", str(tmp_path / "m.onnx")]
    assert main(files) == 0


def test_skip_leaves_layers_dense_and_reports_them(folder, text, tmp_path):
    out = tmp_path / "model.onnx"
    arguments = [str(folder), "--nm", "2:4", "--calibration", str(text), *SHORT]
    assert main([*arguments, "--skip", "*.down_proj", "--permute", "none", "-o", str(out)]) == 0
    linears = json.loads((tmp_path / "model.onnx.report.json").read_text())["linears"]
    skipped = [e for e in linears if e["reason"] == "skipped by --skip"]
    assert [e["path"] for e in skipped] == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert all(e["op"] == "MatMul" for e in skipped)


def test_given_masks_are_compiled_and_flags_they_overrule_are_refused(folder, text, tmp_path, capsys):
    path = "model.layers.1.mlp.down_proj"
    keep = torch.zeros(64, 128, dtype=torch.bool)
    keep.view(64, 32, 4)[..., 1:3] = True
    save_file({f"{path}.weight": keep}, tmp_path / "masks.safetensors")
    out = tmp_path / "model.onnx"
    arguments = [str(folder), "--mask", str(tmp_path / "masks.safetensors")]
    for flags, said in [
        (["--sparsity", "0.5"], "--sparsity has no effect with --mask"),
        (["--score", "wanda"], "--score has no effect with --mask"),
        (["--permute", "fold"], "--permute fold would move the weights"),
        (["--mask-from", "update"], "--mask-from update has no effect with --mask"),
    ]:
        assert said in refused(capsys, out, *arguments, *flags)
    assert "cannot be had for an .onnx file" in refused(capsys, out, "m.onnx", *arguments[1:])
    assert main([*arguments, "--effort", "fast", "--calibration", str(text), *SHORT, "-o", str(out)]) == 0
    (found,) = sparse_weights(out)
    assert (found[0].path, found[0].op) == (path, "linear_nm")
    dense = load_file(folder / "model.safetensors")[f"{path}.weight"]
    assert torch.equal(found[1], torch.where(keep, dense, 0.0))


def test_standard_ops_write_plain_matmul_with_zeros(folder, tmp_path, capsys):
    out = tmp_path / "model.onnx"
    assert main([str(folder), "--nm", "2:4", "--ops", "standard", *SHORT, "-o", str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "linear_nm" not in shown
    assert "2:4" in shown


def test_file_that_fails_its_verification_is_kept_as_failed(images, tmp_path, capsys, monkeypatch):
    import sparsify_export.compile as compiler

    stored = compiler.as_stored

    def wrong(params, packed):
        return {
            key: value * 1.5 if value.is_floating_point() else value for key, value in stored(params, packed).items()
        }

    monkeypatch.setattr(compiler, "as_stored", wrong)
    assert main([str(images), "--quiet", "-o", str(tmp_path / "model.onnx")]) == 4
    assert "verification failed: model.onnx differs from the model" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["model.onnx.failed"]


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(folder, text, tmp_path, monkeypatch, capsys):
    given = [str(folder), "--nm", "2:4", "--calibration", str(text), *SHORT[:4]]
    assert main([*given, "-o", str(tmp_path / "whole.onnx"), "--quiet"]) == 0
    kept, out = tmp_path / "kept", tmp_path / "model.onnx"

    def power_cut(*args):
        raise InputError("power cut")

    with monkeypatch.context() as broken:
        broken.setattr("sparsify_export.compile.store", power_cut)
        assert main([*given, "-o", str(out), "--checkpoint", str(kept)]) == 2
    assert sorted(file.name for file in kept.iterdir()) == [
        "block-0.checkpoint.safetensors",
        "block-1.checkpoint.safetensors",
        "run.json",
    ]
    assert main([*given, "-o", str(out), "--checkpoint", str(kept), "--damping", "0.05"]) == 2
    assert "kept holds another run" in capsys.readouterr().err
    assert main([*given, "-o", str(out), "--checkpoint", str(kept)]) == 0
    assert not kept.exists()
    (again,), (whole,) = (data_files(tmp_path / name) for name in ("model.onnx", "whole.onnx"))
    assert again.read_bytes() == whole.read_bytes()


def test_ctrl_c_exits_with_130_and_leaves_nothing(folder, tmp_path):
    command = [sys.executable, "-m", "sparsify_export", str(folder), "--nm", "2:4", "--samples", "4000"]
    # That many rows take the model long to write, so there is a middle to be interrupted in.
    command += ["-o", str(tmp_path / "m.onnx")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the settings are shown before work starts
        for _ in range(10):  # a library may swallow one, as it may a user's
            time.sleep(4)
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted" in said
    assert not list(tmp_path.iterdir())
