"""Files that are whole or not there, aligned, and read by the checker."""

import errno
import hashlib
import resource

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx.external_data_helper import ExternalDataInfo
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.onnx import write
from sparsify_export.passes.onnx.protos import data_files, external
from sparsify_export.passes.onnx.write import ALIGNMENT, INLINE, write_model, write_proto


def weight(rows: int, columns: int, fill: float | None = None) -> np.ndarray:
    random = np.random.default_rng(rows)
    return random.standard_normal((rows, columns), dtype=np.float32) if fill is None else np.full((rows, columns), fill)


def small(*arrays: np.ndarray) -> ir.Model:
    """``y = x A B ...``."""
    names = [f"w{i}" for i in range(len(arrays))]
    steps = "\n".join(f"x{i + 1} = MatMul (x{i}, {name})" for i, name in enumerate(names))
    text = f"""<ir_version: 10, opset_import: ["" : 23]>
    g (float[M, {arrays[0].shape[0]}] x0) => (float[M, {arrays[-1].shape[1]}] x{len(arrays)}) {{ {steps} }}"""
    # The text format cannot name values that nothing defines, so the weights are added as inputs first.
    inputs = ", ".join(f"float[{a.shape[0]}, {a.shape[1]}] {n}" for a, n in zip(arrays, names, strict=True))
    model = ir.from_onnx_text(text.replace(" x0)", f" x0, {inputs})"))
    for array, value in zip(arrays, list(model.graph.inputs)[1:], strict=True):
        value.const_value = ir.tensor(array.astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
        model.graph.inputs.remove(value)
    return model


A, B, C = weight(16, 17), weight(17, 31), weight(31, 2)


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_was_written_runs_and_passes_the_checker(tmp_path):
    path = tmp_path / "m.onnx"
    write_model(small(A, B, C), path, [])
    assert files(tmp_path).keys() == {"m.onnx", *(file.name for file in data_files(path))}
    assert len(files(tmp_path)) == 2
    onnx.checker.check_model(str(path), full_check=True)
    x = np.eye(16, dtype=np.float32)
    (y,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x0": x})
    a, b, c = (torch.from_numpy(array) for array in (A, B, C))
    close = compare(torch.from_numpy(y), a @ b @ c, a.double() @ b.double() @ c.double())
    assert close.ok, close


def test_large_tensors_are_aligned_and_small_ones_inline(tmp_path):
    path = tmp_path / "m.onnx"
    edge = weight(2, INLINE // 8)  # exactly INLINE bytes
    write_model(small(A, B, C, edge), path, [])
    tensors = {t.name: t for t in onnx.load(path, load_external_data=False).graph.initializer}
    places = {n: ExternalDataInfo(t) for n, t in tensors.items() if t.data_location == onnx.TensorProto.EXTERNAL}
    assert places.keys() == {"w0", "w1", "w3"}
    (file,) = data_files(path)
    assert all(place.location == file.name and place.offset % ALIGNMENT == 0 for place in places.values())
    assert file.name == f"m.onnx.{hashlib.blake2b(file.read_bytes()).hexdigest()[:12]}.data"
    assert [places[n].length for n in ("w0", "w1", "w3")] == [A.nbytes, B.nbytes, INLINE]
    data = file.read_bytes()
    for name, array in (("w0", A), ("w1", B), ("w3", edge)):
        place = places[name]
        assert data[place.offset : place.offset + place.length] == array.tobytes()
    assert len(data) == places["w3"].offset + places["w3"].length


def test_the_model_in_memory_is_pointed_at_the_file(tmp_path):
    model = small(A, B)
    write_model(model, tmp_path / "m.onnx", [])
    assert np.array_equal(model.graph.initializers["w0"].const_value.numpy(), A)
    write_model(model, tmp_path / "again.onnx", [])  # and can be written from there
    first, second = (data_files(tmp_path / name) for name in ("m.onnx", "again.onnx"))
    assert first[0].read_bytes() == second[0].read_bytes()


def test_each_weight_is_asked_for_once(tmp_path):
    model = small(A, B)
    asked = []

    def give():
        asked.append("w0")
        return ir.tensor(A, name="w0")

    value = model.graph.initializers["w0"]
    value.const_value = ir.LazyTensor(give, dtype=ir.DataType.FLOAT, shape=ir.Shape(A.shape), name="w0")
    write_model(model, tmp_path / "m.onnx", [])
    assert asked == ["w0"]


def crash_while_writing(monkeypatch, error):
    """The second large tensor cannot be read."""
    model = small(A, B)

    def give():
        raise error

    value = model.graph.initializers["w1"]
    value.const_value = ir.LazyTensor(give, dtype=ir.DataType.FLOAT, shape=ir.Shape(B.shape), name="w1")
    return model


def invalid(monkeypatch, error):
    """The checker refuses the finished file."""

    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(write.onnx.checker, "check_model", refuse)
    return small(A, B)


def full_disk(monkeypatch, error):
    """The disk has no room, and says so beforehand."""
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(write.psutil, "disk_usage", lambda path: usage)
    return small(A, B)


@pytest.mark.parametrize("before", [False, True], ids=["nothing there", "an older file there"])
@pytest.mark.parametrize(
    ("spoil", "error", "seen", "why"),
    [
        (crash_while_writing, OSError(errno.ENOSPC, "No space left on device"), InputError, "No space left on device"),
        (crash_while_writing, KeyboardInterrupt(), KeyboardInterrupt, None),
        (crash_while_writing, MemoryError("no memory"), MemoryError, "no memory"),
        (invalid, onnx.checker.ValidationError("our mistake"), onnx.checker.ValidationError, "our mistake"),
        (full_disk, None, InputError, r"takes \d+ bytes and the disk has 100 left"),
    ],
    ids=["disk full", "interrupted", "no memory", "invalid", "no room"],
)
def test_a_crash_leaves_what_was_there_before(tmp_path, monkeypatch, before, spoil, error, seen, why):
    path = tmp_path / "m.onnx"
    if before:
        write_model(small(C), path, [])
    held = files(tmp_path)
    model = spoil(monkeypatch, error)
    with pytest.raises(seen, match=why):
        write_model(model, path, [])
    assert files(tmp_path) == held


def test_a_model_that_replaces_another_never_reads_its_weights(tmp_path):
    path = tmp_path / "m.onnx"
    write_model(small(A), path, [])
    (older,) = data_files(path)
    held = older.read_bytes()
    write_model(small(A + 1), path, [])
    (newer,) = data_files(path)
    assert newer != older
    assert older.read_bytes() == held  # so the older model, read by whoever opened it, stays right
    assert np.array_equal(onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0]), A + 1)


def test_a_model_without_large_tensors_has_no_data_file(tmp_path):
    path = tmp_path / "m.onnx"
    write_model(small(weight(4, 4)), path, [])
    assert files(tmp_path).keys() == {"m.onnx"}
    onnx.checker.check_model(str(path), full_check=True)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*: No such file"):
        write_model(small(A), tmp_path / "nowhere" / "m.onnx", [])


def test_writing_twice_gives_identical_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_model(small(A, B, C), tmp_path / name / "m.onnx", [])
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_model_of_another_tool_keeps_all_but_its_initializers(tmp_path):
    inner = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["t"])],
        "body",
        [],
        [onnx.helper.make_tensor_value_info("t", 1, None)],
        [onnx.numpy_helper.from_array(A, "w")],
    )
    words = onnx.helper.make_tensor("words", onnx.TensorProto.STRING, [200], [b"0123456789"] * 200)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, [3, 16]), onnx.helper.make_tensor_value_info("c", 9, [])],
        [onnx.helper.make_tensor_value_info("y", 1, [3, 17])],
        [words, onnx.numpy_helper.from_array(C, "small")],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(proto, tmp_path / "in.onnx", save_as_external_data=True, size_threshold=0, location="in.data")
    loaded = onnx.load(tmp_path / "in.onnx", load_external_data=False)
    (tmp_path / "out").mkdir()
    write_proto(loaded, tmp_path / "out" / "m.onnx", base=tmp_path, check=False)
    (tmp_path / "in.data").unlink()  # small tensors that lay outside came along, inside the model
    got = onnx.load(tmp_path / "out" / "m.onnx")
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in got.graph.initializer}
    assert np.array_equal(arrays["small"], C)
    assert arrays["words"].tolist() == ["0123456789"] * 200
    branches = [attribute.g for attribute in got.graph.node[0].attribute]
    assert all(np.array_equal(onnx.numpy_helper.to_array(g.initializer[0]), A) for g in branches)


@pytest.mark.slow
def test_more_than_two_gigabytes_are_written_without_being_read_at_once(tmp_path):
    rows, columns = 17, 1 << 25  # 2.1 GB, as a hole in the file
    file = tmp_path / "big.data"
    with file.open("wb") as out:
        out.truncate(4 * rows * columns)
    tensors = []
    for row in range(rows):
        proto = onnx.TensorProto(name=f"w{row}", data_type=1, dims=[1, columns])
        tensors.append(external(proto, file.name, 4 * row * columns, 4 * columns))
    sums = [onnx.helper.make_node("Gather", [f"w{row}", "i"], [f"y{row}"], axis=1) for row in range(rows)]
    outputs = [onnx.helper.make_tensor_value_info(f"y{row}", 1, [1, 1]) for row in range(rows)]
    index = onnx.helper.make_tensor_value_info("i", 7, [1])
    graph = onnx.helper.make_graph(sums, "g", [index], outputs, tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_proto(model, tmp_path / "m.onnx", base=tmp_path, check=True)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB; the file's own pages are counted too
    assert grown < 600 * 1024
    assert (tmp_path / "m.onnx").stat().st_size < 10_000
    (data,) = data_files(tmp_path / "m.onnx")
    assert data.stat().st_size == 4 * rows * columns
    data.unlink()
