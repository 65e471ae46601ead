"""ONNX files that are damaged or strange: one sentence, exit code 2, nothing left behind; in every command."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_command import compiled, refused
from onnx_models import FLOAT, build, dense, mlp, node, saved, sparse_kn
from sparsify_export.cli import main
from sparsify_export.passes.onnx import sparse_linears


def external(folder, **entries):
    """Two linears whose weights lie beside the model; what is said about the first is ``entries``."""
    path = folder / "e.onnx"
    onnx.save(mlp(dense(64, 64), dense(64, 32)), str(path), save_as_external_data=True, location="e.data")
    proto = onnx.load(str(path), load_external_data=False)
    tensor = next(t for t in proto.graph.initializer if t.name == "w0")
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    path.write_bytes(proto.SerializeToString())
    return path


def changed(change):
    """Two linears, and something about the first that ``change`` does."""

    def make(folder):
        proto = mlp(dense(64, 64), dense(64, 32))
        change(proto.graph)
        path = folder / "c.onnx"
        path.write_bytes(proto.SerializeToString())
        return path

    return make


def of_type(kind):
    return changed(lambda graph: setattr(graph.initializer[0], "data_type", kind))


def with_inputs(*names):
    def change(graph):
        graph.node[0].input[:] = names

    return changed(change)


def without_output(graph):
    del graph.node[0].output[:]


def empty_constant(graph):
    graph.node.insert(0, node("Constant", [], ["c"]))


def negative(graph):
    graph.initializer[0].dims[:] = [-64, -64]


FILES = {
    "an offset that is no number": (lambda folder: external(folder, offset="ten"), "the offset of w0 is 'ten'"),
    "a negative offset": (lambda folder: external(folder, offset="-64"), "the offset of w0 is '-64'"),
    "a length that is no number": (lambda folder: external(folder, length="1e9"), "the length of w0 is '1e9'"),
    "an offset beyond every file": (lambda folder: external(folder, offset="9" * 18), "is damaged: w0 ends at byte"),
    "data type 0": (of_type(0), "'w0' has data type 0"),
    "data type 99": (of_type(99), "'w0' has data type 99"),
    "negative lengths": (changed(negative), "lengths [-64, -64]"),
    "a Constant without attribute": (changed(empty_constant), "Constant 'c' has no attribute"),
    "a MatMul without inputs": (with_inputs(), "MatMul 'fc0' has 0 inputs; want 2 or more"),
    "a MatMul with one input": (with_inputs("x"), "MatMul 'fc0' has 1 inputs; want 2 or more"),
    "a node without output": (changed(without_output), "MatMul 'fc0' has no output"),
}


@pytest.mark.parametrize("case", FILES)
def test_damage_is_a_sentence(tmp_path, capsys, case):
    make, why = FILES[case]
    path = make(tmp_path)
    assert why in refused(capsys, tmp_path / "o.onnx", path, "--nm", "2:4")
    for command in ("inspect", "simulate"):
        assert main([command, str(path)]) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert why in said


def test_inputs_that_no_memory_holds_are_refused(tmp_path, capsys):
    proto = build([node("MatMul", ["x", "w"], ["y"], name="fc")], {"x": [2**60, 64]}, ["y"], {"w": sparse_kn(64, 32)})
    said = refused(capsys, tmp_path / "o.onnx", saved(proto, tmp_path))
    assert "input x has the shape [1152921504606846976, 64]" in said


@pytest.mark.parametrize("flags", [["--nm", "2:4"], ["--sparsity", "0.5"]])
def test_weights_whose_sums_overflow_are_named(tmp_path, capsys, flags):
    path = saved(mlp(dense(64, 64) * np.float32(1e38), dense(64, 32)), tmp_path)
    said = refused(capsys, tmp_path / "o.onnx", path, *flags)
    assert "fc0: its weights reach" in said
    assert "overflows float32" in said


@pytest.mark.parametrize("flags", [["--nm", "2:4"], ["--sparsity", "0.5"], ["--nm", "2:4", "--dtype", "int8"]])
def test_a_weight_of_zeros_stays_dense(tmp_path, flags):
    path = saved(mlp(np.zeros((64, 64), np.float32), dense(64, 32)), tmp_path)
    report = compiled(path, tmp_path / "o.onnx", *flags)
    assert [(e["op"], e["reason"]) for e in report["linears"] if e["path"] == "fc0"] == [
        ("MatMul", "the weight is zero everywhere")
    ]


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_a_weight_is_rounded_at_every_cast(tmp_path, kind):
    """Weight -> Cast to 16 bits -> Cast back -> MatMul: the product has rounded weights, and so has the result."""
    nodes = [
        node("Cast", ["w"], ["short"], to=kind),
        node("Cast", ["short"], ["back"], to=FLOAT),
        node("MatMul", ["x", "back"], ["y"], name="fc"),
    ]
    path = saved(build(nodes, {"x": ["t", 64]}, ["y"], {"w": sparse_kn(64, 32)}), tmp_path)
    report = compiled(path, tmp_path / "o.onnx")
    assert report["linears"][0]["op"] == "linear_nm"
    stored = {t.name: t for t in onnx.load(str(tmp_path / "o.onnx")).graph.initializer}
    values = np.sort(numpy_helper.to_array(stored["w.values"]).reshape(-1))
    cast = helper.make_tensor("", kind, [64 * 32], sparse_kn(64, 32).reshape(-1))
    want = numpy_helper.to_array(cast).astype(np.float32)
    np.testing.assert_array_equal(values, np.sort(want[want != 0]))


def test_a_weight_cast_from_one_short_type_to_the_other_is_left(tmp_path):
    nodes = [
        node("Cast", ["w"], ["c"], to=TensorProto.BFLOAT16),
        node("Cast", ["c"], ["f"], to=FLOAT),
        node("MatMul", ["x", "f"], ["y"], name="fc"),
    ]
    weights = {"w": sparse_kn(64, 32).astype(np.float16)}
    report = compiled(saved(build(nodes, {"x": ["t", 64]}, ["y"], weights), tmp_path), tmp_path / "o.onnx")
    assert report["linears"][0]["reason"] == "its weight is cast from one type of 16 bits to the other"


def shortened(tensor):
    tensor.raw_data = tensor.raw_data[:-8]


def emptied(tensor):
    tensor.ClearField("raw_data")


def made_strings(tensor):
    emptied(tensor)
    tensor.data_type = TensorProto.STRING
    tensor.string_data.extend([b"a"] * int(np.prod(tensor.dims)))


@pytest.mark.parametrize("damage", [shortened, emptied, made_strings])
def test_damaged_weights_of_our_own_ops_are_refused_before_their_checksums_are_made(tmp_path, damage, capsys):
    """So what cannot be read while checksums are made of a file just written is a fault of ours, and is called that."""
    compiled(saved(mlp(sparse_kn(64, 64)), tmp_path), tmp_path / "o.onnx")
    model = onnx.load(str(tmp_path / "o.onnx"))
    damage(next(tensor for tensor in model.graph.initializer if tensor.name.endswith(".values")))
    said = refused(capsys, tmp_path / "again.onnx", saved(model, tmp_path, "damaged.onnx"))
    assert said.startswith(f"cannot open {tmp_path / 'damaged.onnx'}: ")
    assert "w0.values" in said


def test_why_nothing_can_be_pruned_is_said_for_every_kind(tmp_path, capsys):
    nodes = [
        node("Einsum", ["x", "e"], ["h"], name="ein", equation="ij,jk->ik"),
        node("MatMul", ["h", "w"], ["z"], name="odd"),
        node("Relu", ["z"], ["r"]),
        node("Relu", ["r"], ["y"]),
    ]
    path = saved(build(nodes, {"x": ["t", 64]}, ["y"], {"e": dense(64, 30), "w": dense(30, 8)}), tmp_path)
    said = refused(capsys, tmp_path / "o.onnx", path, "--nm", "2:4")
    assert "ein: the op Einsum is left as it is" in said
    assert "odd: in_features 30 is not a multiple of 4" in said


def masked(folder, *, padding):
    """Tokens are multiplied by a mask of int64 before the only layer: ones count, or (``padding``) ones do not."""
    nodes = [node("Cast", ["m"], ["f"], to=FLOAT)]
    nodes += [node("Sub", ["one", "f"], ["keep"])] if padding else [node("Identity", ["f"], ["keep"])]
    nodes += [
        node("Mul", ["x", "keep"], ["z"]),
        node("MatMul", ["z", "w"], ["h"], name="fc"),
        node("Relu", ["h"], ["r"]),
        node("Add", ["r", "one"], ["y"]),
    ]
    weights = {"w": dense(64, 32), "one": np.float32(1)}
    proto = build(nodes, {"x": [16, 64], "m": [16, 1]}, ["y"], weights)
    proto.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    return saved(proto, folder)


@pytest.mark.parametrize("padding", [False, True])
def test_a_mask_that_means_padding_does_not_blind_the_proof(tmp_path, padding, monkeypatch, capsys):
    path = masked(tmp_path, padding=padding)
    report = compiled(path, tmp_path / "o.onnx", "--nm", "2:4")
    assert not any("prove nothing" in entry["how"] for entry in report["verified"])
    pack = sparse_linears.pack
    monkeypatch.setattr(sparse_linears, "pack", lambda weight, *rest: pack(weight * 1.01, *rest))
    assert main([str(path), "--nm", "2:4", "--quiet", "-o", str(tmp_path / "p.onnx")]) == 4
    assert "differs from the dense model (kernels)" in capsys.readouterr().err


def test_outputs_that_do_not_depend_on_the_linears_are_said_to_prove_nothing(tmp_path, monkeypatch, capsys):
    """The inputs given are all zero; a wrong weight is found by the linear itself."""
    given = saved(mlp(dense(64, 64), dense(64, 32)), tmp_path)
    proto = onnx.load(str(given))
    for tensor in proto.graph.initializer:
        if tensor.name.startswith("b"):
            tensor.CopyFrom(numpy_helper.from_array(np.zeros(tensor.dims[0], np.float32), tensor.name))
    onnx.save(proto, str(given))
    (tmp_path / "inputs").mkdir()
    np.savez(tmp_path / "inputs" / "a.npz", x=np.zeros((4, 64), np.float32))
    flags = ["--nm", "2:4", "--effort", "fast", "--score", "magnitude"]
    flags += ["--calibration-inputs", str(tmp_path / "inputs")]
    report = compiled(given, tmp_path / "o.onnx", *flags)
    assert "do not depend on what was lowered" in report["verified"][-1]["how"]
    pack = sparse_linears.pack
    monkeypatch.setattr(sparse_linears, "pack", lambda weight, *rest: pack(weight * 1.01, *rest))
    assert main([str(given), *flags, "--quiet", "-o", str(tmp_path / "p.onnx")]) == 4
    assert "each linear" in capsys.readouterr().err
