"""An ONNX model in: what the command writes, proves, refuses, and that nothing is left behind when it fails."""

import json
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_models import FLOAT, MICROSOFT, build, dense, mlp, node, rng, saved, sparse_kn
from sparsify_export import onnx_in
from sparsify_export.cli import main
from sparsify_export.passes.cost import Speed
from sparsify_export.passes.onnx import sparse_linears
from sparsify_export.runtime import machine


def compiled(source, out, *flags):
    assert main([str(source), *map(str, flags), "--quiet", "-o", str(out)]) == 0
    report = out / "report.json" if out.is_dir() else out.with_name(out.name + ".report.json")
    return json.loads(report.read_text())


def refused(capsys, out, *arguments):
    before = sorted(out.parent.iterdir())
    capsys.readouterr()
    assert main([*map(str, arguments), "--quiet", "-o", str(out)]) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert sorted(out.parent.iterdir()) == before
    return said.removeprefix("sparsify-export: ")


@pytest.fixture
def given(tmp_path):
    return saved(mlp(dense(64, 64, 1), dense(64, 32, 2)), tmp_path, "given.onnx")


def test_prune_lower_verify_and_inspect(given, tmp_path, capsys):
    out = tmp_path / "sparse.onnx"
    report = compiled(given, out, "--nm", "2:4")
    assert {f.name for f in tmp_path.iterdir()} == {
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
    assert [entry["how"] for entry in report["verified"]] == ["kernels", "functions"]
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
    compiled(tmp_path / "sparse.onnx", tmp_path / "again.onnx")
    first, again = (onnx.load(str(tmp_path / name)) for name in ("sparse.onnx", "again.onnx"))
    assert first.graph == again.graph
    assert first.functions == again.functions


def test_standard_ops_keep_every_op_and_hold_zeros(given, tmp_path):
    compiled(given, tmp_path / "o.onnx", "--nm", "2:4", "--ops", "standard")
    result, before = onnx.load(str(tmp_path / "o.onnx")), onnx.load(str(given))
    assert result.graph.node == before.graph.node
    report = compiled(tmp_path / "o.onnx", tmp_path / "p.onnx")
    assert {e["pattern"] for e in report["linears"]} == {"2:4"}


def test_a_folder_and_the_file_itself_can_be_the_output(given, tmp_path):
    compiled(given, tmp_path / "folder", "--nm", "2:4")
    assert {f.name for f in (tmp_path / "folder").iterdir()} == {"model.onnx", "model.onnx.data", "report.json"}
    compiled(given, given, "--nm", "2:4", "--overwrite")
    assert "linear_nm" in {n.op_type for n in onnx.load(str(given), load_external_data=False).graph.node}


def test_calibration_inputs_change_what_is_kept(given, tmp_path):
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    x = rng().standard_normal((50, 64)).astype(np.float32)
    x[:, ::4] *= 1e-3  # the first of every group hardly matters
    np.savez(inputs / "a.npz", x=x)
    flags = ["--nm", "2:4", "--ops", "standard", "--calibration-inputs", inputs]
    report = compiled(given, tmp_path / "o.onnx", *flags, "--score", "wanda")
    assert report["settings"]["score"] == "wanda"
    result = onnx.load(str(tmp_path / "o.onnx"))
    weight = next(onnx.numpy_helper.to_array(t) for t in result.graph.initializer if t.name == "w0")
    assert np.count_nonzero(weight[::4]) < 0.02 * np.count_nonzero(weight)
    compiled(given, tmp_path / "p.onnx", *flags, "--samples", "1")


def genai(folder):
    """Two layers as onnxruntime-genai's builder writes them."""
    width, heads, vocabulary = 64, 4, 48
    nodes = [
        node("Gather", ["embed", "input_ids"], ["h"]),
        node("ReduceSum", ["attention_mask", "one"], ["sum"], keepdims=0),
        node("Sub", ["sum", "unit"], ["last"]),
        node("Cast", ["last"], ["seqlens"], to=TensorProto.INT32),
        node("Shape", ["attention_mask"], ["shape"]),
        node("Gather", ["shape", "axis"], ["total64"], axis=0),
        node("Cast", ["total64"], ["total"], to=TensorProto.INT32),
        node("SimplifiedLayerNormalization", ["h", "norm"], ["n0"], axis=-1, epsilon=1e-5, stash_type=1),
        node("MatMul", ["n0", "w_qkv"], ["qkv"], name="/attn/qkv_proj/MatMul"),
        node(
            "GroupQueryAttention",
            ["qkv", "", "", "past_key_values.0.key", "past_key_values.0.value", "seqlens", "total"],
            ["a", "present.0.key", "present.0.value"],
            num_heads=heads,
            kv_num_heads=2,
            domain=MICROSOFT,
        ),
        node("MatMul", ["a", "w_o"], ["o"], name="/attn/o_proj/MatMul"),
        node(
            "SkipSimplifiedLayerNormalization", ["h", "o", "norm"], ["n1", "", "", "s"], epsilon=1e-5, domain=MICROSOFT
        ),
        node("MatMul", ["n1", "w_up"], ["u"], name="/mlp/up_proj/MatMul"),
        node("Sigmoid", ["u"], ["g"]),
        node("Mul", ["u", "g"], ["m"]),
        node("MatMul", ["m", "w_down"], ["d"], name="/mlp/down_proj/MatMul"),
        node("SkipSimplifiedLayerNormalization", ["s", "d", "norm"], ["n2"], epsilon=1e-5, domain=MICROSOFT),
        node("MatMul", ["n2", "w_head"], ["logits"], name="/lm_head/MatMul"),
    ]
    weights = {
        "embed": dense(vocabulary, width) * 7,
        "norm": np.ones(width, np.float32),
        "w_qkv": dense(width, 2 * width, 1),
        "w_o": dense(width, width, 2),
        "w_up": dense(width, 128, 3),
        "w_down": dense(128, width, 4),
        "w_head": dense(width, vocabulary, 5),
        "one": np.array([1]),
        "unit": np.array([1]),
        "axis": np.array(1),
    }
    cache = ["batch_size", 2, "past_sequence_length", "kv_cache_dim"]
    inputs = {"input_ids": ["batch_size", "sequence_length"], "attention_mask": ["batch_size", "total_sequence_length"]}
    pasts = {f"past_key_values.0.{name}": cache for name in ("key", "value")}
    outputs = ["logits", "present.0.key", "present.0.value"]
    proto = build(nodes, inputs | pasts, outputs, weights, opset=21, ir=10)
    for value in proto.graph.input[:2]:
        value.type.tensor_type.elem_type = TensorProto.INT64
    del proto.graph.output[:]
    proto.graph.output.extend(
        helper.make_tensor_value_info(n, FLOAT, [None] * (3 if n == "logits" else 4)) for n in outputs
    )
    return saved(proto, folder, "genai.onnx")


def test_models_of_onnxruntime_genai_stay_runnable(tmp_path):
    report = compiled(genai(tmp_path), tmp_path / "o.onnx", "--nm", "2:4")
    assert {e["path"]: e["op"] for e in report["linears"]} == {
        "/attn/qkv_proj/MatMul": "linear_nm",
        "/attn/o_proj/MatMul": "linear_nm",
        "/mlp/up_proj/MatMul": "linear_nm",
        "/mlp/down_proj/MatMul": "linear_nm",
        "/lm_head/MatMul": "MatMul",
    }


FLAGS = {
    "--permute fold": "cannot be had for an .onnx file",
    "--effort balanced": "an .onnx file is pruned with --effort fast",
    "--update admm": "--update admm needs the traced model",
    "--damping 0.1": "--damping 0.1 has no effect without an update",
    "--score wanda": "give --calibration-inputs",
    "--ria-power 0.3": "has no effect without --calibration-inputs",
    "--calibration text.txt": "give --calibration-inputs",
    "--eval text.txt": "--eval has no meaning",
    "--windows 3": "--windows has no meaning",
    "--trust-remote-code": "--trust-remote-code has no meaning",
    "--seq-len 64": "--seq-len has no meaning",
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
    onnx.save(onnx.load(str(given)), str(tmp_path / "e.onnx"), save_as_external_data=True, location="o.onnx.data")
    assert "would overwrite" in refused(capsys, tmp_path / "o.onnx", tmp_path / "e.onnx", "--nm", "2:4")


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


def test_weights_behind_links_are_read(given, tmp_path):
    blobs, shown = tmp_path / "blobs", tmp_path / "shown"
    blobs.mkdir()
    shown.mkdir()
    onnx.save(onnx.load(str(given)), str(blobs / "m.onnx"), save_as_external_data=True, location="m.data")
    for name in ("m.onnx", "m.data"):
        (shown / name).symlink_to(Path("..") / "blobs" / name)
    compiled(shown / "m.onnx", tmp_path / "o.onnx", "--nm", "2:4")


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


def test_a_large_result_is_not_run_without_kernels_and_that_is_said(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(onnx_in, "LARGEST_UNPACKED", 1000)
    assert main([str(given), "--nm", "2:4", "-o", str(tmp_path / "o.onnx")]) == 0
    assert "not run without our kernels" in " ".join(capsys.readouterr().out.split())
    report = json.loads((tmp_path / "o.onnx.report.json").read_text())
    assert [entry["how"] for entry in report["verified"]] == ["kernels"]
    assert report["not_verified"].endswith("its weights unpack to 24576 bytes, more than 1000")
